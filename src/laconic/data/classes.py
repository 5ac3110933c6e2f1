"""Class names: one form of each name, the fingerprint of a set of images, and the record that goes with a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from laconic.core.backbone import unwrapped
from laconic.data.labelling import TIMM, Labelling, with_classes
from laconic.data.layout import natural, some
from laconic.data.model_record import one_form, record_of
from laconic.data.pictures import ImageSet
from laconic.data.preprocessing import config_for

KEPT = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # of the preprocessing, in a record


def fingerprint(images: ImageSet) -> dict[str, Any]:
    """Return the number of images, and a hash of their relative names with the name of the class of each, in order."""
    digest = hashlib.sha256()
    for i, label in enumerate(images.labels_of_all()):
        digest.update(f"{one_form(images.name(i))}\0{one_form(images.classes[label])}\n".encode("utf-8", "surrogateescape"))
    return {"images": len(images), "names": digest.hexdigest()[:32]}


def names_of(model: nn.Module) -> tuple[str, ...]:
    """Return the class names in the record of a model, in the order of its outputs; empty if it has none."""
    return tuple(record_of(model).get("classes", ()))


def by_name(images: ImageSet, model: nn.Module, labelling: Labelling = TIMM) -> tuple[ImageSet, bool]:
    """Return the images with the model's number for each class name, and True if the model or a class map tells the names.

    The names are those of the file in ``labelling``, else of the model's record, else of ImageNet's classes (synsets) for
    timm's models that were trained on them, if the data has such names.

    Raises:
        ValueError: images have a class that the record does not have; or there is one class, and nothing tells its number.
    """
    if (names := names_of(model)) or labelling.has_file:
        return by_names(images, names, "the model", labelling)
    synsets = _synsets(model)
    known = set(map(one_form, images.classes)) <= set(synsets)
    return by_names(images, synsets if known else (), "the model (ImageNet)" if known else "the model")


def by_names(images: ImageSet, names: Sequence[str], whose: str, labelling: Labelling = TIMM) -> tuple[ImageSet, bool]:
    """Return the images with the number in ``names`` for each class name, and True if they or a class map tell the names.

    Args:
        images: images, which have the classes of a class map already if ``labelling`` has one.
        names: class names in the order of a model's outputs; empty if it does not tell them.
        whose: the model, for messages.
        labelling: the options that the images were opened with.

    Raises:
        ValueError: images have a class that is not in ``names``; or there is one class, and nothing tells its number.
    """
    if labelling.has_file:
        return images, True
    if names:
        return with_classes(images, names, whose), True
    if len(images.classes) == 1:
        raise ValueError(
            f"the data has one class ({images.classes[0]}), and {whose} does not tell which of its outputs that is; give a "
            "file with a class name for every output, in order: --class-map FILE"
        )
    return images, False


def _synsets(model: nn.Module) -> tuple[str, ...]:
    """Return the names of ImageNet's classes for a timm model with an output for each; empty for other models."""
    config = getattr(unwrapped(model), "pretrained_cfg", None) or {}
    if not isinstance(config, Mapping) or config.get("num_classes") != getattr(unwrapped(model), "num_classes", 0):
        return ()
    from timm.data import ImageNetInfo, infer_imagenet_subset  # type: ignore[attr-defined]

    subset = infer_imagenet_subset(unwrapped(model))
    names: Any = ImageNetInfo(subset).label_names() if subset else ()  # type: ignore[no-untyped-call]
    return tuple(names)


def order_notes(images: ImageSet) -> list[str]:
    """Return notes on the numbers of classes where the model does not tell its class names."""
    names = [one_form(name) for name in images.classes]
    notes = [f"the model does not tell its class names: they were taken to be those of the data, in this order: {some(names)}"]
    if names == sorted(names, key=natural) != sorted(names):
        notes.append(
            "torchvision's ImageFolder numbers these classes in another order; if the model was trained with it: --class-map "
            "torchvision"
        )
    return notes


def data_record(images: ImageSet | None, model: nn.Module, crop: float | None = None) -> dict[str, Any]:
    """Return what a saved or exported file must tell about its data, as plain JSON.

    ``classes`` are the class names in the order of the model's outputs, ``preprocessing`` has input_size, interpolation,
    mean, std, crop_pct and crop_mode, ``trained_on`` the fingerprint of the training images. Without ``images``, classes and
    fingerprint are those of the model's own record, and are absent if it has none.

    Args:
        images: the training images, or None.
        model: the model, reduced or not, as it is evaluated.
        crop: share of the resized image that the centre crop keeps (default: the model's).
    """
    config = config_for(model, crop)
    how = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items() if name in KEPT}
    if images is None:
        return {**record_of(model), "preprocessing": how}
    return {"classes": [*map(one_form, images.classes)], "preprocessing": how, "trained_on": fingerprint(images)}
