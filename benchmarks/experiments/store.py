"""Results on disk, one JSON object per line. Each line is appended in one write: processes may share a file or be killed."""

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
    torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    line = ("\n" if torn else "") + json.dumps(row) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def tidy(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rewrite the file with ``rows``, sorted; incomplete lines and those of other weights are removed."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["data"], row["method"], -row["keep"], json.dumps(row["options"]), row["steps"], row["seed"]

    ordered = sorted(rows, key=place)
    write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in ordered))
