"""Read and write files of results: JSON lines, atomic writes, and the error for a request that cannot be carried out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PART = ".laconic-part"  # the end of the name of a file or folder that is being written
LEFTOVER = re.compile(rf"\.(?:(.*)\.)?(\d+)-\w+{re.escape(PART)}")  # the file's name and the process
LITTLE = 65536  # bytes free, or fewer: a library that failed then had no room, whatever its error says
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
FULL_WORDS = {  # in errors of libraries
    "no space left": errno.ENOSPC,
    "os error 28": errno.ENOSPC,
    "file too large": errno.EFBIG,
    "os error 27": errno.EFBIG,
    "disk quota exceeded": getattr(errno, "EDQUOT", errno.ENOSPC),
}


class Refusal(Exception):
    """The request cannot be carried out; the message says what was found, what was expected and what to do."""


class Unwritable(Refusal, OSError):
    """A file cannot be written; the message names the file, and on a full disk the sizes needed and free."""


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object a line; skip truncated lines. Empty if there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


# ------------------------------------------------------------------------------------------------ before the work
def check_output_file(path: Path | None, option: str = "--output") -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Raises:
        Refusal: its folder does not exist or cannot be written, or it is a folder itself, or a device.
    """
    if path is None:
        return
    if path.is_dir():
        raise Refusal(f"{option} {path}: this is a folder; give the name of a file in it")
    if path.exists() and not path.is_file():
        raise Refusal(f"{option} {path}: this is no regular file; give the name of a file (--json prints the report)")
    if not path.parent.is_dir():
        raise Refusal(f"{option} {path}: there is no folder {path.parent}; create it, or choose another {option}")
    _try_to_write(Path(os.path.realpath(path)).parent, f"{option} {path}")


def check_output_folder(path: Path, option: str = "--output") -> None:
    """Refuse a folder that can be neither written nor created, before the work that it is for.

    Raises:
        Refusal: it is a file, or it or the folder to create it in cannot be written.
    """
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise Refusal(f"{option} {path}: {there} is a file; {option} takes a directory")
    _try_to_write(there, f"{option} {path}")


def _try_to_write(folder: Path, option: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{os.getpid()}-", suffix=PART):
            pass
    except OSError as error:
        raise Refusal(f"{option}: {folder} cannot be written: {error.strerror or error}; choose another place") from error


def check_room(path: Path, size: int) -> None:
    """Refuse to begin a file of ``size`` bytes where fewer are free.

    Raises:
        Unwritable: the message names both sizes.
    """
    space = _space(path)
    if space is not None and space.free < size:
        raise unwritable(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), size)


# ------------------------------------------------------------------------------------------------ writing
def write_atomically(path: Path, content: str | bytes | memoryview, *, sync: bool = False) -> None:
    """Write a file atomically: it is complete or, if anything fails, unchanged. Of a symbolic link, the target is written.

    With ``sync``, this holds also if the machine stops: the bytes are on the disk before the file has its name.

    Raises:
        Unwritable: the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    with writing(path, len(data)):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.{os.getpid()}-", suffix=PART)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            follow_umask(Path(name))
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a file in one write, also after a truncated one; the folder is created.

    Raises:
        Unwritable: the file cannot be written.
    """
    with writing(path, len(line) + 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            data = f"{chr(10) * torn}{line}\n".encode()
            if os.write(file.fileno(), data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turn errors of writing ``path``, of about ``size`` bytes, into `Unwritable`; those of libraries only on a full disk.

    Raises:
        Unwritable: the file cannot be written.
    """
    try:
        yield
    except Unwritable:
        raise
    except Exception as error:
        space = _space(path)
        if isinstance(error, OSError) or is_full(error) or (space is not None and space.free < LITTLE):
            raise unwritable(path, error, size) from error
        raise


@contextlib.contextmanager
def unfinished(path: Path, size: int) -> Iterator[Path]:
    """Create a temporary folder next to the file ``path``, of about ``size`` bytes, to be moved from there when done.

    Raises:
        Unwritable: there is no room, or it cannot be written.
    """
    folder = path.parent
    with writing(path, size):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        place = tempfile.TemporaryDirectory(dir=folder, prefix=f".unfinished.{os.getpid()}-", suffix=PART)
    with place as name:
        check_room(path, size)
        yield Path(name)


def follow_umask(path: Path) -> None:
    """Set the mode of a file to what the umask says; temporary files and those of safetensors are private at first."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


# ------------------------------------------------------------------------------------------------ a full disk
def is_full(error: BaseException) -> bool:
    """Return True if an error, of the system or of a library, says that there is no room left on a disk."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(words in str(error).lower() for words in FULL_WORDS)


def unwritable(path: Path, error: BaseException, size: int | None = None) -> Unwritable:
    """Return the refusal for a file that cannot be written, in one sentence."""
    space, path = _space(path), Path(*(part for part in path.parts if not part.endswith(PART)))
    if isinstance(error, OSError) and not is_full(error):
        reason = error.strerror or error
        return Unwritable(f"{path} cannot be written: {reason}; choose another --output")
    needed = "" if size is None else f"; {in_words(size)} are needed"
    free = "" if space is None else f"{' and' if needed else ';'} {in_words(space.free)} are free"
    said = next((number for words, number in FULL_WORDS.items() if words in str(error).lower()), errno.ENOSPC)
    reason = os.strerror(error.errno if isinstance(error, OSError) and error.errno else said)
    return Unwritable(f"{path} cannot be written: {reason}{needed}{free}; make room there, or choose another --output")


def _space(path: Path) -> Any:
    """Return the space of the disk that a path is on, or None where the system does not know."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    try:
        space = shutil.disk_usage(there)
    except OSError:
        return None
    return space if space.total else None


def in_words(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size:,} bytes"


# ------------------------------------------------------------------------------------------------ killed writes
def remove_leftovers(folder: Path, stem: str = "", *, own: bool = False) -> None:
    """Remove what killed writes have left in a folder.

    Args:
        folder: the folder.
        stem: only leftovers of files whose names begin so.
        own: also those under this process's number: in containers, it is often that of the process before.
    """
    for path in folder.glob(f".*{PART}"):
        parts = LEFTOVER.fullmatch(path.name)
        if parts is None or not (parts[1] or "").startswith(stem):
            continue
        process = int(parts[2])
        if own if process == os.getpid() else not lives(process):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def lives(process: int) -> bool:
    """Return True unless there surely is no process of that number on this machine."""
    if os.name != "posix":  # elsewhere os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
