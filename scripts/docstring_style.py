"""Count docstrings that open as a question, and words that the project's language rules exclude (see CONTRIBUTING.md).

    python scripts/docstring_style.py            # a summary
    python scripts/docstring_style.py --list     # every place, as file:line: text

Exit code 1 if more than 1 % of the docstrings open as a question, or an excluded word occurs.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).parents[1]
FOLDERS = ("src/laconic", "benchmarks", "scripts")
PAGES = ("README.md", "CONTRIBUTING.md", "docs")
QUESTION = re.compile(
    r"(what|who|whom|whose|which|whether|where|when|why|how|if|that which|those (of|that|which)|that of)\b", re.IGNORECASE
)
EXCLUDED = re.compile(
    r"\b(nobody|whoever|beside|anew|likewise|so many|house|books?|moments?|listeners?|guests?)\b", re.IGNORECASE
)
NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PROSE = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
LIMIT = 0.01


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, NODES) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def files(top: Path = TOP) -> list[Path]:
    """Return the Python files that are checked."""
    return [path for folder in FOLDERS for path in sorted((top / folder).rglob("*.py"))]


def pages(top: Path = TOP) -> list[Path]:
    """Return the pages that are checked for excluded words."""
    found = [top / name for name in PAGES]
    return [page for path in found for page in (sorted(path.rglob("*.md")) if path.is_dir() else [path])]


def questions(paths: list[Path]) -> tuple[list[str], int]:
    """Return the docstrings that open as a question, as file:line: text, and the number of all docstrings."""
    every = [(path, line, text) for path in paths for line, text in docstrings(path)]
    found = [f"{path}:{line}: {text.splitlines()[0]}" for path, line, text in every if QUESTION.match(text)]
    return found, len(every)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a page; of a Python file its comments and its strings of several words."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text().splitlines(), 1)
        return
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in PROSE and " " in token.string:
                yield from enumerate(token.string.splitlines(), token.start[0])


def excluded(paths: list[Path]) -> list[str]:
    """Return the lines with an excluded word, as file:line: text."""
    lines = [(path, number, line) for path in paths for number, line in prose(path)]
    return [f"{path}:{number}: {line.strip()}" for path, number, line in lines if EXCLUDED.search(line)]


def main() -> int:
    """Print the counts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every place")
    given = parser.parse_args()
    own = [path for path in files() if path != Path(__file__).resolve()]
    found, total = questions(own)
    words = excluded([*own, *pages()])
    if given.list:
        print("\n".join([*found, *words]))
    share = f"{len(found)} of {total} docstrings ({len(found) / total:.1%}) open as a question"
    print(f"{share}; {len(words)} lines have excluded words")
    return int(len(found) > LIMIT * total or bool(words))


if __name__ == "__main__":
    sys.exit(main())
