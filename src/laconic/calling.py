"""How a block is called: its features, and its other arguments by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MASKS = ("attn_mask", "attention_mask", "is_causal", "head_mask", "layer_head_mask", "output_attentions")


def by_name(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], own_mask: str | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The features that a block is called with, and its other arguments by name (``names`` are those of its parameters).

    A mask under the name ``own_mask`` is the model's own: if it is boolean it hides nothing, and is left out.

    Raises:
        ValueError: an attention mask is handed over, or attention weights are asked for: neither fits the tokens left.
    """
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    own = named.get(own_mask) if own_mask is not None else None
    if own_mask is not None and own is not None and own.dtype == torch.bool:
        named[own_mask] = None
    for name in MASKS:
        if name != own_mask and named.get(name) is not None and named[name] is not False:
            raise ValueError(f"a reduced model takes no {name}: what is made for all tokens does not fit those that are left")
    return named.pop(names[0]), named
