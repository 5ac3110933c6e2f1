"""``laconic train``: train or fine-tune a model, reduced or not, by a recipe."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.analysis.accuracy import Accuracy
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.macs import summary
from laconic.api import reduce_
from laconic.checkpoints.starting_weights import Start, start_from, take_learned
from laconic.cli.models import create
from laconic.cli.output import Report, Table
from laconic.cli.outputs import holds
from laconic.cli.train_input import data_facts, open_train_input, reports, say
from laconic.cli.weights import load
from laconic.core.files import Refusal, Unwritable, write_atomically
from laconic.data import Labelling
from laconic.data import Report as DataReport
from laconic.data.classes import data_record
from laconic.data.labelling import TIMM
from laconic.data.model_record import set_record
from laconic.training.checks import check
from laconic.training.input_pipeline import train_transform
from laconic.training.loop import Loop
from laconic.training.recipe import Recipe, read
from laconic.training.run_config import Run, Running
from laconic.training.schedule_changes import tuples
from laconic.training.state import CHECKPOINT, METRICS, RECIPE

MODELS = {"val": "Validation", "val_ema": "Validation of the moving average"}


@dataclass(frozen=True)
class TrainReport(Report):
    """The result of a run; ``accuracies`` are of the model ("val") and its moving average ("val_ema")."""

    recipe: Recipe
    output: Path
    saved: Path
    steps: int
    macs: int
    base_macs: int
    accuracies: Mapping[str, Accuracy]
    weights: str
    unreadable: tuple[str, ...]
    read: Mapping[str, DataReport]

    @property
    def accuracy(self) -> Accuracy | None:
        """Accuracy of the model in ``saved``: the moving average if there is one."""
        return self.accuracies.get("val_ema", self.accuracies.get("val"))

    def parts(self) -> Iterator[str | Table]:
        method = self.recipe.method
        keep = "" if method.keep is None else f", keep {method.keep}"
        keep += f", schedule {json.dumps(method.schedule)}" if method.schedule else ""
        what = f"{self.recipe.model.name}{f' with {method.name}{keep}' if method.name else ''}"
        yield f"{what}: {self.steps} steps, {self.macs / 1e9:.3f} GMACs (unreduced {self.base_macs / 1e9:.3f})."
        yield f"{self.weights[0].upper()}{self.weights[1:]}."
        for name, found in self.accuracies.items():
            low, high = found.interval
            top = f"top-1 {found.top1:.2%} (95 % interval {low:.2%} to {high:.2%}), top-5 {found.top5:.2%}"
            yield f"{MODELS[name]}: {top}; {found.line}."
        if self.unreadable:
            first = ", ".join(self.unreadable[:5])
            yield f"{len(self.unreadable)} images could not be read and were replaced by the next one: {first}"
        kind = "The moving average of the model" if self.recipe.optimization.ema else "The model"
        best = f"the best one so far in {self.output / 'best'}, " if (self.output / "best").is_dir() else ""
        yield f"{kind} is in {self.saved}, {best}the metrics in {self.output / METRICS}."

    def to_json(self) -> dict[str, Any]:
        accuracies = {name: found.to_json() for name, found in self.accuracies.items()}
        facts: dict[str, Any] = {"output": str(self.output), "saved": str(self.saved), "steps": self.steps, "macs": self.macs}
        rest = {"base_macs": self.base_macs, "weights": self.weights, "unreadable": list(self.unreadable)}
        own = None if self.accuracy is None else self.accuracy.to_json()
        facts["images"] = {use: report.to_json() for use, report in self.read.items()}
        return {**facts, **rest, "accuracy": own, "accuracies": accuracies, "recipe": self.recipe.to_json()}


@holds(folder="output")
def train(
    *,
    recipe: str = "",
    data: str = "",
    set: tuple[str, ...] = (),
    output: Path = Path("laconic-run"),
    resume: bool = False,
    labelling: Labelling = TIMM,
    running: Running = Running(),  # noqa: B008 (it is frozen)
) -> TrainReport | None:
    """Train or fine-tune a model, with a method or without, as a recipe says.

    Runs in one process. For several: ``torchrun --nproc_per_node 8 -m laconic.cli train ...``, or on GPUs also
    ``accelerate launch -m laconic.cli train ...``. The main process returns the report, the others None.

    Args:
        recipe: name of a recipe that comes with laconic, or a .toml file (default: the defaults of every key).
        data: folder of images with train and val in it, a .tar, or a name that timm knows (default: what the recipe says).
        set: change one key of the recipe, as KEY=VALUE, e.g. optimization.lr=1e-4.
        output: directory for the model, the checkpoint and the metrics.
        resume: continue the run in --output from its last checkpoint.
        labelling: how images get their classes, and the order of the classes.
        running: device, workers and checkpoints.

    Raises:
        Refusal: no such model or data, validation on the training images, a checkpoint of another recipe or other
            images, a loss that is not finite.
        ImportError: accelerate is not installed.
        LookupError, TypeError, ValueError: a wrong key or value in the recipe, or as `laconic.reduce_`.
    """
    chosen = (read(recipe) if recipe else Recipe()).replaced(set)
    if not resume and (output / CHECKPOINT).is_file():
        raise Refusal(f"--output {output} holds a run already; --resume continues it, or choose another directory")
    run, line = prepare(chosen, data, output, running, labelling)
    found = reports(run.train, run.val)
    loop = Loop(run, resume)  # all processes have met here, and none finds what the main one writes from now on
    try:
        if loop.accelerator.is_main_process:
            write_atomically(output / RECIPE, json.dumps(chosen.to_json(), indent=2))
            say(found, data or chosen.data.name)
        accuracies = loop.go()
        saved = loop.save()
    except Unwritable as error:
        kept = output / CHECKPOINT
        again = f"with --resume it continues from {kept}" if kept.is_file() else "there is no checkpoint yet"
        raise Unwritable(f"{error}; then run the same command again: {again}") from error
    if not loop.accelerator.is_main_process:
        return None
    cost, steps = summary(run.model), loop.progress.step
    facts = (chosen, output, saved, steps, cost.macs, cost.baseline_macs, accuracies, line)
    return TrainReport(*facts, tuple(sorted(run.unreadable)), found)


def prepare(recipe: Recipe, data: str, output: Path, running: Running, labelling: Labelling = TIMM) -> tuple[Run, str]:
    """Prepare a run: its models and images; return it with a line on the weights it starts from.

    Raises:
        Refusal, LookupError, TypeError, ValueError: as `train`.
    """
    check(recipe)
    images, val = open_train_input(recipe, data, labelling)
    start, line = _base(recipe, len(images.classes))
    base = start.model
    # a teacher shares no weights with the student, whose training would change it
    teacher = copy.deepcopy(base) if recipe.loss.logits or recipe.loss.tokens else None
    student = _reduced(shared_copy(base), recipe) if recipe.method.name else base
    taken = take_learned(student, start)
    line = f"{line}; {taken}" if taken else line
    if recipe.optimization.grad_checkpointing:
        _checkpoint_gradients(student, recipe)
    record = data_record(images, student, recipe.data.val_crop)
    set_record(student, record)
    facts, transform = data_facts(record, val), train_transform(student, recipe.augmentation)
    return Run(recipe, student, teacher, images, val, transform, output, running, data=facts), line


def _base(recipe: Recipe, classes: int) -> tuple[Start, str]:
    """Return the unreduced model to start from, and a line on its weights."""
    part, (file, options) = recipe.model, _file_and_options(recipe)
    if not part.pretrained:
        torch.manual_seed(recipe.seed)
        return Start(create(part.name, seed=recipe.seed, num_classes=classes, **options)), "trained from random weights"
    if file and Path(file).suffix.lower() not in (".npz", ".npy"):  # timm alone reads these
        start = start_from(Path(file), part.name, classes, options, partial(create, seed=recipe.seed))
        return start, "; ".join([f"the weights of {part.name} come from {file}", *start.notes])
    loaded = load(part.name, Path(file) if file else None, num_classes=classes, **options)
    if loaded.random:
        raise Refusal(f"the recipe starts from pretrained weights of {part.name}, but {loaded.line}")
    return Start(loaded.model), loaded.line


def _file_and_options(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Return the file of the weights, and the options of the model without it: timm's users give it as an overlay.

    Raises:
        Refusal: a file is given in both ways, or is given and would not be used.
    """
    part, options = recipe.model, dict(recipe.model.options)
    overlay = dict(options.pop("pretrained_cfg_overlay", {}))
    file = overlay.pop("file", "")
    overlay.pop("num_classes", None) if file else None  # of the file, which is read from it
    if file and (part.weights or not part.pretrained):
        other = f"model.weights={part.weights} too" if part.weights else "model.pretrained=false, so it would not be used"
        raise Refusal(f"model.options.pretrained_cfg_overlay gives the file {file}, and the recipe sets {other}; leave one out")
    return part.weights or file, options | ({"pretrained_cfg_overlay": overlay} if overlay else {})


def _reduced(model: nn.Module, recipe: Recipe) -> nn.Module:
    method = recipe.method
    torch.manual_seed(recipe.seed)
    if method.schedule:
        return reduce_(model, method.name, schedule=method.schedule, **tuples(method.options))
    at = list(method.at) or None
    return reduce_(model, method.name, keep=method.keep, at=at, **tuples(method.options))


def _checkpoint_gradients(model: nn.Module, recipe: Recipe) -> None:
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise Refusal(f"optimization.grad_checkpointing: {recipe.model.name} has no gradient checkpointing; set it to false")
    switch(True)
