"""Write ONNX from a traced program, and inspect the file for constructs that are known to fail in TensorRT."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.core.optional_deps import need
from laconic.exporting.trace import Traced

OPSET = 20
OPSETS = (18, 23)  # the range that torch's exporter and onnxruntime share
TOPK_LIMIT = 3840  # the largest k of TensorRT's TopK
# data-dependent shapes, control flow, and random numbers
UNWANTED = ("NonZero", "Loop", "If", "Scan", "Unique", "Compress", "NonMaxSuppression", "RandomUniform", "RandomUniformLike")


@dataclass(frozen=True)
class Graph:
    """Properties of an ONNX file that matter to other runtimes. ``problems`` is empty if none were found.

    ``topk`` holds the constant k of its TopK nodes; ``dynamic`` the names of the dimensions that are not constant.
    """

    operators: dict[str, int]
    domains: tuple[str, ...]
    topk: tuple[int, ...]
    dynamic: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def __str__(self) -> str:
        if self.problems:
            return f"for TensorRT: {'; '.join(self.problems)}"
        topk = f"{len(self.topk)} TopK, each with a constant k of at most {max(self.topk)}" if self.topk else "no TopK"
        return (
            f"for TensorRT: {len(self.operators)} standard operators; {topk}; no control flow, no data-dependent shape, "
            "no dynamic dimension but the batch"
        )


def write_onnx(traced: Traced, path: Path, opset: int = OPSET) -> None:
    """Write a traced model as ONNX, with its metadata as ``metadata_props``, checked by ``onnx.checker``.

    Raises:
        ValueError: the opset is out of range, or torch cannot translate the model. ImportError: a library is missing.
    """
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset must be from {OPSETS[0]} to {OPSETS[1]}, not {opset}")
    onnx = need("onnx", "export")
    need("onnxscript", "export")
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                traced.program,
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                custom_translation_table=_sorts(opset),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        message = " ".join(f"{error.__cause__ or error}".split())[:400]
        raise ValueError(f"torch cannot translate this model to ONNX opset {opset}: {message}") from error
    program.model.metadata_props.update({f"laconic.{name}": value for name, value in traced.facts().items()})
    program.model.metadata_props["laconic.opset"] = str(opset)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of this machine
    _name_batch(program.model)
    program.save(str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _sorts(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translate sort to TopK over the whole axis with a constant k; it is stable: ONNX's TopK puts lower indices first."""
    script = need("onnxscript", "export")
    op = getattr(script, f"opset{opset}")

    def stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        count = op.Constant(value_ints=[int(self.shape[dim])])
        return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)

    def default(self: Any, dim: int = -1, descending: bool = False) -> Any:
        return stable(self, True, dim, descending)

    return {torch.ops.aten.sort.stable: stable, torch.ops.aten.sort.default: default}


def _name_batch(model: Any) -> None:
    """Name the only dynamic dimension "batch"."""
    symbol = model.graph.inputs[0].shape[0]
    if isinstance(symbol, int):
        return
    ir = need("onnx_ir", "export")
    values = [*model.graph.inputs, *(out for node in model.graph.all_nodes() for out in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                value.shape[axis] = ir.SymbolicDim(re.sub(rf"\b{symbol.value}\b", "batch", str(size.value)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's logs, prints and warnings; real problems are raised as errors."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def inspect(path: Path) -> Graph:
    """Inspect an ONNX file: its operators, domains, TopK sizes, dynamic dimensions and problems for TensorRT."""
    onnx = need("onnx", "export")
    model = onnx.load(str(path), load_external_data=False)
    graph, domains = model.graph, {node.domain or "ai.onnx" for node in model.graph.node}
    operators = Counter(node.op_type for node in graph.node)
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = node.attribute[0].t if node.attribute[0].HasField("t") else node.attribute[0]
    ks, problems = list[int](), [f"custom domain {name}" for name in sorted(domains - {"ai.onnx"})]
    for node in graph.node:
        if node.op_type == "TopK":
            found = values.get(node.input[1])
            if found is None:
                problems.append(f"{node.name}: TopK with a k that is not constant")
            else:
                ks.append(found.ints[0] if hasattr(found, "ints") else int(onnx.numpy_helper.to_array(found).item()))
        reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
        if node.op_type == "ScatterND" and reduction != "none":
            problems.append(f"{node.name}: ScatterND with reduction={reduction}, which TensorRT has ignored")
    problems += [f"{count} {name}" for name, count in operators.items() if name in UNWANTED]
    problems += [f"TopK with k={k}, above TensorRT's {TOPK_LIMIT}" for k in sorted(set(ks)) if k > TOPK_LIMIT]
    shapes = [value.type.tensor_type.shape for value in (*graph.input, *graph.output, *graph.value_info)]
    dynamic = sorted({name for shape in shapes for dim in shape.dim if (name := dim.dim_param)})
    strange = [name for name in dynamic if set(re.findall(r"[A-Za-z_]\w*", name)) - {"batch"}]
    problems += [f"dynamic dimension {name}" for name in strange]
    return Graph(dict(sorted(operators.items())), tuple(sorted(domains)), tuple(ks), tuple(dynamic), tuple(problems))
