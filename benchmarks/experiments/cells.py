"""One cell of an experiment: a model reduced in one way, fine-tuned for a number of steps, and tested."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from benchmarks.experiments.least_attended import split_once
from benchmarks.experiments.views import look
from laconic.analysis.evaluate import answers
from laconic.analysis.macs import summary
from laconic.api import reduce_
from laconic.cli.models import lower_resolution
from laconic.cli.variants import mean_tokens
from laconic.cli.weights import load
from laconic.core.files import Refusal
from laconic.core.method import METHODS
from laconic.core.schedule import Schedule
from laconic.core.token_reduction import find_reduction
from laconic.data import ImageSet, open_images
from laconic.data.generated import Scenes
from laconic.models.scenes import FOLDER, load_scorer
from laconic.training.input_pipeline import train_transform
from laconic.training.loop import Loop
from laconic.training.recipe import Recipe
from laconic.training.run_config import Run, Running

BASE, SMALLER = "scenes_vit_small", "scenes_vit_tiny"
BATCH = 32
TESTED = 2000  # images of the test split
KEEP_COUNTS = {2: 50, 4: 25, 6: 12}  # patch tokens of 100 that blocks keep when methods are compared at equal counts
POLICIES = ("etps", "evit", "dtps", "dynamicvit")  # methods that are also tested with random scores
FINE_TUNING = (  # the same for all: scorers learn ten times as fast as the backbone
    f"optimization.batch_size={BATCH}",
    "optimization.lr=2e-3",
    "optimization.backbone_lr_scale=0.1",
    "optimization.warmup_epochs=0.1",
    "optimization.clip_grad=1.0",
    "data.val=''",
)


@dataclass(frozen=True)
class Cell:
    """The settings of one run. ``method`` is a name of `laconic.methods`, or one in `SPECIAL`.

    ``steps``: fine-tuning steps with batches of 32 (0: none). ``seed``: order of the images and all random draws. ``budget``:
    "keep", a keep rate as the method's paper counts it, or "leaving", the counts of `KEEP_COUNTS` (adaptive methods then choose
    their own counts).
    """

    method: str
    keep: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    steps: int = 0
    seed: int = 0
    data: str = "scenes"
    budget: Literal["keep", "leaving"] = "keep"

    @property
    def key(self) -> str:
        """A unique name of the cell."""
        options = ",".join(f"{name}={value}" for name, value in self.options)
        kept = f"keep {self.keep:g}" if self.budget == "keep" else "leaving"
        return f"{self.method}[{options}] {kept}, {self.steps} steps, seed {self.seed}, {self.data}"


SPECIAL = {
    "unreduced": "the base model",
    "smaller": "the next smaller model, trained like the base model",
    "resolution": "the base model on smaller images, with as many tokens as random pruning has on average",
    "half-at-random": "half of the tokens dropped at random after the first block",
    "object-alone": "the base model on images whose background is grey",
    "attended-once": "the most attended tokens, cut once in the second quarter",
    "others-once": "the tokens that attended-once drops, instead of those it keeps",
}


def fingerprint() -> str:
    """Return a hash of the weights of the base model and of the scorers; results are valid for these weights only."""
    files = [FOLDER / f"{BASE}{scorer}.safetensors" for scorer in ("", ".dtps", ".dynamicvit")]
    for file in files:
        if not file.is_file():
            raise Refusal(f"{file} does not exist; it is part of the repository and was made by laconic train (see recipes/)")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def run(cell: Cell) -> dict[str, Any]:
    """Fine-tune and test one cell; return the result as plain JSON, with the outcome of every image."""
    start = time.monotonic()
    model = _model(cell)
    if cell.steps:
        _fine_tune(model, cell)
    images = _tested(cell.data, cell.method == "object-alone")
    reference = _base_answers() if cell.data == "scenes" else None
    tested = answers(model, images, batch_size=250, reference=reference)
    accuracy = tested.accuracy
    cost = summary(model)
    result: dict[str, Any] = {
        **dataclasses.asdict(cell),
        "options": dict(cell.options),
        "weights": fingerprint(),
        "macs": cost.macs,
        "parameters": cost.parameters,
        "tokens": list(cost.tokens),
        "top1": accuracy.top1,
        "agreement": accuracy.agreement,
        "correct": _packed(tested.correct),
    }
    if find_reduction(model) is not None and cell.data == "scenes":
        result |= look(model, images)
    if cell.method in POLICIES and cell.data == "scenes" and not cell.options and cell.steps and cell.keep in (0.7, 0.5):
        result["random_policy"] = [_by_chance(model, cell, draw) for draw in range(3)]
    result["seconds"] = round(time.monotonic() - start, 1)
    plain: dict[str, Any] = json.loads(json.dumps(result))
    return plain


# ------------------------------------------------------------------------------------------------ the model
@lru_cache(maxsize=2)
def _pretrained(name: str) -> nn.Module:
    loaded = load(name)
    if loaded.random:
        raise Refusal(f"there are no weights of {name}: {loaded.line}")
    return loaded.model


def _model(cell: Cell) -> nn.Module:
    torch.manual_seed(cell.seed)
    model = copy.deepcopy(_pretrained(SMALLER if cell.method == "smaller" else BASE))
    if cell.data == "digits":
        model.reset_classifier(10)  # type: ignore[operator]
    if cell.method in ("unreduced", "smaller", "object-alone"):
        return model
    if cell.method == "half-at-random":
        return reduce_(model, "random", schedule=Schedule.keep_counts({1: 50}))
    if cell.method == "resolution":
        small = lower_resolution(model, mean_tokens(model, cell.keep))
        assert small is not None
        return copy.deepcopy(small)
    if cell.method in ("attended-once", "others-once"):
        return split_once(model, cell.keep, others=cell.method == "others-once")
    reduced = reduce_(model, cell.method, **_budget(cell), **dict(cell.options))
    if METHODS[cell.method].learns and not load_scorer(reduced, BASE) and cell.method in POLICIES:
        raise Refusal(f"there is no trained scorer of {cell.method}; train it: laconic train --recipe scenes_{cell.method}")
    return reduced


def _budget(cell: Cell) -> dict[str, Any]:
    """Return the arguments of `reduce_` for the budget of a cell."""
    if cell.budget == "keep":
        return {"keep": cell.keep}
    if METHODS[cell.method].count == "variable":
        return {}
    halved = {6: 13} if METHODS[cell.method].config.removes_at_most_half else {}
    return {"schedule": Schedule.keep_counts(KEEP_COUNTS | halved)}


def _fine_tune(model: nn.Module, cell: Cell) -> None:
    """Fine-tune a model in place."""
    images = _trained_on(cell)
    epochs = max(1, cell.steps // (len(images) // BATCH))
    settings = (*FINE_TUNING, f"optimization.epochs={epochs}")
    recipe = dataclasses.replace(Recipe().replaced(settings), seed=cell.seed)
    with tempfile.TemporaryDirectory() as folder:
        transform = train_transform(model, recipe.augmentation)
        running = Running(device="cpu")
        Loop(Run(recipe, model, None, images, None, transform, Path(folder), running), resume=False).go()
    model.eval()


def _by_chance(model: nn.Module, cell: Cell, draw: int) -> float:
    """Return the top-1 of the trained weights if tokens are scored at random."""
    other = reduce_(copy.deepcopy(_pretrained(BASE)), cell.method, keep=cell.keep, policy="random", seed=draw)
    other.load_state_dict(model.state_dict())
    return answers(other, _tested(), batch_size=250).accuracy.top1


# ------------------------------------------------------------------------------------------------ the test
class ObjectAlone(Scenes):
    """Scenes with a grey background."""

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        scene = self.scene(i)
        return Image.fromarray(np.where(scene.mask[..., None], scene.picture, np.uint8(128))), scene.label


@lru_cache(maxsize=3)
def _tested(data: str = "scenes", alone: bool = False) -> ImageSet:
    if alone:
        return ObjectAlone("test", TESTED)
    return open_images(data, "test", limit=TESTED if data == "scenes" else 248)


def _trained_on(cell: Cell) -> ImageSet:
    return open_images(cell.data, "train", limit=cell.steps * BATCH if cell.data == "scenes" else 0)


@lru_cache(maxsize=1)
def _base_answers() -> Any:
    return answers(_pretrained(BASE), _tested(), batch_size=250, keep_logits=True)


def _packed(correct: torch.Tensor) -> str:
    """Encode booleans as hexadecimal digits, four per digit."""
    if len(correct) % 4:
        raise ValueError(
            f"the number of images must be a multiple of 4, not {len(correct)}: results are stored as hexadecimal digits"
        )
    bits = "".join("1" if value else "0" for value in correct.tolist())
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def unpacked(digits: str) -> list[int]:
    """Decode the result of `_packed`: 0 or 1 for every image."""
    return [int(bit) for bit in f"{int(digits, 16):0{4 * len(digits)}b}"]
