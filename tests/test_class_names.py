"""Class names, preprocessing and fingerprint go with a model; other names are mapped or refused, never shifted."""

import json
import logging
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.datasets import ImageFolder

import laconic
from laconic.cli.eval import eval_
from laconic.cli.eval_input import Reading, open_eval_input
from laconic.cli.train import train
from laconic.core.files import Refusal
from laconic.data import Labelling, open_images
from laconic.data.classes import by_name, data_record, fingerprint
from laconic.data.labelling import read_class_map, with_classes
from laconic.data.model_record import check_record, record_of, set_record
from laconic.data.preprocessing import config_for
from test_train import SHAPE, running

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")

SET = (
    "model.name=vit_tiny_patch16_224",
    "model.pretrained=false",
    *(f"model.options.{key}={value}" for key, value in SHAPE.items()),
    "data.name=",
    "optimization.batch_size=6",
    "optimization.epochs=1",
)
EVIT = ("method.name=evit", "method.keep=0.6", "method.at=[1, 2]")


def go(data, output, *settings, **options):
    return train(set=(*SET, *settings), data=str(data), output=output, running=running(), **options)


def pictures(root, names, count=2, first=0):
    """Pictures of one colour a class; the colour depends on the class alone."""
    for name, colour in names.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            Image.new("RGB", (40, 40), colour).save(root / name / f"{number}.png")
    return root


COLOURS = {"cat": (255, 0, 0), "cup": (0, 255, 0), "tea": (0, 0, 255)}


@pytest.fixture
def data(tmp_path):
    for split in ("train", "val"):
        pictures(tmp_path / "data" / split, COLOURS, 4)
    return tmp_path / "data"


@pytest.fixture
def knowing(data, tmp_path):
    """A saved model that answers cat, cup and tea by the colour of the picture, and knows their names."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SHAPE).eval()
    images = open_images("", "train", data)
    transform = laconic.data.preprocessing.transform_for(model)
    batch = torch.stack([transform(images.load(i)) for i in (0, 4, 8)])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(batch), pre_logits=True)
        model.head.weight.copy_(torch.linalg.pinv(features).T)
        model.head.bias.zero_()
    laconic.reduce_(model, "topk", keep=1.0)
    set_record(model, data_record(images, model))
    laconic.save(model, tmp_path / "model")
    return tmp_path / "model"


def top1(model, data, **options):
    report = eval_(str(model), data=str(data), reading=Reading(workers=0, **options), device="cpu")
    return report.rows[0].top1, report


# ---------------------------------------------------------------------------------------------------- with the model
def test_a_saved_model_tells_its_data(knowing, data):
    record = json.loads((knowing / "laconic.json").read_text())["data"]
    assert record["classes"] == ["cat", "cup", "tea"]
    assert record["trained_on"] == fingerprint(open_images("", "train", data))
    assert {"mean", "std", "crop_pct", "interpolation", "input_size"} <= record["preprocessing"].keys()
    loaded = laconic.load(knowing)
    assert record_of(loaded) == record
    assert data_record(None, loaded) == record


def test_the_preprocessing_of_the_record_is_used(knowing):
    path = knowing / "laconic.json"
    tree = json.loads(path.read_text())
    tree["data"]["preprocessing"] |= {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5, "interpolation": "bilinear"}
    path.write_text(json.dumps(tree))
    config = config_for(laconic.load(knowing))
    assert (config["mean"], config["crop_pct"], config["interpolation"]) == ((0.1, 0.2, 0.3), 0.5, "bilinear")
    assert config_for(laconic.load(knowing), 1.0)["crop_pct"] == 1.0


@pytest.mark.parametrize(
    "record",
    [[], {"classes": "abc"}, {"classes": ["a", "a"]}, {"preprocessing": []}, {"preprocessing": {"mean": "x"}}],
)
def test_a_record_of_another_form_is_refused(knowing, record):
    with pytest.raises(ValueError, match="data"):
        check_record(record)
    path = knowing / "laconic.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": record}))
    with pytest.raises(ValueError, match=r"laconic.json: data"):
        laconic.load(knowing)


def test_a_run_keeps_the_record_with_every_model(data, tmp_path, caplog):
    caplog.set_level(logging.INFO, "laconic")
    report = go(data, tmp_path / "run", *EVIT, "data.val_crop=0.5")
    record = record_of(laconic.load(tmp_path / "run" / "model"))
    assert record["classes"] == ["cat", "cup", "tea"]
    assert record["preprocessing"]["crop_pct"] == 0.5
    assert record["trained_on"]["images"] == 12
    said = caplog.text
    assert "images for training" in said
    assert "12 images of 3 classes, 4 in each: cat 4, cup 4, tea 4" in said
    assert report.to_json()["images"]["validation"]["classes"] == {"cat": 4, "cup": 4, "tea": 4}


def test_weights_of_a_run_without_a_method_keep_it_too(data, tmp_path):
    go(data, tmp_path / "run")
    file = tmp_path / "run" / "model" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["laconic"])["data"]["classes"] == ["cat", "cup", "tea"]
    args = tuple(f"{key}={value}" for key, value in SHAPE.items())
    shutil.rmtree(data / "train")
    shutil.rmtree(data / "val" / "cat")
    opened = open_eval_input("vit_tiny_patch16_224", str(data), Reading(), file, args)
    assert opened.images.classes == ("cat", "cup", "tea")
    assert set(opened.images.labels_of_all()) == {1, 2}


# ---------------------------------------------------------------------------------------------------- evaluation
def test_classes_are_mapped_by_name(knowing, tmp_path):
    assert top1(knowing, pictures(tmp_path / "all", COLOURS))[0] == 1.0
    some = pictures(tmp_path / "some", {name: COLOURS[name] for name in ("cup", "tea")})
    found, report = top1(knowing, some)
    assert found == 1.0  # by position they would be cat and cup
    assert any("1 of the 3 classes of the model have no image here: cat" in note for note in report.read.notes)
    one = pictures(tmp_path / "one", {"tea": COLOURS["tea"]})
    assert top1(knowing, one)[0] == 1.0


def test_other_names_are_refused_with_the_difference(knowing, tmp_path):
    other = pictures(tmp_path / "other", {"z_cat": COLOURS["cat"], "cup": COLOURS["cup"], "tea": COLOURS["tea"]})
    with pytest.raises(
        ValueError, match=r"only the data has z_cat \(1 of 3\), only the model has cat \(1 of 3\).*--class-map FILE"
    ):
        top1(knowing, other)
    (tmp_path / "map.txt").write_text("z_cat\ncup\ntea\n")
    assert top1(knowing, other, class_map=str(tmp_path / "map.txt"))[0] == 1.0


def test_a_model_without_names_says_the_order(knowing, tmp_path):
    path = knowing / "laconic.json"
    tree = json.loads(path.read_text())
    del tree["data"]
    path.write_text(json.dumps(tree))
    _, report = top1(knowing, pictures(tmp_path / "a", COLOURS))
    assert any("does not tell its class names" in note and "cat, cup, tea" in note for note in report.notes)
    numbers = pictures(tmp_path / "b", dict(zip(("2", "10", "1"), COLOURS.values(), strict=True)))
    _, report = top1(knowing, numbers)
    assert any("--class-map torchvision" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"one class \(cat\).*--class-map FILE"):
        top1(knowing, pictures(tmp_path / "c", {"cat": (255, 0, 0)}))


def test_synsets_are_those_of_imagenet(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224")
    images = open_images("", "val", pictures(tmp_path, {"n01443537": (0, 0, 0), "n15075141": (0, 0, 0)}))
    mapped, named = by_name(images, model, Labelling())
    assert named
    assert list(mapped.labels_of_all()) == [1, 1, 999, 999]


# ---------------------------------------------------------------------------------------------------- class maps
@pytest.mark.parametrize("names", [("0", "1", "2", "10", "11"), ("Zebra", "apple", "Mango")])
def test_the_order_of_torchvision(tmp_path, names):
    pictures(tmp_path, dict.fromkeys(names, (0, 0, 0)), 1)
    theirs = ImageFolder(str(tmp_path))
    images = open_images("", "val", tmp_path, labelling=Labelling(class_map="torchvision"))
    assert list(images.classes) == theirs.classes
    assert {images.name(i).split("/")[0]: images.label(i) for i in range(len(images))} == theirs.class_to_idx
    assert (
        open_images("", "val", tmp_path, labelling=Labelling(class_map="timm")).classes
        == open_images("", "val", tmp_path).classes
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "tea\ncat\n\ncup\n"),
        ("a.json", '["tea", "cat", "cup"]'),
        ("a.json", '{"cat": 1, "tea": 0, "cup": 2}'),
        ("a.json", '{"1": "cat", "0": "tea", "2": "cup"}'),
    ],
)
def test_class_maps_of_every_form(data, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_map(tmp_path / name) == ("tea", "cat", "cup")
    images = open_images("", "val", data, labelling=Labelling(class_map=str(tmp_path / name)))
    assert [images.label(i) for i in (0, 4, 8)] == [1, 2, 0]
    assert images[8][1] == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.pkl", "", "expected a .txt file"),
        ("a.txt", "a\na\n", "'a' occurs twice"),
        ("a.txt", "", "it has no names"),
        ("a.json", '{"a": 1}', "all numbers from 0"),
        ("a.json", "[", "is not a class map"),
        ("a.txt", "cat\ncup\n", r"only the data has tea \(1 of 3\)"),
    ],
)
def test_wrong_class_maps_are_refused(data, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_images("", "val", data, labelling=Labelling(class_map=str(tmp_path / name)))


def test_training_takes_a_class_map(data, tmp_path):
    (tmp_path / "map.txt").write_text("tea\nmug\ncup\ncat\n")
    go(data, tmp_path / "run", *EVIT, labelling=Labelling(class_map=str(tmp_path / "map.txt")))
    assert laconic.load(tmp_path / "run" / "model").num_classes == 4


def test_numbers_in_the_place_of_names_keep_their_order(data):
    images = open_images("", "val", data)
    images.numbered, images.classes = True, ("0", "1", "2")
    named = with_classes(images, ("a", "b", "c", "d"), "the model")
    assert set(named.labels_of_all()) == {0, 1, 2}
    assert any("numbers in the place of class names" in note for note in named.notes)


# ---------------------------------------------------------------------------------------------------- resuming
@pytest.fixture
def stopped(data, tmp_path):
    go(data, tmp_path / "run", *EVIT)
    return tmp_path / "run"


def rename(data):
    for split in ("train", "val"):
        (data / split / "cat").rename(data / split / "zebra")


def replace(data):
    (data / "val" / "cat" / "0.png").rename(data / "val" / "cat" / "x.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "class cat is gone; class zebra is new"),
        (lambda data: pictures(data / "train", {"bird": (9, 9, 9)}), "class bird is new; train had 12 images, now 14"),
        (lambda data: pictures(data / "train", {"cup": (9, 9, 9)}, 3, first=9), "train had 12 images, now 15"),
        (replace, "val had 12 images, now 12, with other names"),
    ],
)
def test_other_data_is_refused_when_a_run_goes_on(stopped, data, change, message):
    change(data)
    with pytest.raises(Refusal, match=f"made with other images .*{message}"):
        go(data, stopped, *EVIT, resume=True)


def test_another_order_of_classes_is_refused(stopped, data, tmp_path):
    (tmp_path / "map.txt").write_text("tea\ncup\ncat\n")
    with pytest.raises(Refusal, match="see --class-map"):
        go(data, stopped, *EVIT, resume=True, labelling=Labelling(class_map=str(tmp_path / "map.txt")))


def test_moved_data_is_the_same_data(stopped, data, tmp_path):
    data.rename(tmp_path / "moved")
    assert go(tmp_path / "moved", stopped, *EVIT, resume=True).steps == 2


# ---------------------------------------------------------------------------------------------------- train and val
def test_a_folder_without_splits_is_refused_or_held_out(tmp_path, caplog):
    caplog.set_level(logging.INFO, "laconic")
    flat = pictures(tmp_path / "flat", COLOURS, 5)
    with pytest.raises(Refusal, match=r"same 15 images.*data.val_share=0.2.*data.val="):
        go(flat, tmp_path / "run")
    report = go(flat, tmp_path / "run", "data.val_share=0.2")
    assert report.accuracy.images == 3
    assert "12 of 15 images; 3 are held out for validation: 20% of each class, seed 0" in caplog.text
    assert go(flat, tmp_path / "run2", "data.val=").accuracy is None


def test_a_split_folder_itself_is_recognised(data, tmp_path):
    with pytest.raises(Refusal, match=f"did you mean --data {data},"):
        go(data / "train", tmp_path / "run")


def test_a_link_from_val_to_train_is_the_same_folder(data, tmp_path):
    shutil.rmtree(data / "val")
    (data / "val").symlink_to("train")
    with pytest.raises(Refusal, match="same 12 images"):
        go(data, tmp_path / "run")


@pytest.mark.parametrize("what", ["folders", "files", "training"])
def test_links_from_one_split_to_pictures_of_the_other(data, tmp_path, what):
    """Only the links are common: the folders of the two splits are different ones."""
    if what == "folders":
        shutil.rmtree(data / "val")
        (data / "val").mkdir()
        for name in COLOURS:
            (data / "val" / name).symlink_to(data / "train" / name)
    elif what == "files":
        (data / "val" / "cat" / "9.png").symlink_to(data / "train" / "cat" / "0.png")
    else:
        (data / "train" / "cup" / "8.png").symlink_to("../../val/cup/1.png")
    count, name = {"folders": (12, "cat/0.png"), "files": (1, "cat/0.png"), "training": (1, "cup/8.png")}[what]
    with pytest.raises(Refusal, match=rf"{count} images of training are images of validation too, by links \({name}"):
        go(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_links_to_a_store_are_read(data, tmp_path):
    """Each picture once: the usual way to divide a store without copies."""
    data.rename(tmp_path / "store")
    for split in ("train", "val"):
        for path in (tmp_path / "store" / split).rglob("*.png"):
            link = data / split / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    assert go(data, tmp_path / "run").to_json()["images"]["training"]["classes"] == {"cat": 4, "cup": 4, "tea": 4}


def test_no_val_folder_and_too_much_of_one(data, tmp_path):
    with pytest.raises(Refusal, match=r"val_share holds out training images, and .* has the folder val"):
        go(data, tmp_path / "run", "data.val_share=0.2")
    shutil.rmtree(data / "val")
    with pytest.raises(Refusal, match=r"has the folder train and none for validation .*val_share=0.2"):
        go(data, tmp_path / "run")


def test_one_class_is_not_trained_on(tmp_path):
    pictures(tmp_path / "d" / "train", {"cat": (0, 0, 0)}, 6)
    pictures(tmp_path / "d" / "val", {"cat": (0, 0, 0)})
    with pytest.raises(Refusal, match=r"all 6 training images are of one class \(cat\)"):
        go(tmp_path / "d", tmp_path / "run")
