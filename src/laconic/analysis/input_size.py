"""The size of images or clips that costs are for: the patch grid of each stage of a model for an example."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.arguments import not_a_batch, unusable
from laconic.core.backbone import ModelSpec, StageSpec
from laconic.core.eval_mode import without_recording
from laconic.core.text_table import by
from laconic.core.token_reduction import find_reduction


class _StopForward(Exception):
    """Stops a forward whose remaining blocks are not needed; not an error."""


@dataclass(frozen=True, eq=False)
class InputSize:
    """The stages of a model for one size of images, or of clips.

    ``image``, a batch of one, is None for the model's own size; ``sides`` are its height and width (of a clip: frames first).
    """

    shapes: tuple[StageSpec, ...]
    image: Tensor | None = None
    sides: tuple[int, ...] | None = None

    @classmethod
    def of(cls, host: nn.Module, entry: ModelSpec, example: Tensor | None) -> InputSize:
        """Return the input size of ``example``. The model embeds one image of it; blocks run only if it has several stages.

        Raises:
            ValueError: ``example`` is not an image batch, or the model does not accept its size.
        """
        shapes = entry.shapes(host)
        if example is None:
            return cls(shapes)
        image = batch_for(host, entry, example)[:1]
        own = entry.example(host)
        if image.shape == own.shape:
            return cls(shapes)
        tokens = _tokens(host, entry, image)
        facts, sides = zip(shapes, tokens, strict=True), entry.sides(image)
        grids = [_grid(shape, entry.sides(own), sides, count - shape.prefix) for shape, count in facts]
        return cls(tuple(dataclasses.replace(s, grid=grid) for s, grid in zip(shapes, grids, strict=True)), image, sides)


def batch_for(host: nn.Module, entry: ModelSpec, example: Any) -> Tensor:
    """Return an example batch on the device of a model and in its dtype.

    Raises:
        ValueError: ``example`` is not a batch of what the model takes.
    """
    if not entry.takes(example) or not len(example):
        raise not_a_batch(example, entry.input_axes)
    reference = next(host.parameters())
    return example.to(reference.device, reference.dtype)


def whole_batch(host: nn.Module, batch: Tensor) -> Tensor:
    """Return a batch with as many images as a reduced model takes at once (`laconic.core.method.Method.batch_multiple`).

    Where images are missing, they are the last one shifted, so that no patch repeats the one before it.
    """
    reduction = find_reduction(host)
    missing = 0 if reduction is None else -len(batch) % reduction.config.batch_multiple
    return torch.cat([batch, *(batch[-1:].roll(shift, -1) for shift in range(1, missing + 1))]) if missing else batch


def _tokens(host: nn.Module, entry: ModelSpec, image: Tensor) -> list[int]:
    """Run the model up to the first block of its last stage; return the token count at the first block of each stage."""
    blocks, starts, found = entry.blocks(host), [0], list[int]()
    for shape in entry.shapes(host)[:-1]:
        starts.append(starts[-1] + shape.depth)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found.append(x.shape[1])
        if len(found) == len(starts):
            raise _StopForward

    hooks = [blocks[start].register_forward_pre_hook(enter, with_kwargs=True) for start in starts]
    try:
        with without_recording(host), torch.no_grad():
            host(whole_batch(host, image))
    except _StopForward:
        pass
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise unusable(image, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _grid(shape: StageSpec, own: tuple[int, ...], size: tuple[int, ...], patches: int) -> tuple[int, ...]:
    """Return the grid of a stage for images (or clips) of ``size``, given its ``shape.grid`` for those of ``own`` size.

    Raises:
        ValueError: no grid in proportion to the two sizes has this number of patches.
    """
    sides = [(side * n // whole, -(-side * n // whole)) for n, whole, side in zip(shape.grid, own, size, strict=True)]
    grid = next((grid for grid in product(*sides) if prod(grid) == patches), None)
    if grid is None:
        kind, grid_of_own, *pixels = "a clip" if len(size) == 3 else "an image", *map(by, (shape.grid, own, size))
        raise ValueError(
            f"the model makes {patches} patches of {kind} of {pixels[1]} pixels, which is not a grid in "
            f"proportion to the {grid_of_own} of its own {pixels[0]}; use another size"
        )
    return grid
