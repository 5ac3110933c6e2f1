"""Image files and class folders: which files are images, and which folder names the class of each."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.data.model_record import one_form

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
RULES = ("auto", "leaf", "top")
SHOWN = 3  # names listed in an error

Parts = tuple[str, ...]  # of the path of a folder, below the folder of all images


def natural(text: str) -> tuple[Any, ...]:
    """Return timm's sort key: numbers in names by value, case ignored; ties are ordered by the name itself."""
    pieces = re.split(r"(\d+)", text.lower())
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], text


def is_hidden(name: str) -> bool:
    """Return True for folders that are not classes, such as those that systems and notebooks create."""
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


def is_image(name: str) -> bool:
    """Return True if a file name has the ending of an image that is read."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_clutter(name: str) -> bool:
    """Return True for files that systems create, in folders that are empty for the user."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Found:
    """The contents of a folder: images with their class names, all classes, ignored files, remarks, files that are links."""

    files: tuple[tuple[str, str], ...]  # path below the folder, class name
    classes: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()
    links: frozenset[str] = frozenset()


# ------------------------------------------------------------------------------------------------ walking
def walk(folder: Path, skipped: list[str], linked: set[str]) -> Iterator[tuple[Parts, list[str], list[str]]]:
    """Yield every folder: its path in parts, the folders in it and the files in it. No real folder is entered twice.

    Links to folders are followed after all others, so that a folder is found by its own path first. ``skipped`` receives the
    links that lead to a folder that was entered before, or to one that contains ``folder``; ``linked`` receives the files that
    are links.

    Raises:
        OSError: a folder cannot be read.
    """
    top, seen = os.path.realpath(folder), set[str]()
    waiting, links = list[Parts]([()]), list[Parts]()
    while waiting or links:
        parts = waiting.pop() if waiting else links.pop(0)
        place = os.path.join(folder, *parts)
        real = os.path.realpath(place)
        if real in seen or (parts and f"{top}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}")):
            skipped.append(os.path.join(*parts))
            continue
        seen.add(real)
        with os.scandir(place) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        folders = [entry for entry in listed if entry.is_dir()]
        for entry in folders:
            (links if entry.is_symlink() else waiting).append((*parts, entry.name))
        files = [entry for entry in listed if not entry.is_dir()]
        linked.update(os.path.join(*parts, entry.name) for entry in files if entry.is_symlink())
        yield parts, [entry.name for entry in folders], [entry.name for entry in files]


def find_images(folder: Path, rule: str = "auto") -> Found:
    """Find the images below a folder, with the class of each by a rule (see `class_of`).

    A leaf folder without images is a class too and keeps its number, which timm's own reader would give to the next class.
    Files directly in ``folder``, files that are not images, and files in hidden folders are ignored.

    Raises:
        ValueError: the rule is "auto", and the innermost folders do not name the classes (see `check_leaves`).
        OSError: a folder cannot be read.
    """
    images, empty = list[tuple[Parts, str]](), list[Parts]()
    ignored, skipped, linked = list[str](), list[str](), set[str]()
    for parts, folders, names in walk(folder, skipped, linked):
        if not parts or any(map(is_hidden, parts)):
            ignored += [os.path.join(*parts, name) for name in names]
            continue
        own = [name for name in names if is_image(name)]
        images += [(parts, name) for name in own]
        ignored += [os.path.join(*parts, name) for name in sorted(set(names) - set(own))]
        if not own and not [name for name in folders if not is_hidden(name)]:
            empty.append(parts)
    empty = [parts for parts in empty if os.path.join(*parts) not in skipped]
    check_leaves([*dict.fromkeys(parts for parts, _ in images), *empty], str(folder), rule)
    files = sorted(((os.path.join(*p, n), class_of(p, rule)) for p, n in images), key=lambda item: natural(item[0]))
    classes = {label for _, label in files} | {class_of(parts, rule) for parts in empty}
    check_not_all_ignored(classes - {label for _, label in files}, ignored, str(folder), rule)
    notes = list[str]()
    if skipped:
        notes.append(f"{len(skipped):,} links lead to folders that are read already and were not followed: {some(skipped)}")
    if rule == "auto" and any(len(parts) > 1 for parts, _ in images):
        notes.append("class folders lie below other folders: the innermost one names the class (--class-folder top: the first)")
    in_order, others = tuple(sorted(classes, key=natural)), tuple(sorted(ignored, key=natural))
    return Found(tuple(files), in_order, others, tuple(notes), frozenset(linked))


# ------------------------------------------------------------------------------------------------ the class of an image
def class_of(parts: Sequence[str], rule: str) -> str:
    """Return the class of images in a folder: the name of the folder itself as in timm, or of the first one ("top")."""
    return one_form(parts[0] if rule == "top" else parts[-1])


def check_leaves(folders: Iterable[Parts], where: str, rule: str) -> None:
    """Check that the innermost folders can name the classes, if no rule was chosen.

    Raises:
        ValueError: folders of one name lie under several parents, or a folder with images lies in another one.
    """
    if rule not in RULES:
        raise ValueError(f"class_folder must be one of {', '.join(RULES)}, not {rule!r}")
    if rule != "auto":
        return
    paths = {tuple(map(one_form, parts)) for parts in folders}
    parents, nested = defaultdict[str, set[Parts]](set), list[Parts]()
    for parts in sorted(paths):
        parents[parts[-1]].add(parts[:-1])
        nested += [parts for depth in range(1, len(parts)) if parts[:depth] in paths]
    repeated = {name: above for name, above in parents.items() if len(above) > 1}
    if not repeated and not nested:
        return
    tops = sorted({parts[0] for parts in paths}, key=natural)
    if repeated:
        name, above = next(iter(repeated.items()))
        found = f"folders called {name!r} lie under {some(sorted('/'.join(parts) or where for parts in above))}"
    else:
        found = f"the folder {'/'.join(nested[0])!r} lies in another folder that has images of its own"
    raise ValueError(
        f"{where}: {found}, so the innermost folder need not be the class; --class-folder top takes the first folder below "
        f"{where} ({len(tops)}: {some(tops)}), --class-folder leaf the innermost one ({len(parents)}: {some(list(parents))})"
    )


def check_not_all_ignored(classes: set[str], ignored: Iterable[str], where: str, rule: str) -> None:
    """Check that no class folder holds only files that are not read: as an empty class it would stay without a word.

    Raises:
        ValueError: there is such a folder.
    """
    lost = Counter[tuple[str, str]]()
    for path in ignored:
        parts = Path(path).parts
        if len(parts) > 1 and not is_clutter(parts[-1]) and not any(map(is_hidden, parts[:-1])):
            lost[class_of(parts[:-1], rule), os.path.splitext(path)[1].lower() or "no ending"] += 1
    names = sorted({label for label, _ in lost} & classes, key=natural)
    if names:
        kinds = ", ".join(f"{count} {kind}" for (label, kind), count in lost.items() if label == names[0])
        raise ValueError(
            f"{where}: no file of {len(names)} class folders is an image that is read ({some(names)}; in {names[0]}: {kinds}); "
            f"expected files that end in {', '.join(EXTENSIONS)}: convert them, or move these folders away"
        )


def some(names: Sequence[str]) -> str:
    """Return the first names of a list, and the number of the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
