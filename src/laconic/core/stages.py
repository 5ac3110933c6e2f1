"""Backbones of several stages (PVT, CvT): each is reduced as a small vision transformer of its own.

Tokens start afresh at a stage's first block, and come back as its full grid after its last one. A plain vision transformer
is one stage. Methods see one stage at a time: its blocks, its part of the schedule and its grid.
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
    """The stages of a host under a method and a schedule.

    Raises:
        ValueError: the schedule names blocks that the host does not have, or a block keeps less than the method can.
    """

    config: Method
    schedule: Schedule
    shapes: tuple[StageSpec, ...]
    starts: tuple[int, ...] = field(init=False)  # the first block of each stage
    usual: tuple[tuple[int, ...], ...] = field(init=False)  # counts of each stage at the host's own size: asked at every block

    def __post_init__(self) -> None:
        depths = [shape.depth for shape in self.shapes]
        self.schedule.check_depth(sum(depths))
        object.__setattr__(self, "starts", tuple(sum(depths[:i]) for i in range(len(depths))))
        usual = tuple(self._counts(stage, shape.patches) for stage, shape in enumerate(self.shapes))
        object.__setattr__(self, "usual", usual)

    def stage(self, block: int) -> int:
        """The stage that a block belongs to."""
        return 0 if len(self.starts) == 1 else max(i for i, start in enumerate(self.starts) if start <= block)

    def part(self, stage: int) -> Schedule | None:
        """What of the schedule is for this stage, with its own first block as block 0; None where that is nothing."""
        start = self.starts[stage]
        return self.schedule.part(start, start + self.shapes[stage].depth)

    def stage_counts(self, stage: int, patches: int) -> tuple[int, ...]:
        """Patch tokens that each block of a stage leaves, of so many patches."""
        return self.usual[stage] if patches == self.shapes[stage].patches else self._counts(stage, patches)

    def _counts(self, stage: int, patches: int) -> tuple[int, ...]:
        part, depth = self.part(stage), self.shapes[stage].depth
        if part is None:
            return (patches,) * depth
        counts = self.config.counts(part, depth, patches)
        check_halves(self.config, part, counts, patches, self.starts[stage])
        return counts

    def counts(self, patches: int | None = None) -> tuple[int, ...]:
        """Patch tokens that every block leaves, for an image of so many patches in the first stage (None: its own size)."""
        out = list[int]()
        for stage, shape in enumerate(self.shapes):
            own = shape.patches if patches is None else patches * shape.patches // self.shapes[0].patches
            out += self.stage_counts(stage, own)
        return tuple(out)

    def sites(self) -> dict[int, BlockContext]:
        """Block -> site, for every block with a reducer. Sites speak of their stage alone."""
        out = dict[int, BlockContext]()
        for stage, (start, shape) in enumerate(zip(self.starts, self.shapes, strict=True)):
            part = self.part(stage)
            if part is None:
                continue
            rates = dict(zip(part.at, part.values, strict=True)) if part.unit == "keep" else {}
            counts = (shape.patches, *self.stage_counts(stage, shape.patches))
            for number, block in enumerate(self.config.reducer_blocks(part, shape.depth)):
                here = (rates.get(block), counts[block], counts[block + 1], shape.grid, shape.depth, part)
                out[start + block] = BlockContext(number, block, shape.dim, shape.heads, *here)
        return out

    def targets(self, patches: Sequence[int]) -> dict[int, float]:
        """The share of its stage's patches that each reducing block is to keep; ``patches`` of each stage."""
        out = dict[int, float]()
        for stage, (start, shape) in enumerate(zip(self.starts, self.shapes, strict=True)):
            if (part := self.part(stage)) is not None:
                found = part.targets(shape.depth, patches[stage], self.config.num_kept)
                out |= {start + block: share for block, share in found.items()}
        return out
