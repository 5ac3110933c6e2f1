"""Trace a copy of a model with `torch.export`, with static token counts and a batch of any size, for all formats."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.backbone import find_host, path_of, unwrapped
from laconic.core.token_reduction import find_reduction
from laconic.exporting.description import describe_use

BATCHES = (1, 3)  # batch sizes of the parity check, if any batch size is allowed
TRACED = 2  # batch size of the trace: torch would specialise a batch of 1 as a constant


@dataclass(frozen=True)
class Traced:
    """A traced copy of a model, with the shape of its input."""

    model: nn.Module
    program: Any  # torch.export.ExportedProgram
    shape: tuple[int, ...]  # of one image
    batch: int | None
    use: Mapping[str, str] = field(default_factory=dict)  # entries of the metadata on the use of the model

    def images(self, batch: int, seed: int = 0) -> Tensor:
        """Return noise images [batch, channels, height, width]; the same for the same arguments."""
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(1000 * seed + batch))

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes of the parity check."""
        return BATCHES if self.batch is None else (self.batch,)

    def facts(self) -> dict[str, str]:
        """Return the metadata that is written to the file: model, method, schedule, versions, and the entries of ``use``."""
        from laconic import __version__

        reduction = find_reduction(self.model)
        facts = {"laconic": __version__, "torch": torch.__version__, "model": path_of(type(self.model))}
        architecture = getattr(self.model, "pretrained_cfg", None) or {}
        if isinstance(architecture, dict) and architecture.get("architecture"):
            facts["architecture"] = architecture["architecture"]
        facts["input"] = " x ".join(map(str, self.shape))
        facts["batch"] = "any" if self.batch is None else str(self.batch)
        facts |= self.use
        if reduction is None:
            return {**facts, "method": "none"}
        facts["method"] = json.dumps(reduction.config.describe())
        facts["schedule"] = json.dumps(reduction.schedule.to_json())
        facts["patches"] = str(math.prod(reduction.grid))
        facts["patch_tokens"] = json.dumps(list(reduction.counts()))
        return facts


def trace(
    model: nn.Module,
    example: Tensor | None = None,
    batch: int | None = None,
    *,
    classes: Sequence[str] | None = None,
    weights: str | None = None,
) -> Traced:
    """Trace a copy of a model; arguments and errors as `laconic.export`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, or None for any number, not {batch}")
    copy = copied(unwrapped(model))
    shape = tuple(_example(copy, example).shape[1:])
    use = describe_use(copy, shape, classes, weights)
    dynamic = ({0: torch.export.Dim.DYNAMIC},) if batch is None else None
    images = torch.randn(TRACED if batch is None else batch, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(copy, (images,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises many types of errors
        message = " ".join(str(error).split())[:400]
        any_ = "a batch of any size; try batch=1" if batch is None else f"batch {batch}"
        raise ValueError(f"torch cannot trace this {type(model).__name__} with {any_}: {message}") from error
    _portable(program)
    return Traced(copy, program, shape, batch, use)


def _portable(program: Any) -> None:
    """Remove stack traces, which hold paths of this machine, and make views of transposed tensors contiguous.

    The copies are needed since attention has other strides once it is decomposed.
    """
    aten, graph = torch.ops.aten, program.graph
    for node in list(graph.nodes):
        node.meta.pop("stack_trace", None)
        if node.target in (aten.view.default, aten.reshape.default) and node.args[0].target is aten.transpose.int:
            with graph.inserting_before(node):
                copy = graph.call_function(aten.clone.default, node.args[:1], {"memory_format": torch.contiguous_format})
            copy.meta = {**node.args[0].meta, "val": node.args[0].meta["val"].contiguous()}
            node.replace_input_with(node.args[0], copy)
    program.graph_module.recompile()


def copied(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode on the CPU; it shares the weights if they are on the CPU already.

    Raises:
        ValueError: weights are not float32, or the method keeps a variable number of tokens.
    """
    from laconic.analysis.diagnose import shared_copy

    strange = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if strange:
        raise ValueError(
            f"export needs weights in float32, and this model has {', '.join(sorted(strange))}; call model.float() first"
        )
    reduction = find_reduction(model)
    if reduction is not None and reduction.config.info.count == "variable":
        raise ValueError(
            f"{reduction.config.info.name} decides for every image how many tokens it keeps. With constant shapes, a file "
            "could only mask tokens: it would compute every token and save nothing, so nothing is exported. Use a method of "
            "constant counts (see laconic list), or run this one in PyTorch"
        )
    return shared_copy(model).cpu().eval() if all(p.device.type == "cpu" for p in model.parameters()) else _on_cpu(model)


def _on_cpu(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).cpu().eval()


def _example(model: nn.Module, example: Tensor | None) -> Tensor:
    if example is None:
        host, entry = find_host(model)
        return entry.example(host)
    if example.dim() not in (4, 5):
        axes = "[B, channels, height, width] (of clips: [B, frames, channels, height, width])"
        raise ValueError(f"example must be {axes}, not of shape {list(example.shape)}")
    return example


def write_program(traced: Traced, path: Path) -> None:
    """Save the program as ``.pt2``, with the metadata in its extra file ``laconic.json``."""
    content = io.BytesIO()  # on a full disk, torch's own writer ends the process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(traced.program, content, extra_files={"laconic.json": json.dumps(traced.facts())})
    path.write_bytes(content.getbuffer())
