"""Score a reduced model on every image: by its answer, dense features, labels, or a user's own measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.analysis.fidelity import class_cosine, patch_cosine
from laconic.analysis.provenance import restore_dense
from laconic.core.backbone import find_host
from laconic.core.shape_types import Float, Int
from laconic.core.token_reduction import find_reduction

Kind = Literal["same-answer", "dense", "labels", "pairs"]
KINDS: tuple[Kind, ...] = ("same-answer", "dense", "labels", "pairs")
Scored = Callable[[nn.Module, Tensor], Tensor]  # a measure of the user's: model and images -> a score of every image
WORDS = {
    "same-answer": "same answer",
    "dense": "patch features",
    "labels": "right label",
    "pairs": "pair found",
}


class Measure:
    """The score of every image under a model, from 0 or less to 1 in most measures; higher is better.

    ``same-answer``: cosine of the feature to the unreduced model's; for a model with a classification head, the share of
    probability that the two models have in common (1 minus the total variation distance). ``dense``: cosine of the (restored)
    patch features to the unreduced model's, mean over the patches. ``labels``: 1 if the label is right, else 0: of the
    head, or, for a model without one, of the nearest other image. ``pairs``: 1 if the nearest other image has the same label;
    images that belong together share a label. A callable gets a model and a batch of images that fit its input size.

    Args:
        base: the unreduced model, in evaluation mode. It runs when its outputs are first needed, so it must not change before.
        images: [N, channels, height, width], preprocessed for ``base``; resized for models of another input size.
        labels: [N], for ``labels`` and ``pairs``.
        kind: a name above, or a callable.
        batch_size: images per forward.

    Raises:
        ValueError: labels are missing, there are fewer than two images, or the model's output is not what the measure needs.
    """

    def __init__(
        self, base: nn.Module, images: Tensor, labels: Tensor | None, kind: Kind | Scored, batch_size: int = 16
    ) -> None:
        if not isinstance(images, Tensor) or images.dim() != 4 or len(images) < 2:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a batch of two or more [N, channels, height, width], not {found}")
        if not callable(kind) and kind not in KINDS:
            raise ValueError(f"measure must be a callable or one of {', '.join(KINDS)}, not {kind!r}")
        if kind in ("labels", "pairs") and labels is None:
            raise ValueError(f"measure {kind!r} needs a label of every image; give labels=, or measure='same-answer'")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"there are {len(images)} images and {len(labels)} labels; give a label of every image")
        self.base, self.images, self.labels, self.kind, self.batch_size = base, images, labels, kind, batch_size
        self.has_head = getattr(find_host(base)[0], "num_classes", 0) > 0 and kind != "pairs"
        self.compares = kind in ("same-answer", "dense")  # scores compare outputs with the unreduced model's
        # the score of an image does not depend on the other images, as it does where the nearest other image counts
        self.by_image = self.compares or (kind == "labels" and self.has_head)
        self.known: Tensor | None = None  # outputs of the unreduced model for the first images
        if self.compares:
            self.references(batch_size)  # an output of another kind is refused here

    def references(self, count: int | None = None) -> Tensor:
        """Return the outputs of the unreduced model for the first ``count`` images (default: all), each computed once."""
        count = len(self.images) if count is None else min(count, len(self.images))
        start = 0 if self.known is None else len(self.known)
        if start < count:
            more = self.outputs(self.base, None, count, start)
            self.known = more if self.known is None else torch.cat([self.known, more])
        assert self.known is not None
        return self.known[:count]

    @property
    def name(self) -> str:
        """The name of the measure, or of the callable."""
        return self.kind if isinstance(self.kind, str) else str(getattr(self.kind, "__name__", "callable"))

    def __call__(
        self, model: nn.Module, sides: tuple[int, int] | None = None, count: int | None = None, start: int = 0
    ) -> Float[Tensor, " N"]:
        """Return the scores of the images ``start`` to ``count`` (default: all) under a model.

        Args:
            model: a reduced or unreduced model, in evaluation mode.
            sides: height and width of its input; None: that of the images.
            count: number of images, counted from the first.
            start: the images to leave out; 0 if the score of an image depends on the others (`by_image` is False).
        """
        if callable(self.kind):
            images = resized_images(self.images[start:count], sides)
            found = [self.kind(model, batch).double().cpu() for batch in torch.split(images, self.batch_size)]
            return torch.cat(found)
        return self.score(self.outputs(model, sides, count, start), start)

    def score(self, out: Tensor, start: int = 0) -> Float[Tensor, " N"]:
        """Return the scores of the images from ``start`` on from what a model returned for them (see `outputs`)."""
        if self.compares:
            base = self.references(start + len(out))[start:]
            if self.kind == "dense":
                return patch_cosine(base, out).double()
            if self.has_head:
                return 1 - (base.softmax(1) - out.softmax(1)).abs().sum(1) / 2
            return class_cosine(base, out).double()
        assert self.labels is not None
        labels = self.labels[start : start + len(out)].cpu()
        found_labels = out.argmax(1) if self.has_head else labels[nearest_other(out)]
        return (found_labels == labels).double()

    def outputs(
        self, model: nn.Module, sides: tuple[int, int] | None = None, count: int | None = None, start: int = 0
    ) -> Tensor:
        """Return features or logits [N, C] of images, or patch features [N, P, C] for ``dense``, on the CPU."""
        images, reference, found = resized_images(self.images[start:count], sides), next(model.parameters()), []
        with torch.inference_mode():
            for batch in torch.split(images, self.batch_size):
                batch = batch.to(reference.device, reference.dtype)
                out = patch_features(model, batch) if self.kind == "dense" else answer_of(model, batch)
                found.append(out.float().cpu() if self.kind == "dense" else out.double().cpu())
        return torch.cat(found)


def answer_of(model: nn.Module, images: Tensor) -> Float[Tensor, "B C"]:
    """Return the logits or features that a model answers with.

    Raises:
        ValueError: it answers with something else.
    """
    out: Any = model(images)
    for name in ("logits", "image_embeds", "pooler_output"):
        found = getattr(out, name, None)
        if isinstance(found, Tensor) and found.dim() == 2:
            return found
    if not isinstance(out, Tensor) or out.dim() != 2:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"expected logits or features [B, C] from the model, got {found}; give measure='dense' or a callable")
    return out


def patch_features(model: nn.Module, images: Tensor) -> Float[Tensor, "B P C"]:
    """Return the features of all patches; those of a reduced model are restored.

    Raises:
        ValueError: the model does not return its tokens.
    """
    return token_features(model, images)[1]


def token_features(model: nn.Module, images: Tensor) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B P C"]]:
    """Return the features of the prefix tokens and of all patches; those of a reduced model are restored.

    Raises:
        ValueError: the model does not return its tokens.
    """
    host, entry = find_host(model)
    run: Any = getattr(host, "forward_features", host)
    out = run(images)
    out = getattr(out, "last_hidden_state", out)
    if not isinstance(out, Tensor) or out.dim() != 3:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"expected the tokens [B, N, C] of the model, got {found}; give measure='same-answer' or a callable")
    reduction, prefix = find_reduction(model), entry.shapes(host)[-1].prefix
    if reduction is None or reduction.restore:
        return out[:, :prefix], out[:, prefix:]
    return out[:, :prefix], restore_dense(model, out, fill="nearest")


def nearest_other(features: Float[Tensor, "N C"]) -> Int[Tensor, " N"]:
    """Return the nearest other row of every row, by the cosine of the rows less their mean."""
    unit = F.normalize(features - features.mean(0), dim=1)
    likeness = unit @ unit.T
    return likeness.fill_diagonal_(-2).argmax(1)


def resized_images(images: Tensor, sides: tuple[int, int] | None) -> Tensor:
    """Return images of another height and width, resized bicubically with antialiasing."""
    if sides is None or tuple(images.shape[2:]) == sides:
        return images
    return F.interpolate(images.float(), size=sides, mode="bicubic", antialias=True).to(images.dtype)
