"""A row of ``eval`` and of ``sweep``: a variant, its cost and its accuracy."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laconic.analysis.accuracy import Answers
from laconic.analysis.evaluate import answers, config_for
from laconic.analysis.per_image_cost import Observer, observing
from laconic.analysis.timing import DTYPES, Setting
from laconic.cli.eval_input import Reading
from laconic.cli.output import NONE, Table, csv_text
from laconic.cli.variants import Kind, Variant, as_observed, label_of, size_of
from laconic.core.token_reduction import find_reduction
from laconic.data import ImageSet
from laconic.report.chart import Chart, Point

HEADER = ("", "top-1 %", "(95 %)", "change", "top-5 %", "agrees %", "KL", "GMACs", "patch tokens")


@dataclass(frozen=True)
class Score:
    """A variant and its accuracy, in shares; ``options`` are the method's. Speed, if measured, is the ratio to the
    unreduced model's time, its quartiles, and images a second.
    """

    name: str
    kind: Kind
    keep: float | None
    options: dict[str, Any]
    image: tuple[int, int]
    tokens: tuple[int, ...]
    parameters: int
    macs: int | None  # None where they are not known, of an exported file
    crop: float
    interpolation: str
    images: int
    unreadable: int
    top1: float
    top5: float
    interval: tuple[float, float]
    loss: float | None
    agreement: float | None
    divergence: float | None
    not_finite: int
    ratio: tuple[float, float, float] | None = None  # lower quartile, median, upper quartile
    images_per_second: float | None = None
    speed_batch: int | None = None  # images in a batch where speed was measured
    run: int = 0  # the run of a sweep that found it

    @property
    def label(self) -> str:
        """The variant's label."""
        return label_of(self.name, self.keep)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> Score:
        """Return the score that `to_json` wrote."""
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return cls(**given)


def options_of(variant: Variant) -> dict[str, Any]:
    """Return the options of a variant's method as plain JSON; empty without a method."""
    reduction = find_reduction(variant.model)
    found: dict[str, Any] = {} if reduction is None else reduction.config.describe()["options"]
    return dict(json.loads(json.dumps(found)))


def score(
    variant: Variant, images: ImageSet, reading: Reading, setting: Setting, reference: Answers | None = None
) -> tuple[Score, Answers]:
    """Evaluate a variant; return its row and its answers (without a reference they keep logits, to be one)."""
    model = variant.model.to(setting.place, DTYPES[setting.dtype])
    how: dict[str, Any] = {"batch_size": reading.batch_size, "workers": reading.workers, "crop": reading.crop}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with _observing(model) as seen:
            said = answers(model, images, reference=reference, keep_logits=reference is None, title=variant.label, **how)
    if seen is not None:
        variant = as_observed(variant, seen.result)
    found, config = said.accuracy, config_for(model, reading.crop)
    facts = (variant.image, variant.tokens, variant.parameters, variant.macs, config["crop_pct"], config["interpolation"])
    loss, divergence = (x if x is not None and math.isfinite(x) else None for x in (found.loss, found.divergence))
    shares = (found.images, len(found.unreadable), found.top1, found.top5, found.interval, loss)
    compared = (found.agreement, divergence, found.not_finite)
    return Score(variant.name, variant.kind, variant.keep, options_of(variant), *facts, *shares, *compared), said


def _observing(model: nn.Module) -> AbstractContextManager[Observer | None]:
    """Observe the tokens of each image, for methods with a count for each image."""
    reduction = find_reduction(model)
    return nullcontext() if reduction is None or reduction.execution is None else observing(model)


def table(rows: Sequence[Score], title: str) -> Table:
    """Return the table of rows; changes are in points of per cent, to the first row."""
    speed = any(row.ratio for row in rows)

    def cells(row: Score) -> tuple[str, ...]:
        spread = "-".join(f"{share * 100:.1f}" for share in row.interval)
        change = "" if row is rows[0] else f"{(row.top1 - rows[0].top1) * 100:+.2f}"
        agrees = "" if row.agreement is None else f"{row.agreement * 100:.2f}"
        divergence = "" if row.divergence is None else f"{row.divergence:.4f}"
        right = (f"{row.top1 * 100:.2f}", f"({spread})", change, f"{row.top5 * 100:.2f}", agrees, divergence)
        cost = (NONE if row.macs is None else f"{row.macs / 1e9:.3f}", " ".join(map(str, row.tokens)))
        return (row.label, *right, *cost, *([f"{row.ratio[1]:.2f}x" if row.ratio else ""] if speed else []))

    header = (*HEADER, *(["measured"] if speed else []))
    return Table(title, header, tuple(map(cells, rows)), below=("patch tokens",), optional=("top-5 %", "KL", "agrees %"))


def chart(rows: Sequence[Score]) -> Chart | None:
    """Return accuracy against measured speed or, where that was not measured, multiply-adds; None for fewer than three rows."""
    speed = any(row.ratio for row in rows)
    points = list[Point]()
    for row in rows:
        x = (row.ratio[1] if row.ratio else None) if speed else (row.macs / 1e9 if row.macs else None)
        if x is not None:
            series = "smaller input" if row.kind == "resolution" else row.name
            shares = (row.top1 * 100, row.interval[0] * 100, row.interval[1] * 100)
            low, high = (row.ratio[0], row.ratio[2]) if speed and row.ratio else (None, None)
            points.append(Point(row.label, series, x, *shares, low, high, row.kind != "method"))
    if len(points) < 3:
        return None
    words = "measured speed (x the unreduced model)" if speed else "multiply-adds of one image (G)"
    return Chart(f"Top-1 (95 % interval) against {words}", words, "top-1 (%)", tuple(points))


def to_csv(model: str, rows: Sequence[Score]) -> str:
    """Return CSV with the columns of timm's result files (accuracy in per cent), and after them our own."""
    return csv_text([_line(model, row) for row in rows])


def _line(model: str, row: Score) -> dict[str, Any]:
    ratio = row.ratio or ("", "", "")
    return {
        "model": row.name if row.kind == "smaller" else model,
        "img_size": size_of(row.image),
        "top1": round(row.top1 * 100, 3),
        "top1_err": round(100 - row.top1 * 100, 3),
        "top5": round(row.top5 * 100, 3),
        "top5_err": round(100 - row.top5 * 100, 3),
        "param_count": round(row.parameters / 1e6, 2),
        "crop_pct": row.crop,
        "interpolation": row.interpolation,
        "infer_gmacs": None if row.macs is None else round(row.macs / 1e9, 3),
        "infer_samples_per_sec": row.images_per_second and round(row.images_per_second, 2),
        "infer_batch_size": row.speed_batch,
        "variant": row.name,
        "kind": row.kind,
        "keep": row.keep,
        "options": " ".join(f"{name}={value}" for name, value in row.options.items()),
        "patch_tokens": " ".join(map(str, row.tokens)),
        "images": row.images,
        "unreadable": row.unreadable,
        "top1_low": round(row.interval[0] * 100, 3),
        "top1_high": round(row.interval[1] * 100, 3),
        "loss": row.loss,
        "agreement": row.agreement,
        "divergence": row.divergence,
        "ratio_q25": ratio[0],
        "ratio": ratio[1],
        "ratio_q75": ratio[2],
    }
