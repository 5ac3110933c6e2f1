"""Table entries of supported backbones: known classes, and the split of each block into attention and MLP.

Entries are keyed by full class path, because names repeat (timm alone has four classes called ``Block``), so that no model
library is imported here. When a model is reduced, its entry is verified on that very model.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn

Half = Callable[..., Tensor]
# a module, one of its methods, and the function that replaces it while the model is reduced; it is called with a
# `laconic.core.readout.Readout` of the model, the original method, and the arguments
MethodOverride = tuple[nn.Module, str, Callable[..., Any]]
Setting = tuple[Any, str, Any]  # an object, the name of an attribute, and the value it must have
Rows = int | Callable[[str], int]
Reason = str | Callable[[Any], str | None]  # a reason why a class cannot be reduced, or a function of the module


@dataclass(frozen=True)
class AttentionSteps:
    """The attention of a block class in steps, which give q, k and v and allow queries for some tokens only.

    Attention adds ``added(scaled_dot_product_attention(queries(h), *keys_values(h)))`` to x, with h = ``norm(x)``; every step
    but ``keys_values`` accepts a subset of the rows of x. ``project`` computes queries, keys and values at once. Each
    function takes the block as its first argument.
    """

    known: Callable[[Any], bool]  # True if this block's attention is exactly these steps now: no hooks, adapters, overrides
    norm: Callable[[Any, Tensor], Tensor]
    queries: Callable[[Any, Tensor], Tensor]  # [B, M, C] -> [B, H, M, D]
    keys_values: Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # [B, N, C] -> twice [B, H, N, D]
    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]  # [B, N, C] -> three times [B, H, N, D]
    added: Callable[[Any, Tensor], Tensor]  # [B, H, M, D] -> [B, M, C]


@dataclass(frozen=True)
class BlockSpec:
    """A block class: the terms that attention and MLP add to x. None if the block cannot be split (parallel blocks)."""

    attention: Half | None = None
    mlp: Half | None = None
    rope: str | None = None  # the keyword under which rotary tables [..., P, D] reach the block
    # the keyword under which the patch at whose position each token stands, [B, L], reaches a block that makes its own rotary
    # tables; only for models without prefix tokens
    origin: str | None = None
    grid: str | None = None  # the keyword for a `laconic.core.grid.GridMap`, if keys and values come from the full grid
    relative: bool = False  # True if its attention adds a bias [..., N, N] made for all original tokens
    opaque_attention: bool = False  # True if its own attention call is hidden (nn.MultiheadAttention); it then runs in halves
    mask: str | None = None  # the keyword under which an attention mask that hides padding reaches the block
    # the keyword of a mask that the model makes itself: a boolean one that hides nothing, or a bias for all pairs of tokens
    own_mask: str | None = None
    after: tuple[str, ...] = ("norm2", "mlp")  # submodules that process the tokens kept between attention and MLP
    # rows that pass through a layer, by its name, if they are not the tokens (a network that computes a bias)
    rows: Callable[[Any, str], int | None] = lambda block, name: None
    steps: AttentionSteps | None = None  # its attention in steps; None if they are not known

    @property
    def needs_positions(self) -> bool:
        """True if the block needs the tokens' positions or a special execution path, so its plain forward is not enough."""
        keyword = any(name is not None for name in (self.rope, self.origin, self.grid, self.own_mask))
        return keyword or self.relative or self.opaque_attention


@dataclass(frozen=True)
class StageSpec:
    """One stage of a backbone; most have only one. In a backbone of several, each but the last outputs its full grid."""

    depth: int
    dim: int
    heads: int
    grid: tuple[int, ...]  # rows and columns of patches; of a clip: tubelets in time, rows, columns
    prefix: int = 1
    has_cls: bool = True

    @property
    def patches(self) -> int:
        """Number of patches of an image of the model's own input size."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class ModelSpec:
    """A model class: its blocks, prefix tokens, positions, grid, and the readout of the last tokens.

    A model for clips, [B, frames, channels, height, width], has ``clips`` set. Its patches are tubelets, and its grid has three
    sides: tubelets in time, rows, columns.
    """

    path: str
    blocks: Callable[[Any], list[nn.Module]]
    prefix: Callable[[Any], tuple[int, bool]]  # number of prefix tokens; True if the first one is a class token
    positions: Callable[[Any], Tensor | None]  # absolute position embedding of the patches, [P, C]
    grid: Callable[[Any], tuple[int, ...]]
    dim: Callable[[Any], int]
    heads: Callable[[Any], int]
    example: Callable[[Any], Tensor]  # an input of the model's own size, batch 1
    pooling: Callable[[Any], tuple[str, bool]]  # "token" | "avg" | "map" | ...; True if it pools the prefix tokens too
    unsupported_reason: Callable[[Any], str | None]  # the reason why this model cannot be reduced, or None
    stages: Callable[[Any], tuple[StageSpec, ...]] | None = None  # None: one stage, described by the fields above
    at: Callable[[Any], tuple[int, ...]] | None = None  # reducing blocks of the papers for this model; None: the quarters
    # methods that are replaced while a model is reduced, in addition to the blocks' forwards and ``pool``
    method_overrides: Callable[[Any], list[MethodOverride]] = lambda m: []
    # attributes that must have certain values while the model is reduced, so that its attention is fused
    settings: Callable[[Any], list[Setting]] = lambda m: []
    unsupported_kwargs: tuple[str, ...] = ()  # arguments of its forward that a reduced model refuses (attention masks)
    # the module and the method that return normalised features of all tokens; with reduce_(restore=...), of all patches
    features: Callable[[Any], tuple[nn.Module, str]] = lambda m: (
        m,
        "forward_features" if hasattr(m, "forward_features") else "forward",
    )
    head_methods: tuple[str, ...] = (
        "forward_head",
    )  # methods that take the last features, and may change them before they are pooled
    final_norm: Callable[[Any], nn.Module | None] = lambda m: getattr(m, "norm", None)  # between the blocks and the features
    # the methods between its forward and its pooling, if they read only the prefix tokens of the last block when the model
    # pools by "token"; empty otherwise
    head_reads_prefix_only: tuple[str, ...] = ()
    # True if the model returns all its last tokens, which callers may average: merged tokens are then restored to their patches
    restores_output: bool = False
    # rows and columns of patches of an image [height, width], or the grid of a clip [frames, height, width]; None if not known
    # (``grid`` is for the model's own size)
    grid_of: Callable[[Any, tuple[int, ...]], tuple[int, ...] | None] = lambda m, size: None
    clips: bool = False  # True if its input is a batch of clips
    contains_host: bool = False  # True if this entry describes a model with another supported model inside, in its place
    patch_embed: Callable[[Any], nn.Module] = lambda m: m.patch_embed  # turns an image into tokens
    # the layer that embeds patches, their height and width, and "chw" or "hwc"; None: the only convolution in ``patch_embed``
    patch_layer: Callable[[Any], tuple[nn.Module, tuple[int, ...], str]] | None = None
    # rows through each layer outside the blocks, by name, given the numbers of tokens before and after the blocks; for a
    # module with several layers, a function of their names inside it
    rows: Callable[[Any, int, int], Mapping[str, Rows]] | None = None
    # multiply-adds outside the blocks of matrix products that are not layers, given the same two numbers
    extra_macs: Callable[[Any, int, int], int] = lambda m, before, after: 0

    @property
    def input_axes(self) -> str:
        """The axes of its input, for messages."""
        return "[B, frames, channels, height, width]" if self.clips else "[B, channels, height, width]"

    def takes(self, image: Any) -> TypeGuard[Tensor]:
        """Return True if this is a tensor with the axes of its input."""
        return isinstance(image, Tensor) and image.dim() == (5 if self.clips else 4)

    def sides(self, image: Tensor) -> tuple[int, ...]:
        """Return height and width of a batch of images; of clips: frames, height and width."""
        sides = (image.shape[1], *image.shape[3:]) if self.clips else image.shape[2:]
        return tuple(int(side) for side in sides)  # torch.jit.trace has tensors for sizes

    def shapes(self, model: Any) -> tuple[StageSpec, ...]:
        """Return the stages of a model."""
        if self.stages is not None:
            return self.stages(model)
        depth = len(self.blocks(model))
        return (StageSpec(depth, self.dim(model), self.heads(model), self.grid(model), *self.prefix(model)),)


BLOCKS: dict[str, BlockSpec] = {}
HOSTS: dict[str, ModelSpec] = {}
REFUSED: dict[str, Reason] = {}  # classes that cannot be reduced, and why


def register_block(path: str, halves: BlockSpec) -> None:
    """Add a block class by its full path."""
    BLOCKS[path] = halves


def register_host(host: ModelSpec) -> None:
    """Add a model class by its full path."""
    HOSTS[host.path] = host


def register_refusal(path: str, reason: Reason) -> None:
    """Record why a class cannot be reduced, by its full path; a function of the module returns None if it can be."""
    REFUSED[path] = reason


def load_backbones() -> None:
    """Import the backbones that come with laconic, which fill the tables; by name, since that package is above this one."""
    importlib.import_module("laconic.backbones")


def hosts() -> dict[str, tuple[str, ...]]:
    """Return the supported model classes and block classes, by full class path."""
    load_backbones()
    return {"models": tuple(sorted(HOSTS)), "blocks": tuple(sorted(BLOCKS))}


def path_of(cls: type) -> str:
    """Return the full path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def plain_type(module: Any) -> type:
    """Return the class that a module has while its model is not reduced (see `laconic.core.patching`)."""
    kind: type = type(module)
    return getattr(kind, "laconic_base", kind)


def unhooked(*modules: nn.Module) -> bool:
    """Return True if calling each module only calls its class's forward: no hooks, and no forward set on the instance."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if "forward" in module.__dict__:
            return False
    return True


def block_spec(block: nn.Module) -> BlockSpec:
    """Return the entry of a block's class, or of a base class (FSDP derives a class from it).

    Raises:
        LookupError: its class is unknown.
    """
    return BLOCKS[block_path(block)]


def block_path(block: nn.Module) -> str:
    """Return the class path of a block's entry.

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
    """Return the one supported vision transformer in ``model`` (itself or a submodule) and its table entry.

    Raises:
        TypeError: not a module, no supported model in it, or an unknown block class.
        ValueError: more than one supported model in it, or a model with a feature that cannot be reduced.
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
    # some classes are a model in one version and a wrapper of a model in another (transformers' CLIPVisionModel)
    found = [(m, h) for m, h in found if not any(_yields(m, h, other, entry) for other, entry in found if other is not m)]
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
    reason = entry.unsupported_reason(host)
    if reason:
        raise ValueError(f"{type(host).__name__} cannot be reduced as it is: {reason}")
    return host, entry


def _entry(module: nn.Module) -> ModelSpec | None:
    return next((HOSTS[path_of(cls)] for cls in type(module).__mro__ if path_of(cls) in HOSTS), None)


def _yields(model: nn.Module, entry: ModelSpec, other: nn.Module, entry_of_other: ModelSpec) -> bool:
    """Return True if the entry of ``other`` is used instead: it is inside ``model``, or contains it and says so."""
    if entry_of_other.contains_host and model in other.modules():
        return True
    return not entry.contains_host and other in model.modules()


def _refuse(modules: Iterable[nn.Module], error: type[Exception]) -> None:
    for part in modules:
        path = next((path_of(cls) for cls in type(part).__mro__ if path_of(cls) in REFUSED), None)
        reason = None if path is None else REFUSED[path]
        reason = reason(part) if callable(reason) else reason
        if reason is not None:
            raise error(f"{path_of(type(part))} cannot be reduced: {reason}")


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "this model is already compiled; reduce it first, then compile: torch.compile(reduce_(model, ...))"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers that contain nothing else (as ``module``, or torch.compile's ``_orig_mod``)."""
    while True:
        members = [*model.named_children(), *model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]
        if len(members) != 1 or members[0][0] not in ("module", "_orig_mod") or not isinstance(members[0][1], nn.Module):
            return model
        model = members[0][1]
