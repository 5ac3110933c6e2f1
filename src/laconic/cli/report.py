"""``laconic report``: methods and the trivial alternatives on a model and pictures, as one page and one JSON file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.analysis import machine
from laconic.analysis.timing import Setting
from laconic.cli import report_page, report_rows
from laconic.cli.eval import scorer_notes
from laconic.cli.eval_input import Reading, command, open_eval_input
from laconic.cli.output import NONE, Report, Table
from laconic.cli.outputs import holds, reported
from laconic.cli.plan import readable
from laconic.cli.record import commit
from laconic.cli.report_rows import Found, Verdict, class_names, collect, judged, spread
from laconic.cli.tune import between
from laconic.core.files import Refusal, check_output_file, write_atomically
from laconic.core.optional_deps import need
from laconic.planning.measures import KINDS, WORDS, Kind
from laconic.report.chart import Chart, Point
from laconic.report.page import build

LOG = logging.getLogger(__name__)
METHODS, KEEPS = ("tome", "etps", "bat"), (0.7, 0.5)
EXPLAINED = (
    "measured: time of the unreduced model, before and after, divided by this row's; median and quartiles over the rounds. "
    "over a smaller input: the score less that of the unreduced model on smaller pictures that take as long (between the two "
    "measured sizes next to it). 95 % intervals by the bootstrap, picture by picture. changed: pictures with another answer: "
    "another class or, of a model without a head, another nearest picture. "
    "Nothing was trained for a row."
)


@dataclass(frozen=True)
class ReportReport(Report):
    """Rows, verdict, and what a page shows of single pictures."""

    about: Mapping[str, Any]  # model, data, weights, measure, environment, command, commit, notes
    rows: tuple[Found, ...]
    verdict: Verdict
    shown: report_page.Shown
    files: tuple[Path, ...]

    @property
    def sentence(self) -> str:
        """The verdict in a sentence."""
        return self.verdict.sentence(self.words)

    @property
    def words(self) -> str:
        """The measure in words."""
        return WORDS[self.about["measure"]]

    def parts(self) -> Iterator[str | Table | Chart]:
        yield self.sentence
        yield self.verdict.halves
        header = ("", "GMACs", "measured", "(quartiles)", self.words, "over a smaller input", "(95 %)", "changed")
        title = f"{self.about['model']} on {self.about['data']}"
        yield Table(title, header, tuple(map(cells, self.rows)), below=("over a smaller input", "(95 %)"))
        yield self.chart
        yield self.notes
        yield f"Written: {', '.join(map(str, self.files))}."

    @property
    def notes(self) -> str:
        """The columns and the notes, in words."""
        notes = [self.about["weights"], *self.about["notes"]]
        return " ".join([EXPLAINED, *(f"{note[0].upper()}{note[1:]}." for note in notes)])

    @property
    def chart(self) -> Chart:
        """The score against measured speed."""
        points = tuple(point(one) for one in self.rows)
        title = f"{self.words.capitalize()} (mean, 95 % interval) against measured speed (median, quartiles) of every row"
        return Chart(title, "measured speed (x the unreduced model)", self.words, points)

    def page(self) -> str:
        """Return the page as HTML."""
        lead = (self.sentence, self.verdict.halves, f"{self.about['model']} on {self.about['data']}.")
        parts = report_page.sections(self.rows, self.chart, self.words, self.shown, self.about, self.notes)
        return build(f"Fewer tokens for {self.about['model']}", lead, parts, self.to_json())

    def to_json(self) -> dict[str, Any]:
        over = self.verdict.over
        best = {"sentence": self.sentence, "row": self.verdict.best.row.label, "over": None if over is None else vars(over)}
        halves: dict[str, Any] = {"chosen_on": self.verdict.chosen_on, "judged_on": self.verdict.judged_on}
        if self.verdict.plain is not None:
            halves["plain"] = {"row": self.verdict.plain[0].row.label, "over": vars(self.verdict.plain[1])}
        rows = [one.to_json() for one in self.rows]
        named = {"pictures": list(self.shown.names), "files": [str(file) for file in self.files]}
        return json.loads(json.dumps({**self.about, "verdict": {**best, **halves}, "rows": rows, **named}))  # type: ignore[no-any-return]


def point(one: Found) -> Point:
    """Return the point of a row in the chart; smaller inputs are one series, from the unreduced model down."""
    row, plain = one.row, one.row.kind != "method"
    series = "smaller input" if row.kind in ("base", "resolution") else row.name
    speed = (1.0, 1.0, 1.0) if row.kind == "base" else (row.wall.median, row.wall.low, row.wall.high)
    facts = (row.label, series, speed[0], one.score.mean, one.score.low, one.score.high, speed[1], speed[2])
    return Point(*facts, plain=plain)


def cells(one: Found) -> tuple[str, ...]:
    """Return the cells of a row in text."""
    row, base = one.row, one.row.kind == "base"
    speed = ("1", "") if base else (f"{row.wall.median:.2f}x", f"({row.wall.low:.2f}-{row.wall.high:.2f})")
    over = (NONE, "") if one.over is None else (f"{one.over.mean:+.3f}", between(one.over, signed=True))
    changed = "" if one.changed is None else f"{one.changed:.1%}"
    return (row.label, f"{row.macs / 1e9:#.3g}", *speed, f"{one.score.mean:.3f}", *over, changed)


@holds("output")
def report(
    model: str,
    /,
    *,
    data: str,
    output: Path = Path("report.html"),
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
    measure: str = "same-answer",
    speed_batch: int = 8,
    pictures: int = 12,
    reading: Reading = Reading(limit=256),  # noqa: B008 (it is frozen)
    weights: Path | None = None,
    model_args: tuple[str, ...] = (),
    setting: Setting = Setting(),  # noqa: B008 (it is frozen)
) -> ReportReport:
    """Write a page on methods for a model: verdict, scores against measured speed, token maps, failures, cost.

    The page is one HTML file that needs no network; a JSON file with the same numbers is written next to it. Random pruning,
    average pooling and smaller inputs are always among the rows.

    Args:
        model: timm name, or a directory that laconic.save wrote.
        data: images: scenes, digits, cutouts, a folder, a .tar, or a timm name.
        output: the HTML file.
        method: a method (default: tome, etps and bat, or the method of the directory).
        keep: keep rate of every reducing block (default: 0.7 and 0.5).
        options: option of the methods, as NAME=VALUE or METHOD.NAME=VALUE.
        measure: what is to be kept: the same-answer as the unreduced model, dense patch features, right labels, or pairs, as
            in laconic tune.
        speed_batch: images in a batch where speed is measured.
        pictures: pictures to draw.
        reading: images to read.
        weights: weights of the model, a file (default: timm's pretrained ones).
        model_args: argument of timm.create_model, as NAME=VALUE.
        setting: machine, and how to measure the speed.

    Raises:
        Refusal: random weights, images that cannot be read, no method, a file that cannot be written.
        LookupError, TypeError, ValueError, OSError: as `laconic.reduce_` and `laconic.data.open_images`.
        ImportError: jinja2 or vl-convert-python is not installed.
    """
    asked = {name: value for name, value in locals().items() if name not in ("model", "reading", "setting")}
    asked |= {**vars(reading), **vars(setting)}
    kind = _checked(measure, speed_batch, pictures, output)
    eval_input = open_eval_input(model, data, reading, weights, model_args)
    if eval_input.random:
        raise Refusal(f"{eval_input.weights}; fidelity to random weights means nothing. Give --weights")
    images, labels, numbers = readable(eval_input.base, eval_input, reading)
    LOG.info("reducing copies of %s, and checking each of them", model)
    chosen = method or (() if eval_input.saved is not None else METHODS)
    variants, notes = collect(eval_input, chosen, keep or KEEPS, options)
    if not any(variant.kind == "method" for variant in variants):
        raise Refusal("random pruning and average pooling are in every report; give another --method, e.g. tome")
    with machine.prepared(setting):
        found, busy = report_rows.measure(variants, images, labels, kind, class_names(eval_input), speed_batch, setting)
        environment = machine.environment(setting)
    verdict = judged(found)
    names = [f"{place + 1}, {eval_input.images.name(int(i))}" for place, i in enumerate(numbers)]
    best = verdict.best.row.label
    methods = sorted((v for v in variants if v.kind == "method"), key=lambda variant: variant.label != best)
    drawn = list(spread(len(images), pictures))
    shown = report_page.show(eval_input.base, images, names, drawn, methods, verdict.best)
    about: dict[str, Any] = {
        "model": model,
        "data": f"{data}, {reading.split}, {len(images)} images",
        "weights": eval_input.weights,
    }
    about |= {"measure": kind, "environment": environment, "command": command("report", model, asked), "commit": commit()}
    about |= {"notes": [*eval_input.notes, *scorer_notes(variants, eval_input), *notes, *busy]}
    made = ReportReport(about, tuple(found), verdict, shown, (output, output.with_suffix(".json")))
    with reported(made):
        write_atomically(output, made.page())
        write_atomically(output.with_suffix(".json"), json.dumps(made.to_json(), indent=2) + "\n")
    return made


def _checked(measure: str, speed_batch: int, pictures: int, output: Path) -> Kind:
    """Return the measure; refuse wrong values, and what would fail after the work."""
    if measure not in KINDS:
        raise Refusal(f"--measure {measure}: expected {', '.join(KINDS)}")
    if min(speed_batch, pictures) < 1:
        raise Refusal(f"--speed-batch and --pictures must be at least 1, not {min(speed_batch, pictures)}")
    if output.suffix == ".json":
        raise Refusal(f"--output {output}: give the name of an .html file; the JSON file is written next to it")
    check_output_file(output.with_suffix(".json"))
    for library in ("jinja2", "vl_convert", "PIL"):
        need(library, "report")
    return measure
