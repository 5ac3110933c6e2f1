"""Layouts of image folders and tars as people have them: the right classes, or a refusal that names the option."""

import io
import json
import os
import tarfile
import unicodedata

import pytest

from laconic.data import Labelling, Report, open_images
from laconic.data.folder import FolderImages
from laconic.data.held_out import hold_out
from laconic.data.shards import are_shards
from test_data import as_file, noise, write


def read(root, split="train", **options):
    return open_images("", split, root, labelling=Labelling(**options))


def labels(images):
    return [images.classes[label] for label in images.labels_of_all()]


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet's layout."""
    for name in ("cat", "cup"):
        for number in range(2):
            write(tmp_path / "train" / name / "images" / f"{name}_{number}.JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("x")
    for number in range(3):
        write(tmp_path / "val" / "images" / f"val_{number}.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{n}\t0\t0\t9\t9\n" for i, n in enumerate(["cup", "cat", "cup"]))
    )
    return tmp_path


# ---------------------------------------------------------------------------------------------------- the class folder
def test_leaves_of_one_name_are_no_classes(tiny):
    with pytest.raises(ValueError, match=r"'images' lie under cat, cup.*--class-folder top .*\(2: cat, cup\)"):
        read(tiny)
    images = read(tiny, class_folder="top")
    assert labels(images) == ["cat", "cat", "cup", "cup"]
    assert read(tiny, class_folder="leaf").classes == ("images",)


def test_tiny_imagenets_annotations_are_read(tiny):
    images = read(tiny, "val", class_folder="top")
    assert images.classes == ("cat", "cup")
    assert labels(images) == ["cup", "cat", "cup"]
    assert any("val_annotations.txt" in note for note in images.notes)


def test_years_below_the_classes_are_no_classes(tmp_path):
    for name in ("cat", "cup"):
        for year in ("2023", "2024"):
            write(tmp_path / name / year / "a.png")
    with pytest.raises(ValueError, match="'2023' lie under cat, cup"):
        read(tmp_path)
    assert read(tmp_path, class_folder="top").classes == ("cat", "cup")


def test_a_class_folder_in_a_class_folder_is_refused(tmp_path):
    write(tmp_path / "cat" / "a.png")
    write(tmp_path / "cat" / "more" / "b.png")
    write(tmp_path / "cup" / "a.png")
    with pytest.raises(ValueError, match="'cat/more' lies in another folder that has images"):
        read(tmp_path)
    assert labels(read(tmp_path, class_folder="top")) == ["cat", "cat", "cup"]


def test_a_depth_of_two_is_said(tmp_path):
    write(tmp_path / "animals" / "cat" / "a.png")
    write(tmp_path / "things" / "cup" / "a.png")
    assert any("--class-folder top" in note for note in read(tmp_path).notes)


def test_leaves_of_one_name_in_a_tar_are_refused_too(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("cat", "cup"):
            add(tar, f"{name}/images/0.png", as_file(noise(8)))
    with pytest.raises(ValueError, match="--class-folder top"):
        read(tmp_path / "x.tar")
    assert labels(read(tmp_path / "x.tar", class_folder="top")) == ["cat", "cup"]


# ---------------------------------------------------------------------------------------------------- ignored files
def test_jfif_is_read(tmp_path):
    write(tmp_path / "cat" / "a.jfif", as_file(noise(), "JPEG"))
    write(tmp_path / "cup" / "a.JPE", as_file(noise(), "JPEG"))
    images = read(tmp_path)
    assert labels(images) == ["cat", "cup"]
    assert images.load(0).size == (48, 48)


def test_a_class_whose_files_are_all_ignored_is_refused(tmp_path):
    write(tmp_path / "cat" / "a.png")
    write(tmp_path / "cup" / "a.heic", b"x")
    write(tmp_path / "cup" / "b.heic", b"x")
    with pytest.raises(ValueError, match=r"1 class folders is an image that is read \(cup; in cup: 2 .heic\)"):
        read(tmp_path)
    (tmp_path / "cup" / "a.heic").unlink()
    (tmp_path / "cup" / "b.heic").unlink()
    (tmp_path / "cup" / ".DS_Store").write_text("x")  # an empty folder for the user keeps its number
    assert read(tmp_path).classes == ("cat", "cup")


def test_ignored_files_are_counted_by_ending(tmp_path):
    for name in ("a.png", "b.heic", "c.heic", "d.txt"):
        write(tmp_path / "cat" / name)
    assert "3 files are not images of a class (.heic 2, .txt 1)" in " ".join(Report.of(read(tmp_path)).lines())


# ---------------------------------------------------------------------------------------------------- links, Unicode
def test_links_never_enter_a_real_path_twice(tmp_path):
    write(tmp_path / "train" / "cat" / "a.png")
    write(tmp_path / "train" / "cup" / "a.png")
    (tmp_path / "train" / "cat" / "loop").symlink_to(tmp_path / "train" / "cat")
    (tmp_path / "train" / "cup" / "up").symlink_to(tmp_path)
    (tmp_path / "train" / "again").symlink_to(tmp_path / "train" / "cat")
    images = read(tmp_path)
    assert images.files == [os.path.join("cat", "a.png"), os.path.join("cup", "a.png")]
    assert images.classes == ("cat", "cup")
    assert any(note.startswith("3 links lead to") for note in images.notes)


def test_a_class_that_is_a_link_is_read(tmp_path):
    write(tmp_path / "store" / "x" / "a.png")
    write(tmp_path / "data" / "cup" / "a.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "x")
    assert labels(read(tmp_path / "data")) == ["cat", "cup"]


def test_unicode_forms_of_a_name_are_one_class(tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    write(tmp_path / "train" / composed / "a.png")
    write(tmp_path / "train" / apart / "b.png")
    write(tmp_path / "train" / "tea" / "a.png")
    write(tmp_path / "val" / apart / "a.png")
    assert read(tmp_path).classes == (composed, "tea")
    assert labels(read(tmp_path, "val")) == [composed]


# ---------------------------------------------------------------------------------------------------- label files
@pytest.mark.parametrize(
    "table",
    ["id,breed\n0,cat\n1,cup\n2,cat\n", "image,label\n0.png,cat\n1.png,cup\n2.png,cat\n", "0.png,cat\n1.png,cup\n2.png,cat\n"],
)
def test_kaggles_label_files(tmp_path, table):
    for number in range(4):
        write(tmp_path / "train" / f"{number}.png")
    (tmp_path / "train.csv").write_text(table)
    with pytest.raises(ValueError, match="4 images lie in no class folder: --label-file .*train.csv"):
        read(tmp_path)
    images = read(tmp_path, label_file=str(tmp_path / "{split}.csv"))
    assert labels(images) == ["cat", "cup", "cat"]
    assert images.ignored == ("3.png",)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,a,b\n0,cat,1\n", "has the columns id, a, b"),
        ("id,label\n0,cat\n0,cup\n", "the classes cat and cup"),
        ("id\n0\n", "rows of an image name and a class"),
    ],
)
def test_what_is_no_label_file_is_refused(tmp_path, table, message):
    write(tmp_path / "train" / "0.png")
    (tmp_path / "x.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, label_file=str(tmp_path / "x.csv"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path, label_file=str(tmp_path / "y.csv"))


# ---------------------------------------------------------------------------------------------------- WebDataset
def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def shards(folder, found, ending="cls", names="{}-{:06d}"):
    """Two shards of a split with these labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / f"{names.format('train', shard)}.tar", "w") as tar:
            for number, label in list(enumerate(found))[shard::2]:
                add(tar, f"{number:04d}.jpg", as_file(noise(seed=number), "JPEG"))
                add(tar, f"{number:04d}.{ending}", label.encode())


@pytest.mark.parametrize(("ending", "make"), [("cls", str), ("json", lambda n: json.dumps({"label": int(n), "w": 1}))])
def test_shards_have_labels_next_to_the_images(tmp_path, ending, make):
    pytest.importorskip("webdataset")
    shards(tmp_path, [make(label) for label in "0201"], ending)
    images = open_images("tar/", "train", tmp_path)
    assert images.classes == ("0", "1", "2")
    assert images.numbered
    assert sorted(zip([images.name(i)[-8:] for i in range(4)], labels(images), strict=True)) == [
        ("0000.jpg", "0"),
        ("0001.jpg", "2"),
        ("0002.jpg", "0"),
        ("0003.jpg", "1"),
    ]
    assert images.ignored == ()
    (tmp_path / "names.txt").write_text("cat\ncup\ntea\n")
    named = open_images("tar/", "train", tmp_path, labelling=Labelling(class_map=str(tmp_path / "names.txt")))
    assert sorted(labels(named)) == ["cat", "cat", "cup", "tea"]
    with pytest.raises(FileNotFoundError, match="has tars of train, none of val"):
        open_images("tar/", "val", tmp_path)


def test_shards_with_names_or_wrong_labels(tmp_path):
    pytest.importorskip("webdataset")
    shards(tmp_path / "a", ["cup", "cat"])
    assert open_images("tar/", "train", tmp_path / "a").classes == ("cat", "cup")
    shards(tmp_path / "b", ['{"caption": "x"}'] * 2, "json")
    with pytest.raises(ValueError, match="has no label: expected one of cls, label.*found caption"):
        open_images("tar/", "train", tmp_path / "b")
    shards(tmp_path / "c", ["cup", "1"])
    with pytest.raises(ValueError, match="some labels are names"):
        open_images("tar/", "train", tmp_path / "c")


def test_shards_without_the_package_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "webdataset.autodecode", None)
    shards(tmp_path, "01")
    with pytest.raises(ImportError, match=r"laconic\[webdataset\]"):
        open_images("tar/", "train", tmp_path)


def test_a_shard_is_never_a_class(tmp_path):
    shards(tmp_path, "01", "txt")
    with pytest.raises(ValueError, match="numbered .*, as shards are, without class folders and without labels"):
        open_images("tar/", "train", tmp_path)
    assert not are_shards(["n01440764", "n01443537"])
    assert not are_shards(["0", "1", "2"])


def test_a_folder_of_tars_names_the_form_that_reads_it(tmp_path):
    shards(tmp_path, "01")
    with pytest.raises(ValueError, match="--data tar/"):
        read(tmp_path)


# ---------------------------------------------------------------------------------------------------- holding out
def test_a_share_of_every_class_is_held_out_by_seed(tmp_path):
    for name, count in (("cat", 10), ("cup", 5), ("tea", 1)):
        for number in range(count):
            write(tmp_path / name / f"{number}.png")
    images = FolderImages(tmp_path, "train")
    train, val = hold_out(images, 0.2, 3)
    names = [{one.name(i) for i in range(len(one))} for one in (train, val)]
    assert names[0].isdisjoint(names[1])
    assert len(names[0] | names[1]) == 16
    assert sorted(labels(val)) == ["cat", "cat", "cup"]
    assert any("13 of 16 images; 3 are held out" in note for note in train.notes)
    again = hold_out(images, 0.2, 3)[1]
    assert [again.name(i) for i in range(3)] == [val.name(i) for i in range(3)]
    assert hold_out(images, 0.2, 4)[1].numbers != val.numbers
    with pytest.raises(ValueError, match="above 0 and below 1"):
        hold_out(images, 1.0, 0)
