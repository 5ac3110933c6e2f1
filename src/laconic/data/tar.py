"""Images in tar files, labelled as timm labels them: by the folder in the tar, or by the tar's own name.

A tar is listed once, and the position of every image's bytes is stored. To read an image, the tar is opened again, so that
processes never share the position of an open file.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.data.folder import SPLITS as NAMES
from laconic.data.folder import plain_split, split_folder
from laconic.data.labelling import TIMM, Labelling
from laconic.data.layout import EXTENSIONS, check_leaves, check_not_all_ignored, class_of, is_hidden, is_image, natural
from laconic.data.pictures import ImageSet, decode
from laconic.data.shards import are_shards, key_of, labels_of_samples, read_labels
from laconic.data.sizes import Unreadable, check_bytes

DEEPEST = 8  # levels of tars within tars


@dataclass(frozen=True)
class Member:
    """A file in a tar, or a folder in it (``size`` is -1): its path, and the position of its bytes."""

    tar: Path
    path: str
    start: int
    size: int

    @property
    def folder(self) -> tuple[str, ...]:
        """The path of the folder that holds the file; for a folder, its own path."""
        return Path(self.path if self.size < 0 else os.path.dirname(self.path)).parts


def members(tar: Path, inside: str) -> list[Member]:
    """List the members of a tar and of tars in it, with paths as if it were unpacked in a folder called ``inside``.

    Raises:
        ValueError: the file is not a tar or is truncated; it holds images as sparse files, or tars nested too deeply.
    """
    try:
        with open(tar, "rb") as file:
            return list(_members(file, tar, inside))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{tar} cannot be read as a tar file: {error}; it must be a complete, uncompressed .tar file"
        ) from error


class _Bounded:
    """A file whose reads are limited to its length: a tar header may claim any length, which would be allocated."""

    def __init__(self, file: Any) -> None:
        self.file, self.length = file, file.seek(0, os.SEEK_END)
        file.seek(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.file.tell())
        data: bytes = self.file.read(left if size < 0 else min(size, left))
        return data


def _members(file: Any, tar: Path, inside: str, start: int = 0, depth: int = 0) -> Iterator[Member]:
    if depth > DEEPEST:
        raise ValueError(f"{tar} holds tars within tars, more than {DEEPEST} deep; unpack the inner ones")
    bounded: Any = _Bounded(file)
    with tarfile.open(fileobj=bounded, mode="r:") as opened:
        for info in opened:
            path = os.path.normpath(os.path.join(inside, info.name))
            if info.issparse() and info.name.lower().endswith((".tar", *EXTENSIONS)):
                raise ValueError(
                    f"{tar} holds {info.name} as a sparse file, whose bytes are not stored in full; "
                    "write the tar without sparse files"
                )
            if info.isdir():
                yield Member(tar, path, 0, -1)
            elif info.isfile() and info.name.lower().endswith(".tar"):
                inner = opened.extractfile(info)
                if inner is not None:
                    yield from _members(inner, tar, os.path.splitext(path)[0], start + info.offset_data, depth + 1)
            elif info.isfile():
                yield Member(tar, path, start + info.offset_data, info.size)


def find_tars(place: Path, split: str) -> list[tuple[Path, str]]:
    """Return the tars of a split, each with the folder name for its images: the tar's own name if there are several.

    ``place`` is a tar, a folder with a tar or a folder for each split, or a folder of tars.

    Raises:
        FileNotFoundError: there is no tar for the split.
    """
    if place.is_file():
        return [(place, "")]
    if place.is_dir():
        names = dict.fromkeys([split, *NAMES.get(plain_split(split), ())])
        whole = next((place / f"{name}.tar" for name in names if (place / f"{name}.tar").is_file()), None)
        if whole is not None:
            return [(whole, "")]
        others = [f"{name}.tar" for some in NAMES.values() for name in some if (place / f"{name}.tar").is_file()]
        if others:
            raise FileNotFoundError(f"{place} has no {split}.tar, but {' and '.join(others)}; give one of those splits")
        found = sorted(split_folder(place, split).glob("*.tar"), key=lambda tar: natural(tar.name))
        found = _of_split(found, split, place)
        if found:
            return [(tar, tar.stem) for tar in found]
    raise FileNotFoundError(f"there is no tar file at {place}; expected a .tar file, a folder with {split}.tar, or one of tars")


def _of_split(tars: list[Path], split: str, place: Path) -> list[Path]:
    """Return the tars whose names have the split in them (data-train-000.tar), or all if no name has a split in it.

    Raises:
        FileNotFoundError: the names have other splits only.
    """
    splits = sorted({word for tar in tars for word in _splits_in(tar)})
    asked = {split.lower(), *NAMES.get(plain_split(split), ())}
    own = [tar for tar in tars if _splits_in(tar) & asked]
    if splits and not own:
        raise FileNotFoundError(f"{place} has tars of {' and '.join(splits)}, none of {split}; give one of those splits")
    return own if splits else tars


class TarImages(ImageSet):
    """Images in a tar or in a folder of tars, labelled by folders or, in WebDataset shards, by the files next to them.

    Raises:
        FileNotFoundError: there is no tar for the split.
        ValueError: a tar is damaged, there are no images, or their classes are not clear.
        ImportError: these are WebDataset shards, and webdataset is not installed.
    """

    def __init__(self, place: Path, split: str, labelling: Labelling = TIMM) -> None:
        if labelling.label_file:
            raise ValueError(f"--label-file is for folders of images, and {place} has tar files; leave it out")
        tars = find_tars(place, split)
        found = [member for tar, inside in tars for member in members(tar, inside) if not _is_hidden(member)]
        pictures = [m for m in found if m.size >= 0 and is_image(m.path)]
        label_files = labels_of_samples(found)
        shards = any((m.tar, key_of(m.path)[0]) in label_files for m in pictures)
        self.images = [m for m in pictures if ((m.tar, key_of(m.path)[0]) in label_files if shards else m.folder)]
        self.images.sort(key=lambda member: (natural(member.path), str(member.tar)))
        if not self.images:
            raise ValueError(
                f"no images in {' and '.join(str(tar) for tar, _ in tars[:3])}: expected a folder for each class, and in it "
                f"files that end in {', '.join(EXTENSIONS)}, or a label KEY.cls or KEY.json next to every image"
            )
        kept = {(m.tar, m.path) for m in self.images} | ({(m.tar, m.path) for m in label_files.values()} if shards else set())
        self.ignored = tuple(m.path for m in found if m.size >= 0 and (m.tar, m.path) not in kept)
        if shards:
            self._label_by_files([label_files[m.tar, key_of(m.path)[0]] for m in self.images])
        else:
            self._label_by_folders(tars, found, labelling.class_folder)
        whole = place.is_file() or (tars[0][0].parent == place and not _splits_in(tars[0][0]))
        self.source = str(place.resolve()) if whole else str([str(tar.resolve()) for tar, _ in tars])
        if whole:
            self.notes = (
                f"all of {place} was read as {split!r}: it is not divided into splits",
                *self.notes,
            )

    def _label_by_files(self, files: list[Member]) -> None:
        found = read_labels(files)
        self.numbered = isinstance(found[0], int)
        names = range(max(map(int, found)) + 1) if self.numbered else sorted({str(name) for name in found}, key=natural)
        self.classes = tuple(map(str, names))
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [number[str(label)] for label in found]
        self.notes = ("the classes come from the label next to each image (WebDataset)",)

    def _label_by_folders(self, tars: list[tuple[Path, str]], found: list[Member], rule: str) -> None:
        where = str(tars[0][0].parent if len(tars) > 1 else tars[0][0])
        if are_shards([inside for _, inside in tars]) and all(len(m.folder) == 1 for m in self.images):
            raise ValueError(
                f"the tars in {where} are numbered ({tars[0][1]} ...), as shards are, without class folders and without labels "
                "(KEY.cls or KEY.json) next to the images; write the labels into them, or name each tar after its class"
            )
        parents = {os.path.dirname(m.path) for m in found}
        empty = [m.folder for m in found if m.size < 0 and m.path not in parents and m.folder]
        check_leaves([*dict.fromkeys(m.folder for m in self.images), *empty], where, rule)
        labels = [class_of(m.folder, rule) for m in self.images]
        tars_without = {inside for _, inside in tars if inside and not any(_is_in(m, inside) for m in self.images)}
        classes = {*labels, *(class_of(parts, rule) for parts in empty), *tars_without}
        check_not_all_ignored(classes - set(labels), self.ignored, where, rule)
        self.classes = tuple(sorted(classes, key=natural))
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [number[label] for label in labels]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int) -> Any:
        member = self.images[i]
        check_bytes(self.name(i), member.size)
        try:
            with open(member.tar, "rb") as file:
                file.seek(member.start)
                data = file.read(member.size)
        except OSError as error:
            raise Unreadable(self.name(i), f"{member.tar} cannot be read: {error.strerror or error}") from error
        if len(data) < member.size:
            raise Unreadable(self.name(i), f"{member.tar} ends before the end of this image")
        return decode(data, self.name(i))

    def label(self, i: int) -> int:
        return self.labels[i]

    def name(self, i: int) -> str:
        return self.images[i].path


def _is_hidden(member: Member) -> bool:
    parts = Path(member.path).parts
    return any(is_hidden(part) for part in (parts if member.size < 0 else parts[:-1]))


def _splits_in(tar: Path) -> set[str]:
    """Return the words in the name of a tar that are names of splits (data-train-000.tar)."""
    return set(re.split(r"[-_.]", tar.stem.lower())) & {name for names in NAMES.values() for name in names}


def _is_in(member: Member, folder: str) -> bool:
    return member.path.split(os.sep)[0] == folder
