"""Plots: of a sweep, accuracy against multiply-adds and measured speed; of `laconic tune`, the score against measured speed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from laconic.cli.scores import Score
from laconic.core.files import Refusal, write_atomically
from laconic.planning.tuned import Tuned, TunedRow

Against = Literal["GMACs", "speed"]
LABELS = {"GMACs": "multiply-adds of one image (G)", "speed": "measured speed (x the unreduced model, median)"}
PLAIN = ("--", "0.55")  # of rows without a method: dashed, grey
MARKERS = "os^Dvph*XP"


def check_matplotlib() -> None:
    """Refuse before hours of work, if matplotlib is missing.

    Raises:
        Refusal: matplotlib is not there.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Refusal('drawing needs matplotlib: pip install "laconic[demo]"') from error


def lines_of(rows: Sequence[Score], against: Against) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return the points (x, top-1, low, high; in per cent) of every name, by rising x."""
    out = dict[str, list[tuple[float, float, float, float]]]()
    for row in rows:
        x = (row.macs or 0) / 1e9 if against == "GMACs" else row.ratio[1] if row.ratio else None
        if x is not None:
            name = "lower resolution" if row.kind == "resolution" else row.name
            out.setdefault(name, []).append((x, row.top1 * 100, row.interval[0] * 100, row.interval[1] * 100))
    return {name: sorted(points) for name, points in out.items()}


def plot(path: Path, rows: Sequence[Score], against: Against, title: str) -> Path:
    """Draw accuracy with its 95 % intervals, a line for every name, as PNG.

    Raises:
        Refusal: matplotlib is not there, or the file cannot be written.
    """
    figure, axes = _figure()
    kinds = {("lower resolution" if row.kind == "resolution" else row.name): row.kind for row in rows}
    for number, (name, points) in enumerate(lines_of(rows, against).items()):
        x, y, low, high = zip(*points, strict=True)
        method = kinds[name] == "method"
        style, shade = ("-", f"C{number % 10}") if method else PLAIN
        below, above = ([b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)])
        colour = "black" if kinds[name] == "base" else shade
        look = {"linestyle": style, "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "capsize": 2, "elinewidth": 0.8}
        axes.errorbar(x, y, yerr=(below, above), color=colour, label=name, zorder=3 if method else 2, **look)
    axes.set(xlabel=LABELS[against], ylabel="top-1 (%)", title=title)
    return _written(path, figure, axes)


def plot_tuned(path: Path, tuned: Tuned, measure: str, title: str) -> Path:
    """Draw the held-out scores of a `Tuned` with their 95 % intervals against measured speed, as PNG.

    Smaller inputs, the unreduced model among them, are a dashed line; the chosen row is drawn in black.

    Raises:
        Refusal: matplotlib is not there, or the file cannot be written.
    """
    figure, axes = _figure()
    rows = sorted(tuned.rows, key=lambda row: row.speed.median)
    inputs = [row for row in rows if series_of(row) == "smaller input"]
    groups = {"smaller input": inputs} | {
        name: [row for row in rows if series_of(row) == name and row != tuned.best]
        for name in dict.fromkeys(map(series_of, rows))
        if name != "smaller input"
    }
    if tuned.best not in inputs:
        groups[f"chosen: {tuned.best.name}"] = [tuned.best]
    for number, (name, group) in enumerate((name, group) for name, group in groups.items() if group):
        y = [row.score.mean for row in group]
        yerr = ([row.score.mean - row.score.low for row in group], [row.score.high - row.score.mean for row in group])
        xerr = ([row.speed.median - row.speed.low for row in group], [row.speed.high - row.speed.median for row in group])
        plain = group is inputs
        colour = PLAIN[1] if plain else "black" if group == [tuned.best] else f"C{number % 10}"
        look = {"linestyle": PLAIN[0] if plain else "", "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        x = [row.speed.median for row in group]
        axes.errorbar(x, y, yerr=yerr, xerr=xerr, color=colour, label=name, capsize=2, elinewidth=0.8, **look)
    axes.set(xlabel=LABELS["speed"], ylabel=measure, title=title)
    return _written(path, figure, axes)


def series_of(row: TunedRow) -> str:
    """Return the name under which rows of one kind are drawn."""
    name = "smaller input" if row.method is None else str(row.method["name"])
    return name if row.repaired is None else f"{name}, repaired"


def _figure() -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _written(path: Path, figure: Any, axes: Any) -> Path:
    """Write a figure to a PNG file, with a grid and a legend."""
    axes.grid(color="0.9")
    axes.legend(fontsize=8, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomically(path, data.getvalue())
    return path
