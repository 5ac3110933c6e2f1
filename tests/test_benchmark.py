"""The generated benchmark is what it is said to be: the same everywhere, balanced, and hard enough for the shipped model."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

import laconic
from benchmarks.package_weights import ship
from laconic.analysis.evaluate import answers, transform_for
from laconic.cli.weights import load
from laconic.core.files import Refusal
from laconic.data import open_images, scenes
from laconic.models.scenes import FOLDER, load_scorer

IMAGES = 500
FIRST = "f4403e6aafa304270b2472985bf61ba5aaccf60b8fa5038696b729bc9494702d"  # of the first pictures of every split; another one means that every published number is void


def test_the_pictures_are_the_same_everywhere():
    digest = hashlib.sha256()
    for split in scenes.SPLITS:
        for index in range(20):
            scene = scenes.scene(index, split=split)
            digest.update(scene.picture.tobytes() + scene.mask.tobytes() + bytes([scene.label, scene.kind]))
    assert digest.hexdigest() == FIRST


def test_a_scene_is_the_same_at_any_size():
    for index in range(8):
        small, large = scenes.scene(index), scenes.scene(index, size=160)
        assert (small.label, small.kind) == (large.label, large.kind)
        mean = large.mask.reshape(40, 4, 40, 4).mean((1, 3))
        assert np.abs(mean - small.mask).mean() < 0.05  # borders only


def test_classes_and_kinds_are_spread_as_said():
    drawn = [scenes.scene(index, split="val", size=8) for index in range(1200)]
    counts = np.bincount([scene.label for scene in drawn], minlength=len(scenes.CLASSES))
    assert len(counts) == 24
    assert counts.min() > 25
    at_home = np.mean([scene.kind == scenes.home(scene.label) for scene in drawn])
    assert abs(at_home - (scenes.AT_HOME + (1 - scenes.AT_HOME) / len(scenes.KINDS))) < 0.04
    homes = {scenes.home(label) for label in range(24)}
    assert homes == set(range(len(scenes.KINDS)))


def test_refusals_and_read_only():
    with pytest.raises(ValueError, match="split must be one of"):
        scenes.scene(0, split="dev")
    with pytest.raises(ValueError, match="read-only"):
        scenes.scene(0).picture[0, 0, 0] = 1


@pytest.fixture(scope="module")
def base():
    loaded = load("scenes_vit_small")
    assert not loaded.random
    return loaded.model


def top1(model, change=lambda scene: scene.picture):
    from PIL import Image

    images, transform = open_images("scenes", "test", limit=IMAGES), transform_for(model)
    pixels = torch.stack([transform(Image.fromarray(change(images.scene(index)))) for index in range(IMAGES)])
    labels = torch.tensor([images.label(index) for index in range(IMAGES)])
    with torch.inference_mode():
        return (model(pixels).argmax(1) == labels).float().mean().item()


@pytest.mark.slow
def test_the_base_model_stands_where_differences_show(base):
    full = top1(base)
    assert 0.80 <= full <= 0.95
    assert full == pytest.approx(answers(base, open_images("scenes", "test", limit=IMAGES)).accuracy.top1)

    reduced = laconic.reduce_(base, "random", schedule=laconic.Schedule.keep_counts({1: 50}))
    try:
        assert full - top1(reduced) >= 0.05  # half of the tokens, dropped at random
    finally:
        laconic.restore_(base)

    def hidden(scene):
        return np.where(scene.mask[..., None], scene.picture, np.uint8(128))

    assert full - top1(base, hidden) >= 0.02  # the object alone, without its surroundings


# ---------------------------------------------------------------------------------------------------- what is shipped
def test_what_is_shipped_is_small():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) <= 8e6


def test_of_a_run_with_a_method_only_its_own_tensors_are_shipped(tmp_path):
    run, weights, results = (tmp_path / name for name in ("run", "weights", "results"))
    tensors = {"head.weight": torch.ones(2), "laconic.reducers.2.predictor.weight": torch.zeros(3)}
    (run / "model").mkdir(parents=True)
    (run / "model" / "model.safetensors").write_bytes(to_bytes(tensors))
    with pytest.raises(Refusal, match="no finished run"):
        ship(run, "one", weights, results)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert list(from_bytes(ship(run, "one", weights, results).read_bytes())) == ["laconic.reducers.2.predictor.weight"]
    assert (results / "one.jsonl").read_text() == '{"step": 1}\n'
    (run / "model" / "model.safetensors").write_bytes(to_bytes({"head.weight": torch.ones(2)}))
    assert list(from_bytes(ship(run, "two", weights, results).read_bytes())) == ["head.weight"]


@pytest.mark.parametrize("method", ["dtps", "dynamicvit"])
def test_the_shipped_scorers_know_the_object(base, method):
    """Trained, they keep more of the object than of its surroundings; with random weights they keep about as much of each."""
    from benchmarks.experiments.views import look

    images = open_images("scenes", "test", limit=200)
    reduced = laconic.reduce_(base, method, keep=0.7)
    try:
        assert load_scorer(reduced, "scenes_vit_small")
        shares = look(reduced, images)
    finally:
        laconic.restore_(base)
    assert shares["object_own"] > shares["surroundings_own"] + 0.3
