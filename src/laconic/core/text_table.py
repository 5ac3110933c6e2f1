"""Tables of plain text that fit a width: no word and no list of numbers is split inside a line of the table.

Where a table is too wide, in this order: headers and columns of prose wrap at spaces, chosen columns are printed under
their row, optional columns are left out. A table that still does not fit is printed as one paragraph for each row.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

GAP = "  "
LEAST_LABEL, LEAST_PROSE = 14, 24  # columns that wrap keep at least this number of characters, if their text is that long
INDENT = "    "


def wrap(text: str, width: int, indent: str = "", hanging: str = "") -> list[str]:
    """Return the lines of a text, broken at spaces alone; a word longer than a line has a line of its own."""
    wrapper = textwrap.TextWrapper(width, indent, hanging, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [""]


def by(sides: Iterable[int]) -> str:
    """Return the sides of a grid as text: "14 x 14"."""
    return " x ".join(map(str, sides))


def draw(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    left: int = 0,
    below: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Return the lines of a table, and the names of the columns that were left out of it.

    Args:
        header: names of the columns; none is printed if all are empty.
        rows: cells.
        width: characters in a line.
        left: columns from the first on that are set to the left and may wrap; the others are numbers, set to the right.
        below: columns to print under their row, rather than wrapped, if the table is too wide; the first to go first.
        optional: columns to leave out if that is not enough, the first to go first.
    """
    columns, under = list(range(len(header))), list[int]()
    moves = [(header.index(name), under) for name in below] + [(header.index(name), None) for name in optional]
    gone = list[str]()
    prose = [column for column in range(left) if header[column] not in below]
    while (widths := _widths(header, rows, columns, width, prose)) is None and moves:
        column, target = moves.pop(0)
        columns = [one for one in columns if one != column]
        if target is None:
            gone.append(header[column])
        else:
            target.append(column)
    if widths is None:
        return [line for row in rows for line in _record(header, row, width)], []
    return list(_lines(header, rows, columns, widths, sorted(under), width, left)), gone


def _widths(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int], width: int, prose: Sequence[int]
) -> list[int] | None:
    """Return the width of every column, or None if the columns do not fit."""
    room = width - len(GAP) * (len(columns) - 1)
    cells = [max((len(row[column]) for row in rows), default=0) for column in columns]
    whole = [max(len(header[column]), size) for column, size in zip(columns, cells, strict=True)]
    if sum(whole) <= room:
        return whole
    found = [max(_longest(header[column]), size) for column, size in zip(columns, cells, strict=True)]
    least = [
        _least(header, rows, column, size) if column in prose else size for column, size in zip(columns, found, strict=True)
    ]
    while (over := sum(found) - room) > 0:
        place = max(range(len(found)), key=lambda i: found[i] - least[i])
        if found[place] == least[place]:
            return None
        found[place] -= min(over, found[place] - least[place])
    return found


def _least(header: Sequence[str], rows: Sequence[Sequence[str]], column: int, natural: int) -> int:
    if all(text.replace(" ", "").isdecimal() for row in rows if (text := row[column])):  # a list of numbers
        return natural
    words = max(_longest(header[column]), *(_longest(row[column]) for row in rows)) if rows else _longest(header[column])
    return max(words, min(natural, LEAST_PROSE if column else LEAST_LABEL))


def _longest(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _lines(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: Sequence[int],
    widths: Sequence[int],
    under: Sequence[int],
    width: int,
    left: int,
) -> Iterator[str]:
    def line(row: Sequence[str], bottom: bool = False) -> Iterator[str]:
        parts = [
            [row[column]] if len(row[column]) <= size else wrap(row[column], size)
            for column, size in zip(columns, widths, strict=True)
        ]
        height = max(map(len, parts))
        padded = [[""] * (height - len(part)) + part if bottom else part + [""] * (height - len(part)) for part in parts]
        for texts in zip(*padded, strict=True):
            cells = zip(columns, widths, texts, strict=True)
            yield GAP.join(text.ljust(size) if column < left else text.rjust(size) for column, size, text in cells).rstrip()

    if any(header):
        yield from line(header, bottom=True)
        yield "─" * (sum(widths) + len(GAP) * (len(columns) - 1))
    for row in rows:
        yield from line(row)
        if texts := [_named(header[column], row[column]) for column in under if row[column]]:
            yield from wrap(" | ".join(texts), width, INDENT, INDENT + GAP)


def _record(header: Sequence[str], row: Sequence[str], width: int) -> Iterator[str]:
    yield from wrap(row[0], width)
    for name, text in zip(header[1:], row[1:], strict=True):
        if text:
            yield from wrap(_named(name, text), width, INDENT, INDENT + GAP)


def _named(name: str, text: str) -> str:
    return f"{name}: {text}" if name else text
