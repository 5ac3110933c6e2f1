"""Variants measured against the unreduced model: the rows that ``bench`` and ``demo`` print, and their verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.analysis import memory, timing
from laconic.analysis.timing import Quartiles, Sample, Setting
from laconic.cli.exported import Exported
from laconic.cli.output import Table, csv_text, sentence
from laconic.cli.variants import Kind, Variant, label_of, size_of
from laconic.core.files import write_atomically

STEADY = 1.25  # upper divided by lower quartile of one model's times, at most
HEADER = ("", "GMACs", "patch tokens", "implied", "measured", "(quartiles)", "CPU time", "efficiency", "images/s", "peak MB")
BELOW, OPTIONAL = ("patch tokens",), ("CPU time", "peak MB", "images/s", "efficiency")


@dataclass(frozen=True)
class Row:
    """A variant and its times at one batch size, as ratios to the unreduced model (how many times quicker)."""

    name: str
    kind: Kind
    keep: float | None
    image: tuple[int, int]
    tokens: tuple[int, ...]
    parameters: int
    macs: int
    batch_size: int
    seconds: Quartiles  # of one forward of a whole batch
    implied: float  # the ratio of the multiply-adds
    wall: Quartiles
    cpu: Quartiles
    peak: int | None = None  # bytes that one forward holds at most, without weights and images

    @property
    def label(self) -> str:
        """The variant's label."""
        return label_of(self.name, self.keep)

    @property
    def efficiency(self) -> float:
        """Share of the implied ratio that was measured."""
        return self.wall.median / self.implied

    @property
    def images_per_second(self) -> float:
        """Throughput, by the median time."""
        return self.batch_size / self.seconds.median

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        derived = {"efficiency": self.efficiency, "images_per_second": self.images_per_second}
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {**fields, **derived}


def compare(
    variants: Sequence[Variant], batch_size: int, setting: Setting, warmup: int = 2, exported: Exported | None = None
) -> list[Row]:
    """Time variants, the first of which is the unreduced model, on noise of their own input sizes.

    In PyTorch, or as the files that they were exported to.
    """
    models = {variant.label: _inputs(variant, batch_size, setting) for variant in variants}
    if exported is None:
        return rows_of(variants, batch_size, timing.time_models(models, setting, warmup))
    runs = exported.runs({label: images for label, (_, images) in models.items()}, setting.threads)
    return rows_of(variants, batch_size, timing.time_runs(runs, setting, warmup))


def with_peaks(rows: Sequence[Row], variants: Sequence[Variant], setting: Setting) -> list[Row]:
    """Return the rows of variants with the memory that one forward holds at most, in PyTorch."""
    peaks = [memory.peak_of(*_inputs(own, row.batch_size, setting)) for row, own in zip(rows, variants, strict=True)]
    return [dataclasses.replace(row, peak=peak) for row, peak in zip(rows, peaks, strict=True)]


def _inputs(variant: Variant, batch_size: int, setting: Setting) -> tuple[nn.Module, Tensor]:
    """Return a variant's model and a batch of noise, where they are measured."""
    noise = torch.randn(batch_size, 3, *variant.image, generator=torch.Generator().manual_seed(0))
    place, dtype = setting.place, timing.DTYPES[setting.dtype]
    return variant.model.to(place, dtype), noise.to(place, dtype)


def rows_of(variants: Sequence[Variant], batch_size: int, samples: dict[str, list[Sample]]) -> list[Row]:
    """Return the rows of measured variants, the first of which is the unreduced model."""
    out = []
    for v in variants:
        own = samples[v.label]
        seconds = Quartiles.of([sample.own.wall for sample in own])
        facts = (v.name, v.kind, v.keep, v.image, v.tokens, v.parameters, v.macs, batch_size)
        out.append(Row(*facts, seconds, variants[0].macs / v.macs, *timing.ratios(own)))
    return out


def busy(rows: Sequence[Row]) -> list[str]:
    """Return a note for every batch size at which the times of the unreduced model itself vary much."""
    bases = [row for row in rows if row.kind == "base" and row.seconds.high > STEADY * row.seconds.low]
    return [
        f"at batch {row.batch_size} the unreduced model itself took {row.seconds.low * 1e3:.0f} to "
        f"{row.seconds.high * 1e3:.0f} ms (quartiles): the machine had other things to do, so the ratios are not reliable"
        for row in bases
    ]


def table(rows: Sequence[Row], title: str) -> Table:
    """Return the table of the rows of one batch size."""

    def cells(row: Row) -> tuple[str, ...]:
        facts = (row.label, f"{row.macs / 1e9:.3f}", " ".join(map(str, row.tokens)), f"{row.implied:.2f}x")
        peak = "" if row.peak is None else f"{row.peak / 1e6:.1f}"
        if row.kind == "base":
            return (*facts, "1", "", "1", "", f"{row.images_per_second:.1f}", peak)
        spread = f"({row.wall.low:.2f}-{row.wall.high:.2f})"
        ratios = (f"{row.wall.median:.2f}x", spread, f"{row.cpu.median:.2f}x", f"{row.efficiency:.2f}")
        return (*facts, *ratios, f"{row.images_per_second:.1f}", peak)

    return Table(title, HEADER, tuple(map(cells, rows)), below=BELOW, optional=OPTIONAL)


# ------------------------------------------------------------------------------------------------ in words
def threads(environment: Mapping[str, Any]) -> str:
    """Return the number of threads in words."""
    return f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"


def verdict(rows: Sequence[Row]) -> str:
    """Return the measured speed-ups in words: of every method, then of the alternatives."""
    methods = [row for row in rows if row.kind == "method"]
    others = [row for row in rows if row.kind in ("plain", "resolution", "smaller")]
    many = len({row.keep for row in methods}) > 1
    said = []
    for name in dict.fromkeys(row.name for row in methods):
        gains = "; ".join(_gain(row, many) for row in methods if row.name == name)
        said.append(f"{name}: {gains}.")
    for batch in dict.fromkeys(row.batch_size for row in others):
        gains = sentence([f"{row.label} {row.wall.median:.2f}x" for row in others if row.batch_size == batch])
        said.append(f"Without a method, at batch {batch}: {gains}.")
    return "\n".join(said)


def _gain(row: Row, many: bool) -> str:
    ratio = f"{row.wall.median:.2f}x"
    where = f"at{f' keep {row.keep:g},' if many and row.keep is not None else ''} batch {row.batch_size}"
    if row.wall.low > 1:
        return f"{ratio} {where}"
    if row.wall.median > 1:
        return f"{where} no clear gain ({ratio}, quartiles {row.wall.low:.2f}-{row.wall.high:.2f})"
    return f"{where} no faster than unreduced ({ratio})"


# ------------------------------------------------------------------------------------------------ as files
def to_csv(model: str, rows: Sequence[Row]) -> str:
    """Return CSV with the columns of timm's benchmark results, and after them our own."""
    return csv_text([_line(model, row) for row in rows])


def _line(model: str, row: Row) -> dict[str, Any]:
    return {
        "model": row.name if row.kind == "smaller" else model,
        "infer_samples_per_sec": round(row.images_per_second, 2),
        "infer_step_time": round(row.seconds.median * 1e3, 3),
        "infer_batch_size": row.batch_size,
        "infer_img_size": size_of(row.image),
        "infer_gmacs": round(row.macs / 1e9, 3),
        "param_count": round(row.parameters / 1e6, 2),
        "variant": row.name,
        "kind": row.kind,
        "keep": row.keep,
        "patch_tokens": " ".join(map(str, row.tokens)),
        "implied_ratio": round(row.implied, 4),
        "ratio": round(row.wall.median, 4),
        "ratio_q25": round(row.wall.low, 4),
        "ratio_q75": round(row.wall.high, 4),
        "cpu_ratio": round(row.cpu.median, 4),
        "efficiency": round(row.efficiency, 4),
        "peak_bytes": row.peak,
    }


def write_files(path: Path, model: str, rows: Sequence[Row], report: dict[str, Any]) -> tuple[Path, Path]:
    """Write the rows as CSV to ``path`` and the whole report as JSON next to it; return both paths."""
    json_path = path.with_suffix(".json")
    write_atomically(path, to_csv(model, rows))
    write_atomically(json_path, json.dumps(report, indent=2) + "\n")
    return path, json_path
