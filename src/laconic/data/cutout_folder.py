"""Write cutouts as a folder of images: a folder for each split and category, with masks, a table, and a record."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from laconic import __version__
from laconic.core.files import Refusal, check_output_folder, unfinished, writing
from laconic.core.locks import locked_file
from laconic.data.cutout_sources import CutoutSources, short_name
from laconic.data.cutout_splits import CutoutSettings, split_cutouts
from laconic.data.cutouts import Cutout, Cutouts

TABLE, RECORD, MASKS = "cutouts.csv", "cutouts.json", "masks"
QUALITY = 92  # of JPEG
BYTES = {"jpg": 0.5, "png": 3.0}  # of a pixel, at most about
LICENCE = (
    "The photographs are under the licences of their packages, among them GPL-2 and CC-BY-SA: see "
    "usr/share/doc/PACKAGE/copyright in each package before you pass the pictures on."
)


def write_cutouts(
    folder: Path,
    sources: CutoutSources,
    settings: CutoutSettings,
    *,
    file_type: Literal["jpg", "png"] = "jpg",
    facts: Mapping[str, Any] | None = None,
    each: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the pictures of all splits; the folder is complete or, if anything fails, absent.

    ``folder/SPLIT/CATEGORY/THING-VIEW.jpg`` are the pictures, ``folder/masks`` has a mask of the same name for each (PNG of one
    bit), ``cutouts.csv`` a row for each, and ``cutouts.json`` the settings, the sources and the counts.

    Args:
        folder: folder to create; an empty one is used.
        sources: photographs (`laconic.data.cutout_sources.find_sources`).
        settings: options of the pictures.
        file_type: of the pictures.
        facts: further entries for the record, such as versions of packages.
        each: called after every picture with the number written and the number of all.

    Returns:
        The content of ``cutouts.json``.

    Raises:
        Refusal: the folder is not empty or cannot be written, or two things of a category have one name.
        ValueError: as `split_cutouts`; Unreadable: a photograph cannot be read.
    """
    check_free(folder)
    _check_names(sources)
    sets = split_cutouts(sources, settings)
    target = Path(os.path.realpath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    total = sum(map(len, sets.values()))
    size = int(total * settings.pixels**2 * BYTES[file_type])
    with locked_file(target), unfinished(target, size) as place, writing(target, size):
        root, rows = place / "pictures", list[dict[str, Any]]()
        for split, images in sets.items():
            for row in _write_split(root, split, images, file_type):
                rows.append(row)
                each(len(rows), total)
        record = _record(sources, settings, sets, rows) | {"file_type": file_type, **(facts or {})}
        (root / TABLE).write_text(_table(rows), encoding="utf-8")
        (root / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if target.is_dir():
            target.rmdir()  # it is empty
        os.replace(root, target)
    return record


def check_free(folder: Path) -> None:
    """Refuse a folder that is not empty or that cannot be written.

    Raises:
        Refusal: it is one of these.
    """
    check_output_folder(folder, "the folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise Refusal(f"{folder} is not empty; give the name of a new folder, or remove this one")


def _check_names(sources: CutoutSources) -> None:
    """Refuse things whose pictures would have the same name, also where the file system ignores case."""
    seen = dict[tuple[str, str], Path]()
    for name, category, file in sources.things:
        other = seen.setdefault((category.casefold(), name.casefold()), file)
        if other != file:
            raise Refusal(f"{other} and {file} are two things of one name; rename one of them")


def _write_split(root: Path, split: str, images: Cutouts, file_type: str) -> Iterator[dict[str, Any]]:
    """Write the pictures and masks of a split; yield the row of the table for each."""
    from PIL import Image

    for i in range(len(images)):
        one = images.cutout(i)
        name, category, _ = images.sources.things[one.thing]
        stem = Path(split, category, f"{name}-{images.first_view + i // images.instances:03d}")
        file, mask = root / stem.with_name(f"{stem.name}.{file_type}"), root / MASKS / stem.with_name(f"{stem.name}.png")
        for path in (file, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"quality": QUALITY, "subsampling": 0} if file_type == "jpg" else {}
        Image.fromarray(one.picture).save(file, **options)
        Image.fromarray(one.mask).save(mask)
        yield _row(file.relative_to(root), split, name, category, images.sources.backgrounds[one.background], one)


def _row(file: Path, split: str, name: str, category: str, background: Path, one: Cutout) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(one.mask.any(axis=axis)) for axis in (1, 0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
    return {
        "file": file.as_posix(),
        "split": split,
        "thing": name,
        "category": category,
        "background": short_name(background),
        "share": f"{one.share:.5f}",
        **dict(zip(("left", "top", "right", "bottom"), map(int, box), strict=True)),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _record(
    sources: CutoutSources, settings: CutoutSettings, sets: Mapping[str, Cutouts], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    splits = {}
    for split, images in sets.items():
        shares = [float(row["share"]) for row in rows if row["split"] == split]
        own = images.sources
        splits[split] = {
            "pictures": len(images),
            "things": len(own.things),
            "categories": len(own.categories),
            "backgrounds": list(map(short_name, own.backgrounds)),
            "mean_share": round(float(np.mean(shares)), 4),
        }
    return {
        "laconic": __version__,
        "settings": asdict(settings),
        "splits": splits,
        "categories": list(sources.categories),
        "things": [short_name(file) for _, _, file in sources.things],
        "missing": list(sources.missing),
        "licence": LICENCE,
    }
