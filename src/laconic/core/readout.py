"""The readout (pooling) of a reduced model: each token is weighted by the number of patches it holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.attention import AttentionTap
from laconic.core.attention_bias import SOFT_FLOOR
from laconic.core.backbone import HOSTS
from laconic.core.dense import as_patches, restored
from laconic.core.links import ModelRef, reduction_in
from laconic.core.runtime import call_of, current
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens

Pool = Callable[[Tensor, str | None], Tensor]


class Readout:
    """A reduced model, for the replacements of its methods (`laconic.backbones.ModelSpec.method_overrides`)."""

    def __init__(self, ref: ModelRef) -> None:
        self.ref, self.call = ref, call_of(ref)

    @property
    def host(self) -> Any:
        """The model (in DataParallel, the running replica)."""
        return self.ref() if self.call is None else self.call.host

    @property
    def reduction(self) -> Any:
        """Its `laconic.core.token_reduction.TokenReduction`."""
        return reduction_in(self.host) if self.call is None else self.call.reduction

    def tokens(self, x: Tensor) -> Tokens | None:
        """Return the tokens of the features ``x`` [B, N, C] after the last block, or None if all have the same weight.

        Raises:
            ValueError: their sizes are needed, and it is not known which forward they belong to.
        """
        history = current(x, self.ref)
        if history is None:
            if not x.shape[0] or (not self.reduction.merges and not self.host.training):
                return None  # all tokens have the same weight in any forward
            raise ValueError(
                f"features of shape {tuple(x.shape)} come from no known forward of this reduced model: they are a copy, or "
                "the result of an operation. Their tokens hold different numbers of patches, which a mean over them must "
                "take into account; pass the features as the model returned them (or views of them along the batch)"
            )
        tokens = history.tokens
        whole = x.shape[1] == tokens.prefix + tokens.token_of_patch.shape[1]
        if whole and self.reduction.restore and len(tokens) < tokens.token_of_patch.shape[1]:
            tokens = as_patches(tokens)
        if not tokens.merged or x.shape[1] != tokens.prefix + len(tokens):
            return None
        return tokens

    def pool(self, pool: Pool, x: Tensor, kind: str | None = None) -> Tensor:
        """Run the model's own ``pool(x, kind)`` over patches instead of tokens; ``kind`` None is the model's current pooling.

        Raises:
            ValueError: a pooling that cannot be weighted.
        """
        current_kind, prefix_too = HOSTS[self.reduction.host_path].pooling(self.host)
        if (kind or current_kind) in ("token", "none"):
            self._check_prefix(x)
            return pool(x, kind)
        self._check_class_readout(kind or current_kind)
        tokens = self.tokens(x)
        return pool(x, kind) if tokens is None else pool_by_size(pool, x, tokens, kind or current_kind, prefix_too)

    def key_bias(self, x: Tensor) -> Tensor | None:
        """Return the bias [B, N] on attention towards the tokens ``x`` [B, N, C]: log of sizes; None if all are equal."""
        tokens = self.tokens(x)
        if tokens is None:
            return None
        size = tokens.size if tokens.keep_mask is None else tokens.size * tokens.keep_mask
        return F.pad(size, (tokens.prefix, 0), value=1.0).clamp_min(SOFT_FLOOR).log().to(x.dtype)

    def every_patch(self, x: Tensor) -> Tensor:
        """Return the features ``x`` [B, N, C] after the last block and norm for every patch, [B, prefix + P, C].

        A patch has the features of the token that holds it, a dropped one the mean over all that are held, as in
        `laconic.core.dense.restored`; features of all patches are returned as they are.

        Raises:
            ValueError: it is not known which forward the features belong to.
        """
        history = current(x, self.ref)
        if history is None:
            raise ValueError(
                f"features of shape {tuple(x.shape)} come from no known forward of this reduced model, so their patches are "
                "not known; pass the features as the model returned them"
            )
        tokens = history.tokens
        if x.shape[1] != tokens.prefix + len(tokens) or len(tokens) >= tokens.token_of_patch.shape[1]:
            return x
        return torch.cat([x[:, : tokens.prefix], restored(tokens, x[:, tokens.prefix :], "mean")], 1)

    def _check_prefix(self, x: Tensor) -> None:
        if x.dim() == 3 and x.shape[1] == 0 and self.reduction.prefix:
            raise ValueError("these features have no class token, but the model reads the class token")

    def _check_class_readout(self, kind: str) -> None:
        if self.reduction.config.info.class_readout:
            raise ValueError(
                f"{self.reduction.config.info.name} gives its result in the class token, and this model now pools by {kind!r}; "
                "set it back to the class token, or laconic.restore_(model) and use another method (ats, dtps, dynamicvit)"
            )


def read(fn: Callable[..., Any], module: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Replacement for a method that reads the last tokens: call ``fn`` with a `Readout`, the own method and its arguments."""
    return fn(Readout(module._laconic.ref), partial(own, module), *args, **kwargs)


def pool(readout: Readout, own: Callable[..., Tensor], x: Tensor, pool_type: str | None = None) -> Tensor:
    """Replacement for a model's ``pool`` method."""
    return readout.pool(own, x, pool_type)


def pool_by_size(pool: Pool, x: Float[Tensor, "B N C"], tokens: Tokens, kind: str, prefix_too: bool) -> Tensor:
    """Run ``pool(x, kind)`` over patches instead of tokens; softly dropped tokens have no weight.

    For a mean, features are scaled by size / mean size before the model averages them; attention pooling gets a bias log(size).

    Raises:
        ValueError: a pooling that cannot be weighted.
    """
    weight = tokens.size if tokens.keep_mask is None else tokens.size * tokens.keep_mask
    weight = F.pad(weight, (tokens.prefix, 0), value=1.0)
    counted = weight if prefix_too else weight[:, tokens.prefix :]
    if kind == "avg":
        # in training every patch may be softly dropped: the mean is then zero
        mean = counted.mean(1, keepdim=True).clamp_min(1e-6)
        return pool(x * (weight / mean).unsqueeze(-1).to(x.dtype), kind)
    if kind == "map":
        with AttentionTap([], counted.clamp_min(SOFT_FLOOR).log().unsqueeze(1).unsqueeze(1)):
            return pool(x, kind)
    raise ValueError(
        f"pooling {kind!r} cannot weight merged tokens by their size; use global_pool='avg' or 'token', or a method that only "
        "drops tokens (topk, random)"
    )
