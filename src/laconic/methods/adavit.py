"""AdaViT: Adaptive Vision Transformers for Efficient Image Recognition (Meng et al., CVPR 2022, arXiv:2111.15668).

Before each block, small linear layers decide which parts of it each image uses: those whose sigmoid is above a threshold.

* Patch tokens, by their normalised features (above 0.6). No other token attends to an unused token in this block, and the
  block returns it unchanged; the next block decides again and may use it.
* Heads, by the class token at the block's input (above 0.5): the output of an unused head is set to zero, and so are its
  channels at the input of the MLP. Layers (the attention and the MLP of a block), in the same way: an unused one adds nothing.

Training samples the decisions (`decided`): two Gumbel noises, temperature ``tau``, hard decisions with the gradients of the
sigmoid. The gradient of a token's decision comes from what the block adds to the token; the attention mask passes none (as
published). Losses (`use_losses`), each with weight 2 (``loss.ratio``): the distance of the mean use of heads and of layers
from ``target``, and the square of this distance for tokens (with the class token). Two published terms are off by default,
here as in the published code: ``diverse`` times this distance for every single head and layer, and, subtracted, ``entropy``
times the entropy of these decisions.

Heads and layers are decided on from block ``first`` on. Unused heads and layers are multiplied by zero, which saves no work;
unused tokens are not computed (with packed execution).
Departures: the use of a head counts even if its block is skipped; there are no lower bounds on the use (published, but off
by default). The LayerNorm before the tokens' logits is the block's own LayerNorm in the published code; here it is a copy
that is trained separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.adaptive import AdaptiveReducer, at_least_one
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.tokens import Tokens
from laconic.methods.ops import EveryBlock, joined, renamed, require, require_class_token, start_small
from laconic.methods.ops.usage import HEADS, LAYERS, LOGITS, TOKENS, USED, UseAll, decided, use_losses

THEIRS = {"attn.token_select": "tokens", "head_select": "heads", "layer_select": "layers"}  # authors' name: ours


class AdaViTReducer(AdaptiveReducer):
    """Decide which tokens, heads and layers the block uses."""

    def __init__(self, config: AdaViT, site: BlockContext) -> None:
        super().__init__()
        self.config, later = config, site.block >= config.first
        self.norm, self.tokens = nn.LayerNorm(site.dim, eps=1e-6), nn.Linear(site.dim, 1)
        self.heads = nn.Linear(site.dim, site.heads) if later and "heads" in config.policies else None
        self.layers = nn.Linear(site.dim, 2) if later and "layers" in config.policies else None
        start_small(self)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        useful = self.tokens(self.norm(tokens.patches.to(self.tokens.weight.dtype))).squeeze(2).float()
        used = at_least_one(tokens.replace(keep_mask=None), self.decide(useful, self.config.threshold))
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
        # for the history, and with gradients; the next block decides again
        return tokens.replace(keep_mask=tokens.per_token[USED])

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
    score="learned",
    score_detail="learned linear",
    rest="skipped",
    rest_detail="skipped, and back at the next block",
    trained=True,
    learns=True,
    count="variable",
)
@dataclass(frozen=True)
class AdaViT(EveryBlock):
    """Options of ``adavit``: decisions and thresholds, target use and loss terms of training; and those of `AdaptiveMethod`."""

    policies: Literal["tokens", "tokens+heads", "tokens+layers", "tokens+heads+layers"] = "tokens"
    threshold: float = 0.6
    tau: float = 5.0
    target: float = 0.5
    first: int = 1
    diverse: float = 0.0
    entropy: float = 0.0
    compacts: ClassVar[bool] = False
    tuning_hint: ClassVar[str] = "for fewer tokens, train with a lower target="

    def __post_init__(self) -> None:
        super().__post_init__()
        require("adavit", "threshold", self.threshold, 0 < self.threshold < 1, "must be in (0, 1)")
        require("adavit", "target", self.target, 0 < self.target <= 1, "must be in (0, 1]")
        require("adavit", "tau", self.tau, self.tau > 0, "must be above 0")
        for term in ("diverse", "entropy"):
            require("adavit", term, getattr(self, term), getattr(self, term) >= 0, "must be 0 or more")

    def build(self, site: BlockContext) -> Reducer:
        at = None if site.schedule is None else site.schedule.at
        return AdaViTReducer(self, site) if at is None or site.block in at else UseAll()

    def reducer_blocks(self, schedule: Schedule, depth: int) -> Sequence[int]:
        return sorted({*schedule.at, *(block + 1 for block in schedule.at if block + 1 < depth)})

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        by_class = (site.heads * ("heads" in self.policies) + 2 * ("layers" in self.policies)) * (site.block >= self.first)
        return {"matmul": (site.before + by_class) * site.dim, "layernorm": site.before * site.dim}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Join queries, keys and values into one layer, as in timm; our LayerNorm starts as a copy of the block's."""
        block = rf"blocks\.({'|'.join(map(str, at))})\."
        rules = [(rf"{block}{their}\.mlp_head\.(.+)", rf"laconic.reducers.\1.{our}.\2") for their, our in THEIRS.items()]
        norm = (rf"{block}norm1\.(.+)", r"blocks.\1.norm1.\2", r"laconic.reducers.\1.norm.\2")
        return renamed(joined(weights, ("attn.query", "attn.key", "attn.value"), "attn.qkv"), *rules, norm)
