"""Other people's models, as table entries: which classes Laconic knows, and how each block's forward falls in two halves.

Everything is keyed by full class path, because names repeat (timm alone has four classes called ``Block``), and nothing
of a host library is imported here. What an entry says is proved on the user's own model when it is reduced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Half = Callable[..., Tensor]


@dataclass(frozen=True)
class Halves:
    """A block class: what attention adds to x, and what the MLP adds to x. None: it cannot be parted (parallel blocks)."""

    attention: Half | None = None
    mlp: Half | None = None
    rope: str | None = None  # the keyword under which rotary tables [..., P, D] reach the block


@dataclass(frozen=True)
class Host:
    """A model class: where its blocks are, what comes before the patches, and what reads the tokens at the end."""

    path: str
    blocks: Callable[[Any], list[nn.Module]]
    prefix: Callable[[Any], tuple[int, bool]]  # prefix tokens; is the first of them a class token?
    positions: Callable[[Any], Tensor | None]  # absolute position embedding of the patches, [P, C]
    grid: Callable[[Any], tuple[int, int]]
    dim: Callable[[Any], int]
    heads: Callable[[Any], int]
    example: Callable[[Any], Tensor]  # an input of the model's own size, batch 1
    pooling: Callable[[Any], tuple[str, bool]]  # "token" | "avg" | "map" | ..., and does it pool the prefix tokens too?
    obstacle: Callable[[Any], str | None]  # why this very model cannot be reduced, or None


BLOCKS: dict[str, Halves] = {}
HOSTS: dict[str, Host] = {}


def register_block(path: str, halves: Halves) -> None:
    """Add a block class by its full path."""
    BLOCKS[path] = halves


def register_host(host: Host) -> None:
    """Add a model class by its full path."""
    HOSTS[host.path] = host


def hosts() -> dict[str, tuple[str, ...]]:
    """What is supported, by full class path: the model classes and the block classes."""
    return {"models": tuple(sorted(HOSTS)), "blocks": tuple(sorted(BLOCKS))}


def path_of(cls: type) -> str:
    """The full path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def halves_of(block: nn.Module) -> Halves:
    """The entry of a block's class or of the class it was derived from (FSDP derives one).

    Raises:
        LookupError: its class is unknown.
    """
    for cls in type(block).__mro__:
        if path_of(cls) in BLOCKS:
            return BLOCKS[path_of(cls)]
    raise LookupError(f"laconic does not know {path_of(type(block))}. Supported block classes: {', '.join(sorted(BLOCKS))}")


def find_host(model: nn.Module) -> tuple[nn.Module, Host]:
    """The one supported vision transformer in ``model`` (itself, or a submodule of it) and its table entry.

    Raises:
        TypeError: not a module, no supported model in it, or a block class that is not known.
        ValueError: more than one supported model in it, or this one has something that cannot be reduced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; create the model first (timm.create_model)")
    _refuse_compiled(model)
    found = [(m, h) for m in model.modules() if (h := _entry(m)) is not None]
    if not found:
        known = ", ".join(sorted(HOSTS))
        raise TypeError(f"laconic does not know {path_of(type(model))}. Supported model classes: {known}")
    if len(found) > 1:
        names = [name for name, m in model.named_modules() if any(m is f for f, _ in found)]
        raise ValueError(f"there are {len(found)} vision transformers in this model ({names}); pass the one to reduce")
    host, entry = found[0]
    blocks = entry.blocks(host)
    for i, block in enumerate(blocks):
        try:
            halves_of(block)
        except LookupError as error:
            raise TypeError(f"block {i} of {type(host).__name__}: {error}") from None
    obstacle = entry.obstacle(host)
    if obstacle:
        raise ValueError(f"{type(host).__name__} cannot be reduced as it is: {obstacle}")
    return host, entry


def _entry(module: nn.Module) -> Host | None:
    return next((HOSTS[path_of(cls)] for cls in type(module).__mro__ if path_of(cls) in HOSTS), None)


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "this model is compiled already; reduce it first, then compile: torch.compile(reduce_(model, ...))"
            )


from laconic.hosts import timm as _timm  # noqa: E402, F401  (fills the tables)
