"""Data-parallel processes, through accelerate: starting them, and synchronising their state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.core.files import Refusal
from laconic.core.optional_deps import missing
from laconic.core.suggestions import nearest_names
from laconic.training.recipe import Recipe
from laconic.training.run_config import Running


def join(recipe: Recipe, running: Running, output: Path, *, unused: bool = False) -> Any:
    """Create the accelerator of this process; return once all processes have started.

    Args:
        recipe: the recipe; it sets the precision.
        running: settings of the run: device and trackers.
        output: directory for trackers that write files.
        unused: some steps do not use all parameters.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: no such tracker. Refusal: a tracker is not installed, or settings of the launcher are not supported.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState  # type: ignore[import-untyped]
        from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(missing("accelerate", "train"), name="accelerate") from error
    _check_trackers(running.trackers)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        AcceleratorState._reset_state(reset_partial_state=True)  # otherwise an earlier run in this process sets the precision
    precision, cpu = recipe.optimization.precision, running.device == "cpu"
    device = PartialState(cpu=cpu).device.type
    if precision == "fp16" and device == "cpu":
        raise Refusal("optimization.precision fp16 needs a GPU, and this is a CPU; set optimization.precision=bf16 or =no")
    trackers: dict[str, Any] = {"log_with": list(running.trackers), "project_dir": str(output)} if running.trackers else {}
    parallel = DistributedDataParallelKwargs(find_unused_parameters=unused)
    made: Any = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[parallel], **trackers)
    _check_launcher(made)
    if running.trackers:
        made.init_trackers("laconic", config=flat(recipe.to_json()))
    made.wait_for_everyone()
    return made


def _check_launcher(accelerator: Any) -> None:
    kind = str(accelerator.distributed_type.value)
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise Refusal(
            f"the launcher asks for {kind}; laconic train runs in one process, or data-parallel in several. Start it with "
            "torchrun, or with an accelerate config for data-parallel training"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise Refusal(
            f"the launcher asks for {accelerator.gradient_accumulation_steps} gradient accumulation steps; remove that and "
            f"run laconic train --accumulate {accelerator.gradient_accumulation_steps} (the batch size does not change)"
        )


def _check_trackers(names: tuple[str, ...]) -> None:
    """Raise for trackers that accelerate would ignore silently."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # type: ignore[import-untyped]
    from accelerate.utils import LoggerType  # type: ignore[import-untyped]

    shipped = [str(kind.value) for kind in LoggerType if kind.value != "all"]
    known = [*shipped, *(str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) not in shipped)]
    for name in names:
        if name not in known:
            near = nearest_names(name, known)
            raise ValueError(f"--trackers: no tracker is called {name!r}.{near} There are: {', '.join(known)}")
        if name in shipped and name not in [str(kind.value) for kind in get_available_trackers()]:
            raise Refusal(
                f"--trackers: {name} is not installed here: pip install {name} (metrics.jsonl has the metrics anyway)"
            )


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Flatten nested tables, keys joined by dots; values that trackers may not accept are converted to JSON."""
    out = dict[str, Any]()
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{path}{key}.")
        else:
            out[f"{path}{key}"] = value if isinstance(value, str | int | float) else json.dumps(value)
    return out


def agree(accelerator: Any, *models: nn.Module) -> None:
    """Copy the main process's buffers to all processes: each has batch statistics of its own images."""
    if accelerator.num_processes > 1:
        for model in models:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)


def gather_names(accelerator: Any, names: set[str]) -> list[str]:
    """Return, in every process, the sorted union of the names of all processes."""
    if accelerator.num_processes == 1:
        return sorted(names)
    from accelerate.utils import gather_object  # type: ignore[import-untyped]

    return sorted(set(gather_object(sorted(names))))
