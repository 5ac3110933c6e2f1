"""How to build a transformers model again: its class, its config, and what its constructor takes beside the config.

Only classes of transformers itself are built, never code that came with a model. What is read off a model is put to the test: a
model built from it must have the same keys, shapes, module classes and plain attributes.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.checkpoints.meta_build import check_input
from laconic.checkpoints.model_spec import compare
from laconic.core import limits
from laconic.core.backbone import path_of
from laconic.core.limits import TooLarge, read_json
from laconic.core.optional_deps import need
from laconic.core.token_reduction import TokenReduction

LOG = logging.getLogger(__name__)
LIBRARY = "transformers"
CLASS = re.compile(r"transformers\.models(\.\w+)+\.modeling_\w+\.\w+")
FLAGS: dict[str, Callable[[Any], bool]] = {
    "add_pooling_layer": lambda m: m.pooler is not None,
    "use_mask_token": lambda m: m.embeddings.mask_token is not None,
}


def knows(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own, with a config."""
    return CLASS.fullmatch(path_of(type(model))) is not None and hasattr(model, "config")


def describe(model: Any, reduction: TokenReduction, model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``laconic.json`` says of a transformers model; ``model_args`` are those of its constructor beside the config.

    Raises:
        ValueError: the model that is built from it is another one, or something of it is not plain JSON.
    """
    args = {**_flags(model), **dict(model_args or {})}
    record = {"library": LIBRARY, "class": path_of(type(model)), "args": args, "config": model.config.to_dict()}
    try:
        record = json.loads(json.dumps(record))
    except TypeError as error:
        raise ValueError(f"nothing was saved: the config of this model is not plain JSON ({error})") from error
    fresh = build(record, "meta")
    fresh.name_or_path = model.name_or_path  # where it came from makes no difference
    difference = compare(model, reduction, fresh)
    if difference:
        raise ValueError(
            f"nothing was saved: {record['class']} with this model's config is not this model.\n{difference}\n"
            "Pass what its constructor was given beside the config as model_args={...}; or model_args='omit', and give load a "
            "model to fill: laconic.load(directory, model=your_model)"
        )
    return record


def build(record: Mapping[str, Any], device: str) -> Any:
    """The model of a record, with random weights (none on the meta device).

    Raises:
        ImportError: transformers is not installed.
        ValueError: the class is none of transformers', this version has no such class, or it cannot be built so.
    """
    path, version = str(record.get("class")), need("transformers", "transformers").__version__
    if CLASS.fullmatch(path) is None:
        raise ValueError(f"{path!r} is no model class of transformers; nothing else is built")
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
        config = cls.config_class.from_dict(record["config"])
        with torch.device(device):
            model: Any = cls(config, **record["args"])
    except TooLarge:
        raise
    except Exception as error:  # whatever this version makes of a config of another
        raise ValueError(f"transformers {version} cannot build {path}: {error}") from error
    return model


def _flags(model: Any) -> dict[str, bool]:
    known, flags = inspect.signature(type(model).__init__).parameters, {}
    for name, look in FLAGS.items():
        if name in known:
            with suppress(AttributeError):
                flags[name] = look(model)
    return flags


def from_directory(directory: str) -> Any:
    """The model that ``save_pretrained`` wrote to a directory, in evaluation mode; the network is not asked.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is no such model in it, or not one of transformers' own classes.
    """
    library = need("transformers", "transformers")
    try:
        limits.check_numbers(read_json(Path(directory, "config.json")), directory)
        config = library.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        (name,) = config.architectures or ("AutoModel",)
        _check_size(getattr(library, name), config, directory)
        model: Any = getattr(library, name).from_pretrained(directory, local_files_only=True)
    except TooLarge:
        raise
    except Exception as error:  # there are many ways to be no such directory
        raise ValueError(f"transformers {library.__version__} cannot load {directory}: {error}") from error
    return model.eval()


def _check_size(cls: Any, config: Any, directory: str) -> None:
    """Build a model without weights, within the limits that the files of weights in its directory set."""
    files = [file for ending in (".safetensors", ".bin") for file in Path(directory).glob(f"*{ending}")]
    held, tensors = sum(map(limits.check_file, files)), sum(map(limits.tensors_in, files))
    with limits.building(directory, held, tensors), torch.device("meta"):
        trial = (cls.from_config if hasattr(cls, "from_config") else cls)(config)
    try:
        check_input(trial, directory, held)
    except TooLarge:
        raise
    except (TypeError, ValueError) as error:  # one that laconic does not reduce: reduce_ says so
        LOG.debug("%s", error)
