"""Find the photographs that the benchmark pictures of `laconic.data.cutouts` are made from.

They are files of Debian packages (`PACKAGES`) and of scikit-image, and no part of laconic. ``cutouts.toml`` lists those that
are photographs. Folders of one's own work as well.
"""

from __future__ import annotations

import importlib.util
import io
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from laconic.data.pictures import decode
from laconic.data.sizes import Unreadable, check_size, read_bytes, strict

THINGS_PACKAGE = "tuxpaint-stamps-default"
PACKAGES = {  # and their sizes in MB
    THINGS_PACKAGE: 161,
    "mate-backgrounds": 47,
    "plasma-workspace-wallpapers": 94,
    "lomiri-wallpapers-16.04": 16,
    "lomiri-wallpapers-20.04": 11,
}
FOLDER_VARIABLE = "LACONIC_CUTOUTS"
LISTED = Path(__file__).with_name("cutouts.toml")
THINGS, BACKGROUNDS = Path("usr/share/tuxpaint/stamps"), Path("usr/share")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp")
SOLID = 127  # alpha above which a pixel belongs to the thing


@dataclass(frozen=True)
class CutoutSources:
    """The files of the benchmark: things as (name, category, file), and backgrounds as files.

    ``missing``: files that ``cutouts.toml`` lists and that were not found.
    """

    things: tuple[tuple[str, str, Path], ...]
    backgrounds: tuple[Path, ...]
    missing: tuple[str, ...] = ()

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories, sorted."""
        return tuple(sorted({category for _, category, _ in self.things}))

    def split_backgrounds(self, share: float, seed: int = 0) -> tuple[CutoutSources, CutoutSources]:
        """Divide the backgrounds at random; the first of the two sources gets this share of them.

        Raises:
            ValueError: one of the two would have no background.
        """
        order = permutation(len(self.backgrounds), seed)
        count = round(share * len(order))
        if not 0 < count < len(order):
            raise ValueError(f"a share of {share:g} of {len(order)} backgrounds leaves none on one side")
        chosen = (order[:count], order[count:])
        one, two = (replace(self, backgrounds=tuple(self.backgrounds[i] for i in sorted(part))) for part in chosen)
        return one, two


def permutation(count: int, seed: int, *more: int) -> list[int]:
    """Return the numbers below ``count`` in a random order, the same on every machine."""
    raw = np.random.PCG64(np.random.SeedSequence((seed, 1, *more))).random_raw(count)
    return [int(i) for i in np.argsort(raw, kind="stable")]


# ------------------------------------------------------------------------------------------------ files
def cache_folder() -> Path:
    """Return the folder in which `laconic data cutouts` unpacks the packages: each in a folder of its own.

    It is below XDG_CACHE_HOME, or else ``~/.cache``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laconic" / "cutouts"


def places(packages: Path | None = None) -> list[Path]:
    """Return the folders to look in: the given one, or else that of LACONIC_CUTOUTS, or else the root folder and the cache."""
    named = packages or os.environ.get(FOLDER_VARIABLE)
    return [Path(named)] if named else [Path("/"), *(cache_folder() / name for name in PACKAGES)]


def find_sources(
    packages: Path | None = None, *, objects: Path | None = None, backgrounds: Path | None = None
) -> CutoutSources:
    """Find the photographs of the benchmark.

    Args:
        packages: folder in which `PACKAGES` are unpacked (it contains ``usr/share``). Default: the one that the environment
            variable LACONIC_CUTOUTS names, or else the installed packages and those in the cache folder.
        objects: folder of things of your own instead, as CATEGORY/THING.png with an alpha channel.
        backgrounds: folder of photographs of your own instead, at any depth.

    Raises:
        FileNotFoundError: there are fewer than two things, or no background; the message says where they were looked for.
    """
    roots = places(packages)
    listed = tomllib.loads(LISTED.read_text(encoding="utf-8"))
    missing: list[str] = []
    if objects is None:
        things = _listed_things(roots, listed["things"], missing)
    else:
        things = [(file.stem, file.parent.name, file) for file in _pictures(objects.glob("*/*"))]
    if backgrounds is None:
        grounds = _listed_backgrounds(roots, listed["backgrounds"], missing)
    else:
        grounds = _pictures(backgrounds.rglob("*"))
    if len(things) < 2:
        raise FileNotFoundError(_nothing(f"{len(things)} things", "at least 2", objects, roots, THINGS, "CATEGORY/THING.png"))
    if not grounds:
        raise FileNotFoundError(_nothing("no background", "at least 1", backgrounds, roots, BACKGROUNDS, "pictures"))
    return CutoutSources(tuple(things), tuple(grounds), tuple(missing))


def _nothing(found: str, expected: str, own: Path | None, roots: list[Path], below: Path, form: str) -> str:
    if own is not None:
        return f"found {found} in {own}, expected {expected}: {form}"
    where = f"{roots[0] / below}{f' and {cache_folder()}' if len(roots) > 1 else ''}"
    return (
        f"found {found} in {where}, expected {expected}; `laconic data cutouts FOLDER` downloads the photographs; or unpack "
        f"them by apt-get download {' '.join(PACKAGES)}; for f in *.deb; do dpkg -x $f PLACE; done, and name the PLACE as "
        f"packages or in the environment variable {FOLDER_VARIABLE}"
    )


def _pictures(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES)


def _first(roots: list[Path], file: Path, missing: list[str]) -> Path | None:
    found = next((root / file for root in roots if (root / file).is_file()), None)
    if found is None:
        missing.append(str(file))
    return found


def _listed_things(roots: list[Path], listed: dict[str, list[str]], missing: list[str]) -> list[tuple[str, str, Path]]:
    named = [(category, name) for category, names in listed.items() for name in names]
    found = [(name, category, _first(roots, THINGS / f"{name}.png", missing)) for category, name in named]
    return [(name.rpartition("/")[2], category, file) for name, category, file in found if file is not None]


def _listed_backgrounds(roots: list[Path], listed: dict[str, list[str]], missing: list[str]) -> list[Path]:
    bundled = importlib.util.find_spec("skimage")
    folders = [Path(place) / "data" for place in (bundled.submodule_search_locations or ()) if bundled] if bundled else []
    found = []
    for package, names in listed.items():
        ours = package == "scikit-image"
        found += [_first(folders if ours else roots, Path(name) if ours else BACKGROUNDS / name, missing) for name in names]
    return [file for file in found if file is not None]


def short_name(file: Path) -> str:
    """Return the name of a photograph that is the same on every machine: its path below usr/share, or its last two parts."""
    parts = file.parts
    share = next((i + 1 for i in range(len(parts) - 1) if parts[i : i + 2] == BACKGROUNDS.parts), -1)
    return "/".join(parts[share + 1 :] if share >= 0 else parts[-2:])


# ------------------------------------------------------------------------------------------------ pictures
@lru_cache(maxsize=256)
def read_thing(file: Path, side: int) -> Any:
    """Return a thing as an RGBA image, cropped to what is not transparent, its longer side ``side`` pixels at most.

    Raises:
        Unreadable: it is not a picture, it is too large, or all of it is transparent.
    """
    from PIL import Image

    try:
        with strict(), Image.open(io.BytesIO(read_bytes(file, str(file)))) as opened:
            check_size(str(file), opened)
            image = opened.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(str(file), " ".join(str(error).split())) from error
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > SOLID else 0).getbbox()
    if box is None:
        raise Unreadable(str(file), "it is transparent everywhere; expected a thing with an alpha channel")
    return _smaller(image.crop(box), side / max(box[2] - box[0], box[3] - box[1]))


@lru_cache(maxsize=64)
def read_background(file: Path, side: int) -> Any:
    """Return a background as an RGB image, its shorter side ``side`` pixels at most.

    Raises:
        Unreadable: as `laconic.data.decode`.
    """
    try:
        image = decode(read_bytes(file, str(file)), str(file))
    except OSError as error:
        raise Unreadable(str(file), f"it cannot be read: {error.strerror or error}") from error
    return _smaller(image, side / min(image.size))


def _smaller(image: Any, scale: float) -> Any:
    """Return an image resized by a factor below 1, else unchanged."""
    from PIL import Image

    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
