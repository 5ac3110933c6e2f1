"""The training step ``rate-search``, which learns DiffRate's counts: see `laconic.training.diffrate_search`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from laconic.analysis.diagnose import shared_copy
from laconic.api import reduce_, restore_
from laconic.core.token_reduction import reduction_of
from laconic.training.diffrate_search import DiffRateSearch, found_in
from laconic.training.objective import Objective, Step, StepOptions
from laconic.training.recipe import Recipe


@dataclass(frozen=True)
class RateSearchOptions(StepOptions):
    """Options of ``rate-search``: the target cost ``gmacs``, and ``weight`` and ``every`` of `DiffRateSearch`."""

    gmacs: float = 0.0
    weight: float = 5.0
    every: int = 4

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError for settings under which the search would not see the trained model as it is."""
        method, part = recipe.method, recipe.optimization
        if self.gmacs <= 0:
            raise ValueError("step.options.gmacs must be the target cost of the model, in billions of multiply-adds")
        if method.keep != 1 or "merge_kept" in method.options:
            raise ValueError(
                "the rate search starts from all tokens: set method.keep to 1.0, without merge_kept and prune_kept"
            )
        if not part.eval_mode:
            raise ValueError("the rate search needs the model in evaluation mode: set optimization.eval_mode to true")
        if part.ema:
            raise ValueError(
                "the rate search trains counts and no weights, so there is no moving average: set optimization.ema to 0"
            )


class RateSearch(Step):
    """The ordinary objective plus the squared distance of the cost to its target; only the counts are learned."""

    def __init__(self, objective: Objective, options: RateSearchOptions) -> None:
        super().__init__()
        self.objective = objective
        model, config = objective.student, reduction_of(objective.student).config
        restore_(model)
        facts: dict[str, Any] = {"weight": options.weight, "every": options.every, "score": getattr(config, "score", "class")}
        self.search = DiffRateSearch(model, options.gmacs, **facts)

    def forward(self, images: Tensor, target: Tensor, patches: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss and its parts, as `Objective`; "gmacs" is the cost of the model with the current counts."""
        parts, cost = self.objective(images, target, patches), self.search.cost()
        loss = parts["loss"] + self.search.weight * (cost - self.search.gmacs).square()
        return {**parts, "loss": loss, "gmacs": cost.detach()}

    def product(self, model: nn.Module) -> nn.Module:
        """Return the model reduced with the current counts; it shares its weights with the searched model."""
        found, out = found_in(model, self.search.score), shared_copy(model)
        return reduce_(restore_(out), found)
