"""What became of every patch: the ledger of the last forward, and features given back to all patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.compression import Compression, compression_of
from laconic.shapes import Float, Int
from laconic.tokens import Tokens


@dataclass(frozen=True)
class Stage:
    """The tokens that one reducing block left.

    ``where[b, p]`` is the patch token that holds patch p (-1: dropped), ``size[b, j]`` the patches token j holds,
    ``kept[b, j]`` the patch in whose place token j stands. ``alive`` is set where some tokens are seen by nobody: softly
    removed ones in training, and what fills up the images of a batch that have fewer tokens than others (their size is 0).
    Patches that are parked for a while (Evo-ViT) are -1 until they are back. ``grid``: rows and columns of the patches.
    """

    block: int
    where: Int[Tensor, "B P"]
    size: Float[Tensor, "B L"]
    kept: Int[Tensor, "B L"]
    alive: Float[Tensor, "B L"] | None
    grid: tuple[int, int]


@dataclass(frozen=True)
class Provenance:
    """The stages of the last forward, first to last, and the patch grid (height, width) of the model's own input size."""

    stages: tuple[Stage, ...]
    grid: tuple[int, int]

    @property
    def final(self) -> Stage:
        """The last stage."""
        return self.stages[-1]


def provenance(model: nn.Module) -> Provenance:
    """Where every patch of the last batch went, stage by stage.

    Raises:
        ValueError: the model is not reduced. RuntimeError: it has not run forward yet.
    """
    compression = compression_of(model)

    def stage(block: int, t: Tokens) -> Stage:
        alive = None if t.alive is None else t.alive.detach()
        grid = compression.staging.shapes[compression.staging.stage(block)].grid
        return Stage(block, t.where, t.size.detach(), t.place, alive, grid)

    stages = tuple(stage(block, compression.entry(block + 1)) for block in compression.schedule.at)
    return Provenance(stages, compression.grid)


def losses(model: nn.Module) -> dict[str, Tensor]:
    """The method's own training losses of the last forward by name, each a mean over stages; empty if it has none.

    DynamicViT and dTPS have "ratio", which their papers add with weight 2.

    Raises:
        ValueError: the model is not reduced. RuntimeError: it has not run forward yet.
    """
    compression = compression_of(model)
    patches = [compression.entry(start + 1).where.shape[1] for start in compression.staging.starts]
    parts = list[dict[str, Tensor]]()
    for block, rate in compression.staging.targets(patches).items():
        reducer = compression.reducer(block)
        if reducer is not None:
            parts.append(reducer.losses(compression.entry(block + 1), rate))
    names = sorted({name for part in parts for name in part})
    return {name: torch.stack([part[name] for part in parts if name in part]).mean() for name in names}


def restore_dense(
    model: nn.Module, features: Float[Tensor, "B N C"], *, layout: Literal["NLC", "NCHW"] = "NLC", fill: float = 0.0
) -> Tensor:
    """Give the features of the tokens that are left back to every patch they stand for.

    Args:
        model: a reduced model that has just run on these images.
        features: [B, prefix + L, C] as ``forward_features`` returns them, or [B, L, C] without the prefix tokens.
        layout: ``NLC`` for [B, P, C] in raster order, ``NCHW`` for [B, C, height, width].
        fill: what dropped patches get.

    Raises:
        ValueError: the features are not those of the last forward, or the patches do not fill the model's grid.
    """
    compression = compression_of(model)
    tokens = compression.entry(compression.depth)
    patches = tokens.where.shape[1]
    if features.dim() == 3 and features.shape[1] == compression.prefix + patches and patches > len(tokens):
        dense = features[:, compression.prefix :]  # the model has given them back itself
        return dense if layout == "NLC" else _image(compression, dense, layout)
    if features.dim() == 3 and features.shape[1] == compression.prefix + len(tokens):
        features = features[:, compression.prefix :]
    if features.dim() != 3 or features.shape[:2] != tokens.size.shape:
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not fit the last forward, which left {tokens.size.shape[0]} images "
            f"of {compression.prefix} prefix and {len(tokens)} patch tokens"
        )
    dense = tokens.dense(features, fill)
    return dense if layout == "NLC" else _image(compression, dense, layout)


def _image(compression: Compression, dense: Tensor, layout: str) -> Tensor:
    height, width = compression.grid
    if layout != "NCHW":
        raise ValueError(f"layout must be 'NLC' or 'NCHW', not {layout!r}")
    if height * width != dense.shape[1]:
        raise ValueError(f"{dense.shape[1]} patches do not fill the model's {height} x {width} grid; use layout='NLC'")
    return dense.transpose(1, 2).reshape(len(dense), -1, height, width)
