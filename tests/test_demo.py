"""The demo: scenes with their accuracies and the outcomes of their objects, other images, photographs; trained scorers."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import laconic
from laconic.analysis.evaluate import evaluate, transform_for
from laconic.analysis.timing import Setting
from laconic.cli import demo_input, draw, image_io, patch_outcomes, weights
from laconic.cli.demo import demo
from laconic.cli.models import create
from laconic.cli.weights import Loaded
from laconic.core.files import Refusal
from laconic.data import ImageSet, Unreadable, open_images
from laconic.models import scenes

TINY = "deit_tiny_patch16_224"
QUICK = {"setting": Setting(rounds=1, threads=1), "batch_size": 1, "pictures": 2}


@pytest.fixture
def own_weights(tmp_path, monkeypatch):
    """As if laconic came with weights of the models of the scenes: random ones, unlike those of seed 0."""
    for name in ("scenes_vit_small", "scenes_vit_tiny"):
        save_file(create(name, seed=7).state_dict(), tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(weights, "_cached", lambda cfg: tmp_path / f"{cfg['architecture']}.safetensors")
    monkeypatch.setattr(scenes, "FOLDER", tmp_path)
    return tmp_path


def write_scorer(folder, method):
    """A scorer as laconic comes with it, of ones; its tensors."""
    model = laconic.reduce_(create("scenes_vit_small"), method, keep=0.7)
    tensors = {key: torch.ones_like(value) for key, value in model.state_dict().items() if key.startswith("laconic.")}
    save_file(tensors, folder / f"scenes_vit_small.{method}.safetensors")
    return tensors


# ---------------------------------------------------------------------------------------------------- scenes
@pytest.mark.usefixtures("no_pretrained_weights")
def test_scenes_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)  # it needs no photographs
    report = demo(model="scenes_vit_small", images=8, method=("etps", "dtps"), keep=(0.5,), output=tmp_path / "out", **QUICK)
    text = str(report)
    assert text.startswith("Weights are RANDOM (seed 0)")
    assert "Scenes, test: 8 images of 24 classes." in text
    assert "dtps scores tokens with an untrained predictor" in text.lower().replace("Dtps", "dtps")
    labels = [row.label for row in report.rows]
    assert labels == ["unreduced", "etps 0.5", "dtps 0.5", "random 0.5", "avg-pool 0.5", "input 28x28 0.5", "scenes_vit_tiny"]
    assert [row.tokens for row in report.rows][1:3] == [(100, 50, 25, 13), (100, 50, 25, 12)]
    first, *others = report.judged
    own = evaluate(create("scenes_vit_small"), open_images("scenes", "test", limit=8))
    assert (first.accuracy.top1, first.accuracy.interval, first.agreement.top1) == (own.top1, own.interval, 1.0)
    assert all(judged.accuracy.images == 8 for judged in others[:-1])
    assert (others[-1].accuracy, others[-1].agreement.top1) == (None, None)  # random weights of another model
    assert "Scenes_vit_tiny has random weights here" in text
    assert [judged.outcomes is not None for judged in report.judged] == [False, True, True, True, True, False, False]
    files = [picture.file for picture in report.pictures]
    assert sorted(f.name for f in files) == [f"test-scene-{i}-{m}-0.5.png" for i in (0, 1) for m in ("dtps", "etps")]
    assert all(np.asarray(Image.open(file).convert("RGB")).std() > 10 for file in [*files, report.sheet])
    found = json.loads(json.dumps(report.to_json()))
    assert found["best"] == report.best
    assert found["rows"][1]["accuracy"]["interval"] == list(others[0].accuracy.interval)
    assert found["rows"][1]["fate"]["object"]["kept"] == others[0].outcomes.object.kept
    assert (found["rows"][0]["fate"], found["rows"][-1]["accuracy"]) == (None, None)


def test_scenes_with_weights_and_a_scorer(own_weights, tmp_path):
    write_scorer(own_weights, "dtps")
    report = demo(
        model="scenes_vit_small", images=4, method=("dtps", "dynamicvit"), keep=(0.7,), output=tmp_path / "out", **QUICK
    )
    assert report.weights == "the weights of scenes_vit_small come with laconic"
    assert "RANDOM" not in str(report)
    assert report.notes[0] == "dtps scores tokens with the predictors that come with laconic, trained at keep 0.7"
    assert report.notes[1].startswith("dynamicvit scores tokens with an untrained predictor")
    assert report.rows[-1].name == "scenes_vit_tiny"
    assert report.judged[-1].accuracy.images == 4


def test_a_scorer_is_for_the_shipped_weights_only(own_weights, tmp_path):
    write_scorer(own_weights, "dtps")
    file = own_weights / "scenes_vit_small.safetensors"
    report = demo(
        model="scenes_vit_small", weights=file, images=4, method=("dtps",), keep=(0.7,), output=tmp_path / "out", **QUICK
    )
    assert report.notes[0].startswith("dtps scores tokens with an untrained predictor")


def test_what_is_best_is_said(tmp_path):
    from dataclasses import replace

    report = demo(model="scenes_vit_small", images=4, method=("etps", "bat"), keep=(0.7,), output=tmp_path / "out", **QUICK)
    shares = {"etps": 0.5, "bat": 0.25, "random": 0.75, "avg-pool": 0.0, "input 32x32": 0.25}
    judged = [
        replace(j, accuracy=replace(j.accuracy, top1=shares[row.name])) if row.name in shares else j
        for row, j in zip(report.rows, report.judged, strict=True)
    ]
    told = replace(report, judged=tuple(judged))
    assert told.best == "At keep 0.7 the best method is etps (50.0%), the best without one random (75.0%)."
    assert told.best in str(told)
    assert replace(told, judged=tuple(replace(j, accuracy=None) for j in judged)).best == ""


# ---------------------------------------------------------------------------------------------------- trained scorers
def test_a_scorer_is_loaded_as_it_is(own_weights):
    tensors = write_scorer(own_weights, "dtps")
    model = laconic.reduce_(create("scenes_vit_small"), "dtps", keep=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert scenes.load_scorer(model, "scenes_vit_small")
    for key, value in model.state_dict().items():
        assert torch.equal(value, tensors.get(key, before[key])), key


def test_no_scorer_is_no_scorer(own_weights):
    model = laconic.reduce_(create("scenes_vit_small"), "dynamicvit", keep=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not scenes.load_scorer(model, "scenes_vit_small")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="reduce"):
        scenes.load_scorer(create("scenes_vit_small"), "scenes_vit_small")


@pytest.mark.parametrize("options", [{"at": [1, 3]}, {"at": [2, 4, 6, 7]}])
def test_a_scorer_for_other_blocks_is_refused(own_weights, options):
    write_scorer(own_weights, "dtps")
    model = laconic.reduce_(create("scenes_vit_small"), "dtps", keep=0.5, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model; reduce scenes_vit_small at the blocks of the default"):
        scenes.load_scorer(model, "scenes_vit_small")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- outcomes
def stage(where, kept):
    where, kept = torch.tensor(where), torch.tensor(kept)
    return laconic.Stage(0, where, torch.ones(kept.shape), kept, None, (2, 2))


def test_fates_by_hand():
    found = patch_outcomes.outcomes(
        stage([[0, 0, -1, 1]], [[1, 3]])
    )  # the first patch is held by a token in the second's place
    assert found[0].int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]


def test_fates_are_means_over_images():
    count = patch_outcomes.Count(torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4]))
    count.add(stage([[0, 0, -1, 1], [-1, 0, 1, -1]], [[1, 3], [1, 2]]))
    count.add(stage([[0, 1, -1, -1]], [[0, 1]]))  # no patch shows the object
    assert count.outcomes.object == patch_outcomes.Shares(kept=0.25, merged=0.25, dropped=0.5)
    assert count.outcomes.surroundings.kept == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3)
    assert count.outcomes.surroundings.dropped == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize("method", ["evit", "topk", "avg-pool"])
def test_counting_along_with_a_model(method):
    images = open_images("scenes", "test", limit=5)
    model = laconic.reduce_(create("scenes_vit_small"), method, keep=0.5)
    shown = patch_outcomes.object_patches(images, (10, 10))
    assert shown.shape == (5, 100)
    assert not patch_outcomes.object_patches(images, (20, 20)).equal(shown)
    with patch_outcomes.counting(model, shown) as count:
        evaluate(model, images, batch_size=2)
    seen, (part, rest) = count.seen, (count.outcomes.object, count.outcomes.surroundings)
    model(torch.zeros(1, 3, 40, 40))
    assert seen == count.seen == 5  # it counts no longer
    assert part.kept + part.merged + part.dropped == pytest.approx(1)
    assert rest.kept + rest.merged + rest.dropped == pytest.approx(1)
    assert (part.dropped == 0, part.merged == 0) == ((False, True) if method == "topk" else (True, False))
    model(torch.stack([transform_for(model)(images.load(i)) for i in range(5)]))
    places = laconic.provenance(model).final.kept.tolist()
    kept = [sum(bool(shown[i, p]) for p in places[i]) / int(shown[i].sum()) for i in range(5)]
    assert part.kept == pytest.approx(sum(kept) / 5)


def test_images_that_know_no_object(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "val" / "a" / "a.png")
    assert patch_outcomes.object_patches(open_images("", "val", tmp_path), (10, 10)) is None


# ---------------------------------------------------------------------------------------------------- other images
@pytest.mark.usefixtures("no_pretrained_weights")
def test_a_folder_of_images(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "val" / label).mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "val" / label / "one.png")
    report = demo(model=TINY, data=str(tmp_path), method=("etps",), keep=(0.5,), output=tmp_path / "out", **QUICK)
    assert [judged.accuracy.images for judged in report.judged] == [2] * len(report.rows)
    assert all(judged.outcomes is None for judged in report.judged)
    assert report.notes[0].startswith("the model answers for 1000 classes and the data has 2")
    assert [p.file.name for p in report.pictures] == ["one-1-etps-0.5.png", "one-2-etps-0.5.png"]
    assert "What became of the object" not in str(report)


@pytest.mark.usefixtures("no_pretrained_weights")
def test_photographs(tmp_path):
    report = demo(model=TINY, method=("etps", "dtps"), keep=(0.5,), output=tmp_path / "out", **QUICK)
    text = str(report)
    assert text.startswith("Weights are RANDOM (seed 0)")
    assert "astronaut.png, Eileen Collins, astronaut (NASA; public domain)" in text
    assert "an untrained predictor" in text
    assert "there is no accuracy" in text
    assert report.best == ""
    labels = [row.label for row in report.rows]
    assert labels == ["unreduced", "etps 0.5", "dtps 0.5", "random 0.5", "avg-pool 0.5", "input 160x160 0.5"]
    assert all(j.agreement.cosine is not None and j.agreement.kl is not None for j in report.judged)
    assert all(j.accuracy is None and j.outcomes is None for j in report.judged)
    names = sorted(p.file.name for p in report.pictures)
    assert names == [f"{p}-{m}-0.5.png" for p in ("astronaut", "chelsea") for m in ("dtps", "etps")]
    found = json.loads(json.dumps(report.to_json()))
    assert found["rows"][1]["agreement"]["cosine"] == report.judged[1].agreement.cosine
    assert found["rows"][1]["accuracy"] is None


def test_without_photographs(monkeypatch):
    monkeypatch.setattr(image_io, "SHIPPED", {"absent.png": ""})
    monkeypatch.setattr(demo_input, "load", lambda name, file: Loaded(create(name), "", True))
    with pytest.raises(Refusal, match="ships none of"):
        demo(model=TINY)


class Half(ImageSet):
    """Two images, the first of which cannot be read."""

    classes = ("a",)

    def __len__(self):
        return 2

    def load(self, i):
        if i == 0:
            raise Unreadable("first", "it is cut off")
        return Image.new("RGB", (40, 40))

    def label(self, i):
        return 0

    def name(self, i):
        return f"a set/image {i}"


def test_images_that_cannot_be_read_are_not_drawn(monkeypatch):
    loaded = Loaded(create("scenes_vit_small"), "", True)
    (photo,) = demo_input._first(Half(), 2, loaded)
    assert (photo.name, photo.stem) == ("a set/image 1", "image-1")
    monkeypatch.setattr(Half, "load", lambda self, i: (_ for _ in ()).throw(Unreadable("x", "it is cut off")))
    with pytest.raises(Refusal, match="none of 2 images can be read"):
        demo_input._first(Half(), 2, loaded)


# ---------------------------------------------------------------------------------------------------- pictures
def test_tiny_pictures_show_their_pixels():
    picture = np.random.default_rng(0).random((40, 40, 3))
    large = draw.enlarge(picture, (10, 10))
    assert large.shape == (320, 320, 3)
    assert np.array_equal(large[3::8, 5::8], picture.astype(np.float32))
    assert draw.enlarge(np.random.default_rng(0).random((224, 224, 3)), (14, 14)).shape == (336, 336, 3)


def test_a_sheet_shows_every_pixel_where_it_belongs(tmp_path):
    pictures = [np.full((40, 60, 3), shade) for shade in (0.2, 0.8)]
    file = draw.save_sheet(tmp_path / "a.png", [pictures, pictures[::-1]], ["one", "two"], "a heading")
    sheet = np.asarray(Image.open(file).convert("RGB"))
    assert sheet.shape[:2] == (2 * 48 + 54 + 20, 2 * 68 + 8)
    found = [[int(sheet[top + 20, left + 30, 0]) for left in (8, 76)] for top in (54, 102)]
    assert found == [[51, 204], [204, 51]]
