"""`import laconic` loads little, and every public name is found all the same."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import laconic
from laconic._moved import OldModule
from laconic.methods.ops.patterns import constant

OWN = {"laconic", "numpy", "safetensors", "jaxtyping"}  # jaxtyping where it is installed: the tests check shapes by it
LATE = laconic._MODULE_OF


def answer(code):
    """The value of ``out`` after running ``code`` in a new interpreter."""
    code = f"import json, sys\n{code}\nprint(json.dumps(out))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_import_loads_nothing_but_laconic_beyond_torch():
    """No part of torch that `import torch` leaves out (torch._dynamo takes a second), and no optional library."""
    new = answer("import torch; before = set(sys.modules)\nimport laconic; out = sorted(set(sys.modules) - before)")
    others = [name for name in new if name.split(".")[0] not in OWN]
    assert [name for name in others if name.split(".")[0] not in sys.stdlib_module_names] == []
    assert len(others) <= 15
    own = {name for name in new if name.startswith("laconic")}
    assert len(own) <= 135
    assert own & {f"laconic.{name}" for name in ("data", "jobs", "models", "training", *LATE.values())} == set()


def test_late_names_are_found_in_a_new_interpreter():
    found = answer(
        "import laconic; early = set(vars(laconic))\n"
        "from laconic import plan, BAT\n"
        "out = [laconic.export.__module__, plan.__module__, laconic.planning.__name__, laconic.training.__name__]\n"
        "out += [sorted({'export', 'Plan', 'recipe'} & early), 'push_to_hub' in dir(laconic), hasattr(laconic, 'nothing')]"
    )
    assert found == [
        "laconic.exporting",
        "laconic.planning.planner",
        "laconic.planning",
        "laconic.training",
        [],
        True,
        False,
    ]


@pytest.mark.parametrize("name", LATE)
def test_no_module_hides_a_public_name(name):
    assert name in laconic.__all__
    assert not (Path(laconic.__file__).parent / name).exists()
    assert not (Path(laconic.__file__).parent / f"{name}.py").exists()
    if isinstance(vars(laconic).get(name), OldModule):  # another test imported the old path of that name
        delattr(laconic, name)
    assert getattr(laconic, name) is getattr(importlib.import_module(f"laconic.{LATE[name]}"), name)


def test_methods_are_a_package_that_lists_itself():
    assert laconic.methods is importlib.import_module("laconic.methods")
    assert laconic.methods()["bat"].config is laconic.methods.BAT is laconic.BAT


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'reduced_'"):
        laconic.reduced_  # noqa: B018


@pytest.mark.unchecked
def test_constants_are_marked_as_torch_marks_them():
    ours, theirs = constant(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}
