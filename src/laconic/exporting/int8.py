"""int8 on top of an ONNX file: dynamic quantization of its matrix products by ONNX Runtime.

Weights become int8, a scale for each output channel; activations are quantized as they come, so that no pictures are needed
to calibrate on. Softmax, norms, scores and the choice of tokens stay in float32. ``reduce_range`` (7 bits) keeps CPUs
without VNNI from overflowing in 16 bits.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from laconic.core.optional_deps import need


def quantize(source: Path, target: Path) -> None:
    """Write the int8 model of an ONNX file to another.

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
