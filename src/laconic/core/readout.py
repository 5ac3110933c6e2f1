"""The reading of all tokens at the end of a reduced model: each token counts as often as it has patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from laconic.core.attention import AttentionTap
from laconic.core.attention_bias import SOFT_FLOOR
from laconic.core.backbone import HOSTS
from laconic.core.dense import as_patches
from laconic.core.links import ModelRef, reduction_in
from laconic.core.runtime import call_of, current
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens

Pool = Callable[[Tensor, str | None], Tensor]


class Readout:
    """A reduced model, for what replaces its methods (`laconic.backbones.ModelSpec.method_overrides`)."""

    def __init__(self, ref: ModelRef) -> None:
        self.ref, self.call = ref, call_of(ref)

    @property
    def host(self) -> Any:
        """The model (in DataParallel the replica that is running)."""
        return self.ref() if self.call is None else self.call.host

    @property
    def reduction(self) -> Any:
        """Its `laconic.core.token_reduction.TokenReduction`."""
        return reduction_in(self.host) if self.call is None else self.call.reduction

    def tokens(self, x: Tensor) -> Tokens | None:
        """The tokens that ``x`` [B, N, C] are after the last block, or None where each of them counts the same.

        Raises:
            ValueError: it is not known which forward they are of, and their sizes are needed.
        """
        history = current(x, self.ref)
        if history is None:
            if not x.shape[0] or (not self.reduction.merges and not self.host.training):
                return None  # every token counts the same, whichever they are
            raise ValueError(
                f"features of shape {tuple(x.shape)} come from no forward of this reduced model that is known: they are a "
                "copy, or the result of an operation. Their tokens stand for unequally many patches, so a mean over them needs "
                "to know which; hand on the features as the model returned them (views of them along the batch will do)"
            )
        tokens = history.tokens
        whole = x.shape[1] == tokens.prefix + tokens.token_of_patch.shape[1]
        if whole and self.reduction.restore and len(tokens) < tokens.token_of_patch.shape[1]:
            tokens = as_patches(tokens)
        if not tokens.merged or x.shape[1] != tokens.prefix + len(tokens):
            return None
        return tokens

    def pool(self, pool: Pool, x: Tensor, kind: str | None = None) -> Tensor:
        """``pool(x, kind)``, the model's own, over patches instead of tokens; without a kind it is that of the model now.

        Raises:
            ValueError: a pooling that cannot be weighted.
        """
        usual, prefix_too = HOSTS[self.reduction.host_path].pooling(self.host)
        if (kind or usual) in ("token", "none"):
            self._check_prefix(x)
            return pool(x, kind)
        self._check_answer(kind or usual)
        tokens = self.tokens(x)
        return pool(x, kind) if tokens is None else pool_by_size(pool, x, tokens, kind or usual, prefix_too)

    def key_bias(self, x: Tensor) -> Tensor | None:
        """Return the bias [B, N] on attention towards the tokens ``x`` [B, N, C]: log of sizes; None where all are equal."""
        tokens = self.tokens(x)
        if tokens is None:
            return None
        size = tokens.size if tokens.keep_mask is None else tokens.size * tokens.keep_mask
        return F.pad(size, (tokens.prefix, 0), value=1.0).clamp_min(SOFT_FLOOR).log().to(x.dtype)

    def _check_prefix(self, x: Tensor) -> None:
        if x.dim() == 3 and x.shape[1] == 0 and self.reduction.prefix:
            raise ValueError("these features have no class token to answer with")

    def _check_answer(self, kind: str) -> None:
        if self.reduction.config.info.class_readout:
            raise ValueError(
                f"{self.reduction.config.info.name} gives its answer in the class token, and this model pools by {kind!r} now; "
                "set it back to the class token, or laconic.restore_(model) and take another method (ats, dtps, dynamicvit)"
            )


def read(fn: Callable[..., Any], module: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces a method that reads the last tokens: ``fn`` with a `Readout`, the method itself, and its arguments."""
    return fn(Readout(module._laconic.ref), partial(own, module), *args, **kwargs)


def pool(readout: Readout, own: Callable[..., Tensor], x: Tensor, pool_type: str | None = None) -> Tensor:
    """Replaces the pooling of a model."""
    return readout.pool(own, x, pool_type)


def pool_by_size(pool: Pool, x: Float[Tensor, "B N C"], tokens: Tokens, kind: str, prefix_too: bool) -> Tensor:
    """``pool(x, kind)`` over patches instead of tokens; softly removed tokens do not count.

    For a mean, features are scaled by size / mean size before the model takes it; attention pooling gets log(size) as a bias.

    Raises:
        ValueError: a pooling that cannot be weighted.
    """
    weight = tokens.size if tokens.keep_mask is None else tokens.size * tokens.keep_mask
    weight = F.pad(weight, (tokens.prefix, 0), value=1.0)
    counted = weight if prefix_too else weight[:, tokens.prefix :]
    if kind == "avg":
        # in training every patch may be softly removed: then the mean of nothing is zero
        mean = counted.mean(1, keepdim=True).clamp_min(1e-6)
        return pool(x * (weight / mean).unsqueeze(-1).to(x.dtype), kind)
    if kind == "map":
        with AttentionTap([], counted.clamp_min(SOFT_FLOOR).log().unsqueeze(1).unsqueeze(1)):
            return pool(x, kind)
    raise ValueError(
        f"pooling {kind!r} cannot count merged tokens by their size; use global_pool='avg' or 'token', or a method that only "
        "drops tokens (topk, random)"
    )
