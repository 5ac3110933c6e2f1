"""Check that token reduction is worth its cost: by computed multiply-adds, and by measured time on this machine.

Multiply-adds do not count sorting, merging one pair after the other, or the overhead of many small operations. So one reduced
forward is timed, and the method's steps in it. The unreduced model is timed only if these steps may take as long as the time
that the blocks save. Below `LEAST_MACS` nothing is timed: there Python's overhead dominates, not the method.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from laconic.analysis.input_size import InputSize, batch_for, whole_batch
from laconic.analysis.macs import CONVENTIONS, block_cost
from laconic.analysis.stopwatch import Run, Stopwatch, stopwatch
from laconic.analysis.summary import TimeBalance
from laconic.core.backbone import HOSTS, ModelSpec
from laconic.core.eval_mode import without_recording
from laconic.core.method import Method
from laconic.core.schedule import Schedule
from laconic.core.stages import Stages
from laconic.core.token_reduction import TokenReduction, reduction_of

log = logging.getLogger(__name__)

LEAST_MACS = 1e9  # multiply-adds of the unreduced blocks on the whole batch; below, nothing is timed
CLEAR = 1.1  # expected speed relative to the unreduced model from which no further measurement is needed
ROUNDS, PATIENCE = (2, 5), 2.0  # minimum and maximum rounds; after this many seconds, no round beyond the minimum starts
ADVICE = (
    "Reduce in fewer or in earlier blocks, keep fewer tokens, or use a method whose cost grows more slowly with their number "
    "(topk, evit, etps)"
)

_quiet = ContextVar("quiet", default=False)
# measurements by reduction; they are not saved with the model, because times depend on the machine
_measured: WeakKeyDictionary[TokenReduction, tuple[Any, TimeBalance | None]] = WeakKeyDictionary()


class Balance(NamedTuple):
    """Multiply-adds of one image: ``spared`` by the blocks, ``spent`` by the reducers, and the ``whole`` unreduced blocks."""

    spared: int
    spent: int
    whole: int


def balance(host: nn.Module, entry: ModelSpec, config: Method, schedule: Schedule, size: InputSize | None = None) -> Balance:
    """Return the savings of a schedule and the cost of its reducers, for an image of this size (None: the model's own)."""
    weights, blocks = CONVENTIONS["matmul"], entry.blocks(host)
    shapes = entry.shapes(host) if size is None else size.shapes
    stages = Stages(config, schedule, shapes)
    counts, sites, spared, spent, unreduced, index = stages.counts(), stages.sites(), 0, 0, 0, 0
    for shape in shapes:
        before = shape.patches
        for _ in range(shape.depth):
            kept = counts[index]
            whole = block_cost(index, blocks[index], shape, None, None, shape.patches, shape.patches, weights)
            now = block_cost(index, blocks[index], shape, config, sites.get(index), before, kept, weights)
            spared, spent = spared + whole.macs - now.macs, spent + now.reducer_macs
            before, index, unreduced = kept, index + 1, unreduced + whole.macs
    return Balance(spared, spent, unreduced)


@contextmanager
def quiet() -> Iterator[None]:
    """Disable measurements and warnings inside the context: for models that are reduced only for comparison."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def warn_unless_it_pays(
    host: nn.Module, entry: ModelSpec, config: Method, schedule: Schedule, example: Tensor | None = None
) -> None:
    """Warn if selecting and merging tokens costs more than it saves in the blocks: in multiply-adds, or else in time.

    The costs are for inputs such as ``example`` (None: one image of the model's own size); the reduced model runs on it.
    Methods that choose the token count per image are skipped, because their savings depend on the images. Errors are logged
    and not raised, since the model is reduced already.
    """
    if config.info.count == "variable" or _quiet.get():
        return
    try:
        macs = balance(host, entry, config, schedule, InputSize.of(host, entry, example))
        costly = macs.spared > 0 and macs.spent >= macs.spared
        found = None if costly else timed(reduction_of(host), example, macs)
    except (RuntimeError, ValueError) as error:  # for example no memory for a second model, or layers that cannot be counted
        log.info("could not check that %s saves time here: %s", config.info.name, error)
        return
    if costly:
        log.warning(
            "%s costs more than it saves with this schedule: its reducers take %.3g multiply-adds per image, and the blocks "
            "save %.3g. %s",
            config.info.name,
            macs.spent,
            macs.spared,
            ADVICE,
        )
    if found is not None and found.ratio < 1:
        promised = macs.whole / (macs.whole - macs.spared + macs.spent)
        log.warning("%s is %s; from its multiply-adds, %.2fx was expected. %s", config.info.name, found, promised, ADVICE)


def timed(reduction: TokenReduction, example: Tensor | None, macs: Balance | None = None) -> TimeBalance | None:
    """Return the measured times of the reduced and the unreduced model; None if the method's steps are clearly cheap.

    Without ``example`` and ``macs``, return the last measurement, if it is still valid. Each input size is measured once.
    """
    host, schedule = reduction.model, reduction.schedule
    entry, device = HOSTS[reduction.host_path], next(host.parameters()).device
    if example is None and macs is None:
        known, found = _measured.get(reduction, (None, None))
        return found if known is not None and known[1:] == (schedule, device) else None
    if device.type == "meta":
        return None
    batch = whole_batch(host, entry.example(host) if example is None else batch_for(host, entry, example))
    key = (batch.shape, schedule, device)
    known, found = _measured.get(reduction, (None, None))
    if known == key:
        return found
    macs = macs or balance(host, entry, reduction.config, schedule, InputSize.of(host, entry, example))
    with without_recording(host), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        host(batch)  # warm-up; also raises here if the model does not accept this input size
        found = time_balance(reduction, batch, macs)
    _measured[reduction] = key, found
    return found


def time_balance(reduction: TokenReduction, batch: Tensor, macs: Balance, watch: Stopwatch | None = None) -> TimeBalance | None:
    """Time forwards of the reduced model and, if it may be no faster, of the unreduced model in alternation; else None."""
    fixed = reduction.config.info.count == "constant" and macs.spared > 0
    if not fixed or batch.device.type not in ("cpu", "cuda") or macs.whole * len(batch) < LEAST_MACS:
        return None
    watch = watch or stopwatch(batch.device)
    reduced = list[tuple[float, float]]()
    for _ in range(2):  # twice, because a busy machine can make a fast method look slow
        reduced.append(time_reduced(reduction, batch, watch))
        if expected(*reduced[-1], macs) >= CLEAR:
            return None
    plain, unreduced = _unreduced(reduction.model), list[float]()
    plain(batch)
    while len(unreduced) < ROUNDS[0] or (len(unreduced) < ROUNDS[1] and sum(map(sum, reduced)) + sum(unreduced) < PATIENCE):
        unreduced.append(seconds(lambda: plain(batch), watch))
        reduced.append(time_reduced(reduction, batch, watch))
    # the minimum of several runs: other load on the machine can only slow a run down
    return TimeBalance(min(unreduced), *min(reduced), tuple(batch.shape), batch.device.type)


def expected(forward: float, steps: float, macs: Balance) -> float:
    """Estimate the speed relative to the unreduced model from the seconds of a forward and of the method's steps in it.

    The time of the rest of the forward is assumed to be proportional to the multiply-adds of the blocks.
    """
    return (forward - steps) / forward * macs.whole / (macs.whole - macs.spared)


def time_reduced(reduction: TokenReduction, batch: Tensor, watch: Stopwatch) -> tuple[float, float]:
    """Return the seconds of one forward of a reduced model, and of its method's steps in it."""
    marks = list[tuple[Any, Any]]()

    def step(own: Callable[..., Any], *arguments: Any) -> Any:
        begin = watch.mark()
        out = own(*arguments)
        marks.append((begin, watch.mark()))
        return out

    with stepping(reduction, step):
        forward = seconds(lambda: reduction.model(batch), watch)
    return forward, sum(watch.between(begin, end) for begin, end in marks)


@contextmanager
def stepping(reduction: Any, step: Callable[..., Any]) -> Iterator[None]:
    """Inside the context, call ``step(own, *arguments)`` in place of each reducer step ``own(*arguments)``."""
    before, reduction.around = reduction.around, step
    try:
        yield
    finally:
        reduction.around = before


def seconds(run: Run, watch: Stopwatch) -> float:
    """Return the seconds of one run."""
    begin = watch.mark()
    run()
    return watch.between(begin, watch.mark())


def _unreduced(host: nn.Module) -> nn.Module:
    """Return an unreduced copy that shares the weights of the original."""
    from laconic.analysis.diagnose import shared_copy
    from laconic.api import restore_  # imported here: both import this module

    return restore_(shared_copy(host))
