"""`Report`: the contents of a set of images, as text and as JSON."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laconic.data.pictures import ImageSet
from laconic.data.sizes import Unreadable

SHOWN = 5  # names listed in a sentence


@dataclass(frozen=True)
class Report:
    """The contents of a set: images in each class, files that are not images, and images that could not be read."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()

    @classmethod
    def of(cls, images: ImageSet, unreadable: Sequence[Unreadable] = ()) -> Report:
        """Count the images of a set by class; labels are read, images are not."""
        counts = [0] * len(images.classes)
        for label in images.labels_of_all():
            counts[label] += 1
        return cls(images.classes, tuple(counts), images.ignored, images.notes, tuple(unreadable))

    @property
    def empty(self) -> tuple[str, ...]:
        """The classes without an image."""
        return tuple(name for name, count in zip(self.classes, self.counts, strict=True) if count == 0)

    def lines(self) -> list[str]:
        """Return the report as sentences."""
        total = sum(self.counts)
        least, most = min(self.counts), max(self.counts)
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        names = [f"{name} {count:,}" for name, count in zip(self.classes, self.counts, strict=True)]
        out = [f"{total:,} images of {len(self.classes):,} classes, {each} in each: {_some(names)}"]
        if self.empty:
            out.append(f"{len(self.empty)} classes have no image and keep their numbers: {_some(self.empty)}")
        if self.ignored:
            endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in self.ignored)
            kinds = _some([f"{ending} {count:,}" for ending, count in endings.most_common()])
            out.append(f"{len(self.ignored):,} files are not images of a class ({kinds}): {_some(self.ignored)}")
        return [*out, *self.notes, *([count_read(total, self.unreadable)] if self.unreadable else [])]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON, with the number of ignored files instead of their names."""
        return {
            "classes": dict(zip(self.classes, self.counts, strict=True)),
            "ignored": len(self.ignored),
            "notes": list(self.notes),
            "unreadable": [{"name": error.name, "reason": error.reason} for error in self.unreadable],
        }


def count_read(total: int, unreadable: Sequence[Unreadable]) -> str:
    """Say how many of ``total`` images were read, and why the others were not."""
    if not unreadable:
        return f"{total:,} images"
    read = f"{total - len(unreadable):,} of {total:,} images; {len(unreadable):,} could not be read"
    return f"{read}: {_some([str(error) for error in unreadable], '; ')}"


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = len(names) - SHOWN
    return between.join(names[:SHOWN]) + (f"{between}and {more:,} more" if more > 0 else "")
