"""Does a reduction pay? By multiply-adds in closed form, and by the time that a method's own steps take on this machine.

Multiply-adds say nothing of sorting, of merging one pair after the other or of many small operations. So one reduced forward
is timed, and in it the steps of the method. Only where these may take as long as the blocks are spared is the unreduced
model timed as well. Below `LEAST_MACS` nothing is timed: there Python's overhead decides, not the method.
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

from laconic.analysis.input_size import InputSize, batch_for
from laconic.analysis.macs import CONVENTIONS, block_cost
from laconic.analysis.stopwatch import Run, Stopwatch, stopwatch
from laconic.analysis.summary import TimeBalance
from laconic.core.backbone import HOSTS, ModelSpec
from laconic.core.eval_mode import aside
from laconic.core.method import Method
from laconic.core.schedule import Schedule
from laconic.core.stages import Stages
from laconic.core.token_reduction import TokenReduction, reduction_of

log = logging.getLogger(__name__)

LEAST_MACS = 1e9  # of the unreduced blocks on the whole batch
CLEAR = 1.1  # so many times as fast as unreduced, by the share of its steps, a model is not measured further
ROUNDS, PATIENCE = (2, 5), 2.0  # of the measurement, and the seconds after which only the fewest are run
ADVICE = (
    "Reduce in fewer or in earlier blocks, keep fewer tokens, or take a method whose cost grows less with their number "
    "(topk, evit, etps)"
)

_quiet = ContextVar("quiet", default=False)
# what was found of each reduction: times are of this machine, so they are no part of the model
_found: WeakKeyDictionary[TokenReduction, tuple[Any, TimeBalance | None]] = WeakKeyDictionary()


class Balance(NamedTuple):
    """Multiply-adds of one image: those that the blocks are spared, those of the reducers, those of the unreduced blocks."""

    spared: int
    spent: int
    whole: int


def balance(host: nn.Module, entry: ModelSpec, config: Method, schedule: Schedule, size: InputSize | None = None) -> Balance:
    """Return what a schedule spares and what its reducers cost, for an image of this size (None: the model's own)."""
    weights, blocks = CONVENTIONS["matmul"], entry.blocks(host)
    shapes = entry.shapes(host) if size is None else size.shapes
    staging = Stages(config, schedule, shapes)
    counts, sites, spared, spent, unreduced, index = staging.counts(), staging.sites(), 0, 0, 0, 0
    for shape in shapes:
        before = shape.patches
        for _ in range(shape.depth):
            left = counts[index]
            whole = block_cost(index, blocks[index], shape, None, None, shape.patches, shape.patches, weights)
            now = block_cost(index, blocks[index], shape, config, sites.get(index), before, left, weights)
            spared, spent = spared + whole.macs - now.macs, spent + now.reducer_macs
            before, index, unreduced = left, index + 1, unreduced + whole.macs
    return Balance(spared, spent, unreduced)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither measure nor warn: for models that are reduced only to be compared or tried."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def warn_unless_it_pays(
    host: nn.Module, entry: ModelSpec, config: Method, schedule: Schedule, example: Tensor | None = None
) -> None:
    """Warn where choosing and merging tokens takes more than the blocks are spared: multiply-adds, or else time.

    It speaks of inputs such as ``example`` (None: one image of the model's own size), which the reduced model runs on.
    Methods that decide for every image are left out: what they spare depends on the images. It never fails, since the model
    is reduced already.
    """
    if config.info.count == "variable" or _quiet.get():
        return
    try:
        macs = balance(host, entry, config, schedule, InputSize.of(host, entry, example))
        dear = macs.spared > 0 and macs.spent >= macs.spared
        found = None if dear else timed(reduction_of(host), example, macs)
    except (RuntimeError, ValueError) as error:  # no memory for a second model, layers that cannot be counted
        log.info("whether %s pays here is not known: %s", config.info.name, error)
        return
    if dear:
        log.warning(
            "%s costs more than it saves with this schedule: its reducers take %.3g multiply-adds an image, and the blocks are "
            "spared %.3g. %s",
            config.info.name,
            macs.spent,
            macs.spared,
            ADVICE,
        )
    if found is not None and found.ratio < 1:
        promised = macs.whole / (macs.whole - macs.spared + macs.spent)
        log.warning("%s is %s; its multiply-adds promise %.2fx. %s", config.info.name, found, promised, ADVICE)


def timed(reduction: TokenReduction, example: Tensor | None, macs: Balance | None = None) -> TimeBalance | None:
    """Return what a reduced model takes beside the unreduced one, where its steps may take as long as they save; else None.

    Without an example it is what is known already, if the caller gives no ``macs``. Each input is measured once.
    """
    host, schedule = reduction.model, reduction.schedule
    entry, device = HOSTS[reduction.host_path], next(host.parameters()).device
    if example is None and macs is None:
        known, found = _found.get(reduction, (None, None))
        return found if known is not None and known[1:] == (schedule, device) else None
    if device.type == "meta":
        return None
    batch = entry.example(host) if example is None else batch_for(host, example)
    key = (batch.shape, schedule, device)
    known, found = _found.get(reduction, (None, None))
    if known == key:
        return found
    macs = macs or balance(host, entry, reduction.config, schedule, InputSize.of(host, entry, example))
    with aside(host), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        host(batch)  # it may refuse the size; and a first forward takes longer than others
        found = time_balance(reduction, batch, macs)
    _found[reduction] = key, found
    return found


def time_balance(reduction: TokenReduction, batch: Tensor, macs: Balance, watch: Stopwatch | None = None) -> TimeBalance | None:
    """Time a forward of the reduced model; and, where it may be no faster, of the unreduced model beside it, in turn."""
    fixed = reduction.config.info.count == "constant" and macs.spared > 0
    if not fixed or batch.device.type not in ("cpu", "cuda") or macs.whole * len(batch) < LEAST_MACS:
        return None
    watch = watch or stopwatch(batch.device)
    reduced = list[tuple[float, float]]()
    for _ in range(2):  # again, before a moment in which the machine was busy makes a slow method of a quick one
        reduced.append(time_reduced(reduction, batch, watch))
        if expected(*reduced[-1], macs) >= CLEAR:
            return None
    plain, unreduced = _unreduced(reduction.model), list[float]()
    plain(batch)
    while len(unreduced) < ROUNDS[0] or (len(unreduced) < ROUNDS[1] and sum(map(sum, reduced)) + sum(unreduced) < PATIENCE):
        unreduced.append(seconds(lambda: plain(batch), watch))
        reduced.append(time_reduced(reduction, batch, watch))
    # the least of several: what else the machine does can only slow one down
    return TimeBalance(min(unreduced), *min(reduced), tuple(batch.shape), batch.device.type)


def expected(forward: float, steps: float, macs: Balance) -> float:
    """How many times as fast as unreduced a model is whose forward and whose method's steps take so many seconds.

    The rest of the forward is taken to grow as the multiply-adds of the blocks do.
    """
    return (forward - steps) / forward * macs.whole / (macs.whole - macs.spared)


def time_reduced(reduction: TokenReduction, batch: Tensor, watch: Stopwatch) -> tuple[float, float]:
    """Seconds of one forward of a reduced model, and of its method's steps in it."""
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
    """Call ``step(own, *arguments)`` for a while wherever a reducer works; ``own(*arguments)`` is what it would do."""
    before, reduction.around = reduction.around, step
    try:
        yield
    finally:
        reduction.around = before


def seconds(run: Run, watch: Stopwatch) -> float:
    """Time one run."""
    begin = watch.mark()
    run()
    return watch.between(begin, watch.mark())


def _unreduced(host: nn.Module) -> nn.Module:
    """A copy without the reduction, with the very weights of the original."""
    from laconic.analysis.diagnose import twin
    from laconic.api import restore_  # both stand on this module

    return restore_(twin(host))
