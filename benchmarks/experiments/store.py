"""Results on disk, one JSON object per line. Processes may share a file, which they change under its lock, or be killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.experiments.cells import Cell
from laconic.core.files import append_line, json_lines, write_atomically
from laconic.core.locks import locked_file

Results = dict[Cell, dict[str, Any]]
WAIT = 60.0  # seconds for another process, which holds the lock for milliseconds


def read(path: Path, weights: str) -> Results:
    """Return the results for these weights, by cell; incomplete lines are skipped."""
    out: Results = {}
    for row in json_lines(path):
        if row["weights"] == weights:
            options = tuple((name, value) for name, value in row["options"].items())
            out[Cell(row["method"], row["keep"], options, row["steps"], row["seed"], row["data"])] = row
    return out


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one result, in a single write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(path, wait=WAIT):
        append_line(path, json.dumps(row))


def tidy(path: Path, weights: str) -> Results:
    """Rewrite the file with the results for these weights, sorted, and return them; other lines are removed.

    The file is read again under its lock: results that another process has added since stay.
    """

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["data"], row["method"], -row["keep"], json.dumps(row["options"]), row["steps"], row["seed"]

    with locked_file(path, wait=WAIT):
        results = read(path, weights)
        ordered = sorted(results.values(), key=place)
        write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in ordered))
    return results
