"""`tune`: choose input size, method and schedule for a model, by the user's images and measure, at a target of cost.

Successive halving: all candidates are fitted to the target by their multiply-adds and scored on a few images; the better ones
are timed, fitted again by what was measured, and scored on more images; a few remain. Half of the images choose, the other
half judges: smaller inputs, random pruning and average pooling are judged with the best candidates, and each row is compared
with a smaller input that takes as long. Scores can be kept in a file, so that a run that was stopped goes on; times are always
measured again, because they are compared within one run. A repair (`repair_`) is tried on the chosen row, and on the smaller
input of nearly the same cost, in the same time.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.analysis.diagnose import shared_copy
from laconic.analysis.equal_time import bootstrap
from laconic.analysis.input_size import InputSize
from laconic.analysis.macs import estimate
from laconic.analysis.stopwatch import stopwatch
from laconic.analysis.timing import APART, Quartiles, interleave, ratios
from laconic.api import restore_
from laconic.core.backbone import find_host
from laconic.core.method import Method
from laconic.core.patching import apply_settings
from laconic.core.token_reduction import find_reduction
from laconic.planning.budget import Target
from laconic.planning.candidates import Candidate, Sizes, candidates, fitted
from laconic.planning.measures import Kind, Measure, Scored
from laconic.planning.progress import ticking
from laconic.planning.reduced_models import ReducedModels
from laconic.planning.refine import refined
from laconic.planning.repair import HOWS, How, Repaired, Until, passes, repair_by, scales_and_biases
from laconic.planning.scores import Scores, Values, halves_of
from laconic.planning.space import ScheduleSpace
from laconic.planning.time_limit import TimeLimit
from laconic.planning.trials import Trial, best_of, finalists, likeliest, named, refitted, row_of, space_of, worth_repair
from laconic.planning.tuned import Tuned, TunedRow

FEW, MORE = 16, 64  # images of the first rounds
ONE_BIT = 4  # times as many where an image is only right or wrong
TRIED, ENOUGH = 8, 24  # images that a candidate is at least tried on, and judged on: with less time, there are fewer candidates
KEPT, FINAL = 10, 4  # candidates that are timed, and that are judged
ROUNDS, FINAL_ROUNDS, LEAST_ROUNDS = 4, 10, 3  # of time measurements
SEARCHED, SEARCH = 40, 0.2  # schedules that are searched, and the share of the time left that they may take
MET = 0.97  # share of a target that counts as met, since times are measured
REPAIR: dict[How, float] = {"closed-form": 0.1, "distil": 0.5}  # share of the time that is reserved for repairs
INPUTS = 3  # smaller inputs around the target that are judged


def tune(
    model: nn.Module,
    images: Tensor,
    target: str,
    *,
    measure: Kind | Scored = "same-answer",
    labels: Tensor | None = None,
    methods: Sequence[str | Method] | None = None,
    minutes: float | None = None,
    batch_size: int = 8,
    record: str | Path | None = None,
    repair: How | None = None,
    repair_images: Tensor | None = None,
) -> Tuned:
    """Choose the input size, method and schedule that keep a measure best at a target of cost. The model is not changed.

    Every other image is used to choose; the remaining ones judge. Apply the result with `Tuned.apply`.

    Args:
        model: a supported vision transformer; a reduced model is tuned as if unreduced.
        images: [N, channels, height, width], preprocessed for the model; some hundreds are better than some dozens.
        target: "1.6x" as fast as unreduced or "12ms" for a forward of ``batch_size`` images, measured here; "2.3G"
            multiply-adds of one image, or "1.6x-macs" fewer.
        measure: ``same-answer``, ``dense``, ``labels`` or ``pairs`` (see `laconic.planning.measures.Measure`), or a callable
            that returns a score of every image, [B], for a model and images [B, channels, height, width].
        labels: [N], for ``labels`` and ``pairs``.
        methods: names or configs to choose from (default: nine that need no training).
        minutes: the time that may be spent: with less time, fewer images are used (default: as long as all images take).
        batch_size: images per forward where time is measured.
        record: a file for the scores, one JSON object a line. A run with the same model and images takes what it finds there,
            so a run that was stopped goes on.
        repair: ``closed-form`` or ``distil``: change scales and biases of the chosen row, see `laconic.repair_`. The images
            that choose are fitted.
        repair_images: [N, channels, height, width], further images for the repair; they need no labels. The more, the better.

    Raises:
        ValueError: the target cannot be parsed or met, or the images or labels do not fit the measure.
        TypeError, LookupError: as `laconic.reduce_`.
        OSError: the record cannot be read or written.
    """
    path = None if record is None else Path(record)
    asked = (measure, images, labels)
    return Tuner(model, Target.parse(target), asked, batch_size, minutes, path, repair, repair_images).run(methods)


class Tuner:
    """The state of one run of `tune`."""

    def __init__(
        self,
        model: nn.Module,
        target: Target,
        asked: tuple[Kind | Scored, Tensor, Tensor | None],
        batch_size: int,
        minutes: float | None,
        record: Path | None,
        repair: How | None,
        repair_images: Tensor | None = None,
    ) -> None:
        if repair is not None and repair not in HOWS:
            raise ValueError(f"repair must be one of {', '.join(HOWS)}, not {repair!r}")
        self.clock = TimeLimit(minutes, 0.0 if repair is None else 60 * (minutes or 0.0) * REPAIR[repair])
        self.repair, self.repair_images, self.batch_size, self.target = repair, repair_images, batch_size, target
        base = shared_copy(model).eval()
        if find_reduction(base) is not None:
            restore_(base)
        kind, images, labels = asked
        if len(images) < 4:
            raise ValueError(f"{len(images)} images are too few: half of them choose, the other half judges; give 4 or more")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"there are {len(images)} images and {len(labels)} labels; give a label of every image")
        halves = ((images[part], None if labels is None else labels[part]) for part in halves_of(len(images), labels, kind))
        self.searching, self.judging = (Measure(base, part, names, kind) for part, names in halves)
        self.scores = Scores.read(record, self.searching, images, labels)
        self.few, self.more = (n * (ONE_BIT if kind in ("labels", "pairs") else 1) for n in (FEW, MORE))
        self.kind, self.sizes, self.device = kind, Sizes(base), next(base.parameters()).device
        self.models = ReducedModels(self.sizes, "similar" if kind == "dense" else False)
        self.spaces = dict[tuple[Any, ...], ScheduleSpace | None]()
        self.notes = list[str]()
        self.refused = dict[str, list[Candidate]]()  # candidates by the reason for which the model refuses them
        self.whole = self._macs(None)
        self.base_seconds = self._seconds_of_base()
        self.clock.first_each = self.base_seconds / batch_size
        whole = {"time": self.base_seconds, "macs": float(self.whole)}.get(target.kind, 1.0)
        self.limit = target.limit(whole) / whole  # as a share of the unreduced model's cost
        if self.limit >= 1:
            raise ValueError(f"target {target.text}: the unreduced model meets it already; there is nothing to tune")

    # -------------------------------------------------------------------------------------------- the stages
    def run(self, methods: Sequence[str | Method] | None) -> Tuned:
        """Choose, judge, and return the result."""
        found = candidates(self.sizes, methods)
        if len(self.sizes.known) == 0 or not any(c.is_plain for c in found):
            self.notes.append("the model takes no other input size, so smaller inputs are not among the candidates")
        inputs = self._inputs([c for c in found if c.is_plain])
        tried = self._fitted([c for c in found if not c.is_plain])
        if not tried and not inputs:
            raise ValueError(f"target {self.target.text}: no method and no input size of this model meets it; ask for less")
        tried = self._likely(tried)
        tried = self._scored(tried, self.clock.affordable(len(tried), self.few, 0.25), "trying", 0.3)
        tried = finalists(tried, KEPT)
        if self.target.measured:
            tried = self._refitted(tried, ROUNDS)
        tried = self._scored(tried, self.clock.affordable(len(tried), self.more, 0.25), "trying the better ones", 0.3)
        tried += self._searched(tried)
        final = finalists(tried, FINAL)
        short = self.clock.affordable(2 * (len(final) + len(inputs)), ENOUGH, 0.7) < ENOUGH
        if short:  # fewer rows, judged on more images
            inputs = [t for t in inputs if t.cost > self.limit][-1:] + [t for t in inputs if t.cost <= self.limit]
            final = finalists(tried, 2)
        final = self._refitted(final, ROUNDS) if self.target.measured else final
        return self._judged([*final, *inputs])

    def _likely(self, trials: list[Trial]) -> list[Trial]:
        """Leave out the candidates least likely to be good, if the time is not enough to try each on some images."""
        number = max(KEPT, self.clock.affordable(TRIED, len(trials), 0.25))
        chosen = likeliest(trials, number)
        if len(chosen) < len(trials):
            self.notes.append(f"the time was enough to try {len(chosen)} of {len(trials)} candidates")
        return chosen

    def _searched(self, trials: Sequence[Trial]) -> list[Trial]:
        """Search the blocks and counts of the best candidate so far; return what is better."""
        best = best_of([t for t in trials if t.schedule is not None and not t.candidate.baseline], 1)
        space = self._space(best[0].candidate) if best else None
        count = self.clock.affordable(SEARCHED, self.more, SEARCH)
        if space is None or count < min(TRIED, len(self.searching.images)):
            return []  # the best of many on a few images is the luckiest one
        steps = SEARCHED if self.clock.left() is None else min(SEARCHED, self.clock.affordable(count, SEARCHED, SEARCH))

        def score(trial: Trial) -> float:
            return float(self._values(self.searching, trial, count).mean())

        found = refined(space, best[0], score, steps)
        return [] if found is None else [found]

    def _judged(self, trials: list[Trial]) -> Tuned:
        """Time all in one run, judge them on the held-out images, and choose by the searched ones."""
        self._timed(trials, self._affordable_rounds(len(trials)))
        trials, held, whole, count = self._held_out(trials)
        inputs = [(t.cost, held[id(t)]) for t in trials if t.candidate.is_plain] + [(1.0, whole)]
        best = max(trials, key=lambda t: t.score)
        if best.cost > self.limit / MET:
            self.notes.append("no row meets the target by the last measurement; the nearest in score was chosen")
        rows = [TunedRow("unreduced", None, None, None, self.whole, Quartiles(1.0, 1.0, 1.0), None, bootstrap(whole), None)]
        rows += [row_of(t, held[id(t)], inputs) for t in sorted(trials, key=lambda t: -held[id(t)].mean())]
        chosen, parameters = best.candidate.name, dict[str, Tensor]()
        worth, reached = [] if self.repair is None else worth_repair(best, trials, self.limit / MET), -math.inf
        for number, t in enumerate(worth):
            if (done := self._repaired(t, count, len(worth) - number)) is not None:
                found, values, fitted = done
                row = replace(row_of(t, values, inputs), name=f"{t.candidate.name}, repaired", search=None, repaired=found)
                rows.append(row)
                if row.score.mean > max(reached, held[id(best)].mean()) and (t is best or t.cost <= self.limit / MET):
                    chosen, parameters, reached = row.name, fitted, row.score.mean
        self.notes += [f"{named(group)}: left out, {reason}" for reason, group in self.refused.items()]
        counts = (min(count, len(self.searching.images)), min(count, len(self.judging.images)))
        return Tuned(self.target, self.judging.name, self.sizes.own, counts, tuple(rows), chosen, tuple(self.notes), parameters)

    def _held_out(self, trials: list[Trial]) -> tuple[list[Trial], dict[int, Values], Values, int]:
        """Score candidates on both halves: on images that choose only those that meet the target, if there are any.

        Returns:
            the candidates, their held-out scores by identity, those of the unreduced model, and the images of each half.
        """
        meeting = [t for t in trials if t.cost <= self.limit / MET] or trials
        missing = [replace(t, score=-math.inf) for t in trials if t not in meeting]
        runs = len(meeting) + len(trials) + math.ceil((2 if self.judging.compares else 1) / self.limit)  # and the unreduced
        count, enough = 0, max(len(self.searching.images), len(self.judging.images))
        # by then it is better known how long an image takes, and a second part uses the rest of the time
        for share in (0.6, 0.95) if self.judging.by_image else (0.95,):
            count = min(enough, count + self.clock.affordable(runs, enough - count, share))
            meeting = self._scored(meeting, count, "choosing")
            held = {id(t): self._values(self.judging, t, count) for t in (*meeting, *missing)}
            whole = self._values(self.judging, None, count)
            if count == enough or not self.clock.left():
                break
        if count < enough:
            self.notes.append(f"the time was enough for {count} of {enough} images of each half")
        return [*meeting, *missing], held, whole, count

    def _repaired(self, trial: Trial, count: int, repairs: int) -> tuple[Repaired, Values, dict[str, Tensor]] | None:
        """Repair a candidate, in the time left for as many; return what was done, held-out scores, and fitted parameters."""
        self.clock.reserved = 0.0
        assert self.repair is not None
        model, base = copy.deepcopy(self.models.of(trial)), self.sizes.model  # own weights
        more = [] if self.repair_images is None else [self.repair_images]
        images = torch.cat([self.searching.images, *more])
        left, forwards = self.clock.left(), self.clock.each * (2 * count + len(images))  # to judge, and for the targets
        minutes = None if left is None else max(0.1, left / repairs - forwards) / 60

        def judge() -> Values:
            return self.judging(model, trial.candidate.sides, count).numpy()

        try:
            until = Until(minutes, passes(len(images)))
            found, values = repair_by(judge, model, base, images, (self.repair, self.kind), until)
        except ValueError as error:  # closed-form needs a layer norm after the blocks
            self.notes.append(f"{trial.candidate.name} was not repaired: {error}")
            return None
        if not found.kept:
            self.notes.append(f"the repair of {trial.candidate.name} was undone: {found.gain.mean:+.4f} on held-out images")
            return None
        return found, values, {name: one.detach().clone() for name, one in scales_and_biases(model, base).items()}

    # -------------------------------------------------------------------------------------------- fitting
    def _fitted(self, found: Sequence[Candidate]) -> list[Trial]:
        """Fit candidates to the target by their multiply-adds; where a fourth of the time is over, the rest are left out."""
        tried, end = list[Trial](), self.clock.deadline(0.25)
        for number, candidate in enumerate(found):
            if time.monotonic() > end:
                self.notes.append(f"the time was enough to fit {number} of {len(found)} candidates")
                break
            if (trial := self._fit(candidate, self.limit)) is not None:
                tried.append(trial)
        return tried

    def _fit(self, candidate: Candidate, limit: float) -> Trial | None:
        """Return the candidate with the schedule whose multiply-adds are this share of the unreduced model's, at most."""
        assert candidate.config is not None
        space = self._space(candidate)
        schedule = None if space is None else fitted(space, candidate, limit * self.whole)
        if space is None or schedule is None:
            return None
        summary = space.summary(schedule)
        return None if summary is None else Trial(candidate, schedule, summary.macs, cost=summary.macs / self.whole)

    def _space(self, candidate: Candidate) -> ScheduleSpace | None:
        assert candidate.config is not None
        key, model = (candidate.sides, candidate.config, candidate.first), self.sizes.at(candidate.sides)
        if key not in self.spaces:
            try:
                self.spaces[key] = None if model is None else space_of(model, candidate)
            except (ValueError, LookupError, TypeError):
                self.spaces[key] = None
        return self.spaces[key]

    def _inputs(self, plain: Sequence[Candidate]) -> list[Trial]:
        """Return the smaller inputs around the target by multiply-adds."""
        found = [Trial(c, None, macs := self._macs(c), cost=macs / self.whole) for c in plain]
        below = [t for t in found if t.cost <= self.limit][: INPUTS - 1]
        return [*[t for t in found if t.cost > self.limit][-INPUTS:], *below]

    def _macs(self, candidate: Candidate | None) -> int:
        sides = None if candidate is None else candidate.sides
        model = self.sizes.at(sides)
        assert model is not None
        host, entry = find_host(model)
        size = InputSize.of(host, entry, None if sides is None else self._pixels(sides, 1))
        return int(estimate(host, example=size).macs)

    def _refitted(self, trials: list[Trial], rounds: int) -> list[Trial]:
        """Time the candidates, and fit those that miss the target again, in proportion to what they took."""
        self._timed(trials, rounds)

        def fit(trial: Trial) -> Trial | None:
            asked = self.limit * (trial.macs / self.whole) / trial.cost
            return self._fit(trial.candidate, min(asked, 0.999)) if abs(trial.cost / self.limit - 1) > 1 - MET else None

        left, slow = refitted(trials, [fit(trial) for trial in trials], self.limit)
        for trial in slow:
            self.refused.setdefault("much slower than the target with any schedule", []).append(trial.candidate)
        return left

    # -------------------------------------------------------------------------------------------- scores and times
    def _scored(self, trials: list[Trial], count: int, title: str, share: float = math.inf) -> list[Trial]:
        """Score candidates on images that choose; where a share of the time left is over, the rest are left out."""
        out, end = list[Trial](), self.clock.deadline(share)
        with ticking(len(trials), title, "candidate") as tick:
            for number, trial in enumerate(trials):
                if out and time.monotonic() > end:
                    self.notes.append(f"the time was enough for {number} of {len(trials)} candidates ({title})")
                    break
                try:
                    out.append(replace(trial, score=float(self._values(self.searching, trial, count).mean())))
                except (ValueError, LookupError) as error:  # the method refuses this model
                    self.refused.setdefault(str(error).partition(";")[0], []).append(trial.candidate)
                tick()
        return out

    def _values(self, measure: Measure, trial: Trial | None, count: int) -> Values:
        """Return the scores of the first ``count`` images of a half under a candidate (None: unreduced)."""
        half, count = "searching" if measure is self.searching else "judging", min(count, len(measure.images))
        described = None if trial is None else trial.described()
        known = self.scores.find(half, described, count)
        if len(known) == count:
            return known
        if measure.compares:
            outputs = measure.references(count)  # before the clock starts, since all candidates use them
            if trial is None:
                return measure.score(outputs).numpy()
        sides, model = (None, self.sizes.model) if trial is None else (trial.candidate.sides, self.models.of(trial))
        begin = time.monotonic()
        more = measure(model, sides, count, len(known)).numpy()
        self.clock.spend(time.monotonic() - begin, len(more))
        found = np.concatenate([known, more])
        self.scores.add(half, described, count, found)
        return found

    def _timed(self, trials: Sequence[Trial], rounds: int) -> None:
        """Time candidates in turn with the unreduced model; set their speed, and their cost if the target is a time."""
        watch = stopwatch(self.device)
        runs: dict[str, Any] = {"": self._run(self.sizes.model, None)}
        runs |= {str(n): self._run(self.models.of(trial), trial.candidate.sides) for n, trial in enumerate(trials)}
        with torch.inference_mode(), ticking(rounds, "timing", "round") as tick:
            interleave(runs, 1, watch.time)
            samples: Mapping[str, list[Any]] = {name: [] for name in runs}
            for _ in range(rounds):
                for name, new in interleave(runs, 1, watch.time).items():
                    samples[name].extend(new)
                tick()
        for n, trial in enumerate(trials):
            trial.speed = ratios(samples[str(n)])[0]
            if self.target.measured:
                trial.cost = 1 / trial.speed.median

    def _run(self, model: nn.Module, sides: Any) -> Any:
        pixels = self._pixels(sides, self.batch_size)
        return lambda: model(pixels)

    def _pixels(self, sides: Any, count: int) -> Tensor:
        reference = next(self.sizes.model.parameters())
        channels = self.searching.images.shape[1]
        pixels = torch.randn(count, channels, *(sides or self.sizes.own), generator=torch.Generator().manual_seed(0))
        return pixels.to(reference.device, reference.dtype)

    def _seconds_of_base(self) -> float:
        """Return the time of a forward of the unreduced model, with the settings that reduced models get too."""
        apply_settings(*find_host(self.sizes.model))
        run, watch = self._run(self.sizes.model, None), stopwatch(self.device)
        with torch.inference_mode():
            run()
            return min(watch.time(run).wall for _ in range(3))

    def _affordable_rounds(self, trials: int) -> int:
        """Return the number of rounds in which as many candidates may be timed, in a fourth of the time left."""
        left = self.clock.left()
        if left is None:
            return FINAL_ROUNDS
        each = self.base_seconds * (1 + trials * (self.limit + 1 / APART))
        return max(LEAST_ROUNDS, min(FINAL_ROUNDS, int(left / 4 / each) - 1))
