"""The kinds of training steps, and the selection of the one that a recipe uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from laconic.core.from_dict import build
from laconic.core.suggestions import nearest_names
from laconic.training.objective import Objective, Step, StepOptions
from laconic.training.rate_search_step import RateSearch, RateSearchOptions
from laconic.training.recipe import Recipe
from laconic.training.reinforce import PolicyGradient, PolicyGradientOptions
from laconic.training.two_passes import TwoPasses, TwoPassesOptions


@dataclass(frozen=True)
class Kind:
    """A kind of training step: its options, its constructor, and the only method that it supports ("" for any)."""

    options: type[StepOptions]
    make: Callable[[Objective, Any], Step]
    method: str = ""
    usual: bool = False  # True: default kind for that method


KINDS: dict[str, Kind] = {
    "ordinary": Kind(StepOptions, lambda objective, options: objective),
    "policy-gradient": Kind(PolicyGradientOptions, PolicyGradient, "iared", usual=True),
    "rate-search": Kind(RateSearchOptions, RateSearch, "diffrate"),
    "two-passes": Kind(TwoPassesOptions, TwoPasses),
}


def asked_for(recipe: Recipe) -> tuple[Kind, StepOptions]:
    """Return the kind of step that a recipe uses and its options, after checking them.

    Raises:
        LookupError: no such kind. ValueError: options or other sections of the recipe do not fit this kind.
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
