"""Fidelity: the distance between the outputs of a reduced model and the unreduced one, image by image."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.analysis.intervals import NORMAL, wilson
from laconic.core.schedule import Schedule
from laconic.planning.space import ScheduleSpace
from laconic.planning.timing import reduced


@dataclass(frozen=True)
class Answers:
    """Results of one model for each image: the distance to the unreduced model's output, whether the top class agrees with
    it, and whether the top class is correct (None without labels).

    The distance is KL(unreduced || reduced) of class probabilities in nats, or 1 - cosine for a model without a head.
    """

    distance: tuple[float, ...]
    agrees: tuple[bool, ...]
    correct: tuple[bool, ...] | None

    def judged(self, name: str, schedule: Schedule, macs: int, share: float | None) -> Judged:
        """Average over the images; ``share`` is the predicted share of the unreduced model's time, None if unknown."""
        count = len(self.distance)
        agreement = sum(self.agrees) / count
        top1 = None if self.correct is None else sum(self.correct) / count
        right = None if self.correct is None else wilson(sum(self.correct), count)
        spans = (agreement, wilson(sum(self.agrees), count), top1, right)
        return Judged(name, schedule, macs, share, count, Mean.of(self.distance), *spans)


@dataclass(frozen=True)
class Mean:
    """A mean over images, with half the width of its 95 % confidence interval (normal approximation)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Compute the mean and interval of one or more values."""
        deviation = statistics.stdev(values) if len(values) > 1 else math.inf
        return cls(statistics.fmean(values), NORMAL * deviation / math.sqrt(len(values)))


@dataclass(frozen=True)
class Judged:
    """A schedule's fidelity on some images, with 95 % confidence intervals (Wilson's for agreement and top-1).

    ``share`` is its predicted time as a share of the unreduced model's.
    """

    name: str
    schedule: Schedule
    macs: int
    share: float | None
    images: int
    distance: Mean
    agreement: float
    agreement_interval: tuple[float, float]
    top1: float | None
    top1_interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        fields = {**vars(self), "schedule": self.schedule.to_json(), "distance": vars(self.distance)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def difference(one: Answers, other: Answers) -> tuple[Mean, Mean | None]:
    """Return the mean differences ``one`` - ``other``, paired by image: of the distance, and of top-1 (None without labels)."""
    distance = Mean.of([a - b for a, b in zip(one.distance, other.distance, strict=True)])
    if one.correct is None or other.correct is None:
        return distance, None
    return distance, Mean.of([float(a) - float(b) for a, b in zip(one.correct, other.correct, strict=True)])


class Fidelity:
    """Run reduced copies of a model on images, and compare their outputs with those of the unreduced model.

    Args:
        space: the model and the method.
        images: [N, channels, height, width] (of clips: [N, frames, channels, height, width]), preprocessed for the model; at
            least two.
        labels: [N], class indices.
        batch_size: images per forward.

    Raises:
        ValueError: fewer than two images, another number of labels than images, or a model whose output is not
            logits or features [N, C].
    """

    def __init__(self, space: ScheduleSpace, images: Tensor, labels: Tensor | None = None, batch_size: int = 64) -> None:
        if not isinstance(images, Tensor) or not space.entry.takes(images) or len(images) < 2:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a batch of two or more {space.entry.input_axes.replace('B', 'N')}, not {found}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"there are {len(images)} images and {len(labels)} labels; give a label for each image, or none")
        self.space, self.images, self.labels, self.batch_size = space, images, labels, batch_size
        self.features = getattr(space.model, "num_classes", None) == 0
        self.full = self._outputs(space.model)

    def _outputs(self, model: nn.Module) -> Tensor:
        reference = next(model.parameters())
        out = []
        with torch.inference_mode():
            for batch in torch.split(self.images, self.batch_size):
                output = model.eval()(batch.to(reference.device, reference.dtype))
                output = getattr(output, "logits", output)
                if not isinstance(output, Tensor) or output.dim() != 2:
                    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                    raise ValueError(
                        f"expected logits or features [images, C] from the model, got {found}; plan without images"
                    )
                out.append(output.double().cpu())
        return torch.cat(out)

    def __call__(self, schedule: Schedule) -> Answers:
        """Run the model under a schedule, and compare it with the unreduced model.

        Raises:
            ValueError, LookupError: as `laconic.reduce_`.
        """
        own, full = self._outputs(reduced(self.space, schedule)), self.full
        if self.features:
            distance = 1 - F.cosine_similarity(own, full)
        else:
            distance = (full.softmax(1) * (full.log_softmax(1) - own.log_softmax(1))).sum(1)
        first = own.argmax(1)
        correct = None if self.labels is None else tuple((first == self.labels.cpu()).tolist())
        return Answers(tuple(distance.tolist()), tuple((first == full.argmax(1)).tolist()), correct)
