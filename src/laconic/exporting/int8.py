"""int8 from an ONNX file: dynamic quantization of its matrix products by ONNX Runtime.

Weights become int8 with a scale for each output channel; activations are quantized at run time, so that no calibration
images are needed. Softmax, norms, scores and the selection of tokens remain in float32. ``reduce_range`` (7 bits) avoids
overflow in 16 bits on CPUs without VNNI.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from laconic.core.optional_deps import need
from laconic.exporting.half import mark


def quantize(source: Path, target: Path) -> None:
    """Quantize the ONNX file ``source`` to int8, and write it to ``target`` with the metadata ``laconic.precision``.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    need("onnx", "export")
    need("onnxruntime", "export")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        logging.disable(level)
    mark(target, "int8")
