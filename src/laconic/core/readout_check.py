"""Check that a model's readout weights each token by the number of patches it holds, whatever its class does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.backbone import path_of
from laconic.core.history import find
from laconic.core.runtime import call_of, record_output
from laconic.core.token_reduction import TokenReduction


def check_readout(host: nn.Module, reduction: TokenReduction, image: Tensor) -> None:
    """Compare the model's output for several equal patches with its output for one merged token in their place.

    Raises:
        ValueError: the outputs differ, so the model's readout ignores token sizes.
    """
    try:
        with _last_block_gives(host, reduction, merged=False):
            apart = host(image)
        with _last_block_gives(host, reduction, merged=True):
            together = host(image)
        difference, size = difference_of(_apart(together), apart)
        told = f"the output differs by {difference:.2g} of {size:.2g}"
    except (RuntimeError, ValueError, IndexError) as error:
        difference, size, told = float("inf"), 1.0, f"the model fails ({error})"
    if not difference <= 1e-2 * max(size, 1e-6):  # also refuses NaN
        raise ValueError(
            f"{path_of(type(host))} reads its last tokens in a way of its own: if one token replaces several equal patches, "
            f"{told}, so tokens merged by {reduction.config.info.name} would have too little weight. Use a method that only "
            "drops tokens (topk, random, dynamicvit), or let the class average in the pool method of its base"
        )


def _apart(out: Any) -> Any:
    """Expand features of single tokens in an output, if there are any, to all patches."""
    if isinstance(out, Mapping):
        return {key: _apart(value) for key, value in out.items()}
    if isinstance(out, tuple | list):
        return [_apart(value) for value in out]
    history = find(out) if isinstance(out, Tensor) and out.dim() == 3 else None
    if history is None or out.shape[1] not in (len(history.tokens), history.tokens.shape[1]):
        return out
    prefix = history.tokens.prefix if out.shape[1] == history.tokens.shape[1] else 0
    return torch.cat([out[:, :prefix], history.tokens.dense(out[:, prefix:])], 1)


@contextmanager
def _last_block_gives(host: nn.Module, reduction: TokenReduction, *, merged: bool) -> Iterator[None]:
    """Make all blocks the identity, but the last one, which returns half of the patches equal, or merged into one token."""
    blocks: list[Any] = reduction.entry_of_host.blocks(host)

    def passes(names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[names[0]]
        return (x,) if reduction.in_tuples else x

    def gives(names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0] if args else kwargs[names[0]]
        call = call_of(reduction.ref)
        stage = len(reduction.stages.shapes) - 1
        history = reduction.begin(host, x, stage, call, None)
        noise = torch.empty(x.shape).normal_(generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
        patch = torch.arange(len(history.tokens), device=x.device).expand(x.shape[0], -1)
        same = max(1, patch.shape[1] // 2)
        first = patch.where(patch >= same, 0)
        prefix = history.tokens.prefix
        x = torch.cat([noise[:, :prefix], noise[:, prefix:][:, first[0]]], 1)
        tokens = history.tokens.replace(x=x)
        if merged:
            tokens = tokens.merge((first - same + 1).clamp_min(0), None, torch.cat([patch[:, :1], patch[:, same:]], 1))
        if call is not None:
            call.begun = 1
        record_output(call, history.after(reduction.depth - 1, tokens), tokens.x, reduction.depth - 1)
        return (tokens.x,) if reduction.in_tuples else tokens.x

    try:
        for number, block in enumerate(blocks):
            does = gives if number + 1 == len(blocks) else passes
            block.__dict__["forward"] = _with_names(does, block._laconic.names)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _with_names(does: Any, names: tuple[str, ...]) -> Any:
    return lambda *args, **kwargs: does(names, *args, **kwargs)


def difference_of(a: Any, b: Any) -> tuple[float, float]:
    """Return the largest difference of two outputs, and the largest absolute value of the second."""
    if isinstance(a, Tensor):
        if a.shape != b.shape:
            return float("inf"), 1.0
        return (0.0, 1.0) if not a.numel() else ((a - b).abs().max().item(), b.abs().max().item())
    pairs = [(x, b[key]) for key, x in a.items()] if isinstance(a, Mapping) else []
    pairs += list(zip(a, b, strict=True)) if isinstance(a, tuple | list) else []
    found = [difference_of(x, y) for x, y in pairs] or [(0.0, 1.0)]
    return max(found, key=lambda pair: pair[0] / max(pair[1], 1e-6))
