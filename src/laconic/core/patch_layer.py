"""The layer that embeds the patches of a model, and its replacement while a method reduces before the first block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.backbone import ModelSpec, path_of
from laconic.core.links import ModelRef, PartLink
from laconic.core.patch_input import PatchInput
from laconic.core.runtime import call_of


@dataclass(frozen=True)
class PatchLayer:
    """The layer of a model that embeds patches, the sides of a patch in pixels, and the order of a flat patch's values.

    The sides are height and width; those of a tubelet are frames, height and width.
    """

    layer: nn.Module
    size: tuple[int, ...]
    layout: str = "chw"


class PatchLink(PartLink):
    """The link of the patch embedding: the model, and the facts of `PatchLayer`."""

    def __init__(self, ref: ModelRef, names: tuple[str, ...], size: tuple[int, ...], layout: str) -> None:
        super().__init__(ref, names)
        self.size, self.layout = size, layout


def find_patch_layer(host: Any, entry: ModelSpec) -> PatchLayer:
    """Return the layer of a model that embeds patches.

    Raises:
        LookupError: the model has several stages, or its patch embedding is not one layer that embeds each patch by itself.
    """
    name = path_of(type(host))
    if len(entry.shapes(host)) > 1:
        raise LookupError(f"{name} has several stages with a patch embedding each; use a method that works in blocks")
    if entry.patch_layer is not None:
        return PatchLayer(*entry.patch_layer(host))
    try:
        embed = entry.patch_embed(host)
    except AttributeError:
        raise LookupError(f"laconic does not know the patch embedding of {name}; use a method that works in blocks") from None
    layers = [module for module in embed.modules() if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear)]
    if len(layers) != 1 or isinstance(layers[0], nn.Linear) or not _of_patches(layers[0]):
        raise LookupError(
            f"the patch embedding of {name} is not one convolution of patches without overlap, so patches cannot be reduced "
            "before it; use a method that works in blocks"
        )
    return PatchLayer(layers[0], tuple(layers[0].kernel_size))


def _of_patches(conv: nn.Conv2d | nn.Conv3d) -> bool:
    """Return True if each output of a convolution sees the pixels of one patch, and every pixel belongs to one patch."""
    padded = conv.padding not in ("valid", (0, 0), (0, 0, 0), 0)
    return conv.stride == conv.kernel_size and not padded and set(conv.dilation) == {1} and conv.groups == 1


def run_patch_layer(layer: Any, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replacement for the forward of the patch embedding: call the phase ``embed`` of the first block's reducer."""
    out: Tensor = own(layer, x, *args, **kwargs)
    call = call_of(layer._laconic.ref)
    if call is None:
        return out  # a user runs the layer alone
    reduction = call.reduction
    reducer, patches = reduction.reducer(0), out.flatten(2).shape[2] if out.dim() > 3 else out.shape[1]
    n = reduction.stages.stage_counts(0, patches)[0]
    if reducer is None or "embed" not in reducer.phases or not reducer.active(patches, n):
        return out
    with torch.autocast(x.device.type, enabled=False):  # similarities and sums of pixels stay in float32
        done: PatchInput = reducer.embed(_patch_input(layer, own, x, out, call), n)
    call.group = done.group
    if done.new_embeddings is None:
        return out
    new = done.new_embeddings.to(out.dtype)
    return new.transpose(1, 2).reshape(out.shape) if out.dim() > 3 else new


def _patch_input(layer: Any, own: Any, x: Tensor, out: Tensor, call: Any) -> PatchInput:
    """Return the patches of the layer's input ``x``, and their embeddings in its output."""
    link: PatchLink = layer._laconic
    if out.dim() == 3:
        return PatchInput(x, out, call.grid, link.size, link.layout, lambda flat: own(layer, flat.to(x.dtype)))
    shape, grid = (-1, x.shape[1], *link.size), tuple(map(int, out.shape[2:]))

    def project(flat: Tensor) -> Tensor:
        embedded: Tensor = own(layer, flat.to(x.dtype).reshape(shape))
        return embedded.flatten(1)

    return PatchInput(x, out.flatten(2).transpose(1, 2), grid, link.size, link.layout, project)
