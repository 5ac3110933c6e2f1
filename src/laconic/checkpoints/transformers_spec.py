"""Describe a transformers model by its class, its config and further constructor arguments, so that it can be rebuilt.

Only classes of transformers itself are built, never custom code from a repository. The description is verified: a model built
from it must have the same keys, shapes, module classes and plain attributes.
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
    """Return True if a model is of one of transformers' own classes and has a config."""
    return CLASS.fullmatch(path_of(type(model))) is not None and hasattr(model, "config")


def describe(model: Any, reduction: TokenReduction, model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entry of a transformers model in ``laconic.json``.

    ``model_args`` are arguments of its constructor in addition to the config.

    Raises:
        ValueError: the model built from the entry differs from this one, or a value is not plain JSON.
    """
    args = {**_flags(model), **dict(model_args or {})}
    record = {"library": LIBRARY, "class": path_of(type(model)), "args": args, "config": model.config.to_dict()}
    try:
        record = json.loads(json.dumps(record))
    except TypeError as error:
        raise ValueError(f"nothing was saved: the config of this model is not plain JSON ({error})") from error
    fresh = build(record, "meta")
    fresh.name_or_path = model.name_or_path  # ignore where the model was loaded from
    difference = compare(model, reduction, fresh)
    if difference:
        raise ValueError(
            f"nothing was saved: {record['class']} with this model's config is not this model.\n{difference}\n"
            "Pass the constructor's arguments other than the config as model_args={...}; or pass model_args='omit', and load "
            "it into a model that you build: laconic.load(directory, model=your_model)"
        )
    return record


def build(record: Mapping[str, Any], device: str) -> Any:
    """Build the model of a record, with random weights (without values on the meta device).

    Raises:
        ImportError: transformers is not installed.
        ValueError: the class is not one of transformers', this version has no such class, or building it fails.
    """
    path, version = str(record.get("class")), need("transformers", "transformers").__version__
    if CLASS.fullmatch(path) is None:
        raise ValueError(f"{path!r} is not a model class of transformers; laconic builds no other classes")
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
        config = cls.config_class.from_dict(record["config"])
        with torch.device(device):
            model: Any = cls(config, **record["args"])
    except TooLarge:
        raise
    except Exception as error:  # a config of another version can raise any error
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
    """Load a model that ``save_pretrained`` wrote to a directory, in evaluation mode, without network access.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the directory holds no such model, or its class is not one of transformers' own.
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
    except Exception as error:  # transformers raises many types of errors for a wrong directory
        raise ValueError(f"transformers {library.__version__} cannot load {directory}: {error}") from error
    return model.eval()


def _check_size(cls: Any, config: Any, directory: str) -> None:
    """Build a model on the meta device and check its size against the weights files in its directory."""
    files = [file for ending in (".safetensors", ".bin") for file in Path(directory).glob(f"*{ending}")]
    held, tensors = sum(map(limits.check_file, files)), sum(map(limits.tensors_in, files))
    with limits.building(directory, held, tensors), torch.device("meta"):
        trial = (cls.from_config if hasattr(cls, "from_config") else cls)(config)
    try:
        check_input(trial, directory, held)
    except TooLarge:
        raise
    except (TypeError, ValueError) as error:  # a model that laconic does not support: reduce_ raises a clear error later
        LOG.debug("%s", error)
