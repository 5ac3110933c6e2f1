"""The rules of the house that a program can check."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import laconic

SOURCE = Path(laconic.__file__).parent
TOP = Path(__file__).parents[1]
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
    "webdataset",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "pyarrow",
    "ray",
    "daft",
    "fastapi",
    "jinja2",
    "vl_convert",
}
# the folders (and api.py) from the bottom up: each imports from itself and from those before it
LAYERS = (
    "core",
    "backbones",
    "methods",
    "api",
    "data",
    "analysis",
    "checkpoints",
    "models",
    "planning",
    "exporting",
    "training",
    "embed",
    "report",
    "play",
    "cli",
)
# imports inside of functions that go up: `reduce_` plans and times where it is asked to, and calibration reduces again
UPWARD = {
    ("api.py", "laconic.analysis.break_even"),
    ("api.py", "laconic.planning"),
    ("methods/patch_slimming/calibration.py", "laconic.api"),
}
LIBRARY = [f for f in FILES if f.parent.name not in ("cli", "models") and f.name != "hub_mixin.py"]  # those use them
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
def test_a_method_knows_no_backbone(path):
    forbidden = ("laconic.backbones", "laconic.core.backbone", "laconic.core.token_reduction", "timm", "transformers")
    assert [m for m in imports(path) if m.startswith(forbidden)] == []


@pytest.mark.parametrize("path", sorted((SOURCE / "backbones").glob("*.py")), ids=name)
def test_a_backbone_knows_no_method(path):
    allowed = ("laconic.backbones", "laconic.core.backbone", "laconic.core.tokens", "laconic.core.gather", "__future__")
    allowed += ("collections", "dataclasses", "functools", "typing", "torch", "math")
    assert [m for m in imports(path) if not m.startswith(allowed)] == []


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_optional_libraries_are_imported_where_used(path):
    assert [m for m in imports(path, top_level_only=True) if m.split(".")[0] in OPTIONAL] == []


def layer(module):
    """The layer of a module of the package, or None (the package itself, `_moved`)."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("path", FILES, ids=name)
def test_layers_import_downward_only(path):
    own = layer("laconic." + name(path).removesuffix(".py").replace("/", "."))
    assert [m for m in imports(path) if m.startswith("benchmarks")] == []
    above = {(name(path), m) for m in imports(path) if own is not None and (layer(m) or 0) > own}
    assert above <= UPWARD
    assert not {m for _, m in above} & set(imports(path, top_level_only=True))


def test_the_tree_is_that_of_the_layers():
    folders = {f.parent.relative_to(SOURCE).parts[0] for f in FILES if f.parent != SOURCE}
    flat = {f.stem for f in FILES if f.parent == SOURCE}
    assert folders | {"api"} == set(LAYERS)
    assert len(flat) <= 8


def test_no_circles_of_imports():
    modules = {"laconic." + name(f).removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in FILES}
    graph = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text())
        found = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("laconic."):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[module] = (found & set(modules)) - {module}
    # a package that re-exports imports its own files: that alone is no circle
    for module, path in modules.items():
        if path.name == "__init__.py":
            graph[module] = {m for m in graph[module] if not m.startswith(f"{module}.")}
    list(graphlib.TopologicalSorter(graph).static_order())


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


@pytest.mark.parametrize("path", [f for f in FILES if f.parent.name in ("core", "methods", "ops", "backbones")], ids=name)
def test_no_assert_on_user_input_and_no_host_sync(path):
    text = path.read_text()
    asserts = [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assert)]
    assert len(asserts) <= 1
    if path.parent.name in ("methods", "ops") or path.name in ("tokens.py", "attention.py"):
        assert not re.search(r"\.item\(\)|\.nonzero\(|\.tolist\(|\.cpu\(\)", text)


def test_token_count_changes_in_one_place():
    """Outside tokens.py nothing builds a Tokens with rows of its own choosing."""
    for path in METHODS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
                changed = {k.arg for k in node.keywords}
                assert changed <= {
                    "x",
                    "attn_scale",
                    "per_token",
                    "keep_mask",
                    "attention",
                    "per_image",
                    "visible_prefix",
                    "parked",
                }, (
                    path.name,
                    changed,
                )


@pytest.mark.parametrize("row", laconic.methods().values(), ids=lambda row: row.name)
def test_a_registered_method_says_what_it_is(row):
    module = sys.modules[row.config.__module__]
    assert re.search(r"arXiv:\d{4}\.\d{5}", module.__doc__ or "")
    assert re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert row.phase in ("before", "ahead", "between", "after")
    assert row.config.__doc__
    from families import SITE as site

    assert row.config().build(site).overrides(row.phase)
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


def test_docstrings_and_words():
    """See scripts/docstring_style.py."""
    done = subprocess.run(
        [sys.executable, str(TOP / "scripts" / "docstring_style.py"), "--list"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
