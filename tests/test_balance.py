"""Training on imbalanced classes: weights in the loss, and how often images are drawn."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from laconic.cli.train import prepare, train
from laconic.core.files import json_lines
from laconic.data import ImageSet
from laconic.data.order import Order
from laconic.training.balance import class_weights, draw_weights, weighted_cross_entropy
from laconic.training.batches import Batches
from laconic.training.loop import Loop
from laconic.training.recipe import Recipe
from laconic.training.run_config import Running

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
BASE = (
    "model.name=vit_tiny_patch16_224",
    "model.pretrained=false",
    *(f"model.options.{key}={value}" for key, value in SHAPE.items()),
    "data.name=",
    "optimization.batch_size=8",
    "optimization.epochs=2",
)


class Labels(ImageSet):
    def __init__(self, labels, classes):
        self.labels, self.classes = labels, tuple("abcdef"[:classes])

    def __len__(self):
        return len(self.labels)

    def load(self, i):
        raise AssertionError("no image is read")

    def label(self, i):
        return self.labels[i]

    def name(self, i):
        return str(i)


WEIGHTED = ("loss.class_weights=balanced",)
UNEVEN = Labels([0] * 12 + [1] * 3 + [2], 4)  # the last class has no images


@pytest.fixture
def folder(tmp_path):
    """Two classes, with 28 and 4 images."""
    for split, counts in (("train", (28, 4)), ("val", (2, 2))):
        for name, count in zip("ab", counts, strict=True):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (i * 8, 0 if name == "a" else 200, 100)).save(place / f"{i}.png")
    return str(tmp_path / "data")


def loop(folder, output, *settings, **changes):
    run, _ = prepare(Recipe().replaced((*BASE, *settings)), folder, output, Running(device="cpu", **changes))
    return Loop(run, False)


def go(folder, output, *settings, resume=False, **changes):
    running = Running(device="cpu", log_every=1, **changes)
    train(set=(*BASE, *settings), data=folder, output=output, resume=resume, running=running)
    return load_file(output / "model" / "model.safetensors")


# ---------------------------------------------------------------------------------------------------- weights in the loss
def test_the_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    found = class_weights(UNEVEN, "balanced")
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=np.array(UNEVEN.labels))
    assert torch.allclose(found[:3], torch.tensor(theirs, dtype=torch.float32))
    assert found[3] == 0
    root = class_weights(UNEVEN, "square-root")
    assert torch.allclose(root[:3] / root[0], (found[:3] / found[0]).sqrt())
    for weights in (found, root):
        assert float(weights[UNEVEN.labels].mean()) == pytest.approx(1.0)
    assert class_weights(UNEVEN, "none") is None


def test_the_weighted_cross_entropy_is_a_mean_over_the_images():
    logits, labels, weights = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([0.5, 1.0, 3.0])
    expected = (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()
    assert torch.allclose(weighted_cross_entropy(logits, labels, weights), expected)
    assert torch.allclose(weighted_cross_entropy(logits, F.one_hot(labels, 3).float(), weights), expected)
    parts = [weighted_cross_entropy(logits[i : i + 3], labels[i : i + 3], weights) for i in (0, 3)]
    assert torch.allclose(sum(parts) / 2, expected)
    assert torch.allclose(weighted_cross_entropy(logits, labels, torch.ones(3)), F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("method.name=evit", "method.keep=0.6", "method.at=[1]", "step.kind=two-passes"),
        ("method.name=evovit", "method.options.second_head=2", "method.keep=0.6", "method.at=[1]"),
    ],
    ids=["ordinary", "two passes", "second head"],
)
def test_every_cross_entropy_of_a_step_is_weighted(folder, tmp_path, settings):
    rare = {}
    for name in ("none", "balanced"):
        step = loop(folder, tmp_path / name, f"loss.class_weights={name}", *settings).step_module.train()
        torch.manual_seed(0)
        rare[name] = step(torch.randn(4, 3, 32, 32), torch.ones(4, dtype=torch.long), None)
    for part in {"cross_entropy", "teacher", "class_logits"} & rare["none"].keys():
        assert float(rare["balanced"][part] / rare["none"][part]) == pytest.approx(32 / (2 * 4), rel=1e-4), part


def test_weights_are_the_same_in_micro_batches(folder, tmp_path):
    def losses(output):
        return [row["loss"] for row in json_lines(output / "metrics.jsonl") if "loss" in row]

    for name, settings, changes in (("a", WEIGHTED, {}), ("b", WEIGHTED, {"accumulate": 2}), ("c", (), {})):
        go(folder, tmp_path / name, *settings, **changes)
    whole, parts, plain = (losses(tmp_path / name) for name in "abc")
    assert whole == pytest.approx(parts, rel=1e-3)
    assert plain != pytest.approx(parts, rel=1e-2)


# ---------------------------------------------------------------------------------------------------- how often images are drawn
def test_the_sampler_draws_all_classes_equally_often():
    weights = draw_weights(UNEVEN, "balanced")
    assert draw_weights(UNEVEN, "uniform") is None
    drawn = [i for epoch in range(200) for batch in Order(16, 8, seed=1, epoch=epoch, draw=weights) for _, _, i in batch]
    share = Counter(UNEVEN.labels[i] for i in drawn)
    assert set(share) == {0, 1, 2}
    assert all(abs(count / len(drawn) - 1 / 3) < 0.03 for count in share.values())
    assert set(drawn) == set(range(16))


def test_the_drawn_order_is_that_of_the_seed_and_of_all_processes():
    weights = draw_weights(UNEVEN, "balanced")
    one = list(Order(16, 8, seed=3, epoch=5, draw=weights))
    assert one == list(Order(16, 8, seed=3, epoch=5, draw=weights))
    assert one != list(Order(16, 8, seed=4, epoch=5, draw=weights))
    ranks = [list(Order(16, 8, seed=3, epoch=5, rank=rank, world=2, draw=weights)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one


def test_a_run_draws_as_its_recipe_says_and_resumes(folder, tmp_path):
    run = loop(folder, tmp_path / "r", "data.sampler=balanced").run
    labels = torch.cat([batch[1] for epoch in range(6) for step in Batches(run, 0, 1).of_steps(epoch, 0) for batch in step])
    assert 0.35 < float(labels.float().mean()) < 0.65
    whole = go(folder, tmp_path / "a", "data.sampler=balanced")
    with pytest.MonkeyPatch.context() as patch:
        original = Loop._step
        patch.setattr(Loop, "_step", lambda self, b: original(self, b) if self.progress.step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(folder, tmp_path / "b", "data.sampler=balanced", checkpoint_every=1)
    again = go(folder, tmp_path / "b", "data.sampler=balanced", resume=True)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("loss.class_weights=balanced", "data.sampler=balanced"), "together they would do it twice"),
        (("loss.class_weights=inverse",), "class_weights"),
        (("data.sampler=weighted",), "sampler"),
    ],
)
def test_what_is_refused(folder, tmp_path, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        loop(folder, tmp_path, *settings)
