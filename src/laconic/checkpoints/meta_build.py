"""Build the model that a file describes, first on the meta device, which allocates nothing, to check its size."""

from __future__ import annotations

import math
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
        build: builds the model on the given device.
        source: the file that describes the model, for messages.
        held: size of the weights file in bytes.
        tensors: number of tensors in the weights file.
        method: method and schedule that will reduce the model; the parameters of the method are checked too.

    Raises:
        TooLarge: the model, its input or its attention takes far more memory than the file accounts for.
        TypeError, ValueError: laconic does not support the model, or the schedule does not fit it.
    """
    with limits.building(source, held, tensors):
        trial = build("meta")
    check_input(trial, source, held)
    if method is not None:
        check_reducers(trial, *method, source, held, tensors)
    return build("cpu")


def check_reducers(model: nn.Module, config: Method, schedule: Schedule, source: str, held: int, tensors: int) -> None:
    """Build the parameters that a method adds to a model on the meta device, to check their size.

    Raises:
        TooLarge: the parameters take far more memory than the file accounts for.
        TypeError, ValueError: laconic does not support the model, or the schedule does not fit it.
    """
    host, entry = find_host(model)
    sites = Stages(config, schedule, entry.shapes(host)).sites()
    with limits.building(source, held, tensors), torch.device("meta"), NothingToFill():
        for site in sites.values():
            config.build(site)


def check_input(model: nn.Module, source: str, held: int) -> None:
    """Raise if the model's input is so large that verifying the blocks with one image (`laconic.core.verify`) takes gigabytes.

    In a model with several stages, the number of keys in every stage is about the number of patches of the last stage.

    Raises:
        TooLarge: the input or the attention weights are too large.
        TypeError, ValueError: laconic does not support the model.
    """
    host, entry = find_host(model)
    with _NoNoise():
        sides = entry.sides(entry.example(host))
    kind = "clips" if entry.clips else "images"
    limits.check(f"{source} asks for a model for {kind} of", math.prod(sides), limits.INPUT_PIXELS, "pixels")
    shapes = entry.shapes(host)
    keys = shapes[-1].patches + shapes[-1].prefix
    most = max(4 * shape.heads * (shape.patches + shape.prefix) * keys for shape in shapes)
    allowed = limits.ATTENTION_TIMES * held + limits.ATTENTION_BYTES
    limits.check(f"{source} asks for a model whose attention weights take", most, allowed)


class _NoNoise(TorchFunctionMode):
    """Create the tensors of `torch.randn` on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return torch.empty(*args, device="meta")
        return func(*args, **(kwargs or {}))
