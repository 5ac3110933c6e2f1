"""``laconic eval``: accuracy of a model before and after it is reduced, image by image on the same data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from laconic.analysis import machine
from laconic.analysis.evaluate import Answers
from laconic.analysis.per_class import Confusion
from laconic.analysis.timing import Setting
from laconic.cli import per_class as classes
from laconic.cli import plots, scores
from laconic.cli.eval_file import evaluate_file, is_exported
from laconic.cli.eval_input import EvalInput, Reading, command, open_eval_input
from laconic.cli.output import Report, Table
from laconic.cli.outputs import holds, reported
from laconic.cli.scores import Score
from laconic.cli.variants import Variant, as_reduced, pairs, parse_methods, reduced, unreduced
from laconic.core.files import Refusal, check_output_file, write_atomically
from laconic.core.method import METHODS, Method
from laconic.core.token_reduction import find_reduction
from laconic.data import ImageSet
from laconic.data import Report as DataReport
from laconic.models.scenes import has_scorer, load_scorer
from laconic.report.chart import Chart

EXPLAINED = (
    "(95 %): Wilson's interval of top-1. change: in points, to the unreduced model. agrees: images with the same first "
    "class as the unreduced model's, right or wrong. KL: of the class probabilities, from the unreduced model's."
)


@dataclass(frozen=True)
class EvalReport(Report):
    """Rows, the data and the weights they were measured with, and notes."""

    model: str
    data: str
    weights: str
    rows: tuple[Score, ...]
    read: DataReport
    environment: dict[str, Any]
    command: str
    notes: tuple[str, ...]
    classes: classes.Named = ()  # the confusion matrix of each row, if asked for
    files: tuple[Path, ...] = ()  # of the classes

    def parts(self) -> Iterator[str | Table | Chart]:
        here = self.environment
        yield scores.table(self.rows, f"{self.model} on {self.data}")
        chart = scores.chart(self.rows)
        if chart is not None:
            yield chart
        if self.classes:
            yield from classes.tables(self.classes)
        if self.files:
            yield f"Classes and confusion matrices: {', '.join(map(str, self.files))}."
        yield f"{self.weights[0].upper()}{self.weights[1:]}."
        yield "".join(f"{line[0].upper()}{line[1:]}.\n" for line in self.read.lines()).rstrip()
        yield " ".join([EXPLAINED, *(f"{note[0].upper()}{note[1:]}." for note in self.notes)])
        yield f"{here['device']}, {here['dtype']}, torch {here['torch']}, timm {here['timm']}, {here['date']}"

    def to_json(self) -> dict[str, Any]:
        facts = {"model": self.model, "data": self.data, "weights": self.weights, "command": self.command}
        rows = [row.to_json() for row in self.rows]
        read = {"images": self.read.to_json(), "environment": self.environment, "notes": list(self.notes)}
        return {**facts, **read, "rows": rows, **({"per_class": classes.to_json(self.classes)} if self.classes else {})}


@holds("output")
def eval_(
    model: str,
    /,
    *,
    data: str,
    reading: Reading = Reading(),  # noqa: B008 (it is frozen)
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
    weights: Path | None = None,
    model_args: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    output: Path | None = None,
    per_class: bool = False,
) -> EvalReport:
    """Evaluate a model and reduced copies of it on the same images.

    Args:
        model: timm name, a directory that laconic.save wrote, or a file that laconic export wrote (.onnx, .xml, .pt2).
        data: scenes, digits, cutouts, a folder of images (with one for each split, or for each class), a .tar, or a timm
            name (hfds/..., torch/...).
        reading: images to read.
        method: a method to evaluate, next to the unreduced model.
        keep: keep rate of every reducing block (default: 0.7).
        options: option of the methods, as NAME=VALUE or METHOD.NAME=VALUE.
        weights: weights of the model, a .safetensors file or a checkpoint of torch (default: timm's pretrained ones).
        model_args: argument of timm.create_model, as NAME=VALUE.
        device: cuda where there is one, else cpu.
        dtype: of weights and images.
        output: write the rows to this CSV file, in timm's columns, and all of it to a JSON file next to it.
        per_class: also the accuracy of every class and the confusion matrices; with --output as CSV files and pictures.

    Raises:
        Refusal: no such model or weights, other classes than an exported file has, an option that no method has, a file that
            cannot be written.
        LookupError, TypeError, ValueError, OSError: as `laconic.reduce_` and `laconic.data.open_images`.
    """
    check_output(output)
    if per_class and output is not None:
        plots.check_matplotlib()
    asked = {name: value for name, value in locals().items() if name not in ("model", "reading")}
    asked |= vars(reading)
    if is_exported(model) and not Path(model).is_dir():
        report = _of_file(model, data, reading, asked)
    else:
        report = _of_model(model, data, reading, Setting(rounds=1, device=device, dtype=dtype), asked)
    if output is not None:
        with reported(report):
            write_atomically(output, scores.to_csv(model, report.rows))
            write_atomically(output.with_suffix(".json"), json.dumps(report.to_json(), indent=2) + "\n")
            if report.classes:
                files = tuple(classes.write(output, report.classes, report.data))
                report = dataclasses.replace(report, files=files)
    return report


def _of_file(model: str, data: str, reading: Reading, asked: dict[str, Any]) -> EvalReport:
    names = ("method", "keep", "options", "weights", "model_args")
    refused = {name: asked[name] for name in names}
    refused |= {"device": asked["device"] == "cuda", "dtype": asked["dtype"] != "float32"}
    found = evaluate_file(model, data, reading, refused)
    here = {**machine.environment(Setting(rounds=1, device="cpu")), "runtime": found.runtime, "dtype": found.precision}
    here = {name: fact for name, fact in here.items() if name not in ("rounds", "compiled")}
    notes = (f"the file ran in {found.runtime}", *found.notes, *notes_on([found.row]))
    read = DataReport.of(found.images, found.answers.unreadable)
    title = f"{data}, {reading.split}"
    facts = (model, title, found.weights, (found.row,), read, here, command("eval", model, asked), notes)
    return EvalReport(*facts, _named(facts[3], [found.answers], found.images) if asked["per_class"] else ())


def _of_model(model: str, data: str, reading: Reading, setting: Setting, asked: dict[str, Any]) -> EvalReport:
    method, keep, options = asked["method"], asked["keep"], asked["options"]
    eval_input = open_eval_input(model, data, reading, asked["weights"], asked["model_args"])
    variants = _variants(eval_input, method, keep or (0.7,), options)
    first, said = scores.score(variants[0], eval_input.images, reading, setting)
    others = [scores.score(variant, eval_input.images, reading, setting, said) for variant in variants[1:]]
    rows = [first, *(row for row, _ in others)]
    here = {name: fact for name, fact in machine.environment(setting).items() if name not in ("rounds", "compiled")}
    read = DataReport.of(eval_input.images, said.unreadable)
    notes = (*eval_input.notes, *scorer_notes(variants, eval_input), *notes_on(rows))
    title = f"{data}, {reading.split}"
    facts = (model, title, eval_input.weights, tuple(rows), read, here, command("eval", model, asked), notes)
    every = [said, *(answers for _, answers in others)]
    return EvalReport(*facts, _named(rows, every, eval_input.images) if asked["per_class"] else ())


def _named(rows: Sequence[Score], every: Sequence[Answers], images: ImageSet) -> classes.Named:
    """Return the confusion matrix of each row by its label."""
    return tuple((row.label, Confusion.of(answers, images.classes)) for row, answers in zip(rows, every, strict=True))


def check_output(output: Path | None) -> None:
    """Refuse a CSV file that has the name of the JSON file next to it, or whose JSON file cannot be written.

    Raises:
        Refusal: it ends in .json, or the JSON file is a folder or a device.
    """
    if output is not None and output.suffix == ".json":
        raise Refusal(f"--output {output}: give the name of a .csv file; the JSON file is written next to it")
    check_output_file(None if output is None else output.with_suffix(".json"))


def _variants(
    eval_input: EvalInput, method: tuple[str, ...], keep: tuple[float, ...], options: tuple[str, ...]
) -> list[Variant]:
    out = [unreduced("unreduced", eval_input.base), *saved_variant(eval_input)]
    configs = parse_methods(list(dict.fromkeys(method)), options)
    return out + [reduced_of(eval_input, config, rate) for config, rate in pairs(configs, keep)]


def reduced_of(eval_input: EvalInput, config: Method, keep: float | None) -> Variant:
    """Return a reduced copy, with the trained scorer that comes with laconic if there is one for these weights."""
    variant = reduced(eval_input.base, config, keep)
    if eval_input.pretrained and config.info.learns:
        load_scorer(variant.model, eval_input.name)
    return variant


def scorer_notes(variants: Sequence[Variant], eval_input: EvalInput) -> list[str]:
    """Return notes on the methods with parameters of their own: trained or untrained."""
    learned = dict.fromkeys(v.name for v in variants if v.name in METHODS and METHODS[v.name].learns)
    whose = {name: eval_input.pretrained and has_scorer(eval_input.name, name) for name in learned}
    words = {True: "were trained for this model and come with laconic", False: "are untrained here"}
    return [f"{name} has parameters of its own, which {words[trained]}" for name, trained in whose.items()]


def saved_variant(eval_input: EvalInput) -> list[Variant]:
    """Return the row of the reduced model that a directory holds, if it holds one."""
    saved = None if eval_input.saved is None else find_reduction(eval_input.saved)
    if saved is None or eval_input.saved is None:
        return []
    return [as_reduced(f"{saved.config.info.name} as saved", eval_input.saved, None)]


def notes_on(rows: Sequence[Score]) -> list[str]:
    """Return notes on the rows."""
    bad = [f"{row.label} {row.not_finite:,}" for row in rows if row.not_finite]
    return [f"answers that are not finite, counted as wrong: {', '.join(bad)}"] if bad else []
