"""A method in a package of its own is found, works, and cannot break the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "plugin"
CODE = """
import warnings, laconic, timm, torch
model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=4).eval()
print("loudest" in laconic.methods())
laconic.reduce_(model, "loudest", keep=0.5, at=[2])
model(torch.randn(2, 3, 96, 96))
print(laconic.provenance(model).final.size.shape[1])
"""


def python(code, path):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.unchecked
def test_a_method_of_another_package():
    done = python(CODE, PLUGIN)
    assert done.stdout.split() == ["True", "18"], done.stderr
    listed = python("from laconic.cli.app import main; main(['list', '--json'])", PLUGIN)
    assert '"loudest"' in listed.stdout, listed.stderr


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_this_name", "the method 'loudest' of laconic-loudest cannot be loaded (ModuleNotFoundError"),
        (
            (PLUGIN / "laconic_loudest.py").read_text().replace('"loudest"', '"topk"'),
            "a method called 'topk' exists already (laconic.methods.topk); give this one another name",
        ),
    ],
    ids=["broken", "name taken"],
)
def test_one_that_cannot_be_loaded_is_named_and_left_out(tmp_path, source, message):
    info = tmp_path / "laconic_loudest-0.1.dist-info"
    info.mkdir()
    for file in (PLUGIN / info.name).iterdir():
        (info / file.name).write_text(file.read_text())
    (tmp_path / "laconic_loudest.py").write_text(source)
    done = python("import laconic; print(sorted(laconic.methods())[:2], laconic.methods()['topk'].config.__module__)", tmp_path)
    assert "laconic.methods.topk" in done.stdout, done.stderr
    assert message in done.stderr
