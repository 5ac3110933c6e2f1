"""`repair_`: bring the answer of a reduced model nearer to the unreduced model's, on images without labels.

``closed-form`` fits the scale and bias of the last layer norm, one channel at a time, by least squares. ``distil`` trains the
scales and biases of all layers (the parameters with one dimension) for some minutes, so that the answer and the restored patch
features meet those of the unreduced model. Held-out images decide whether the change stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.analysis.diagnose import shared_copy
from laconic.analysis.equal_time import Interval, bootstrap
from laconic.analysis.fidelity import resized
from laconic.api import restore_
from laconic.core.backbone import find_host
from laconic.core.token_reduction import find_reduction
from laconic.planning.measures import Kind, Measure, Scored, answer_of, resized_images, token_features
from laconic.planning.progress import ticking
from laconic.planning.scores import Values

How = Literal["closed-form", "distil"]
HOWS: tuple[How, ...] = get_args(How)
BATCH, RATE, RISE = 16, 1e-3, 0.1  # of the distillation: images of a step, highest learning rate, share of the time it rises
EPOCHS, CLIP = 8, 1.0  # passes over the images, if nothing is said; largest norm of a gradient
SCORES = ("before", "after", "gain")
SHRINK, TINY = 0.1, 1e-12  # of the closed form: weight of leaving a channel as it is, in units of its variance


@dataclass(frozen=True)
class Repaired:
    """The effect of a repair: scores of held-out images before and after it, and the mean difference of an image."""

    how: How
    kept: bool
    before: Interval
    after: Interval
    gain: Interval
    parameters: int  # numbers that were fitted
    images: tuple[int, int]  # that fitted, and that judged
    steps: int  # of the distillation
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        return {**vars(self), **{name: vars(getattr(self, name)) for name in SCORES}, "images": list(self.images)}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Repaired:
        """Build it from the output of `to_json`."""
        scores = {name: Interval(**fields[name]) for name in SCORES}
        return cls(**{**fields, **scores, "images": tuple(fields["images"])})


def repair_(
    model: nn.Module,
    images: Tensor,
    how: How = "distil",
    *,
    measure: Kind | Scored = "same-answer",
    base: nn.Module | None = None,
    held_out: Tensor | None = None,
    labels: Tensor | None = None,
    minutes: float | None = None,
    steps: int | None = None,
) -> Repaired:
    """Change scales and biases of a reduced model, in place, so that its answers are nearer to the unreduced model's.

    The change stays if the measure is better on held-out images, by more than chance; else the parameters are as before.
    `laconic.restore_` undoes the reduction, not the repair.

    Args:
        model: a reduced model in float32, or one with smaller images, if ``base`` is given.
        images: [N, channels, height, width], preprocessed for ``base``; they need no labels.
        how: ``closed-form`` (seconds) or ``distil`` (minutes).
        measure: as in `laconic.tune`; it judges. With ``dense``, patch features are trained, else the answer.
        base: the unreduced model (default: ``model`` without its reduction). It must not share parameters with ``model``.
        held_out: images that judge (default: every fourth of ``images``, which then does not fit).
        labels: [N] of ``held_out``, if the measure needs them.
        minutes: time for the distillation (default: 8 passes over the images).
        steps: steps of the distillation, instead of a time: the same steps give the same result.

    Raises:
        ValueError: the model is not reduced, not in float32, or has nothing to fit; there are too few images.
    """
    if base is None and find_reduction(model) is None:
        raise ValueError("repair_ needs a reduced model, or base=; call laconic.reduce_ first")
    if how not in HOWS:
        raise ValueError(f"how must be one of {', '.join(HOWS)}, not {how!r}")
    if minutes is not None and steps is not None:
        raise ValueError("give minutes or steps, not both")
    for name, value in (("minutes", minutes), ("steps", steps)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be more than 0, not {value}")
    if held_out is None:
        if labels is not None:
            raise ValueError("labels belong to held_out; give both")
        order = torch.arange(len(images))
        images, held_out = images[order % 4 != 3], images[order % 4 == 3]
    if len(images) < 2 or len(held_out) < 2:
        raise ValueError(f"{len(images)} images fit and {len(held_out)} judge; give two or more of both")
    given = restore_(shared_copy(model)).eval() if base is None else base
    fitted = scales_and_biases(model, given)
    if base is not None and any(one is fitted.get(name) for name, one in base.named_parameters()):
        raise ValueError(
            "model and base share parameters, so the repair would change both; give a copy.deepcopy of one of them"
        )
    held_out_measure, was_training = Measure(given, held_out, labels, measure), model.training
    until = Until(minutes, steps or passes(len(images)))
    model.eval()
    try:
        return repair_by(lambda: held_out_measure(model, _sides(model)).numpy(), model, given, images, (how, measure), until)[0]
    finally:
        model.train(was_training)


def repair_by(
    judge: Callable[[], Values],
    model: nn.Module,
    base: nn.Module,
    images: Tensor,
    asked: tuple[How, Kind | Scored],
    until: Until,
) -> tuple[Repaired, Values]:
    """Repair a model in evaluation mode, see `repair_`; return what was done and the held-out scores after it.

    Args:
        judge: scores the held-out images under ``model``.
        model: a reduced model.
        base: the unreduced model.
        images: that fit.
        asked: how to repair, and the measure.
        until: the end of a distillation.
    """
    (how, measure), begin, fitted = asked, time.monotonic(), scales_and_biases(model, base)
    dense, before = measure == "dense", judge()
    kept = {name: parameter.detach().clone() for name, parameter in fitted.items()}
    try:
        if how == "closed-form":
            count, done = fit_last_norm(model, base, images, dense=dense), 0
        else:
            done = distil(model, base, images, list(fitted.values()), until, dense=dense)
            count = sum(parameter.numel() for parameter in fitted.values())
        after = judge()
    except BaseException:
        _put_back(fitted, kept)
        raise
    gain = bootstrap(after - before)
    if not gain.low > 0:
        _put_back(fitted, kept)
    scores = (bootstrap(before), bootstrap(after), gain)
    used, seconds = (len(images), len(before)), time.monotonic() - begin
    return Repaired(how, gain.low > 0, *scores, count, used, done, seconds), after


def scales_and_biases(model: nn.Module, base: nn.Module) -> dict[str, nn.Parameter]:
    """Return the scales and biases of a model: its parameters with one dimension, less those that the reduction added.

    Raises:
        ValueError: there are none, or they are not in float32.
    """
    own = dict(model.named_parameters())
    found = {name: own[name] for name, one in base.named_parameters() if one.dim() == 1 and name in own}
    if not found:
        raise ValueError("the model has no scales or biases (parameters with one dimension), so there is nothing to fit")
    other = next((one for one in found.values() if one.dtype != torch.float32), None)
    if other is not None:
        raise ValueError(f"repair_ fits float32 parameters, and this model has {other.dtype}; repair it before it is converted")
    return found


def _put_back(fitted: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in fitted.items():
            parameter.copy_(kept[name])


def _sides(model: nn.Module) -> tuple[int, int]:
    """Return height and width of the images that a model takes."""
    host, entry = find_host(model)
    height, width = entry.sides(entry.example(host))
    return height, width


def _batches(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Yield batches of images at a model's input size, on its device."""
    device, sides = next(model.parameters()).device, _sides(model)
    for batch in torch.split(images, BATCH):
        yield resized_images(batch, sides).to(device, torch.float32)


def _outputs(model: nn.Module, images: Tensor, *, dense: bool) -> tuple[Tensor, ...]:
    """Return what is to meet the unreduced model's: the answer [B, C], or prefix and patch features ([B, N, C] each)."""
    return token_features(model, images) if dense else (answer_of(model, images),)


# ------------------------------------------------------------------------------------------------ closed form
def fit_last_norm(model: nn.Module, base: nn.Module, images: Tensor, *, dense: bool) -> int:
    """Fit scale and bias of the last layer norm by ridge regression of each channel on what the unreduced model's gives.

    Returns:
        The number of values that were fitted: twice the channels.

    Raises:
        ValueError: no layer norm with scale and bias gives the features of the measure.
    """
    (name, own), (other, target) = (_norm_outputs(one, images, dense=dense) for one in (model, base))
    if name != other:
        raise ValueError(f"the last layer norm is {name}, and that of the unreduced model is {other}; use how='distil'")
    if own.shape != target.shape:
        target = resized(target, own.shape[1]).double()
    norm: Any = model.get_submodule(name)
    own, target = own.flatten(0, -2), target.flatten(0, -2)
    mean, centre = own.mean(0), target.mean(0)
    power = (own - mean).square().sum(0)
    scale = (((own - mean) * (target - centre)).sum(0) + SHRINK * power) / ((1 + SHRINK) * power).clamp_min(TINY)
    scale = torch.where(power > TINY, scale, 1.0).to(norm.bias.device)
    with torch.no_grad():
        norm.bias.copy_(centre.to(scale) + (norm.bias - mean.to(scale)) * scale)
        norm.weight.mul_(scale)
    return 2 * len(mean)


def _norm_outputs(model: nn.Module, images: Tensor, *, dense: bool) -> tuple[str, Tensor]:
    """Return the name of the last layer norm and, of what it gives, the answer's [N, C] or all patches' [N, P, C]."""
    host, entry = find_host(model)
    prefix, seen, found, name = entry.shapes(host)[-1].prefix, list[tuple[str, Tensor]](), list[Tensor](), ""

    def noting(name: str) -> Any:
        return lambda module, inputs, out: seen.append((name, out))

    norms = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.LayerNorm) and one.bias is not None]
    handles = [module.register_forward_hook(noting(name)) for name, module in norms]
    try:
        with torch.no_grad():
            for batch in _batches(model, images):
                seen.clear()
                patches = _outputs(model, batch, dense=dense)[-1]
                name, out = _last(seen, prefix, dense=dense)
                found.append((patches if dense else out.reshape(len(batch), -1, out.shape[-1])[:, 0]).cpu().double())
    finally:
        for handle in handles:
            handle.remove()
    return name, torch.cat(found)


def _last(seen: Sequence[tuple[str, Tensor]], prefix: int, *, dense: bool) -> tuple[str, Tensor]:
    """Return the last layer norm that ran on all tokens (``dense``), or on what becomes the answer."""
    if dense:
        seen = [(name, out) for name, out in seen if out.dim() == 3 and out.shape[1] > max(prefix, 1)]
    if not seen:
        raise ValueError("no layer norm with scale and bias ran on the tokens; use how='distil'")
    name, out = seen[-1]
    if not dense and out.dim() == 3 and out.shape[1] > 1 and prefix == 0:
        raise ValueError("the last layer norm is before a pooling of all tokens; use how='distil', or measure='dense'")
    return name, out


# ------------------------------------------------------------------------------------------------ distillation
@dataclass(frozen=True)
class Until:
    """The end of a distillation: a time or, without one, a number of steps."""

    minutes: float | None
    steps: int

    def reached(self, step: int, seconds: float) -> float:
        """Return the share that is done, 1 or more at the end."""
        return step / self.steps if self.minutes is None else seconds / (60 * max(self.minutes, TINY))


def passes(images: int) -> int:
    """Return the number of steps of a distillation without a limit."""
    return EPOCHS * max(1, images // BATCH)


def distil(
    model: nn.Module, base: nn.Module, images: Tensor, fitted: Sequence[nn.Parameter], until: Until, *, dense: bool
) -> int:
    """Train parameters with AdamW so that answers (or features of prefix and patches) meet the unreduced model's.

    The loss is 1 - cosine; of logits, the cross-entropy with the unreduced model's probabilities. The learning rate rises over
    the first tenth, and falls as a cosine.

    Returns:
        The number of steps that were made.
    """
    with torch.no_grad():
        parts = [_outputs(base, batch, dense=dense) for batch in _batches(base, images)]
    targets = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    has_head = not dense and getattr(find_host(base)[0], "num_classes", 0) > 0
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(fitted, lr=RATE, weight_decay=0.0)
    order, step, begin = torch.Generator().manual_seed(0), 0, time.monotonic()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in fitted:
            parameter.requires_grad_(True)
        with torch.enable_grad(), ticking(until.steps if until.minutes is None else 0, "distilling", "step") as tick:
            while (done := until.reached(step, time.monotonic() - begin)) < 1:
                chosen = torch.randperm(len(images), generator=order)[:BATCH]
                batch = next(_batches(model, images[chosen]))
                loss = _loss(_outputs(model, batch, dense=dense), [one[chosen] for one in targets], has_head=has_head)
                optimizer.param_groups[0]["lr"] = RATE * (done / RISE if done < RISE else (1 + math.cos(math.pi * done)) / 2)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(fitted, CLIP)
                optimizer.step()
                step += 1
                tick()
    finally:
        optimizer.zero_grad()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return step


def _loss(outputs: Sequence[Tensor], targets: Sequence[Tensor], *, has_head: bool) -> Tensor:
    """Return the sum of the losses of all parts."""
    total = torch.zeros((), device=outputs[0].device)
    for out, target in zip(outputs, targets, strict=True):
        if out.shape[1] == 0:
            continue
        target = target.to(out.device)
        if target.shape[1] != out.shape[1]:
            target = resized(target, out.shape[1])
        one = F.cross_entropy(out, target.softmax(1)) if has_head else (1 - F.cosine_similarity(out, target, dim=-1)).mean()
        total = total + one
    return total
