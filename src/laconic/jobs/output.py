"""What every job returns and how it is written: tables for people, JSON for programs, files that are whole or absent."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NONE = "–"  # in a table, where there is no value
NARROWEST = 132  # columns, where the output is no terminal


class Refusal(Exception):
    """What was asked for cannot be done; the message says what was found, what was expected and what to do."""


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


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of one JSON object a line, without lines that were cut off; none where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or, if anything fails, as it was before.

    Raises:
        Refusal: the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror or error}; choose another --output") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
