"""``laconic export``: reduced models as files for other runtimes, each checked, and the speed-up that survives there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from laconic.analysis import machine
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.timing import Setting
from laconic.api import restore_
from laconic.cli.export_speed import EAGER, INT8, Quantized, Speed, measure_formats, quantized, table
from laconic.cli.models import open_model
from laconic.cli.output import Report, Table, sentence
from laconic.cli.variants import Variant, as_reduced, pairs, parse_methods, reduced, unreduced
from laconic.core.files import Refusal, check_output_file, check_output_folder, write_atomically
from laconic.core.token_reduction import find_reduction
from laconic.exporting import OPSET, SUFFIXES, TOLERANCE, ExportReport, trace, write

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
    int8: tuple[Quantized, ...]
    speeds: tuple[Speed, ...]
    environment: dict[str, Any]

    @property
    def verdict(self) -> str:
        """The verdict: the speed-up that survives, and the rows that gain nothing."""
        return " ".join([self._survival, *self._slower])

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
        yield from (str(row) for row in self.int8)
        for batch in dict.fromkeys(speed.batch for speed in self.speeds):
            yield table([speed for speed in self.speeds if speed.batch == batch], f"{self.model}, batch {batch}")
        here = self.environment
        yield f"{here['device']}, threads: {here['threads']}, {here['rounds']} rounds, torch {here['torch']}, {here['date']}"
        yield EXPLAINED
        yield f"\n{self.verdict}"

    def to_json(self) -> dict[str, Any]:
        exports = [{"variant": label, **report.to_json()} for label, report in self.exports]
        rows = {"int8": [row.to_json() for row in self.int8], "speeds": [row.to_json() for row in self.speeds]}
        facts = {"model": self.model, "environment": self.environment}
        return {**facts, "exports": exports, **rows, "verdict": self.verdict}


def export(
    model: str,
    /,
    *,
    output: Path,
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
    to: tuple[str, ...] = (),
    opset: int = OPSET,
    int8: bool = False,
    tolerance: float = TOLERANCE,
    batch_size: tuple[int, ...] = (),
    rounds: int = 10,
    threads: int = 1,
    record: Path | None = None,
) -> Files:
    """Write reduced models, and the unreduced one, for other runtimes; check each file, and measure all of them.

    A file takes its place only when the runtime gives the answers of eager PyTorch on batches of one and of three images.
    The files are for float32, for a batch of any size, and for the one image size of the model.

    Args:
        model: timm name (random weights), or a directory that laconic.save wrote.
        output: directory for the files.
        method: a method of constant counts (default: that of the directory, or else etps).
        keep: keep rate of every reducing block (default: 0.7).
        options: option of the methods, as NAME=VALUE or METHOD.NAME=VALUE.
        to: onnx, torch-export or openvino (default: onnx).
        opset: version of ONNX's operators, for onnx and openvino.
        int8: also write the ONNX files with int8 matrix products, and measure how far they agree.
        tolerance: the greatest difference from eager allowed, as a share of the largest output; not for int8.
        batch_size: images in the batches that are timed (default: 1).
        rounds: rounds; each runs everything once, and the unreduced model around it. 0 measures no time.
        threads: CPU threads, the same for every runtime.
        record: write the whole report to this JSON file too.

    Raises:
        Refusal: no such model or option, an output that is no directory.
        LookupError, TypeError, ValueError: as `laconic.reduce_` and `laconic.export`. Nothing is written then.
    """
    formats = tuple(dict.fromkeys(to or ("onnx",)))
    _check(output, formats, batch_size, rounds, threads, int8)
    check_output_folder(output)
    check_output_file(record, "--record")
    variants = collect(model, method, keep or (0.7,), options)
    setting = Setting(rounds=max(rounds, 1), threads=threads, device="cpu")
    try:
        output.mkdir(parents=True, exist_ok=True)
        unfinished = TemporaryDirectory(dir=output, prefix=".unfinished-")
    except OSError as error:
        raise Refusal(f"{output} cannot be written: {error.strerror or error}; choose another --output") from error
    with machine.prepared(setting), unfinished as place:
        exports, files = write_all(variants, Path(place), Path(model).name, formats, opset, tolerance)
        small = tuple(quantized(v, files, threads) for v in variants) if int8 else ()
        kinds = (*formats, INT8) if int8 else formats
        speeds = [
            s for b in dict.fromkeys(batch_size or (1,)) for s in measure_formats(variants, files, kinds, b, rounds, threads)
        ]
        here = {**machine.environment(setting), "rounds": rounds, **versions()}
        for file in sorted(Path(place).iterdir(), key=lambda file: file.suffix == ".xml"):
            os.replace(file, output / file.name)
    placed = tuple((label, report.moved(output)) for label, report in exports)
    done = Files(model, placed, tuple(row.moved(output) for row in small), tuple(speeds), here)
    if record is not None:
        write_atomically(record, json.dumps(done.to_json(), indent=2) + "\n")
    return done


def _check(output: Path, formats: Sequence[str], batches: Sequence[int], rounds: int, threads: int, int8: bool) -> None:
    for name in formats:
        if name not in SUFFIXES:
            raise Refusal(f"--to {name}: there is no such format; there are {', '.join(SUFFIXES)}")
    for name, least, value in (("batch-size", 1, min(batches, default=1)), ("rounds", 0, rounds), ("threads", 1, threads)):
        if value < least:
            raise Refusal(f"--{name} must be at least {least}, not {value}")
    if int8 and "onnx" not in formats:
        raise Refusal("--int8 quantizes the ONNX file; add --to onnx")
    if output.exists() and not output.is_dir():
        raise Refusal(f"{output} is a file; --output takes a directory")


def collect(name: str, methods: Sequence[str], keeps: Sequence[float], options: Sequence[str]) -> list[Variant]:
    """Return the unreduced model, then the one that a directory holds or every method at every keep rate."""
    model = open_model(name)
    saved = find_reduction(model)
    base = model if saved is None else restore_(shared_copy(model))
    variants = [unreduced("unreduced", base)]
    if saved is not None:
        variants.append(as_reduced(saved.config.info.name, model, None))
    configs = parse_methods(list(dict.fromkeys(methods or (("etps",) if saved is None else ()))), options)
    return variants + [reduced(base, config, keep) for config, keep in pairs(configs, keeps)]


def write_all(
    variants: Sequence[Variant], place: Path, name: str, formats: Sequence[str], opset: int, tolerance: float
) -> tuple[list[tuple[str, ExportReport]], dict[tuple[str, str], Path]]:
    """Write every variant in every format, under ``place``; return the reports, and the files by label and format."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    reports, files = list[tuple[str, ExportReport]](), dict[tuple[str, str], Path]()
    with tqdm(total=len(variants) * len(formats), desc="exporting", unit="file", leave=False, disable=None) as bar:
        for variant in variants:
            traced = trace(variant.model)
            stem = name if variant.kind == "base" else f"{name}.{variant.label.replace(' ', '-')}"
            for to in formats:
                path = place / f"{stem}{SUFFIXES[to]}"
                reports.append((variant.label, write(traced, path, to, opset=opset, tolerance=tolerance)))
                files[variant.label, to] = path
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
