"""The report of a job: tables for people, JSON for programs."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NONE = "–"  # in a table, where there is no value
NARROWEST = 132  # columns, where the output is no terminal


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first ``words`` columns are set to the left, the others to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1

    def draw(self) -> Any:
        """The table as rich draws it."""
        from rich import box
        from rich.table import Table as Drawn
        from rich.text import Text

        look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "pad_edge": False}
        drawn = Drawn(title=Text(self.title), show_header=any(self.header), **look)
        for number, name in enumerate(self.header):
            drawn.add_column(Text(name), justify="left" if number < self.words else "right", overflow="fold")
        for row in self.rows:
            drawn.add_row(*map(Text, row))
        return drawn


class Report(ABC):
    """What a job found out."""

    @abstractmethod
    def parts(self) -> Iterator[str | Table]:
        """Paragraphs and tables, in the order in which a person reads them."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All of it, as plain JSON."""

    def __str__(self) -> str:
        text = io.StringIO()
        self.write(text)
        return text.getvalue().rstrip()

    def write(self, file: Any) -> None:
        """Print to a text file or a terminal."""
        from rich.console import Console

        console = Console(file=file, highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = max(console.width, NARROWEST)
        for part in self.parts():
            console.print(part.draw() if isinstance(part, Table) else part, soft_wrap=not isinstance(part, Table))


def csv_text(lines: Sequence[dict[str, Any]]) -> str:
    """Lines of the same keys as CSV, with those keys as the header; None is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of markdown; a dash stands for None."""
    lines = [header, ["---"] * len(header), *rows]
    texts = [[NONE if cell is None else str(cell) for cell in cells] for cells in lines]
    return "\n".join("|" + "".join(f" {text} |" if text else " |" for text in cells) for cells in texts)


def sentence(items: Sequence[str]) -> str:
    """Items as a list in a sentence: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
