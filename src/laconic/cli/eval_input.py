"""Input of an evaluation: a model with weights that fit the data, the data, and the options of reading it."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from laconic.analysis.diagnose import shared_copy
from laconic.analysis.evaluate import config_for
from laconic.api import restore_
from laconic.cli.models import create, open_model
from laconic.cli.weights import Loaded, fill, load_with_args
from laconic.core.files import Refusal
from laconic.core.token_reduction import find_reduction
from laconic.data import ImageSet, Labelling, find_data, open_images
from laconic.data.classes import by_name, order_notes
from laconic.data.model_record import record_in, set_record

GENERATED = ("scenes", "digits")  # data with images of any size


@dataclass(frozen=True)
class Reading(Labelling):
    """Options of reading images, and of giving them their classes.

    Args:
        split: of the data: val, test, train.
        limit: images at most (0: all): the first scenes, and of other data evenly spaced ones.
        batch_size: images in a forward.
        workers: processes that read images.
        crop: share of the resized image that the centre crop keeps (default: the model's own).
        class_map: a .txt or .json file with the data's class names in the order of the model's outputs (default: by the names
            in the model); or the order of the folders in timm (numbers by value) or in torchvision (ImageFolder), for models
            without names.
        class_folder: the folder that names the class of an image: leaf (the innermost), top (the first), or auto (leaf, and
            refuse where it is not clear).
        label_file: a table with an image name and a class in each row; {split} in it stands for the split.
    """

    split: str = "val"
    limit: int = 0
    batch_size: int = 64
    workers: int = 2
    crop: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("limit", self.limit, 0), ("batch_size", self.batch_size, 1), ("workers", self.workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class EvalInput:
    """A model to evaluate: the unreduced one, the reduced one that a directory holds, and a line on their weights."""

    name: str
    base: nn.Module
    saved: nn.Module | None
    weights: str  # in words
    pretrained: bool  # timm's own weights, for the data that timm's models are trained on
    random: bool
    images: ImageSet
    named: bool  # the classes of the images are those of the model, by name or by a class map

    @property
    def notes(self) -> list[str]:
        """Notes on the model together with the data."""
        if self.named:
            return []
        known, classes = getattr(self.base, "num_classes", 0), len(self.images.classes)
        if known > classes:
            return [
                f"the model answers for {known} classes and the data has {classes}: labels are numbers from 0 in the order of "
                "the data's class names, and unless these are the model's first ones, the accuracies mean nothing"
            ]
        sorted_by_us = bool(self.images.source)  # folders and tars; other data has an order of its own
        return order_notes(self.images) if sorted_by_us and not (self.pretrained or self.random) else []


def open_eval_input(model: str, data: str, reading: Reading, weights: Path | None, model_args: Sequence[str] = ()) -> EvalInput:
    """Open a model and the images it is evaluated on.

    Raises:
        Refusal: no such model, weights that are not its own, or model arguments where a directory was given.
        ValueError, FileNotFoundError, ImportError: as `laconic.data.open_images`.
    """
    name, root = find_data(data)
    images = open_images(name, reading.split, root, reading.limit, labelling=reading)
    if Path(model).is_dir():
        if weights is not None or model_args:
            raise Refusal(f"{model} is a directory with weights and arguments of its own; leave out --weights and --model-args")
        opened = open_model(model)
        saved = opened if find_reduction(opened) is not None else None
        base = opened if saved is None else restore_(shared_copy(saved))
        loaded, pretrained = Loaded(base, f"the weights come from {model}", False), False
    else:
        saved = None
        loaded = _with_weights(model, weights, parse_args(model_args), len(images.classes))
        pretrained = weights is None and not loaded.random
    if name in GENERATED:  # as large as the model takes them
        height, _ = config_for(loaded.model)["input_size"][1:]
        images = open_images(name, reading.split, root, reading.limit, height, labelling=reading)
    images, named = by_name(images, loaded.model, reading)
    return EvalInput(model, loaded.model, saved, loaded.line, pretrained, loaded.random, images, named)


def _with_weights(name: str, path: Path | None, args: dict[str, Any], classes: int) -> Loaded:
    if path is None:
        return load_with_args(name, args)
    if not path.is_file():
        raise Refusal(f"--weights {path}: there is no such file; give a .safetensors file or a checkpoint of torch")
    record = record_in(path)
    model = create(name, **{"num_classes": len(record.get("classes", ())) or classes, **args})
    try:
        line = f"the weights of {name} come from {fill(model, path)}"
        if record:
            set_record(model, record)
    except Exception as error:  # the readers of two libraries raise many kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise Refusal(
            f"--weights {path} does not hold the weights of {name} with {classes} classes: {' '.join(lines[:2]).strip()}; "
            "--model-args num_classes=N sets the number of classes"
        ) from error
    return Loaded(model, line, False)


def parse_args(texts: Sequence[str]) -> dict[str, Any]:
    """Return arguments of timm.create_model from NAME=VALUE: Python's literals, or else words.

    Raises:
        Refusal: one that is not of this form.
    """
    out = dict[str, Any]()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise Refusal(f"--model-args {text!r}: expected NAME=VALUE, e.g. img_size=40")
        try:
            out[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[name] = value
    return out


def command(name: str, model: str, options: Mapping[str, Any]) -> str:
    """Return the command that repeats a run: tuples are options that repeat; None and empty values are omitted."""
    words = ["laconic", name, model]
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple):
            words += [word for item in value for word in (flag, str(item))]
        elif not (value is None or value is False or value == ""):
            words += [flag, str(value)]
    return shlex.join(words)
