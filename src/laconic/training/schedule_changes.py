"""Changes of a method over the steps of a run: its keep rate and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laconic.core.method import Method, resolve
from laconic.core.schedule import WarmIn
from laconic.core.token_reduction import TokenReduction
from laconic.training.recipe import MethodPart


class KeepRate:
    """Keep-rate warm-in: move the schedule, step by step, from no reduction to the recipe's schedule.

    Without a warm-in the schedule is constant.

    Args:
        reductions: the reductions of the model and of its moving average.
        method: start and length of the warm-in, in epochs.
        steps: steps per epoch.
    """

    def __init__(self, reductions: list[TokenReduction], method: MethodPart, steps: int) -> None:
        self.reductions = reductions if method.warms_in else []
        self.final = [reduction.schedule for reduction in self.reductions]
        start, end = round(method.warm_in_start * steps), round((method.warm_in_start + method.warm_in_epochs) * steps)
        self.warm = WarmIn(start, end - start)

    def set(self, step: int) -> None:
        """Set the schedule of a step (from 0)."""
        for reduction, final in zip(self.reductions, self.final, strict=True):
            reduction.set_schedule(self.warm(final, step))

    def arrived(self, step: int) -> bool:
        """Return True if the schedule at that step is the recipe's."""
        return not self.reductions or step >= self.warm.start + self.warm.length

    def finish(self) -> None:
        """Set the recipe's schedule."""
        for reduction, final in zip(self.reductions, self.final, strict=True):
            reduction.set_schedule(final)


class Options:
    """Change the options of reduced models, step by step: ``method.later`` at its epochs, and ``method.ramps``.

    Args:
        reductions: the reductions of the model and of its moving average.
        method: the options that change.
        steps: steps per epoch.
        epochs: epochs of the run.
    """

    def __init__(self, reductions: Sequence[TokenReduction], method: MethodPart, steps: int, epochs: int) -> None:
        self.reductions = reductions if method.later or method.ramps else []
        self.method, self.total = method, steps * epochs
        self.starts = {round(float(epoch) * steps): options for epoch, options in in_order(method)}
        self.now: Method | None = None

    def set(self, step: int) -> None:
        """Set the options of a step (from 0)."""
        if not self.reductions:
            return
        begun = [options for start, options in self.starts.items() if start <= step]
        config = options_at(self.method, begun, step / max(1, self.total - 1))
        if config != self.now:
            for reduction in self.reductions:
                reconfigure(reduction, config)
        self.now = config

    def arrived(self, step: int) -> bool:
        """Return True if all changes of ``later`` are done at that step.

        Ramps do not count: they run until the end, and their options matter in training only.
        """
        return not self.reductions or step >= max(self.starts, default=0)

    def finish(self) -> None:
        """Set the final options."""
        self.set(self.total - 1)


def in_order(method: MethodPart) -> list[tuple[float, Mapping[str, Any]]]:
    """Return the epochs at which options change with these options, sorted by epoch."""
    return sorted(((float(epoch), options) for epoch, options in method.later.items()), key=lambda change: change[0])


def options_at(method: MethodPart, begun: Sequence[Mapping[str, Any]], share: float) -> Method:
    """Return the method with the changes in ``begun`` applied in order, and ramps at ``share`` of the run."""
    options = dict(method.options)
    for later in begun:
        options |= later
    options |= {name: first + (last - first) * share for name, (first, last) in method.ramps.items()}
    return resolve(method.name, tuples(options))


def tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the lists among options to tuples, as the dataclasses of methods need."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def reconfigure(reduction: TokenReduction, config: Method) -> None:
    """Change the options of a reduced model's method; learned parameters are kept.

    Raises:
        ValueError: with these options the method's reducers have another class or other parameters.
    """
    reducers: Any = reduction.reducers.children()
    for reducer in reducers:
        fresh = config.build(reducer.site)
        before, after = ({name: value.shape for name, value in part.state_dict().items()} for part in (reducer, fresh))
        if type(fresh) is not type(reducer) or before != after:
            raise ValueError(
                f"method.later and ramps: with {config} the reducers of {config.info.name} would have other parameters; "
                "these options cannot change during training"
            )
        own = {
            name: value for name, value in vars(fresh).items() if not name.startswith("_") and name not in ("training", "site")
        }
        vars(reducer).update(own)
    reduction.config = config
    reduction.set_schedule(reduction.schedule)
