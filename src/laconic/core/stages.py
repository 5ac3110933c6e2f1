"""Backbones of several stages (PVT, CvT): each stage is reduced as a small vision transformer of its own.

Every stage starts with all its tokens, and its last block restores its full grid. A plain vision transformer is one stage.
Methods handle one stage at a time: its blocks, its part of the schedule and its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from laconic.core.backbone import StageSpec
from laconic.core.block_context import BlockContext
from laconic.core.half_limit import check_halves
from laconic.core.method import Method
from laconic.core.schedule import Schedule


@dataclass(frozen=True)
class Stages:
    """The stages of a model with a method and a schedule.

    Raises:
        ValueError: the schedule names blocks that the model does not have, or a block keeps less than the method can.
    """

    config: Method
    schedule: Schedule
    shapes: tuple[StageSpec, ...]
    starts: tuple[int, ...] = field(init=False)  # the first block of each stage
    # counts of each stage at the model's own input size, cached since they are needed at every block
    default_counts: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        depths = [shape.depth for shape in self.shapes]
        self.schedule.check_depth(sum(depths))
        object.__setattr__(self, "starts", tuple(sum(depths[:i]) for i in range(len(depths))))
        default_counts = tuple(self._counts(stage, shape.patches) for stage, shape in enumerate(self.shapes))
        object.__setattr__(self, "default_counts", default_counts)

    def stage(self, block: int) -> int:
        """Return the stage of a block."""
        return 0 if len(self.starts) == 1 else max(i for i, start in enumerate(self.starts) if start <= block)

    def part(self, stage: int) -> Schedule | None:
        """Return the part of the schedule for this stage, with the stage's first block as block 0; None if it is empty."""
        start = self.starts[stage]
        return self.schedule.part(start, start + self.shapes[stage].depth)

    def stage_counts(self, stage: int, patches: int) -> tuple[int, ...]:
        """Return the patch tokens that each block of a stage keeps, starting from ``patches``."""
        return self.default_counts[stage] if patches == self.shapes[stage].patches else self._counts(stage, patches)

    def _counts(self, stage: int, patches: int) -> tuple[int, ...]:
        part, depth = self.part(stage), self.shapes[stage].depth
        if part is None:
            return (patches,) * depth
        counts = self.config.counts(part, depth, patches)
        check_halves(self.config, part, counts, patches, self.starts[stage])
        return counts

    def counts(self, patches: int | None = None) -> tuple[int, ...]:
        """Return the patch tokens that every block keeps, for ``patches`` in the first stage (None: the model's own size)."""
        out = list[int]()
        for stage, shape in enumerate(self.shapes):
            own = shape.patches if patches is None else patches * shape.patches // self.shapes[0].patches
            out += self.stage_counts(stage, own)
        return tuple(out)

    def sites(self) -> dict[int, BlockContext]:
        """Return block -> `BlockContext` for every block with a reducer. A context describes its stage alone."""
        out = dict[int, BlockContext]()
        for stage, (start, shape) in enumerate(zip(self.starts, self.shapes, strict=True)):
            part = self.part(stage)
            if part is None:
                continue
            rates = dict(zip(part.at, part.values, strict=True)) if part.unit == "keep" else {}
            counts = (shape.patches, *self.stage_counts(stage, shape.patches))
            for number, block in enumerate(self.config.reducer_blocks(part, shape.depth)):
                here = (rates.get(block), counts[block], counts[block + 1], shape.grid, shape.depth, part)
                out[start + block] = self.config.context(BlockContext(number, block, shape.dim, shape.heads, *here))
        return out

    def targets(self, patches: Sequence[int]) -> dict[int, float]:
        """Return the share of its stage's patches that each reducing block is to keep; ``patches`` has one entry a stage."""
        out = dict[int, float]()
        for stage, (start, shape) in enumerate(zip(self.starts, self.shapes, strict=True)):
            if (part := self.part(stage)) is not None:
                found = self.config.targets(part, shape.depth, patches[stage])
                out |= {start + block: share for block, share in found.items()}
        return out
