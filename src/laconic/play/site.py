"""Write the playground: the page, its graphs and weights, the runtime and some pictures, as static files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from laconic.analysis.macs import summary
from laconic.core.backbone import find_host
from laconic.core.files import write_atomically
from laconic.core.token_reduction import find_reduction
from laconic.data.classes import names_of
from laconic.data.preprocessing import config_for
from laconic.play.graphs import WEIGHTS, Weights, compressed, has_head
from laconic.play.runtime import write_runtime
from laconic.report.page import STATIC as REPORT

STATIC = Path(__file__).parent / "static"
MANIFEST = "playground.json"


@dataclass(frozen=True)
class Example:
    """A picture of the playground: as the model takes it [channels, height, width], and to show [height, width, 3]."""

    name: str
    pixels: Tensor
    picture: NDArray  # of bytes


@dataclass(frozen=True)
class Reduced:
    """A method at a keep rate, and the model that it reduces."""

    method: str
    title: str
    keep: float
    model: nn.Module


def write(
    folder: Path,
    name: str,
    base: nn.Module,
    reduced: Iterable[Reduced],
    examples: Sequence[Example],
    notes: list[str],
    *,
    classes: Sequence[str] = (),
    runtime: Path | None = None,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a playground to a folder; return its manifest, which is written last.

    Args:
        folder: the folder; files of the same names in it are replaced.
        name: the name of the model.
        base: the unreduced model of timm.
        reduced: copies of it under methods, those of a method one after the other.
        examples: one picture or more; on the first of them every graph must give PyTorch's maps.
        notes: notes on methods that are left out; it gets those on graphs that cannot be traced or differ from PyTorch.
        classes: names of the model's outputs; by default those that it was trained with.
        runtime: the folder of onnxruntime-web's files (default: the cache, or npm).
        facts: further entries of the manifest.

    Raises:
        Refusal: the runtime cannot be had, or a file cannot be written.
        ValueError: the unreduced model cannot be traced, or differs from PyTorch in its graph.
    """
    size = write_runtime(folder / "runtime", runtime)
    weights, first, methods = Weights(), examples[0].pixels[None], list[dict[str, Any]]()
    whole, size = _graph(folder, "unreduced", base, first, weights, size)
    for one in reduced:
        try:
            graph, size = _graph(folder, f"{one.method}-{one.keep:g}", one.model, first, weights, size)
        except ValueError as error:
            notes.append(f"no {one.method} at {one.keep:g}: {error}")
            continue
        if not methods or methods[-1]["name"] != one.method:
            methods.append({"name": one.method, "title": one.title, "rates": []})
        methods[-1]["rates"].append({"keep": one.keep, **graph})
    write_atomically(folder / WEIGHTS, bytes(weights.content))
    pictures = [_picture(folder, number, example) for number, example in enumerate(examples)]
    for file in (STATIC / "index.html", STATIC / "play.css", STATIC / "play.js", REPORT / "page.css"):
        write_atomically(folder / file.name, file.read_bytes())
        size += file.stat().st_size
    host, entry = find_host(base)
    config = config_for(base)
    manifest = {
        "model": name,
        "image": list(entry.example(host).shape[2:]),
        "grid": list(entry.shapes(host)[0].grid),
        **{value: list(config[value]) for value in ("mean", "std")},
        "crop": config["crop_pct"],
        "head": has_head(base),
        "classes": list(names_of(base) or classes) if has_head(base) else [],
        "weights": {"file": WEIGHTS, "bytes": len(weights.content)},
        "unreduced": whole,
        "methods": methods,
        "pictures": [{"file": file, "name": title} for file, title, _ in pictures],
        **(facts or {}),
    }
    size += len(weights.content) + sum(more for _, _, more in pictures)
    manifest |= {"bytes": size, "notes": notes}
    write_atomically(folder / MANIFEST, json.dumps(manifest) + "\n")
    return manifest


def _graph(
    folder: Path, stem: str, model: nn.Module, example: Tensor, weights: Weights, size: int
) -> tuple[dict[str, Any], int]:
    """Write the graph of a model; return its entry in the manifest, and the bytes written until now."""
    content = compressed(model, example, weights)
    file, cost, reduction = f"graphs/{stem}.onnx.gz", summary(model), find_reduction(model)
    write_atomically(folder / file, content)
    blocks = [] if reduction is None else list(reduction.schedule.at)
    start = cost.tokens[0] if reduction is None else math.prod(reduction.grid)
    entry = {"graph": file, "macs": cost.macs, "tokens": [start, *(cost.tokens[block] for block in blocks)], "blocks": blocks}
    return entry, size + len(content)


def _picture(folder: Path, number: int, example: Example) -> tuple[str, str, int]:
    """Write a picture as PNG, as the model sees it; return its file, its name and its bytes."""
    from PIL import Image

    content, file = io.BytesIO(), f"pictures/{number + 1}.png"
    Image.fromarray(example.picture).save(content, format="png", optimize=True)
    write_atomically(folder / file, content.getvalue())
    return file, example.name, len(content.getvalue())


def exact_pixels(picture: NDArray, model: nn.Module) -> Tensor:
    """Return a picture of bytes [H, W, 3] as the page gives it to the model, [3, H, W]; equal to PyTorch's in every bit."""
    config = config_for(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255 - mean) / std
