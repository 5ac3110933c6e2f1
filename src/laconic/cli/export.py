"""``laconic export``: reduced models as files for other runtimes, each checked, and the speed-up that survives there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.analysis import machine
from laconic.analysis.timing import Setting
from laconic.cli.export_input import ExportInput, open_export_input, read_pictures
from laconic.cli.export_speed import EAGER, FP16, IMAGES, INT8, Quantized, Speed, add_int8, compared, measure_formats, table
from laconic.cli.output import Report, Table, sentence
from laconic.cli.outputs import holds, reported
from laconic.cli.variants import Variant
from laconic.core.files import Refusal, unfinished, write_atomically
from laconic.exporting import HALF_TOLERANCE, OPSET, SUFFIXES, TOLERANCE, ExportReport, trace, write
from laconic.exporting.description import RANDOM

LOG = logging.getLogger(__name__)
EXPLAINED = (
    "speed-up: the time of the unreduced model divided by this one's, both in that runtime, interleaved, median and "
    "quartiles. kept: that speed-up divided by eager PyTorch's. to eager: the time of the unreduced model in PyTorch divided "
    "by this one's."
)


@dataclass(frozen=True)
class Files(Report):
    """The files that were written, their checks and their speeds."""

    model: str
    exports: tuple[tuple[str, ExportReport], ...]  # with the label of the variant
    agreements: tuple[Quantized, ...]
    speeds: tuple[Speed, ...]
    environment: dict[str, Any]
    weights: tuple[str, ...] = ()  # sentences on the weights

    @property
    def int8(self) -> tuple[Quantized, ...]:
        """The int8 files, with their agreement."""
        return tuple(row for row in self.agreements if row.precision == INT8)

    @property
    def random(self) -> bool:
        """True if a file has random weights, of the model or of its method."""
        return any(report.random for _, report in self.exports)

    @property
    def verdict(self) -> str:
        """The verdict: random weights, the speed-up that survives, and the rows that gain nothing."""
        random = [f"The files have {RANDOM} weights: do not use their answers."] if self.random else []
        return " ".join([*random, self._survival, *self._slower])

    @property
    def _survival(self) -> str:
        lost = [f"{s.label} in {s.runtime} at batch {s.batch} ({s.kept:.2f})" for s in self.speeds if s.survives is False]
        asked = [s for s in self.speeds if s.survives is not None]
        if not asked:
            return "No reduced model was measured in another runtime."
        if lost:
            return f"Less than nine tenths of eager's speed-up is left to {sentence(lost)}."
        return f"At least nine tenths of eager's speed-up survive everywhere (least {min(s.kept or 0 for s in asked):.2f})."

    @property
    def _slower(self) -> list[str]:
        """Return sentences on the rows, by median, that reduction or the exported file does not make faster."""
        eager = {(s.label, s.batch): s.seconds.median for s in self.speeds if s.runtime == EAGER}
        still = [
            f"{s.label} at batch {s.batch} ({s.ratio.median:.2f}x)"
            for s in self.speeds
            if s.runtime == EAGER and s.ratio is not None and s.ratio.median <= 1
        ]
        slow = [
            f"{s.label} in {s.runtime} at batch {s.batch} ({eager[s.label, s.batch] / s.seconds.median:.2f}x)"
            for s in self.speeds
            if s.runtime != EAGER and s.seconds.median > eager.get((s.label, s.batch), float("inf"))
        ]
        said = []
        if still:
            said.append(f"In eager PyTorch no faster reduced than unreduced: {sentence(still)}.")
        if slow:
            said.append(f"Slower exported than the same model in eager PyTorch: {sentence(slow)}.")
        return said

    def parts(self) -> Iterator[str | Table]:
        yield from (str(report) for _, report in self.exports)
        yield from (str(row) for row in self.agreements)
        yield from self.weights
        for batch in dict.fromkeys(speed.batch for speed in self.speeds):
            yield table([speed for speed in self.speeds if speed.batch == batch], f"{self.model}, batch {batch}")
        here = self.environment
        yield f"{here['device']}, threads: {here['threads']}, {here['rounds']} rounds, torch {here['torch']}, {here['date']}"
        yield EXPLAINED
        yield f"\n{self.verdict}"

    def to_json(self) -> dict[str, Any]:
        exports = [{"variant": label, **report.to_json()} for label, report in self.exports]
        others = [row.to_json() for row in self.agreements if row.precision != INT8]
        rows = {"int8": [row.to_json() for row in self.int8], "agreement": others}
        rows["speeds"] = [row.to_json() for row in self.speeds]
        facts = {"model": self.model, "environment": self.environment, "weights": list(self.weights), "random": self.random}
        return {**facts, "exports": exports, **rows, "verdict": self.verdict}


@holds("record", folder="output")
def export(
    model: str,
    /,
    *,
    output: Path,
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
    weights: Path | None = None,
    model_args: tuple[str, ...] = (),
    to: tuple[str, ...] = (),
    opset: int = OPSET,
    int8: bool = False,
    precision: tuple[str, ...] = (),
    tolerance: float = TOLERANCE,
    fp16_tolerance: float = HALF_TOLERANCE,
    data: str = "",
    split: str = "val",
    limit: int = IMAGES,
    batch_size: tuple[int, ...] = (),
    rounds: int = 10,
    threads: int = 1,
    record: Path | None = None,
) -> Files:
    """Write reduced models, and the unreduced one, for other runtimes; check each file, and measure all of them.

    A file takes its place only when the runtime gives the answers of eager PyTorch on batches of one and of three images.
    The files take images in float32, a batch of any size, and the one image size of the model. Their metadata has the
    preprocessing, the names of the classes if they are known, and where the weights come from.

    Args:
        model: timm name, or a directory that laconic.save wrote.
        output: directory for the files.
        method: a method of constant counts (default: that of the directory, or else etps).
        keep: keep rate of every reducing block (default: 0.7).
        options: option of the methods, as NAME=VALUE or METHOD.NAME=VALUE.
        weights: weights of the model, a .safetensors file or a checkpoint of torch (default: timm's pretrained ones).
        model_args: argument of timm.create_model, as NAME=VALUE.
        to: onnx, torch-export or openvino (default: onnx).
        opset: version of ONNX's operators, for onnx and openvino.
        int8: also write the ONNX files with int8 matrix products, and measure how far they agree.
        precision: fp16 or int8: also write ONNX files (fp16: and OpenVINO ones) in it, and measure how far they agree.
        tolerance: the greatest difference from eager allowed, as a share of the largest output; for files in float32.
        fp16_tolerance: the same for files in fp16.
        data: pictures to measure agreement on, named as for laconic eval (default: noise, for int8 and fp16 alone).
        split: of the data: val, test, train.
        limit: pictures at most, evenly spaced.
        batch_size: images in the batches that are timed (default: 1).
        rounds: rounds; each runs everything once, and the unreduced model around it. 0 measures no time.
        threads: CPU threads, the same for every runtime.
        record: write the whole report to this JSON file too.

    Raises:
        Refusal: no such model or option, an output that is no directory.
        LookupError, TypeError, ValueError: as `laconic.reduce_` and `laconic.export`. Nothing is written then.
    """
    formats, lower = tuple(dict.fromkeys(to or ("onnx",))), {*precision, *([INT8] if int8 else ())}
    _check(output, formats, lower, {"batch-size": min(batch_size, default=1), "threads": threads, "limit": limit}, rounds)
    given = open_export_input(model, weights, model_args, method, keep or (0.7,), options)
    pictures = read_pictures(given.variants[0].model, data, split, limit) if data else None
    setting = Setting(rounds=max(rounds, 1), threads=threads, device="cpu")
    half = fp16_tolerance if "fp16" in lower else None
    with machine.prepared(setting), unfinished(output / Path(model).name, 0) as place:
        exports, files = write_all(given.variants, place, Path(model).name, formats, opset, tolerance, half, given)
        for variant in given.variants if INT8 in lower else ():
            add_int8(variant, files)
        kinds = tuple(dict.fromkeys(kind for _, kind in files))
        wanted = kinds if data else [kind for kind in kinds if kind not in formats]
        small = [row for v in given.variants for row in compared(v, wanted, files, threads, pictures)] if wanted else []
        sizes = dict.fromkeys(batch_size or (1,))
        speeds = [s for size in sizes for s in measure_formats(given.variants, files, kinds, size, rounds, threads)]
        here = {**machine.environment(setting), "rounds": rounds, **versions()}
        for file in sorted(place.iterdir(), key=lambda file: file.suffix == ".xml"):
            os.replace(file, output / file.name)
    placed = tuple((label, report.moved(output)) for label, report in exports)
    done = Files(model, placed, tuple(row.moved(output) for row in small), tuple(speeds), here, tuple(given.says))
    if record is not None:
        with reported(done):
            write_atomically(record, json.dumps(done.to_json(), indent=2) + "\n")
    return done


def _check(output: Path, formats: Sequence[str], lower: set[str], numbers: Mapping[str, int], rounds: int) -> None:
    for name in formats:
        if name not in SUFFIXES:
            raise Refusal(f"--to {name}: there is no such format; there are {', '.join(SUFFIXES)}")
    for name, value in numbers.items():
        if value < 1:
            raise Refusal(f"--{name} must be at least 1, not {value}")
    if rounds < 0:
        raise Refusal(f"--rounds must be at least 0, not {rounds}")
    for name in sorted(lower - {"fp16", INT8}):
        raise Refusal(f"--precision {name}: there is no such precision; there are fp16 and int8, next to float32")
    if INT8 in lower and "onnx" not in formats:
        raise Refusal("--int8 quantizes the ONNX file; add --to onnx")
    if "fp16" in lower and not set(FP16) & set(formats):
        raise Refusal("--precision fp16 is for onnx and openvino; add --to onnx, or run the .pt2 under torch.autocast")
    if output.exists() and not output.is_dir():
        raise Refusal(f"{output} is a file; --output takes a directory")


def write_all(
    variants: Sequence[Variant],
    place: Path,
    name: str,
    formats: Sequence[str],
    opset: int,
    tolerance: float,
    fp16_tolerance: float | None = None,
    given: ExportInput | None = None,
) -> tuple[list[tuple[str, ExportReport]], dict[tuple[str, str], Path]]:
    """Write every variant in every format, under ``place``; return the reports, and the files by label and kind.

    With an ``fp16_tolerance`` also in fp16, in the formats that have it. ``given`` has what the metadata says of the weights.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    reports, files = list[tuple[str, ExportReport]](), dict[tuple[str, str], Path]()
    with tqdm(total=len(variants) * len(formats), desc="exporting", unit="file", leave=False, disable=None) as bar:
        for variant in variants:
            traced = trace(variant.model, weights=None if given is None else given.weights_of(variant))
            stem = name if variant.kind == "base" else f"{name}.{variant.label.replace(' ', '-')}"
            for to in formats:
                path = place / f"{stem}{SUFFIXES[to]}"
                reports.append((variant.label, write(traced, path, to, opset=opset, tolerance=tolerance)))
                files[variant.label, to] = path
                if fp16_tolerance is not None and to in FP16:
                    small = place / f"{stem}.fp16{SUFFIXES[to]}"
                    how: dict[str, Any] = {
                        "opset": opset,
                        "tolerance": fp16_tolerance,
                        "source": files.get((variant.label, "onnx")),
                    }
                    reports.append((variant.label, write(traced, small, to, precision="fp16", **how)))
                    files[variant.label, FP16[to]] = small
                bar.update()
    return reports, files


def versions() -> dict[str, str]:
    """Return the versions of the installed runtimes."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("onnx", "onnxruntime", "openvino"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
