"""Run exported files in their runtimes on the CPU, with tensors as input and output."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.core.optional_deps import need

RUNTIMES = {"onnx": "ONNX Runtime", "torch-export": "torch", "openvino": "OpenVINO"}
Runner = Callable[[Tensor], list[Tensor]]


def runner(path: Path, to: str, threads: int | None = None) -> Runner:
    """Load a file; return a function from images [B, channels, height, width] to all outputs.

    ``threads`` is the number of CPU threads for one forward (default: the runtime's own choice). It is ignored for
    torch-export; use `torch.set_num_threads`.

    Raises:
        ImportError: the runtime is not installed.
    """
    return {"onnx": _onnxruntime, "torch-export": _torch, "openvino": _openvino}[to](path, threads)


def _onnxruntime(path: Path, threads: int | None) -> Runner:
    ort = need("onnxruntime", "export")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {name: images.numpy()})]


def _openvino(path: Path, threads: int | None) -> Runner:
    openvino = need("openvino", "export")
    hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        hints["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(str(path), "CPU", hints)
    request = compiled.create_infer_request()

    def run(images: Tensor) -> list[Tensor]:
        answers = request.infer([images.numpy()])
        return [torch.from_numpy(answers[out].copy()) for out in compiled.outputs]

    return run


def _torch(path: Path, threads: int | None) -> Runner:
    from laconic.exporting.parity import tensors

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tensors(module(images))

    return run
