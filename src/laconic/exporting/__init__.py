"""`export`: write a model as a file for another runtime, and verify it against eager PyTorch.

All formats start from one `torch.export` program with static token counts and a batch of any size. A file is moved to its
path only after the target runtime reproduces the outputs of the eager model, on batches of several sizes. If the check
fails, no file is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from laconic.exporting.graph import OPSET, TOPK_LIMIT, Graph, inspect, write_onnx
from laconic.exporting.int8 import quantize
from laconic.exporting.openvino import write_openvino
from laconic.exporting.parity import TOLERANCE, Parity, prove
from laconic.exporting.record import ExportReport
from laconic.exporting.runtimes import RUNTIMES, runner
from laconic.exporting.trace import Traced, trace, write_program

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml"}

__all__ = [
    "OPSET",
    "RUNTIMES",
    "SUFFIXES",
    "TOLERANCE",
    "TOPK_LIMIT",
    "ExportReport",
    "Graph",
    "Parity",
    "Traced",
    "export",
    "inspect",
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
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a model, reduced or not, as a file for another runtime, after verifying that both give the same outputs.

    The model is not changed: a copy that shares its weights is exported, in evaluation mode, in float32 on the CPU.

    Args:
        model: a model that `reduce_` supports, reduced or not; any other module if ``example`` is given.
        path: the file to write: ``.onnx``, ``.pt2`` for torch-export, ``.xml`` for openvino (plus a ``.bin`` next to it).
        to: onnx, torch-export or openvino.
        batch: images per batch; None allows any number.
        opset: ONNX operator set version, for onnx and openvino.
        example: an input [B, channels, height, width] of the size to export for; by default the model's own size.
        tolerance: the largest difference from the eager model that is allowed, as a share of its largest output.

    Raises:
        TypeError: not a module.
        LookupError: an unknown format.
        ValueError: a wrong suffix, batch or tolerance, weights that are not float32, a method of variable counts, a model
            that torch cannot trace, or outputs that differ. No file is written then, and an existing file is not changed.
        ImportError: a library of the format is missing; the message names the extra.
    """
    _check(path, to)
    return write(trace(model, example, batch), path, to, opset=opset, tolerance=tolerance)


def write(
    traced: Traced, path: str | os.PathLike[str], to: str, *, opset: int = OPSET, tolerance: float = TOLERANCE
) -> ExportReport:
    """Write one format of a traced model, verify it, and move it to its path; arguments and errors as `export`."""
    path = _check(path, to)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0 (it is a share of the largest output), not {tolerance}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as unfinished:
        file, graph = Path(unfinished, path.name), None
        if to == "torch-export":
            write_program(traced, file)
        elif to == "onnx":
            write_onnx(traced, file, opset)
            graph = inspect(file)
        else:
            with TemporaryDirectory(dir=unfinished) as between:
                write_onnx(traced, Path(between, "model.onnx"), opset)
                write_openvino(traced, Path(between, "model.onnx"), file, opset)
        parities = prove(traced, runner(file, to), RUNTIMES[to], tolerance)
        written = sorted(Path(unfinished).iterdir(), key=lambda file: file.name == path.name)  # ``path`` last
        for part in written:
            os.replace(part, path.parent / part.name)
    paths = tuple(str(path.parent / part.name) for part in written)
    size = sum(Path(part).stat().st_size for part in paths)
    stated = None if to == "torch-export" else opset
    return ExportReport(to, paths, size, traced.batch, stated, traced.facts(), tolerance, tuple(parities), graph)


def _check(path: str | os.PathLike[str], to: str) -> Path:
    if to not in SUFFIXES:
        raise LookupError(f"no format is called {to!r}; there are {', '.join(SUFFIXES)}")
    path = Path(path)
    if path.suffix != SUFFIXES[to]:
        raise ValueError(f"{path}: a file for {to} ends in {SUFFIXES[to]}")
    return path
