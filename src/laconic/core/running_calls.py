"""The calls of reduced models that are running (see `laconic.core.runtime.Call`)."""

from __future__ import annotations

import threading
from typing import Any


class Running(threading.local):
    """The calls of reduced models that are running on a thread (`laconic.core.runtime.Call`), outermost first."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


on_thread = Running()
traced: list[Any] = []  # replaces ``on_thread`` while torch.compile traces, which cannot read threading.local


def calls() -> list[Any]:
    """Return the calls that are running on this thread, outermost first."""
    return traced or on_thread.calls
