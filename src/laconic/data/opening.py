"""`open_images`: open a set of images by its name."""

from __future__ import annotations

from pathlib import Path

from laconic.core.suggestions import nearest_names
from laconic.data.cutout_splits import open_cutouts
from laconic.data.folder import FolderImages
from laconic.data.generated import Digits, Scenes
from laconic.data.labelling import TIMM, Labelling, check_plain, ordered
from laconic.data.named import STREAMS, HubImages, TorchImages, refuse_stream
from laconic.data.pictures import ImageSet, Part
from laconic.data.tar import TarImages

PREFIXES = ("tar", "hfds", "torch")
NAMES = ("scenes", "digits", "cutouts", *(f"{prefix}/" for prefix in PREFIXES))


def open_images(
    name: str,
    split: str,
    root: Path | None = None,
    limit: int = 0,
    size: int = 40,
    seed: int = 0,
    labelling: Labelling = TIMM,
) -> ImageSet:
    """Open a split of a set of images; its order is always the same.

    Args:
        name: ``scenes`` (generated), ``digits`` (from scikit-learn), ``cutouts`` (of the photographs that ``laconic data
            cutouts`` downloads), ``""`` (a folder of images or a tar at ``root``), or one of timm's names: ``tar/FILE``,
            ``hfds/NAME``, ``torch/NAME``.
        split: train, val or test, or another split of the data set. ``validation`` is an alias of val.
        root: folder of the images; ``root/<split>/<class>/...`` if there is such a folder, else ``root/<class>/...``.
        limit: number of images (scenes: the first ones; other sets: evenly spaced), 0 for all.
        size: pixels a side of scenes and digits; other sets keep their own sizes.
        seed: seed of the scenes and cutouts.
        labelling: how images get their classes, and the order of the classes.

    Raises:
        ValueError: the data set or the split is unknown, it has no images, its classes are not clear or not those of the
            class map, it is a stream, or a number is out of range.
        FileNotFoundError: there is nothing at ``root``, no such class map or label file, or no photographs.
        NotADirectoryError: ``root`` is a file that is not a tar.
        ImportError: the data set needs a package that is not installed.
    """
    if limit < 0 or size < 1:
        raise ValueError(f"limit must be 0 (all) or more, and size at least 1; got limit={limit}, size={size}")
    if name and not name.lower().startswith("tar/"):
        check_plain(labelling, name)
    if name == "scenes":
        return ordered(labelling, Scenes(split, limit, size, seed))
    whole = ordered(labelling, _whole(name, split, root, size, seed, labelling))
    return Part(whole, limit) if 0 < limit < len(whole) else whole


def _whole(name: str, split: str, root: Path | None, size: int, seed: int, labelling: Labelling) -> ImageSet:
    prefix, slash, rest = name.partition("/")
    prefix = prefix.lower()
    if name == "digits":
        return Digits(split, size)
    if name == "cutouts":
        return open_cutouts(split, seed)
    if not name:
        if root is None:
            raise ValueError(f"give the folder of the images, or the name of a data set: {', '.join(NAMES)}")
        is_tar = root.is_file() and root.suffix.lower() == ".tar"
        return TarImages(root, split, labelling) if is_tar else FolderImages(root, split, labelling)
    if slash and prefix in STREAMS:
        raise refuse_stream(prefix, name)
    if slash and prefix == "tar":
        place = Path(rest) if root is None else root / rest
        return TarImages(place if root is None or place.exists() else root, split, labelling)
    if slash and prefix == "hfds":
        return HubImages(name, split, root)
    if slash and prefix == "torch":
        return TorchImages(name, split, root)
    raise ValueError(
        f"there is no data set called {name!r}.{nearest_names(name, list(NAMES))} There are {', '.join(NAMES)}; a folder of "
        "images is given as root, without a name"
    )


def find_data(text: str) -> tuple[str, Path | None]:
    """Return the (name, root) of `open_images` for a user's text: a folder, a tar, or the name of a data set.

    Raises:
        FileNotFoundError: the text looks like a path, but nothing is there.
    """
    path, (prefix, slash, _) = Path(text), text.partition("/")
    if text in NAMES:
        return text, None
    if path.exists():
        return "", path
    if (slash and prefix.lower() not in (*PREFIXES, *STREAMS)) or (path.suffix.lower() == ".tar" and not slash):
        raise FileNotFoundError(
            f"there is nothing at {text}; expected a folder of images, a .tar file, or a name: {', '.join(NAMES)}"
        )
    return text, None
