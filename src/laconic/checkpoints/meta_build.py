"""A model that a file asks for is built on the meta device first, where nothing is allocated, and its sizes are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from laconic.checkpoints.model_spec import NothingToFill
from laconic.core import limits
from laconic.core.backbone import find_host
from laconic.core.method import Method
from laconic.core.schedule import Schedule
from laconic.core.stages import Stages


def build_within(
    build: Callable[[str], nn.Module],
    source: str,
    held: int,
    tensors: int,
    method: tuple[Method, Schedule] | None = None,
) -> nn.Module:
    """Build a model on the meta device, check its sizes, then build it on the CPU.

    Args:
        build: builds the model on a device.
        source: the file that asks for it, for messages.
        held: the bytes of its file of weights.
        tensors: the tensors in that.
        method: what it is to be reduced by; the parameters of the method are checked too.

    Raises:
        TooLarge: the model, its input or its attention takes far more memory than the file accounts for.
        TypeError, ValueError: it is no model that laconic knows, or the schedule does not fit it.
    """
    with limits.building(source, held, tensors):
        trial = build("meta")
    check_input(trial, source, held)
    if method is not None:
        check_reducers(trial, *method, source, held, tensors)
    return build("cpu")


def check_reducers(model: nn.Module, config: Method, schedule: Schedule, source: str, held: int, tensors: int) -> None:
    """Build the parameters that a method adds to a model on the meta device.

    Raises:
        TooLarge: they take far more memory than the file accounts for.
        TypeError, ValueError: it is no model that laconic knows, or the schedule does not fit it.
    """
    host, entry = find_host(model)
    sites = Stages(config, schedule, entry.shapes(host)).sites()
    with limits.building(source, held, tensors), torch.device("meta"), NothingToFill():
        for site in sites.values():
            config.build(site)


def check_input(model: nn.Module, source: str, held: int) -> None:
    """Refuse a model for images so large that the proof by one of them (`laconic.core.verify`) would take gigabytes.

    In a model of several stages the keys of every stage are about as many as the patches of the last one.

    Raises:
        TooLarge: it is one of these.
        TypeError, ValueError: it is no model that laconic knows.
    """
    host, entry = find_host(model)
    with _NoNoise():
        height, width = entry.example(host).shape[-2:]
    limits.check(f"{source} asks for a model for images of", height * width, limits.INPUT_PIXELS, "pixels")
    shapes = entry.shapes(host)
    keys = shapes[-1].patches + shapes[-1].prefix
    most = max(4 * shape.heads * (shape.patches + shape.prefix) * keys for shape in shapes)
    allowed = limits.ATTENTION_TIMES * held + limits.ATTENTION_BYTES
    limits.check(f"{source} asks for a model whose attention weights take", most, allowed)


class _NoNoise(TorchFunctionMode):
    """Make noise on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return torch.empty(*args, device="meta")
        return func(*args, **(kwargs or {}))
