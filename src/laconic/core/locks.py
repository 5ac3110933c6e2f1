"""Locks of outputs: while a command writes a file or a folder, no other one may; the lock of a dead process is no lock."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laconic.core.files import Refusal, lives, remove_leftovers

FOLDER_LOCK = ".laconic.lock"
ORPHANS = 15.0  # seconds until the workers of a killed process, which hold its lock too, have noticed and ended


@contextlib.contextmanager
def locked_file(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file, and of those of the same stem next to it; its folder must exist.

    Args:
        path: the file.
        wait: seconds to wait for another process.

    Raises:
        Refusal: another process holds it.
    """
    target = Path(os.path.realpath(path))
    with _locked(target.with_name(f".{target.stem}.lock"), path, wait):
        remove_leftovers(target.parent, target.stem, own=wait == 0)  # who waits adds rows, and may hold more in this folder
        yield


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created; it is removed again if nothing was written to it.

    Raises:
        Refusal: another process holds it.
    """
    folder = Path(os.path.realpath(path))
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / FOLDER_LOCK, path, 0.0):
            for place in (folder, *(one for one in folder.iterdir() if one.is_dir())):
                remove_leftovers(place, own=True)
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for one in made:
                one.rmdir()


@contextlib.contextmanager
def _locked(lock: Path, path: Path, wait: float) -> Iterator[None]:
    from filelock import FileLock, Timeout

    holder = FileLock(lock, timeout=wait)
    try:
        try:
            holder.acquire(poll_interval=0.02)
        except Timeout:
            if not _is_dead(lock):
                raise
            holder.acquire(timeout=ORPHANS, poll_interval=0.02)
    except Timeout as error:
        raise Refusal(
            f"{path}: {_owner(lock)} writes to it; wait until it has ended, stop it, or choose another --output"
        ) from error
    try:
        with contextlib.suppress(OSError):  # on a full disk: the lock holds without the note
            lock.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "command": " ".join(sys.argv)}) + "\n")
        yield
    finally:
        with contextlib.suppress(OSError):  # first removed, then released: who waits for the removed file takes a new one
            lock.unlink()
        holder.release()


def _is_dead(lock: Path) -> bool:
    """Return True if the process that noted that it holds a lock was on this machine and is gone."""
    try:
        note = json.loads(lock.read_text())
        return note["host"] == platform.node() and not lives(int(note["pid"]))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _owner(lock: Path) -> str:
    """Return the process that holds a lock, in words."""
    try:
        note: dict[str, Any] = json.loads(lock.read_text())
        where = "" if note["host"] == platform.node() else f" on {note['host']}"
        return f"process {note['pid']}{where} ({note['command'][:120]})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
