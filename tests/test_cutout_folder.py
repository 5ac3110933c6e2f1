"""Cutouts as a folder: `laconic data cutouts`, its splits, files and record; packages by stand-ins of apt-get and dpkg."""

import csv
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from laconic.cli.app import main
from laconic.core.files import Refusal
from laconic.data import Unreadable, find_data, open_images
from laconic.data.cutout_folder import write_cutouts
from laconic.data.cutout_packages import absent, download, versions
from laconic.data.cutout_sources import (
    FOLDER_VARIABLE,
    LISTED,
    PACKAGES,
    THINGS,
    THINGS_PACKAGE,
    cache_folder,
    find_sources,
    read_thing,
    short_name,
)
from laconic.data.cutout_splits import CutoutSettings, split_cutouts
from test_cutouts import noise, thing

SMALL = CutoutSettings(views=(2, 1, 1), pixels=32)


@pytest.fixture
def own(tmp_path):
    """Folders of objects (5 birds, 2 cats, a dog) and of 8 backgrounds."""
    for category, count in (("birds", 5), ("cats", 2), ("dogs", 1)):
        (tmp_path / "objects" / category).mkdir(parents=True)
        for number in range(count):
            thing((255, 40 * number, 0)).save(tmp_path / "objects" / category / f"{category}{number}.png")
    (tmp_path / "grounds").mkdir()
    for number in range(8):
        noise(96, 64, number).save(tmp_path / "grounds" / f"{number}.png")
    return {"objects": tmp_path / "objects", "backgrounds": tmp_path / "grounds"}


@pytest.fixture
def words(own, tmp_path):
    options = [word for name, path in own.items() for word in (f"--{name}", str(path))]
    return ["data", "cutouts", str(tmp_path / "made"), *options, "--views", "2", "1", "1", "--pixels", "32"]


# ---------------------------------------------------------------------------------------------------- splits
def test_splits_have_other_views_and_other_backgrounds(own):
    sets = split_cutouts(find_sources(**own), SMALL)
    assert [len(sets[split]) for split in ("train", "val", "test")] == [16, 8, 8]
    assert [len(sets[split].sources.backgrounds) for split in ("train", "val", "test")] == [5, 1, 2]
    used = [file for images in sets.values() for file in images.sources.backgrounds]
    assert len(set(used)) == 8
    assert [images.first_view for images in sets.values()] == [0, 2, 3]
    assert len({images.sources.things for images in sets.values()}) == 1
    only_test = split_cutouts(find_sources(**own), CutoutSettings(views=(0, 0, 1), pixels=32))
    assert list(only_test) == ["test"]
    assert only_test["test"].sources == sets["test"].sources


def test_things_are_divided_on_request(own):
    settings = CutoutSettings(views=(2, 1, 1), pixels=32, split_by="thing")
    sets = split_cutouts(find_sources(**own), settings)
    counts = {split: [category for _, category, _ in images.sources.things] for split, images in sets.items()}
    assert counts == {"train": ["birds"] * 3 + ["cats", "dogs"], "val": ["birds"], "test": ["birds", "cats"]}
    names = [name for images in sets.values() for name, _, _ in images.sources.things]
    assert sorted(names) == sorted(name for name, _, _ in find_sources(**own).things)
    other = split_cutouts(find_sources(**own), CutoutSettings(views=(2, 1, 1), split_by="thing", seed=1))
    assert other["train"].sources.things != sets["train"].sources.things


def test_too_few_for_the_splits(own):
    for number in range(2, 8):
        (own["backgrounds"] / f"{number}.png").unlink()
    with pytest.raises(ValueError, match="found 2 backgrounds, expected at least 3"):
        split_cutouts(find_sources(**own), SMALL)
    with pytest.raises(ValueError, match="three counts"):
        CutoutSettings(views=(0, 0, 0))
    with pytest.raises(ValueError, match="three counts"):
        CutoutSettings(views=(1, -1, 0))


def test_no_thing_is_left_for_a_split(own):
    for number in range(5):
        (own["objects"] / f"birds/birds{number}.png").unlink()
    settings = CutoutSettings(views=(1, 1, 1), split_by="thing")
    with pytest.raises(ValueError, match="to give one to val"):
        split_cutouts(find_sources(**own), settings)


# ---------------------------------------------------------------------------------------------------- the folder
def test_the_folder_is_read_as_images_with_categories(words, tmp_path, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert [line.split()[:5] for line in out.splitlines() if line.startswith(("train ", "val ", "test "))] == [
        ["train", "16", "8", "3", "5"],
        ["val", "8", "8", "3", "1"],
        ["test", "8", "8", "3", "2"],
    ]
    name, root = find_data(str(tmp_path / "made"))
    for split, count in (("train", 16), ("val", 8), ("test", 8)):
        images = open_images(name, split, root)
        assert (images.classes, len(images), images.ignored, images.notes) == (("birds", "cats", "dogs"), count, (), ())
        assert images[0][0].size == (32, 32)


def test_pictures_masks_and_table_agree(own, tmp_path):
    sources = find_sources(**own)
    write_cutouts(tmp_path / "made", sources, SMALL, file_type="png")
    sets = split_cutouts(sources, SMALL)
    with open(tmp_path / "made/cutouts.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 32
    assert {str(file.relative_to(tmp_path / "made")) for file in (tmp_path / "made").glob("t*/**/*.png")} | {
        str(file.relative_to(tmp_path / "made")) for file in (tmp_path / "made").glob("val/**/*.png")
    } == set(rows)
    for split, images in sets.items():
        for i in range(len(images)):
            one = images.cutout(i)
            thing_name, category, _ = sources.things[one.thing]
            file = f"{split}/{category}/{thing_name}-{images.first_view + i // 8:03d}.png"
            assert np.array_equal(np.array(Image.open(tmp_path / "made" / file)), one.picture)
            mask = np.array(Image.open(tmp_path / "made/masks" / file))
            assert mask.dtype == bool
            assert np.array_equal(mask, one.mask)
            row = rows[file]
            assert (row["split"], row["thing"], row["category"]) == (split, thing_name, category)
            assert row["background"] == f"grounds/{images.sources.backgrounds[one.background].name}"
            assert float(row["share"]) == pytest.approx(one.share, abs=1e-5)
            left, top, right, bottom = (int(row[side]) for side in ("left", "top", "right", "bottom"))
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert all(edge.any() for edge in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]))


def test_the_record_tells_how_to_make_it_again(words, tmp_path, capsys, own):
    assert main([*words, "--json", "--seed", "7", "--area", "0.01", "0.05"]) == 0
    report = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "made/cutouts.json").read_text())
    assert report == {"folder": str(tmp_path / "made"), **record}
    assert record["settings"] | {"seed": 7, "area": [0.01, 0.05], "views": [2, 1, 1], "pixels": 32} == record["settings"]
    assert {split: its["pictures"] for split, its in record["splits"].items()} == {"train": 16, "val": 8, "test": 8}
    assert 0.01 < record["splits"]["train"]["mean_share"] < 0.05
    assert record["own"] == {name: str(path) for name, path in own.items()}
    assert (len(record["things"]), record["missing"], record["packages"]) == (8, [], {})
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in record["settings"].items()}
    write_cutouts(tmp_path / "again", find_sources(**own), CutoutSettings(**settings))
    for file in (tmp_path / "made").rglob("*.*g"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "made")).read_bytes()


def test_a_folder_in_use_is_refused_before_the_work(words, tmp_path, capsys, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/mine.txt").write_text("x")
    monkeypatch.setattr("laconic.cli.data.find_sources", None)
    assert main(words) == 1
    assert "made is not empty; give the name of a new folder" in capsys.readouterr().err
    (tmp_path / "made/mine.txt").unlink()
    monkeypatch.undo()
    assert main(words) == 0  # an empty folder is used
    assert sorted(file.name for file in tmp_path.iterdir()) == ["grounds", "made", "objects"]


def test_a_failure_leaves_nothing(own, tmp_path, monkeypatch):
    (own["objects"] / "dogs/dogs0.png").write_bytes(b"no picture")
    read_thing.cache_clear()
    with pytest.raises(Unreadable, match=r"dogs0\.png"):
        write_cutouts(tmp_path / "made", find_sources(**own), SMALL)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["grounds", "objects"]


def test_two_things_of_one_name(own, tmp_path):
    thing((0, 0, 255)).save(own["objects"] / "cats/CATS0.webp")
    with pytest.raises(Refusal, match="two things of one name"):
        write_cutouts(tmp_path / "made", find_sources(**own), SMALL)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objects", "absent"], "--objects absent: there is no such folder"),
        (["--pixels", "0"], "pixels must be at least 1"),
        (["--size", "0.5", "2"], "not 0.5 and 2"),
        (["--views", "0", "0", "0"], "three counts"),
    ],
)
def test_refusals(words, tmp_path, capsys, more, message):
    code = main([*words, *more])
    captured = capsys.readouterr()
    assert (code, captured.out) in ((1, ""), (2, ""))
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert not (tmp_path / "made").exists()


def test_another_kind_of_data(capsys, tmp_path):
    assert main(["data", "cutuots", str(tmp_path / "made")]) == 1
    assert "Did you mean 'cutouts'?" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- packages
@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Stand-ins of apt-get and dpkg, which write a package of two things or three backgrounds; no package is installed."""
    tools, made = tmp_path / "tools", tmp_path / "packages"
    tools.mkdir()
    listed = tmp_path / "listed.toml"
    listed.write_text('[things]\nfruit = ["fig", "kiwi"]\n[backgrounds]\nothers = ["a.png", "b.png", "c.png"]\n')
    monkeypatch.setattr("laconic.data.cutout_sources.LISTED", listed)
    for name in PACKAGES:
        docs = made / name / "usr/share/doc" / name
        docs.mkdir(parents=True)
        (docs / "copyright").write_text("free")
        (docs / "changelog.Debian.gz").write_bytes(gzip.compress(f"{name} (1:2.3-4) unstable; urgency=low\n".encode()))
    (made / THINGS_PACKAGE / THINGS).mkdir(parents=True)
    for name in ("fig", "kiwi"):
        thing((200, 30, 30)).save(made / THINGS_PACKAGE / THINGS / f"{name}.png")
    for name in "abc":
        noise(64, 64, ord(name)).save(made / "mate-backgrounds/usr/share" / f"{name}.png")
    (tools / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f'if [ -e {tmp_path}/fails-$2 ]; then echo "W: a warning" >&2; echo "E: Unable to locate package $2" >&2; exit 100; fi\n'
        'echo noise\ntouch "$2_1.deb"\n'
    )
    (tools / "dpkg").write_text(f'#!/bin/sh\nname=$(basename "$2"); cp -r "{made}/${{name%_1.deb}}" "$3"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    (tmp_path / "root").mkdir()
    cached = [cache_folder() / name for name in PACKAGES]
    for module in ("laconic.data.cutout_sources", "laconic.cli.data"):  # whatever this machine has installed
        monkeypatch.setattr(f"{module}.places", lambda packages=None: [packages] if packages else [tmp_path / "root", *cached])
    return tmp_path


def test_missing_packages_are_downloaded_once(apt, capsys):
    words = ["data", "cutouts", str(apt / "made"), "--views", "1", "1", "1", "--pixels", "32", "--json"]
    assert main(words) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)  # what the tools print is not in it
    assert record["packages"] == dict.fromkeys(PACKAGES, "1:2.3-4")
    assert record["things"] == ["tuxpaint/stamps/fig.png", "tuxpaint/stamps/kiwi.png"]
    assert (apt / "calls").read_text().split() == [word for name in PACKAGES for word in ("download", name)]
    assert sorted(file.name for file in cache_folder().iterdir()) == sorted(PACKAGES)
    words[2] = str(apt / "again")
    assert main(words) == 0
    assert (apt / "calls").read_text().count("download") == len(PACKAGES)


def test_only_what_is_needed_is_downloaded(apt, own, capsys):
    words = ["data", "cutouts", str(apt / "made"), "--views", "1", "1", "1", "--pixels", "32"]
    assert main([*words, "--no-download"]) == 1
    assert "found 0 things" in capsys.readouterr().err
    assert not (apt / "calls").exists()
    assert main([*words, "--backgrounds", str(own["backgrounds"])]) == 0
    assert (apt / "calls").read_text().split() == ["download", THINGS_PACKAGE]
    assert absent([cache_folder() / THINGS_PACKAGE]) == [name for name in PACKAGES if name != THINGS_PACKAGE]


def test_a_package_that_cannot_be_had(apt, caplog):
    (apt / "fails-lomiri-wallpapers-16.04").touch()
    download(["mate-backgrounds", "lomiri-wallpapers-16.04"])
    assert "left out: apt-get cannot download lomiri-wallpapers-16.04: Unable to locate package" in caplog.text
    assert [file.name for file in cache_folder().iterdir()] == ["mate-backgrounds"]
    (apt / f"fails-{THINGS_PACKAGE}").touch()
    with pytest.raises(Refusal, match=f"cannot download {THINGS_PACKAGE}: Unable to locate package.*--objects"):
        download([THINGS_PACKAGE])


def test_without_apt(apt, monkeypatch):
    monkeypatch.setenv("PATH", str(apt / "nothing"))
    with pytest.raises(Refusal, match=r"58 MB: mate-backgrounds, lomiri-wallpapers-20.04\).*has no apt-get.*--packages"):
        download(["mate-backgrounds", "lomiri-wallpapers-20.04"])


def test_versions(apt):
    folder = apt / "packages" / THINGS_PACKAGE
    assert versions([folder]) == {THINGS_PACKAGE: "1:2.3-4"}
    (folder / "usr/share/doc" / THINGS_PACKAGE / "changelog.Debian.gz").unlink()
    assert versions([folder]) == {THINGS_PACKAGE: None}


# ---------------------------------------------------------------------------------------------------- by name
def test_cutouts_by_name(apt, monkeypatch):
    with pytest.raises(FileNotFoundError, match="laconic data cutouts"):
        open_images("cutouts", "val")
    download(["mate-backgrounds", THINGS_PACKAGE])
    assert find_data("cutouts") == ("cutouts", None)
    sizes = {split: len(open_images("cutouts", split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 20, "validation": 4, "test": 8}
    images = open_images("cutouts", "test", limit=3, seed=4)
    assert len(images) == 3
    assert images.classes == ("fruit",)
    whole = split_cutouts(find_sources(), CutoutSettings(seed=4))["test"]
    assert [images.name(i) for i in range(3)] == ["fig, view 12", "fig, view 14", "kiwi, view 13"]
    assert np.array_equal(np.array(images.load(1)), whole.cutout(4).picture)
    with pytest.raises(ValueError, match="cutouts have the splits train, val, test, not 'extra'"):
        open_images("cutouts", "extra")


def test_short_names_are_the_same_on_every_machine():
    assert short_name(Path("/x/usr/share/wallpapers/Grey/a.jpg")) == "wallpapers/Grey/a.jpg"
    assert short_name(Path("/srv/me/site-packages/skimage/data/coffee.png")) == "data/coffee.png"


@pytest.mark.skipif(FOLDER_VARIABLE not in os.environ, reason=f"{FOLDER_VARIABLE} names no folder with the unpacked packages")
def test_the_packages_have_no_name_twice(tmp_path):
    record = write_cutouts(tmp_path / "made", find_sources(), CutoutSettings(views=(0, 0, 1), pixels=32))
    assert record["splits"]["test"] | {"pictures": 191, "categories": 25} == record["splits"]["test"]
    assert LISTED.is_file()
