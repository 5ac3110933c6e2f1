"""Intermediate features of a reduced model, restored to all patches.

timm's and open_clip's ``forward_intermediates`` reshapes the features of blocks to the grid of patches, which fewer tokens do
not fill. While a model is reduced, every patch gets the features of the token that held it at that block.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from laconic.core.backbone import ModelSpec
from laconic.core.dense import laid_out, restored
from laconic.core.history import History
from laconic.core.runtime import call_method

INTERMEDIATES_KEY = "image_intermediates"  # the key of the intermediates in a dict of results


def forward_intermediates(host: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Replacement for ``forward_intermediates``, with its arguments and results; final features are those of the kept tokens.

    Intermediates are [B, P, C] or [B, C, rows, columns]. Patches dropped up to that block are zero, or filled as
    ``reduce_(restore=...)`` says; with ``restore``, the final features are restored too.

    Raises:
        ValueError: ``NCHW`` is requested and the grid of the patches is not known.
    """
    bound = inspect.signature(own).bind(host, *args, **kwargs)
    bound.apply_defaults()
    wanted, image = bound.arguments["output_fmt"], bound.arguments["x"]
    if wanted not in ("NCHW", "NLC") or isinstance(image, dict):
        return own(host, *args, **kwargs)  # raises the model's own error
    bound.arguments["output_fmt"] = "NLC"
    out, call = call_method("forward_intermediates", host, own, bound.args[1:], bound.kwargs)
    reduction, history = call.reduction, call.history
    if history is None:
        return out
    entry: ModelSpec = reduction.entry_of_host
    blocks = _blocks(bound.arguments["indices"], reduction.depth)
    norm = entry.final_norm(host) if bound.arguments.get("norm") else None

    def dense(found: Sequence[Any]) -> list[Any]:
        return [_dense(history, block, one, wanted, norm) for block, one in zip(blocks, found, strict=True)]

    if isinstance(out, dict):
        return {**out, INTERMEDIATES_KEY: dense(out[INTERMEDIATES_KEY])}
    return (out[0], dense(out[1])) if isinstance(out, tuple) else dense(out)


def refuse_layer_removal(host: Any, own: Any, *args: Any, **kwargs: Any) -> None:
    """Replacement for ``prune_intermediate_layers``: removing blocks does not fit the reducers, which belong to blocks.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"this {type(host).__name__} is reduced, and removing blocks would leave reducers without a block; "
        "call laconic.restore_(model) first, remove the blocks, and reduce again"
    )


def _blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Return the requested blocks in order, as the models read ``indices``: all (None), the last n (int), or a sequence."""
    if indices is None:
        return list(range(depth))
    taken = range(depth - indices, depth) if isinstance(indices, int) else indices
    return sorted({index % depth for index in taken})


def _dense(history: History, block: int, found: Any, wanted: str, norm: Any) -> Any:
    """Restore the features after one block (or a tuple of them and the prefix tokens) to all patches."""
    if isinstance(found, tuple):
        return _dense(history, block, found[0], wanted, norm), *found[1:]
    tokens, restore = history.entry(block + 1), history.reduction.restore
    fill = (
        restore if isinstance(restore, str) else history.reduction.fill_of(history.reduction.entry_of_host) if restore else 0.0
    )
    features: Tensor = restored(tokens, found, fill, norm)
    return laid_out(features, tokens, wanted)
