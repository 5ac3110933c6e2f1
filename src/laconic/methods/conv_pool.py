"""Convolutional pooling: one of the two mergers with parameters in table 4 of BAT (Long et al., CVPR 2023, arXiv:2211.11315).

Between attention and MLP, along the sequence of tokens: a strided convolution whose kernel is as long as its stride, one
channel at a time (``depthwise``) or over all channels (``full``). N tokens split into n equal strides only if n divides N, so
the kernel has ceil(N / n) taps, and a run that is one token short does not use its last tap. Tokens are weighted by their
share of the patches of their run (equal weights, at first).

The paper only names it, and there is no published code. It starts as average pooling (``avg-pool``), so that a trained
backbone is not disturbed. The shape of its weights depends on the token counts: it works for one image size and one schedule.
BAT itself cannot use it as a merger (``bat`` has no parameters): pool the ``inattentive`` tokens here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from laconic.core.attention import AttentionView
from laconic.core.gather import gather_rows
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import group_normalize, runs, set_out
from laconic.methods.resample import InSequence

FIXED = "its weights fix the counts, so use the image size and the schedule that it was built with (no keep-rate warm-in)"


class ConvPoolReducer(Reducer):
    """Apply a strided convolution over the sequence; initialised to the mean of each stride."""

    def __init__(self, options: ConvPool, site: BlockContext) -> None:
        super().__init__()
        _, rest, pooled = options.parts(site.before, site.after)
        self.options, self.taps = options, -(-rest // pooled)
        groups = site.dim if options.kernel == "depthwise" else 1
        self.conv = nn.Conv1d(site.dim, site.dim, self.taps, stride=self.taps, groups=groups)
        with torch.no_grad():
            own = torch.eye(site.dim).reshape(site.dim, -1, 1) if groups == 1 else torch.ones(site.dim, 1, 1)
            self.conv.weight.copy_(own / self.taps)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        kept, rest = self.options.part(tokens, seen, n, self.options.order)
        alone, count = kept.shape[1], n - kept.shape[1]
        if rest.shape[1] > self.taps * count:
            raise ValueError(
                f"conv-pool was built with {self.taps} taps and got {rest.shape[1]} tokens to turn into {count}; {FIXED}"
            )
        run, first = runs(rest, count)
        dst, lead = set_out(kept, rest, run, first)
        weight = group_normalize(tokens.size, dst, n, complete=True)
        left = tokens.merge(dst, weight, lead, complete=True)
        place = (first.unsqueeze(2) + torch.arange(self.taps, device=first.device)).flatten(1)  # [B, M * taps]
        at = place.clamp_max(rest.shape[1] - 1)
        inside = (place == at) & (run.gather(1, at) == torch.arange(count, device=at.device).repeat_interleave(self.taps))
        weight = (weight.gather(1, rest.gather(1, at)) * self.taps).masked_fill(~inside, 0.0)
        x = (gather_rows(tokens.rows(rest), at) * weight.unsqueeze(-1)).to(self.conv.weight.dtype)
        pooled = self.conv(x.transpose(1, 2)).transpose(1, 2).to(tokens.x.dtype)
        return left.replace(x=torch.cat([left.x[:, : tokens.prefix + alone], pooled], 1))


@method(
    "conv-pool",
    title="Convolutional pooling: a learned strided convolution",
    paper="2211.11315",
    phase="between",
    score="none",
    rest="merged",
    rest_detail="convolved with its neighbours",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class ConvPool(InSequence):
    """Options of ``conv-pool``: those of `InSequence`, and the kernel (``depthwise`` or ``full``)."""

    kernel: Literal["depthwise", "full"] = "depthwise"

    def build(self, site: BlockContext) -> Reducer:
        return ConvPoolReducer(self, site)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        _, rest, pooled = self.parts(before, after)
        inputs = 1 if self.kernel == "depthwise" else site.dim
        return {**super().macs(before, after, site), "matmul": -(-rest // pooled) * pooled * site.dim * inputs}
