"""Data sets by timm's names: ``hfds/...`` from the Hugging Face hub, ``torch/...`` from torchvision."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laconic.core.optional_deps import missing, need
from laconic.data.folder import SPLITS, plain_split
from laconic.data.pictures import ImageSet, decode
from laconic.data.sizes import Unreadable, check_bytes, check_size, strict, too_large

STREAMS = ("wds", "hfids", "tfds")


def refuse_stream(prefix: str, name: str) -> ValueError:
    """Return the error that explains why a stream is not supported, and what to use instead."""
    return ValueError(
        f"{name!r} is a stream ({prefix}/): its images have no fixed order and no numbers, so a run could not be resumed where "
        "it stopped, and images could be counted twice; use the same data as hfds/NAME or as a folder of "
        "images, or read the shards of a WebDataset as tar/FOLDER"
    )


class HubImages(ImageSet):
    """A data set from the hub, through timm's reader with random access.

    Raises:
        ImportError: the package ``datasets`` is not installed.
        ValueError: the data set or the split cannot be opened, or the data set does not name its classes.
    """

    def __init__(self, name: str, split: str, root: Path | None) -> None:
        self.title, self.reader = name, _open_reader(name, split, root)
        numbers: dict[str, int] = self.reader.class_to_idx or {}
        self.classes = tuple(sorted(numbers, key=lambda label: numbers[label]))
        if not self.classes:
            raise ValueError(
                f"{name} does not name its classes, so its labels cannot be trusted to be 0, 1, 2 ...; use one whose label "
                "is a ClassLabel, or a folder of images"
            )

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, i: int) -> Any:
        return self[i][0]

    def label(self, i: int) -> int:
        return self._check(self.reader[i][1], i)

    def labels_of_all(self) -> Iterator[int]:
        return (self._check(label, i) for i, label in enumerate(self.reader.iter_targets()))  # reads the labels only

    def name(self, i: int) -> str:
        return f"{self.title} {i}"

    def __getitem__(self, i: int) -> tuple[Any, int]:
        try:
            file, label = self.reader[i]
            with file:
                size = file.seek(0, io.SEEK_END)  # 0 if it is a device
                check_bytes(self.name(i), size)
                file.seek(0)
                data = file.read(size)
        except (OSError, AssertionError) as error:
            raise Unreadable(self.name(i), f"its data cannot be read: {error}") from error
        return decode(data, self.name(i)), self._check(label, i)

    def _check(self, label: Any, i: int) -> int:
        if not isinstance(label, int) or not 0 <= label < len(self.classes):
            raise ValueError(f"image {i} of {self.title} has the label {label!r}; expected 0 to {len(self.classes) - 1}")
        return label


def _open_reader(name: str, split: str, root: Path | None) -> Any:
    """Open timm's reader with the first alias of the split that the data set knows."""
    create_reader = need("timm.data.readers", "timm").create_reader
    first: Exception | None = None
    for known in dict.fromkeys([split, *SPLITS.get(plain_split(split), ())]):
        try:
            return create_reader(name, root=None if root is None else str(root), split=known)
        except ImportError as error:
            raise ImportError(missing("datasets", "datasets"), name="datasets") from error
        except (ValueError, LookupError, OSError) as error:
            first = first or error
    raise ValueError(f"{name!r} cannot be opened as split {split!r}: {first}") from first


class TorchImages(ImageSet):
    """A data set of torchvision by timm's name (``torch/cifar10`` ...), from files that are already downloaded.

    Raises:
        ImportError: timm or torchvision is not installed.
        ValueError: the data set or the split is unknown, its files are not in ``root``, or it does not name its classes.
    """

    def __init__(self, name: str, split: str, root: Path | None) -> None:
        create_dataset = need("timm.data", "timm").create_dataset
        self.title = name
        try:
            self.images = create_dataset(name, root=str(root or "."), split=split)
        except (AssertionError, RuntimeError, ValueError, OSError, LookupError, TypeError) as error:
            raise ValueError(f"{name!r} cannot be opened in {root or '.'} as split {split!r}: {error}") from error
        self.classes = tuple(map(str, getattr(self.images, "classes", ())))
        if not self.classes:
            raise ValueError(f"{name!r} does not name its classes; use a folder of images")
        self.targets = getattr(self.images, "targets", None)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int) -> Any:
        return self[i][0]

    def label(self, i: int) -> int:
        return self[i][1] if self.targets is None else int(self.targets[i])

    def labels_of_all(self) -> Iterator[int]:
        if self.targets is None:  # the label comes with the pixels only, which are decoded once
            self.targets = [self.label(i) for i in range(len(self))]
        return map(int, self.targets)

    def name(self, i: int) -> str:
        return f"{self.title} {i}"

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        try:
            with strict():
                image, label = self.images[i]
            check_size(self.name(i), image)
            return image.convert("RGB"), int(label)
        except Image.DecompressionBombError as error:
            raise too_large(self.name(i), error) from error
        except (OSError, SyntaxError) as error:
            raise Unreadable(self.name(i), str(error)) from error
