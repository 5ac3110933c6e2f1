"""OpenVINO: converted from the ONNX file, so that only one translation of the model has to be correct."""

from __future__ import annotations

from pathlib import Path

from laconic.core.optional_deps import need
from laconic.exporting.trace import Traced


def write_openvino(traced: Traced, onnx: Path, path: Path, opset: int) -> None:
    """Write ``.xml`` and ``.bin`` from an ONNX file in float32, with the metadata as runtime information.

    If the metadata has the precision fp16, weights are stored in fp16; the arithmetic is the choice of the device.

    Raises:
        ImportError: openvino is not installed.
    """
    openvino = need("openvino", "export")
    model = openvino.convert_model(str(onnx))
    facts = traced.facts()
    for name, value in {**facts, "opset": str(opset)}.items():
        model.set_rt_info(value, ["laconic", name])
    openvino.save_model(model, str(path), compress_to_fp16=facts.get("precision") == "fp16")
