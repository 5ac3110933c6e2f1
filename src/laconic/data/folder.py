"""Images in folders: ``root/<split>/<class>/...`` or ``root/<class>/...``, with classes as in timm; empty ones are kept."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.data.pictures import ImageSet, decode
from laconic.data.sizes import Unreadable, read_bytes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation"), "test": ("test",)}


def plain_split(split: str) -> str:
    """Return train, val or test for any of their aliases, and other names unchanged."""
    return next((plain for plain, names in SPLITS.items() if split.lower() in names), split)


def natural(text: str) -> tuple[Any, ...]:
    """Return timm's sort key: numbers in names by value, case ignored; ties are ordered by the name itself."""
    pieces = re.split(r"(\d+)", text.lower())
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], text


def is_hidden(name: str) -> bool:
    """Return True for folders that are not classes, such as those that systems and notebooks create."""
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


@dataclass(frozen=True)
class Found:
    """The contents of a folder: images with their class names, all classes, and ignored files."""

    files: tuple[tuple[str, str], ...]  # path below the folder, class name
    classes: tuple[str, ...]
    ignored: tuple[str, ...]


def find_images(folder: Path) -> Found:
    """Find the images below a folder. As in timm, the class of an image is the name of the folder that holds it.

    A leaf folder without images is a class too and keeps its number, which timm's own reader would give to the next class.
    Files directly in ``folder``, files that are not images, and files in hidden folders are ignored.
    """
    files, classes, ignored = list[tuple[str, str]](), set[str](), list[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(place, folder)
        hidden = any(is_hidden(part) for part in Path(below).parts) and below != "."
        open_folders = [name for name in folders if not is_hidden(name)]
        if hidden or below == ".":
            ignored += [os.path.normpath(os.path.join(below, name)) for name in names]
            continue
        images = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
        label = os.path.basename(below)
        if images or not open_folders:
            classes.add(label)
        files += [(os.path.join(below, name), label) for name in images]
        ignored += [os.path.join(below, name) for name in set(names) - set(images)]
    files.sort(key=lambda item: natural(item[0]))
    return Found(tuple(files), tuple(sorted(classes, key=natural)), tuple(sorted(ignored, key=natural)))


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split in ``root``, or ``root`` itself if it has no folder for any split.

    Raises:
        ValueError: ``root`` has folders for other splits only.
    """
    asked = dict.fromkeys([split, *SPLITS.get(plain_split(split), ())])
    there = next((root / name for name in asked if (root / name).is_dir()), None)
    if there is not None:
        return there
    others = [name for names in SPLITS.values() for name in names if (root / name).is_dir()]
    if others:
        raise ValueError(
            f"{root} has no folder for the split {split!r}, but {' and '.join(others)}; expected {root / split}, or give one "
            "of those splits"
        )
    return root


class FolderImages(ImageSet):
    """Images with one folder for each class.

    Raises:
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: ``root`` is a file.
        ValueError: there are no images, or there are classes that the training split does not have.
    """

    def __init__(self, root: Path, split: str) -> None:
        if not root.exists():
            raise FileNotFoundError(f"there is no folder {root}; expected {root / split}/CLASS/IMAGE or {root}/CLASS/IMAGE")
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is a file; expected a folder with a folder for each class, or a .tar file")
        self.folder = split_folder(root, split)
        found = find_images(self.folder)
        if not found.files:
            raise ValueError(
                f"no images in {self.folder}: expected a folder for each class, and in it files that end in "
                f"{', '.join(EXTENSIONS)}; found {len(found.classes)} class folders and {len(found.ignored)} other files"
            )
        self.classes = _with_training(root, self.folder, found.classes)
        number = {name: i for i, name in enumerate(self.classes)}
        self.files = [path for path, _ in found.files]
        self.labels = [number[label] for _, label in found.files]
        self.ignored = found.ignored
        if self.folder == root:
            self.notes = (f"{root} has no folder for the split {split!r}: all of it was read",)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, i: int) -> Any:
        try:
            data = read_bytes(self.folder / self.files[i], self.name(i))
        except OSError as error:
            raise Unreadable(self.name(i), f"its file cannot be read: {error.strerror or error}") from error
        return decode(data, self.name(i))

    def label(self, i: int) -> int:
        return self.labels[i]

    def name(self, i: int) -> str:
        return self.files[i]


def _with_training(root: Path, folder: Path, own: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes of the training split next to this one, if there is one: a split may lack the folder of a class."""
    training = next((root / name for name in SPLITS["train"] if (root / name).is_dir()), None)
    if training is None or training == folder or folder == root:
        return own
    classes = find_images(training).classes
    unknown = [name for name in own if name not in set(classes)]
    if unknown and classes:
        raise ValueError(
            f"{folder} has class folders that {training} does not have ({', '.join(unknown[:5])}), so its labels would "
            "differ from those of training; give both splits the same class folders (empty ones count), or move one split away"
        )
    return classes or own
