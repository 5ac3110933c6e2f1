"""The rules of the house that a program can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import laconic

SOURCE = Path(laconic.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
OPTIONAL = {
    "timm",
    "transformers",
    "open_clip",
    "torchvision",
    "huggingface_hub",
    "tyro",
    "rich",
    "tqdm",
    "matplotlib",
    "skimage",
    "PIL",
    "sklearn",
    "datasets",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
}
CORE = [
    f for f in FILES if f.parent.name not in ("jobs", "models") and f.name not in ("cli.py", "mixin.py")
]  # those are the use
METHODS = sorted((SOURCE / "methods").glob("*.py"))


def imports(path, top_level_only=False):
    """Modules a file imports, by full name."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def name(path):
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_a_method_knows_no_host(path):
    forbidden = ("laconic.hosts", "laconic.jobs", "laconic.attach", "laconic.compression", "timm", "transformers")
    assert [m for m in imports(path) if m.startswith(forbidden)] == []


@pytest.mark.parametrize("path", sorted((SOURCE / "hosts").glob("*.py")), ids=name)
def test_a_host_knows_no_method(path):
    allowed = (
        "laconic.hosts",
        "laconic.tokens",
        "laconic.rows",
        "__future__",
        "collections",
        "dataclasses",
        "functools",
        "typing",
        "torch",
        "math",
    )
    assert [m for m in imports(path) if not m.startswith(allowed)] == []


@pytest.mark.parametrize("path", CORE, ids=name)
def test_optional_libraries_are_imported_where_used(path):
    assert [m for m in imports(path, top_level_only=True) if m.split(".")[0] in OPTIONAL] == []


@pytest.mark.parametrize("path", [f for f in FILES if f.parent.name != "jobs"], ids=name)
def test_the_library_does_not_import_its_commands(path):
    """Only the command line imports jobs, and the package never imports the scripts of the repository."""
    upwards = (
        ("benchmarks",)
        if path.name in ("cli.py", "verbs.py")
        else ("benchmarks", "laconic.jobs", "laconic.cli", "laconic.verbs")
    )
    assert [m for m in imports(path) if m.startswith(upwards)] == []


def test_layers_do_not_point_upwards():
    order = ["shapes", "rows", "tokens", "attention", "schedule", "reducer", "parts", "methods", "history", "hosts"]
    order += ["block_forward", "dense", "runtime", "compression", "readout", "patching", "verify", "attach"]
    for i, module in enumerate(order):
        path = SOURCE / module / "__init__.py" if (SOURCE / module).is_dir() else SOURCE / f"{module}.py"
        above = tuple(f"laconic.{later}" for later in order[i + 1 :])
        assert [m for m in imports(path) if m in above] == [], module


@pytest.mark.parametrize("path", FILES, ids=name)
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            start = node.body[1].lineno if documented and len(node.body) > 1 else node.lineno
            assert (node.end_lineno or 0) - start <= 45, node.name


@pytest.mark.parametrize("path", FILES, ids=name)
def test_signatures_have_one_flag_at_most(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            flags = [
                d
                for d in [*node.args.defaults, *node.args.kw_defaults]
                if isinstance(d, ast.Constant) and d.value in (True, False)
            ]
            assert len([f for f in flags if isinstance(f.value, bool)]) <= 1, node.name


@pytest.mark.parametrize("path", [f for f in FILES if f.parent.name in ("laconic", "methods", "parts", "hosts")], ids=name)
def test_no_assert_on_user_input_and_no_host_sync(path):
    text = path.read_text()
    asserts = [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assert)]
    assert len(asserts) <= 1
    if path.parent.name in ("methods", "parts") or path.name in ("tokens.py", "attention.py"):
        assert not re.search(r"\.item\(\)|\.nonzero\(|\.tolist\(|\.cpu\(\)", text)


def test_token_count_changes_in_one_place():
    """Outside tokens.py nothing builds a Tokens with rows of its own choosing."""
    for path in METHODS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
                changed = {k.arg for k in node.keywords}
                assert changed <= {"x", "gate", "columns", "alive", "attention", "notes", "shown", "aside"}, (
                    path.name,
                    changed,
                )


@pytest.mark.parametrize("row", laconic.methods().values(), ids=lambda row: row.name)
def test_a_registered_method_says_what_it_is(row):
    module = sys.modules[row.config.__module__]
    assert re.search(r"arXiv:\d{4}\.\d{5}", module.__doc__ or "")
    assert re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert row.moment in ("before", "ahead", "between", "after")
    assert row.config.__doc__
    from families import SITE as site

    assert row.config().build(site).overrides(row.moment)
    assert any(p.requires_grad for p in row.config().build(site).parameters()) == row.learns


def test_the_registry_is_in_the_public_names():
    for row in laconic.methods().values():
        assert getattr(laconic, row.config.__name__) is row.config
    assert all(hasattr(laconic, n) for n in laconic.__all__)


def test_nothing_of_a_machine_or_a_registry_is_in_the_project():
    top = SOURCE.parent.parent
    files = subprocess.run(["git", "ls-files"], cwd=top, capture_output=True, text=True, check=False).stdout.split("\n")
    pattern = re.compile(r"://[^ ]*/simple(/|\"|$)|files\.[a-z]+hosted|(^|[^A-Za-z0-9_.])/(home|root)/")
    for file in files:
        path = top / file
        if (path.is_file() and path.suffix in (".py", ".md", ".toml", ".txt", ".yaml", ".cff")) or path.name == "Makefile":
            assert not (path.name != "test_house.py" and pattern.search(path.read_text())), file
