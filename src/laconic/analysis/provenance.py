"""Follow every patch through the last forward, or that of given features; give features back to all patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.dense import laid_out, restored
from laconic.core.history import History, find
from laconic.core.runtime import current
from laconic.core.shape_types import Float, Int
from laconic.core.token_reduction import TokenReduction, reduction_of


@dataclass(frozen=True)
class Stage:
    """The tokens that one reducing block left.

    ``where[b, p]`` is the patch token that holds patch p (-1: dropped), ``size[b, j]`` the patches token j holds,
    ``kept[b, j]`` the patch in whose place token j stands. ``alive`` is set where some tokens are hidden from the others:
    softly removed ones in training, and what fills up the images of a batch that have fewer tokens (their size is 0).
    Patches that are parked for a while (Evo-ViT) are -1 until they are back. ``grid``: rows and columns of the patches or None.
    """

    block: int
    where: Int[Tensor, "B P"]
    size: Float[Tensor, "B L"]
    kept: Int[Tensor, "B L"]
    alive: Float[Tensor, "B L"] | None
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Provenance:
    """The stages of one forward, first to last, and the patch grid (rows, columns) of its images (None: not known)."""

    stages: tuple[Stage, ...]
    grid: tuple[int, int] | None
    _history: History | None = field(default=None, repr=False, compare=False)

    @property
    def final(self) -> Stage:
        """The last stage."""
        return self.stages[-1]


def provenance(of: nn.Module | Tensor | Mapping[str, Any] | tuple[Any, ...]) -> Provenance:
    """Return where every patch of a batch went, stage by stage.

    Args:
        of: a reduced model: the last complete forward of this thread, or, inside of a running one (a hook), that one as far
            as it got. Or what a forward has returned (logits, features; a view of them along the batch): that forward.

    Raises:
        ValueError: the model is not reduced, or the tensor comes from no forward of a reduced model (it is a copy, or the
            result of an operation). RuntimeError: the model has not run forward yet.
    """
    if isinstance(of, nn.Module):
        reduction = reduction_of(of)
        history = reduction.last()
        if history is None:
            reduction.entry(0)  # says so
            raise AssertionError
    else:
        history = _of_output(of)
    while history.given_back and history.previous is not None:
        history = history.previous
    return _provenance(history)


def _of_output(of: Any) -> History:
    values = list(of.values()) if isinstance(of, Mapping) else list(of) if isinstance(of, tuple | list) else [of]
    found = next((h for value in values if isinstance(value, Tensor) and (h := find(value)) is not None), None)
    if found is None:
        raise ValueError(
            "this comes from no forward of a reduced model that is known: it is a copy, or the result of an operation. Pass "
            "what the model (or one of its blocks) returned, a view of it along the batch, or the model itself"
        )
    return found


def _provenance(history: History) -> Provenance:
    reduction: TokenReduction = history.reduction

    def stage(block: int) -> Stage:
        t = history.entry(block + 1)
        alive = None if t.keep_mask is None else t.keep_mask.detach()
        return Stage(block, t.token_of_patch, t.size.detach(), t.origin_index, alive, t.grid)

    reached = [block for block in reduction.schedule.at if block <= history.block]
    return Provenance(tuple(stage(block) for block in reached), history.tokens.grid, history)


def losses(of: nn.Module | Tensor | Mapping[str, Any] | tuple[Any, ...]) -> dict[str, Tensor]:
    """The method's own training losses by name, each a mean over stages; empty if it has none.

    DynamicViT and dTPS have "ratio", which their papers add with weight 2.

    Args:
        of: a reduced model: its last forward of this thread in training mode (or its last, if there was none). Or what a
            forward has returned: that forward.

    Raises:
        ValueError: the model is not reduced, or the tensor is of no forward that is known. RuntimeError: it has not run yet.
    """
    history = reduction_of(of).last(training=True) if isinstance(of, nn.Module) else _of_output(of)
    if history is None:
        raise RuntimeError("this reduced model has not run forward yet; run it on a batch of images first")
    reduction: TokenReduction = history.reduction
    patches = [history.entry(start + 1).token_of_patch.shape[1] for start in reduction.staging.starts]
    parts = list[dict[str, Tensor]]()
    for block, rate in reduction.staging.targets(patches).items():
        reducer = reduction.reducer(block)
        if reducer is not None and block <= history.block:
            parts.append(reducer.losses(history.entry(block + 1), rate))
    names = sorted({name for part in parts for name in part})
    return {name: torch.stack([part[name] for part in parts if name in part]).mean() for name in names}


def restore_dense(
    of: nn.Module | Provenance, features: Float[Tensor, "B N C"], *, layout: str = "NLC", fill: str | float = 0.0
) -> Tensor:
    """Give the features of the tokens that are left back to every patch they stand for.

    Args:
        of: the reduced model that made the features; they may be of any of its forwards. Inside of a running forward (a hook)
            features that are not known otherwise are that forward's. Or a `Provenance`: that forward, whatever the features
            are (a gradient, a result of operations on each token).
        features: [B, prefix + L, C] as ``forward_features`` or a block returns them, or [B, L, C] without the prefix tokens;
            a view of them along the batch will do.
        layout: ``NLC`` for [B, P, C] in raster order, ``NCHW`` for [B, C, rows, columns].
        fill: what dropped patches get: a number, ``zeros``, ``nearest``, ``mean``, or ``last`` (see `laconic.core.dense.restored`).

    Raises:
        ValueError: the features are of no forward that is known, or not of those tokens; the grid is not known.
    """
    if isinstance(of, Provenance):
        history = _of_shape(of._history, features)
        reduction: TokenReduction = of._history.reduction  # type: ignore[union-attr]
    else:
        reduction = reduction_of(of)
        found = current(features, reduction.ref) if isinstance(features, Tensor) and features.dim() == 3 else None
        if found is None:
            raise ValueError(
                f"features of shape {tuple(features.shape)} come from no forward of this model that is known: they are a copy, "
                "the result of an operation, or another model's. Pass them as the model returned them (a view along the batch "
                "will do), or say which forward they are of: restore_dense(laconic.provenance(model), features)"
            )
        history = found
    tokens = history.tokens
    images, count = tokens.shape
    prefix = tokens.prefix if features.dim() == 3 and features.shape[1] == count else 0
    if features.dim() != 3 or features.shape[0] != images or features.shape[1] - prefix != len(tokens):
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not fit their forward, which left {images} images of "
            f"{tokens.prefix} prefix and {len(tokens)} patch tokens"
        )
    if history.given_back:
        return laid_out(features[:, prefix:], tokens, layout)
    norm = reduction.entry_of_host.final_norm(reduction.model) if fill == "last" else None
    return laid_out(restored(tokens, features[:, prefix:], fill, norm), tokens, layout)


def _of_shape(history: History | None, features: Tensor) -> History:
    """The entry of a forward that has as many tokens as the features, last first.

    Raises:
        ValueError: none has.
    """
    for entry in [] if history is None or features.dim() != 3 else history.chain():
        images, count = entry.tokens.shape
        if features.shape[0] == images and features.shape[1] in (count, count - entry.tokens.prefix):
            return entry
    raise ValueError(f"features of shape {tuple(features.shape)} fit no block of this forward")
