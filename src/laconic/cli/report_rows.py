"""The rows of a report: the unreduced model, methods and trivial alternatives, their scores, measured times and answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from laconic.analysis.equal_time import Interval, bootstrap, over_smaller_input
from laconic.analysis.provenance import provenance
from laconic.analysis.timing import DTYPES, Setting
from laconic.cli import compare, draw
from laconic.cli.compare import Row
from laconic.cli.eval import reduced_of, saved_variant
from laconic.cli.eval_input import EvalInput
from laconic.cli.variants import ALWAYS, Variant, pairs, parse_methods, reduced, unreduced
from laconic.core.method import resolve
from laconic.core.token_reduction import find_reduction
from laconic.data.classes import names_of
from laconic.planning.candidates import Sizes
from laconic.planning.measures import Kind, Measure, nearest_other

Values = NDArray[np.float64]
LARGEST = 24  # changes of answers that a row keeps


@dataclass(frozen=True)
class Answer:
    """An answer to a picture: a class and its probability; without a head (then ``share`` is None) the nearest picture's."""

    name: str
    share: float | None

    def __str__(self) -> str:
        return self.name if self.share is None else f"{self.name} ({self.share:.0%})"


@dataclass(frozen=True)
class Change:
    """The change of the answer to picture number ``picture``: 0 for none, 1 for class probabilities with nothing in common."""

    picture: int
    change: float
    before: Answer
    after: Answer


@dataclass(frozen=True)
class Found:
    """A row: cost and time, the mean score, the difference to a smaller input of equal time, and the changes of answers.

    ``changes`` has the largest ones, of methods only; ``changed`` is the share of pictures with another answer.
    """

    row: Row
    score: Interval
    values: Values  # of every picture
    over: Interval | None
    schedule: dict[str, Any] | None
    changed: float | None = None
    changes: tuple[Change, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return all but the values of single pictures as plain JSON."""
        own = {"label": self.row.label, "score": vars(self.score), "over": None if self.over is None else vars(self.over)}
        worst = [{**vars(c), "before": vars(c.before), "after": vars(c.after)} for c in self.changes]
        return {**self.row.to_json(), **own, "schedule": self.schedule, "changed": self.changed, "changes": worst}


@dataclass(frozen=True)
class Verdict:
    """The method that was best over a smaller input of equal time on every other picture, and its difference on the rest.

    ``over`` is None if no smaller input takes as long as any method. ``plain`` is the best of random pruning and average
    pooling, chosen and judged in the same way, with its difference.
    """

    best: Found
    over: Interval | None
    plain: tuple[Found, Interval] | None
    chosen_on: int
    judged_on: int

    def sentence(self, measure: str) -> str:
        """Return the verdict in a sentence."""
        fast = f"{self.best.row.label} is {self.best.row.wall.median:.2f}x as fast as the unreduced model"
        if self.over is None:
            return f"{fast}; no smaller input takes as long, so there is no comparison with one."
        words = "ahead of" if self.over.low > 0 else "behind" if self.over.high < 0 else "not distinguishable from"
        return f"{fast}, and {words} a smaller input of equal measured time: {_shift(self.over)} in {measure}."

    @property
    def halves(self) -> str:
        """The pictures that chose and judged, and the best alternative that has no idea of its own, in words."""
        said = f"The method was chosen on {self.chosen_on} pictures and judged on {self.judged_on} others."
        if self.plain is None:
            return said
        row, shift = self.plain[0].row, self.plain[1]
        return f"{said} The best of random pruning and average pooling, {row.label} at {row.wall.median:.2f}x: {_shift(shift)}."


def _shift(over: Interval) -> str:
    return f"{over.mean:+.3f} ({over.low:+.3f} to {over.high:+.3f}, 95 %)"


def collect(
    eval_input: EvalInput, methods: Sequence[str], keeps: Sequence[float], options: Sequence[str]
) -> tuple[list[Variant], list[str]]:
    """Return the unreduced model, the one that a directory holds, methods, and the alternatives; and notes."""
    base, notes = eval_input.base, list[str]()
    rows = [unreduced("unreduced", base), *saved_variant(eval_input)]
    configs = parse_methods([name for name in dict.fromkeys(methods) if name not in ALWAYS], options)
    rows += [reduced_of(eval_input, config, keep) for config, keep in pairs(configs, keeps)]
    for name in ALWAYS:
        for keep in dict.fromkeys(keeps):
            try:
                rows.append(reduced(base, resolve(name, {}), keep, "plain"))
            except (ValueError, LookupError) as error:
                notes.append(f"no {name} row: {error}")
    sizes = Sizes(base)
    for height, width in sizes.smaller():
        rows.append(unreduced(f"input {height}x{width}", sizes.at((height, width)), "resolution"))
    if rows[-1].kind != "resolution":
        notes.append("no smaller inputs: the input size of this model cannot be changed")
    return rows, list(dict.fromkeys(notes))


def measure(
    variants: Sequence[Variant], images: Tensor, labels: Tensor, kind: Kind, names: Sequence[str], batch: int, setting: Setting
) -> tuple[list[Found], list[str]]:
    """Score all variants on all pictures and time them; return the rows, and notes. ``names`` are those of the classes."""
    base = variants[0].model.to(setting.place, DTYPES[setting.dtype])
    judge = Measure(base, images, labels, kind)
    answers = judge if kind == "same-answer" else Measure(base, images, labels, "same-answer")
    seen = Answers(answers.references(), answers.has_head, [names[label] for label in labels.tolist()], names)
    scores, changes = list[Values](), list[tuple[float | None, tuple[Change, ...]]]()
    for variant in tqdm(variants, desc="scoring", unit="row", leave=False, disable=None):
        model, sides = variant.model.to(setting.place, DTYPES[setting.dtype]), variant.image
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = judge.outputs(model, sides)
        scores.append(judge.score(out).numpy().astype(np.float64))
        said = None if variant.kind != "method" else out if kind in ("same-answer", "labels") else answers.outputs(model, sides)
        changes.append((None, ()) if said is None else seen.changes(said))
    rows = compare.compare(variants, batch, setting)
    took = [1.0 if row.kind == "base" else 1 / row.wall.median for row in rows]
    plain = [(time, own) for row, time, own in zip(rows, took, scores, strict=True) if row.kind in ("base", "resolution")]
    found = list[Found]()
    for variant, row, time, own, (changed, worst) in zip(variants, rows, took, scores, changes, strict=True):
        over = None if row.kind in ("base", "resolution") else over_smaller_input(own, plain, time)
        reduction = find_reduction(variant.model)
        schedule = None if reduction is None else reduction.schedule.to_json()
        found.append(Found(row, bootstrap(own), own, over, schedule, changed, worst))
    return found, compare.busy(rows)


def judged(found: Sequence[Found]) -> Verdict:
    """Choose the best method on every other picture, and judge it on the rest."""
    plain = [(_took(one), one.values) for one in found if one.row.kind in ("base", "resolution")]
    choosing, judging = slice(0, None, 2), slice(1, None, 2)

    def over(one: Found, part: slice) -> Interval | None:
        return over_smaller_input(one.values[part], [(time, values[part]) for time, values in plain], _took(one))

    def best_of(kind: str) -> tuple[Found, Interval] | None:
        rows = [one for one in found if one.row.kind == kind]
        known = [(chosen.mean, number) for number, one in enumerate(rows) if (chosen := over(one, choosing)) is not None]
        best = rows[max(known)[1]] if known else None
        shift = None if best is None else over(best, judging)
        return None if best is None or shift is None else (best, shift)

    counts = len(plain[0][1][choosing]), len(plain[0][1][judging])
    method = best_of("method")
    if method is None:
        rows = [one for one in found if one.row.kind == "method"]
        return Verdict(max(rows, key=lambda one: one.score.mean), None, None, *counts)
    return Verdict(*method, best_of("plain"), *counts)


def _took(one: Found) -> float:
    return 1.0 if one.row.kind == "base" else 1 / one.row.wall.median


@dataclass(frozen=True)
class Answers:
    """The unreduced model's answers: logits or features [N, C], the label of every picture in words, names of the outputs."""

    base: Tensor
    has_head: bool
    labels: Sequence[str]
    names: Sequence[str]

    def changes(self, out: Tensor) -> tuple[float, tuple[Change, ...]]:
        """Return the share of pictures with another answer, and the largest changes, in falling order."""
        before: Tensor | None = None
        after: Tensor | None = None
        if self.has_head:
            before, after = self.base.softmax(1), out.softmax(1)
            change, one, two = (before - after).abs().sum(1) / 2, before.argmax(1), after.argmax(1)
        else:
            change = 1 - torch.nn.functional.cosine_similarity(self.base, out, dim=1)
            one, two = nearest_other(self.base), nearest_other(out)
        order = change.argsort(descending=True, stable=True)[:LARGEST].tolist()
        every = tuple(
            Change(i, float(change[i]), self._answer(int(one[i]), i, before), self._answer(int(two[i]), i, after))
            for i in order
        )
        return float((one != two).double().mean()), every

    def _answer(self, number: int, picture: int, shares: Tensor | None) -> Answer:
        if shares is None:
            return Answer(f"as picture {number + 1}, {self.labels[number]}", None)
        name = self.names[number] if number < len(self.names) else f"class {number}"
        return Answer(name, float(shares[picture, number]))


def class_names(eval_input: EvalInput) -> Sequence[str]:
    """Return the names of a model's outputs, or of the data's classes."""
    return names_of(eval_input.base) or eval_input.images.classes


# ------------------------------------------------------------------------------------------------ token maps
def holders_of(variant: Variant, images: Tensor) -> list[list[draw.Map]]:
    """Return the token maps of pictures [N, channels, H, W], for each picture after each reducing block."""
    reference = next(variant.model.parameters())
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        variant.model(images.to(reference.device, reference.dtype))
    history = provenance(variant.model)
    return [draw.maps(history, number) for number in range(len(images))]


def spread(count: int, chosen: int) -> Iterator[int]:
    """Yield evenly spaced numbers, at most ``chosen`` of ``count``."""
    yield from dict.fromkeys(int(place) for place in np.linspace(0, count - 1, min(count, chosen)))
