"""A collection of pictures to embed: files of a folder, members of tar files, rows of parquet files, or a list of files.

Only names and positions are in memory. The order is always the same: by name in folders and tar files (numbers by value, as in
`laconic.data.layout.natural`), and as they stand in parquet files and lists.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from laconic.core import limits
from laconic.core.optional_deps import need
from laconic.data.layout import is_clutter, is_hidden, is_image, natural, walk
from laconic.data.sizes import Unreadable, check_bytes, read_bytes
from laconic.data.tar import members

COLUMNS = ("image", "picture", "bytes", "jpg", "jpeg", "png")  # of parquet files, in the order in which they are looked for
GROUP_BYTES = 2**31  # of a row group of a parquet file, which is read as a whole


class Collection(ABC):
    """Pictures by their numbers; ``place`` is what was given, ``ids`` their names, and ``ignored`` other files there."""

    def __init__(self, place: Path, ids: list[str], ignored: int = 0) -> None:
        self.place, self.ids, self.ignored = place, ids, ignored
        if not ids:
            raise ValueError(f"there are no pictures in {place}; {ignored} other files are there")

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def source(self, i: int) -> str:
        """Return the file that holds picture ``i``, below the place that was given."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """Return the content of the file of picture ``i``.

        Raises:
            OSError, Unreadable: it cannot be read.
        """

    def content(self, i: int) -> bytes | Unreadable:
        """Return the content of the file of picture ``i``, or the reason why it cannot be read."""
        try:
            return self.read(i)
        except Unreadable as error:
            return error
        except OSError as error:
            return Unreadable(self.ids[i], f"its file cannot be read: {error.strerror or error}")

    def digest(self) -> str:
        """Return a hash of the names of all pictures in their order."""
        out = hashlib.sha256()
        for name in self.ids:
            out.update(f"{name}\n".encode("utf-8", "surrogateescape"))
        return out.hexdigest()[:16]


class Files(Collection):
    """Files below a folder; the id is the path below it."""

    def __init__(self, place: Path, folder: Path, ids: list[str], ignored: int = 0) -> None:
        super().__init__(place, ids, ignored)
        self.folder = folder

    @classmethod
    def below(cls, folder: Path) -> Files:
        """Return the images below a folder; hidden folders and clutter of systems are not looked at."""
        found, ignored = list[str](), 0
        for parts, _, names in walk(folder, [], set()):
            if any(map(is_hidden, parts)):
                continue
            images = [name for name in names if is_image(name) and not is_clutter(name)]
            found += [os.path.join(*parts, name) for name in images]
            ignored += sum(not is_clutter(name) for name in names) - len(images)
        return cls(folder, folder, sorted(found, key=natural), ignored)

    @classmethod
    def listed(cls, file: Path) -> Files:
        """Return the files that a text file names, one a line, relative to its folder."""
        lines = file.read_text(encoding="utf-8").splitlines()
        return cls(file, file.parent, [line.strip() for line in lines if line.strip()])

    def source(self, i: int) -> str:
        return self.ids[i]

    def read(self, i: int) -> bytes:
        return read_bytes(self.folder / self.ids[i], self.ids[i])


class Tars(Collection):
    """Members of tar files; the id is the path in the tar, below the tar's own name if there are several."""

    def __init__(self, place: Path, tars: list[Path]) -> None:
        found = [(m, tar) for tar in tars for m in members(tar, tar.stem if len(tars) > 1 else "") if m.size >= 0]
        images = [(m, tar) for m, tar in found if is_image(m.path) and not is_clutter(os.path.basename(m.path))]
        images.sort(key=lambda item: (natural(item[0].path), str(item[1])))
        self.members = [member for member, _ in images]
        super().__init__(place, [member.path for member in self.members], len(found) - len(images))

    def source(self, i: int) -> str:
        return _below(self.members[i].tar, self.place)

    def read(self, i: int) -> bytes:
        member = self.members[i]
        check_bytes(self.ids[i], member.size)
        with open(member.tar, "rb") as file:
            file.seek(member.start)
            data = file.read(member.size)
        if len(data) < member.size:
            raise Unreadable(self.ids[i], f"{member.tar} ends before the end of this picture")
        return data


class Rows(Collection):
    """Rows of parquet files; the id is that of the column ``id`` or of the picture's ``path``, else the file and the row."""

    def __init__(self, place: Path, files: list[Path]) -> None:
        pq = need("pyarrow.parquet", "embed")
        self.rows, ids = list[tuple[Path, int, int]](), list[str]()  # file, row group, row in it
        self.columns = dict[Path, str]()
        for file in files:
            with pq.ParquetFile(file) as opened:
                column, name = _columns(opened.schema_arrow, file)
                self.columns[file], start, source = column, 0, _below(file, place)
                for group in range(opened.num_row_groups):
                    count = opened.metadata.row_group(group).num_rows
                    self.rows += [(file, group, row) for row in range(count)]
                    ids += _ids(opened, group, name, [f"{source}#{start + row}" for row in range(count)])
                    start += count
        self._held: tuple[tuple[Path, int], Any] | None = None
        super().__init__(place, ids)

    def source(self, i: int) -> str:
        return _below(self.rows[i][0], self.place)

    def read(self, i: int) -> bytes:
        file, group, row = self.rows[i]
        if self._held is None or self._held[0] != (file, group):
            self._held = (file, group), self._group(file, group)
        value = self._held[1][row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is None:
            raise Unreadable(self.ids[i], "the row has no picture")
        return value

    def _group(self, file: Path, group: int) -> Any:
        pq, arrow = need("pyarrow.parquet", "embed"), need("pyarrow", "embed")
        try:
            with pq.ParquetFile(file) as opened:
                size = opened.metadata.row_group(group).total_byte_size
                limits.check(f"{file}: a row group has", size, GROUP_BYTES)
                return opened.read_row_group(group, columns=[self.columns[file]]).column(0)
        except (arrow.ArrowException, limits.TooLarge) as error:
            raise Unreadable(str(file), f"{file} cannot be read: {error}") from error


def _columns(schema: Any, file: Path) -> tuple[str, str]:
    """Return the columns of the pictures and of their ids; the latter is empty if there is none.

    Raises:
        ValueError: there is no column of pictures, or more than one.
    """
    arrow = need("pyarrow", "embed")

    def holds(kind: Any) -> bool:
        if arrow.types.is_struct(kind):
            return any(field.name == "bytes" and holds(field.type) for field in kind)
        return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)

    binary = [field.name for field in schema if holds(field.type)]
    known = [name for name in COLUMNS if name in binary] or binary
    if not known or (known == binary and len(binary) > 1 and known[0] not in COLUMNS):
        raise ValueError(
            f"{file} has the columns {', '.join(schema.names)}; expected one of bytes of image files, called {COLUMNS[0]}"
        )
    nested = arrow.types.is_struct(schema.field(known[0]).type)
    paths = nested and any(field.name == "path" for field in schema.field(known[0]).type)
    return known[0], "id" if "id" in schema.names else f"{known[0]}.path" if paths else ""


def _ids(opened: Any, group: int, name: str, plain: list[str]) -> list[str]:
    if not name:
        return plain
    column = opened.read_row_group(group, columns=[name]).column(0).to_pylist()
    values = [value.get("path") if isinstance(value, dict) else value for value in column]
    return [own if value is None else str(value) for value, own in zip(values, plain, strict=True)]


def _below(file: Path, place: Path) -> str:
    return file.name if file == place else os.path.relpath(file, place)


def open_collection(place: Path) -> Collection:
    """Open the pictures of a folder, of a .tar or .parquet file or a folder of these, or of a list (.txt).

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: there are no pictures, or a file is damaged or of another kind.
        ImportError: pyarrow is not installed.
    """
    if not place.exists():
        raise FileNotFoundError(
            f"there is nothing at {place}; expected a folder of pictures, a .tar, a .parquet, or a list .txt"
        )
    ending, kinds = place.suffix.lower(), {".tar": Tars, ".parquet": Rows}
    if place.is_dir():
        archives = {kind: sorted(place.glob(f"*{kind}"), key=lambda file: natural(file.name)) for kind in kinds}
        found = {kind: files for kind, files in archives.items() if files}
        pictures = any(is_image(name) for parts, _, names in walk(place, [], set()) for name in names)
        if len(found) + pictures > 1:
            there = " and ".join([*(f"{len(files)} {kind}" for kind, files in found.items()), *["pictures"] * pictures])
            raise ValueError(f"{place} holds {there}; give a folder of one kind")
        return next((kinds[kind](place, files) for kind, files in found.items()), None) or Files.below(place)
    if ending == ".txt":
        return Files.listed(place)
    if ending in kinds:
        return kinds[ending](place, [place])
    raise ValueError(f"{place} is not a folder, a .tar, a .parquet or a list .txt")
