"""SPViT: Enabling Faster Vision Transformers via Latency-aware Soft Token Pruning (Kong et al., ECCV 2022, arXiv:2112.13890).

Before a block a selector asks every head about every token. One small network, the same for all heads, maps a head's part of
the token (a local half, and a global half averaged over the tokens that are there) to the logarithms of keeping and of
dropping it; a second one weighs the heads, token by token, by the means of their channels. Weighted means over heads of the
log-probabilities decide, of the probabilities score (sec. 3.2). The tokens that leave at a stage become one package token at
the end: the sum of their features by their probabilities of being kept. Packages are asked later on, too, and stay (sec. 3.3).

* Inference: a token stays if keeping is at least as likely as dropping, so that every image keeps a number of its own.
* Training: a hard Gumbel-softmax decision with straight-through gradients; those that leave are hidden. Loss "ratio":
  (share of patches kept, mean over the batch - rho)^2, rho from ``ratios``, or with keep rates their product so far.

Departures: the published code draws Gumbel noise in evaluation too; here inference has none, and an image always gets the
same answer. There the sum is not divided by its weights, as with ``package="sum"``; ``"mean"`` is the paper's (where nothing
leaves, zero in both cases). Its softmax in training adds 1e-6 to every attention weight; none leaks here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.adaptive import AdaptiveMethod, AdaptiveReducer
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import of_the_initial, quarters
from laconic.core.tokens import Tokens
from laconic.methods.ops import Selector, by_stage, gumbel_keep, last_copies, renamed, require

PACKAGE = "package"  # the column that is 1 for package tokens


class SPViTReducer(AdaptiveReducer):
    """Select, package what leaves, hide it."""

    def __init__(self, site: BlockContext, package: str, ratio: float | None) -> None:
        super().__init__()
        self.selector, self.package, self.ratio = Selector(site.dim, site.heads), package, ratio

    def before(self, tokens: Tokens, n: int) -> Tokens:
        there = tokens.keep_mask_or_ones
        packages = tokens.per_token.get(PACKAGE, torch.zeros_like(there))
        log, scores = self.selector(tokens.patches, there)
        keep = torch.where(packages > 0, 1.0, self.decide(log))
        gone, score = (1 - keep) * there, scores[..., 0]
        weight = score * gone
        if self.package == "mean":
            total = weight.sum(1, keepdim=True)
            weight = weight / torch.where(total > 0, total, 1.0)
        # it stands in the place of the one that it has most of
        first = (score + 2 * gone + 4 * there).detach().argmax(1, keepdim=True)
        tokens = tokens.append(weight.unsqueeze(1) @ tokens.patches.float(), tokens.origin_index.gather(1, first))
        tokens = tokens.replace(per_token={**tokens.per_token, PACKAGE: F.pad(packages, (0, 1), value=1.0)})
        return self.leave(tokens, F.pad(keep, (0, 1), value=1.0), torch.full_like(arange_like(tokens.size), len(tokens) - 1))

    def decide(self, log: Tensor) -> Tensor:
        """1 for what stays, else 0: exactly so, since what is left of nothing would be blown up by a mean."""
        if not self.training:
            return (log[..., 0] >= log[..., 1]).to(log.dtype)
        soft = gumbel_keep(log)
        return (soft > 0.5).to(log.dtype) + (soft - soft.detach())

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        if tokens.keep_mask is None or PACKAGE not in tokens.per_token:
            return {}
        kept = (tokens.keep_mask * (1 - tokens.per_token[PACKAGE])).sum(1).mean() / tokens.token_of_patch.shape[1]
        return {"ratio": (kept - (rate if self.ratio is None else self.ratio)).square()}


@method(
    "spvit",
    title="SPViT: package what a selector drops",
    paper="2112.13890",
    phase="before",
    score="learned selector",
    rest="packaged into one token a stage",
    trained=True,
    learns=True,
    count="variable",
)
@dataclass(frozen=True)
class SPViT(AdaptiveMethod):
    """Options of ``spvit``: how tokens are packaged, what share of the patches to aim at, and those of `AdaptiveMethod`."""

    package: Literal["sum", "mean"] = "sum"  # of what leaves, weighted by its scores
    ratios: tuple[float, ...] = (0.617, 0.369, 0.137)  # aims of training, one for each stage, where no keep rates are given

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = all(0 < ratio <= 1 for ratio in self.ratios)
        require("spvit", "ratios", self.ratios, shares, "are shares of the patches to keep, above 0 and up to 1")

    def build(self, site: BlockContext) -> Reducer:
        alone = site.keep is None and (site.schedule is None or site.schedule.unit == "adaptive")
        if alone and site.ordinal >= len(self.ratios):
            short = f"ratios has {len(self.ratios)} shares to aim at, and block {site.block} is stage {site.ordinal + 1}"
            raise ValueError(f"spvit: {short}; give ratios= for all blocks, or keep= (their product so far is aimed at)")
        if site.dim % (2 * site.heads):
            raise ValueError(f"spvit parts the channels of each head in two halves; {site.dim} of {site.heads} heads are odd")
        return SPViTReducer(site, self.package, self.ratios[site.ordinal] if alone else None)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return quarters(depth)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        """The patches kept, and a package token of every stage so far."""
        return of_the_initial(rates, n, patches) + sum(rate < 1 for rate in rates)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        d, narrow = site.dim // site.heads, max(1, site.heads // 2)
        linear = d * d + d * (d // 2) + (d // 2) * (d // 4) + (d // 4) * 2
        sums = before * (site.dim // 2 + site.dim)  # the global halves, and the package
        return {"matmul": before * site.heads * (linear + 2 * narrow), "layernorm": before * site.dim, "elementwise": sums}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Their network lies there once for every head, of which their own code takes the last."""
        last = last_copies(weights, r"(score_predictor\.\d+\.(?:in|out)_conv)\.\d+\.(.+)")
        layer = r"(laconic\.reducers\.\d+\.selector)\.((?:in|out)_conv\..+)"
        return renamed(by_stage(last, at, "score_predictor", "selector."), (layer, r"\1.predictor.\2"))
