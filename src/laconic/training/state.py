"""Files of a run: a checkpoint from which it resumes exactly, its metrics (one JSON object per line), and its weights."""

from __future__ import annotations

import dataclasses
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
from laconic.core.files import Refusal, append_line, json_lines, write_atomically
from laconic.core.token_reduction import find_reduction
from laconic.training.recipe import Recipe

LOG = logging.getLogger(__name__)
CHECKPOINT, METRICS, RECIPE = "checkpoint.pt", "metrics.jsonl", "recipe.json"
FREE = ("about",)  # sections of a recipe that may differ when a run is resumed


@dataclass
class Progress:
    """Progress of a run. Random states are not needed: they follow from the step.

    ``best`` is the best accuracy so far, found after ``best_step`` steps of the model named ``best_of`` ("val" or "val_ema").
    ``unvalidated``: the epoch that ends at this step has still to be validated.
    """

    step: int = 0
    best: float = -1.0
    best_step: int = -1
    best_of: str = ""
    unvalidated: bool = False


def save_checkpoint(
    folder: Path, progress: Progress, recipe: Recipe, states: Mapping[str, Any], data: Mapping[str, Any] | None = None
) -> None:
    """Write the checkpoint of a run atomically; ``states`` are state dicts by name, ``data`` are facts on the images."""
    content = io.BytesIO()
    facts = {**dataclasses.asdict(progress), "recipe": json.dumps(recipe.to_json()), "data": json.dumps(data)}
    torch.save({**facts, "states": dict(states)}, content)
    write_atomically(folder / CHECKPOINT, content.getbuffer())


def load_checkpoint(folder: Path, recipe: Recipe, data: Mapping[str, Any] | None = None) -> tuple[Progress, dict[str, Any]]:
    """Load the progress and the states of an earlier run with the same recipe and the same images.

    Raises:
        Refusal: there is no checkpoint, it is damaged, or it was made with another recipe, other classes or other images
            (the message lists the differences).
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise Refusal(f"--resume: there is no {CHECKPOINT} in {folder}; start the run without --resume")
    try:
        limits.check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        made, states = json.loads(content["recipe"]), content["states"]
        known = {field.name for field in dataclasses.fields(Progress)} & content.keys()
        progress = Progress(**{"step": content["step"], **{name: content[name] for name in known}})
        facts = json.loads(content.get("data", "null"))
    except Exception as error:  # torch raises many types of errors for a damaged file
        raise Refusal(f"--resume: {path} is not a checkpoint of laconic train: {str(error).splitlines()[0]}") from error
    changed = [line for line in differences(_upgraded(made), recipe.to_json()) if line.partition(".")[0] not in FREE]
    if changed:
        raise Refusal(
            f"--resume: {path} was made with other settings ({'; '.join(changed[:5])}); give the same ones, or choose another "
            "--output"
        )
    if facts and data and (others := other_images(facts, data)):
        raise Refusal(
            f"--resume: {path} was made with other images ({'; '.join(others)}); give the same ones, or choose another --output"
        )
    return progress, states


def other_images(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences of the facts on the images of two runs, as phrases."""
    was, now = old.get("classes", []), new["classes"]
    gone, come = [name for name in was if name not in set(now)], [name for name in now if name not in set(was)]
    out = [f"class {name} is gone" for name in gone[:3]] + [f"class {name} is new" for name in come[:3]]
    if was != now and not out:
        out.append(f"the classes had the order {', '.join(was[:4])} ..., now {', '.join(now[:4])} ...: see --class-map")
    for use in ("train", "val"):
        before, after = old.get(use), new.get(use)
        if before == after:
            continue
        counts = [0 if facts is None else facts.get("images", 0) for facts in (before, after)]
        same = ", with other names or classes" if counts[0] == counts[1] else ""
        out.append(f"{use} had {counts[0]:,} images, now {counts[1]:,}{same}")
    return out


def _upgraded(made: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrade an old recipe to the current keys: new keys get their defaults, removed keys are ignored."""
    out = Recipe().to_json()
    for part, keys in out.items():
        if isinstance(keys, dict):
            out[part] = {key: made.get(part, {}).get(key, default) for key, default in keys.items()}
        else:
            out[part] = made.get(part, keys)
    return out


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the differences of two JSON trees, as lines of text."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


class Metrics:
    """The metrics of a run, as a file of JSON lines; resuming removes the rows of what is done again."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.path, step = folder / METRICS, progress.step
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        if progress.unvalidated:
            kept = [row for row in kept if row["step"] < step or "lr" in row]
        write_atomically(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row, which must have a ``step``."""
        append_line(self.path, json.dumps(dict(row)))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a run so far; a truncated last line is skipped."""
    return json_lines(folder / METRICS)


def save_weights(model: nn.Module, folder: Path, options: Mapping[str, Any]) -> None:
    """Write a reduced model with ``laconic.save``, any other in the same way but without a method; timm can load its file.

    ``options`` are the arguments that timm built the model with; they are written if they cannot be read from the model. To
    save the result of long training in any case, this does not raise if the model cannot be described: then the file does not
    tell how to build the model, and loading it needs ``model=``.
    """
    from laconic.checkpoints.model_spec import REFUSED
    from laconic.checkpoints.plain import save_plain
    from laconic.checkpoints.save_load import save

    write = save_plain if find_reduction(model) is None else save
    for arguments in (None, {name: value for name, value in options.items() if name not in REFUSED}):
        try:
            return write(model, folder, model_args=arguments)
        except ValueError as error:
            LOG.debug("%s", error)
    write(model, folder, model_args="omit")
