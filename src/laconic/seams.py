"""What of a host is replaced while it is reduced: the forwards of its blocks, and what reads all its tokens."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from laconic.compression import Compression
from laconic.hosts import Host
from laconic.intermediates import forward_intermediates, refuse_pruning
from laconic.reading import Reading

log = logging.getLogger(__name__)


def settle(host: Any, entry: Host) -> dict[int, Any]:
    """Set what has to be set for the host's attention to be fused; gives the old values, for `unsettle`."""
    old = dict[int, Any]()
    for number, (owner, name, value) in enumerate(entry.settings(host)):
        if getattr(owner, name) != value:
            old[number] = getattr(owner, name)
            setattr(owner, name, value)
            log.info("%s: %s is %r while it is reduced; it was %r", type(host).__name__, name.strip("_"), value, old[number])
    return old


def unsettle(host: Any, entry: Host, old: Mapping[int, Any]) -> None:
    """Undo `settle`."""
    settings = entry.settings(host)
    for number, value in old.items():
        owner, name, _ = settings[number]
        setattr(owner, name, value)


def attach(host: Any, entry: Host, compression: Compression) -> None:
    """Put a compression between the halves of the host's blocks."""
    for index, block in enumerate(entry.blocks(host)):
        run = partial(compression.run, index, block, names_of(block))
        block.forward = partial(checkpointed, block, run) if checkpoints_itself(block) else run
    own = [(host, name, stand_in) for name, stand_in in READERS.items() if hasattr(type(host), name)]
    for module, name, stand_in in [*own, *entry.stand_ins(host)]:
        setattr(module, name, partial(stand_in, Reading(compression)))
    if entry.reads_prefix(host) and "forward" not in host.__dict__:  # there it would be another tool's
        forward: Any = partial(answer, Reading(compression))
        bound = inspect.signature(type(host).forward)  # exports go by the names of the arguments
        forward.__signature__ = bound.replace(parameters=tuple(bound.parameters.values())[1:])
        host.forward = forward
    if entry.refused:
        hook = partial(refuse_arguments, entry.refused, names_of(host))
        compression.hooks.append(host.register_forward_pre_hook(hook, with_kwargs=True))
    if entry.gives_back:
        compression.hooks.append(host.register_forward_hook(partial(give_back, Reading(compression))))
    host.laconic = compression


def names_of(module: nn.Module) -> tuple[str, ...]:
    """The parameters that the forward of a block (or of a model) takes."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def detach(host: Any, entry: Host) -> None:
    """Undo `attach`, and `settle` as the compression remembers it."""
    compression = host.laconic
    for block in entry.blocks(host):
        block.__dict__.pop("forward", None)
    for module, name, _ in [*((host, name, None) for name in READERS), *entry.stand_ins(host)]:
        module.__dict__.pop(name, None)
    if getattr(host.__dict__.get("forward"), "func", None) is answer:
        del host.forward
    while compression.hooks:
        compression.hooks.pop().remove()
    unsettle(host, entry, compression.settled)
    del host.laconic


# ------------------------------------------------------------------------------------------------ what stands in
def checkpoints_itself(block: Any) -> bool:
    """Whether the forward of a block's class is one of transformers 5, which has gradient checkpointing wrapped around it."""
    return hasattr(block, "gradient_checkpointing") and hasattr(type(block).forward, "__wrapped__")


def checkpointed(block: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block as ``run`` has it, with the gradient checkpointing that its class would have wrapped around its own forward.

    All of it must be inside: run again for its gradient, it must find what the method does, too.
    """
    if block.gradient_checkpointing and block.training:
        return block._gradient_checkpointing_func(partial(run, **kwargs), *args)
    return run(*args, **kwargs)


def pool(reading: Reading, x: Tensor, pool_type: str | None = None) -> Tensor:
    """Stands in for the pooling of the host: its own, with every token counted as often as it has patches."""
    return reading.pool(partial(type(reading.host).pool, reading.host), x, pool_type)


def answer(reading: Reading, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the forward of a host that answers by its prefix tokens: its own, and nobody reads the others."""
    compression = reading.compression
    compression.answering = True
    try:
        return type(reading.host).forward(reading.host, *args, **kwargs)
    finally:
        compression.answering = False


def refuse_arguments(
    refused: Sequence[str], names: Sequence[str], host: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Comes before the forward of the host, whose parameters have these names.

    Raises:
        ValueError: it is called with one of those that a reduced model does not take.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in refused:
        if given.get(name) is not None:
            raise ValueError(
                f"a reduced {type(host).__name__} takes no {name}: what is made for all tokens does not fit those that are left"
            )


def give_back(reading: Reading, host: Any, args: Any, output: Any) -> Any:
    """Comes after the forward of a host that hands on all its tokens: where some were merged, every patch has one again."""
    if isinstance(output, tuple):
        return (reading.whole(output[0]), *output[1:])
    output["last_hidden_state"] = reading.whole(output["last_hidden_state"])
    return output


# methods that hosts may have and that read all their tokens, and what stands in for them
READERS: dict[str, Callable[..., Any]] = {
    "pool": pool,
    "forward_intermediates": forward_intermediates,
    "prune_intermediate_layers": refuse_pruning,
}
