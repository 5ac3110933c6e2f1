"""`ImageSet`, a set of labelled images, and `decode`, which makes every file a complete, upright 8-bit RGB image or raises."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laconic.data.sizes import Unreadable, check_size, strict, too_large

UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> number of the Pillow transposition that undoes it
ORIENTATION = 0x0112  # the EXIF tag
LARGEST_16 = 65535
BAND = 2**22  # pixels converted at a time, to bound the memory of conversions
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class ImageSet(ABC):
    """Labelled images in a fixed order, read one by one. ``classes[label]`` is the name of a class.

    ``ignored`` are the files found that are not images of a class; ``notes`` are further remarks for the user. ``source`` is
    the place that the images were read from (two sets of one source have the same images), empty if that is not known.
    ``numbered``: the data has numbers in the place of class names.
    """

    classes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""
    numbered: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, i: int) -> Any:
        """Return image ``i`` as a PIL image in RGB.

        Raises:
            Unreadable: the image is truncated or damaged, or its file cannot be opened.
        """

    @abstractmethod
    def label(self, i: int) -> int:
        """Return the class number of image ``i`` without decoding the image."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Return the name of image ``i`` for messages."""

    def real_file(self, i: int) -> str:
        """Return the path, without links, of the file that is image ``i``; empty if the image is no file of its own."""
        return ""

    def labels_of_all(self) -> Iterator[int]:
        """Iterate over the class numbers of all images, in order, without decoding them."""
        return (self.label(i) for i in range(len(self)))

    def __getitem__(self, i: int) -> tuple[Any, int]:
        """Return image ``i`` as `load` does, and its class number."""
        return self.load(i), self.label(i)


class View(ImageSet):
    """Some images of a set; ``place(i)`` is the number of image ``i`` in the whole set."""

    def __init__(self, whole: ImageSet, length: int, note: str) -> None:
        self.whole, self.length = whole, length
        self.classes, self.ignored, self.numbered = whole.classes, whole.ignored, whole.numbered
        self.source = whole.source
        self.notes = (*whole.notes, note)

    @abstractmethod
    def place(self, i: int) -> int:
        """Return the number of image ``i`` in the whole set.

        Raises:
            IndexError: ``i`` is out of range.
        """

    def check(self, i: int) -> int:
        """Return ``i``.

        Raises:
            IndexError: ``i`` is out of range.
        """
        if not 0 <= i < self.length:
            raise IndexError(f"there is no image {i}: this set has {self.length}")
        return i

    def __len__(self) -> int:
        return self.length

    def load(self, i: int) -> Any:
        return self.whole.load(self.place(i))

    def label(self, i: int) -> int:
        return self.whole.label(self.place(i))

    def name(self, i: int) -> str:
        return self.whole.name(self.place(i))

    def real_file(self, i: int) -> str:
        return self.whole.real_file(self.place(i))

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.whole[self.place(i)]


class Part(View):
    """``length`` images of a set, evenly spaced, so that every class of a sorted set is represented."""

    def __init__(self, whole: ImageSet, length: int) -> None:
        length = min(length, len(whole))
        super().__init__(whole, length, f"{length:,} of {len(whole):,} images, evenly spaced")

    def place(self, i: int) -> int:
        return self.check(i) * len(self.whole) // self.length


class Chosen(View):
    """Images of a set by their numbers."""

    def __init__(self, whole: ImageSet, numbers: Sequence[int], note: str) -> None:
        super().__init__(whole, len(numbers), note)
        self.numbers, self.source = tuple(numbers), ""

    def place(self, i: int) -> int:
        return self.numbers[self.check(i)]


# ------------------------------------------------------------------------------------------------ decoding
def decode(data: bytes, name: str) -> Any:
    """Decode an image file to a PIL image: RGB, 8 bits per channel, rotated upright by its EXIF orientation.

    Transparent pixels are composited on white. 16-bit grey is scaled to 8 bits; wider grey and floats are scaled by their
    largest value. Of several frames the first is used.

    Raises:
        Unreadable: the data is truncated or damaged, as far as its format can tell, or not an image; or the image has no
            pixels, or more than `laconic.core.limits` allows (checked before decoding).
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise Unreadable(name, "the file is empty")
    if data[:2] == b"\xff\xd8" and not _has_end(data):
        raise Unreadable(name, "the JPEG data is cut off: it has no end marker")
    try:
        with strict(), Image.open(io.BytesIO(data)) as image:
            check_size(name, image)
            image.load()
            return _to_rgb(_upright(image))
    except Unreadable as error:
        raise Unreadable(name, error.reason) from error
    except UnidentifiedImageError as error:
        raise Unreadable(name, "it is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise too_large(name, error) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types for damaged files: OSError, SyntaxError, struct.error ...
        raise Unreadable(name, " ".join(str(error).split()) or type(error).__name__) from error


def _has_end(data: bytes) -> bool:
    """Return True if the first image of JPEG data has an end marker after its start of scan.

    If the rest of a file is zeros, as after a crash, the decoder silently fills the image with grey. The segments before the
    scan are skipped one by one, since a thumbnail in one of them has an end marker of its own.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0xDA:  # start of scan: from here on, FF D9 occurs only at the end
            return data.find(b"\xff\xd9", at) >= 0
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True  # unknown layout: leave the decision to the decoder


def _upright(image: Any) -> Any:
    """Return the image rotated as its EXIF orientation says; unchanged if the EXIF data cannot be read."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data raises many types of errors; the pixels are still valid
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode == "RGB":
        return image.copy()  # a plain PIL image that does not keep the file open
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_bytes(image)).convert("RGB")
    if image.mode not in ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    out = Image.new("RGB", image.size)
    for band in _bands(image.size):
        clear = image.crop(band).convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        out.paste(Image.alpha_composite(white, clear).convert("RGB"), band[:2])
    return out


def _bands(size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Return boxes of whole rows, each of about ``BAND`` pixels."""
    width, height = size
    rows = max(1, BAND // width)
    return [(0, top, width, min(height, top + rows)) for top in range(0, height, rows)]


def _to_bytes(image: Any) -> NDArray[np.uint8]:
    """Scale a grey image of 16 or 32 bits or floats to 8 bits, [H, W]. Pillow itself would clip all values above 255."""
    bands, top = _bands(image.size), 0.0
    for band in bands:
        values = np.asarray(image.crop(band))
        if not np.isfinite(values).all():
            raise Unreadable("", "it has pixels that are not finite")
        top = max(top, float(values.max()))
    if image.mode == "F":
        full = 1.0 if top <= 1 else 255.0 if top <= 255 else top
    else:
        full = LARGEST_16 if top <= LARGEST_16 else top
    out = np.empty(image.size[::-1], np.uint8)
    for band in bands:
        values = np.asarray(image.crop(band)).astype(np.float64)
        out[band[1] : band[3]] = values.clip(0) * (255 / full) + 0.5
    return out
