"""PiToMe: Accelerating Transformers with Spectrum-Preserving Token Merging (Tran et al., NeurIPS 2024, arXiv:2405.16148).

Between attention and MLP, on keys (mean over heads). The energy of a token measures how many similar tokens it has: the mean
over all patch tokens of ELU(cosine - margin), where the margin falls from block to block, 0.75 (1 - block / depth). Tokens
of high energy are merged, those of low energy are protected. In the first half of the blocks all tokens are sorted by
falling energy, those at even positions of this order are matched to those at odd positions, and the r best matches merge. In
the second half only the 2r tokens of highest energy are sorted, and all r at even positions merge. Merged tokens are means
weighted by size; the output has the protected tokens first, then the merged ones.

A keep rate merges r = floor(L - keep L) of L patch tokens, at three blocks by default; ``ratio`` is the authors' setting, the
same rate in every block.

As in the published code, sizes weight the means but not the attention; ``proportional`` adds ToMe's proportional attention.
Written from a description alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.gather import in_parts
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens
from laconic.methods.ops import Pairing, cosine, soft_matching, topk_split


class PiToMeReducer(Reducer):
    """Rank tokens by energy, then match and merge those with the highest energy."""

    reads = "keys"

    def __init__(self, margin: float, early: bool, proportional: bool) -> None:
        super().__init__()
        self.margin, self.early, self.proportional = margin, early, proportional

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        keys = seen.keys.detach()
        energy = energies(keys, self.margin)
        r = len(tokens) - n
        line, protected = topk_split(energy, len(tokens) if self.early else min(2 * r, len(tokens)))
        dst, stay = soft_matching(keys, line[:, ::2], line[:, 1::2], r, "similarity", protected)
        tokens = tokens.merge(dst, None, stay, complete=True)
        return tokens.replace(attn_scale=tokens.size) if self.proportional else tokens


def energies(keys: Float[Tensor, "B L D"], margin: float) -> Float[Tensor, "B L"]:
    """Return the mean of ELU(cosine - margin) to all tokens."""
    parts = in_parts(keys, keys.shape[1])
    return torch.cat([F.elu(cosine(part, keys) - margin).mean(2) for part in parts], 1)


@method(
    "pitome",
    title="PiToMe: merge the tokens that have most company",
    paper="2405.16148",
    phase="between",
    score="similarity",
    score_detail="energy of key similarities",
    rest="merged",
    rest_detail="merged by size",
    trained=False,
)
@dataclass(frozen=True)
class PiToMe(Pairing):
    """Options of ``pitome``: the margin of similarity, proportional attention, and the number of merged tokens.

    Args:
        margin: similarity above which a token counts as similar, at block 0; it falls linearly to zero over the depth.
        proportional: add log(size) to the attention logits towards a token, as ToMe does (the published code does not).
        ratio: the share of its tokens that every block keeps (published: 0.9 to 0.95). None: give a keep rate instead.
        spread: see `Pairing`.
    """

    margin: float = 0.75
    proportional: bool = False
    ratio: float | None = None

    def build(self, site: BlockContext) -> Reducer:
        margin = self.margin * (1 - site.block / max(site.depth, site.block + 1))
        return PiToMeReducer(margin, _early(site), self.proportional)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if self.ratio is None:
            return super().default_schedule(depth, keep, at)
        return self.in_every_block(self.ratio, depth, keep, at)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return max(n - math.floor(n - rates[-1] * n), n - n // 2)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        r = before - after
        matched = (before // 2) * (before - before // 2) if _early(site) else r * r
        return {"matmul": (before * before + matched) * (site.dim // site.heads)}


def _early(site: BlockContext) -> bool:
    return site.block < (site.depth + 1) // 2
