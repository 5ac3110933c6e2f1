"""`export`: write a model as a file for another runtime, and verify it against eager PyTorch.

All formats start from one `torch.export` program with static token counts and a batch of any size. A file is moved to its
path only after the target runtime reproduces the outputs of the eager model, on batches of several sizes. If the check
fails, no file is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from laconic.core.files import follow_umask, unfinished, writing
from laconic.exporting.graph import OPSET, TOPK_LIMIT, Graph, inspect, write_onnx
from laconic.exporting.half import HALF_TOLERANCE, halve
from laconic.exporting.int8 import quantize
from laconic.exporting.openvino import write_openvino
from laconic.exporting.parity import HALF_DIFFERS, HALF_NUDGE, NUDGE, OPSETS_DIFFER, TOLERANCE, Parity, prove, prove_arithmetic
from laconic.exporting.reading import ExportedFile, open_exported
from laconic.exporting.record import ExportReport
from laconic.exporting.runtimes import RUNTIMES, runner
from laconic.exporting.trace import Traced, trace, write_program

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml"}
Precision = Literal["float32", "fp16"]

__all__ = [
    "HALF_TOLERANCE",
    "OPSET",
    "RUNTIMES",
    "SUFFIXES",
    "TOLERANCE",
    "TOPK_LIMIT",
    "ExportReport",
    "ExportedFile",
    "Graph",
    "Parity",
    "Precision",
    "Traced",
    "export",
    "inspect",
    "open_exported",
    "quantize",
    "runner",
    "trace",
    "write",
]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    to: str = "onnx",
    *,
    batch: int | None = None,
    opset: int = OPSET,
    example: Tensor | None = None,
    tolerance: float | None = None,
    precision: Precision = "float32",
    classes: Sequence[str] | None = None,
    weights: str | None = None,
) -> ExportReport:
    """Write a model, reduced or not, as a file for another runtime, after verifying that both give the same outputs.

    The model is not changed: a copy that shares its weights is exported, in evaluation mode, in float32 on the CPU. The
    metadata of the file has the preprocessing of a timm model (mean, std, crop, interpolation), for `laconic eval`.

    Args:
        model: a model that `reduce_` supports, reduced or not; any other module if ``example`` is given.
        path: the file to write: ``.onnx``, ``.pt2`` for torch-export, ``.xml`` for openvino (plus a ``.bin`` next to it).
        to: onnx, torch-export or openvino.
        batch: images per batch; None allows any number.
        opset: ONNX operator set version, for onnx and openvino.
        example: an input [B, channels, height, width] of the size to export for; by default the model's own size.
        tolerance: the largest difference from the eager model in float32 that is allowed, as a share of its largest output
            (default: 1e-4, for fp16 2e-2).
        precision: float32, or fp16 for onnx and openvino: weights in half precision, images and outputs in float32.
        classes: names of the model's outputs, in order, for the metadata.
        weights: where the weights come from, for the metadata.

    Raises:
        TypeError: not a module.
        LookupError: an unknown format.
        ValueError: a wrong suffix, batch, tolerance, precision or list of classes, weights that are not float32, a method of
            variable counts, a model that torch cannot trace, or outputs that differ. No file is written then, and an existing
            file is not changed.
        Unwritable: the file cannot be written, or there is no room (the message has the sizes).
        ImportError: a library of the format is missing; the message names the extra.
    """
    _check(path, to, precision)
    traced = trace(model, example, batch, classes=classes, weights=weights)
    return write(traced, path, to, opset=opset, tolerance=tolerance, precision=precision)


def write(
    traced: Traced,
    path: str | os.PathLike[str],
    to: str,
    *,
    opset: int = OPSET,
    tolerance: float | None = None,
    precision: Precision = "float32",
    source: Path | None = None,
) -> ExportReport:
    """Write one format of a traced model, verify it, and move it to its path; arguments and errors as `export`.

    ``source`` is an ONNX file of the same trace in float32 and of the same opset, if there is one: it is converted, and the
    trace is not translated again.
    """
    path, half = _check(path, to, precision), precision == "fp16"
    if tolerance is None:
        tolerance = HALF_TOLERANCE if half else TOLERANCE
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0 (it is a share of the largest output), not {tolerance}")
    if half:
        arithmetic = prove_arithmetic(traced, tolerance)
        traced = dataclasses.replace(traced, use={**traced.use, "precision": precision, "fp16_arithmetic": arithmetic})
    size = _size(traced) * (2 if to == "openvino" or half else 1)  # with the ONNX file that it is made from
    with unfinished(path, size) as place, writing(path, size):
        file = place / path.name
        if to == "torch-export":
            write_program(traced, file)
        elif to == "onnx" and not half:
            write_onnx(traced, file, opset)
        else:
            _convert(traced, file, to, opset, source, size)
        graph = inspect(file) if to == "onnx" else None
        advice, nudge = (HALF_DIFFERS, HALF_NUDGE) if half else (OPSETS_DIFFER, NUDGE)
        parities = prove(traced, runner(file, to), RUNTIMES[to], tolerance, advice, nudge)
        written = sorted(place.iterdir(), key=lambda file: file.name == path.name)  # ``path`` last
        for part in written:
            follow_umask(part)
            os.replace(part, path.parent / part.name)
    paths = tuple(str(path.parent / part.name) for part in written)
    size = sum(Path(part).stat().st_size for part in paths)
    stated = None if to == "torch-export" else opset
    return ExportReport(to, paths, size, traced.batch, stated, traced.facts(), tolerance, tuple(parities), graph)


def _convert(traced: Traced, file: Path, to: str, opset: int, source: Path | None, size: int) -> None:
    """Convert an ONNX file in float32 (a new one without ``source``) to fp16 ONNX, or to OpenVINO."""
    with unfinished(file, size) as between:
        if source is None:
            source = between / "model.onnx"
            write_onnx(traced, source, opset)
        if to == "openvino":
            write_openvino(traced, source, file, opset)
        else:
            halve(source, file, traced.facts())


def _size(traced: Traced) -> int:
    """Return the bytes of all weights, of which a file has one copy."""
    return sum(tensor.nbytes for tensor in traced.model.state_dict().values())


def _check(path: str | os.PathLike[str], to: str, precision: Precision = "float32") -> Path:
    if to not in SUFFIXES:
        raise LookupError(f"no format is called {to!r}; there are {', '.join(SUFFIXES)}")
    path = Path(path)
    if path.suffix != SUFFIXES[to]:
        raise ValueError(f"{path}: a file for {to} ends in {SUFFIXES[to]}")
    if precision not in ("float32", "fp16"):
        raise ValueError(f"precision must be float32 or fp16, not {precision!r}; for int8 use laconic export --int8")
    if precision == "fp16" and to == "torch-export":
        raise ValueError(
            "torch-export is written in float32 only; write fp16 to onnx or openvino, or run the .pt2 under torch.autocast"
        )
    return path
