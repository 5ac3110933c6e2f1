"""AdaViT: Adaptive Vision Transformers for Efficient Image Recognition (Meng et al., CVPR 2022, arXiv:2111.15668).

Before a block small linear layers decide what of it an image uses: what has a sigmoid above a threshold.

* Patch tokens, by their normalised features (above 0.6). A token that is not used is seen by nobody in this block and
  comes out of it as it went in; the next block decides anew, so that it may come back.
* Heads, by the class token as it comes in (above 0.5): the output of one that is not used counts nothing, nor do its channels
  at the input of the MLP. Layers, the two halves of a block, likewise: one that is not used adds nothing.

Training draws (`decided`): two Gumbel noises, temperature ``tau``, hard decisions with the gradients of the sigmoid. A token's
come by what the block adds to it; the mask of the attention gives none (as published). Losses (`use_losses`), of weight 2
each (``loss.ratio``): the distance of the mean use of heads and of layers from ``target``; of tokens (with the class token)
its square. Two published terms are off unless asked for, there too: ``diverse`` times that distance of every single head and
layer, and ``entropy`` times the entropy of these decisions, taken off.

From block ``first`` on heads and layers are decided on; multiplied by zero they cost what they did, tokens nothing (packed).
Departures: heads count even where their block is skipped; no floors under the use (published, and off). The LayerNorm before
the tokens' logits is a copy of the published one, the block's own; trained apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.adaptive import AdaptiveReducer
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.tokens import Tokens
from laconic.methods.ops import EveryBlock, joined, renamed, require, require_class_token, start_small
from laconic.methods.ops.usage import HEADS, LAYERS, LOGITS, TOKENS, USED, Everything, decided, use_losses

THEIRS = {"attn.token_select": "tokens", "head_select": "heads", "layer_select": "layers"}  # names of the layers


class AdaViTReducer(AdaptiveReducer):
    """Decide what the block uses."""

    def __init__(self, config: AdaViT, site: BlockContext) -> None:
        super().__init__()
        self.config, later = config, site.block >= config.first
        self.norm, self.tokens = nn.LayerNorm(site.dim, eps=1e-6), nn.Linear(site.dim, 1)
        self.heads = nn.Linear(site.dim, site.heads) if later and "heads" in config.policies else None
        self.layers = nn.Linear(site.dim, 2) if later and "layers" in config.policies else None
        start_small(self)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        useful = self.tokens(self.norm(tokens.patches.to(self.tokens.weight.dtype))).squeeze(2).float()
        used = self.decide(useful, self.config.threshold)
        every = F.pad(used, (tokens.prefix, 0), value=1.0).unsqueeze(1)
        by_class = {name: layer for name, layer in ((LAYERS, self.layers), (HEADS, self.heads)) if layer is not None}
        if by_class:
            require_class_token(tokens, "and adavit decides on heads and layers by the class token; pass policies='tokens'")
        logits = {name: layer(tokens.x[:, 0].to(layer.weight.dtype)).float() for name, layer in by_class.items()}
        on = {name: self.decide(one, 0.5) for name, one in logits.items()}
        more = {LOGITS[name]: one for name, one in logits.items()} if self.config.entropy else {}
        for name, news in {TOKENS: every.mean(2), **on, **more}.items():
            tokens = tokens.append_per_image(**{name: news})
        tokens = tokens.replace(keep_mask=used.detach(), per_token={**tokens.per_token, USED: used})
        return tokens.switch(every * on[LAYERS].unsqueeze(2) if LAYERS in on else every, on.get(HEADS))

    def after(self, tokens: Tokens, n: int) -> Tokens:
        return tokens.replace(
            keep_mask=tokens.per_token[USED]
        )  # for the ledger, and with gradients; the next block decides anew

    def decide(self, logits: Tensor, threshold: float) -> Tensor:
        return decided(logits, threshold, self.config.tau if self.training else None)

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        last = self.site.schedule is not None and self.site.block == self.site.schedule.at[-1]
        return use_losses(tokens.per_image, self.config.target, self.config.diverse, self.config.entropy) if last else {}


@method(
    "adavit",
    title="AdaViT: use tokens, heads and layers of a block as the image needs",
    paper="2111.15668",
    phase="before",
    score="learned linear",
    rest="skipped, and back at the next block",
    trained=True,
    learns=True,
    count="variable",
)
@dataclass(frozen=True)
class AdaViT(EveryBlock):
    """Options of ``adavit``: what is decided on and how, the use that training aims at, its further terms; `AdaptiveMethod`'s."""

    policies: Literal["tokens", "tokens+heads", "tokens+layers", "tokens+heads+layers"] = "tokens"
    threshold: float = 0.6
    tau: float = 5.0
    target: float = 0.5
    first: int = 1
    diverse: float = 0.0
    entropy: float = 0.0
    compacts: ClassVar[bool] = False
    lever: ClassVar[str] = "for fewer tokens train with a lower target="

    def __post_init__(self) -> None:
        super().__post_init__()
        require("adavit", "threshold", self.threshold, 0 < self.threshold < 1, "must be in (0, 1)")
        require("adavit", "target", self.target, 0 < self.target <= 1, "must be in (0, 1]")
        require("adavit", "tau", self.tau, self.tau > 0, "must be above 0")
        for term in ("diverse", "entropy"):
            require("adavit", term, getattr(self, term), getattr(self, term) >= 0, "must be 0 or more")

    def build(self, site: BlockContext) -> Reducer:
        at = None if site.schedule is None else site.schedule.at
        return AdaViTReducer(self, site) if at is None or site.block in at else Everything()

    def reducer_blocks(self, schedule: Schedule, depth: int) -> Sequence[int]:
        return sorted({*schedule.at, *(block + 1 for block in schedule.at if block + 1 < depth)})

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        by_class = (site.heads * ("heads" in self.policies) + 2 * ("layers" in self.policies)) * (site.block >= self.first)
        return {"matmul": (site.before + by_class) * site.dim, "layernorm": site.before * site.dim}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Queries, keys and values in one layer, as timm has them; our LayerNorm starts as the block's."""
        block = rf"blocks\.({'|'.join(map(str, at))})\."
        rules = [(rf"{block}{their}\.mlp_head\.(.+)", rf"laconic.reducers.\1.{our}.\2") for their, our in THEIRS.items()]
        norm = (rf"{block}norm1\.(.+)", r"blocks.\1.norm1.\2", r"laconic.reducers.\1.norm.\2")
        return renamed(joined(weights, ("attn.query", "attn.key", "attn.value"), "attn.qkv"), *rules, norm)
