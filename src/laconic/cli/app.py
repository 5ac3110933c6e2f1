"""The command line. The options of a command are the parameters of its function, with the texts of its docstring.

Help, the version and errors of usage need the standard library alone; a command imports torch when it runs.

Reports go to stdout, as tables or with ``--json`` as pure JSON; progress and logs go to stderr. Exit codes: 0, 1 for a
refusal (one paragraph on stderr), 2 for wrong usage, 128 and the signal's number where one stopped the command (130: Ctrl-C,
141: the reader of stdout has closed it), and 3 where `laconic embed` could not read some pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from laconic import __version__
from laconic.cli.commands import COMMANDS, HTML_HELP, JSON_HELP, MOVED, Command
from laconic.core import signals
from laconic.core.optional_deps import missing
from laconic.core.suggestions import nearest_names

EXTRAS = {
    **dict.fromkeys(("tyro", "tqdm", "timm", "PIL"), "cli"),
    **dict.fromkeys(("skimage", "matplotlib"), "demo"),
    **dict.fromkeys(("accelerate", "sklearn", "torchvision"), "train"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "openvino"), "export"),
    **dict.fromkeys(("jinja2", "vl_convert"), "report"),
    "datasets": "datasets",
    "pyarrow": "embed",
    "ray": "ray",
    "webdataset": "webdataset",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["--version"], ["-V"]):
        print(f"laconic {__version__}")
        return 0
    if words[:1] in (["--help"], ["-h"]):
        print(usage())
        return 0
    if words[:1] and words[0] in MOVED:
        print(f"laconic {words[0]} is now `{MOVED[words[0]]}`, run in a clone of the repository.", file=sys.stderr)
        return 2
    if not words or words[0] not in COMMANDS:
        wrong = f"laconic has no command {words[0]!r}.{nearest_names(words[0], list(COMMANDS))}\n\n" if words else ""
        print(f"{wrong}{usage()}", file=sys.stderr)
        return 2
    return run(f"laconic {words[0]}", COMMANDS[words[0]], words[1:])


def usage() -> str:
    """Return the help of the whole: all commands."""
    lines = "\n".join(f"  {name:<8}{command.line}" for name, command in COMMANDS.items())
    return (
        "usage: laconic COMMAND [...]\n\nFewer tokens, same answer: token reduction for vision transformers.\n\n"
        f"{lines}\n\nlaconic COMMAND --help lists its options, with examples. laconic --version."
    )


def run(program: str, command: Command, words: list[str]) -> int:
    """Run a command under the name ``program``; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("laconic").setLevel(logging.INFO)
    with signals.interruptible() as noted:
        try:
            return _run(program, command, words)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 2
        except signals.Stopped as stopped:
            if stopped.detail or main_process():
                print(f"{program}: {stopped}", file=sys.stderr)
            return stopped.code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if noted.number:  # libraries turn an interrupt into errors of their own
                print("interrupted", file=sys.stderr)
                return 128 + noted.number
            message = refusal(error)
            if message is None or os.environ.get("LACONIC_TRACEBACK"):
                raise
            print(f"{program}: {message}", file=sys.stderr)
            return 1


def _run(program: str, command: Command, words: list[str]) -> int:
    """Run a command, print its report, also where only its files could not be written, and return the report's exit code."""
    job, as_json = parse(program, command, words)
    unwritten = None
    with contextlib.redirect_stdout(sys.stderr):  # prints of libraries are not the report
        try:
            report = job()
        except Exception as error:
            report, unwritten = getattr(error, "report", None), error
            if report is None:
                raise
    if report is not None:  # of several processes that train, the main one reports
        _print(report, as_json)
    if unwritten is not None:
        raise unwritten
    return 0 if report is None else int(report.exit_code)


def _print(report: Any, as_json: bool) -> None:
    """Write a report to stdout.

    Raises:
        Refusal: stdout cannot be written.
        SystemExit: its reader has closed it, as ``head`` does; with the code of SIGPIPE, and without a message.
    """
    from laconic.core.files import Refusal

    try:
        if as_json:
            print(json.dumps(report.to_json(), indent=2))
        else:
            report.write(sys.stdout)
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # what is left in the buffer would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + 13) from error
        raise Refusal(f"the report cannot be written to stdout: {error.strerror or error}; send it elsewhere") from error


def _with_page(file: Path, line: str, job: Callable[[], Any]) -> Any:
    """Run a command's job and write its report as a page; what would fail after the work is refused before it."""
    from laconic.cli import page

    page.check(file)
    report = job()
    if report is not None:  # of several processes that train, the main one reports
        page.write(file, report, line)
    return report


def main_process() -> bool:
    """Return True unless a launcher started this process as another one than the first."""
    return os.environ.get("RANK", "0") == "0"


def refusal(error: Exception) -> str | None:
    """Return the message for an error of the user, in one paragraph; None for a fault of the program."""
    from laconic.core.files import Refusal, is_full, unwritable

    if not isinstance(error, Refusal) and is_full(error):
        name = getattr(error, "filename", None)
        return str(unwritable(Path(name if isinstance(name, str) else tempfile.gettempdir()), error))
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(module)
        return missing(module, extra) if extra else None
    if isinstance(error, KeyError) or not isinstance(error, Refusal | ValueError | TypeError | LookupError | OSError):
        return None
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------ parsing
def parse(program: str, command: Command, words: list[str]) -> tuple[Callable[[], Any], bool]:
    """Return the command's function with its arguments, and True if JSON is asked for. Exits after wrong usage."""
    import tyro

    module, _, function = command.job.partition(":")
    job = getattr(importlib.import_module(module), function)
    try:
        return tyro.cli(
            with_json(job, f"{program} {shlex.join(words)}" if command.page else None),
            prog=program,
            args=words,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:
        if stop.code in (0, None) and {"-h", "--help"} & set(words):
            print("examples:", *(f"  {example}" for example in command.examples), sep="\n")
        raise


def with_json(job: Callable[..., Any], line: str | None = None) -> Callable[..., tuple[Callable[[], Any], bool]]:
    """Return a function for tyro with the parameters of a job, ``--json`` and, unless ``line`` is None, ``--html``.

    ``line`` is the command as typed. Tuples with a default are options that repeat.
    """
    import tyro

    def command(*args: Any, json: bool = False, html: Path | None = None, **kwargs: Any) -> tuple[Callable[[], Any], bool]:
        work = partial(job, *args, **kwargs)
        return work if html is None else partial(_with_page, html, line or "", work), json

    hints, parameters = typing.get_type_hints(job), []
    for parameter in inspect.signature(job).parameters.values():
        hint = hints[parameter.name]
        if parameter.kind is parameter.POSITIONAL_ONLY:
            hint = Annotated[hint, tyro.conf.arg(metavar=parameter.name.upper())]
        elif isinstance(parameter.default, tuple):
            hint = Annotated[hint, tyro.conf.UseAppendAction]
        elif dataclasses.is_dataclass(parameter.default):
            hint = Annotated[hint, tyro.conf.arg(name="")]  # its fields are options of the command
        parameters.append(parameter.replace(annotation=hint))
    flag = Annotated[bool, tyro.conf.arg(help=JSON_HELP)]
    parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=flag))
    if line is not None:
        page = Annotated[Path | None, tyro.conf.arg(help=HTML_HELP)]
        parameters.append(inspect.Parameter("html", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=page))
    vars(command).pop("__wrapped__", None)  # where the tests check types by decorators, tyro would look beneath them
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = job.__doc__
    return command


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # before and after the command
    sys.exit(main())
