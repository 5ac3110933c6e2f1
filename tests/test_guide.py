"""The guide's section on training with one's own pictures, copied as it stands and run on forty pictures."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


@pytest.fixture
def place(tmp_path):
    """A folder with forty pictures of two classes, and a command `laconic` of this source tree."""
    random = np.random.default_rng(0)
    for split, counts in (("train", {"cat": 24, "dog": 8}), ("val", {"cat": 4, "dog": 4})):
        for name, count in counts.items():
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture = random.integers(0, 120, (60, 80, 3), np.uint8) + np.uint8(120 if name == "dog" else 0)
                Image.fromarray(picture).save(folder / f"{i}.jpg")
    command = tmp_path / "bin" / "laconic"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m laconic.cli "$@"\n')
    command.chmod(0o755)
    return tmp_path


def section():
    """The recipe and the commands of the section."""
    text = re.search(r"^### On your own pictures\n(.*?)^##", GUIDE.read_text(), re.S | re.M)[1]
    (recipe,), (commands,) = (re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M) for language in ("toml", "bash"))
    return recipe, commands


@pytest.mark.slow
def test_the_training_section_on_forty_pictures(place):
    recipe, commands = section()
    (place / "mine.toml").write_text(recipe)
    assert sum(1 for _ in (place / "pictures").rglob("*.jpg")) == 40
    env = os.environ | {
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    env["PYTHONPATH"] = os.pathsep.join(map(str, [Path(__file__).parents[1] / "src", *filter(None, [env.get("PYTHONPATH")])]))
    done = subprocess.run(["bash", "-e", "-c", commands], cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = " ".join(done.stdout.split())
    assert "The weights of scenes_vit_small come from plain/model; with its head for 2 classes" in said
    assert json.loads((place / "plain" / "model" / "laconic.json").read_text())["method"] is None
    assert json.loads((place / "mine" / "model" / "laconic.json").read_text())["method"]["name"] == "etps"
    rows = list(csv.DictReader((place / "eval.csv").read_text().splitlines()))
    assert [row["images"] for row in rows] == ["8", "8"]
    names = {path.name for path in place.iterdir()}
    assert {"eval.classes.csv", "eval.confusion.unreduced.png"} <= names
    assert [path.suffix for path in (place / "exported").iterdir()] == [".onnx", ".onnx"]
