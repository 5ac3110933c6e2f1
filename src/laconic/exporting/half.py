"""fp16 from an ONNX file, by ONNX Runtime's converter: weights and arithmetic in fp16, images and outputs in float32."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from laconic.core.optional_deps import need

HALF_TOLERANCE = 2e-2  # of the largest output; typical differences are 1e-3, and 5e-3 where another token is chosen


def halve(source: Path, target: Path, facts: Mapping[str, str]) -> None:
    """Convert the ONNX file ``source`` to fp16, and write it to ``target`` with the metadata ``facts``.

    Operators that ONNX Runtime has for float32 only remain in float32.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
    """
    onnx = need("onnx", "export")
    need("onnxruntime", "export")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that become 0 or the largest number; the comparison with eager judges them
        # the file has the shapes of all values already; inferred again, those that depend on the batch would lose its name
        converted = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True, disable_shape_infer=True)
    model = need("onnx_ir", "export").from_proto(converted)
    model.graph.sort()  # the converter appends its casts
    model.metadata_props.update({f"laconic.{name}": value for name, value in facts.items()})
    onnx.save(need("onnx_ir", "export").to_proto(model), str(target))
    onnx.checker.check_model(str(target), full_check=True)


def mark(path: Path, precision: str) -> None:
    """Write the metadata ``laconic.precision`` to an ONNX file."""
    onnx = need("onnx", "export")
    model = onnx.load(str(path))
    known = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**known, "laconic.precision": precision})
    onnx.save(model, str(path))
