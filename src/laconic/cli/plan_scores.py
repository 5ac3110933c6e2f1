"""Scores of a search of ``laconic plan``, in a file of one JSON object a line, so that the search can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laconic.core.files import Refusal, json_lines
from laconic.core.schedule import Schedule
from laconic.planning.latency import Table


class Scores:
    """Scores by schedule, and the table of times that the search uses.

    Args:
        path: the file; None: nothing is saved.
        question: the facts that a file must agree in to be resumed.

    Raises:
        Refusal: the file holds another search.
    """

    def __init__(self, path: Path | None, question: dict[str, Any]) -> None:
        self.path, self.question = path, json.loads(json.dumps(question))
        self.known = dict[Schedule, float]()
        self.table: Table | None = None
        self.computed = 0
        rows = [] if path is None else json_lines(path)
        self.begun = bool(rows)
        if rows:
            first = rows.pop(0)
            theirs = first.get("question", {})
            unlike = [name for name in self.question if theirs.get(name) != self.question[name]]
            if unlike:
                raise Refusal(
                    f"{path} holds another search (its {', '.join(unlike)} differ); choose another --output, or move it"
                )
            self.table = None if first["table"] is None else Table.of_json(first["table"])
            self.known = {Schedule.of(row["schedule"]): row["score"] for row in rows}

    def begin(self, table: Table | None) -> None:
        """Write the table of times that the search uses."""
        if not self.begun:
            self._add({"question": self.question, "table": None if table is None else table.to_json()})

    def remember(self, score: Callable[[Schedule], float]) -> Callable[[Schedule], float]:
        """Return the same function, which computes each score once."""

        def remembered(schedule: Schedule) -> float:
            if schedule not in self.known:
                self.known[schedule] = score(schedule)
                self.computed += 1
                self._add({"schedule": schedule.to_json(), "score": self.known[schedule]})
            return self.known[schedule]

        return remembered

    def _add(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise Refusal(f"{self.path} cannot be written: {error.strerror or error}; choose another --output") from error
