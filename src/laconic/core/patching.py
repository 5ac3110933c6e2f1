"""Replace methods of a model's modules while it is reduced, and undo that.

A module keeps its attributes; its class is replaced by a subclass of the same name with some methods replaced. So ``self`` is
always the module that runs, in a copy, a DataParallel replica or a wrapper. Anything that another tool sets on the module
instance (a ``forward``, hooks) still takes precedence.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from laconic.core.backbone import ModelSpec, block_path, path_of
from laconic.core.intermediates import forward_intermediates, refuse_layer_removal
from laconic.core.links import LINK, BlockLink, ModelRef, PartLink
from laconic.core.patch_layer import PatchLink, find_patch_layer, run_patch_layer
from laconic.core.readout import pool, read
from laconic.core.runtime import run_block, run_call
from laconic.core.token_reduction import TokenReduction, passes_through

log = logging.getLogger(__name__)
# the names of methods, their replacements f(module, own, *arguments), and (for `read`) the function that the replacement calls
Replaced = tuple[tuple[str, Callable[..., Any], Callable[..., Any] | None], ...]

# methods that models may have, and their replacements
CALLS = ("forward", "forward_features")
OVERRIDES: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "pool": (read, pool),
    "forward_intermediates": (forward_intermediates, None),
    "prune_intermediate_layers": (refuse_layer_removal, None),
}
_subclasses: WeakKeyDictionary[type, dict[Replaced, type]] = WeakKeyDictionary()


def apply_settings(host: Any, entry: ModelSpec) -> dict[int, Any]:
    """Apply the settings that make the model's attention fused; return the old values, for `restore_settings`."""
    old = dict[int, Any]()
    for number, (owner, name, value) in enumerate(entry.settings(host)):
        if getattr(owner, name) != value:
            old[number] = getattr(owner, name)
            setattr(owner, name, value)
            log.info("%s: %s is %r while it is reduced; it was %r", type(host).__name__, name.strip("_"), value, old[number])
    return old


def restore_settings(host: Any, entry: ModelSpec, old: Mapping[int, Any]) -> None:
    """Undo `apply_settings`."""
    settings = entry.settings(host)
    for number, value in old.items():
        owner, name, _ = settings[number]
        setattr(owner, name, value)


def attach(host: Any, entry: ModelSpec, reduction: TokenReduction) -> None:
    """Attach a reduction to a model: replace methods of the model and its blocks, and set ``model.laconic``."""
    for index, block in enumerate(entry.blocks(host)):
        through = passes_through(reduction, index, block)
        facts = BlockLink(reduction.ref, names_of(block), index, block_path(block), through)
        replace(block, (("forward", checkpointed if checkpoints_itself(block) else run_block, None),), facts)
    for module, methods in replaced_methods(host, entry).items():
        if module is not host:
            replace(module, methods, PartLink(reduction.ref, names_of(module)))
    replace(host, replaced_methods(host, entry)[host], PartLink(reduction.ref, names_of(host)))
    if reduction.embeds:
        found = find_patch_layer(host, entry)
        link = PatchLink(reduction.ref, names_of(found.layer), found.size, found.layout)
        replace(found.layer, (("forward", run_patch_layer, None),), link)
    readers = [getattr(type(host).laconic_base, name, None) for name in entry.head_reads_prefix_only]
    readers = [reader for reader in readers if reader is not None]  # Eva of timm 1.0.15 pools in its forward_head
    reduction.known_readout = bool(readers) and all(reader.__module__.startswith("timm.models.") for reader in readers)
    host.laconic = reduction


def detach(host: Any, entry: ModelSpec) -> None:
    """Undo `attach`, and restore the settings that the reduction changed.

    Raises:
        ValueError: another tool changed the class of a module since.
    """
    reduction = host.laconic
    old_settings = getattr(reduction, "original_module", reduction).old_settings
    reduced = [module for module in host.modules() if LINK in module.__dict__]
    for module in reduced:
        if "laconic_base" not in vars(type(module)):
            raise ValueError(
                f"the class of a {type(module).__name__} was changed after the model was reduced (by FSDP, parametrization or "
                "another tool); undo that first"
            )
    for module in reduced:
        module.__class__ = type(module).laconic_base
        del module.__dict__[LINK]
    restore_settings(host, entry, old_settings)
    del host.laconic


def replaced_methods(host: Any, entry: ModelSpec) -> dict[nn.Module, Replaced]:
    """Return the methods that are replaced, of the model and of modules in it other than its blocks."""
    kind = type(host)
    found: dict[nn.Module, dict[str, tuple[Any, Any]]] = {host: {}}
    found[host] |= {name: (run_call, None) for name in (*CALLS, *entry.head_methods) if hasattr(kind, name)}
    found[host] |= {name: method for name, method in OVERRIDES.items() if hasattr(kind, name)}
    owner, features = entry.features(host)
    found.setdefault(owner, {})[features] = (run_call, None)
    for module, name, override in entry.method_overrides(host):
        found.setdefault(module, {})[name] = (read, override)
    return {module: tuple((name, *by) for name, by in methods.items()) for module, methods in found.items()}


def names_of(module: nn.Module) -> tuple[str, ...]:
    """Return the parameter names of a block's (or model's) forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


# ------------------------------------------------------------------------------------------------ classes
def replace(module: nn.Module, methods: Replaced, link: PartLink) -> None:
    """Give a module its subclass and its link."""
    module.__class__ = subclass(type(module), methods)
    module.__dict__[LINK] = link


def subclass(base: type, methods: Replaced) -> type:
    """Return the subclass of the same name in which these methods call their replacements (cached by class and methods)."""
    known = _subclasses.setdefault(base, {})
    if methods in known:
        return known[methods]

    def replacing(name: str, function: Callable[..., Any], reader: Callable[..., Any] | None) -> Callable[..., Any]:
        own = getattr(base, name)
        if reader is not None:
            function = partial(function, reader)
        elif function is run_call:
            function = partial(run_call, name)

        @functools.wraps(own)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, own, *args, **kwargs)

        return method

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = base  # type(model)(...) makes a model that is not reduced
        base.__init__(self, *args, **kwargs)  # type: ignore[misc]

    names: dict[str, Any] = {name: replacing(name, function, reader) for name, function, reader in methods}
    names |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    names |= {"laconic_base": base, "laconic_methods": methods, "__reduce_ex__": _reduce}
    names |= {"__prepare_scriptable__": _refuse_script, "__init__": functools.wraps(base.__init__)(init)}  # type: ignore[misc]
    return known.setdefault(methods, type(base.__name__, (base,), names))


def _reduce(module: Any, protocol: Any) -> Any:
    """Pickle or copy a module with replaced methods by its base class, since the subclass cannot be imported by name."""
    kind = type(module)
    return _remake, (kind.laconic_base, kind.laconic_methods), module.__getstate__()


def _remake(base: type, methods: Replaced) -> Any:
    return copyreg.__newobj__(subclass(base, methods))  # type: ignore[attr-defined]


def _refuse_script(module: Any) -> None:
    raise TypeError(
        f"torch.jit.script cannot read the forward of a reduced {type(module).__name__}; use torch.jit.trace, "
        "torch.export.export or laconic.export, or laconic.restore_(model) first"
    )


# ------------------------------------------------------------------------------------------------ blocks
def checkpoints_itself(block: Any) -> bool:
    """Return True if the block's class is one of transformers 5, which wraps gradient checkpointing around its forward."""
    return hasattr(block, "gradient_checkpointing") and hasattr(type(block).forward, "__wrapped__")


def checkpointed(block: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `run_block` inside the gradient checkpointing that the block's class wraps around its own forward.

    The reducer must be inside the checkpointed function too, so that the recomputation in the backward pass includes it.
    """
    if block.gradient_checkpointing and block.training:
        return block._gradient_checkpointing_func(partial(run_block, block, own, **kwargs), *args)
    return run_block(block, own, *args, **kwargs)


def refuse_patched(host: nn.Module, entry: ModelSpec) -> None:
    """Raise if another tool has replaced a method that Laconic has to replace.

    Raises:
        ValueError: there is such a method; the message names it.
    """
    own: list[tuple[nn.Module, Any]] = [(block, (("forward", None, None),)) for block in entry.blocks(host)]
    for module, methods in [*own, *replaced_methods(host, entry).items()]:
        for name, *_ in methods:
            found = module.__dict__.get(name)
            if found is None or (module is host and name in CALLS):
                continue  # a wrapper of the model's forward calls the original in the end; `verify` detects it if not
            if getattr(found, "__func__", None) is getattr(type(module), name) and found.__self__ is module:
                del module.__dict__[name]  # the class's own method, set on the instance by transformers 4.57: redundant
                continue
            raise ValueError(f"{path_of(type(module))} has a {name} put on it by another tool; undo that before reducing")


__all__ = ["ModelRef", "apply_settings", "attach", "detach", "refuse_patched", "restore_settings"]
