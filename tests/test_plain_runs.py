"""The output of a run without a method: every command and `laconic.load` open it."""

import json

import pytest
import torch
from safetensors.torch import load_file

import laconic
from laconic.checkpoints.plain import save_plain
from laconic.cli import image_io, models
from laconic.cli.eval import eval_
from laconic.cli.eval_input import Reading
from laconic.cli.export_input import open_export_input
from laconic.cli.show import show
from laconic.cli.train import train
from laconic.core.files import Refusal
from laconic.training.run_config import Running

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")

SHAPE = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3}
PLAIN = (
    "model.name=vit_tiny_patch16_224",
    "model.pretrained=false",
    *(f"model.options.{key}={value}" for key, value in SHAPE.items()),
    "data.train_images=16",
    "data.val_images=8",
    "optimization.batch_size=8",
    "optimization.epochs=1",
)
READING = Reading(limit=12, workers=0, batch_size=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train(set=(*PLAIN, "model.options.mlp_ratio=2.0"), output=folder, running=Running(device="cpu"))
    return folder


@pytest.mark.parametrize("name", ["model", "best"])
def test_a_plain_run_opens_as_it_was_trained(run, name):
    model = laconic.load(run / name)
    assert not laconic.is_reduced(model)
    assert not model.training
    assert model.blocks[0].mlp.fc1.out_features == 96
    held = load_file(run / name / "model.safetensors")
    assert all(torch.equal(held[key], value) for key, value in model.state_dict().items())
    assert json.loads((run / name / "laconic.json").read_text())["method"] is None


def test_a_plain_run_is_evaluated(run):
    report = eval_(str(run / "model"), data="scenes", reading=READING, method=("etps",), keep=(0.5,))
    assert [row.label for row in report.rows] == ["unreduced", "etps 0.5"]
    assert report.rows[0].images == 12
    assert "come from" in report.weights


def test_a_plain_run_is_exported_and_reduced(run):
    assert [v.label for v in open_export_input(str(run / "model"), None, (), (), (0.7,), ()).variants] == [
        "unreduced",
        "etps 0.7",
    ]
    assert laconic.is_reduced(laconic.reduce_(laconic.load(run / "model"), "bat", keep=0.5))


def test_a_plain_run_is_drawn_at_the_size_it_was_trained_at(run, tmp_path):
    image = next(iter(image_io.shipped(1)))
    (picture,) = show((image,), model=str(run / "model"), method=("bat",), keep=(0.5,), output=tmp_path).pictures
    assert picture.tokens[0] == 25
    assert picture.file.is_file()


def test_a_plain_run_fills_a_given_model(run):
    model = models.create("vit_tiny_patch16_224", seed=3, num_classes=24, mlp_ratio=2.0, **SHAPE)
    assert laconic.load(run / "model", model=model) is model
    assert torch.equal(model.head.weight, load_file(run / "model" / "model.safetensors")["head.weight"])
    with pytest.raises(ValueError, match="does not fit"):
        laconic.load(run / "model", model=models.create("vit_tiny_patch16_224", num_classes=5, mlp_ratio=2.0, **SHAPE))


def test_a_model_of_another_library_does_not_say_how_to_build_it(tmp_path):
    save_plain(torch.nn.Linear(3, 2), tmp_path / "own")
    with pytest.raises(Refusal, match="does not tell how to build its model"):
        models.open_model(str(tmp_path / "own"))


def test_weights_without_a_record_say_which_option_takes_them(run, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    with pytest.raises(Refusal, match=r"laconic.json is missing.*--weights"):
        models.open_model(str(tmp_path))


@pytest.mark.parametrize("change", [{"method": {"name": "etps"}}, {"schedule": {}}, {"model": None}])
def test_a_record_that_is_half_of_each_is_refused(run, tmp_path, change):
    record = json.loads((run / "model" / "laconic.json").read_text()) | change
    (tmp_path / "laconic.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="must hold format, model, method and schedule"):
        laconic.load(tmp_path)
