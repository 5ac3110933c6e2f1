"""The ways in which a step of training is made, and which of them a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from laconic.core.from_dict import build
from laconic.core.method import nearest_names
from laconic.training.objective import Objective, Step, StepOptions
from laconic.training.rate_search_step import RateSearch, RateSearchOptions
from laconic.training.recipe import Recipe
from laconic.training.reinforce import PolicyGradient, PolicyGradientOptions
from laconic.training.two_passes import TwoPasses, TwoPassesOptions


@dataclass(frozen=True)
class Kind:
    """One way: its options, how it is made of an objective and them, and (if there is but one) the method that it is for."""

    options: type[StepOptions]
    make: Callable[[Objective, Any], Step]
    method: str = ""
    usual: bool = False  # is that method trained so unless a recipe says otherwise?


KINDS: dict[str, Kind] = {
    "ordinary": Kind(StepOptions, lambda objective, options: objective),
    "policy-gradient": Kind(PolicyGradientOptions, PolicyGradient, "iared", usual=True),
    "rate-search": Kind(RateSearchOptions, RateSearch, "diffrate"),
    "two-passes": Kind(TwoPassesOptions, TwoPasses),
}


def asked_for(recipe: Recipe) -> tuple[Kind, StepOptions]:
    """How a recipe wants its steps made, checked.

    Raises:
        LookupError: no such kind. ValueError: options or other parts of the recipe do not go with it.
    """
    part, method = recipe.step, recipe.method.name
    usual = next((name for name, kind in KINDS.items() if kind.usual and kind.method == method), "ordinary")
    name = part.kind or usual
    if name not in KINDS:
        raise LookupError(f"step.kind: there is no {name!r}.{nearest_names(name, list(KINDS))} There are: {', '.join(KINDS)}")
    kind = KINDS[name]
    if kind.method not in ("", method):
        raise ValueError(f"step.kind {name} trains the method {kind.method}, and method.name is {method!r}; change one of them")
    options = build(kind.options, part.options, "step.options.")
    options.check(recipe)
    return kind, options
