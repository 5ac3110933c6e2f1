"""OpenVINO: converted from the ONNX file, so that only one translation of the model has to be correct.

Its TopK does not order equal values by their index, as that of ONNX does; sorts are changed to do so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    _sort_stably(model)
    facts = traced.facts()
    for name, value in {**facts, "opset": str(opset)}.items():
        model.set_rt_info(value, ["laconic", name])
    openvino.save_model(model, str(path), compress_to_fp16=facts.get("precision") == "fp16")


def _sort_stably(model: Any) -> None:
    """Make every sort, a TopK of all values, order equal values by their index.

    The option ``stable`` of OpenVINO's TopK would do, but takes time that grows with the square of the number of values.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "TopK":
            continue
        axis, count = node.get_attributes()["axis"], node.output(0).get_partial_shape()
        length = node.input(0).get_partial_shape()[axis]
        if length.is_static and count[axis] == length:
            _order_ties(node, axis, length.get_length())


def _order_ties(node: Any, axis: int, length: int) -> None:
    """Give the users of a sort's indices the indices sorted by run of equal values, then by index."""
    opset = need("openvino.opset13", "export")
    values, indices = node.outputs()
    users = indices.get_target_inputs()
    if not users or length == 1:
        return

    def part(of: Any, start: int, stop: int) -> Any:
        return opset.slice(of, [start], [stop], [1], [axis])

    begins = opset.convert(opset.not_equal(part(values, 1, length), part(values, 0, length - 1)), "i64")
    run = opset.cum_sum(opset.concat([opset.multiply(part(indices, 0, 1), [0]), begins], axis), axis)
    key = opset.add(opset.multiply(run, [length]), indices)
    ordered = opset.mod(opset.topk(key, length, axis, "min", "value", "i64").output(0), [length])
    for user in users:
        user.replace_source_output(ordered.output(0))
