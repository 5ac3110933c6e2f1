"""The training step ``two-passes``, whose teacher pass removes fewer tokens: see `laconic.training.consistency`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from laconic.core.token_reduction import reduction_of
from laconic.training.consistency import Answer, consistency_losses, lessened, teacher_pass
from laconic.training.objective import Objective, Step, StepOptions
from laconic.training.recipe import Recipe


@dataclass(frozen=True)
class TwoPassesOptions(StepOptions):
    """Options of ``two-passes``; the same as those of `laconic.training.consistency.consistency_step`."""

    weight: float = 3.0
    confidence: float = 0.4
    most: float = 0.5
    judge: Literal["student", "teacher"] = "student"

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and 0 <= self.confidence <= 1 and 0 < self.most <= 1):
            given = f"weight={self.weight!r}, confidence={self.confidence!r}, most={self.most!r}"
            raise ValueError(f"step.options: weight must be 0 or more, confidence and most shares (most above 0); got {given}")

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError for recipes without a method, or with checkpointed activations."""
        if not recipe.method.name:
            raise ValueError("step.kind two-passes trains reduced models, and there is no method; set method.name")
        if recipe.optimization.grad_checkpointing:
            raise ValueError(
                "step.kind two-passes: checkpointed blocks cannot run twice; set optimization.grad_checkpointing to false"
            )


class TwoPasses(Step):
    """The ordinary objective, plus the cross-entropy of a pass that removes fewer tokens and the distance of both passes."""

    def __init__(self, objective: Objective, options: TwoPassesOptions) -> None:
        super().__init__()
        self.objective, self.options = objective, options
        lessened(reduction_of(objective.student), 0.0)  # raises if the model has no schedule

    def forward(self, images: Tensor, target: Tensor, patches: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss and its parts, as `Objective`, with "teacher" and "consistency"."""
        model: Any = self.objective.student
        teacher, answer = teacher_pass(model, images, self.options.most), self.objective.answer(images)
        parts = self.objective.losses(images, answer, target, patches)
        student = Answer.of(model, answer.features)
        both = consistency_losses(student, teacher, target, self.options.confidence, self.options.judge)
        both["teacher"] = self.objective.cross_entropy(teacher.logits, target)  # with the weights of the classes
        loss = parts["loss"] + both["teacher"] + self.options.weight * both["consistency"]
        return {**parts, "loss": loss, **{name: value.detach() for name, value in both.items()}}
