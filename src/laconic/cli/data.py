"""``laconic data``: write a benchmark of labelled pictures as a folder, for the other commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm  # type: ignore[import-untyped]

from laconic.cli.output import Report, Table
from laconic.core.files import Refusal
from laconic.core.suggestions import nearest_names
from laconic.data import cutout_packages
from laconic.data.cutout_folder import LICENCE, RECORD, TABLE, check_free, write_cutouts
from laconic.data.cutout_sources import FOLDER_VARIABLE, THINGS_PACKAGE, find_sources, places
from laconic.data.cutout_splits import CutoutSettings

SETTINGS = CutoutSettings()


@dataclass(frozen=True)
class DataReport(Report):
    """The folder that was written, and the content of its record."""

    folder: Path
    record: dict[str, Any]

    def parts(self) -> Iterator[str | Table]:
        rows = []
        for split, its in self.record["splits"].items():
            counts = (its["pictures"], its["things"], its["categories"], len(its["backgrounds"]))
            rows.append((split, *(f"{count:,}" for count in counts), f"{its['mean_share']:.1%}"))
        header = ("split", "pictures", "things", "categories", "backgrounds", "object's share")
        yield Table(str(self.folder), header, tuple(rows))
        yield f"masks/ has the mask of every picture, {TABLE} a row for each, {RECORD} the settings and the sources."
        if self.record["missing"]:
            yield (
                f"{len(self.record['missing'])} listed photographs were not found ({RECORD} names them): the pictures differ "
                "from those of the whole list."
            )
        yield LICENCE

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.record}


def data(
    kind: str,
    folder: Path,
    /,
    *,
    packages: Path | None = None,
    objects: Path | None = None,
    backgrounds: Path | None = None,
    download: bool = True,
    file_type: Literal["jpg", "png"] = "jpg",
    settings: CutoutSettings = SETTINGS,
) -> DataReport:
    """Write a benchmark of labelled pictures: a folder for each split and category, with the mask of every picture.

    Cutouts are photographed things (animals, plants, tools, vehicles ...) pasted on photographed backgrounds, any number, the
    same for the same seed. The photographs are in Debian packages of 329 MB, which are downloaded once.

    Args:
        kind: cutouts, the only kind there is.
        folder: folder to write; it must be new or empty.
        packages: folder in which the packages are unpacked (default: installed packages, else downloaded ones).
        objects: things of your own instead: a folder with CATEGORY/THING.png, transparent around the thing.
        backgrounds: photographs of your own instead: a folder of pictures, at any depth.
        download: download the packages that are not on this machine.
        file_type: of the pictures; masks are PNG.
        settings: of the pictures and their division into splits.

    Raises:
        Refusal: another kind, the folder is not empty, or the packages cannot be downloaded.
        FileNotFoundError, ValueError: no photographs are found, one cannot be read, or a number is out of its range.
    """
    if kind != "cutouts":
        raise Refusal(f"there is no kind of data called {kind!r}.{nearest_names(kind, ['cutouts'])} There is: cutouts")
    check_free(folder)
    for name, own in (("objects", objects), ("backgrounds", backgrounds), ("packages", packages)):
        if own is not None and not own.is_dir():
            raise Refusal(f"--{name} {own}: there is no such folder")
    if download and packages is None and not os.environ.get(FOLDER_VARIABLE):
        _download(objects is None, backgrounds is None)
    sources = find_sources(packages, objects=objects, backgrounds=backgrounds)
    own_ones = {"objects": objects, "backgrounds": backgrounds}
    facts = {
        "own": {name: str(path) for name, path in own_ones.items() if path},
        "packages": {} if objects and backgrounds else cutout_packages.versions(places(packages)),
    }
    with tqdm(desc="writing", unit="picture", leave=False, disable=None) as bar:

        def each(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        record = write_cutouts(folder, sources, settings, file_type=file_type, facts=facts, each=each)
    return DataReport(folder, record)


def _download(objects: bool, backgrounds: bool) -> None:
    """Download the packages of things, of backgrounds or of both that are not on this machine."""
    needed = [name for name in cutout_packages.absent(places()) if (objects if name == THINGS_PACKAGE else backgrounds)]
    if needed:
        cutout_packages.download(needed)
