"""Track every patch through a forward of a reduced model, and map token features back to all patches."""

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
    """The tokens after one reducing block.

    ``where[b, p]`` is the patch token that contains patch p (-1: dropped), ``size[b, j]`` the number of patches in token j,
    ``kept[b, j]`` the patch at whose position token j is. ``alive`` is the keep mask, set only if some tokens are hidden from
    the others: tokens that are dropped softly in training, and padding tokens of images with fewer tokens than others in the
    batch (their size is 0). Parked patches (Evo-ViT) are -1 until they return. ``grid``: rows and columns of the patches (of
    a clip: tubelets in time, rows, columns), or None.
    """

    block: int
    where: Int[Tensor, "B P"]
    size: Float[Tensor, "B L"]
    kept: Int[Tensor, "B L"]
    alive: Float[Tensor, "B L"] | None
    grid: tuple[int, ...] | None


@dataclass(frozen=True)
class Provenance:
    """The reducing blocks of one forward, first to last, and the patch grid of its images as in `Stage` (None: unknown)."""

    stages: tuple[Stage, ...]
    grid: tuple[int, ...] | None
    _history: History | None = field(default=None, repr=False, compare=False)

    @property
    def final(self) -> Stage:
        """The tokens after the last reducing block."""
        return self.stages[-1]


def provenance(of: nn.Module | Tensor | Mapping[str, Any] | tuple[Any, ...]) -> Provenance:
    """Return the token that contains each patch of a batch, after every reducing block.

    Args:
        of: a reduced model, for the last complete forward of this thread or, inside a running forward (in a hook), for the
            running one up to this point. Or an output of a forward (logits, features, or a view of them along the batch), for
            that forward.

    Raises:
        ValueError: the model is not reduced, or the tensor is not a known output of a reduced model (it is a copy, or the
            result of an operation). RuntimeError: the model has not run a forward yet.
    """
    if isinstance(of, nn.Module):
        reduction = reduction_of(of)
        history = reduction.last()
        if history is None:
            reduction.entry(0)  # raises the RuntimeError
            raise AssertionError
    else:
        history = _of_output(of)
    while history.restored and history.previous is not None:
        history = history.previous
    return _provenance(history)


def _of_output(of: Any) -> History:
    values = list(of.values()) if isinstance(of, Mapping) else list(of) if isinstance(of, tuple | list) else [of]
    found = next((h for value in values if isinstance(value, Tensor) and (h := find(value)) is not None), None)
    if found is None:
        raise ValueError(
            "this is not a known output of a reduced model: it is a copy, or the result of an operation. Pass what the model "
            "(or one of its blocks) returned, a view of it along the batch, or the model itself"
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
    """Return the method's own training losses by name, each a mean over the reducing blocks; empty if it has none.

    DynamicViT and dTPS have "ratio", which their papers add with weight 2.

    Args:
        of: a reduced model, for its last forward of this thread in training mode (or its last forward, if there was none).
            Or an output of a forward, for that forward.

    Raises:
        ValueError: the model is not reduced, or the tensor is not an output of a known forward. RuntimeError: the model has
            not run a forward yet.
    """
    history = reduction_of(of).last(training=True) if isinstance(of, nn.Module) else _of_output(of)
    if history is None:
        raise RuntimeError("this reduced model has not run forward yet; run it on a batch of images first")
    reduction: TokenReduction = history.reduction
    patches = [history.entry(start + 1).token_of_patch.shape[1] for start in reduction.stages.starts]
    parts = list[dict[str, Tensor]]()
    for block, rate in reduction.stages.targets(patches).items():
        reducer = reduction.reducer(block)
        if reducer is not None and block <= history.block:
            parts.append(reducer.losses(history.entry(block + 1), rate))
    names = sorted({name for part in parts for name in part})
    return {name: torch.stack([part[name] for part in parts if name in part]).mean() for name in names}


def restore_dense(
    of: nn.Module | Provenance, features: Float[Tensor, "B N C"], *, layout: str = "NLC", fill: str | float = 0.0
) -> Tensor:
    """Return dense features: every patch gets the features of the token that contains it.

    Args:
        of: the reduced model that computed the features, in any of its forwards; inside a running forward (in a hook),
            features that are not known otherwise are taken as that forward's. Or a `Provenance`, for its forward; the features
            may then be any tensor with one row per token (a gradient, the result of operations on each token).
        features: [B, prefix + L, C] as ``forward_features`` or a block returns them, or [B, L, C] without the prefix tokens,
            or a view of them along the batch.
        layout: ``NLC`` for [B, P, C] in raster order, ``NCHW`` for [B, C, rows, columns] or, of clips, ``NCTHW`` for
            [B, C, tubelets in time, rows, columns].
        fill: the features of dropped patches: a number, ``zeros``, ``nearest``, ``mean``, or ``last``
            (see `laconic.core.dense.restored`).

    Raises:
        ValueError: the features are not from a known forward or do not match its tokens, or the grid is unknown.
    """
    if isinstance(of, Provenance):
        history = _entry_of_shape(of._history, features)
        reduction: TokenReduction = of._history.reduction  # type: ignore[union-attr]
    else:
        reduction = reduction_of(of)
        found = current(features, reduction.ref) if isinstance(features, Tensor) and features.dim() == 3 else None
        if found is None:
            raise ValueError(
                f"features of shape {tuple(features.shape)} are not a known output of this model: they are a copy, the result "
                "of an operation, or another model's. Pass them as the model returned them (or a view along the batch), or "
                "name their forward: restore_dense(laconic.provenance(model), features)"
            )
        history = found
    tokens = history.tokens
    images, count = tokens.shape
    prefix = tokens.prefix if features.dim() == 3 and features.shape[1] == count else 0
    if features.dim() != 3 or features.shape[0] != images or features.shape[1] - prefix != len(tokens):
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not fit their forward, which kept {images} images of "
            f"{tokens.prefix} prefix and {len(tokens)} patch tokens"
        )
    if history.restored:
        return laid_out(features[:, prefix:], tokens, layout)
    norm = reduction.entry_of_host.final_norm(reduction.model) if fill == "last" else None
    return laid_out(restored(tokens, features[:, prefix:], fill, norm), tokens, layout)


def _entry_of_shape(history: History | None, features: Tensor) -> History:
    """Return the last history entry of a forward that has as many tokens as the features.

    Raises:
        ValueError: no entry has.
    """
    for entry in [] if history is None or features.dim() != 3 else history.chain():
        images, count = entry.tokens.shape
        if features.shape[0] == images and features.shape[1] in (count, count - entry.tokens.prefix):
            return entry
    raise ValueError(f"features of shape {tuple(features.shape)} do not match the tokens of any block of this forward")
