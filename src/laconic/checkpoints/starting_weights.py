"""Weights to start a training run from: a file or a directory, fitted to other classes and another input size as timm does.

Files are those of timm, of the papers' authors and of Lightning, with any prefix before the names of the model's parameters;
directories are those of `laconic.save`. timm resizes position embeddings and patch embeddings; a head for another number of
classes is new. Everything else must fit, and all that was changed or left out is noted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from laconic.checkpoints.official_weights import read_file
from laconic.checkpoints.save_load import load_strictly
from laconic.checkpoints.saved_files import RECORD, WEIGHTS, read_record
from laconic.core import limits
from laconic.core.files import Refusal
from laconic.core.token_reduction import find_reduction

PLACES = ("state_dict_ema", "model_ema", "state_dict", "model", "net")  # where a checkpoint holds its weights; timm's order
OWN = "laconic."  # the names of what a method learns
SHOWN = 3  # names in a note


@dataclass(frozen=True)
class Start:
    """A model to start from, notes on its weights, and what the method of an earlier run has learned."""

    model: nn.Module
    notes: tuple[str, ...] = ()
    learned: dict[str, Tensor] = field(default_factory=dict)
    method: str = ""  # of the earlier run, if it is known


def start_from(place: Path, name: str, classes: int, options: Mapping[str, Any], create: Callable[..., nn.Module]) -> Start:
    """Build a timm model for ``classes`` with the weights of a file or directory.

    Args:
        place: a .safetensors file, a checkpoint of torch, timm or Lightning, or a directory that laconic wrote.
        name: timm's name of the model.
        classes: classes of the images.
        options: arguments of timm.create_model.
        create: builds a timm model by its name and arguments, with random weights.

    Raises:
        Refusal: there is no such file, or its weights are not of this model with these options.
    """
    file = _file_of(place)
    record = read_record(file.parent / RECORD) if file.name == WEIGHTS and (file.parent / RECORD).is_file() else None
    _check_architecture(place, record, name, options)
    fresh = create(name, num_classes=classes, **options)
    try:
        weights, notes = read_weights(file, fresh)
        learned = {key: weights.pop(key) for key in list(weights) if key.startswith(OWN)}
        changes = _fill(fresh, weights, str(file), lambda found: _as_timm(name, found, weights, options, create))
    except Exception as error:  # the readers of three libraries raise many kinds
        said = " ".join(str(error).split())
        raise Refusal(
            f"model.weights: {place} does not hold the weights of {name} with {_shown(options)}: {said}; set model.name and "
            "model.options to the model that the file is of"
        ) from error
    method = "" if record is None else (record["method"] or {}).get("name", "")
    return Start(fresh, (*notes, *changes), learned, method)


def take_learned(student: nn.Module, start: Start) -> str:
    """Load what a method learned in an earlier run into a model reduced by the same method; return a note on it.

    The note is empty if the earlier run had learned nothing. Where method or blocks differ, nothing is loaded.
    """
    if not start.learned:
        return ""
    whose, reduction = start.method or "a method", find_reduction(student)
    wanted = {key: value for key, value in student.state_dict().items() if key.startswith(OWN)}
    if reduction is None or not wanted:
        return f"what {whose} had learned there ({len(start.learned)} tensors) is left out"
    name = reduction.config.info.name
    if start.method in ("", name) and _shapes(wanted) == _shapes(start.learned):
        limits.check_kinds(wanted, start.learned, "the weights")
        student.load_state_dict(start.learned, strict=False)
        return f"what {name} had learned there is taken over"
    why = f"they are of {whose}" if start.method not in ("", name) else "they are of other blocks or options"
    return f"the scorers there are left out ({why}): those of {name} start untrained"


# ------------------------------------------------------------------------------------------------ reading
def read_weights(file: Path, model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a file under the names of a model, and notes on other copies and parts that the file has.

    Averaged weights are preferred, as timm does.

    Raises:
        OSError, ValueError: the file cannot be read, is no file of weights, or claims far more than it holds.
    """
    held = limits.check_file(file)
    content, notes = _unwrapped(read_file(file), file)
    limits.check_tensors(content, str(file), held)
    weights, more = _without_prefix(content, model)
    return weights, [*notes, *more]


def _file_of(place: Path) -> Path:
    if place.is_dir():
        if (place / WEIGHTS).is_file():
            return place / WEIGHTS
        inner = [child.name for child in (place / "model", place / "best") if (child / WEIGHTS).is_file()]
        advice = f"give {place / inner[0]}" if inner else f"expected {WEIGHTS} in it, as laconic.save and laconic train write"
        raise Refusal(f"model.weights: {place} is a directory without weights; {advice}")
    if not place.is_file():
        raise Refusal(
            f"model.weights: {place}: there is no such file; give a .safetensors file, a checkpoint of torch or Lightning, or "
            "a directory that laconic wrote"
        )
    return place


def _check_architecture(place: Path, record: Mapping[str, Any] | None, name: str, options: Mapping[str, Any]) -> None:
    """Refuse a directory of another architecture, and say which settings it needs."""
    found = {} if record is None else record["model"]
    architecture = found.get("architecture")
    if architecture is None or architecture == name.partition(".")[0]:
        return
    args = {key: value for key, value in found.get("args", {}).items() if key not in ("num_classes", "global_pool", "in_chans")}
    raise Refusal(
        f"model.weights: {place} holds a {architecture} ({_shown(args)}), and the recipe asks for {name} ({_shown(options)}); "
        f"set model.name={architecture}, and model.options to those of the directory"
    )


def _unwrapped(content: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a checkpoint, and a note if they are averaged ones."""
    place = next((key for key in PLACES if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None)
    weights = content if place is None else content[place]
    tensors = (
        {key: value for key, value in weights.items() if isinstance(value, Tensor)} if isinstance(weights, Mapping) else {}
    )
    if not tensors:
        keys = ", ".join(map(str, list(content)[:10])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{file} has no weights under {', '.join(PLACES)}; it has {keys or 'nothing'}")
    return tensors, [f"its averaged weights ({place})"] if place in ("state_dict_ema", "model_ema") else []


def _without_prefix(content: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of the model under its own names, and notes on those of other parts of the file.

    The prefix (``model.`` in Lightning, ``module.`` of DDP) is the one under which most of the names of the model are found.
    If less than half are found, the names are foreign ones, which are left to timm.
    """
    names, found = set(model.state_dict()), Counter[str]()
    for key in content:
        parts = key.split(".")
        found.update(".".join([*parts[:i], ""]).lstrip(".") for i in range(len(parts)) if ".".join(parts[i:]) in names)
    most = max(found.values(), default=0)
    if 2 * most < len(names):
        return dict(content), []
    best = sorted((prefix for prefix, count in found.items() if count == most), key=lambda prefix: (len(prefix), prefix))
    prefix, notes = best[0], list[str]()
    if len(best) > 1:
        notes.append(f"of the copies under {' and '.join(repr(one) for one in best)}, the one under {prefix!r}")
    others = [key for key in content if not key.startswith(prefix)]
    if others:
        notes.append(f"{len(others)} tensors outside {prefix!r} are left out ({_some(others)})")
    return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}, notes


# ------------------------------------------------------------------------------------------------ fitting
def _fill(fresh: nn.Module, weights: Mapping[str, Tensor], source: str, adapted: Callable[[int], nn.Module]) -> list[str]:
    """Fill a model; return notes on what was changed. ``adapted(classes)`` is timm's model for the classes of the file."""
    own = fresh.state_dict()
    heads = [key for key in _heads(fresh) if key in own]
    limits.check_kinds({key: value for key, value in own.items() if key not in heads}, weights, source)
    if _shapes(own) == _shapes(weights):
        load_strictly(fresh, weights, source)
        return [f"with its head for {len(own[heads[0]])} classes"] if heads else []
    known = next((len(weights[key]) for key in heads if key in weights), 0)
    whole = adapted(known).state_dict()
    keep_head = bool(heads) and known == len(own[heads[0]])
    fresh.load_state_dict({key: own[key] if key in heads and not keep_head else whole[key] for key in own})
    notes = [
        f"{key} resized from {list(weights[key].shape)} to {list(value.shape)}"
        for key, value in own.items()
        if key in weights and key not in heads and weights[key].shape != value.shape
    ]
    if heads:
        count = len(own[heads[0]])
        has = f"the file has {known}" if known else "the file has none"
        notes.append(f"with its head for {count} classes" if keep_head else f"a new head for {count} classes ({has})")
    return notes


def _as_timm(
    name: str, classes: int, weights: Mapping[str, Tensor], options: Mapping[str, Any], create: Callable[..., nn.Module]
) -> nn.Module:
    """Return the model that timm fills strictly with these weights, with as many classes as they have."""
    given = options.get("pretrained_cfg_overlay", {})
    overlay = {**given, "state_dict": dict(weights), "num_classes": classes, "label_offset": 0}
    return create(name, pretrained=True, num_classes=classes, **{**options, "pretrained_cfg_overlay": overlay})


def _heads(model: nn.Module) -> list[str]:
    """Return the names of the classifier's parameters, weights first."""
    config = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or "head"
    return [f"{name}.{part}" for part in ("weight", "bias") for name in ((names,) if isinstance(names, str) else names)]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in weights.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
