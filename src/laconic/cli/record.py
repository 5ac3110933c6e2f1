"""The files of a sweep: rows are written as soon as they are computed, and read again when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import laconic
from laconic.cli.scores import Score, to_csv
from laconic.core.files import Refusal, write_atomically

Key = tuple[str, float | None, str]  # name, keep rate, options as JSON


class Record:
    """Rows in a CSV file and, with the runs that found them, in a JSON file next to it.

    Args:
        path: the CSV file.
        question: the facts that all rows must agree in.

    Raises:
        Refusal: the JSON file is there and holds something else, or another question.
    """

    def __init__(self, path: Path, question: dict[str, Any]) -> None:
        self.path, self.json_path, self.question = path, path.with_suffix(".json"), question
        self.rows, self.runs = dict[Key, Score](), list[dict[str, Any]]()
        self.notes, self.weights, self.run = list[str](), "", dict[str, Any]()
        if self.json_path.exists():
            self._read()

    def _read(self) -> None:
        try:
            old = json.loads(self.json_path.read_text(encoding="utf-8"))
            theirs, rows, self.runs = old["question"], [Score.of_json(row) for row in old["rows"]], list(old["runs"])
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise Refusal(
                f"{self.json_path} exists and is not the record of a sweep ({error}); choose another --output, or move it away"
            ) from error
        unlike = [name for name in self.question if theirs.get(name) != self.question[name]]
        if unlike:
            differs = "; ".join(f"{name} {theirs.get(name)!r} there, {self.question[name]!r} here" for name in unlike)
            raise Refusal(f"{self.json_path} holds another sweep ({differs}); choose another --output, or move it away")
        self.rows = {(row.name, row.keep, json.dumps(row.options, sort_keys=True)): row for row in rows}

    def begin(self, command: str, environment: dict[str, Any]) -> None:
        """Note the command, the machine and the commit of this run; they are written with its first row."""
        self.run = {"command": command, "commit": commit(), "environment": environment}

    def add(self, key: Key, row: Score, order: Sequence[Key]) -> None:
        """Add or replace a row, and write both files."""
        if not any(run is self.run for run in self.runs):
            self.runs.append(self.run)
        self.rows[key] = dataclasses.replace(row, run=len(self.runs) - 1)
        self.write(order)

    def write(self, order: Sequence[Key]) -> None:
        """Write both files, each whole or not at all.

        Raises:
            Refusal: one cannot be written.
        """
        rows = self.ordered(order)
        write_atomically(self.json_path, json.dumps(self.to_json(rows), indent=2) + "\n")
        write_atomically(self.path, to_csv(self.question["model"], rows))

    def ordered(self, order: Sequence[Key]) -> list[Score]:
        """Return the rows in this order, and after them those of earlier runs that were not asked for now."""
        asked = [self.rows[key] for key in order if key in self.rows]
        return asked + [row for key, row in self.rows.items() if key not in set(order)]

    def to_json(self, rows: Sequence[Score]) -> dict[str, Any]:
        """Return all of it as plain JSON; ``run`` of a row is an index of ``runs``."""
        facts = {"question": self.question, "weights": self.weights, "notes": self.notes, "runs": self.runs}
        return {**facts, "rows": [row.to_json() for row in rows]}


def commit(folder: Path = Path(laconic.__file__).parent) -> str:
    """Return the commit of the code, with a note if it was changed since, or else the version."""

    def git(*words: str) -> str | None:
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        try:
            done = subprocess.run(
                ["git", *words], cwd=folder, env=quiet, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed; the repository around it is another one
        return f"version {laconic.__version__}"
    changed = git("status", "--porcelain", "--untracked-files=no", ".")
    return f"{git('rev-parse', 'HEAD')}{' and changes' if changed else ''}"
