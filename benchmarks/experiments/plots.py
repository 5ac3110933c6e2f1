"""The plots of docs/evidence-scenes.md."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.claims import ALTERNATIVES, CUTS, DIVERSITY
from benchmarks.experiments.statistics import accuracy
from benchmarks.experiments.tables import Reader
from laconic.core.files import write_atomically
from laconic.core.optional_deps import need


def _drawn(path: Path, width: float, paint: Callable[[Any], None]) -> None:
    """Draw one pair of axes and write the figure."""
    need("matplotlib", "demo").use("Agg")
    figure_type = need("matplotlib.figure", "demo").Figure
    figure = figure_type(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot()
    paint(axes)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    write_atomically(path, content.getvalue())


def draw_sweep(path: Path, read: Reader, groups: Sequence[Sequence[str]], keeps: Sequence[float]) -> None:
    """Plot accuracy against the keep rate, with the plain alternatives in grey."""

    def paint(axes: Any) -> None:
        names = [name for group in groups for name in group]
        for number, name in enumerate((*names, *ALTERNATIVES)):
            points = [(keep, value) for keep in keeps if (value := read.accuracy(name, keep)) is not None]
            if not points:
                continue
            plain = name in ALTERNATIVES
            look = {"color": "0.6", "linestyle": (":", "--", "-.")[number % 3]} if plain else {"marker": "o", "markersize": 4}
            x, y = [keep for keep, _ in points], [value.mean for _, value in points]
            axes.errorbar(x, y, [value.half for _, value in points], label=name, capsize=2, **look)
        axes.invert_xaxis()
        axes.set_xlabel("keep rate of each of three stages")
        axes.set_ylabel("top-1, %")

    _drawn(path, 6.4, paint)


def draw_diversity(path: Path, read: Reader) -> None:
    """Plot accuracy against the diversity score, with a line for each criterion and a point for each keep rate."""

    def paint(axes: Any) -> None:
        kinds = (("importance", "topk", ()), ("diversity", "bat", DIVERSITY), ("both", "bat", ()), ("random", "random", ()))
        for label, name, options in kinds:
            found = [(read.runs(name, keep, options), read.accuracy(name, keep, options)) for keep in (0.7, 0.5, 0.3)]
            points = [(sum(row["diversity"] for row in rows) / len(rows), value.mean) for rows, value in found if value]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axes.set_xlabel("diversity score of the last tokens (BAT eq. 4)")
        axes.set_ylabel("top-1, %")

    _drawn(path, 5.2, paint)


def draw_toy(path: Path, read: Reader) -> None:
    """Plot the accuracy of the kept tokens, that of the others, and the bonus."""

    def paint(axes: Any) -> None:
        lines: dict[str, list[tuple[float, float]]] = {"kept": [], "dropped": [], "only dropped (bonus)": []}
        for keep in CUTS:
            kept, others = read.outcomes("attended-once", keep, (), 0), read.outcomes("others-once", keep, (), 0)
            if kept and others:
                only = [[int(not a and b) for a, b in zip(kept[0], others[0], strict=True)]]
                for line, runs in zip(lines.values(), (kept, others, only), strict=True):
                    line.append((1 - keep, accuracy(runs).mean))
        for name, points in lines.items():
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set_xlabel("share of the tokens that is cut")
        axes.set_ylabel("top-1, %")

    _drawn(path, 5.2, paint)
