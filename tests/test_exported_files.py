"""Exported files that say how they are used, their fp16 and int8 versions, and `laconic eval` on them."""

import copy
import dataclasses
import json

import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import laconic
from laconic.analysis.evaluate import evaluate
from laconic.cli import weights
from laconic.cli.eval import eval_
from laconic.cli.eval_input import Reading
from laconic.cli.export import export
from laconic.cli.export_input import open_export_input
from laconic.core.files import Refusal
from laconic.data import open_images
from laconic.exporting import open_exported, quantize, trace, write
from laconic.exporting.reading import FileModel

pytestmark = [pytest.mark.unchecked, pytest.mark.usefixtures("no_pretrained_weights")]
TINY = "deit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
CACHED = weights._cached
NAMES = ['a "b" & <c>', "é", " z"]


def small(classes=3, **how):
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=classes, **ARGS, **how).eval()
    nn.init.normal_(model.head.weight)  # so that its answers differ
    return laconic.reduce_(model, "topk", keep=0.5, at=(0,))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One model in every kind of file."""
    place = tmp_path_factory.mktemp("files")
    model = small()
    traced = trace(model, classes=NAMES, weights="weights are RANDOM (seed 0)")
    names = {"m.onnx": "onnx", "m.xml": "openvino", "m.pt2": "torch-export"}
    reports = {name: write(traced, place / name, to) for name, to in names.items()}
    for name, to in (("h.onnx", "onnx"), ("h.xml", "openvino")):
        reports[name] = write(traced, place / name, to, precision="fp16", source=place / "m.onnx")
    quantize(place / "m.onnx", place / "q.onnx")
    return model, place, reports


ALL = ("m.onnx", "m.xml", "m.pt2", "h.onnx", "h.xml", "q.onnx")


@pytest.mark.parametrize("name", ALL)
def test_every_file_says_how_it_is_used_and_runs(written, name):
    model, place, _ = written
    file = open_exported(place / name, 1)
    assert (file.classes, file.image, file.batch, file.random) == (NAMES, (3, 32, 32), None, True)
    config = timm.data.resolve_model_data_config(model)
    assert file.preprocessing == json.loads(json.dumps({**config, "input_size": (3, 32, 32)}))
    assert file.facts["macs"] == str(laconic.summary(model).macs)
    assert file.facts.get("precision") == {"m": None, "h": "fp16", "q": "int8"}[name[0]]
    pixels = torch.randn(5, 3, 32, 32)
    found, expected = FileModel(file)(pixels), model(pixels).detach()
    rough = {"m": 1e-4, "h": 2e-2, "q": 0.3}[name[0]] * float(expected.abs().max())
    assert torch.allclose(found, expected, atol=rough, rtol=0)


def test_fp16_is_half_as_large_checked_and_stated(written):
    _, place, reports = written
    assert (place / "h.onnx").stat().st_size < 0.6 * (place / "m.onnx").stat().st_size
    assert {tensor.data_type for tensor in onnx.load(place / "h.onnx").graph.initializer} >= {onnx.TensorProto.FLOAT16}
    for name in ("h.onnx", "h.xml"):
        report = reports[name]
        assert report.tolerance == 2e-2
        assert 1e-6 < report.difference <= 2e-2
        assert "fp16" in str(report)
        assert report.metadata["precision"] == "fp16"
    assert reports["h.onnx"].graph.problems == ()


def test_the_report_says_that_weights_are_random(written):
    _, _, reports = written
    for report in reports.values():
        assert "RANDOM" in str(report)
        assert report.to_json()["random"] is True
    assert laconic.export(small(), written[1] / "n.pt2", "torch-export", weights="from a file").random is False


def test_fp16_that_overflows_is_refused(tmp_path):
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.mul_(1e6)
    with pytest.raises(ValueError, match="above 65504 overflow"):
        laconic.export(model, tmp_path / "m.onnx", precision="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(path="m.pt2", to="torch-export", precision="fp16"), "torch-export is written in float32 only"),
        (dict(precision="int8"), "precision must be float32 or fp16"),
        (dict(classes=["a"] * 2), "a name more than once: a"),
        (dict(classes=list("abcd")), "4 names, but the model has 3 outputs"),
    ],
)
def test_wrong_arguments(tmp_path, given, match):
    path = tmp_path / given.pop("path", "m.onnx")
    with pytest.raises(ValueError, match=match):
        laconic.export(small(), path, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_batch_is_filled(tmp_path):
    model = small()
    laconic.export(model, tmp_path / "m.pt2", "torch-export", batch=2)
    file = open_exported(tmp_path / "m.pt2")
    assert file.batch == 2
    pixels = torch.randn(5, 3, 32, 32)
    assert torch.allclose(FileModel(file)(pixels), model(pixels), atol=1e-5)


def test_files_that_cannot_be_opened(tmp_path, written):
    _, place, _ = written
    (tmp_path / "m.onnx").write_bytes((place / "m.onnx").read_bytes()[:1000])
    (tmp_path / "m.xml").write_bytes((place / "m.xml").read_bytes())
    (tmp_path / "m.pt2").write_text("no archive")
    with pytest.raises(ValueError, match="m.onnx cannot be read as a file for onnx"):
        open_exported(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="m.pt2 cannot be read as a file for torch-export"):
        open_exported(tmp_path / "m.pt2")
    with pytest.raises(FileNotFoundError, match="m.bin is missing"):
        open_exported(tmp_path / "m.xml")
    with pytest.raises(ValueError, match=r"expected one that ends in .onnx, .pt2, .xml"):
        open_exported(tmp_path / "m.pth")


# ---------------------------------------------------------------------------------------------------- laconic eval
def pictures(root, names, count=3):
    """Folders of pictures of plain colours, one colour for each picture."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = (40 * number + 60, 70 * i, 255 - 50 * number)
            Image.new("RGB", (48, 40), colour).save(root / name / f"{i}.png")
    return root


READING = Reading(workers=0, batch_size=4)


@pytest.mark.parametrize("name", ALL)
def test_eval_of_every_file_is_that_of_the_model(written, tmp_path, name):
    model, place, _ = written
    images = pictures(tmp_path / "images", sorted(NAMES))
    order = [NAMES.index(c) for c in sorted(NAMES)]
    head = copy.deepcopy(model)
    head.head.weight.data, head.head.bias.data = model.head.weight.data[order], model.head.bias.data[order]
    expected = evaluate(head, open_images("", "val", images))
    report = eval_(str(place / name), data=str(images), reading=READING, output=tmp_path / "out.csv")
    row = report.rows[0]
    assert (row.top1, row.images, row.macs) == (expected.top1, 9, laconic.summary(model).macs)
    assert row.tokens == (16, 8)
    assert row.loss == pytest.approx(expected.loss, rel={"m": 1e-4, "h": 2e-2, "q": 0.5}[name[0]])
    assert "Weights are RANDOM" in str(report)
    assert report.environment["dtype"] == {"m": "float32", "h": "fp16", "q": "int8"}[name[0]]
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["top1"] == row.top1


def test_eval_maps_classes_by_name(tmp_path):
    """Folders that sort otherwise than the outputs, one class missing, one name in another Unicode form."""
    model = small(4)
    images = pictures(tmp_path / "images", ["b", "cafe\u0301", "a"], 2)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 1, 2, 9]))
    for at, expected in ((3, 1 / 3), (2, 0.0)):  # the last output is one of the data's three classes, or not
        names = ["b", "a", "other"]
        names.insert(at, "caf\u00e9")
        laconic.export(model, tmp_path / "m.pt2", "torch-export", classes=names)
        report = eval_(str(tmp_path / "m.pt2"), data=str(images), reading=READING)
        assert report.rows[0].top1 == pytest.approx(expected)
    (images / "a").rename(images / "aa")
    with pytest.raises(
        ValueError, match=r"only the data has aa \(1 of 3\), only .*m.pt2 has a, other \(2 of 4\); .*--class-map"
    ):
        eval_(str(tmp_path / "m.pt2"), data=str(images), reading=READING)


@pytest.fixture
def second(tmp_path):
    """A file whose answer is always its second output, and which does not tell the names of its three outputs."""
    model = small()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 9, 1]))
    laconic.export(model, tmp_path / "m.pt2", "torch-export")
    return model, tmp_path / "m.pt2"


def top1(file, images, **options):
    reading = dataclasses.replace(READING, **options)
    return eval_(str(file), data=str(images), reading=reading).rows[0].top1


def test_eval_of_a_file_takes_a_class_map_and_labels(second, tmp_path):
    """A class map goes before the names in the file; folders and label files are read as the options say, as for models."""
    model, file = second
    images = pictures(tmp_path / "images", ["a", "b", "c"], 2)
    (images / "c" / "1.png").unlink()
    shares = {"a": 2 / 5, "b": 2 / 5, "c": 1 / 5}
    assert top1(file, images) == shares["b"]
    report = eval_(str(file), data=str(images), reading=READING)
    assert any("does not tell its class names" in note for note in report.notes)
    for order in ("acb", "cab"):
        (tmp_path / "map.txt").write_text("\n".join(order))
        assert top1(file, images, class_map=str(tmp_path / "map.txt")) == shares[order[1]]
    laconic.export(model, tmp_path / "named.pt2", "torch-export", classes=["x", "y", "z"])
    assert top1(tmp_path / "named.pt2", images, class_map=str(tmp_path / "map.txt")) == shares["a"]
    (images / "b").rename(images / "10")
    (images / "c").rename(images / "2")
    assert top1(file, images) == shares["b"]  # 2, 10, a
    assert top1(file, images, class_map="torchvision") == shares["c"]  # 10, 2, a


def test_eval_of_a_file_reads_top_folders_and_label_files(second, tmp_path):
    _, file = second
    for name, count in (("a", 1), ("b", 3), ("c", 1)):
        pictures(tmp_path / "deep" / name, ["2023", "2024"], count)
    with pytest.raises(ValueError, match="--class-folder top"):
        top1(file, tmp_path / "deep")
    assert top1(file, tmp_path / "deep", class_folder="top") == 6 / 10
    flat = pictures(tmp_path / "flat", ["."], 3)
    (tmp_path / "labels.csv").write_text("image,class\n0.png,a\n1.png,b\n2.png,c\n")
    assert top1(file, flat, label_file=str(tmp_path / "labels.csv")) == 1 / 3


def test_eval_of_a_file_per_class(second, tmp_path):
    _, file = second
    images = pictures(tmp_path / "images", ["a", "b", "c"], 2)
    report = eval_(str(file), data=str(images), reading=READING, per_class=True, output=tmp_path / "r.csv")
    assert report.classes[0][1].rows() == [[0, 2, 0]] * 3
    assert (tmp_path / "r.confusion.m.pt2.csv") in report.files


def test_eval_says_what_a_file_does_not_say(tmp_path):
    model = small(4)
    del model.pretrained_cfg
    laconic.export(model, tmp_path / "m.pt2", "torch-export")
    report = eval_(str(tmp_path / "m.pt2"), data=str(pictures(tmp_path / "images", "ab")), reading=READING)
    text = " ".join(str(report).split())
    assert "The file does not say where its weights come from" in text
    assert "The file does not say how images are prepared; timm's defaults were used (mean (0.485" in text
    assert "4 outputs without names and the data has 2 classes" in text


def test_eval_of_a_file_refuses(tmp_path, written):
    _, place, _ = written
    images = str(pictures(tmp_path / "images", sorted(NAMES)))
    with pytest.raises(Refusal, match="leave out --method, --dtype"):
        eval_(str(place / "m.pt2"), data=images, method=("topk",), dtype="bfloat16")
    with pytest.raises(Refusal, match="none.onnx: there is no such file"):
        eval_(str(tmp_path / "none.onnx"), data=images)


# ---------------------------------------------------------------------------------------------------- laconic export
MODEL_ARGS = tuple(f"{name}={value}" for name, value in ARGS.items())
QUICK = {"method": ("topk",), "keep": (0.5,), "rounds": 0}


def metadata(path):
    return {entry.key.removeprefix("laconic."): entry.value for entry in onnx.load(path).metadata_props}


def test_export_says_that_weights_are_random(tmp_path):
    done = export(TINY, output=tmp_path, model_args=MODEL_ARGS, **QUICK)
    assert done.to_json()["random"] is True
    assert "RANDOM" in done.verdict
    assert "Weights are RANDOM (seed 0)" in str(done)
    for file in tmp_path.glob("*.onnx"):
        assert "RANDOM" in metadata(file)["weights"]
        assert "classes" not in metadata(file)


def test_export_without_a_cache_or_a_hub_is_random_too():
    found = open_export_input(TINY, None, (), ("topk",), (0.5,), ())
    assert found.random
    assert "RANDOM" in found.weights


def test_export_takes_weights_of_a_file_as_eval_does(tmp_path):
    model = small(7)
    torch.save(laconic.restore_(copy.deepcopy(model)).state_dict(), tmp_path / "w.pth")
    given = {"weights": tmp_path / "w.pth", "model_args": (*MODEL_ARGS, "num_classes=7")}
    done = export(TINY, output=tmp_path / "out", to=("torch-export",), **given, **{**QUICK, "keep": (1.0,)})
    assert done.random is False
    assert f"come from {tmp_path / 'w.pth'}" in str(done)
    pixels = torch.randn(2, 3, 32, 32)
    found = FileModel(open_exported(tmp_path / "out" / f"{TINY}.pt2"))(pixels)
    assert torch.allclose(found, laconic.restore_(model)(pixels), atol=1e-5)
    with pytest.raises(Refusal, match="there is no such file"):
        export(TINY, output=tmp_path / "out", weights=tmp_path / "none.pth", **QUICK)


def test_scorers_of_a_method_are_trained_or_said_to_be_random(monkeypatch):
    monkeypatch.setattr(weights, "_cached", CACHED)  # the weights that come with laconic
    ours = open_export_input("scenes_vit_small", None, (), ("dynamicvit",), (0.7,), ())
    assert (ours.random, ours.untrained) == (False, ())
    other = open_export_input(TINY, None, MODEL_ARGS, ("dynamicvit", "topk"), (0.5,), ())
    assert other.untrained == ("dynamicvit 0.5",)
    assert "parameters of its own, which are RANDOM" in other.weights_of(other.variants[1])
    assert "of its own" not in other.weights_of(other.variants[2])


def test_a_saved_model_with_classes_in_lower_precision_on_pictures(tmp_path):
    laconic.save(small(), tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / "laconic.json").read_text())
    (tmp_path / "saved" / "laconic.json").write_text(json.dumps({**record, "data": {"classes": NAMES}}))
    images = pictures(tmp_path / "images", sorted(NAMES))
    how = {"precision": ("fp16",), "int8": True, "data": str(images), "limit": 6, "rounds": 1}
    done = export(str(tmp_path / "saved"), output=tmp_path / "out", **how)
    kinds = ("onnx", "fp16.onnx", "int8.onnx")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"saved{m}.{k}" for m in ("", ".topk") for k in kinds}
    for name in ("saved.topk.onnx", "saved.topk.fp16.onnx", "saved.topk.int8.onnx"):
        assert json.loads(metadata(tmp_path / "out" / name)["classes"]) == NAMES
        assert "come from" in metadata(tmp_path / "out" / name)["weights"]
    rows = {(row.label, row.precision): row for row in done.agreements}
    assert set(rows) == {(label, p) for label in ("unreduced", "topk") for p in ("float32", "fp16", "int8")}
    assert all(row.images == 6 and row.source == f"6 pictures of {images}, val" for row in rows.values())
    assert rows["topk", "float32"].difference < 1e-4 < rows["topk", "fp16"].difference < 2e-2
    assert {row["precision"] for row in done.to_json()["agreement"]} == {"float32", "fp16"}
    assert {s.runtime for s in done.speeds} == {"eager PyTorch", "ONNX Runtime", "ONNX Runtime, int8", "ONNX Runtime, fp16"}
    assert eval_(str(tmp_path / "out" / "saved.topk.fp16.onnx"), data=str(images), reading=READING).rows[0].images == 9
    with pytest.raises(Refusal, match="leave out --weights"):
        export(str(tmp_path / "saved"), output=tmp_path / "out", model_args=("depth=2",))


def test_sizes_are_those_of_each_file(tmp_path):
    """Files of two formats have the same stem."""
    images = str(pictures(tmp_path / "images", "abc"))
    args = (*MODEL_ARGS, "num_classes=3")
    done = export(TINY, output=tmp_path / "out", to=("onnx", "openvino"), data=images, model_args=args, **QUICK)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    found = {row.path.rpartition("/")[2]: row.bytes for row in done.agreements}
    for stem in (TINY, f"{TINY}.topk-0.5"):
        assert found[f"{stem}.onnx"] == sizes[f"{stem}.onnx"]
        assert found[f"{stem}.xml"] == sizes[f"{stem}.xml"] + sizes[f"{stem}.bin"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(precision=("fp8",)), "--precision fp8: there is no such precision; there are fp16 and int8"),
        (dict(precision=("fp16",), to=("torch-export",)), "--precision fp16 is for onnx and openvino"),
        (dict(precision=("int8",), to=("openvino",)), "add --to onnx"),
        (dict(limit=0), "--limit must be at least 1"),
    ],
)
def test_export_refuses(tmp_path, given, match):
    with pytest.raises(Refusal, match=match):
        export(TINY, output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
