"""Photographs and other images: pixels for the model, and pictures of its crop."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.core.files import Refusal
from laconic.data import Unreadable, decode
from laconic.data.sizes import check_resize, read_bytes

SHIPPED = {  # free images of scikit-image's wheel: file -> subject, author and licence
    "astronaut.png": "Eileen Collins, astronaut (NASA; public domain)",
    "chelsea.png": "Chelsea the cat (Stefan van der Walt; CC0)",
    "coffee.png": "a cup of coffee (Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0)",
    "rocket.jpg": "launch of DSCOVR on a Falcon 9 (SpaceX; public domain)",
}


@dataclass(frozen=True)
class Photo:
    """An image as a model sees it: ``pixels`` for the model, and the same crop as a picture."""

    name: str  # of its file, or in its set
    image: Any  # of PIL, whole, where it was read from a file
    pixels: Tensor  # [3, H, W], normalised
    picture: np.ndarray  # [H, W, 3] in [0, 1]

    @property
    def stem(self) -> str:
        """File name stem for files about this image."""
        return re.sub(r"[^\w.-]+", "-", Path(self.name).stem)


def shipped(count: int) -> dict[Path, str]:
    """Return the first ``count`` photographs of the demo by path, with their sources.

    Raises:
        Refusal: scikit-image is not there, or ships none of them.
    """
    try:
        import skimage
    except ImportError as error:
        raise Refusal('the photographs of the demo come with scikit-image: pip install "laconic[demo]"') from error
    folder = Path(skimage.__file__).parent / "data"
    found = {folder / name: source for name, source in SHIPPED.items() if (folder / name).is_file()}
    if not found:
        raise Refusal(
            f"this scikit-image ships none of {', '.join(SHIPPED)}; use laconic show IMAGE, or laconic demo --data FOLDER"
        )
    return dict(list(found.items())[:count])


def read(path: Path, model: nn.Module, size: tuple[int, ...] | None = None) -> Photo:
    """Read an image file, resized, cropped and normalised as timm's config of this model says; ``size`` as in `prepare`.

    Raises:
        Refusal: there is no such file, it is not an image, or one too large (see `laconic.core.limits`).
    """
    from PIL import UnidentifiedImageError

    try:
        image = decode(read_bytes(path, path.name), path.name)
        return replace(prepare(path.name, image, model, size), image=image)
    except OSError as error:
        raise Refusal(f"{path} cannot be read as an image: {error.strerror or error}") from error
    except Unreadable as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise Refusal(f"{path} is not an image that Pillow can read; give a PNG or JPEG file") from error
        raise Refusal(f"{path} cannot be read as an image: {error.reason}") from error


def prepare(name: str, image: Any, model: nn.Module, size: tuple[int, ...] | None = None) -> Photo:
    """Prepare a PIL image: resized, cropped and normalised as timm's config of this model says.

    ``size`` [channels, height, width] replaces the input size in that config, which is that of the pretrained weights.

    Raises:
        Unreadable: it would be resized to a picture too large (see `laconic.core.limits`).
    """
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    args = {} if size is None else {"input_size": size}
    config: dict[str, Any] = resolve_model_data_config(model, args=args)  # type: ignore[no-untyped-call]
    transform: Any = create_transform(**config, is_training=False)
    check_resize(name, image, transform)
    pixels: Tensor = transform(image)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return Photo(name, None, pixels, (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
