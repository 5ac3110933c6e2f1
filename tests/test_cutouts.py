"""Benchmark pictures of photographs: things on backgrounds, and regions. Small files are made here."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from laconic.data import Unreadable
from laconic.data.cutout_sources import FOLDER_VARIABLE, LISTED, PACKAGES, THINGS, cache_folder, permutation, read_thing
from laconic.data.cutouts import Cutouts, Regions, find_sources

COLOURS = {"animals/cat": (255, 0, 0), "animals/dog": (0, 255, 0), "fruit/apple": (0, 0, 255), "fruit/pear": (255, 255, 0)}


def noise(width, height, seed):
    small = np.random.default_rng(seed).integers(0, 100, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def thing(colour, size=(80, 40), margin=10):
    """A filled rectangle in a transparent margin, whose hidden colour is white."""
    image = Image.new("RGBA", tuple(length + 2 * margin for length in size), (255, 255, 255, 0))
    image.paste((*colour, 255), (margin, margin, margin + size[0], margin + size[1]))
    return image


@pytest.fixture
def sources(tmp_path):
    for name, colour in COLOURS.items():
        file = tmp_path / "objects" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        thing(colour).save(file)
    for number in range(6):
        file = tmp_path / "grounds" / f"{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(192, 128, number).save(file)
    return find_sources(objects=tmp_path / "objects", backgrounds=tmp_path / "grounds")


def middle(mask):
    """The mask without its border pixels, which are blended."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis)
    return inner


# ---------------------------------------------------------------------------------------------------- things
def test_labels_names_and_order(sources):
    images = Cutouts(sources, views=3, pixels=64)
    assert len(images) == 12
    assert images.classes == ("animals", "fruit")
    assert [images.label(i) for i in range(8)] == [0, 0, 1, 1] * 2
    assert images.name(5) == "dog, view 1"
    by_thing = Cutouts(sources, views=3, pixels=64, label="thing")
    assert by_thing.classes == tuple(COLOURS)
    assert [by_thing.label(i) for i in range(8)] == [0, 1, 2, 3] * 2
    one = images.cutout(6)
    assert (one.thing, one.category, one.picture.shape, one.picture.dtype) == (2, 1, (64, 64, 3), np.uint8)
    image, label = images[6]
    assert label == 1
    assert np.array_equal(np.array(image), one.picture)
    with pytest.raises(IndexError, match="has 12"):
        images.cutout(12)


def test_pictures_depend_on_seed_thing_and_view_alone(sources):
    images = Cutouts(sources, views=3, pixels=64, seed=5)
    again = pickle.loads(pickle.dumps(Cutouts(sources, views=9, pixels=64, seed=5)))
    later = Cutouts(sources, views=1, pixels=64, seed=5, first_view=2)
    backwards = {i: again.cutout(i) for i in reversed(range(12))}
    for i in range(12):
        assert np.array_equal(images.cutout(i).picture, backwards[i].picture)
        assert np.array_equal(images.cutout(i).mask, backwards[i].mask)
    for i in range(4):
        assert np.array_equal(later.cutout(i).picture, images.cutout(8 + i).picture)
    assert not np.array_equal(images.cutout(0).picture, images.cutout(4).picture)
    assert not np.array_equal(images.cutout(0).picture, Cutouts(sources, pixels=64, seed=6).cutout(0).picture)


def test_the_stream_of_random_numbers_never_changes(sources):
    assert permutation(6, 0) == [4, 5, 1, 2, 0, 3]
    images = Cutouts(sources, views=2, pixels=64)
    assert [images.cutout(i).background for i in range(8)] == [2, 1, 2, 0, 5, 0, 0, 5]
    where = [np.nonzero(images.cutout(i).mask) for i in range(4)]
    corners = [(int(rows.min()), int(columns.min())) for rows, columns in where]
    assert corners == [(21, 9), (30, 3), (23, 14), (35, 13)]


def test_the_mask_is_where_the_thing_is(sources):
    images = Cutouts(sources, views=20, pixels=64)
    for i in range(len(images)):
        one = images.cutout(i)
        colour = list(COLOURS.values())[one.thing]
        assert (one.picture[middle(one.mask)] == colour).all()
        assert (
            one.picture[~one.mask].max(axis=1) <= 180
        ).all()  # backgrounds are dark; the white margin does not shine through
        assert one.share == one.mask.mean() > 0.05


def test_size_is_that_of_the_longer_side(sources):
    images = Cutouts(sources, views=30, size=(0.3, 0.6), pixels=100)
    longer = []
    for i in range(len(images)):
        rows, columns = np.nonzero(images.cutout(i).mask)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(width - 2 * height) <= 1
        longer.append(width)
    assert 29 <= min(longer) < 36
    assert 54 < max(longer) <= 61


def test_area_is_the_share_of_the_picture(sources, tmp_path):
    holed = thing((255, 0, 0))
    holed.paste((0, 0, 0, 0), (20, 15, 80, 45))  # 44 % of its box
    holed.save(tmp_path / "objects/animals/cat.png")
    read_thing.cache_clear()
    for low, high in ((0.01, 0.05), (0.1, 0.12)):
        images = Cutouts(sources, views=30, area=(low, high), pixels=100)
        shares = [images.cutout(i).share for i in range(len(images))]
        assert low * 0.85 < min(shares) < max(shares) < high * 1.15
        assert np.mean(shares) == pytest.approx((low + high) / 2, rel=0.1)
    wide = Cutouts(sources, area=(0.8, 0.9), pixels=100).cutout(1)  # does not fit: its side is 95 % of the picture's
    assert wide.share == pytest.approx(0.95 * 0.95 / 2, rel=0.05)


def test_positions_sides_and_backgrounds_vary(sources):
    images = Cutouts(sources, views=60, size=(0.2, 0.2), pixels=64)
    cutouts = [images.cutout(i) for i in range(len(images))]
    seen = np.mean([one.mask for one in cutouts], axis=0)
    assert (seen[8:56, 8:56] > 0).mean() > 0.95
    assert {one.background for one in cutouts} == set(range(6))


def test_a_mirrored_thing_has_a_mirrored_mask(sources, tmp_path):
    half = thing((255, 0, 0))
    half.paste((0, 0, 0, 0), (10, 10, 50, 30))  # without its upper left quarter
    half.save(tmp_path / "objects/animals/cat.png")
    read_thing.cache_clear()
    images = Cutouts(sources, views=40, pixels=64)
    quarters = set()
    for i in range(0, len(images), 4):
        one = images.cutout(i)
        rows, columns = np.nonzero(one.mask)
        corner = one.mask[rows.min() + 2, columns.min() + 2], one.mask[rows.min() + 2, columns.max() - 2]
        quarters.add(tuple(map(bool, corner)))
        assert (one.picture[middle(middle(one.mask))] == (255, 0, 0)).all()
    assert quarters == {(False, True), (True, False)}


def test_other_things_are_behind_the_labelled_one(sources):
    alone, among = (Cutouts(sources, views=30, size=(0.3, 0.5), pixels=64, things=count) for count in (1, 3))
    others = 0
    for i in range(len(among)):
        one = among.cutout(i)
        colours = list(COLOURS.values())
        assert (one.picture[middle(one.mask)] == colours[one.thing]).all()  # nothing covers it
        rest = one.picture[~one.mask]
        found = [n for n, colour in enumerate(colours) if (rest == colour).all(axis=1).sum() > 20]
        assert one.thing not in found
        others += len(found)
    assert others > 100
    assert not any((alone.cutout(i).picture[~alone.cutout(i).mask] == (255, 0, 0)).all(axis=1).any() for i in range(20))


def test_fewer_backgrounds_are_the_first_of_one_order(sources):
    used = {}
    for count in (1, 3, 6):
        images = Cutouts(sources, views=30, backgrounds=count, pixels=64, seed=3)
        used[count] = {images.cutout(i).background for i in range(len(images))}
        assert len(used[count]) == count
    assert used[1] < used[3] < used[6]


def test_divided_backgrounds_are_disjoint(sources):
    one, two = sources.split_backgrounds(0.5, seed=1)
    assert len(one.backgrounds) == len(two.backgrounds) == 3
    assert sorted((*one.backgrounds, *two.backgrounds)) == list(sources.backgrounds)
    assert one.things == two.things == sources.things
    assert one.backgrounds != sources.split_backgrounds(0.5, seed=2)[0].backgrounds
    with pytest.raises(ValueError, match="leaves none"):
        sources.split_backgrounds(0.99)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 0}, "views must be at least 1, not 0"),
        ({"things": 0}, "things must be at least 1"),
        ({"pixels": 0}, "pixels must be at least 1"),
        ({"size": (0.5, 0.3)}, "not 0.5 and 0.3"),
        ({"size": (0.5, 1.3)}, "not 0.5 and 1.3"),
        ({"area": (0.0, 0.3)}, "area must be two shares"),
        ({"backgrounds": 7}, "from 1 to 6"),
    ],
)
def test_numbers_out_of_range(sources, settings, message):
    with pytest.raises(ValueError, match=message):
        Cutouts(sources, **settings)


# ---------------------------------------------------------------------------------------------------- regions
def test_regions_do_not_overlap_and_every_crop_contains_its_region(sources):
    images = Regions(sources, views=8, per_photograph=3, pixels=64)
    assert images.instances == 18
    for n in range(6):
        boxes = [box for photograph, box in images.regions if photograph == n]
        seen = np.zeros((128, 192), dtype=int)
        for left, top, side in boxes:
            assert 0.25 * 128 - 1 <= side <= 0.4 * 128
            seen[top : top + side, left : left + side] += 1
        assert seen.max() == 1
        assert seen.sum() == sum(side**2 for *_, side in boxes)
    centres = []
    for i in range(len(images)):
        one = images.cutout(i)
        photograph, (_, _, side) = images.regions[i % 18]
        assert (one.thing, one.category, one.background) == (i % 18, photograph, photograph)
        assert images.label(i) == i % 18
        rows, columns = np.nonzero(one.mask)
        extent = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert one.mask.sum() == extent[0] * extent[1]  # all of it is in the crop, as one rectangle
        assert abs(extent[0] - extent[1]) <= 1
        assert 64 / 2.5 - 1 <= extent[0] <= 64 / 1.6 + 2
        centres.append(((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2))
    assert np.std(centres, axis=0).min() > 5


def test_a_region_shows_the_same_pixels_in_every_view(sources):
    images = Regions(sources, views=6, per_photograph=2, pixels=64)
    looks = [[], []]
    for view in range(6):
        for region in (0, 1):
            one = images.cutout(region + view * images.instances)
            rows, columns = np.nonzero(one.mask)
            inside = Image.fromarray(one.picture).crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            grey = np.array(inside.convert("L").resize((24, 24)), dtype=float)
            looks[region].append(grey - grey.mean())

    def likeness(a, b):
        return max((a * c).sum() / np.sqrt((a**2).sum() * (c**2).sum()) for c in (b, b[:, ::-1]))

    same = [likeness(looks[region][0], look) for region in (0, 1) for look in looks[region][1:]]
    other = [likeness(looks[0][0], look) for look in looks[1]]
    assert min(same) > 0.8
    assert max(other) < 0.5


def test_regions_without_detail_are_left_out(sources, tmp_path):
    flat = Image.new("RGB", (192, 128), (20, 40, 90))
    flat.save(tmp_path / "flat.png")
    half = flat.copy()
    half.paste(noise(96, 128, 9), (96, 0))
    half.save(tmp_path / "half.png")
    images = Regions(replace(sources, backgrounds=(tmp_path / "flat.png", tmp_path / "half.png")), pixels=64)
    assert {photograph for photograph, _ in images.regions} == {1}
    assert all(left + side > 110 for _, (left, _, side) in images.regions)
    with pytest.raises(ValueError, match="per_photograph must be at least 1"):
        Regions(sources, per_photograph=0)


# ---------------------------------------------------------------------------------------------------- files
def test_files_of_the_packages_are_found_and_missing_ones_counted(tmp_path, monkeypatch):
    listed = tmp_path / "listed.toml"
    listed.write_text(
        '[things]\n"big cats" = ["animals/lion", "animals/lynx"]\nfruit = ["food/fig"]\n'
        '[backgrounds]\nmate-backgrounds = ["backgrounds/a.jpg", "backgrounds/b.jpg"]\nscikit-image = ["coffee.png", "none.png"]\n'
    )
    monkeypatch.setattr("laconic.data.cutout_sources.LISTED", listed)
    root = tmp_path / "unpacked"
    for name in ("animals/lion.png", "food/fig.png", "food/new.png"):
        (root / THINGS / name).parent.mkdir(parents=True, exist_ok=True)
        thing((255, 0, 0)).save(root / THINGS / name)
    (root / "usr/share/backgrounds").mkdir()
    noise(64, 64, 0).save(root / "usr/share/backgrounds/a.jpg")
    found = find_sources(root)
    assert [(name, category) for name, category, _ in found.things] == [("lion", "big cats"), ("fig", "fruit")]
    assert [file.name for file in found.backgrounds] == ["a.jpg", "coffee.png"]
    assert found.missing == (f"{THINGS}/animals/lynx.png", "usr/share/backgrounds/b.jpg", "none.png")
    monkeypatch.setenv(FOLDER_VARIABLE, str(root))
    assert find_sources() == found
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache/laconic").mkdir(parents=True)
    root.rename(cache_folder())  # packages are unpacked one by one below it
    with pytest.raises(FileNotFoundError, match="found 0 things"):
        find_sources()
    monkeypatch.setattr("laconic.data.cutout_sources.cache_folder", lambda: tmp_path / "cache/laconic")
    monkeypatch.setattr("laconic.data.cutout_sources.PACKAGES", {"other": 1, "cutouts": 1})
    assert len(find_sources().things) == 2


def test_nothing_found(tmp_path, sources):
    with pytest.raises(FileNotFoundError, match=r"found 0 things.*laconic data cutouts.*apt-get download tuxpaint.*dpkg -x"):
        find_sources(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="0 things in .*empty, expected at least 2: CATEGORY/THING.png"):
        find_sources(objects=tmp_path / "empty", backgrounds=tmp_path / "grounds")
    with pytest.raises(FileNotFoundError, match="no background in .*empty"):
        find_sources(objects=tmp_path / "objects", backgrounds=tmp_path / "empty")


def test_files_that_cannot_be_used_are_named(sources, tmp_path):
    (tmp_path / "objects/animals/cat.png").write_bytes(b"no picture")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "objects/animals/dog.png")
    read_thing.cache_clear()
    images = Cutouts(sources, pixels=64)
    with pytest.raises(Unreadable, match=r"cat\.png"):
        images.cutout(0)
    with pytest.raises(Unreadable, match=r"dog\.png: it is transparent everywhere"):
        images.cutout(1)


def test_the_list_of_photographs():
    import tomllib

    listed = tomllib.loads(LISTED.read_text())
    names = [name for part in listed.values() for group in part.values() for name in group]
    assert len(names) == len(set(names))
    assert sum(map(len, listed["things"].values())) == 191
    assert sum(len(group) >= 4 for group in listed["things"].values()) >= 20
    assert sum(map(len, listed["backgrounds"].values())) == 46
    assert {"mate-backgrounds", "plasma-workspace-wallpapers"} <= {*PACKAGES} & {*listed["backgrounds"]}


@pytest.mark.skipif(FOLDER_VARIABLE not in os.environ, reason=f"{FOLDER_VARIABLE} names no folder with the unpacked packages")
def test_the_packages():
    found = find_sources(Path(os.environ[FOLDER_VARIABLE]))
    assert (len(found.things), len(found.categories), len(found.backgrounds), found.missing) == (191, 25, 46, ())
    images = Cutouts(found)
    shares = [images.cutout(i).share for i in range(0, 191, 3)]
    assert 0.02 < min(shares) < max(shares) < 0.8
    assert Regions(found).instances == 184
