"""``laconic sweep``: accuracy at many keep rates, next to the alternatives with fewer multiply-adds; resumable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from laconic.analysis import machine
from laconic.analysis.timing import Setting
from laconic.checkpoints.saved_files import digest
from laconic.cli import plots, scores
from laconic.cli.bench import METHODS
from laconic.cli.compare import compare
from laconic.cli.eval import EXPLAINED, check_output, notes_on, reduced_of, saved_variant, scorer_notes
from laconic.cli.eval_input import EvalInput, Reading, command, open_eval_input
from laconic.cli.models import smaller_name
from laconic.cli.output import Report, Table
from laconic.cli.outputs import holds, reported
from laconic.cli.record import Key, Record
from laconic.cli.scores import Score, options_of, score
from laconic.cli.variants import ALWAYS, Variant, alternatives, pairs, parse_methods, unreduced
from laconic.cli.weights import load
from laconic.core.files import Refusal
from laconic.report.chart import Chart

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class SweepReport(Report):
    """The rows, the files they are written to, and notes."""

    title: str
    rows: tuple[Score, ...]
    files: tuple[Path, ...]
    computed: int  # rows that this run evaluated; the others were read from the files
    record: dict[str, Any]  # the content of the JSON file

    def parts(self) -> Iterator[str | Table | Chart]:
        yield scores.table(self.rows, self.title)
        chart = scores.chart(self.rows)
        if chart is not None:
            yield chart
        notes = [self.record["weights"], *self.record["notes"], *notes_on(self.rows)]
        yield " ".join([EXPLAINED, *(f"{note[0].upper()}{note[1:]}." for note in notes)])
        yield f"{self.computed} of {len(self.rows)} rows evaluated now. Written: {', '.join(map(str, self.files)) or 'nothing'}"

    def to_json(self) -> dict[str, Any]:
        return {**self.record, "computed": self.computed, "files": [str(path) for path in self.files]}


@holds("output")
def sweep(
    model: str,
    /,
    *,
    data: str,
    output: Path,
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
    reading: Reading = Reading(),  # noqa: B008 (it is frozen)
    weights: Path | None = None,
    model_args: tuple[str, ...] = (),
    speed: bool = False,
    speed_batch: int = 8,
    setting: Setting = Setting(),  # noqa: B008 (it is frozen)
) -> SweepReport:
    """Evaluate methods at many keep rates, and the alternatives, as CSV, JSON and plots.

    Rows for the unreduced model, random pruning, average pooling, a lower input resolution and (if there are weights for it)
    the next smaller model are always included. Run again, it computes only the rows that the files do not have.

    Args:
        model: timm name, or a directory that laconic.save wrote.
        data: scenes, digits, a folder of images, a .tar, or a timm name (hfds/..., torch/...).
        output: the CSV file; the JSON file and the plots are written next to it.
        method: a method to sweep (default: etps and bat, or the method of the directory).
        keep: keep rate of every reducing block (default: 0.9 0.8 0.7 0.6 0.5).
        options: option of the methods, as NAME=VALUE or METHOD.NAME=VALUE.
        reading: images to read.
        weights: weights of the model, a .safetensors file or a checkpoint of torch (default: timm's pretrained ones).
        model_args: argument of timm.create_model, as NAME=VALUE.
        speed: also measure the speed on this machine.
        speed_batch: images in a batch where speed is measured.
        setting: machine, and how to measure the speed.

    Raises:
        Refusal: no such model or weights; the files hold another sweep, or cannot be written; matplotlib is not there.
        LookupError, TypeError, ValueError, OSError: as `laconic.reduce_` and `laconic.data.open_images`.
    """
    check_output(output)
    if speed_batch < 1:
        raise Refusal(f"--speed-batch must be at least 1, not {speed_batch}")
    plots.check_matplotlib()
    asked = {name: value for name, value in locals().items() if name not in ("model", "reading", "setting")}
    eval_input = open_eval_input(model, data, reading, weights, model_args)
    variants, notes = collect(eval_input, method, keep or KEEPS, options, model_args)
    record = Record(output, question(eval_input, data, reading, model_args, setting))
    record.begin(command("sweep", model, {**asked, **vars(reading), **vars(setting)}), machine.environment(setting))
    record.notes, record.weights = [*eval_input.notes, *scorer_notes(variants, eval_input), *notes], eval_input.weights
    order, title, files = [key_of(variant) for variant in variants], f"{model} on {data}, {reading.split}", list[Path]()
    known = len(record.rows)

    def report() -> SweepReport:
        rows = record.ordered(order)
        return SweepReport(title, tuple(rows), tuple(files), len(rows) - known, record.to_json(rows))

    with reported(report):
        evaluate(record, variants, eval_input, reading, setting)
        if speed:
            measure(record, variants, speed_batch, setting)
        record.write(order)
        files += [output, record.json_path, plots.plot(output.with_suffix(".png"), record.ordered(order), "GMACs", title)]
        if any(row.ratio for row in record.rows.values()):
            speed_plot = output.with_name(f"{output.stem}-speed.png")
            files.append(plots.plot(speed_plot, record.ordered(order), "speed", title))
    return report()


def question(eval_input: EvalInput, data: str, reading: Reading, model_args: Sequence[str], setting: Setting) -> dict[str, Any]:
    """Return the facts that all rows of a file must agree in: the weights, the images, and the options of reading them."""
    whole = eval_input.base if eval_input.saved is None else eval_input.saved
    asked = {"model": eval_input.name, "model_args": list(model_args), "weights": digest(whole)}
    read = {"data": data, "split": reading.split, "images": len(eval_input.images), "crop": reading.crop}
    order = {"class_map": reading.class_map} if reading.class_map else {}  # absent in the records of earlier versions
    return {**asked, **read, **order, "dtype": setting.dtype}


def collect(
    eval_input: EvalInput, method: Sequence[str], keeps: Sequence[float], options: Sequence[str], model_args: Sequence[str]
) -> tuple[list[Variant], list[str]]:
    """Return all variants, the unreduced model first; and notes on missing ones."""
    keeps, saved = list(dict.fromkeys(keeps)), saved_variant(eval_input)
    variants = [unreduced("unreduced", eval_input.base), *saved]
    wanted = method or (() if saved else METHODS)
    configs = parse_methods([name for name in dict.fromkeys(wanted) if name not in ALWAYS], options)
    variants += [reduced_of(eval_input, config, rate) for config, rate in pairs(configs, keeps)]
    smaller, why = _smaller(eval_input, model_args)
    others, notes = alternatives(eval_input.name if smaller else "", eval_input.base, keeps, lambda _: _given(smaller))
    notes = [note for note in notes if not note.startswith("no smaller model row")]
    return variants + others, notes + ([why] if why else [])


def _smaller(eval_input: EvalInput, model_args: Sequence[str]) -> tuple[nn.Module | None, str]:
    """Return the next smaller model with weights for the same data, or the reason for its absence."""
    name = smaller_name(eval_input.name)
    if name is None:
        return None, f"no smaller model row: timm has no smaller model in the family of {eval_input.name}"
    if model_args or not (eval_input.pretrained or eval_input.random):
        return None, f"no smaller model row: there are no weights of {name} that were trained like these"
    loaded = load(name)
    if loaded.random and not eval_input.random:
        return None, f"no smaller model row: {name} would have random weights"
    return loaded.model, ""


def _given(model: nn.Module | None) -> nn.Module:
    if model is None:
        raise Refusal("there is no smaller model")
    return model


def key_of(variant: Variant) -> Key:
    """Return the key that is unique to a variant of a sweep."""
    return variant.name, variant.keep, json.dumps(options_of(variant), sort_keys=True)


# ------------------------------------------------------------------------------------------------ the work
def evaluate(record: Record, variants: Sequence[Variant], eval_input: EvalInput, reading: Reading, setting: Setting) -> int:
    """Evaluate the variants that have no row yet, and write each as soon as it is done; return their number.

    If there are any, the unreduced model runs again, for the comparison; its row stays.
    """
    missing = [variant for variant in variants if key_of(variant) not in record.rows]
    if not missing:
        return 0
    first, said = score(variants[0], eval_input.images, reading, setting)
    order = [key_of(variant) for variant in variants]
    for variant in tqdm(missing, desc="sweep", unit="row", leave=False, disable=None):
        row = first if variant is variants[0] else score(variant, eval_input.images, reading, setting, said)[0]
        record.add(key_of(variant), row, order)
    return len(missing)


def measure(record: Record, variants: Sequence[Variant], batch_size: int, setting: Setting) -> None:
    """Measure the speed of the variants that have none yet, interleaved with the unreduced model."""
    missing = [variant for variant in variants[1:] if record.rows[key_of(variant)].ratio is None]
    if not missing and record.rows[key_of(variants[0])].ratio is not None:
        return
    order, timed = [key_of(variant) for variant in variants], [variants[0], *missing]
    with machine.prepared(setting):
        measured = compare(timed, batch_size, setting)
    for variant, row in zip(timed, measured, strict=True):
        ratio = (1.0, 1.0, 1.0) if variant is variants[0] else (row.wall.low, row.wall.median, row.wall.high)
        old = record.rows[key_of(variant)]
        new = dataclasses.replace(old, ratio=ratio, images_per_second=row.images_per_second, speed_batch=batch_size)
        record.add(key_of(variant), new, order)
