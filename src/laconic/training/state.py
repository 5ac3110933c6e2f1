"""What a run leaves on disk: a checkpoint from which it goes on exactly, and its metrics, one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.core import limits
from laconic.core.files import Refusal, json_lines, write_atomically
from laconic.core.token_reduction import find_reduction
from laconic.training.recipe import Recipe

LOG = logging.getLogger(__name__)
CHECKPOINT, METRICS, RECIPE = "checkpoint.pt", "metrics.jsonl", "recipe.json"
FREE = ("about",)  # parts of a recipe that may differ when a run goes on


@dataclass
class Progress:
    """How far a run is: steps done, and the best validation so far. All that is random is a function of the step."""

    step: int = 0
    best: float = -1.0


def save_checkpoint(folder: Path, progress: Progress, recipe: Recipe, states: Mapping[str, Any]) -> None:
    """Write the checkpoint of a run, whole or not at all; ``states`` are state dicts by name."""
    content = io.BytesIO()
    facts = {"step": progress.step, "best": progress.best, "recipe": json.dumps(recipe.to_json())}
    torch.save({**facts, "states": dict(states)}, content)
    write_atomically(folder / CHECKPOINT, content.getvalue())


def load_checkpoint(folder: Path, recipe: Recipe) -> tuple[Progress, dict[str, Any]]:
    """The progress and the states of an earlier run with the same recipe.

    Raises:
        Refusal: there is no checkpoint, it is damaged, or it was made with another recipe (says what differs).
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise Refusal(f"--resume: {folder} holds no {CHECKPOINT}; start the run without --resume")
    try:
        limits.check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        made, states = json.loads(content["recipe"]), content["states"]
        progress = Progress(content["step"], content["best"])
    except Exception as error:  # whatever a damaged file makes torch raise
        raise Refusal(f"--resume: {path} is not a checkpoint of laconic train: {str(error).splitlines()[0]}") from error
    changed = [line for line in differences(_as_now(made), recipe.to_json()) if line.partition(".")[0] not in FREE]
    if changed:
        raise Refusal(
            f"--resume: {path} was made with other settings ({'; '.join(changed[:5])}); give the same ones, or choose another "
            "--output"
        )
    return progress, states


def _as_now(made: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier recipe with the keys of today: those that came later had their defaults, those that are gone do nothing."""
    out = Recipe().to_json()
    for part, keys in out.items():
        if isinstance(keys, dict):
            out[part] = {key: made.get(part, {}).get(key, default) for key, default in keys.items()}
        else:
            out[part] = made.get(part, keys)
    return out


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two trees of JSON differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


class Metrics:
    """The metrics of a run, as a file of JSON lines; going on from a step drops what was written after it."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        write_atomically(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row; it has a ``step``."""
        with self.path.open("a") as file:
            file.write(f"{json.dumps(dict(row))}\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a last line that was cut off is left out."""
    return json_lines(folder / METRICS)


def save_weights(model: nn.Module, folder: Path, options: Mapping[str, Any]) -> None:
    """A reduced model as ``laconic.save`` writes it; any other as timm reads it: model.safetensors.

    ``options`` are those that timm made the model with; they are written where they cannot be read off it. After hours of
    training nothing is refused: at worst the file does not say how to build the model, and loading it needs one.
    """
    if find_reduction(model) is None:
        from safetensors.torch import save as to_bytes

        weights = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
        write_atomically(folder / "model.safetensors", to_bytes(weights))
        return
    from laconic.checkpoints.save_load import save

    for arguments in (None, options):
        try:
            return save(model, folder, model_args=arguments)
        except ValueError as error:
            LOG.debug("%s", error)
    save(model, folder, model_args="omit")
