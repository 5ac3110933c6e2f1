"""Consistency checks between the sections of a recipe, made before anything is loaded."""

from __future__ import annotations

from laconic.core.method import resolve
from laconic.core.schedule import Schedule
from laconic.training.recipe import Recipe
from laconic.training.schedule_changes import in_order, options_at, tuples
from laconic.training.steps import asked_for


def check(recipe: Recipe) -> None:
    """Raise if sections of a recipe contradict each other.

    Raises:
        LookupError: no such method or kind of step. TypeError: no such option of it. ValueError: keys exclude each other.
    """
    method, part = recipe.method, recipe.optimization
    learns = False
    if method.name:
        learns = resolve(method.name, tuples(method.options)).info.learns
        _check_changes(recipe)
        _check_schedule(recipe)
    else:
        given = [
            name
            for name in ("keep", "at", "schedule", "options", "later", "ramps", "warm_in_start", "warm_in_epochs")
            if getattr(method, name)
        ]
        if given:
            raise ValueError(f"method.{given[0]} is set and method.name is not; set method.name too, for example to evit")
    if method.warms_in and method.keep is None and not method.schedule:
        raise ValueError("the keep-rate warm-in (method.warm_in_start and warm_in_epochs) needs method.keep, the rate to reach")
    if method.warm_in_start + method.warm_in_epochs > part.epochs:
        raise ValueError(
            f"the keep-rate warm-in ends after epoch {method.warm_in_start + method.warm_in_epochs:g} and the training after "
            f"epoch {part.epochs}; lower method.warm_in_start or method.warm_in_epochs, or train longer"
        )
    if part.eval_mode and learns:
        raise ValueError(f"optimization.eval_mode: {method.name} learns its decisions in training mode only; set it to false")
    apart = {"freeze_backbone_epochs": part.freeze_backbone_epochs > 0, "backbone_lr_scale": part.backbone_lr_scale != 1}
    apart["backbone_lr_cap"] = part.backbone_lr_cap is not None
    for name, wanted in apart.items():
        if wanted and not learns:
            raise ValueError(
                f"optimization.{name} is for methods that add parameters; {_named(method.name)} adds none; leave it out"
            )
    if recipe.model.weights and not recipe.model.pretrained:
        raise ValueError("model.weights is set, but model.pretrained is false: the weights would not be used")
    _check_losses(recipe)
    asked_for(recipe)


def _check_losses(recipe: Recipe) -> None:
    """Raise if parts of the loss do not fit the augmentation, the sampler, the method or the model."""
    method, loss = recipe.method, recipe.loss
    moved = [name for name in ("crop", "hflip", "vflip", "mixup", "cutmix") if getattr(recipe.augmentation, name)]
    if loss.token_labels and moved:
        raise ValueError(
            f"loss.token_labels needs the positions of objects in the image, and augmentation.{moved[0]} moves them; remove one"
        )
    if loss.class_weights != "none" and recipe.data.sampler != "uniform":
        raise ValueError(
            f"loss.class_weights={loss.class_weights} and data.sampler={recipe.data.sampler} both make up for few images of a "
            "class, and together they would do it twice; leave one of them out"
        )
    for name in ("logits", "tokens"):
        if getattr(loss, name) and not method.name:
            raise ValueError(
                f"loss.{name} distils from the unreduced model, and there is no method; set method.name, or loss.{name}=0"
            )
        if getattr(loss, name) and not recipe.model.pretrained:
            raise ValueError(f"loss.{name} distils from the unreduced model, which would be random; set model.pretrained")


def _check_changes(recipe: Recipe) -> None:
    """Raise if options in ``later`` or ``ramps`` are not options of the method, or an epoch in ``later`` is not in the run."""
    method, epochs = recipe.method, recipe.optimization.epochs
    changes = in_order(method)
    for start, _ in changes:
        if not 0 <= start < epochs:
            raise ValueError(f"method.later changes options in epoch {start:g}, and optimization.epochs is {epochs}")
    for count in range(len(changes) + 1):
        for share in (0.0, 1.0):
            options_at(method, [options for _, options in changes[:count]], share)


def _check_schedule(recipe: Recipe) -> None:
    """Raise if ``schedule`` is combined with ``keep`` or ``at``, or counts are combined with a warm-in."""
    method = recipe.method
    if not method.schedule:
        return
    given = [name for name, value in (("keep", method.keep), ("at", method.at)) if value not in (None, ())]
    if given:
        raise ValueError(f"method.schedule replaces keep and at, and method.{given[0]} is set too; leave one of them out")
    try:
        unit = Schedule.of(method.schedule).unit
    except (ValueError, TypeError) as error:
        raise ValueError(f"method.schedule: {error}") from None
    if method.warms_in and unit != "keep":
        raise ValueError(
            f"method.schedule gives counts to {unit}, and only keep rates can be warmed in; leave out method.warm_in_start and "
            "warm_in_epochs, or give keep rates"
        )


def _named(method: str) -> str:
    return method or "training without a method"
