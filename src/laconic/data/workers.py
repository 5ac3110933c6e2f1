"""Processes that read images: their signals, and the shared memory that they need."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from laconic.core import signals
from laconic.core.files import Refusal, in_words

SHARED = Path("/dev/shm")
AHEAD = 2  # batches that torch's workers prepare, each
MESSAGES = ("shared memory", "bus error", "/torch_", "shm_open")  # in torch's errors where it is full


def begin(_: int) -> None:
    """Set up a worker; for ``worker_init_fn`` of a DataLoader.

    If the main process is interrupted while it takes a batch, the thread of a worker that hands over the shared memory finds
    its connection closed. That is no error of the worker, and it prints nothing.
    """
    signals.leave_to_main_process()
    said = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            said(kind, error, trace)

    sys.excepthook = hook


def check_shared_memory(workers: int, batch: int) -> None:
    """Refuse workers whose batches, of ``batch`` bytes, do not fit into shared memory: the system would kill them.

    Raises:
        Refusal: there is less room than for the batches that the workers prepare.
    """
    free = _free()
    if workers and free is not None and free < workers * AHEAD * batch:
        raise Refusal(_small(f"{workers} workers prepare batches of {in_words(workers * AHEAD * batch)} there"))


def batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a loader.

    Raises:
        Refusal: its workers have no shared memory left.
    """
    try:
        yield from loader
    except (RuntimeError, OSError) as error:
        if any(words in str(error).lower() for words in MESSAGES):
            raise Refusal(_small("the processes that read images need more")) from error
        raise


def _small(why: str) -> str:
    free = _free()
    room = "" if free is None else f" ({in_words(free)} free)"
    return f"{SHARED} is too small{room}: {why}; use --workers 0 or a smaller batch, or enlarge it (docker run --shm-size=2g)"


def _free() -> int | None:
    try:
        space = os.statvfs(SHARED)
    except (OSError, AttributeError):  # not on this system
        return None
    return space.f_bavail * space.f_frsize
