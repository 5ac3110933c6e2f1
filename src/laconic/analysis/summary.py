"""`Summary`: the numbers of `laconic.analysis.macs`, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockCost:
    """One block: tokens at its attention and at its MLP (prefix tokens among them), MACs of its layers and of its reducer."""

    block: int
    attention_tokens: int
    mlp_tokens: int
    macs: int
    reducer_macs: int


@dataclass(frozen=True)
class Spread:
    """What a number is over images: its mean, its standard deviation, its least and its greatest."""

    mean: float
    deviation: float
    least: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        """Over these values."""
        return cls(statistics.fmean(values), statistics.pstdev(values), min(values), max(values))


@dataclass(frozen=True)
class Observed:
    """What single images left and cost: patch tokens after each block, and MACs."""

    images: int
    tokens: tuple[Spread, ...]
    macs: Spread


@dataclass(frozen=True)
class TimeBalance:
    """Seconds of one forward of a batch of this shape: unreduced, reduced, and of that the method's own steps."""

    unreduced: float
    reduced: float
    steps: float
    shape: tuple[int, ...]
    device: str

    @property
    def ratio(self) -> float:
        """How many times as fast as the unreduced model the reduced one is."""
        return self.unreduced / self.reduced

    def __str__(self) -> str:
        new, old, steps = map(_seconds, (self.reduced, self.unreduced, self.steps))
        faster, slower = f"{self.ratio:.2f}x as fast as unreduced", f"SLOWER than unreduced ({self.ratio:.2f}x)"
        batch, _, height, width = self.shape
        here = f"measured on {self.device} at batch {batch} of {height} x {width}"
        times = f"{new} a forward instead of {old}, and {steps} of it are the method's own steps"
        return f"{faster if self.ratio >= 1 else slower}, {here}: {times}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


@dataclass(frozen=True)
class Summary:
    """What a model costs at inference. MACs are of ``batch_size`` images of ``image_size`` (None: the model's own).

    ``macs`` is the whole model, patch embedding, head and reducers included; ``baseline_macs`` the same model unreduced.
    ``tokens`` are the patch tokens each block leaves. ``counted_macs``, of one image, is None unless it was asked for.
    ``timed`` is None unless the method's own steps take so long that its speed was measured (see `laconic.analysis.break_even`).
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
    image_size: tuple[int, int] | None = None
    timed: TimeBalance | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    def __str__(self) -> str:
        images = "1 image" if self.batch_size == 1 else f"{self.batch_size} images"
        images += "" if self.image_size is None else f" of {self.image_size[0]} x {self.image_size[1]}"
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
            cost, left = self.observed.macs, self.observed.tokens[-1]
            lines.append(
                f"{cost.mean / 1e9:.4f} ± {cost.deviation / 1e9:.4f} GMACs an image ({cost.least / 1e9:.4f} to "
                f"{cost.most / 1e9:.4f}) over {self.observed.images} images; patches left: {left.mean:.1f} ± "
                f"{left.deviation:.1f} ({left.least} to {left.most})"
            )
        header = ["block", "tokens at attention", "at MLP", "patches left", "MMACs", "reducer MMACs"]
        rows = [
            [*map(str, (b.block, b.attention_tokens, b.mlp_tokens, left)), f"{b.macs / 1e6:.2f}", f"{b.reducer_macs / 1e6:.2f}"]
            for b, left in zip(self.blocks, self.tokens, strict=True)
        ]
        return "\n".join([*lines, table(header, rows)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text, right-aligned; drawn by rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in [header, *rows])
    from rich.console import Console
    from rich.table import Table

    drawn = Table()
    for name in header:
        drawn.add_column(name, justify="right")
    for row in rows:
        drawn.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=100, force_terminal=False).print(drawn)
    return text.getvalue().rstrip()
