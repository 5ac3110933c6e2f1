"""The tables of the fine-tuned rows, from the results so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.statistics import Estimate, accuracy, difference
from benchmarks.real_model.measure import unpacked
from benchmarks.real_model.trained import (
    KEEPS,
    OUTPUT,
    POLICIES,
    SEEDS,
    SMALLER,
    STEPS,
    STEPS_OF_BAT,
    TRAINED,
    UNTRAINED,
    Cell,
)
from laconic.cli.output import NONE, markdown
from laconic.core.files import json_lines

PAIRS = (("etps", "evit"), ("dtps", "dynamicvit"), ("bat", "evit"), ("evit", "dynamicvit"), ("etps", "random"))


class Reader:
    """Look up results by cell."""

    def __init__(self, path: Path) -> None:
        self.lines = {line["key"]: line for line in json_lines(path)}

    def runs(
        self, method: str, keep: float = 1.0, options: Any = (), steps: int = STEPS, **more: Any
    ) -> dict[int, dict[str, Any]]:
        """Return the results of a cell by seed."""
        cells = (Cell(method, keep, options, seed, steps=steps, **more) for seed in (SEEDS if steps else (0,)))
        return {cell.seed: self.lines[cell.key] for cell in cells if cell.key in self.lines}

    def accuracy(self, *cell: Any, **more: Any) -> str:
        """Return the accuracy with its interval over seeds and pictures, and the multiply-adds."""
        runs = self.runs(*cell, **more)
        if not runs:
            return NONE
        macs = next(iter(runs.values()))["macs"]
        return f"{accuracy([_correct(line) for line in runs.values()])} ({macs / 1e9:.2f} G)"

    def difference(self, one: Sequence[Any], other: Sequence[Any]) -> str:
        """Return the paired difference on the seeds that both have; bold if its interval excludes zero."""
        a, b = self.runs(*one), self.runs(*other)
        both = sorted(a.keys() & b.keys())
        if not both:
            return NONE
        found: Estimate = difference([_correct(a[s]) for s in both], [_correct(b[s]) for s in both])
        text = f"{found.mean:+.1f} ± {found.half:.1f}"
        return f"**{text}**" if found.clear else text


def _correct(line: dict[str, Any]) -> list[int]:
    return unpacked(line["correct"], line["pictures"]).astype(int).tolist()


def tables(path: Path = OUTPUT) -> str:
    """Return all tables."""
    read = Reader(path)
    parts = [_sweep(read), _policies(read), _steps(read)]
    return "\n\n".join(parts)


def _sweep(read: Reader) -> str:
    head = ["right, % (multiply-adds)", *(f"keep {keep:g}" for keep in KEEPS)]
    rows = [[f"{name}, fine-tuned", *(read.accuracy(name, keep) for keep in KEEPS)] for name in TRAINED]
    rows += [[f"{one} − {two}", *(read.difference((one, keep), (two, keep)) for keep in KEEPS)] for one, two in PAIRS]
    for name in UNTRAINED:
        rows.append([f"{name}, not fine-tuned", *(read.accuracy(name, keep, (), 0) for keep in KEEPS)])
    empty = [""] * (len(KEEPS) - 1)
    rows.append(["unreduced, fine-tuned as long", read.accuracy(""), *empty])
    rows.append(["unreduced, before", read.accuracy("", 1.0, (), 0), *empty])
    rows += [[f"input {size}, fine-tuned", read.accuracy("", size=size), *empty] for size in SMALLER]
    return markdown(head, rows)


def _policies(read: Reader) -> str:
    head = ["random scores instead of its own, points", *(f"keep {keep:g}" for keep in KEEPS)]
    rows = []
    for name in POLICIES:
        cells = []
        for keep in KEEPS:
            runs = [line for line in read.runs(name, keep).values() if "random_policy" in line]
            if not runs:
                cells.append(NONE)
                continue
            own = [_correct(line) for line in runs]
            chance = [_correct({**line, **line["random_policy"]}) for line in runs]
            found = difference(chance, own)
            cells.append(f"{found.mean:+.1f} ± {found.half:.1f}")
        rows.append([name, *cells])
    return markdown(head, rows)


def _steps(read: Reader) -> str:
    least = KEEPS[-1]
    head = [f"parts of BAT, keep {least:g}", "right, %"]
    rows = []
    for method, options in STEPS_OF_BAT:
        name = "".join([method, *(f", {option}={value}" for option, value in options)])
        rows.append([name, read.accuracy(method, least, options)])
    rows.append(["evit", read.accuracy("evit", least)])
    rows.append(["bat", read.accuracy("bat", least)])
    return markdown(head, rows)
