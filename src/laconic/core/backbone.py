"""Other people's models, as table entries: which classes Laconic knows, and how each block's forward falls in two halves.

Everything is keyed by full class path, because names repeat (timm alone has four classes called ``Block``), and nothing
of a host library is imported here. What an entry says is proved on the user's own model when it is reduced.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Half = Callable[..., Tensor]
# a module, one of its methods, and what replaces it while the model is reduced: a function of a module, called with a
# `laconic.core.readout.Readout` of the model, the method itself, and its arguments
MethodOverride = tuple[nn.Module, str, Callable[..., Any]]
Setting = tuple[Any, str, Any]  # an object, the name of one of its attributes, and the value it must have


@dataclass(frozen=True)
class AttentionSteps:
    """The attention of a block class in its steps, so that q, k and v are at hand and only some tokens need be queries.

    What attention adds to x is ``added(scaled_dot_product_attention(queries(h), *keys_values(h)))`` with h = ``norm(x)``; all
    but keys and values may be of some rows of x. ``project`` makes queries, keys and values at once. Each takes the block.
    """

    known: Callable[[Any], bool]  # is this very block's attention no more than these steps, without hooks and adapters, now?
    norm: Callable[[Any, Tensor], Tensor]
    queries: Callable[[Any, Tensor], Tensor]  # [B, M, C] -> [B, H, M, D]
    keys_values: Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # [B, N, C] -> twice [B, H, N, D]
    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]  # [B, N, C] -> three times [B, H, N, D]
    added: Callable[[Any, Tensor], Tensor]  # [B, H, M, D] -> [B, M, C]


@dataclass(frozen=True)
class BlockSpec:
    """A block class: what attention adds to x, and what the MLP adds to x. None: it cannot be parted (parallel blocks)."""

    attention: Half | None = None
    mlp: Half | None = None
    rope: str | None = None  # the keyword under which rotary tables [..., P, D] reach the block
    grid: str | None = None  # the keyword under which a `laconic.core.grid.GridMap` does: keys and values are of the full grid
    relative: bool = False  # does its attention add a bias [..., N, N] that was made for all the tokens there were?
    opaque_attention: bool = False  # is its own attention out of sight (nn.MultiheadAttention)? Then it runs in its halves
    mask: str | None = None  # the keyword under which an attention mask reaches the block that hides padding
    # the keyword of a mask that the model makes itself: boolean, then it hides nothing, or a bias for all pairs of tokens
    own_mask: str | None = None
    after: tuple[str, ...] = ("norm2", "mlp")  # its parts that see the tokens that are left between attention and MLP
    # rows through a layer of it, by its name, where they are not the tokens (a network that makes a bias)
    rows: Callable[[Any, str], int | None] = lambda block, name: None
    steps: AttentionSteps | None = None  # its attention in steps, where they are known

    @property
    def needs_positions(self) -> bool:
        """Whether it has to be told where tokens are, or is to be run in a way of its own: not as it stands."""
        told = self.rope is not None or self.grid is not None or self.own_mask is not None
        return told or self.relative or self.opaque_attention


@dataclass(frozen=True)
class StageSpec:
    """One stage of a host; most have one only. Where there are several, each but the last hands on its full grid."""

    depth: int
    dim: int
    heads: int
    grid: tuple[int, int]
    prefix: int = 1
    has_cls: bool = True

    @property
    def patches(self) -> int:
        """Patches of an image of the host's own size."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ModelSpec:
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
    unsupported_reason: Callable[[Any], str | None]  # why this very model cannot be reduced, or None
    stages: Callable[[Any], tuple[StageSpec, ...]] | None = None  # None: one stage, as the fields above say
    at: Callable[[Any], tuple[int, ...]] | None = None  # where the papers reduce this model; None: at the quarters
    # methods that are replaced while a model is reduced, beside those of blocks and ``pool``
    method_overrides: Callable[[Any], list[MethodOverride]] = lambda m: []
    # what has to be set for its attention to be fused, for as long as it is reduced
    settings: Callable[[Any], list[Setting]] = lambda m: []
    unsupported_kwargs: tuple[str, ...] = ()  # arguments of its forward that a reduced model does not take (attention masks)
    # the module and the method that hand on the features of all tokens, normalised; with reduce_(restore=...) of all patches
    features: Callable[[Any], tuple[nn.Module, str]] = lambda m: (
        m,
        "forward_features" if hasattr(m, "forward_features") else "forward",
    )
    head_methods: tuple[str, ...] = (
        "forward_head",
    )  # methods that take the last features, and may change them before they are pooled
    final_norm: Callable[[Any], nn.Module | None] = lambda m: getattr(m, "norm", None)  # between the blocks and the features
    # the methods between its forward and its pooling, where these read nothing of the last block but the prefix tokens if it
    # pools by "token"; empty: not so
    head_reads_prefix_only: tuple[str, ...] = ()
    restores_output: bool = (
        False  # does it hand on all its last tokens, for others to average? Then merged ones go to their patches
    )
    # rows and columns of the patches of an image [height, width] now; None: not known (its own size is ``grid``)
    grid_of: Callable[[Any, tuple[int, int]], tuple[int, int] | None] = lambda m, size: None
    patch_embed: Callable[[Any], nn.Module] = lambda m: m.patch_embed  # makes tokens of an image
    # rows that pass through the layers of its other parts, by their name, of so many tokens before and after the blocks
    rows: Callable[[Any, int, int], dict[str, int]] | None = None
    # multiply-adds of the matrix products there that no layer makes, of so many tokens as well
    extra_macs: Callable[[Any, int, int], int] = lambda m, before, after: 0

    def shapes(self, model: Any) -> tuple[StageSpec, ...]:
        """The stages of a model."""
        if self.stages is not None:
            return self.stages(model)
        depth = len(self.blocks(model))
        return (StageSpec(depth, self.dim(model), self.heads(model), self.grid(model), *self.prefix(model)),)


BLOCKS: dict[str, BlockSpec] = {}
HOSTS: dict[str, ModelSpec] = {}
REFUSED: dict[str, str] = {}  # classes that cannot be reduced, and why


def register_block(path: str, halves: BlockSpec) -> None:
    """Add a block class by its full path."""
    BLOCKS[path] = halves


def register_host(host: ModelSpec) -> None:
    """Add a model class by its full path."""
    HOSTS[host.path] = host


def register_refusal(path: str, reason: str) -> None:
    """Say of a class that is no host, by its full path, why it cannot be reduced."""
    REFUSED[path] = reason


def load_backbones() -> None:
    """Import the backbones that come with laconic, which fill the tables; by name, since that package is above this one."""
    importlib.import_module("laconic.backbones")


def hosts() -> dict[str, tuple[str, ...]]:
    """What is supported, by full class path: the model classes and the block classes."""
    load_backbones()
    return {"models": tuple(sorted(HOSTS)), "blocks": tuple(sorted(BLOCKS))}


def path_of(cls: type) -> str:
    """The full path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def plain_type(module: Any) -> type:
    """The class of a module as it is when its model is not reduced (see `laconic.core.patching`)."""
    kind: type = type(module)
    return getattr(kind, "laconic_base", kind)


def unhooked(*modules: nn.Module) -> bool:
    """True if calling each module is to call its class's forward: no hooks of any kind, no forward of its own."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if "forward" in module.__dict__:
            return False
    return True


def block_spec(block: nn.Module) -> BlockSpec:
    """The entry of a block's class or of the class it was derived from (FSDP derives one).

    Raises:
        LookupError: its class is unknown.
    """
    return BLOCKS[block_path(block)]


def block_path(block: nn.Module) -> str:
    """The path of the class under which a block's entry is found.

    Raises:
        LookupError: its class is unknown.
    """
    load_backbones()
    for cls in type(block).__mro__:
        if path_of(cls) in BLOCKS:
            return path_of(cls)
    _refuse(block.modules(), LookupError)
    raise LookupError(f"laconic does not know {path_of(type(block))}. Supported block classes: {', '.join(sorted(BLOCKS))}")


def find_host(model: nn.Module) -> tuple[nn.Module, ModelSpec]:
    """The one supported vision transformer in ``model`` (itself, or a submodule of it) and its table entry.

    Raises:
        TypeError: not a module, no supported model in it, or a block class that is not known.
        ValueError: more than one supported model in it, or this one has something that cannot be reduced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; create the model first (timm.create_model)")
    load_backbones()
    _refuse_compiled(model)
    _refuse([model], TypeError)
    found = [(m, h) for m in model.modules() if (h := _entry(m)) is not None]
    if not found:
        _refuse(model.modules(), TypeError)
        known = ", ".join(sorted(HOSTS))
        raise TypeError(f"laconic does not know {path_of(type(model))}. Supported model classes: {known}")
    # a class of one version is but a wrapper of the supported one in another (transformers' CLIPVisionModel)
    found = [(m, h) for m, h in found if not any(m is not other and other in m.modules() for other, _ in found)]
    if len(found) > 1:
        names = [name for name, m in model.named_modules() if any(m is f for f, _ in found)]
        raise ValueError(f"there are {len(found)} vision transformers in this model ({names}); pass the one to reduce")
    host, entry = found[0]
    blocks = entry.blocks(host)
    for i, block in enumerate(blocks):
        try:
            block_spec(block)
            _refuse(block.modules(), LookupError)
        except LookupError as error:
            raise TypeError(f"block {i} of {type(host).__name__}: {error}") from None
    obstacle = entry.unsupported_reason(host)
    if obstacle:
        raise ValueError(f"{type(host).__name__} cannot be reduced as it is: {obstacle}")
    return host, entry


def _entry(module: nn.Module) -> ModelSpec | None:
    return next((HOSTS[path_of(cls)] for cls in type(module).__mro__ if path_of(cls) in HOSTS), None)


def _refuse(modules: Iterable[nn.Module], error: type[Exception]) -> None:
    for part in modules:
        path = next((path_of(cls) for cls in type(part).__mro__ if path_of(cls) in REFUSED), None)
        if path is not None:
            raise error(f"{path_of(type(part))} cannot be reduced: {REFUSED[path]}")


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "this model is compiled already; reduce it first, then compile: torch.compile(reduce_(model, ...))"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that hold it (as ``module``, or ``_orig_mod`` of torch.compile) and nothing else."""
    while True:
        members = [*model.named_children(), *model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]
        if len(members) != 1 or members[0][0] not in ("module", "_orig_mod") or not isinstance(members[0][1], nn.Module):
            return model
        model = members[0][1]
