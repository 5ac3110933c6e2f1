"""The files that a command writes: checked before its work, locked until its end, and not needed for its report."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from laconic.cli.output import Report
from laconic.core.files import Refusal, check_output_file, check_output_folder
from laconic.core.locks import locked_file, locked_folder

P = ParamSpec("P")
R = TypeVar("R")


def holds(*files: str, folder: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check and lock the outputs of a command from before its work to its end.

    Args:
        files: names of the parameters that are files to write, or None.
        folder: name of the parameter that is a folder to write to.
    """

    def decorate(job: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(job)

        @functools.wraps(job)
        def command(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            with contextlib.ExitStack() as held:
                for name in (folder, *files) if os.environ.get("RANK", "0") == "0" else ():  # the main process writes
                    path, option = given.arguments.get(name), f"--{name}"
                    if path is not None and name == folder:
                        check_output_folder(path, option)
                        held.enter_context(locked_folder(path))
                    elif path is not None:
                        check_output_file(path, option)
                        held.enter_context(locked_file(path))
                return job(*args, **kwargs)

        return command

    return decorate


@contextlib.contextmanager
def reported(report: Report | Callable[[], Report]) -> Iterator[None]:
    """Write files of a report inside of this block: if that fails, the error takes the report along, to be printed.

    Raises:
        Refusal, OSError: as the block, with the attribute ``report``.
    """
    try:
        yield
    except (Refusal, OSError) as error:
        carrier: Any = error
        carrier.report = report if isinstance(report, Report) else report()
        raise
