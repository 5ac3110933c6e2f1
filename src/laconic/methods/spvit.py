"""SPViT: Enabling Faster Vision Transformers via Latency-aware Soft Token Pruning (Kong et al., ECCV 2022, arXiv:2112.13890).

Before a block a selector scores every token in every head. One small network, the same for all heads, maps a head's channels
of the token (a local half, and a global half averaged over the tokens that are not hidden) to the log-probabilities of
keeping and of dropping it; a second one weights the heads, token by token, by the means of their channels. The means over
heads, by these weights, of the log-probabilities decide, those of the probabilities are the score (sec. 3.2). The tokens
dropped at a reducing block become one package token at the end: the sum of their features by their probabilities of being
kept. Packages are scored at later blocks, too, and are always kept (sec. 3.3).

* Inference: a token is kept if keeping is at least as likely as dropping, so the number of kept tokens differs by image.
* Training: a hard Gumbel-softmax decision with straight-through gradients; dropped tokens are hidden. Loss "ratio":
  (share of patches kept, mean over the batch - rho)^2, rho from ``ratios``, or with keep rates their product so far.

Departures: the published code draws Gumbel noise in evaluation too; here inference is deterministic. Its sum is not divided
by its weights, as with ``package="sum"``; ``"mean"`` is the paper's (if no token is dropped, the package is zero in both
cases). Its softmax in training adds 1e-6 to every attention weight; here it does not.
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

PACKAGE = "package"  # per-token column: 1 for package tokens, else 0


class SPViTReducer(AdaptiveReducer):
    """Select tokens, add a package token of the dropped ones, and hide these."""

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
        # the package takes the position of its token with the highest score
        first = (score + 2 * gone + 4 * there).detach().argmax(1, keepdim=True)
        tokens = tokens.append(weight.unsqueeze(1) @ tokens.patches.float(), tokens.origin_index.gather(1, first))
        tokens = tokens.replace(per_token={**tokens.per_token, PACKAGE: F.pad(packages, (0, 1), value=1.0)})
        return self.hide(tokens, F.pad(keep, (0, 1), value=1.0), torch.full_like(arange_like(tokens.size), len(tokens) - 1))

    def decide(self, log: Tensor) -> Tensor:
        """Return exactly 1 for kept tokens, else 0: a mean package would amplify rounding errors of zero weights."""
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
    score="learned",
    score_detail="learned selector",
    rest="merged",
    rest_detail="packaged into one token a stage",
    trained=True,
    learns=True,
    count="variable",
)
@dataclass(frozen=True)
class SPViT(AdaptiveMethod):
    """Options of ``spvit``: the weights of packages, the target shares of patches, and those of `AdaptiveMethod`."""

    package: Literal["sum", "mean"] = "sum"  # of the dropped tokens, weighted by their scores
    ratios: tuple[float, ...] = (0.617, 0.369, 0.137)  # targets of training, one per reducing block, if there are no keep rates

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = all(0 < ratio <= 1 for ratio in self.ratios)
        require("spvit", "ratios", self.ratios, shares, "must be shares of the patches to keep, above 0 and up to 1")

    def build(self, site: BlockContext) -> Reducer:
        decides = site.keep is None and (site.schedule is None or site.schedule.unit == "adaptive")
        if decides and site.ordinal >= len(self.ratios):
            short = f"ratios has {len(self.ratios)} target shares, and block {site.block} is reducing block {site.ordinal + 1}"
            raise ValueError(f"spvit: {short}; give ratios= for all blocks, or keep= (the target is then their product so far)")
        if site.dim % (2 * site.heads):
            raise ValueError(
                f"spvit splits the channels of each head into two halves: {site.dim} channels of {site.heads} heads are not "
                "divisible by twice the number of heads; use another model"
            )
        return SPViTReducer(site, self.package, self.ratios[site.ordinal] if decides else None)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return quarters(depth)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        """Return the number of patches kept, plus one package token for every reducing block so far."""
        return of_the_initial(rates, n, patches) + sum(rate < 1 for rate in rates)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        d, narrow = site.dim // site.heads, max(1, site.heads // 2)
        linear = d * d + d * (d // 2) + (d // 2) * (d // 4) + (d // 4) * 2
        sums = before * (site.dim // 2 + site.dim)  # the global halves, and the package
        return {"matmul": before * site.heads * (linear + 2 * narrow), "layernorm": before * site.dim, "elementwise": sums}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Rename the authors' weights: the network is stored once for every head, and their code uses the last copy."""
        last = last_copies(weights, r"(score_predictor\.\d+\.(?:in|out)_conv)\.\d+\.(.+)")
        layer = r"(laconic\.reducers\.\d+\.selector)\.((?:in|out)_conv\..+)"
        return renamed(by_stage(last, at, "score_predictor", "selector."), (layer, r"\1.predictor.\2"))
