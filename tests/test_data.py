"""Image sets, what becomes of every file, and which images make up a step. All files are made here."""

import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from laconic.data import Order, Prepared, Report, Unreadable, decode, find_data, open_images, scenes, seeded

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
TRANSFORM = v2.Compose([v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.GaussianNoise(clip=False)])
TRANSFORM.transforms.insert(3, v2.ToDtype(torch.float32, scale=True))


def as_file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size=48, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write(path, data=None, colour=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_file(Image.new("RGB", (12, 12), colour)) if data is None else data)


@pytest.fixture
def folder(tmp_path):
    """Four classes, the second of them empty; two files that are no images."""
    for name, colour in (("class1", RED), ("class3", GREEN), ("class10", BLUE)):
        for number in range(3):
            write(tmp_path / "train" / name / f"{number}.png", colour=colour)
        write(tmp_path / "val" / name / "0.png", colour=colour)
    (tmp_path / "train" / "class2").mkdir()
    (tmp_path / "train" / "class1" / "notes.txt").write_text("hello")
    (tmp_path / "train" / "README").write_text("hello")
    return tmp_path


# ---------------------------------------------------------------------------------------------------- folders
def test_an_empty_class_keeps_its_number(folder):
    images = open_images("", "train", folder)
    assert images.classes == ("class1", "class2", "class3", "class10")
    assert [images.label(i) for i in range(len(images))] == [0] * 3 + [2] * 3 + [3] * 3
    assert images.load(8).getpixel((0, 0)) == BLUE
    report = Report.of(images)
    assert (report.counts, report.empty) == ((3, 0, 3, 3), ("class2",))
    assert set(report.ignored) == {"README", os.path.join("class1", "notes.txt")}
    said = " ".join(report.lines())
    assert "class2" in said
    assert "notes.txt" in said
    assert report.to_json()["classes"]["class2"] == 0


def test_without_an_empty_class_it_is_what_timm_reads(folder):
    (folder / "train" / "class2").rmdir()
    images, theirs = open_images("", "train", folder), ReaderImageFolder(str(folder / "train"))
    assert [(name, images.labels[i]) for i, name in enumerate(images.files)] == [
        (os.path.relpath(path, folder / "train"), label) for path, label in theirs.samples
    ]


def test_classes_below_other_folders_are_leaves_as_in_timm(tmp_path):
    write(tmp_path / "animals" / "cat" / "a.png")
    write(tmp_path / "things" / "cup" / "a.png")
    write(tmp_path / ".ipynb_checkpoints" / "a.png")
    images = open_images("", "train", tmp_path)
    assert images.classes == ("cat", "cup")
    assert images.ignored == (os.path.join(".ipynb_checkpoints", "a.png"),)


def test_a_class_that_a_split_lacks_keeps_its_number(folder):
    images = open_images("", "val", folder)
    assert images.classes == ("class1", "class2", "class3", "class10")
    assert [images.label(i) for i in range(3)] == [0, 2, 3]
    write(folder / "val" / "class7" / "0.png")
    with pytest.raises(ValueError, match=r"class folders that .*train does not have \(class7\)"):
        open_images("", "val", folder)


@pytest.mark.parametrize(
    ("there", "asked"), [("validation", "val"), ("val", "validation"), ("training", "train"), ("odd", "odd")]
)
def test_splits_have_synonyms(tmp_path, there, asked):
    write(tmp_path / there / "a" / "0.png")
    assert open_images("", asked, tmp_path).notes == ()


def test_a_folder_without_splits_is_read_whole_and_says_so(tmp_path):
    write(tmp_path / "a" / "0.png")
    assert "no folder for the split 'val'" in open_images("", "val", tmp_path).notes[0]


def test_another_split_is_never_read_in_the_place_of_the_one_asked_for(tmp_path):
    write(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(ValueError, match="no folder for the split 'val', but train"):
        open_images("", "val", tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: None, FileNotFoundError, "there is no folder"),
        (lambda p: p.write_bytes(b"x"), NotADirectoryError, "is a file"),
        (lambda p: (p / "train" / "a").mkdir(parents=True), ValueError, "no images in .* found 1 class folders"),
    ],
)
def test_what_is_no_folder_of_images_is_refused(tmp_path, make, error, message):
    make(tmp_path / "there")
    with pytest.raises(error, match=message):
        open_images("", "train", tmp_path / "there")


def test_a_limit_takes_images_of_every_class(folder):
    images = open_images("", "train", folder, limit=3)
    assert [images.label(i) for i in range(len(images))] == [0, 2, 3]
    assert images[2][0].getpixel((0, 0)) == BLUE
    assert len(open_images("", "train", folder, limit=100)) == 9
    with pytest.raises(IndexError):
        images[3]


# ---------------------------------------------------------------------------------------------------- pixels
def test_16_bit_grey_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(decode(as_file(Image.fromarray(ramp), kind), "x"))
        assert pixels.shape == (16, 16, 3)
        assert np.array_equal(pixels[..., 1].ravel(), np.arange(256))
    wide = np.asarray(decode(as_file(Image.fromarray(ramp.astype(np.int32)), "TIFF"), "x"))
    assert np.array_equal(wide[..., 0].ravel(), np.arange(256))


def test_floats_are_scaled():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for top in (1, 255, 4000):
        pixels = np.asarray(decode(as_file(Image.fromarray(ramp * np.float32(top)), "TIFF"), "x"))
        assert np.array_equal(pixels[..., 2].ravel(), np.arange(256))
    with pytest.raises(Unreadable, match="x: it has pixels that are not finite"):
        decode(as_file(Image.fromarray(np.where(ramp > 0.5, np.float32(np.nan), ramp)), "TIFF"), "x")


@pytest.mark.parametrize(
    ("image", "kind", "pixel"),
    [
        (Image.new("L", (4, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF", RED),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", RED),
        (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (*GREEN, 255)), "PNG", GREEN),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (Image.new("LA", (4, 4), (9, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGB", (16, 16), BLUE), "WEBP", BLUE),
    ],
)
def test_every_mode_becomes_rgb(image, kind, pixel):
    out = decode(as_file(image, kind), "x")
    assert out.mode == "RGB"
    assert np.abs(np.array(out.getpixel((1, 1))) - pixel).max() <= 3


def test_a_palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    out = decode(as_file(image, transparency=b"\x00\xff"), "x")
    assert [out.getpixel((0, 0)), out.getpixel((1, 0))] == [(255, 255, 255), BLUE]
    assert decode(as_file(image), "x").getpixel((0, 0)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_undone(orientation):
    upright = np.asarray(Image.new("RGB", (32, 16), RED)).copy()
    upright[:8, :16] = BLUE  # another quarter for every orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what a camera did, by the definition of the tag
    stored = Image.fromarray(upright)
    stored = stored.transpose(undo[orientation]) if orientation > 1 else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = decode(as_file(stored, exif=exif), "x")
    assert np.array_equal(np.asarray(out), upright)


def test_damaged_exif_data_is_no_damage_to_the_picture():
    data = as_file(Image.new("RGB", (16, 16), RED), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode(data, "x").size == (16, 16)


# ---------------------------------------------------------------------------------------------------- damage
JPEG, PNG = as_file(noise(), "JPEG"), as_file(noise())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, this is text", "not an image that Pillow can read"),
        (JPEG[: len(JPEG) // 2], "no end marker"),
        (JPEG[:-2], "no end marker"),
        (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "no end marker"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[: len(PNG) // 2] + b"garbage" + PNG[len(PNG) // 2 + 7 :], "broken data"),
        (as_file(noise(), "BMP")[:-300], "truncated"),
        (as_file(noise(), "WEBP")[:-300], "decoder"),
        (as_file(noise(), "TIFF")[:-300], "truncated"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_damaged_files_are_unreadable(data, reason, lenient, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # as some libraries set it for all
    with pytest.raises(Unreadable, match=reason) as caught:
        decode(data, "some.jpg")
    assert str(caught.value).startswith("some.jpg: ")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_the_end_marker_of_a_thumbnail_is_not_that_of_the_picture():
    thumbnail = as_file(noise(16), "JPEG")
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = JPEG[:2] + segment + JPEG[2:]
    assert decode(whole, "x").size == (48, 48)
    with pytest.raises(Unreadable, match="no end marker"):
        decode(whole[: len(whole) * 3 // 4] + bytes(500), "x")
    assert decode(whole + b"\x00more\xff\xda", "x").size == (48, 48)  # what phones append


def test_unreadable_crosses_processes():
    error = pickle.loads(pickle.dumps(Unreadable("a.png", "it is cut off")))
    assert (error.name, error.reason, str(error)) == ("a.png", "it is cut off", "a.png: it is cut off")


# ---------------------------------------------------------------------------------------------------- tars
def add(tar, name, data=None):
    info = tarfile.TarInfo(name)
    if data is None:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    else:
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def make_tar(path, names, prefix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            add(tar, f"{prefix}{name}", as_file(Image.new("RGB", (8, 8), (number * 9, 0, 0))))
    return path


NAMES = ("b/10.png", "b/9.png", "a/1.png", "c2/1.png", "c10/1.png")


def contents(images):
    return [(images.name(i), images.label(i), np.asarray(images.load(i))[0, 0, 0]) for i in range(len(images))]


def test_a_tar_is_read_as_timm_reads_it(tmp_path):
    path = make_tar(tmp_path / "x.tar", NAMES)
    images, theirs = open_images("", "val", path), ReaderImageInTar(str(path))
    expected = [(theirs.filename(i), theirs[i][1], np.asarray(Image.open(theirs[i][0]))[0, 0, 0]) for i in range(len(theirs))]
    theirs.tar_state.tf.close()
    assert contents(images) == expected
    assert images.classes == ("a", "b", "c2", "c10")
    assert contents(open_images("tar/x.tar", "val", tmp_path)) == expected


def test_an_empty_folder_in_a_tar_keeps_its_number(tmp_path):
    path = make_tar(tmp_path / "x.tar", NAMES)
    with tarfile.open(path, "a") as tar:
        add(tar, "b2")
        add(tar, "a/notes.txt", b"hello")
    images = open_images("", "val", path)
    assert images.classes == ("a", "b", "b2", "c2", "c10")
    assert [images.label(i) for i in range(5)] == [0, 1, 1, 3, 4]
    assert images.ignored == ("a/notes.txt",)


def test_tars_of_classes_and_tars_in_a_tar(tmp_path):
    for name in ("cat", "dog"):
        make_tar(tmp_path / "train" / f"{name}.tar", ["1.png", "2.png"])
    images, theirs = open_images("tar/", "train", tmp_path), ReaderImageInTar(str(tmp_path / "train"))
    assert images.classes == ("cat", "dog") == tuple(theirs.class_name_to_idx)
    assert [images.label(i) for i in range(4)] == [0, 0, 1, 1]
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("dog", "cat"):
            tar.add(tmp_path / "train" / f"{name}.tar", f"{name}.tar")
    nested = open_images("", "train", tmp_path / "all.tar")
    assert nested.classes == images.classes
    assert contents(nested) == contents(images)


def test_a_tar_for_every_split(tmp_path):
    make_tar(tmp_path / "validation.tar", NAMES)
    images = open_images("tar/", "val", tmp_path)
    assert (len(images), images.notes) == (5, ())
    with pytest.raises(FileNotFoundError, match="no train.tar, but validation.tar"):
        open_images("tar/", "train", tmp_path)


def test_a_tar_that_is_cut_off_is_refused(tmp_path):
    path = make_tar(tmp_path / "x.tar", NAMES)
    path.write_bytes(path.read_bytes()[: 512 * 3 + 40])
    with pytest.raises(ValueError, match="cannot be read as a tar file"):
        open_images("", "val", path)


def test_processes_do_not_disturb_each_other_in_a_tar(tmp_path):
    images = open_images("", "val", make_tar(tmp_path / "x.tar", [f"a/{i}.png" for i in range(20)]))
    prepared = Prepared(images, v2.PILToTensor())
    here = torch.stack([prepared[i][0] for i in range(20)])  # opened before the workers start
    there = torch.cat([batch[0] for batch in DataLoader(prepared, 2, num_workers=2)])
    assert torch.equal(here, there)
    assert len(here.unique()) > 10


# ---------------------------------------------------------------------------------------------------- other sets
def test_scenes_are_those_of_the_generator():
    images = open_images("scenes", "val", limit=12, size=24, seed=3)
    assert (len(images), images.classes) == (12, scenes.CLASSES)
    for i in range(12):
        scene = scenes.scene(i, split="val", seed=3, size=24)
        assert images.label(i) == images.scene(i).label == scene.label
        assert np.array_equal(np.asarray(images.load(i)), scene.picture)
        assert np.array_equal(images.scene(i).mask, scene.mask)
    lengths = [len(open_images("scenes", split)) for split in ("train", "validation", "test")]
    assert lengths == [36000, 2000, 2000]
    with pytest.raises(ValueError, match="scenes have the splits train, val, test, not 'odd'"):
        open_images("scenes", "odd")
    with pytest.raises(IndexError):
        images[12]


def test_digits_are_dealt_out_evenly_and_once():
    splits = {name: open_images("digits", name, size=20) for name in ("train", "val", "test")}
    assert [len(images) for images in splits.values()] == [1297, 250, 250]
    numbers = [number for images in splits.values() for number in images.numbers]
    assert sorted(numbers) == list(range(1797))
    for images in splits.values():
        shares = np.bincount(images.labels) / len(images)
        assert np.abs(shares - 0.1).max() < 0.01
    image, label = splits["test"][0]
    assert (image.size, image.mode, np.asarray(image).max() > 200) == ((20, 20), "RGB", True)
    assert splits["val"].numbers[:5] == open_images("digits", "val").numbers[:5]


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"laconic\[train\]"):
        open_images("digits", "val")


@pytest.mark.parametrize("name", ["wds/imagenet", "hfids/imagenet-1k", "TFDS/imagenet2012"])
def test_streams_are_refused(name):
    with pytest.raises(ValueError, match=r"is a stream .* no fixed order .* hfds/"):
        open_images(name, "train")


def test_names_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'scenes'"):
        open_images("scense", "train")
    with pytest.raises(ValueError, match="give the folder of the images"):
        open_images("", "train")
    with pytest.raises(ValueError, match="limit must be 0"):
        open_images("scenes", "train", limit=-1)
    with pytest.raises(FileNotFoundError, match="nothing at data/imagenet"):
        find_data("data/imagenet")
    assert find_data(str(tmp_path)) == ("", tmp_path)
    assert [find_data(name)[0] for name in ("scenes", "hfds/food101", "tar/x.tar")] == ["scenes", "hfds/food101", "tar/x.tar"]


class FakeReader:
    """What timm's reader of hub data sets gives."""

    def __init__(self, labels=(0, 1, 1)):
        self.labels, self.class_to_idx = labels, {"dog": 1, "cat": 0}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return io.BytesIO(b"broken" if i == 2 else as_file(Image.new("L", (4, 4), 9))), self.labels[i]

    def iter_targets(self):
        return iter(self.labels)


def test_hub_data_sets(monkeypatch):
    asked = []

    def create_reader(name, root, split):
        asked.append((name, split))
        if split == "val":
            raise ValueError("unknown split")
        return FakeReader()

    monkeypatch.setattr("timm.data.readers.create_reader", create_reader)
    images = open_images("hfds/Some/Name", "val")
    assert asked == [("hfds/Some/Name", "val"), ("hfds/Some/Name", "valid"), ("hfds/Some/Name", "validation")][: len(asked)]
    assert images.classes == ("cat", "dog")
    assert Report.of(images).counts == (1, 2)
    image, label = images[1]
    assert (image.mode, label) == ("RGB", 1)
    with pytest.raises(Unreadable, match="hfds/Some/Name 2: it is not an image"):
        images.load(2)
    monkeypatch.setattr("timm.data.readers.create_reader", lambda *a, **k: FakeReader((0, 7, -1)))
    with pytest.raises(ValueError, match="image 1 of hfds/x has the label 7; expected 0 to 1"):
        open_images("hfds/x", "val").label(1)


def test_hub_data_sets_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets.*laconic\[datasets\]"):
        open_images("hfds/food101", "val")


def test_data_sets_of_torchvision(folder):
    (folder / "train" / "class2").rmdir()
    images = open_images("torch/image_folder", "train", folder)
    assert images.classes == ("class1", "class10", "class3")  # as torchvision sorts
    assert images[0][0].mode == "RGB"
    assert [images.label(i) for i in range(9)] == [0] * 3 + [1] * 3 + [2] * 3
    with pytest.raises(ValueError, match="'torch/nonsense' cannot be opened"):
        open_images("torch/nonsense", "train", folder)


def test_import_needs_no_other_library():
    code = "import sys, laconic.data; print({'timm', 'PIL', 'sklearn', 'torchvision', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------- items
@pytest.fixture
def prepared():
    return Prepared(open_images("scenes", "train", limit=16, size=16), TRANSFORM, seed=5)


def test_an_item_depends_on_nothing_but_its_key(prepared):
    first = prepared[(1, 0, 3)][0]
    torch.rand(3), random.random(), np.random.rand()
    prepared[(0, 0, 1)]
    assert torch.equal(prepared[(1, 0, 3)][0], first)
    for other in ((2, 0, 3), (1, 1, 3), 3):
        assert not torch.equal(prepared[other][0], first)
    assert not torch.equal(Prepared(prepared.images, TRANSFORM, seed=6)[(1, 0, 3)][0], first)
    assert torch.equal(prepared[3][0], prepared[(0, 0, 3)][0])


def test_an_item_does_not_depend_on_workers(prepared):
    order = Order(16, 4, seed=1, epoch=2)
    alone = [batch[0] for batch in DataLoader(prepared, batch_sampler=order)]
    shared = [batch[0] for batch in DataLoader(prepared, batch_sampler=order, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_workers_that_persist_follow_the_epoch(prepared):
    order = Order(16, 4, seed=1)
    loader = DataLoader(prepared, batch_sampler=order, num_workers=1, persistent_workers=True)
    epochs = [torch.cat([batch[0] for batch in loader])]
    order.begin(1, start=2)
    epochs.append(torch.cat([batch[0] for batch in loader]))
    assert [len(epoch) for epoch in epochs] == [16, 8]
    assert torch.equal(epochs[1], torch.stack([prepared[key][0] for keys in order for key in keys]))


def test_the_generators_are_put_back():
    def states():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = states()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(1, 2, 3):
        inside = states()
    assert states() == expected
    with seeded(1, 2, 3):
        assert states() == inside
    with seeded(1, 3, 2):
        assert states() != inside
    with pytest.raises(RuntimeError), seeded(4):
        raise RuntimeError
    with seeded(-1):
        pass


def test_an_unreadable_image_is_replaced_by_the_next(folder):
    write(folder / "train" / "class10" / "1.png", PNG[:100])
    write(folder / "train" / "class10" / "2.png", b"")
    images = open_images("", "train", folder)
    prepared = Prepared(images, v2.PILToTensor())
    assert [prepared[i][1:] for i in range(9)][6:] == [(3, 6, -1), (0, 0, 7), (0, 0, 8)]  # the next after the last is the first
    assert prepared[7][0].flatten(1)[:, 0].tolist() == list(RED)
    assert str(prepared.failure(8)) == f"{os.path.join('class10', '2.png')}: the file is empty"
    pixels, *rest = Prepared(images, v2.PILToTensor(), replace=False)[7]
    assert (pixels.shape, rest) == ((3, 12, 12), [3, 7, 7])
    (folder / "train" / "class1" / "0.png").unlink()
    assert "its file cannot be read: No such file" in prepared.failure(0).reason


def test_where_nothing_can_be_read_it_stops(tmp_path):
    for i in range(3):
        write(tmp_path / "a" / f"{i}.png", b"no")
    with pytest.raises(ValueError, match="3 images in a row cannot be read, the first is a.1.png"):
        Prepared(open_images("", "train", tmp_path), TRANSFORM)[1]
    assert Prepared(open_images("", "train", tmp_path), TRANSFORM, replace=False)[1][1:] == (0, 1, 1)


# ---------------------------------------------------------------------------------------------------- order
def test_an_epoch_is_a_permutation_without_the_rest():
    order = Order(23, 5, seed=3, epoch=7)
    batches = list(order)
    assert [len(batch) for batch in batches] == [5] * 4 == [5] * len(order)
    seen = [index for batch in batches for _, _, index in batch]
    assert len(set(seen)) == 20
    assert seen != sorted(seen)
    assert {(epoch, copy) for batch in batches for epoch, copy, _ in batch} == {(7, 0)}
    assert list(Order(23, 5, seed=3, epoch=7)) == batches
    for other in (Order(23, 5, seed=4, epoch=7), Order(23, 5, seed=3, epoch=8), Order(23, 5, seed=7, epoch=3)):
        assert [index for batch in other for _, _, index in batch] != seen


@pytest.mark.parametrize(("world", "accumulate", "repeats"), [(1, 2, 1), (2, 1, 1), (2, 3, 1), (4, 1, 3), (3, 2, 3)])
def test_a_step_has_the_same_images_for_any_number_of_processes(world, accumulate, repeats):
    one = list(Order(50, 12, seed=1, repeats=repeats))
    ranks = [list(Order(50, 12, 1, 0, rank, world, accumulate, repeats)) for rank in range(world)]
    assert all(len(batches) == len(one) * accumulate for batches in ranks)
    for step, whole in enumerate(one):
        forwards = [[batches[step * accumulate + m] for batches in ranks] for m in range(accumulate)]
        parts = [part for forward in forwards for part in forward]
        assert {len(part) for part in parts} == {12 // world // accumulate}
        assert [key for part in parts for key in part] == whole  # every forward of all processes is a stretch of it


def test_it_goes_on_in_the_middle_of_an_epoch():
    whole = list(Order(50, 6, 1, 4, rank=1, world=2, accumulate=3))
    order = Order(50, 6, 1, 4, rank=1, world=2, accumulate=3, start=5)
    assert list(order) == whole[15:]
    assert len(order) == len(whole) - 15
    order.begin(4)
    assert list(order) == whole
    assert list(Order(50, 6, 1, 4, start=8)) == []


def test_repeats_come_in_a_row_and_the_epoch_is_no_longer():
    keys = [key for batch in Order(30, 8, seed=2, repeats=3) for key in batch]
    assert len(keys) == 24
    assert [copy for _, copy, _ in keys] == [0, 1, 2] * 8
    assert len({index for _, _, index in keys}) == 8
    assert all(a[2] == b[2] for a, b in pairwise(keys) if b[1])
    plain = [key for batch in Order(30, 8, seed=2) for key in batch]
    assert [index for _, copy, index in keys if copy == 0] == [index for _, _, index in plain][:8]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"batch_size": 10, "world": 4}, "10 images cannot be divided evenly by 4 processes x 1 forwards"),
        ({"batch_size": 8, "world": 2, "accumulate": 3}, "use a multiple of 6"),
        ({"batch_size": 40}, "30 images do not fill one batch of 40"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 8, "repeats": 0}, "repeats must be at least 1"),
        ({"batch_size": 8, "rank": 2, "world": 2}, "rank must be 0 to 1"),
        ({"batch_size": 8, "start": 4}, "start 0 to 3 steps"),
        ({"batch_size": 8, "epoch": -1}, "epoch must be at least 0"),
    ],
)
def test_orders_that_cannot_be(numbers, message):
    with pytest.raises(ValueError, match=message):
        Order(30, **numbers)
