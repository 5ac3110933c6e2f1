"""The README and the pages: numbers are those of the committed results, links and names resolve, commands are accepted.

Wording is free: only table cells, links, code and commands are compared.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import laconic
from benchmarks import (
    backbones,
    before_blocks,
    export_page,
    methods_table,
    performance,
    plan_page,
    readme,
    scaling,
    tables,
    tune_page,
)
from benchmarks.experiments import store
from benchmarks.experiments.cells import fingerprint
from benchmarks.experiments.tables import TABLES, Reader
from benchmarks.real_model import page as real_model_page
from laconic.cli import app as cli

TOP = Path(__file__).parents[1]
RESULTS = TOP / "results"
README = TOP / "README.md"
PAGES = [README, TOP / "CONTRIBUTING.md", *sorted((TOP / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def rows(text):
    """The cells of every table row, without markup."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines]


def numbers(text):
    """The numbers of every table row that has any."""
    found = [tuple(re.findall(r"\d+(?:[.,]\d+)*", " ".join(row))) for row in rows(text)]
    return [row for row in found if row]


def fenced(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


# ------------------------------------------------------------------------------------------------ numbers
def load(name):
    return json.loads((RESULTS / name).read_text())


MADE = {
    "performance.md": lambda: performance.page(
        {
            name: load(f"performance-{name}.json")
            for name in performance.SUITES
            if (RESULTS / f"performance-{name}.json").is_file()
        },
        performance.peers_of(RESULTS),
    ),
    "before-blocks.md": lambda: before_blocks.text_of(before_blocks.committed()),
    "scaling.md": lambda: scaling.page(load("scaling.json")),
    "plan.md": lambda: plan_page.page(sorted(RESULTS.glob("plan-*.json"))),
    "tune.md": tune_page.page,
    "export.md": lambda: export_page.page(load("export.json")),
    "evidence.md": real_model_page.page,
    "evidence-scenes.md": lambda: "\n".join(
        [
            *(table(Reader(store.read(RESULTS / "evidence.jsonl", fingerprint()))) for table in TABLES.values()),
            readme.demo_table(load("demo-scenes.json")),
        ]
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_tables_hold_the_numbers_of_the_committed_results(name):
    assert numbers((TOP / "docs" / name).read_text()) == numbers(MADE[name]())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "module"), [("macs.md", tables), ("backbones.md", backbones)])
def test_tables_hold_the_numbers_that_their_command_writes(name, module, tmp_path):
    module.main([str(tmp_path / name)])
    assert numbers((TOP / "docs" / name).read_text()) == numbers((tmp_path / name).read_text())


def test_the_readme_holds_the_numbers_of_the_committed_runs():
    runs = readme.read_runs()
    assert "/tmp" not in json.dumps(runs)
    shown = numbers(README.read_text())
    for row in numbers(readme.photographs_table(runs[0])):
        assert row in shown


def test_the_tables_of_the_readme_are_written_into_their_places(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in readme.PAGES:
        (tmp_path / page).write_text(re.sub(r"\| `?(etps|random)\b.*\n", "", (TOP / page).read_text()))
    readme.main([str(tmp_path)])
    for page, names in readme.PAGES.items():
        assert set(numbers("\n".join(map(readme.block, names)))) <= set(numbers((tmp_path / page).read_text()))
    with pytest.raises(ValueError, match="<!-- demo -->"):
        readme.filled("# Laconic", ["demo"])


def test_the_page_of_methods_holds_the_numbers_of_the_committed_results():
    """The page may be older than the registry, and then says of how many methods it is."""
    text, found = (TOP / "docs" / "methods.md").read_text(), methods_table.read(RESULTS / "methods.jsonl")
    listed = {row[0]: row for row in rows(text) if row[0] in laconic.methods()}
    for name, row in listed.items():
        cells = ["–" if cell is None else cell for cell in methods_table.numbers(name, found)]
        assert row[-len(cells) :] == cells, name
    assert f"{len(listed)} methods" in text
    assert "`laconic list`" in text


def test_the_readme_names_methods_of_the_registry():
    block = re.search("<!-- methods -->(.*)<!-- /methods -->", README.read_text(), re.S)[1]
    for name, what, *_ in rows(block)[2:]:
        assert laconic.methods()[name].paper in what
    assert "`laconic list`" in block


# ------------------------------------------------------------------------------------------------ links, names, commands
@each_page
def test_links_resolve(page):
    for link in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"`((?:src|tests|docs|results|benchmarks)/[\w/.-]+)`", page.read_text()):
        assert (TOP / file).exists(), file


@each_page
def test_named_functions_exist(page):
    for name in set(re.findall(r"(?<![.\w-])laconic\.([A-Za-z_]+)\(", page.read_text())):
        assert hasattr(laconic, name), name
    for module, names in re.findall(r"^from (laconic[\w.]*) import ([\w, ]+)$", page.read_text(), re.M):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), (module, name)


@each_page
def test_commands_are_accepted(page):
    for line in "\n".join(fenced(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["laconic"]:
            assert words[1] in cli.COMMANDS, line
            cli.parse("laconic", cli.COMMANDS[words[1]], words[2:])


@pytest.mark.parametrize("page", [*PAGES, TOP / "Makefile"], ids=lambda page: page.name)
def test_modules_that_are_run_exist(page):
    for module in set(re.findall(r"python -m ((?:laconic|benchmarks)[\w.]*\w)", page.read_text())):
        assert importlib.util.find_spec(module), module


def test_every_script_that_makes_a_page_can_be_run():
    for page in PAGES:
        for module in re.findall(r"^Generated by `python -m ([\w.]+)", page.read_text(), re.M):
            assert callable(importlib.import_module(module).main)


def code_of(text):
    """The syntax tree of a module without its docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@pytest.mark.parametrize(("page", "files"), [("new-method.md", 2), ("new-backbone.md", 1)])
def test_shown_code_is_that_of_its_file(page, files):
    shown = re.findall(r"<!-- (\S+) -->\n```python\n(.*?)\n```", (TOP / "docs" / page).read_text(), re.S)
    assert len(shown) == files
    for name, text in shown:
        assert code_of((TOP / name).read_text()) == code_of(text), name
