"""The report of a command: tables and paragraphs for people, JSON for programs."""

from __future__ import annotations

import csv
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.core.text_table import draw, wrap
from laconic.report.chart import Chart

NONE = "–"  # in a table, where there is no value
WIDTH = 132  # characters in a line of a table, where the output is no terminal


class Verbatim(str):
    """Text to copy, such as a recipe: its lines are printed as they are."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first ``words`` columns are set to the left, the others to the right.

    Where the table is too wide, the columns ``below`` are printed under their row and then the ``optional`` ones left out.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    below: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def lines(self, width: int) -> Iterator[str]:
        """Yield the table as lines that fit a width."""
        yield from wrap(self.title, width) if self.title else ()
        drawn, gone = draw(self.header, self.rows, width, left=self.words, below=self.below, optional=self.optional)
        yield from drawn
        if gone:
            yield from wrap(f"Not shown at this width: {', '.join(gone)}. --json has all columns.", width)


class Report(ABC):
    """The result of a command."""

    @property
    def exit_code(self) -> int:
        """The exit code of the command."""
        return 0

    @abstractmethod
    def parts(self) -> Iterator[str | Table | Chart]:
        """Yield paragraphs, tables and charts (which only a page shows), in the order in which a person reads them."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""

    def __str__(self) -> str:
        text = io.StringIO()
        self._write(text, None)
        return text.getvalue().rstrip()

    def write(self, file: Any) -> None:
        """Print to a terminal, or to a text file, in which paragraphs are not wrapped (unless COLUMNS is set)."""
        self._write(file, width_of(file))

    def _write(self, file: Any, width: int | None) -> None:
        before: str | Table | None = None
        for part in self.parts():
            if isinstance(part, Chart):
                continue
            if isinstance(part, Table):
                file.write("\n" * isinstance(before, str) + "".join(f"{line}\n" for line in part.lines(width or WIDTH)) + "\n")
            elif width is None or isinstance(part, Verbatim):
                file.write(f"{part}\n")
            else:
                file.write("".join(f"{line}\n" for text in part.split("\n") for line in wrap(text, width)))
            before = part


def width_of(file: Any) -> int | None:
    """Return the characters in a line, from COLUMNS or of the terminal; None where neither is known."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(file.fileno()).columns or None
    except (OSError, ValueError, AttributeError):  # no terminal, no file
        return None


def csv_text(lines: Sequence[dict[str, Any]]) -> str:
    """Return lines of the same keys as CSV, with those keys as the header; None is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table of markdown; a dash stands for None."""
    lines = [header, ["---"] * len(header), *rows]
    texts = [[NONE if cell is None else str(cell) for cell in cells] for cells in lines]
    return "\n".join("|" + "".join(f" {text} |" if text else " |" for text in cells) for cells in texts)


def sentence(items: Sequence[str]) -> str:
    """Return items as a list in a sentence: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
