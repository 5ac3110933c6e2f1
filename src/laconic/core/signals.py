"""Signals that ask a command to stop: Ctrl-C, and SIGTERM and SIGUSR1 of schedulers and spot machines."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop; ``detail`` says what was kept and how to continue."""

    def __init__(self, number: int, detail: str = "") -> None:
        super().__init__(number, detail)
        self.number, self.detail = number, detail

    @property
    def code(self) -> int:
        """The exit code, as that of a process that the signal ends."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{f' {self.detail}' if self.detail else ''}"


@dataclass
class Noted:
    """The signal that came, or 0."""

    number: int = 0

    def note(self, number: int, _: Any = None) -> None:
        """Note a signal."""
        self.number = number


def stop(number: int, _: Any = None) -> None:
    """Handle a signal by raising `Stopped`."""
    raise Stopped(number)


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], Any], numbers: tuple[int, ...] = STOPPING) -> Iterator[None]:
    """Handle signals by ``handler`` inside of the block; outside of the main thread, change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextlib.contextmanager
def interruptible() -> Iterator[Noted]:
    """Raise KeyboardInterrupt at Ctrl-C and `Stopped` at other signals, and note them; a second Ctrl-C exits at once.

    Libraries turn a KeyboardInterrupt into other errors: with a signal noted, an error is no fault of the program. One that
    is raised in a finalizer or in a callback of a weak reference, where Python ignores errors, is raised again after it.
    """
    noted, process = Noted(), os.getpid()

    def handle(number: int, _: Any = None) -> None:
        if os.getpid() != process:  # a worker that has only just begun
            leave_to_main_process()
            return
        if noted.number and number == signal.SIGINT:
            os._exit(130)
        if noted.number:
            return  # it stops already
        noted.note(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def again(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            if not noted.number:  # what breaks while stopping follows from the stop
                hook(unraisable)
            return
        number = unraisable.exc_value.number if isinstance(unraisable.exc_value, Stopped) else signal.SIGINT
        noted.number = 0
        threading.Timer(0.02, os.kill, (os.getpid(), number)).start()  # a signal now would be ignored like the first

    hook, sys.unraisablehook = sys.unraisablehook, again
    try:
        with handling(handle, (signal.SIGINT, *STOPPING)):
            yield noted
    finally:
        sys.unraisablehook = hook


def leave_to_main_process() -> None:
    """Set the signals of a worker process: the main process gets them too, and ends the worker when it has stopped.

    SIGTERM ends the worker after half a minute: a scheduler sends it to all processes, and the main one needs the worker
    until it has finished its step.
    """
    for number in (signal.SIGINT, *STOPPING):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
