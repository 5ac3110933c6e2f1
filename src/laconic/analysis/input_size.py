"""The size of the images that costs are for: how many patches each stage of a model makes of an example."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.backbone import ModelSpec, StageSpec
from laconic.core.eval_mode import aside


class _Enough(Exception):
    """No error: the blocks after this one need not run."""


@dataclass(frozen=True, eq=False)
class InputSize:
    """The stages of a model for one size of images; ``image``, [1, C, H, W], is None for the model's own size."""

    shapes: tuple[StageSpec, ...]
    image: Tensor | None = None

    @classmethod
    def of(cls, host: nn.Module, entry: ModelSpec, example: Tensor | None) -> InputSize:
        """Return the size of ``example``. The model makes tokens of one image of it; its blocks run only if it has stages.

        Raises:
            ValueError: no image batch, or the model takes none of this size.
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
        ValueError: no image batch.
    """
    if not isinstance(example, Tensor) or example.dim() != 4 or not len(example):
        found = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be an image batch [B, channels, height, width], got {found}")
    reference = next(host.parameters())
    return example.to(reference.device, reference.dtype)


def _tokens(host: nn.Module, entry: ModelSpec, image: Tensor) -> list[int]:
    """Run the model up to the first block of its last stage: tokens that come into the first block of each stage."""
    blocks, starts, found = entry.blocks(host), [0], list[int]()
    for shape in entry.shapes(host)[:-1]:
        starts.append(starts[-1] + shape.depth)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found.append(x.shape[1])
        if len(found) == len(starts):
            raise _Enough

    hooks = [blocks[start].register_forward_pre_hook(enter, with_kwargs=True) for start in starts]
    try:
        with aside(host), torch.no_grad():
            host(image)
    except _Enough:
        pass
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model does not run on an image of shape {tuple(image.shape)}: {error}; pass an input that fits as example="
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _grid(shape: StageSpec, own: torch.Size, size: torch.Size, patches: int) -> tuple[int, int]:
    """The rows and columns that a stage makes of an image, where it has ``shape.grid`` of its ``own`` size.

    Raises:
        ValueError: its patches are no grid that follows from the two sizes.
    """
    sides = [(side * n // whole, -(-side * n // whole)) for n, whole, side in zip(shape.grid, own, size, strict=True)]
    grid = next(((rows, columns) for rows in sides[0] for columns in sides[1] if rows * columns == patches), None)
    if grid is None:
        raise ValueError(
            f"the model makes {patches} patches of an image of {size[0]} x {size[1]} pixels, which is no grid of rows and "
            f"columns such as the {shape.grid[0]} x {shape.grid[1]} of its own {own[0]} x {own[1]}; take another size"
        )
    return grid
