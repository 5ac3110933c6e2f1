"""Read and write files of results: JSON lines, atomic writes, and the error for a request that cannot be carried out."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


class Refusal(Exception):
    """The request cannot be carried out; the message says what was found, what was expected and what to do."""


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object a line; skip truncated lines. Empty if there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def check_output_file(path: Path | None, option: str = "--output") -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Raises:
        Refusal: its folder does not exist or cannot be written, or it is a folder itself.
    """
    if path is None:
        return
    if path.is_dir():
        raise Refusal(f"{option} {path}: this is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise Refusal(f"{option} {path}: there is no folder {path.parent}; create it, or choose another {option}")
    _try_to_write(path.parent, f"{option} {path}")


def check_output_folder(path: Path, option: str = "--output") -> None:
    """Refuse a folder that can be neither written nor created, before the work that it is for.

    Raises:
        Refusal: it is a file, or it or the folder to create it in cannot be written.
    """
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise Refusal(f"{option} {path}: {there} is a file; choose another {option}")
    _try_to_write(there, f"{option} {path}")


def _try_to_write(folder: Path, option: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".laconic-"):
            pass
    except OSError as error:
        raise Refusal(f"{option}: {folder} cannot be written: {error.strerror or error}; choose another place") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: it is complete or, if anything fails, unchanged.

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
