"""Describe a timm model by its name and arguments, so that it can be rebuilt.

Most arguments that a timm model was created with can be read from its modules. They are verified before anything is written:
the model that timm builds from them must have the same keys, shapes, module classes and plain attributes (heads, eps,
pooling, ...).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laconic.core.backbone import path_of, plain_type
from laconic.core.limits import TooLarge
from laconic.core.optional_deps import need
from laconic.core.plugins import register_architectures
from laconic.core.token_reduction import TokenReduction

LISTED = 10  # at most this many names of each kind of difference are listed
REFUSED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"}
HARMLESS = ("train", "drop", "init", "fused", "checkpoint")  # attributes with these in their names do not affect inference
FILLING = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}
USUAL: dict[str, Callable[[Any], Any]] = {
    "num_classes": lambda m: m.num_classes,
    "img_size": lambda m: m.patch_embed.img_size,
    "in_chans": lambda m: next(c.in_channels for c in m.patch_embed.modules() if isinstance(c, nn.Conv2d)),
    "global_pool": lambda m: m.global_pool,
}
UNUSUAL: dict[str, Callable[[Any], Any]] = {
    "depth": lambda m: len(m.blocks),
    "embed_dim": lambda m: m.embed_dim,
    "num_heads": lambda m: m.blocks[0].attn.num_heads,
    "patch_size": lambda m: m.patch_embed.patch_size,
    "class_token": lambda m: m.has_class_token,
    "qk_norm": lambda m: not isinstance(m.blocks[0].attn.q_norm, nn.Identity),
    "dynamic_img_size": lambda m: m.dynamic_img_size,
    "use_rel_pos_bias": lambda m: m.blocks[0].attn.relative_position_bias_table is not None,
    "use_shared_rel_pos_bias": lambda m: m.rel_pos_bias is not None,
    "pos_embed_grid_size": lambda m: m.embeds.pos_embed_grid_size,
}


def describe_model(
    model: nn.Module, reduction: TokenReduction | None, model_args: Mapping[str, Any] | Literal["omit"] | None
) -> Any:
    """Return the entry of a model in `laconic.json`: timm's name and arguments, or only its class if it is not timm's.

    ``reduction`` is None for a model that is not reduced.

    Raises:
        TypeError: ``model_args`` is neither a dict nor "omit".
        ValueError: timm does not build this model from the arguments read from it and ``model_args``.
    """
    if not (model_args is None or model_args == "omit" or isinstance(model_args, Mapping)):
        raise TypeError(f"model_args must be a dict of arguments of timm.create_model, 'omit' or None, not {model_args!r}")
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    architecture = config.get("architecture") if isinstance(config, Mapping) and _whole(model, reduction) else None
    if model_args == "omit" or architecture is None:
        if isinstance(model_args, Mapping):
            raise ValueError(
                f"model_args are arguments of timm.create_model, but this {path_of(type(model))} is not one of timm's"
            )
        return {"library": None, "class": path_of(type(model))}
    tag = config.get("tag") or ""
    if not need("timm", "timm").is_model_pretrained(f"{architecture}.{tag}"):
        tag = ""  # not one of timm's pretrained tags, so timm could not look it up
    try:
        given = json.loads(json.dumps(dict(model_args or {})))
    except TypeError as error:
        raise ValueError(f"model_args must be plain JSON values ({error}); or pass model_args='omit'") from error
    args = {**_read(model, USUAL), **given}
    difference, usual = "not built", dict[str, Any]()
    with suppress(ValueError):  # timm may need an argument of UNUSUAL to build it at all
        fresh = build(architecture, tag, args, "meta")
        difference, usual = compare(model, reduction, fresh), _read(fresh, UNUSUAL)
    if difference:
        args = {**_unlike(_read(model, UNUSUAL), usual), **args}
        difference = compare(model, reduction, build(architecture, tag, args, "meta"))
    if difference:
        raise ValueError(
            f"nothing was saved: timm.create_model({architecture!r}, {_shown(args)}) is not this model.\n{difference}\n"
            "Pass the arguments it was created with as model_args={...}; or pass model_args='omit', and load it into a model "
            "that you build: laconic.load(directory, model=your_model)"
        )
    return {"library": "timm", "architecture": architecture, "tag": tag, "args": args}


def _whole(model: nn.Module, reduction: TokenReduction | None) -> bool:
    """Return True if the model itself is reduced, not a transformer inside it; True without a reduction."""
    return reduction is None or reduction.model is model


def build(architecture: str, tag: str, args: Mapping[str, Any], device: str) -> nn.Module:
    """Build a timm model with random weights (without values on the meta device).

    Raises:
        ValueError: timm has no such architecture, or does not take these arguments.
    """
    timm = need("timm", "timm")
    if REFUSED & args.keys():
        raise ValueError(f"model arguments {sorted(REFUSED & args.keys())} are not accepted: weights come from the directory")
    if not timm.is_model(architecture):
        register_architectures()
    if not timm.is_model(architecture):  # also rejects names such as hf-hub:..., which would access the network
        raise ValueError(
            f"timm {timm.__version__} knows no model {architecture!r}; import the module that registers it, install a newer "
            "timm, or build the model yourself: laconic.load(directory, model=your_model)"
        )
    try:
        with torch.device(device), NothingToFill():
            return timm.create_model(f"{architecture}.{tag}" if tag else architecture, pretrained=False, **args)
    except TooLarge:
        raise
    except Exception as error:  # timm raises many types of errors for wrong arguments
        raise ValueError(f"timm {timm.__version__} cannot build {architecture!r} with {_shown(args)}: {error}") from error


class NothingToFill(TorchFunctionMode):
    """Skip the initialisation of meta tensors: they have no values, but the calls take long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta and getattr(func, "__name__", "") in FILLING:
            return args[0]
        return func(*args, **(kwargs or {}))


def compare(model: nn.Module, reduction: TokenReduction | None, fresh: nn.Module) -> str:
    """Return how a model, without its reduction, differs from a fresh one, as text; empty if they are the same."""
    weights = dict(model.state_dict())
    if reduction is not None:
        own = next(f"{name}." for name, module in model.named_modules() if module is reduction)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(own)}
    difference = mismatch(fresh.state_dict(), weights, "this model", "timm's")
    return difference or "\n".join(f"  {line}" for line in _traits(model, fresh)[:LISTED])


def _traits(model: nn.Module, fresh: nn.Module) -> list[str]:
    modules, lines = dict(model.named_modules()), []
    for name, theirs in fresh.named_modules():
        ours = modules.get(name)
        if isinstance(theirs, nn.Identity) or "Drop" in type(theirs).__name__:
            continue
        if plain_type(ours) is not plain_type(theirs):
            lines.append(f"{name}: {type(ours).__name__} here, {type(theirs).__name__} in timm's")
            continue
        for key, value in vars(theirs).items():
            plain = value is None or isinstance(value, bool | int | float | str | tuple)
            if plain and not key.startswith("_") and not any(part in key for part in HARMLESS) and vars(ours).get(key) != value:
                lines.append(f"{name or 'the model'}: {key} is {vars(ours).get(key)!r} here, {value!r} in timm's")
    return lines


def mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, whose: str) -> str:
    """Return the tensors that are missing, unexpected or of another shape, as lines of text; empty if all fit."""
    shape = {name: list(tensor.shape) for name, tensor in {**expected, **found}.items()}
    missing = [f"{name} {shape[name]}" for name in expected if name not in found]
    extra = [f"{name} {shape[name]}" for name in found if name not in expected]
    other = [
        f"{name}: {shape[name]} in {where}, {list(expected[name].shape)} in {whose}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    kinds = ((f"missing from {where}", missing), (f"in {where} but not in {whose}", extra), ("of another shape", other))
    return "\n".join(_listing(title, lines) for title, lines in kinds if lines)


def _listing(title: str, lines: list[str]) -> str:
    more = [f"... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n    ".join([f"  {len(lines)} {title}:", *lines[:LISTED], *more])


def _read(model: Any, table: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    values = {}
    for name, look in table.items():
        try:
            value = look(model)
        except (AttributeError, StopIteration, IndexError):
            continue  # this class has no such attribute; if it matters, the comparison finds the difference
        if value is not None:
            values[name] = value
    return values


def _unlike(values: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if usual.get(name) != value}


def _shown(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in args.items())
