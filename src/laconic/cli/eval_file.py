"""``laconic eval`` of an exported file: its accuracy in its runtime, with the preprocessing and the classes it carries."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.analysis.evaluate import Answers, answers, loader_of
from laconic.cli.eval_input import GENERATED, Reading
from laconic.cli.scores import Score
from laconic.core.files import Refusal
from laconic.core.schedule import Schedule
from laconic.data import ImageSet, Prepared, find_data, open_images
from laconic.data.classes import by_names, order_notes
from laconic.exporting import RUNTIMES, ExportedFile, open_exported
from laconic.exporting.reading import KINDS, FileModel


@dataclass(frozen=True)
class Evaluated:
    """The row of an exported file, its answers for the images, a line on its weights, and notes."""

    row: Score
    images: ImageSet
    answers: Answers
    weights: str
    runtime: str
    precision: str
    notes: tuple[str, ...]


def is_exported(model: str) -> bool:
    """Return True if the text names an exported file, by its suffix; it may be missing."""
    return Path(model).suffix.lower() in KINDS


def evaluate_file(model: str, data: str, reading: Reading, refused: dict[str, Any]) -> Evaluated:
    """Evaluate an exported file on the CPU.

    Args:
        model: path of the file.
        data: as for `laconic.cli.eval.eval_`.
        reading: images to read.
        refused: options that an exported file cannot have, with their values; all must be empty.

    Raises:
        Refusal: there is no such file, or one of these options is given.
        ValueError, FileNotFoundError, ImportError: as `open_exported`, `laconic.data.open_images` and
            `laconic.data.classes.by_names`.
    """
    from timm.data import create_transform  # type: ignore[attr-defined]

    given = [f"--{name.replace('_', '-')}" for name, value in refused.items() if value]
    if given:
        raise Refusal(
            f"{model} is an exported file, with its weights and its method fixed, and runs on the CPU in the precision it was "
            f"exported in; leave out {', '.join(given)}, or evaluate the model that it was exported from"
        )
    if not Path(model).is_file():
        raise Refusal(f"{model}: there is no such file; give the path of a file that laconic export wrote")
    file = open_exported(Path(model))
    config, notes = _preprocessing(file, reading.crop)
    name, root = find_data(data)
    size = {"size": file.image[1]} if name in GENERATED else {}  # as large as the model takes them
    images = open_images(name, reading.split, root, reading.limit, labelling=reading, **size)
    images, named = by_names(images, file.classes or (), model, reading)
    outputs = _outputs(file)
    if not named and outputs != len(images.classes):
        notes.append(
            f"the file has {outputs} outputs without names and the data has {len(images.classes)} classes: labels are numbers "
            "from 0 in the order of the data's class names, and unless these are the model's first ones, the accuracies mean "
            "nothing"
        )
    elif not named and images.source and not file.random:  # folders and tars; other data has an order of its own
        notes += order_notes(images)
    prepared = Prepared(images, create_transform(**config, is_training=False), replace=False)
    loader = loader_of(prepared, file.image, reading.batch_size, reading.workers)
    said = answers(FileModel(file), loader, title=Path(model).name)
    weights = file.facts.get("weights") or "the file does not say where its weights come from"
    row = _row(file, said.accuracy, config)
    return Evaluated(row, images, said, weights, RUNTIMES[file.to], file.facts.get("precision", "float32"), tuple(notes))


def _preprocessing(file: ExportedFile, crop: float | None) -> tuple[dict[str, Any], list[str]]:
    """Return the data config of timm for the images of a file, and a note if the file has none."""
    from timm.data import resolve_data_config  # type: ignore[attr-defined]

    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop must be a share above 0 and at most 1, not {crop}")
    known = file.preprocessing
    defaults: dict[str, Any] = resolve_data_config({"input_size": file.image})  # type: ignore[no-untyped-call]
    config = defaults if known is None else known
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    if crop is not None:
        config["crop_pct"] = crop
    note = (
        "the file does not say how images are prepared; timm's defaults were used "
        f"(mean {config['mean']}, std {config['std']}, crop {config['crop_pct']}, {config['interpolation']})"
    )
    return config, [note] if known is None else []


def _outputs(file: ExportedFile) -> int:
    out = FileModel(file)(torch.zeros(1, *file.image))
    if out.dim() != 2:
        raise ValueError(
            f"expected logits [images, classes] from {file.path}, got {list(out.shape)}; export a model with a classifier"
        )
    return int(out.shape[1])


def _row(file: ExportedFile, found: Any, config: dict[str, Any]) -> Score:
    facts, method = file.facts, json.loads(file.facts.get("method", '"none"') if "schedule" in file.facts else "{}")
    tokens = tuple[int, ...]()
    if "schedule" in facts and "patches" in facts:
        counts = json.loads(facts["patch_tokens"])
        tokens = (int(facts["patches"]), *(counts[block] for block in Schedule.of(json.loads(facts["schedule"])).at))
    cost = (int(facts.get("parameters", 0)), int(facts["macs"]) if "macs" in facts else None)
    shares = (found.images, len(found.unreadable), found.top1, found.top5, found.interval)
    loss = found.loss if math.isfinite(found.loss) else None
    how = (file.image[1:], tokens, *cost, config["crop_pct"], config["interpolation"])
    kind = "method" if method else "base"
    name = file.path.name
    return Score(name, kind, None, method.get("options", {}), *how, *shares, loss, None, None, found.not_finite)  # type: ignore[arg-type]
