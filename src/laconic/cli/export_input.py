"""Input of an export: the model with weights, the variants with their trained scorers, and pictures to compare on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from laconic.analysis.diagnose import shared_copy
from laconic.analysis.evaluate import make_loader
from laconic.api import restore_
from laconic.cli.eval_input import parse_args
from laconic.cli.models import open_model
from laconic.cli.variants import Variant, as_reduced, pairs, parse_methods, reduced, unreduced
from laconic.cli.weights import Loaded, load, load_with_args
from laconic.core.files import Refusal
from laconic.core.method import METHODS
from laconic.core.token_reduction import find_reduction
from laconic.data import find_data, open_images
from laconic.exporting.description import RANDOM
from laconic.models.scenes import load_scorer

UNTRAINED = f"its method has parameters of its own, which are {RANDOM} (untrained)"


@dataclass(frozen=True)
class ExportInput:
    """The variants to export, by the name of their model, and a line on its weights."""

    variants: tuple[Variant, ...]
    weights: str
    random: bool
    untrained: tuple[str, ...]  # labels of the variants with random parameters of their method

    def weights_of(self, variant: Variant) -> str:
        """Return the line on the weights of a variant, for the metadata of its file."""
        return f"{self.weights}; {UNTRAINED}" if variant.label in self.untrained else self.weights

    @property
    def says(self) -> list[str]:
        """Return sentences on the weights."""
        line = f"{self.weights[0].upper()}{self.weights[1:]}."
        return [line, *(f"{label}: {UNTRAINED}." for label in self.untrained)]


def open_weights(name: str, weights: Path | None, model_args: Sequence[str]) -> Loaded:
    """Open a model by timm name as `laconic eval` does, or from a directory, with a line on its weights.

    Raises:
        Refusal: no such model, weights that are not its own, or weights or arguments where a directory was given.
    """
    if Path(name).is_dir():
        if weights is not None or model_args:
            raise Refusal(f"{name} is a directory with weights and arguments of its own; leave out --weights and --model-args")
        return Loaded(open_model(name), f"the weights come from {name}", False)
    args = parse_args(model_args)
    return load_with_args(name, args) if weights is None else load(name, weights, **args)


def open_export_input(
    name: str,
    weights: Path | None,
    model_args: Sequence[str],
    methods: Sequence[str],
    keeps: Sequence[float],
    options: Sequence[str],
) -> ExportInput:
    """Open the unreduced model, then the one that a directory holds or every method at every keep rate.

    Raises:
        Refusal: as `open_weights`, or an option that no method has.
    """
    loaded = open_weights(name, weights, model_args)
    model, untrained = loaded.model, list[str]()
    saved = find_reduction(model)
    base = model if saved is None else restore_(shared_copy(model))
    variants = [unreduced("unreduced", base)]
    if saved is not None:
        variants.append(as_reduced(saved.config.info.name, model, None))
    for config, keep in pairs(
        parse_methods(list(dict.fromkeys(methods or (("etps",) if saved is None else ()))), options), keeps
    ):
        variant = reduced(base, config, keep)
        variants.append(variant)
        trained = weights is None and not loaded.random and not Path(name).is_dir() and load_scorer(variant.model, name)
        if METHODS[config.info.name].learns and not trained:
            untrained.append(variant.label)
    return ExportInput(tuple(variants), loaded.line, loaded.random, tuple(untrained))


def read_pictures(model: nn.Module, data: str, split: str, limit: int) -> tuple[Tensor, str]:
    """Return at most ``limit`` pictures, evenly spaced, as the model takes them, and a line that says which.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `laconic.data.open_images`; ValueError: none could be read.
    """
    name, root = find_data(data)
    height = int(unreduced("", model).image[0])
    images = open_images(name, split, root, limit, height)
    batches = [pixels[failed < 0] for pixels, _, _, failed in make_loader(model, images)]
    pixels = torch.cat(batches)
    if not len(pixels):
        raise ValueError(f"none of the {len(images)} pictures of {data} could be read")
    unread = f", {len(images) - len(pixels)} more could not be read" if len(pixels) < len(images) else ""
    return pixels, f"{len(pixels)} pictures of {data}, {split}{unread}"
