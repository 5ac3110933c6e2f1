"""What a set of images turned out to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laconic.data.pictures import ImageSet
from laconic.data.sizes import Unreadable

SHOWN = 5  # names that a sentence lists


@dataclass(frozen=True)
class Report:
    """What was read of a set: images in each class, files that are no images, and images that could not be read."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()

    @classmethod
    def of(cls, images: ImageSet, unreadable: Sequence[Unreadable] = ()) -> Report:
        """Of a set of images: its labels are read, its images are not."""
        counts = [0] * len(images.classes)
        for label in images.labels_of_all():
            counts[label] += 1
        return cls(images.classes, tuple(counts), images.ignored, images.notes, tuple(unreadable))

    @property
    def empty(self) -> tuple[str, ...]:
        """The classes without an image."""
        return tuple(name for name, count in zip(self.classes, self.counts, strict=True) if count == 0)

    def lines(self) -> list[str]:
        """All of it in sentences."""
        total = sum(self.counts)
        out = [f"{total:,} images of {len(self.classes):,} classes, {min(self.counts):,} to {max(self.counts):,} in each"]
        if self.empty:
            out.append(f"{len(self.empty)} classes have no image and keep their numbers: {_some(self.empty)}")
        if self.ignored:
            out.append(f"{len(self.ignored):,} files are no images of a class: {_some(self.ignored)}")
        return [*out, *self.notes, *([count_read(total, self.unreadable)] if self.unreadable else [])]

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain JSON; of files that are no images, how many there are."""
        return {
            "classes": dict(zip(self.classes, self.counts, strict=True)),
            "ignored": len(self.ignored),
            "notes": list(self.notes),
            "unreadable": [{"name": error.name, "reason": error.reason} for error in self.unreadable],
        }


def count_read(total: int, unreadable: Sequence[Unreadable]) -> str:
    """How many of ``total`` images were read, and why not the others."""
    if not unreadable:
        return f"{total:,} images"
    read = f"{total - len(unreadable):,} of {total:,} images; {len(unreadable):,} could not be read"
    return f"{read}: {_some([str(error) for error in unreadable], '; ')}"


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = len(names) - SHOWN
    return between.join(names[:SHOWN]) + (f"{between}and {more:,} more" if more > 0 else "")
