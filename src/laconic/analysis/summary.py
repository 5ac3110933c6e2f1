"""`Summary`: the results of `laconic.analysis.macs`, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laconic.core.text_table import by, draw


@dataclass(frozen=True)
class BlockCost:
    """The cost of a block: tokens at attention and at MLP (prefix tokens included), MACs of its layers and of its reducer."""

    block: int
    attention_tokens: int
    mlp_tokens: int
    macs: int
    reducer_macs: int


@dataclass(frozen=True)
class Spread:
    """The distribution of a number over images: mean, standard deviation, minimum and maximum."""

    mean: float
    deviation: float
    least: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        """Return the spread of these values."""
        return cls(statistics.fmean(values), statistics.pstdev(values), min(values), max(values))


@dataclass(frozen=True)
class Observed:
    """Measured costs of single images: patch tokens after each block, and MACs."""

    images: int
    tokens: tuple[Spread, ...]
    macs: Spread


@dataclass(frozen=True)
class TimeBalance:
    """Seconds of one forward of a batch of this shape: unreduced, reduced, and the part of the method's own steps in it."""

    unreduced: float
    reduced: float
    steps: float
    shape: tuple[int, ...]
    device: str

    @property
    def ratio(self) -> float:
        """The speedup over the unreduced model."""
        return self.unreduced / self.reduced

    def __str__(self) -> str:
        new, old, steps = map(_seconds, (self.reduced, self.unreduced, self.steps))
        faster, slower = f"{self.ratio:.2f}x as fast as unreduced", f"SLOWER than unreduced ({self.ratio:.2f}x)"
        batch, size = self.shape[0], (*self.shape[1:-3], *self.shape[-2:])  # without channels
        here = f"measured on {self.device} at batch {batch} of {by(size)}"
        times = f"{new} per forward instead of {old}, of which the method's own steps take {steps}"
        return f"{faster if self.ratio >= 1 else slower}, {here}: {times}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


@dataclass(frozen=True)
class Summary:
    """The cost of a model at inference. MACs are for ``batch_size`` images of ``image_size`` (None: the model's own size).

    For a model that takes clips, an image is a clip, and ``image_size`` is (frames, height, width).

    ``macs`` is for the whole model, patch embedding, head and reducers included; ``baseline_macs`` for the unreduced model.
    ``tokens`` are the patch tokens after each block. ``counted_macs``, for one image, is None unless it was requested.
    ``timed`` is None unless the method's own steps are slow enough for a measurement (see `laconic.analysis.break_even`).
    """

    model: str
    method: dict[str, Any] | None
    convention: str
    batch_size: int
    parameters: int
    macs: int
    baseline_macs: int
    tokens: tuple[int, ...]
    blocks: tuple[BlockCost, ...]
    counted_macs: int | None = None
    observed: Observed | None = None
    image_size: tuple[int, ...] | None = None
    timed: TimeBalance | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    def __str__(self) -> str:
        images = "1 image" if self.batch_size == 1 else f"{self.batch_size} images"
        images += "" if self.image_size is None else f" of {by(self.image_size)}"
        macs = f"{self.macs / 1e9:.4f} GMACs for {images} (convention: {self.convention})"
        lines = [
            f"{self.model}, {self.method['name'] if self.method else 'not reduced'}: {self.parameters:,} parameters",
            f"{macs}, {self.macs / self.baseline_macs:.1%} of {self.baseline_macs / 1e9:.4f}",
        ]
        if self.counted_macs is not None:
            lines.append(f"{self.counted_macs / 1e9:.4f} GMACs counted by torch on one image")
        if self.timed is not None:
            lines.append(str(self.timed))
        if self.observed is not None:
            cost, kept = self.observed.macs, self.observed.tokens[-1]
            lines.append(
                f"{cost.mean / 1e9:.4f} ± {cost.deviation / 1e9:.4f} GMACs per image ({cost.least / 1e9:.4f} to "
                f"{cost.most / 1e9:.4f}) over {self.observed.images} images; patch tokens kept: {kept.mean:.1f} "
                f"± {kept.deviation:.1f} ({kept.least} to {kept.most})"
            )
        header = ["block", "tokens at attention", "at MLP", "patches kept", "MMACs", "reducer MMACs"]
        rows = [
            [*map(str, (b.block, b.attention_tokens, b.mlp_tokens, kept)), f"{b.macs / 1e6:.2f}", f"{b.reducer_macs / 1e6:.2f}"]
            for b, kept in zip(self.blocks, self.tokens, strict=True)
        ]
        return "\n".join([*lines, table(header, rows)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text, right-aligned, that fits 80 columns."""
    return "\n".join(draw(header, rows, 80)[0])
