"""Images in folders: ``root/<split>/<class>/...`` or ``root/<class>/...``, with classes as in timm; empty ones are kept."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from laconic.data.label_file import find_labelled, label_file_of
from laconic.data.labelling import TIMM, Labelling
from laconic.data.layout import EXTENSIONS, Found, find_images, is_image, some
from laconic.data.pictures import ImageSet, decode
from laconic.data.sizes import Unreadable, read_bytes

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation"), "test": ("test",)}


def plain_split(split: str) -> str:
    """Return train, val or test for any of their aliases, and other names unchanged."""
    return next((plain for plain, names in SPLITS.items() if split.lower() in names), split)


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


def find(folder: Path, split: str, labelling: Labelling = TIMM) -> Found:
    """Find the images of a split and their classes: from a label file if there is one, else from the class folders.

    Raises:
        ValueError, FileNotFoundError: as `laconic.data.layout.find_images` and `laconic.data.label_file.label_file_of`.
    """
    table = label_file_of(folder, labelling.label_file, split)
    return find_images(folder, labelling.class_folder) if table is None else find_labelled(folder, table)


class FolderImages(ImageSet):
    """Images with one folder for each class, or with a label file.

    Raises:
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: ``root`` is a file.
        ValueError: there are no images, the classes are not clear, or the training split does not have one of them.
    """

    def __init__(self, root: Path, split: str, labelling: Labelling = TIMM) -> None:
        if not root.exists():
            raise FileNotFoundError(f"there is no folder {root}; expected {root / split}/CLASS/IMAGE or {root}/CLASS/IMAGE")
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is a file; expected a folder with a folder for each class, or a .tar file")
        self.folder = split_folder(root, split)
        found = find(self.folder, split, labelling)
        if not found.files:
            raise ValueError(_nothing(root, self.folder, found))
        self.classes = _with_training(root, self.folder, found.classes, labelling)
        number = {name: i for i, name in enumerate(self.classes)}
        self.files = [path for path, _ in found.files]
        self.labels = [number[label] for _, label in found.files]
        self.ignored, self.notes, self.links = found.ignored, found.notes, found.links
        self.source = str(self.folder.resolve())
        if self.folder == root:
            self.notes = (f"no folder for the split {split!r} in {root}: all of it was read", *self.notes)

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

    def real_file(self, i: int) -> str:
        if self.files[i] in self.links:
            return os.path.realpath(self.folder / self.files[i])
        above, name = os.path.split(self.files[i])
        return os.path.join(_real_folder(self.folder, above), name)


@functools.lru_cache(4096)
def _real_folder(folder: Path, below: str) -> str:
    """Return the path of a folder without links: few folders hold many images, which are found one after another."""
    return os.path.realpath(folder / below)


def _nothing(root: Path, folder: Path, found: Found) -> str:
    """Return the message for a folder without labelled images: what is there, and which option would read it."""
    plain = [name for name in found.ignored if Path(name).parent == Path() and is_image(name)]
    tables = sorted({*root.glob("*.csv"), *folder.glob("*.csv")})
    shards = [name for name in found.ignored if name.lower().endswith(".tar")]
    advice = f"; {len(plain):,} images lie in no class folder" if plain else ""
    advice += f": --label-file {tables[0]} reads their classes from a table" if plain and tables else ""
    advice += f"; --data tar/{folder} reads the tar files in it" if shards else ""
    return (
        f"no images in {folder}: expected a folder for each class, and in it files that end in {', '.join(EXTENSIONS)}; "
        f"found {len(found.classes)} class folders and {len(found.ignored)} other files{advice}"
    )


def _with_training(root: Path, folder: Path, own: tuple[str, ...], labelling: Labelling) -> tuple[str, ...]:
    """Return the classes of the training split next to this one, if there is one: a split may lack the folder of a class."""
    training = next((root / name for name in SPLITS["train"] if (root / name).is_dir()), None)
    if training is None or training == folder or folder == root:
        return own
    classes = find(training, "train", labelling).classes
    unknown = [name for name in own if name not in set(classes)]
    if unknown and classes:
        raise ValueError(
            f"{folder} has class folders that {training} does not have ({some(unknown)}), so its labels would "
            "differ from those of training; give both splits the same class folders (empty ones count), or move one split away"
        )
    return classes or own
