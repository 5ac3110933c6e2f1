"""Input of the demo: a model with its weights, and labelled images or, if none are given, photographs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from laconic.analysis import evaluate
from laconic.analysis.timing import DTYPES, Setting
from laconic.cli import agreement, image_io
from laconic.cli.agreement import Agreement, Judged
from laconic.cli.eval_input import GENERATED, Reading, open_eval_input
from laconic.cli.image_io import Photo
from laconic.cli.patch_outcomes import Count, counting, object_patches
from laconic.cli.variants import Variant
from laconic.cli.weights import Loaded, load
from laconic.core.backbone import find_host
from laconic.core.files import Refusal
from laconic.core.token_reduction import find_reduction
from laconic.data import ImageSet, Unreadable
from laconic.models.scenes import default_cfgs

BATCH = 100  # images in a forward where nothing is timed


@dataclass(frozen=True)
class DemoInput:
    """A model and its images."""

    name: str
    loaded: Loaded
    images: ImageSet | None  # labelled ones
    read: tuple[Photo, ...]  # drawn and, without labelled images, compared
    line: str  # the images, in words
    notes: tuple[str, ...]
    trained: bool  # True if the model has the weights that scorers were trained for


def open_demo_input(model: str, data: str, split: str, images: int, weights: Path | None, pictures: int) -> DemoInput:
    """Open a model and its images: those of ``data``; without data the scenes for a model of ours, else photographs.

    Raises:
        Refusal: no such model, weights that are not its own, no photographs, no image that can be read.
        ValueError, FileNotFoundError, ImportError: as `laconic.data.open_images`.
    """
    if Path(model).is_dir():
        raise Refusal(f"{model} is a directory, and the demo takes timm names; laconic eval and laconic show take directories")
    data = data or ("scenes" if model.partition(".")[0] in default_cfgs else "")
    if not data:
        loaded = load(model, weights)
        shipped = image_io.shipped(pictures)
        sources = "; ".join(f"{path.name}, {source}" for path, source in shipped.items())
        read = tuple(image_io.read(path, loaded.model) for path in shipped)
        return DemoInput(model, loaded, None, read, f"photographs, as scikit-image ships them: {sources}", (), False)
    split = split or ("test" if data in GENERATED else "val")
    eval_input = open_eval_input(model, data, Reading(split, images, workers=0), weights)
    line = f"the weights of {model} come with laconic" if _ours(model, eval_input.pretrained) else eval_input.weights
    loaded = Loaded(eval_input.base, line, eval_input.random)
    known = eval_input.images
    what = "; ".join([f"{data}, {split}: {len(known):,} images of {len(known.classes):,} classes", *known.notes])
    read = _first(eval_input.images, pictures, loaded)
    return DemoInput(model, loaded, eval_input.images, read, what, tuple(eval_input.notes), eval_input.pretrained)


def _ours(name: str, pretrained: bool) -> bool:
    return pretrained and name.partition(".")[0] in default_cfgs


def _first(images: ImageSet, count: int, loaded: Loaded) -> tuple[Photo, ...]:
    """Return the first images of a set that can be read."""
    out = list[Photo]()
    for number in range(len(images)):
        if len(out) == count:
            break
        try:
            out.append(image_io.prepare(images.name(number), images.load(number), loaded.model))
        except Unreadable:
            continue
    if not out:
        raise Refusal(
            f"none of {len(images):,} images can be read; --data takes a folder of images with a folder for each class"
        )
    return tuple(out)


# ------------------------------------------------------------------------------------------------ answers
def judge(demo_input: DemoInput, variants: Sequence[Variant], unrelated: set[str], setting: Setting) -> list[Judged]:
    """Return the quality of each variant's answers, the first being the unreduced model; empty for unrelated models."""
    if demo_input.images is None:
        return [Judged(found) for found in _agreement(demo_input.read, variants, unrelated)]
    host, entry = find_host(variants[0].model)
    rows, columns = entry.grid(host)
    shown, full, out = object_patches(demo_input.images, (rows, columns)), None, list[Judged]()
    for variant in tqdm(variants, desc="evaluating", unit="row", leave=False, disable=None):
        if variant.name in unrelated:
            out.append(Judged())
            continue
        model = variant.model.to(setting.place, DTYPES[setting.dtype])
        count: AbstractContextManager[Count | None] = nullcontext()
        if shown is not None and find_reduction(model) is not None:
            count = counting(model, shown)
        with count as counted:
            said = evaluate.answers(model, demo_input.images, batch_size=BATCH, reference=full, keep_logits=full is None)
        found = said.accuracy
        same = Agreement(None, 0.0, 1.0) if full is None else Agreement(None, found.divergence, found.agreement)
        out.append(Judged(same, found, counted.outcomes if counted else None))
        full = full or said
    return out


def _agreement(read: Sequence[Photo], variants: Sequence[Variant], unrelated: set[str]) -> list[Agreement]:
    """Return the agreement of each variant with the first, on photographs."""
    full = agreement.answers(variants[0].model, read, variants[0].image)
    out = [Agreement(1.0, 0.0, 1.0)]
    for variant in variants[1:]:
        if variant.name in unrelated:
            out.append(Agreement())
            continue
        smaller = variant.kind == "smaller"  # it may want its images prepared in another way
        own = [image_io.prepare(p.name, p.image, variant.model) for p in read] if smaller else read
        out.append(agreement.agree(agreement.answers(variant.model, own, variant.image), full))
    return out
