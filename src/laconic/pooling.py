"""A host's own pooling, with every token counted as often as it has patches."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from laconic.attention import Watch
from laconic.masking import SOFT_FLOOR
from laconic.shapes import Float
from laconic.tokens import Tokens


def pool_by_size(
    pool: Callable[[Tensor, str], Tensor], x: Float[Tensor, "B N C"], tokens: Tokens, kind: str, prefix_too: bool
) -> Tensor:
    """``pool(x, kind)`` over patches instead of tokens; softly removed tokens do not count.

    For a mean, features are scaled by size / mean size before the host takes it; attention pooling gets log(size) as a bias.

    Raises:
        ValueError: a pooling that cannot be weighted.
    """
    if kind in ("token", "none"):
        return pool(x, kind)
    weight = tokens.size if tokens.alive is None else tokens.size * tokens.alive
    weight = F.pad(weight, (tokens.prefix, 0), value=1.0)
    counted = weight if prefix_too else weight[:, tokens.prefix :]
    if kind == "avg":
        # in training every patch may be softly removed: then the mean of nothing is zero
        mean = counted.mean(1, keepdim=True).clamp_min(1e-6)
        return pool(x * (weight / mean).unsqueeze(-1).to(x.dtype), kind)
    if kind == "map":
        with Watch([], counted.clamp_min(SOFT_FLOOR).log().unsqueeze(1).unsqueeze(1)):
            return pool(x, kind)
    raise ValueError(
        f"pooling {kind!r} cannot count merged tokens by their size; use global_pool='avg' or 'token', or a method that only "
        "drops tokens (topk, random)"
    )
