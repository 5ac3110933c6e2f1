"""Speed of exported files compared with eager PyTorch, and the agreement of their int8 and fp16 versions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.analysis import timing
from laconic.analysis.timing import Quartiles
from laconic.cli.output import Table
from laconic.cli.variants import Variant
from laconic.core.files import writing
from laconic.exporting import RUNTIMES, quantize, runner
from laconic.exporting.parity import compare, tensors

INT8, EAGER = "int8", "eager PyTorch"
FP16 = {"onnx": "fp16", "openvino": "openvino-fp16"}  # the kind of file in fp16, by format
RUNTIME_OF = {INT8: "onnx", "fp16": "onnx", "openvino-fp16": "openvino"}
NAMES = {
    "torch-export": "torch.export, loaded",
    INT8: "ONNX Runtime, int8",
    "fp16": "ONNX Runtime, fp16",
    "openvino-fp16": "OpenVINO, fp16",
}
SURVIVES = 0.9  # of eager's speed-up
IMAGES = 64  # that files are compared on


@dataclass(frozen=True)
class Speed:
    """A variant in a runtime, at a batch size: seconds, and the speed-up over the unreduced model."""

    label: str
    runtime: str
    batch: int
    seconds: Quartiles
    ratio: Quartiles | None  # to the unreduced model in the same runtime; None for that model itself
    kept: float | None  # the ratio divided by eager PyTorch's
    to_eager: float  # to the unreduced model in eager PyTorch, of the medians

    @property
    def survives(self) -> bool | None:
        """True if nine tenths of eager's speed-up are left; None for rows without a speed-up to compare."""
        return None if self.kept is None else self.kept >= SURVIVES

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {**fields, "survives": self.survives}


@dataclass(frozen=True)
class Quantized:
    """A file in int8, fp16 or float32, and its agreement with the eager model on noise or on pictures."""

    label: str
    path: str
    bytes: int
    images: int
    difference: float
    agreement: float | None
    precision: str = INT8
    source: str = f"{IMAGES} images of noise"

    def moved(self, to: Path) -> Quantized:
        """Return the same, in another directory."""
        return dataclasses.replace(self, path=str(to / Path(self.path).name))

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        agreed = "" if self.agreement is None else f"the same first class as eager for {self.agreement:.1%} of "
        what = "int8 matrix products" if self.precision == INT8 else self.precision
        return f"{self.path}: {what}, {self.bytes / 1e6:.1f} MB; {agreed}{self.source}, difference {self.difference:.1e}"


def add_int8(variant: Variant, files: dict[tuple[str, str], Path]) -> None:
    """Quantize the ONNX file of a variant, and add the new one to ``files``."""
    source = files[variant.label, "onnx"]
    files[variant.label, INT8] = source.with_suffix(".int8.onnx")
    with writing(files[variant.label, INT8], source.stat().st_size):
        quantize(source, files[variant.label, INT8])


def compared(
    variant: Variant,
    kinds: Sequence[str],
    files: Mapping[tuple[str, str], Path],
    threads: int,
    pictures: tuple[Tensor, str] | None = None,
) -> list[Quantized]:
    """Compare files of a variant with its eager model, on pictures (with a line that says which) or on noise.

    Raises:
        ValueError: the outputs of a file are not finite.
    """
    images, source = pictures or (_noise(variant), f"{IMAGES} images of noise")
    parts, rows = torch.split(images, 8), list[Quantized]()
    with torch.no_grad():
        expected = [torch.cat(outs) for outs in zip(*(tensors(variant.model(part)) for part in parts), strict=True)]
    for kind in kinds:
        path = files[variant.label, kind]
        run = runner(path, RUNTIME_OF.get(kind, kind), threads)
        found = compare(len(images), [torch.cat(outs) for outs in zip(*map(run, parts), strict=True)], expected)
        precision = INT8 if kind == INT8 else "fp16" if kind in FP16.values() else "float32"
        if found.difference == float("inf"):
            raise ValueError(
                f"the {precision} model of {variant.label} gives outputs that are not finite; export it without it"
            )
        own = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)  # an .onnx may have the same stem
        size = sum(part.stat().st_size for part in own)
        shares = (len(images), found.difference, found.agreement)
        rows.append(Quantized(variant.label, str(path), size, *shares, precision, source))
    return rows


def _noise(variant: Variant) -> Tensor:
    return torch.randn(IMAGES, 3, *variant.image, generator=torch.Generator().manual_seed(2))


def measure_formats(
    variants: Sequence[Variant],
    files: Mapping[tuple[str, str], Path],
    formats: Sequence[str],
    batch: int,
    rounds: int,
    threads: int,
) -> list[Speed]:
    """Time every variant in eager PyTorch and in every format, runtime by runtime, interleaved with the unreduced model."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    if rounds == 0:
        return []
    rows, eager = list[Speed](), dict[str, Speed]()
    for kind in tqdm(("eager", *formats), desc="measuring", unit="runtime", leave=False, disable=None):
        runs = {v.label: _run(v, kind, files, batch, threads) for v in variants}
        with torch.inference_mode():
            timing.interleave(runs, 2, timing.cpu_clock)
            samples = timing.interleave(runs, rounds, timing.cpu_clock)
        for number, v in enumerate(variants):
            seconds = Quartiles.of([sample.own.wall for sample in samples[v.label]])
            ratio = timing.ratios(samples[v.label])[0] if number else None
            own = eager.get(v.label)
            kept = ratio.median / own.ratio.median if ratio and own and own.ratio else None
            first = eager[variants[0].label].seconds if eager else seconds
            name = EAGER if kind == "eager" else NAMES.get(kind) or RUNTIMES[kind]
            row = Speed(v.label, name, batch, seconds, ratio, kept, first.median / seconds.median)
            rows.append(row)
            if kind == "eager":
                eager[v.label] = row
    return rows


def _run(variant: Variant, kind: str, files: Mapping[tuple[str, str], Path], batch: int, threads: int) -> Callable[[], Any]:
    images = torch.randn(batch, 3, *variant.image, generator=torch.Generator().manual_seed(0))
    if kind == "eager":
        return lambda: tensors(variant.model(images))
    run = runner(files[variant.label, kind], RUNTIME_OF.get(kind, kind), threads)
    return lambda: run(images)


def table(rows: Sequence[Speed], title: str) -> Table:
    """Return the table of the rows of one batch size."""
    header = ("runtime", "model", "ms", "speed-up", "(quartiles)", "kept", "to eager")
    return Table(title, header, tuple(cells(row) for row in rows), words=2, optional=("(quartiles)",))


def cells(row: Speed) -> tuple[str, ...]:
    """Return a row as cells."""
    ratio, ms = row.ratio, f"{row.seconds.median * 1e3:.1f}"
    speed = ("1", "") if ratio is None else (f"{ratio.median:.2f}x", f"({ratio.low:.2f}-{ratio.high:.2f})")
    return (row.runtime, row.label, ms, *speed, "" if row.kept is None else f"{row.kept:.2f}", f"{row.to_eager:.2f}x")
