"""Images of a training run: those of training and of validation, with the same classes and without a common image."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laconic.core.files import Refusal
from laconic.data import ImageSet, Labelling, Part, Report, find_data, open_images
from laconic.data.classes import fingerprint
from laconic.data.folder import SPLITS, plain_split
from laconic.data.held_out import hold_out
from laconic.data.labelling import with_classes
from laconic.data.layout import some
from laconic.training.recipe import DataPart, Recipe

LOG = logging.getLogger(__name__)
OR_ELSE = (
    "--set data.val_share=0.2 holds out a fifth of each class for validation, by the seed; --set data.val= trains on all of it "
    "without validation"
)


def open_train_input(recipe: Recipe, data: str, labelling: Labelling) -> tuple[ImageSet, ImageSet | None]:
    """Open the images of training and of validation (None: without validation).

    Raises:
        Refusal: no data is given, both would be the same images, or all images are of one class.
        ValueError, FileNotFoundError, ImportError: as `laconic.data.open_images`; validation has other classes.
    """
    name, root = find_data(data) if data else (recipe.data.name, None)
    if not name and root is None:
        raise Refusal("--data: this recipe trains on a folder of images; give one with train and val in it")
    part = recipe.data
    val: ImageSet | None
    _check_splits(root, part)
    if part.val_share:
        whole = open_images(name, part.train, root, labelling=labelling)
        kept, held = hold_out(whole, part.val_share, recipe.seed)
        train, val = _limited(kept, part.train_images), _limited(held, part.val_images)
    else:
        train = open_images(name, part.train, root, part.train_images, labelling=labelling)
        found = open_images(name, part.val, root, part.val_images, labelling=labelling) if part.val else None
        _check_apart(train, found, part, root)
        _check_no_common_file(train, found, part)
        val = None if found is None else with_classes(found, train.classes, "the training images")
    if len(used := set(train.labels_of_all())) < 2:
        raise Refusal(
            f"all {len(train):,} training images are of one class ({train.classes[used.pop()]}), so there is nothing to tell "
            f"apart; expected a folder for each class in {data or name}. --class-folder top takes the first folder as the class"
        )
    return train, val


def _limited(images: ImageSet, limit: int) -> ImageSet:
    return Part(images, limit) if 0 < limit < len(images) else images


def _check_splits(root: Path | None, part: DataPart) -> None:
    """Refuse a folder with a training split only, and a share to hold out where there is a validation split."""
    if root is None or not root.is_dir() or not part.val:
        return
    folders = {
        split: [one for one in (split, *SPLITS.get(plain_split(split), ())) if (root / one).is_dir()]
        for split in (part.train, part.val)
    }
    if part.val_share and folders[part.val]:
        raise Refusal(
            f"data.val_share holds out training images, and {root} has the folder {folders[part.val][0]} for validation; set "
            "data.val_share=0, or move that folder away"
        )
    if not part.val_share and folders[part.train] and not folders[part.val]:
        raise Refusal(f"{root} has the folder {folders[part.train][0]} and none for validation ({part.val}). {OR_ELSE}")


def _check_apart(train: ImageSet, val: ImageSet | None, part: DataPart, root: Path | None) -> None:
    """Refuse validation on the images of training, unless the recipe names the same split for both."""
    if val is None or part.val == part.train or not train.source or train.source != val.source:
        return
    above = None if root is None else root.resolve().parent
    is_split = root is not None and plain_split(root.resolve().name) in SPLITS
    other = f" (or did you mean --data {above}, which has the folders of the splits?)" if is_split else ""
    raise Refusal(
        f"{train.source} is not divided into splits: training and validation would both read the same {len(val):,} images, and "
        f"the accuracy would be that of images trained on{other}. Make a folder for each split, {part.train} and {part.val}, "
        f"or: {OR_ELSE}"
    )


def _check_no_common_file(train: ImageSet, val: ImageSet | None, part: DataPart) -> None:
    """Refuse validation on files that links bring into training too, unless the recipe names the same split for both."""
    if val is None or part.val == part.train:
        return
    held = {val.real_file(i) for i in range(len(val))} - {""}
    common = [i for i in range(len(train)) if train.real_file(i) in held] if held else []
    if common:
        raise Refusal(
            f"{len(common):,} images of training are images of validation too, by links ({some([*map(train.name, common)])}): "
            "the accuracy would be that of images trained on; remove the links from one of them, or name the same split for "
            f"both (--set data.val={part.train})"
        )


def data_facts(record: Mapping[str, Any], val: ImageSet | None) -> dict[str, Any]:
    """Return the facts that a resumed run must find again: class names, and the fingerprints of both sets."""
    facts = {"classes": record["classes"], "train": record["trained_on"]}
    return facts if val is None else {**facts, "val": fingerprint(val)}


def reports(train: ImageSet, val: ImageSet | None) -> dict[str, Report]:
    """Return the report on each set, by its use."""
    return {"training": Report.of(train)} | ({} if val is None else {"validation": Report.of(val)})


def say(found: Mapping[str, Report], where: str) -> None:
    """Log the images of each set, before the first step."""
    for use, report in found.items():
        LOG.info("images for %s, from %s: %s.", use, where, ". ".join(report.lines()))
    if "validation" not in found:
        LOG.info("no images for validation.")
