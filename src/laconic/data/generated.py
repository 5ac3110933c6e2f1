"""Image sets that need no download: the generated scenes, and the digits that scikit-learn ships."""

from __future__ import annotations

from typing import Any

import numpy as np

from laconic.core.optional_deps import need
from laconic.data import scenes
from laconic.data.folder import plain_split
from laconic.data.pictures import ImageSet

SCENES = {"train": 36000, "val": 2000, "test": 2000}  # scenes in a split by default
DIGITS = {"test": 250, "val": 250, "train": 1297}  # images per split, in the order in which the splits are filled


def _known(split: str, name: str) -> str:
    plain = plain_split(split)
    if plain not in SCENES:
        raise ValueError(f"{name} have the splits {', '.join(SCENES)}, not {split!r}")
    return plain


class Scenes(ImageSet):
    """Scenes of `laconic.data.scenes`, ``size`` pixels a side.

    Raises:
        ValueError: the split is unknown.
    """

    classes = scenes.CLASSES

    def __init__(self, split: str, length: int = 0, size: int = 40, seed: int = 0) -> None:
        self.split = _known(split, "scenes")
        self.length, self.size, self.seed = length or SCENES[self.split], size, seed

    def __len__(self) -> int:
        return self.length

    def scene(self, i: int) -> scenes.Scene:
        """Return scene ``i``: its image, class, kind of scene, and the mask of its object.

        Raises:
            IndexError: ``i`` is out of range.
        """
        if not 0 <= i < self.length:
            raise IndexError(f"there is no scene {i}: this set has {self.length}")
        return scenes.scene(i, split=self.split, seed=self.seed, size=self.size)

    def load(self, i: int) -> Any:
        return self[i][0]

    def label(self, i: int) -> int:
        # the label is the first number that a scene draws: a hundred times faster than rendering the scene
        return scenes.Draws(self.seed, scenes.SPLITS[self.split], i).integer(len(self.classes))

    def name(self, i: int) -> str:
        return f"{self.split} scene {i}"

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        scene = self.scene(i)
        return Image.fromarray(scene.picture), scene.label


class Digits(ImageSet):
    """The 1,797 handwritten digits (8 x 8, UCI) that scikit-learn ships, enlarged to ``size`` pixels a side.

    Every class is divided among the splits in proportion, in an order that is the same on every machine.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the split is unknown.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str, size: int = 40) -> None:
        self.split, self.size = _known(split, "digits"), size
        need("sklearn", "train")
        data = need("sklearn.datasets", "train").load_digits()
        start = sum(count for name, count in list(DIGITS.items())[: list(DIGITS).index(self.split)])
        self.numbers = _dealt(data.target)[start : start + DIGITS[self.split]]
        self.labels = [int(data.target[number]) for number in self.numbers]
        self.pictures = (data.images[self.numbers] * (255 / 16) + 0.5).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int) -> Any:
        from PIL import Image

        small = Image.fromarray(self.pictures[i])
        return small.resize((self.size, self.size), Image.Resampling.BICUBIC).convert("RGB")

    def label(self, i: int) -> int:
        return self.labels[i]

    def name(self, i: int) -> str:
        return f"digit {self.numbers[i]}"


def _dealt(labels: Any) -> list[int]:
    """Order all image numbers so that every contiguous range of them has the classes in proportion."""
    # numpy guarantees that this stream never changes
    draws = np.random.PCG64(np.random.SeedSequence(1797)).random_raw(len(labels))
    places = {}
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        for place, number in enumerate(own[np.argsort(draws[own], kind="stable")]):
            places[int(number)] = ((place + 0.5) / len(own), int(label))
    return sorted(places, key=lambda number: places[number])
