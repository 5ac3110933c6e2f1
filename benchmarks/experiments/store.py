"""Results on disk: one JSON object a line, appended whole, so that several processes may write and any may be stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.experiments.cells import Cell
from laconic.core.files import json_lines, write_atomically

Results = dict[Cell, dict[str, Any]]


def read(path: Path, weights: str) -> Results:
    """The results that belong to these weights, by cell; a line that was cut off is left out."""
    out: Results = {}
    for row in json_lines(path):
        if row["weights"] == weights:
            options = tuple((name, value) for name, value in row["options"].items())
            out[Cell(row["method"], row["keep"], options, row["steps"], row["seed"], row["data"])] = row
    return out


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one result; the line is written in one call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    line = ("\n" if torn else "") + json.dumps(row) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def tidy(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write results anew, sorted, without lines that are cut off or belong to other weights."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["data"], row["method"], -row["keep"], json.dumps(row["options"]), row["steps"], row["seed"]

    ordered = sorted(rows, key=place)
    write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in ordered))
