"""Models on disk: ``model.safetensors`` with all weights, ``laconic.json`` with how to build and reduce the model.

`laconic.checkpoints.plain` writes the same two files for a model that is not reduced; its method and schedule are null.

`laconic.checkpoints.official_weights` reads the weights of the papers' authors, `laconic.checkpoints.hub` repositories on
the Hugging Face Hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from laconic.api import reduce_, restore_
from laconic.checkpoints import transformers_spec
from laconic.checkpoints.meta_build import build_within, check_reducers
from laconic.checkpoints.model_spec import build, describe_model, mismatch
from laconic.checkpoints.saved_files import FORMAT, RECORD, WEIGHTS, read_record, read_safetensors, write_model
from laconic.core import limits
from laconic.core.backbone import path_of, unwrapped
from laconic.core.method import COMPOSED, METHODS, Method, resolve
from laconic.core.schedule import Schedule
from laconic.core.token_reduction import find_reduction
from laconic.core.values import shown
from laconic.data.model_record import record_of, set_record
from laconic.methods.ops import as_in_0_1

Place = str | os.PathLike[str]


def save(model: nn.Module, directory: Place, *, model_args: Mapping[str, Any] | Literal["omit"] | None = None) -> None:
    """Write a reduced model to a directory that `load` can read.

    The weights keep their dtype; training state (drop path, frozen parameters) is not written. A write that fails or is killed
    leaves the old model or the new one (see `laconic.checkpoints.saved_files`). Wrappers (DataParallel, DDP, averaged models,
    torch.compile) are removed.

    Args:
        model: a reduced model, or a wrapper of one.
        directory: created if it does not exist; the two files in it are replaced.
        model_args: arguments of ``timm.create_model`` (of the constructor, for a transformers model) in addition to those
            that can be read from the model. With ``"omit"`` the file does not tell how to build the model, and `load` needs
            ``model=``; this is always so for models of other libraries.

    Raises:
        ValueError: the model is not reduced, its method is not registered, timm does not build it from its name and
            ``model_args``, or an option cannot be written as JSON; nothing is written.
        NotADirectoryError: the path is a file.
        Unwritable: the directory cannot be written, or there is no room (the message has the sizes).
    """
    from laconic import __version__

    model, directory = unwrapped(model), Path(directory)
    reduction = find_reduction(model)
    if reduction is None:
        raise ValueError(
            f"nothing was saved to {directory}: this {type(model).__name__} is not reduced. Call laconic.reduce_ first; save "
            "the weights of a plain model with torch.save(model.state_dict(), file)"
        )
    _check_registered(reduction.config, directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; laconic.save takes a directory")
    transformers = transformers_spec.knows(model) and model_args != "omit"
    describe: Any = transformers_spec.describe if transformers else describe_model
    record = {"laconic": __version__, "format": FORMAT, "model": describe(model, reduction, model_args)}
    record |= {"method": reduction.config.describe(), "schedule": reduction.schedule.to_json()}
    if reduction.restore:
        record["restore"] = True
    if reduction.compute is not None:
        record["compute"] = reduction.compute
    if record_of(model):
        record["data"] = record_of(model)
    write_model(directory, model.state_dict(), record)


def _check_registered(config: Method, directory: Path) -> None:
    """Refuse a method that `load` would not find by its name."""
    for member in getattr(config, "members", ()):  # of a chain
        _check_registered(member, directory)
    if COMPOSED.get(config.describe()["name"]) is type(config):
        return
    row = METHODS.get(config.info.name)
    if row is None or path_of(row.config) != path_of(type(config)):
        name = config.info.name if row is None else type(config).__name__  # a subclass has the name of its base
        raise ValueError(
            f"nothing was saved to {directory}: the method {name} is not registered, so laconic.load could not "
            'build it. Give it a config class with @laconic.method("NAME", ...), as docs/new-method.md shows, and reduce the '
            "model by that name; or save the weights alone: torch.save(model.state_dict(), file)"
        )


def load(directory: Place, *, model: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Load the reduced model that `save` wrote, in eval mode; or the model of a run without a method, unreduced.

    Args:
        directory: a directory written by `save`, or by ``laconic train``.
        model: an unreduced model to reduce and fill in place, on its own device and in its own dtype; without it timm or
            transformers builds the model, in the dtype it was saved in.
        device: device of the model, if it is built here.

    Raises:
        FileNotFoundError, NotADirectoryError: no such directory, or a file is missing in it.
        LookupError: an unknown method.
        ValueError: a file is damaged or of a newer format, the model cannot be built without ``model``, it takes far more
            memory than its weights (see `laconic.core.limits`), or the weights do not fit. A given ``model`` is then restored.
    """
    directory = _existing(directory)
    record = read_record(directory / RECORD)
    if record["method"] is None:
        return _load_unreduced(directory, record, model, device)
    config, schedule = _read_method(directory / RECORD, record)
    schedule = as_in_0_1(config, schedule)
    how: dict[str, Any] = {name: record.get(name) for name in ("restore", "compute")}
    weights = read_safetensors(directory / WEIGHTS)
    held, source = limits.check_file(directory / WEIGHTS), str(directory / RECORD)
    if model is not None:
        check_reducers(model, config, schedule, source, held, len(weights))
        reduce_(model, config, schedule=schedule, **how)
        try:
            load_strictly(unwrapped(model), weights, str(directory))
        except ValueError:
            restore_(model)
            raise
        return _with_record(model, record).eval()
    build_on = partial(_build, directory / RECORD, record["model"])
    model = build_within(build_on, source, held, len(weights), (config, schedule))
    reduce_(model, config, schedule=schedule, **how)
    return _with_record(_filled(model, weights, directory), record).to(device).eval()


def load_directory(directory: Place) -> nn.Module:
    """Load the model that laconic or transformers' ``save_pretrained`` wrote to a directory, in eval mode.

    Raises:
        FileNotFoundError, LookupError, ValueError: as `load`; transformers cannot load it.
    """
    theirs = saved_by(directory) == "transformers"
    model: nn.Module = transformers_spec.from_directory(str(directory)) if theirs else load(directory)
    return model.eval()


def saved_by(directory: Place) -> Literal["laconic", "transformers"]:
    """Return the library that wrote a directory, by its files."""
    theirs = Path(directory, "config.json").is_file() and not Path(directory, RECORD).exists()
    return "transformers" if theirs else "laconic"


def _load_unreduced(directory: Path, record: dict[str, Any], model: nn.Module | None, device: str | torch.device) -> nn.Module:
    """Load the model of a record without a method."""
    weights = read_safetensors(directory / WEIGHTS)
    if model is not None:
        load_strictly(unwrapped(model), weights, str(directory))
        return _with_record(model, record).eval()
    held, source = limits.check_file(directory / WEIGHTS), str(directory / RECORD)
    built = build_within(partial(_build, directory / RECORD, record["model"]), source, held, len(weights))
    return _with_record(_filled(built, weights, directory), record).to(device).eval()


def _filled(model: nn.Module, weights: Mapping[str, Tensor], directory: Path) -> nn.Module:
    """Return a model that was just built with the weights of a directory, in their dtype if they have one only."""
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    load_strictly(model, weights, str(directory))
    return model


def _with_record(model: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Return the model with what the file tells of its data, if it does."""
    if "data" in record:
        set_record(model, record["data"])
    return model


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], source: str, advice: str = "") -> None:
    """Load weights if all of them fit; otherwise load none.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (they are listed, then ``advice`` follows), or a
            tensor is of another kind (see `laconic.core.limits.check_kinds`).
    """
    own = model.state_dict()
    difference = mismatch(own, weights, "the file", "the model")
    if difference:
        raise ValueError(f"{source} does not fit this {type(model).__name__}; nothing was loaded.\n{difference}{advice}")
    limits.check_kinds(own, weights, source)
    model.load_state_dict(weights, strict=True)


def _existing(directory: Place) -> Path:
    path = Path(directory)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(
            f"{path} is a file; laconic.load takes the directory that laconic.save wrote. To load weights published by a "
            "paper's authors, use laconic.import_checkpoint"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)):
        raise FileNotFoundError(
            f"there is no directory {str(directory)!r} here; if it is a repository on the Hugging Face Hub, use "
            f"laconic.from_pretrained({str(directory)!r})"
        )
    raise FileNotFoundError(f"there is no directory {path}; laconic.load takes the directory that laconic.save wrote")


def _read_method(path: Path, record: dict[str, Any]) -> tuple[Method, Schedule]:
    name, options = record["method"].get("name"), record["method"].get("options", {})
    if not isinstance(name, str) or not isinstance(options, dict):
        raise ValueError(f"{path}: method must be a name and a table of options, not {shown(record['method'])}")
    try:
        return resolve(name, {option: _tuples(value) for option, value in options.items()}), Schedule.of(record["schedule"])
    except LookupError as error:
        raise LookupError(f"{path}: {error} (a custom method must be imported before its models are loaded)") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value  # options are never lists


def _build(path: Path, record: dict[str, Any], device: str) -> nn.Module:
    if record.get("library") == transformers_spec.LIBRARY:
        try:
            return transformers_spec.build(record, device)
        except limits.TooLarge:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {error}; or build it yourself: laconic.load(directory, model=your_model)") from error
    if record.get("library") != "timm":
        raise ValueError(
            f"{path} does not tell how to build its model ({record.get('class', 'of an unknown class')}); build the model "
            "yourself and pass it: laconic.load(directory, model=your_model)"
        )
    try:
        return build(record["architecture"], record.get("tag") or "", record["args"], device)
    except limits.TooLarge:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; or build it yourself: laconic.load(directory, model=your_model)") from error
