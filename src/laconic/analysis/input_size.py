"""The image size that costs are for: the patch grid of each stage of a model for an example."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.arguments import unusable
from laconic.core.backbone import ModelSpec, StageSpec
from laconic.core.eval_mode import without_recording


class _StopForward(Exception):
    """Stops a forward whose remaining blocks are not needed; not an error."""


@dataclass(frozen=True, eq=False)
class InputSize:
    """The stages of a model for one size of images; ``image``, [1, C, H, W], is None for the model's own size."""

    shapes: tuple[StageSpec, ...]
    image: Tensor | None = None

    @classmethod
    def of(cls, host: nn.Module, entry: ModelSpec, example: Tensor | None) -> InputSize:
        """Return the input size of ``example``. The model embeds one image of it; blocks run only if it has several stages.

        Raises:
            ValueError: ``example`` is not an image batch, or the model does not accept its size.
        """
        shapes = entry.shapes(host)
        if example is None:
            return cls(shapes)
        image = batch_for(host, example)[:1]
        own = entry.example(host)
        if image.shape == own.shape:
            return cls(shapes)
        tokens = _tokens(host, entry, image)
        facts = zip(shapes, tokens, strict=True)
        grids = [_grid(shape, own.shape[2:], image.shape[2:], count - shape.prefix) for shape, count in facts]
        return cls(tuple(dataclasses.replace(s, grid=grid) for s, grid in zip(shapes, grids, strict=True)), image)

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of an image; None for the model's own size."""
        return None if self.image is None else (self.image.shape[2], self.image.shape[3])


def batch_for(host: nn.Module, example: Any) -> Tensor:
    """Return an example batch on the device of a model and in its dtype.

    Raises:
        ValueError: ``example`` is not an image batch.
    """
    if not isinstance(example, Tensor) or example.dim() != 4 or not len(example):
        found = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be an image batch [B, channels, height, width], got {found}")
    reference = next(host.parameters())
    return example.to(reference.device, reference.dtype)


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
            host(image)
    except _StopForward:
        pass
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise unusable(image, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _grid(shape: StageSpec, own: torch.Size, size: torch.Size, patches: int) -> tuple[int, int]:
    """Return the rows and columns of a stage for images of ``size``, given its ``shape.grid`` for images of ``own`` size.

    Raises:
        ValueError: no grid in proportion to the two sizes has this number of patches.
    """
    sides = [(side * n // whole, -(-side * n // whole)) for n, whole, side in zip(shape.grid, own, size, strict=True)]
    grid = next(((rows, columns) for rows in sides[0] for columns in sides[1] if rows * columns == patches), None)
    if grid is None:
        raise ValueError(
            f"the model makes {patches} patches of an image of {size[0]} x {size[1]} pixels, which is not a grid in "
            f"proportion to the {shape.grid[0]} x {shape.grid[1]} of its own {own[0]} x {own[1]}; use another size"
        )
    return grid
