"""The accuracy of every class and the confusion matrices of an evaluation: tables, CSV files and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from laconic.analysis.per_class import ClassScore, Confusion
from laconic.cli.output import NONE, Table, csv_text
from laconic.cli.plots import check_matplotlib
from laconic.core.files import write_atomically

HEADER = ("", "images", "top-1 %", "(95 %)", "change", "precision %", "taken for")
PRINTED = 30  # classes in a printed table
NAMED, NUMBERED = 50, 20  # classes up to which a picture has their names, and the counts
EXPLAINED = (
    "Of every class: top-1 is the share of its images that get it, precision the share of the images that get it and are of "
    "it, taken for the class that its images get most often by mistake. Balanced accuracy is the mean of the classes' top-1."
)
Named = tuple[tuple[str, Confusion], ...]  # the confusion matrix of each row of an evaluation, by its label


def tables(found: Named) -> Iterator[str | Table]:
    """Yield a table of the classes for each row of an evaluation, and an explanation; changes are to the first row."""
    first = found[0][1].scores()
    for label, confusion in found:
        scores = list(zip(confusion.scores(), first, strict=True))
        title = f"{label}: balanced accuracy {_percent(confusion.balanced)} %"
        if len(scores) > PRINTED:
            scores = sorted(scores, key=lambda pair: 2.0 if pair[0].top1 is None else pair[0].top1)[:PRINTED]
            title += f"; the {PRINTED} of {len(first)} classes with the lowest top-1 (--output and --json have all)"
        rows = tuple(_cells(own, None if label == found[0][0] else base) for own, base in scores)
        yield Table(title, HEADER, rows, optional=("precision %", "taken for"))
    yield EXPLAINED


def _cells(score: ClassScore, base: ClassScore | None) -> tuple[str, ...]:
    spread = "" if score.interval is None else "({:.1f}-{:.1f})".format(*(share * 100 for share in score.interval))
    known = base is not None and base.top1 is not None and score.top1 is not None
    change = f"{((score.top1 or 0) - (base.top1 or 0)) * 100:+.2f}" if known and base is not None else ""
    taken = f"{score.taken_for} ({score.taken})" if score.taken else ""
    return (score.name, f"{score.images:,}", _percent(score.top1), spread, change, _percent(score.precision), taken)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share * 100:.2f}"


def to_json(found: Named) -> list[dict[str, Any]]:
    """Return everything as plain JSON."""
    return [
        {
            "variant": label,
            "balanced_accuracy": confusion.balanced,
            "classes": [score.to_json() for score in confusion.scores()],
            "confusion": {"answers": list(confusion.names), "counts": confusion.rows()},
        }
        for label, confusion in found
    ]


# ------------------------------------------------------------------------------------------------ files
def write(output: Path, found: Named, title: str) -> list[Path]:
    """Write the files next to ``output``; return them.

    One CSV file has the accuracies of all classes; every row of the evaluation has its confusion matrix as CSV and as PNG.

    Raises:
        Refusal: matplotlib is not there, or a file cannot be written.
    """
    files = [output.with_name(f"{output.stem}.classes.csv")]
    lines = [_line(label, score) for label, confusion in found for score in confusion.scores()]
    write_atomically(files[0], csv_text(lines))
    for label, confusion in found:
        stem = f"{output.stem}.confusion.{label.replace(' ', '-')}"
        matrix, picture = output.with_name(f"{stem}.csv"), output.with_name(f"{stem}.png")
        write_atomically(matrix, matrix_csv(confusion))
        write_atomically(picture, draw(confusion, f"{label}, {title}"))
        files += [matrix, picture]
    return files


def _line(label: str, score: ClassScore) -> dict[str, Any]:
    low, high = score.interval or (None, None)
    shares = {"top1": score.top1, "top1_low": low, "top1_high": high, "precision": score.precision}
    percent = {name: None if share is None else round(share * 100, 3) for name, share in shares.items()}
    facts = {"variant": label, "class": score.name, "images": score.images}
    return {**facts, **percent, "taken_for": score.taken_for, "taken": score.taken}


def matrix_csv(confusion: Confusion) -> str:
    """Return a confusion matrix as CSV: a line for every true class, a column for every answer."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true class", *confusion.names])
    writer.writerows([name, *row] for name, row in zip(confusion.classes, confusion.rows(), strict=True))
    return text.getvalue()


def draw(confusion: Confusion, title: str) -> bytes:
    """Draw a confusion matrix as PNG; colours are shares of the images of the true class.

    Raises:
        Refusal: matplotlib is not there.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, many = confusion.rows(), len(confusion.classes)
    side = min(14.0, 4 + 0.3 * many)
    figure = Figure(figsize=(side, side), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    shares = [[count / max(1, sum(row)) for count in row] for row in rows]
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=axes, shrink=0.7, label="share of the images of the true class")
    axes.set(xlabel="answer", ylabel="true class")
    axes.set_title(title, fontsize=9)
    if many <= NAMED:
        axes.set_xticks(range(len(confusion.names)), _plain(confusion.names), rotation=90, fontsize=8)
        axes.set_yticks(range(many), _plain(confusion.classes), fontsize=8)
    if many <= NUMBERED:
        for y, row in enumerate(rows):
            for x, count in enumerate(row):
                axes.text(
                    x, y, f"{count}", ha="center", va="center", fontsize=8, color="white" if shares[y][x] > 0.5 else "black"
                )
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _plain(names: Sequence[str]) -> list[str]:
    """Return names in which no dollar sign starts a formula."""
    return [name.replace("$", r"\$") for name in names]
