"""Restore features for every patch: those of the token that holds it or, for a dropped patch, a fill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from laconic.core.backbone import HOSTS, ModelSpec
from laconic.core.gather import gather_rows, in_parts
from laconic.core.grid import GridMap, image_of
from laconic.core.history import History, find, mark
from laconic.core.shape_types import Float
from laconic.core.text_table import by
from laconic.core.tokens import Tokens

Fill = Literal["zeros", "nearest", "last", "mean", "similar"]
FILLS: tuple[str, ...] = get_args(Fill)
Layout = Literal["NLC", "NCHW", "NCTHW"]


def restored(
    tokens: Tokens,
    features: Float[Tensor, "B L C"],
    fill: str | float,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "B P C"]:
    """Give every patch the features of the token that holds it.

    Args:
        tokens: the tokens that the features belong to.
        features: features of the patch tokens, without prefix tokens.
        fill: the fill of dropped patches. A number; ``zeros``; ``mean``: the mean over the patches that a token holds;
            ``nearest``: the features of the nearest held patch on the grid (ties: the first); ``last``: the patch's own
            features when it was dropped; ``similar``: those of the token that was most similar (cosine) when it was dropped.
            The last two are tracked only in models reduced with that value of `reduce_(restore=...)`.
        norm: the norm that was applied to ``features`` after the last block; ``last`` applies it too.

    Raises:
        ValueError: an unknown fill, or one that was not tracked for these tokens.
    """
    if isinstance(fill, str) and fill not in FILLS:
        raise ValueError(f"fill must be a number or one of {', '.join(map(repr, FILLS))}, not {fill!r}")
    tracked = {"similar": tokens.similar, "last": tokens.dropped}
    source = tracked.get(fill) if isinstance(fill, str) else None
    if fill in tracked and source is None:
        raise ValueError(
            f"fill={fill!r} must be tracked from the first block on, which is done only in a model reduced with "
            f"restore={fill!r}"
        )
    full = GridMap.of(tokens)
    dense = features if full is None else full.fill(features)
    if tokens.complete or fill == "zeros" or (not isinstance(fill, str) and fill == 0):
        return dense
    absent = (tokens.token_of_patch < 0).unsqueeze(-1)
    if not isinstance(fill, str):
        return dense.masked_fill(absent, fill)
    if source is not None and fill == "similar":
        return torch.where(absent, gather_rows(features, source), dense)
    if source is not None:
        last = source.to(dense.dtype)
        return torch.where(absent, last if norm is None else norm(last).to(dense.dtype), dense)
    if fill == "mean":
        held = (~absent).to(dense.dtype)
        return torch.where(absent, dense.sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp_min(1), dense)
    return gather_rows(dense, nearest_held(tokens))


def nearest_held(tokens: Tokens) -> Tensor:
    """Return for every patch the nearest patch on the grid that a token holds (itself, if it is held): [B, P].

    On the grid of a clip, a step in time is as far as a step in space.

    Raises:
        ValueError: the grid of the image is not known.
    """
    if tokens.grid is None:
        raise ValueError("fill='nearest' needs the grid of the image's patches, which is not known here; use another fill")
    sides = [torch.arange(side, device=tokens.token_of_patch.device) for side in tokens.grid]
    place = torch.cartesian_prod(*sides).float()
    absent, found = (tokens.token_of_patch < 0).unsqueeze(1), list[Tensor]()
    for part in in_parts(place.unsqueeze(0), len(place)):
        distance = place.new_zeros(1, part.shape[1], len(place))
        for own, other in zip(part[0].unbind(1), place.unbind(1), strict=True):  # no tensor has the differences of all sides
            distance = distance + (own.unsqueeze(1) - other).square()
        found.append(distance.masked_fill(absent, float("inf")).argmin(2))
    return torch.cat(found, 1)


def laid_out(dense: Float[Tensor, "B P C"], tokens: Tokens, layout: str) -> Tensor:
    """Return dense features as [B, P, C] (``NLC``), [B, C, rows, columns] (``NCHW``) or, of clips, ``NCTHW``.

    Raises:
        ValueError: an unknown layout, the grid of the patches is not known, or it has another number of sides.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be 'NLC' or 'NCHW' (for clips 'NCTHW'), not {layout!r}")
    if layout == "NLC":
        return dense
    if tokens.grid is None or math.prod(tokens.grid) != dense.shape[1]:
        raise ValueError(f"the grid of these {dense.shape[1]} patches is not known; use layout='NLC'")
    if len(tokens.grid) != len(layout) - 2:
        right = "NCHW" if len(tokens.grid) == 2 else "NCTHW"
        raise ValueError(f"these patches have a grid of {by(tokens.grid)}; use layout={right!r} or 'NLC'")
    return image_of(dense, tokens.grid).contiguous()


# ------------------------------------------------------------------------------------------------ results of a model
def finish_output(host: Any, module: Any, name: str, out: Any, call: Any) -> Any:
    """Mark the features in a method's result and, if the reduction asks for it, restore them to all patches.

    ``call`` is the `laconic.core.runtime.Call` that returned ``out``. If it ran no forward, or more than one, ``out`` is
    returned unchanged (except from a head method).
    """
    history, reduction = call.history, call.reduction
    entry = HOSTS[reduction.host_path]
    if call.begun != 1 and name not in entry.head_methods:
        return out
    if reduction.restore or entry.restores_output:
        owner, method = entry.features(host)
        if owner is module and name in (method, "forward_intermediates"):
            out = _each(lambda x: _whole(host, entry, x, call), out)
    if not call.tracing:
        out = _marked(out, history) if isinstance(out, Tensor) else _each(lambda x: _marked(x, history), out)
    return out


def _each(change: Callable[[Tensor], Tensor], out: Any) -> Any:
    """Apply ``change`` to every tensor of a result: a tensor, a tuple or list, or a mapping (changed in place)."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, tuple | list):
        values = [change(x) if isinstance(x, Tensor) else x for x in out]
        return type(out)(*values) if hasattr(out, "_fields") else type(out)(values)
    if isinstance(out, Mapping):
        for key, value in list(out.items()):
            if isinstance(value, Tensor):
                out[key] = change(value)  # type: ignore[index]
    return out


def _fits(x: Tensor, tokens: Tokens) -> int | None:
    """Return the number of prefix tokens that features of these tokens include (all or none); None for other tensors."""
    images, count = tokens.shape
    if x.dim() != 3 or x.shape[0] != images:
        return None
    return tokens.prefix if x.shape[1] == count else 0 if x.shape[1] == count - tokens.prefix else None


def _whole(host: Any, entry: ModelSpec, x: Tensor, call: Any) -> Tensor:
    """Restore the last features to all patches, and mark them; return any other tensor unchanged."""
    history = call.history
    tokens, reduction = history.tokens, history.reduction
    prefix, patches = _fits(x, tokens), tokens.token_of_patch.shape[1]
    if prefix is None or (GridMap.of(tokens) is None and len(tokens) == patches):
        return x
    if reduction.restore:
        fill = reduction.fill_of(entry)
    elif tokens.merged:
        fill = "mean"  # the caller may average all of them with equal weights: the result is the mean over the held patches
    else:
        return x
    dense = restored(tokens, x[:, prefix:], fill, entry.final_norm(host))
    whole = torch.cat([x[:, :prefix], dense], 1)
    if not call.tracing:
        entry_of_whole = history.after(history.block, as_patches(tokens))
        entry_of_whole.restored = True
        mark(whole, entry_of_whole)
    return whole


def as_patches(tokens: Tokens) -> Tokens:
    """Return tokens that are the patches themselves; dropped patches have size 0."""
    held = (tokens.token_of_patch >= 0).to(tokens.size.dtype)
    own = torch.arange(held.shape[1], device=held.device).expand(held.shape)
    where = torch.where(tokens.token_of_patch >= 0, own, -1)
    nothing = {
        name: None
        for name in ("origin", "attn_scale", "keep_mask", "visible_prefix", "attention", "switches", "parked", "dropped")
    }
    return tokens.replace(size=held, token_of_patch=where, merged=True, per_token={}, **nothing)


def _marked(x: Tensor, history: History) -> Tensor:
    """Mark a result, unless it is already marked (the features of an inner block) or belongs to other tokens."""
    if find(x) is None and (x.dim() != 3 or _fits(x, history.tokens) is not None):
        mark(x, history)
    return x
