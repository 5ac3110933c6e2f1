"""AdaViT: Adaptive Vision Transformers for Efficient Image Recognition (Meng et al., CVPR 2022, arXiv:2111.15668).

Before a block small linear layers decide what of it an image uses: what has a sigmoid above a threshold.

* Patch tokens, by their normalised features (above 0.6). A token that is not used is seen by nobody in this block and
  comes out of it as it went in; the next block decides anew, so that it may come back.
* Heads, by the class token as it comes in (above 0.5). Of a head that is not used the output counts nothing, nor do its
  channels at the input of the MLP.
* Layers, the two halves of a block, likewise by the class token (above 0.5). One that is not used adds nothing.

Training draws: the difference of two Gumbel noises is added to the logits and the sum divided by ``tau``; decisions are
hard, gradients those of the sigmoid. A token's decision gets them by what the block adds to the token; the mask of the
attention gives none, as in the published code. Losses: ``used_heads`` and ``used_layers`` are the distance of the mean use
from ``target``, ``used_tokens`` (the class token is always used) its square; each has weight 2 (``loss.ratio``).

Heads and layers are decided on from block ``first`` on. Tokens that are not used cost nothing (packed execution); heads
and layers are multiplied by zero and cost what they did. Departures: the published terms for diverse and for certain
decisions are left out, and heads count whether or not their block is skipped. The LayerNorm before the tokens' logits is
the block's own in the published code; here it is a copy, trained apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.deciding import DecidingReducer
from laconic.parts import Alone
from laconic.reducer import Reducer, Site, choice, method
from laconic.schedule import Schedule
from laconic.tokens import Tokens

USED, TOKENS, HEADS, LAYERS = "used", "used_tokens", "used_heads", "used_layers"
POLICIES = ("tokens", "tokens+heads", "tokens+layers", "tokens+heads+layers")
THEIRS = {"attn.token_select": "tokens", "head_select": "heads", "layer_select": "layers"}  # names of the layers


class AdaViTReducer(DecidingReducer):
    """Decide what the block uses."""

    def __init__(self, config: AdaViT, site: Site) -> None:
        super().__init__()
        self.config, later = config, site.block >= config.first
        self.norm = nn.LayerNorm(site.dim, eps=1e-6)
        self.tokens = nn.Linear(site.dim, 1)
        self.heads = nn.Linear(site.dim, site.heads) if later and "heads" in config.policies else None
        self.layers = nn.Linear(site.dim, 2) if later and "layers" in config.policies else None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        logits = self.tokens(self.norm(tokens.patches.to(self.tokens.weight.dtype))).squeeze(2)
        used = self.decide(logits.float(), self.config.threshold)
        every = F.pad(used, (tokens.prefix, 0), value=1.0)
        halves, heads, shares = every.unsqueeze(1), None, {TOKENS: every.mean(1, keepdim=True)}
        if self.layers is not None:
            layers_on = self.decide(self.by_class(self.layers, tokens), 0.5)
            halves, shares[LAYERS] = halves * layers_on.unsqueeze(2), layers_on.mean(1, keepdim=True)
        if self.heads is not None:
            heads = self.decide(self.by_class(self.heads, tokens), 0.5)
            shares[HEADS] = heads.mean(1, keepdim=True)
        tokens = tokens.replace(alive=used.detach(), columns={**tokens.columns, USED: used})
        return tokens.note_more(**shares).switch(halves, heads)

    def after(self, tokens: Tokens, n: int) -> Tokens:
        return tokens.replace(alive=tokens.columns[USED])  # for the ledger, and with gradients; the next block decides anew

    def by_class(self, layer: nn.Linear, tokens: Tokens) -> Tensor:
        """Logits of an image, from its class token."""
        if not tokens.has_cls:
            raise LookupError(
                f"adavit decides on heads and layers by the class token, and this backbone has none; "
                f"pass policies='tokens' instead of {self.config.policies!r}"
            )
        return layer(tokens.x[:, 0].to(layer.weight.dtype)).float()

    def decide(self, logits: Tensor, threshold: float) -> Tensor:
        """1 or 0 for each of the logits; in training by chance, with gradients."""
        if not self.training:
            return (logits.sigmoid() > threshold).float()
        noise = torch.empty_like(logits).exponential_().log() - torch.empty_like(logits).exponential_().log()
        soft = ((logits + noise) / self.config.tau).sigmoid()
        return (soft > threshold).float() + (soft - soft.detach())

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        schedule, target = self.site.schedule, self.config.target
        if schedule is None or self.site.block != schedule.at[-1]:
            return {}
        off = {name: tokens.notes[name].mean() - target for name in (TOKENS, HEADS, LAYERS) if name in tokens.notes}
        return {name: value.square() if name == TOKENS else value.abs() for name, value in off.items()}


class Everything(DecidingReducer):
    """Behind a block that decides comes one that does not: it uses all tokens again."""

    def before(self, tokens: Tokens, n: int) -> Tokens:
        return tokens.replace(alive=None)


@method(
    "adavit",
    title="AdaViT: use tokens, heads and layers of a block as the image needs",
    paper="2111.15668",
    moment="before",
    score="learned linear",
    rest="skipped, and back at the next block",
    trained=True,
    learns=True,
    count="variable",
)
@dataclass(frozen=True)
class AdaViT(Alone):
    """Options of ``adavit``: what is decided on and how, at what share of use training aims; and those of `Deciding`."""

    policies: Literal["tokens", "tokens+heads", "tokens+layers", "tokens+heads+layers"] = "tokens"
    threshold: float = 0.6
    tau: float = 5.0
    target: float = 0.5
    first: int = 1

    compacts: ClassVar[bool] = False
    lever: ClassVar[str] = "for fewer tokens train with a lower target="

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("adavit", "policies", self.policies, POLICIES)
        if not (0 < self.threshold < 1 and 0 < self.target <= 1 and self.tau > 0):
            given = f"threshold={self.threshold!r}, target={self.target!r}, tau={self.tau!r}"
            raise ValueError(f"adavit: threshold must be in (0, 1), target in (0, 1] and tau above 0; got {given}")

    def build(self, site: Site) -> Reducer:
        at = None if site.schedule is None else site.schedule.at
        return AdaViTReducer(self, site) if at is None or site.block in at else Everything()

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Every block."""
        return tuple(range(depth))

    def works_at(self, schedule: Schedule, depth: int) -> Sequence[int]:
        return sorted({*schedule.at, *(block + 1 for block in schedule.at if block + 1 < depth)})

    def macs(self, before: int, after: int, site: Site) -> dict[str, int]:
        later = site.block >= self.first
        by_class = site.heads * ("heads" in self.policies and later) + 2 * ("layers" in self.policies and later)
        return {"matmul": (site.before + by_class) * site.dim, "layernorm": site.before * site.dim}

    def official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Queries, keys and values in one layer, as timm has them; our LayerNorm starts as the block's."""
        renamed = dict[str, Tensor]()
        for name, tensor in weights.items():
            match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
            block, layer, kind = match.groups() if match else ("", "", "")
            ours = THEIRS.get(layer.removesuffix(".mlp_head"))
            if ours and int(block) in at:
                renamed[f"laconic.reducers.{block}.{ours}.{kind}"] = tensor
            elif layer in ("attn.query", "attn.key", "attn.value"):
                every = [weights[f"blocks.{block}.attn.{part}.{kind}"] for part in ("query", "key", "value")]
                renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(every)
            else:
                renamed[name] = tensor
            if layer == "norm1" and int(block) in at:
                renamed[f"laconic.reducers.{block}.norm.{kind}"] = tensor
        return renamed
