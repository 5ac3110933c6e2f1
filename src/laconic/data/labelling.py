"""`Labelling`: the options of giving images their classes; class maps, and sets whose classes are renumbered by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from laconic.core.values import parsed
from laconic.data.layout import natural, some
from laconic.data.model_record import one_form
from laconic.data.pictures import ImageSet

ORDERS = ("timm", "torchvision")


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Options of giving images their classes.

    Args:
        class_map: a .txt or .json file of class names in the order of the model's outputs; or the order of timm's folders
            (the default; numbers by value) or of torchvision's ImageFolder (for weights that were trained with it).
        class_folder: the folder that names the class of an image: leaf (the innermost), top (the first), or auto (leaf, and
            refuse where it is not clear).
        label_file: a table with an image name and a class in each row; {split} in it stands for the split.
    """

    class_map: str = ""
    class_folder: Literal["auto", "leaf", "top"] = "auto"
    label_file: str = ""

    @property
    def has_file(self) -> bool:
        """True if a file tells the order of the classes."""
        return self.class_map not in ("", *ORDERS)


TIMM = Labelling()


def ordered(labelling: Labelling, images: ImageSet) -> ImageSet:
    """Return the images with their classes numbered as the options say.

    Raises:
        ValueError, FileNotFoundError: as `read_class_map` and `with_classes`.
    """
    order = labelling.class_map
    if not order:
        return images
    if labelling.has_file:
        return with_classes(images, read_class_map(Path(order)), f"the class map {order}")
    if images.numbered:
        return images
    key: Any = natural if order == "timm" else None
    return with_classes(images, sorted(images.classes, key=key), f"the order of {order}")


def read_class_map(path: Path) -> tuple[str, ...]:
    """Read class names in the order of their numbers.

    A .txt file has one name in each line; a .json file has a list of names, or a table of names and their numbers, either way
    round.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, a name occurs twice, or the numbers are not 0, 1, 2 ...
    """
    where = f"--class-map {path}"
    if path.suffix.lower() not in (".txt", ".json"):
        raise ValueError(f"{where}: expected a .txt file (one name a line), a .json file, or {' or '.join(ORDERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no such file; expected a .txt or .json file, or {' or '.join(ORDERS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _listed(parsed(json.loads, text)) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} is not a class map: {error}") from error
    names = [one_form(name.strip()) for name in names if name.strip()]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice or not names:
        raise ValueError(
            f"{where}: {f'the name {twice[0]!r} occurs twice' if twice else 'it has no names'}; name each class once"
        )
    return tuple(names)


def _listed(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        pairs = [(name, value) if isinstance(value, int) else (value, name) for name, value in tree.items()]
        numbered = {int(number): name for name, number in pairs if str(number).isdigit()}
        if len(numbered) == len(tree) and sorted(numbered) == list(range(len(tree))):
            tree = [numbered[number] for number in range(len(tree))]
    if not (isinstance(tree, list) and all(isinstance(name, str) for name in tree)):
        raise ValueError("expected a list of names, or a table of names and numbers, all numbers from 0 once")
    return tree


# ------------------------------------------------------------------------------------------------ by name
class Renumbered(ImageSet):
    """Images whose classes have other numbers: ``numbers[label]`` is the new one of a class of ``whole``."""

    def __init__(self, whole: ImageSet, classes: Sequence[str], numbers: Sequence[int], notes: Sequence[str]) -> None:
        self.whole, self.numbers = whole, numbers
        self.classes, self.ignored, self.notes = tuple(classes), whole.ignored, (*whole.notes, *notes)
        self.source = whole.source

    def __len__(self) -> int:
        return len(self.whole)

    def load(self, i: int) -> Any:
        return self.whole.load(i)

    def label(self, i: int) -> int:
        return self.numbers[self.whole.label(i)]

    def name(self, i: int) -> str:
        return self.whole.name(i)

    def real_file(self, i: int) -> str:
        return self.whole.real_file(i)

    def labels_of_all(self) -> Iterator[int]:
        return (self.numbers[label] for label in self.whole.labels_of_all())

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image, label = self.whole[i]
        return image, self.numbers[label]


def with_classes(images: ImageSet, classes: Sequence[str], whose: str) -> ImageSet:
    """Return the images with the numbers that ``classes`` gives to their class names.

    Classes without an image may be unknown. If the data has numbers in the place of names, the numbers stay.

    Raises:
        ValueError: images have a class that is not in ``classes``; the message lists the difference.
    """
    wanted, own = [one_form(name) for name in classes], [one_form(name) for name in images.classes]
    if own == wanted:
        return images
    number = {name: i for i, name in enumerate(wanted)}
    used = set(images.labels_of_all())
    if images.numbered and max(used, default=0) < len(wanted):
        note = f"the data gives numbers in the place of class names, which were taken as those of {whose}"
        return Renumbered(images, wanted, range(len(own)), [note])
    seen = {own[label] for label in used}
    unknown = [own[label] for label in sorted(used) if own[label] not in number]
    if unknown:
        absent = [name for name in wanted if name not in seen]
        raise ValueError(
            f"the class names of the data are not those of {whose}: only the data has {some(unknown)} ({len(unknown)} of "
            f"{len(used)}), only {whose} has {some(absent) or 'nothing'} ({len(absent)} of {len(wanted)}); rename the class "
            "folders, or give a file with the data's name of every output, in order: --class-map FILE"
        )
    missing = [name for name in wanted if name not in seen]
    note = f"{len(missing):,} of the {len(wanted):,} classes of {whose} have no image here: {some(missing)}"
    return Renumbered(images, wanted, [number.get(name, -1) for name in own], [note] if missing else [])


def check_plain(labelling: Labelling, name: str) -> None:
    """Refuse options for folders where the data is not one.

    Raises:
        ValueError: a class folder or a label file is given.
    """
    given = "class-folder" if labelling.class_folder != "auto" else "label-file" if labelling.label_file else ""
    if given:
        raise ValueError(f"--{given} is for folders of images, and {name} has classes of its own; leave it out")
