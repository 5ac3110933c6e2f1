"""``laconic tune``: choose input size, method and schedule for a model, on the user's images."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
from torch import Tensor, nn

from laconic.analysis import machine
from laconic.analysis.equal_time import Interval
from laconic.analysis.timing import DTYPES, Setting
from laconic.cli import plots
from laconic.cli.compare import threads as threads_of
from laconic.cli.eval_input import Reading, command, open_eval_input
from laconic.cli.output import Report, Table, Verbatim
from laconic.cli.outputs import holds, reported
from laconic.cli.plan import pixels_of
from laconic.cli.record import commit
from laconic.core.files import Refusal, write_atomically
from laconic.planning.measures import KINDS, WORDS, Kind, Scored
from laconic.planning.tune import tune as tune_model
from laconic.planning.tuned import Tuned, TunedRow
from laconic.report.chart import Chart, Point

REPAIR_IMAGES = 1024  # of --repair-split
EXPLAINED = (
    "Speed: time of the unreduced model divided by the row's, median of interleaved rounds. Over a smaller input: the "
    "difference to the unreduced model on smaller images that takes as long. 95 % intervals by the bootstrap, image by image."
)


@dataclass(frozen=True)
class TuneReport(Report):
    """The chosen row, and the model and machine it was chosen for."""

    tuned: Tuned
    about: Mapping[str, Any]
    saved: str = ""

    def parts(self) -> Iterator[str | Table | Chart]:
        tuned, here = self.tuned, self.about["environment"]
        measure = WORDS.get(tuned.measure, tuned.measure)
        header = ("", "GMACs", "speed", measure, "(95 %)", "over a smaller input", "(95 %)")
        chosen, judging = tuned.images
        title = f"{self.about['model']}, {tuned.target.text}; {chosen} images chose, {judging} other images judge:"
        yield Table(title, header, tuple(cells(row) for row in tuned.rows), below=("over a smaller input", "(95 %)"))
        yield Chart(
            f"{measure.capitalize()} against measured speed", plots.LABELS["speed"], measure, tuple(map(point, tuned.rows))
        )
        yield EXPLAINED
        yield f"Verdict: {verdict(tuned)}"
        notes = [note for note in (self.about["weights"], *tuned.notes, self.saved) if note]
        if notes:
            yield "".join(f"{note[0].upper()}{note[1:]}.\n" for note in notes).rstrip()
        yield f"{here['device']}, {threads_of(here)}, {here['dtype']}, torch {here['torch']}, {here['date']}"
        if tuned.best.schedule is not None:
            yield Verbatim(f"schedule = {json.dumps(tuned.best.schedule.to_json())}")

    def to_json(self) -> dict[str, Any]:
        return {**self.about, **self.tuned.to_json(), "saved": self.saved}


def point(row: TunedRow) -> Point:
    """Return the point of a row in the chart of a page."""
    score, speed = row.score, row.speed
    facts = (row.name, plots.series_of(row), speed.median, score.mean, score.low, score.high, speed.low, speed.high)
    return Point(*facts, plain=row.method is None)


def cells(row: TunedRow) -> tuple[str, ...]:
    """Return the cells of a row."""
    speed = "1" if row.sides is None and row.method is None else f"{row.speed.median:.2f}x"
    over = ("", "") if row.over is None else (f"{row.over.mean:+.3f}", between(row.over, signed=True))
    return (row.name, f"{row.macs / 1e9:.2f}", speed, f"{row.score.mean:.3f}", between(row.score), *over)


def between(interval: Interval, *, signed: bool = False) -> str:
    """Return the limits of an interval as text."""
    return f"{interval.low:+.3f} to {interval.high:+.3f}" if signed else f"{interval.low:.3f}-{interval.high:.3f}"


def verdict(tuned: Tuned) -> str:
    """Return what was chosen, and how it compares with a smaller input, in a sentence."""
    best = tuned.best
    if best.repaired is not None:
        before, after, gain = best.repaired.before.mean, best.repaired.after.mean, best.repaired.gain
        shift = "no comparison with a smaller input" if best.over is None else f"{best.over.mean:+.3f} over a smaller input"
        return (
            f"{best.name}, {best.speed.median:.2f}x: {before:.3f} before and {after:.3f} after the repair "
            f"({between(gain, signed=True)}), {shift}{'' if best.over is None else f' ({between(best.over, signed=True)})'}."
        )
    if best.method is None:
        return f"take the smaller input: {best.name}, {best.speed.median:.2f}x. No method was better on the images that chose."
    if best.over is None:
        return f"{best.name}, {best.speed.median:.2f}x. No smaller input takes as long, so there is no comparison with one."
    shift = f"{best.over.mean:+.3f} ({between(best.over, signed=True)})"
    words = "ahead of" if best.over.low > 0 else "behind" if best.over.high < 0 else "not distinguishable from"
    own = (
        ""
        if tuned.measure in ("same-answer", "dense")
        else f"; {best.score.mean:.3f}, unreduced {tuned.rows[0].score.mean:.3f}"
    )
    return f"{best.name}, {best.speed.median:.2f}x: {words} a smaller input that takes as long, {shift}{own}."


@holds("output")
def tune(
    model: str,
    /,
    *,
    target: str,
    data: str,
    measure: str = "same-answer",
    methods: tuple[str, ...] = (),
    minutes: float | None = None,
    repair: Literal["none", "closed-form", "distil"] = "none",
    repair_split: str | None = None,
    batch_size: int = 8,
    threads: int | None = None,
    split: str = "val",
    limit: int = 256,
    workers: int = 0,
    weights: Path | None = None,
    model_args: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    output: Path | None = None,
    save: Path | None = None,
) -> TuneReport:
    """Choose input size, method and schedule for a model, and compare the choice with smaller inputs of equal time.

    Half of the images choose, the other half judge. Random pruning, average pooling and smaller inputs are among the rows.

    Args:
        model: timm name, or a directory that laconic.save wrote.
        target: 1.6x as fast or 12ms for a forward (measured), 2.3G multiply-adds of an image, or 1.6x-macs.
        data: images: scenes, digits, cutouts, a folder, a .tar, or a timm name.
        measure: what is to be kept: the same-answer as the unreduced model, dense patch features, right labels (of the head
            or of the nearest image), pairs (images of one class find each other), or a function as MODULE:FUNCTION, which
            gets a model and images and returns a score of every image.
        methods: a method to choose from (default: nine that need no training).
        minutes: time that may be spent; with less time, fewer images are used (default: as long as all images take).
        repair: fit scales and biases of the chosen row to the unreduced model: closed-form (seconds) or distil (minutes).
            It stays if held-out images say so.
        repair_split: another split of the data, up to 1024 images of which are fitted too; they need no labels.
        batch_size: images in a forward where time is measured.
        threads: CPU threads (default: as many as torch takes by itself).
        split: of the data.
        limit: images at most (0: all).
        workers: processes that read images.
        weights: weights of the model, a file (default: timm's pretrained ones).
        model_args: argument of timm.create_model, as NAME=VALUE.
        device: cuda where there is one, else cpu.
        dtype: of weights and images.
        output: write all numbers to this JSON file; next to it a plot of score against speed and, after a repair, the fitted
            parameters (.safetensors). A run that was stopped goes on when the command is repeated.
        save: write the chosen model to this directory (laconic.save).

    Raises:
        Refusal: random weights, images that cannot be read, a file that cannot be written, or matplotlib is missing for it.
        LookupError, TypeError, ValueError, OSError: as `laconic.tune` and `laconic.data.open_images`.
    """
    asked = {name: value for name, value in locals().items() if name != "model"}
    if repair_split is not None and (repair == "none" or repair_split == split):
        raise Refusal(f"--repair-split {repair_split}: give another split than {split}, and --repair closed-form or distil")
    if output is not None:
        plots.check_matplotlib()
    kind = _measure(measure)
    setting = Setting(rounds=1, threads=threads, device=device, dtype=dtype)
    reading = Reading(split=split, limit=limit, workers=workers)
    eval_input = open_eval_input(model, data, reading, weights, model_args)
    if eval_input.random:
        raise Refusal(f"{eval_input.weights}; fidelity to random weights means nothing. Give --weights")
    base = eval_input.base.to(setting.place, DTYPES[setting.dtype]).eval()
    images, labels = pixels_of(base, eval_input, reading)
    record = None if output is None or callable(kind) else output.with_suffix(".scores.jsonl")
    facts: dict[str, Any] = {
        "measure": kind,
        "labels": labels,
        "methods": methods or None,
        "minutes": minutes,
        "record": record,
        "repair": None if repair == "none" else repair,
        "repair_images": _of_split(model, base, asked),
    }
    with machine.prepared(setting):
        tuned = tune_model(base, images, target, batch_size=batch_size, **facts)
        environment = {name: fact for name, fact in machine.environment(setting).items() if name not in ("rounds", "compiled")}
    about: dict[str, Any] = {"model": model, "model_args": list(model_args), "environment": environment, "commit": commit()}
    about |= {"command": command("tune", model, asked), "weights": eval_input.weights}
    about |= {"data": f"{data}, {split}, {len(images)} images"}
    saved = ""
    if save is not None:
        from laconic.checkpoints.save_load import save as save_model

        save_model(tuned.apply(base), save)
        saved = f"the chosen model is in {save}"
    report = TuneReport(tuned, about, saved)
    if output is not None:
        with reported(report):
            if tuned.parameters:
                write_atomically(output.with_suffix(".safetensors"), safetensors.torch.save(dict(tuned.parameters)))
            write_atomically(output, json.dumps(report.to_json(), indent=2) + "\n")
            plots.plot_tuned(output.with_suffix(".png"), tuned, WORDS.get(tuned.measure, tuned.measure), f"{model}, {target}")
    if record is not None:
        record.unlink(missing_ok=True)
    return report


def _of_split(model: str, base: nn.Module, asked: Mapping[str, Any]) -> Tensor | None:
    """Return images of ``--repair-split``, as the model takes them; None without that option."""
    if asked["repair_split"] is None:
        return None
    reading = Reading(split=asked["repair_split"], limit=REPAIR_IMAGES, workers=asked["workers"])
    found = open_eval_input(model, asked["data"], reading, asked["weights"], asked["model_args"])
    return pixels_of(base, found, reading)[0]


def _measure(name: Any) -> Kind | Scored:
    """Return a measure by its name, or the function at MODULE:FUNCTION."""
    module, colon, function = name.partition(":")
    if not colon:
        if name not in KINDS:
            raise Refusal(f"--measure {name}: expected {', '.join(KINDS)}, or a function as MODULE:FUNCTION")
        return name
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise Refusal(f"--measure {name}: {error}; the module must be in this folder or installed") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise Refusal(f"--measure {name}: this is no function")
    return cast(Scored, found)
