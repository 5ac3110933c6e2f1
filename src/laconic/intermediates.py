"""Features of single blocks of a reduced host, on all patches again.

timm's and open_clip's ``forward_intermediates`` lays what it took from the blocks out on the grid of patches, which fewer
tokens do not fill. While a host is reduced every patch gets the features of the token that it was in at that block.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from laconic.grid import image_of
from laconic.reading import Reading

TAKEN = "image_intermediates"  # under which name a dict of results has them


def forward_intermediates(reading: Reading, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the host's own, with its arguments and results; the final features are those of the tokens left.

    Intermediates are [B, P, C] or [B, C, height, width], and zero at patches that were dropped by then.

    Raises:
        ValueError: ``NCHW`` of patches that do not fill the grid of their image.
    """
    own = type(reading.host).forward_intermediates
    bound = inspect.signature(own).bind(reading.host, *args, **kwargs)
    bound.apply_defaults()
    wanted, image = bound.arguments["output_fmt"], bound.arguments["x"]
    if wanted not in ("NCHW", "NLC") or isinstance(image, dict):
        return own(reading.host, *args, **kwargs)  # which says what it does not do
    bound.arguments["output_fmt"] = "NLC"
    out = own(*bound.args, **bound.kwargs)
    blocks = _blocks(bound.arguments["indices"], reading.compression.depth)

    def dense(found: Sequence[Any]) -> list[Any]:
        return [_dense(reading, image, block, one, wanted) for block, one in zip(blocks, found, strict=True)]

    if isinstance(out, dict):
        return {**out, TAKEN: dense(out[TAKEN])}
    return (out[0], dense(out[1])) if isinstance(out, tuple) else dense(out)


def refuse_pruning(reading: Reading, *args: Any, **kwargs: Any) -> None:
    """Stands in for ``prune_intermediate_layers``: the reducers are of certain blocks of a certain depth.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"this {type(reading.host).__name__} is reduced, and cutting blocks off would leave reducers without one; "
        "laconic.restore_(model) first, cut, and reduce again"
    )


def _blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """The blocks that are taken, as the hosts read ``indices``: all, the last so many, or these; in their order."""
    if indices is None:
        return list(range(depth))
    taken = range(depth - indices, depth) if isinstance(indices, int) else indices
    return sorted({index % depth for index in taken})


def _dense(reading: Reading, image: Tensor, block: int, found: Any, wanted: str) -> Any:
    """The features after one block (or they and the prefix tokens), on all patches."""
    if isinstance(found, tuple):
        return _dense(reading, image, block, found[0], wanted), *found[1:]
    compression = reading.compression
    tokens = compression.entry(block + 1)
    again = compression.restore and block + 1 == compression.depth  # the block has given every patch its token again
    features = found if again or (tokens.patch is None and tokens.alive is None) else tokens.dense(found)
    if wanted == "NLC":
        return features
    embed: Any = getattr(reading.host, "patch_embed", None) or getattr(reading.host, "embeds", None)
    flexible = hasattr(embed, "dynamic_feat_size")
    height, width = embed.dynamic_feat_size(tuple(image.shape[-2:])) if flexible else compression.grid
    if height * width != features.shape[1]:
        raise ValueError(f"{features.shape[1]} patches do not fill a grid of {height} x {width}; use output_fmt='NLC'")
    return image_of(features, (height, width)).contiguous()
