"""The help of a command, read from the source of its function: nothing is imported, so it is there at once.

The options themselves are parsed by tyro, from the same signature and docstring (see `laconic.cli.app.parse`).
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from laconic.cli.commands import JSON_HELP, Command
from laconic.core.text_table import wrap

KINDS = {"str": "TEXT", "int": "INT", "float": "FLOAT", "Path": "PATH"}
COLUMN = 28  # where descriptions start


@dataclass(frozen=True)
class Option:
    """A parameter of a command, as its help shows it."""

    name: str
    values: str  # empty for a flag
    positional: bool
    required: bool
    repeats: bool
    default: str  # empty if there is none to show
    text: str

    @property
    def left(self) -> str:
        """The option with its values."""
        if self.positional:
            return f"{self.name.upper()}{' ...' if self.repeats else ''}"
        return f"--{self.name.replace('_', '-')} {self.values}".rstrip()

    @property
    def right(self) -> str:
        """The description, with the default."""
        notes = ["required"] if self.required else [f"default: {self.default}"] if self.default else []
        notes += ["repeatable"] if self.repeats and not self.positional else []
        return f"{self.text} ({', '.join(notes)})" if notes else self.text


def help_text(program: str, command: Command) -> str:
    """Return usage, description, options and examples of a command."""
    module, _, name = command.job.partition(":")
    function = _definition(module, name)
    assert isinstance(function, ast.FunctionDef)
    about, _ = _docstring(function)
    options = [*_options(module, function), Option("json", "", False, False, False, "", JSON_HELP)]
    width = min(shutil.get_terminal_size().columns, 100)
    places = [option for option in options if option.positional]
    lines = wrap(f"usage: {' '.join([program, *(option.left for option in places)])} [OPTIONS]", width)
    for paragraph in about.split("\n\n"):
        lines += ["", *wrap(" ".join(paragraph.split()), width)]
    for title, group in (("arguments", places), ("options", [option for option in options if not option.positional])):
        if group:
            lines += ["", f"{title}:", *(line for option in group for line in _lines(option, width))]
    return "\n".join([*lines, "", "examples:", *(f"  {example}" for example in command.examples)])


def _lines(option: Option, width: int) -> Iterator[str]:
    left, text = f"  {option.left}", wrap(option.right, max(width - COLUMN, 20))
    if len(left) > COLUMN - 2:
        yield from wrap(left.strip(), width, "  ", " " * 6)
        left = ""
    for line in text:
        yield f"{left:<{COLUMN}}{line}".rstrip()
        left = ""


# ------------------------------------------------------------------------------------------------ the source
@cache
def _tree(module: str) -> ast.Module | None:
    """Return the syntax tree of a module of this package, or None; parents of the module are imported."""
    spec = importlib.util.find_spec(module)
    return None if spec is None or spec.origin is None else ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _definition(module: str, name: str) -> ast.stmt | ast.expr | None:
    """Return the definition of a name: a function, a class, or the value assigned to it; imports are followed."""
    tree = _tree(module)
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            return node.value
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("laconic"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name)
    return None


def _module_of(module: str, name: str) -> str:
    """Return the module in which a name is defined."""
    tree = _tree(module)
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            return _module_of(node.module, name)
    return module


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> tuple[str, dict[str, str]]:
    """Return the description of a docstring, and the texts of its section Args by name."""
    text = ast.get_docstring(node) or ""
    about, _, rest = text.partition("\n\nArgs:\n")
    section = re.split(r"\n\n\w+:\n", rest)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", section, re.MULTILINE)
    return re.split(r"\n\nRaises:\n", about)[0], {name: " ".join(words.split()) for name, words in entries}


# ------------------------------------------------------------------------------------------------ the options
def _options(module: str, function: ast.FunctionDef) -> Iterator[Option]:
    texts, arguments = _docstring(function)[1], function.args
    first = len(arguments.posonlyargs) - len(arguments.defaults)
    defaults = [None] * first + list(arguments.defaults)
    for argument, default in zip(arguments.posonlyargs, defaults, strict=True):
        yield _option(module, argument.arg, argument.annotation, default, texts, True)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if isinstance(default, ast.Call) and isinstance(default.func, ast.Name):
            kind = _definition(module, default.func.id)
            if isinstance(kind, ast.ClassDef):  # its fields are options of the command
                given = {keyword.arg: keyword.value for keyword in default.keywords}
                yield from _fields(_module_of(module, default.func.id), kind, given)
                continue
        yield _option(module, argument.arg, argument.annotation, default, texts, False)


def _fields(module: str, kind: ast.ClassDef, given: dict[str | None, ast.expr]) -> Iterator[Option]:
    texts = _docstring(kind)[1]
    for name in given:  # the command's own default takes the place of that in the text
        texts[str(name)] = re.sub(r" \(default: [^)]*\)", "", texts.get(str(name), ""))
    for node in kind.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            yield _option(module, name, node.annotation, given.get(name, node.value), texts, False)


def _option(
    module: str, name: str, annotation: ast.expr | None, default: ast.expr | None, texts: dict[str, str], positional: bool
) -> Option:
    values, repeats = _values(module, annotation)
    shown = "" if default is None else _shown(module, default)
    required = default is None and not (positional and repeats)
    return Option(name, values, positional, required, repeats, shown, texts.get(name, ""))


def _values(module: str, annotation: ast.expr | None) -> tuple[str, bool]:
    """Return the values that an annotation takes, and True if the option repeats."""
    if isinstance(annotation, ast.BinOp):  # X | None
        return _values(module, annotation.left)
    if isinstance(annotation, ast.Subscript):
        head, inside = ast.unparse(annotation.value), annotation.slice
        if head == "Literal":
            words = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            return f"{{{','.join(str(ast.literal_eval(word)) for word in words)}}}", False
        if head == "tuple" and isinstance(inside, ast.Tuple):
            return _values(module, inside.elts[0])[0], True
    if isinstance(annotation, ast.Name):
        if annotation.id == "bool":
            return "", False
        if annotation.id in KINDS:
            return KINDS[annotation.id], False
        found = _definition(module, annotation.id)
        if isinstance(found, ast.expr):
            return _values(module, found)
    return "VALUE", False


def _shown(module: str, default: ast.expr) -> str:
    """Return a default as it is typed; empty for None, False, and empty text or tuples."""
    if isinstance(default, ast.Name):
        found = _definition(module, default.id)
        return "" if not isinstance(found, ast.expr) else _shown(module, found)
    if isinstance(default, ast.Call) and default.args:  # Path("...")
        default = default.args[0]
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)
    return "" if value is None or value is False or value in ("", ()) else str(value)
