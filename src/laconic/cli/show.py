"""``laconic show``: pictures of the outcome of every patch of a photograph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from laconic.analysis.evaluate import config_for
from laconic.analysis.provenance import Provenance, provenance
from laconic.cli import draw, image_io
from laconic.cli.image_io import Photo
from laconic.cli.models import open_model
from laconic.cli.output import Report, Table, sentence
from laconic.cli.outputs import holds
from laconic.cli.variants import Variant, pairs, parse_methods, reduced
from laconic.cli.weights import load
from laconic.core.files import Refusal
from laconic.core.token_reduction import find_reduction

MODEL = "deit_small_patch16_224"


@dataclass(frozen=True)
class Picture:
    """One written file and its content."""

    file: Path
    image: str
    method: str
    keep: str  # the rate, "as saved", or "as it decides"
    tokens: tuple[int, ...]  # patch tokens at the start, then after each block that reduces


@dataclass(frozen=True)
class ShowReport(Report):
    """The pictures that were written."""

    weights: str
    pictures: tuple[Picture, ...]

    def parts(self) -> Iterator[str | Table]:
        yield self.weights
        rows = tuple((p.image, p.method, p.keep, " ".join(map(str, p.tokens)), str(p.file)) for p in self.pictures)
        yield Table(
            "Token maps",
            ("image", "method", "keep", "patch tokens", "picture"),
            rows,
            words=5,
            below=("picture", "patch tokens"),
        )

    def to_json(self) -> dict[str, Any]:
        pictures = [{**vars(p), "file": str(p.file), "tokens": list(p.tokens)} for p in self.pictures]
        return {"weights": self.weights, "pictures": pictures}


@holds(folder="output")
def show(
    images: tuple[Path, ...],
    /,
    *,
    model: str = MODEL,
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
    weights: Path | None = None,
    output: Path = Path("laconic-show"),
) -> ShowReport:
    """Draw the outcome of every patch of a photograph.

    One picture for every image, method and keep rate: the crop that the model saw, then each reducing stage. Patches that
    share a token have their mean colour and an outline, a patch with a token of its own is unchanged, dropped ones are dark.

    Args:
        images: image files.
        model: timm name, or a directory that laconic.save wrote (then its own method is drawn).
        method: a method to draw (default: bat).
        keep: keep rate of every reducing block (default: 0.7).
        options: option of the methods, as NAME=VALUE or METHOD.NAME=VALUE.
        weights: weights of the model, a .safetensors file or a checkpoint of torch (default: timm's pretrained ones).
        output: directory for the pictures.

    Raises:
        Refusal: no images, not an image, no such model, weights that do not fit, a file that cannot be written.
        LookupError, TypeError, ValueError: as `laconic.reduce_`.
    """
    if not images:
        raise Refusal("give at least one image file, e.g. laconic show photo.jpg --method bat")
    base, line, remark = _open(model, weights)
    size = config_for(base)["input_size"]  # of the model as it is, which a run may have trained at another size
    read = [replace(image_io.read(path, base, size), image=None) for path in images]  # only the crops are drawn
    saved = find_reduction(base)
    if saved is not None:
        if method or keep or options:
            raise Refusal(f"{model} is reduced by {saved.config.info.name} already; leave out --method, --keep and --options")
        models = [(saved.config.info.name, "as saved", base)]
    else:
        configs = parse_methods(method or ("bat",), options)
        chosen = pairs(configs, keep or (0.7,))
        models = [(c.info.name, _rate(k), reduced(base, c, k).model) for c, k in chosen]
    pictures = list[Picture]()
    names = unique([path.stem for path in images])
    for name, rate, reduced_model in models:
        history = look(reduced_model, read)
        for number, (photo, stem) in enumerate(zip(read, names, strict=True)):
            file = output / f"{stem}-{name}-{rate.replace(' ', '-')}.png"
            pictures.append(draw_one(file, photo, history, number, name, rate, remark))
    return ShowReport(line, tuple(pictures))


def _open(name: str, file: Path | None) -> tuple[nn.Module, str, str]:
    """Return the model, a line on its weights, and a remark on them for the pictures."""
    if Path(name).is_dir():
        if file is not None:
            raise Refusal(f"{name} holds weights already; leave out --weights, or give the model's timm name")
        return open_model(name), f"the weights come from {name}", ""
    loaded = load(name, file)
    return loaded.model, loaded.line, loaded.remark


def look(model: nn.Module, read: Sequence[Photo]) -> Provenance:
    """Run a reduced model on photographs; return the provenance of their patches."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        model(torch.stack([photo.pixels for photo in read]).to(device))
    return provenance(model)


def draw_one(file: Path, photo: Photo, history: Provenance, number: int, method: str, rate: str, remark: str = "") -> Picture:
    """Write the token map of one photograph, the ``number``-th of the batch, under one method."""
    stages = draw.maps(history, number)
    patches = history.final.where.shape[1]
    tokens = (patches, *(stage.tokens for stage in stages))
    titles = ["input", *(f"after block {stage.block}" for stage in stages)]
    keep = f"keep {rate}" if rate[0].isdigit() else rate
    heading = f"{method}, {keep}: {' → '.join(map(str, tokens))} tokens{remark}"
    draw.save_sheet(file, [draw.token_maps(photo.picture, stages)], titles, heading)
    return Picture(file, photo.name, method, rate, tokens)


def _rate(keep: float | None) -> str:
    """Return a keep rate in words."""
    return "as it decides" if keep is None else f"{keep:g}"


def draw_all(folder: Path, variants: Sequence[Variant], read: Sequence[Photo], remark: str) -> tuple[Path, list[Picture]]:
    """Draw every stage for each method and image, and a sheet with the last stage of all of them."""
    pictures, panels = list[Picture](), [list[Any]() for _ in read]
    stems = unique([photo.stem for photo in read])
    for variant in tqdm(variants, desc="drawing", unit="method", leave=False, disable=None):
        history = look(variant.model, read)
        for number, photo in enumerate(read):
            file = folder / f"{stems[number]}-{variant.name}-{_rate(variant.keep).replace(' ', '-')}.png"
            pictures.append(draw_one(file, photo, history, number, variant.name, _rate(variant.keep), remark))
            maps = draw.token_maps(photo.picture, draw.maps(history, number))
            panels[number] += [maps[-1]] if panels[number] else [maps[0], maps[-1]]
    titles = [f"{variants[0].tokens[0]} patches", *(f"{v.name}: {v.tokens[-1]} tokens" for v in variants)]
    rates = sentence(list(dict.fromkeys(_rate(variant.keep) for variant in variants)))
    heading = f"keep {rates} at {len(variants[0].tokens) - 1} blocks: remaining tokens{remark}"
    return draw.save_sheet(folder / "token-maps.png", panels, titles, heading), pictures


def unique(stems: Sequence[str]) -> list[str]:
    """Return the names, with a number after those that repeat."""
    return [f"{s}-{i}" if stems.count(s) > 1 else s for i, s in enumerate(stems, 1)]
