"""ONNX graphs of a model under several methods, with the map of patches to tokens among their outputs, and shared weights.

Large tensors of all graphs are in one file, each once: most are those of the model. The page loads that file once and hands it
to every graph. The graphs themselves are compressed.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from laconic.analysis.provenance import provenance
from laconic.core.optional_deps import need
from laconic.core.token_reduction import find_reduction
from laconic.exporting import runner, trace
from laconic.exporting.graph import write_onnx
from laconic.exporting.parity import TOLERANCE, compare, tensors

INLINE = 128  # bytes of a tensor that stays in its graph
ALIGN = 64  # bytes
WEIGHTS = "weights.bin"


class WithMaps(nn.Module):
    """A model that also returns the token of every patch after each reducing block.

    Its outputs are the features before the head [1, C], the logits [1, classes] if the model has a head, and for each reducing
    block the map [1, P] in int32, with -1 for dropped patches.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.model
        tokens = model.forward_features(images)
        heads = (True, False) if has_head(model) else (True,)
        answers = [model.forward_head(tokens, pre_logits=before) for before in heads]
        stages = () if find_reduction(model) is None else provenance(model).stages
        return (*answers, *(stage.where.to(torch.int32) for stage in stages))


def has_head(model: Any) -> bool:
    """Return True if a timm model classifies."""
    return getattr(model, "num_classes", 0) > 0


@dataclass
class Weights:
    """The tensors of all graphs, each once."""

    content: bytearray = field(default_factory=bytearray)
    places: dict[str, int] = field(default_factory=dict)  # by digest

    def place(self, data: bytes) -> int:
        """Return the offset of a tensor's bytes, which are added if they are new."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.places:
            self.content.extend(bytes(-len(self.content) % ALIGN))
            self.places[digest] = len(self.content)
            self.content.extend(data)
        return self.places[digest]


def compressed(model: nn.Module, example: Tensor, weights: Weights) -> bytes:
    """Return the graph of a model, compressed with gzip, after its outputs in ONNX Runtime were compared with PyTorch's.

    They are compared on a picture: of noise, many scores are almost equal, and rounding decides which tokens are kept.

    Args:
        model: a timm model, reduced or not, in evaluation mode.
        example: the picture [1, channels, height, width]; the maps must be equal, and the answers up to rounding.
        weights: gets the large tensors.

    Raises:
        ValueError: torch cannot trace the model, or the outputs differ.
    """
    onnx = need("onnx", "play")
    traced = trace(WithMaps(model), example, batch=1)
    with TemporaryDirectory(prefix="laconic-") as place:
        file = Path(place) / "model.onnx"
        write_onnx(traced, file)
        run = runner(file, "onnx", threads=1)
        with torch.inference_mode():
            expected = tensors(traced.model(example))
        found = run(example)
        maps = [(ours, theirs) for ours, theirs in zip(found, expected, strict=True) if not theirs.is_floating_point()]
        if not all(torch.equal(ours, theirs) for ours, theirs in maps):
            raise ValueError("in ONNX Runtime the graph merges other tokens than PyTorch, so it is not written")
        difference = compare(1, found, expected).difference
        if not difference <= TOLERANCE:
            raise ValueError(f"in ONNX Runtime its answer differs from PyTorch's by {difference:.1e} of its largest value")
        graph = onnx.load(str(file))
    del graph.metadata_props[:]
    _share(graph, weights)
    return gzip.compress(graph.SerializeToString(), 9, mtime=0)


def _share(model: Any, weights: Weights) -> None:
    """Move the large tensors of a graph to the shared file, and remove what only people read."""
    onnx = need("onnx", "play")
    for tensor in model.graph.initializer:
        data = onnx.numpy_helper.to_array(tensor).tobytes()
        if len(data) < INLINE:
            continue
        offset = weights.place(data)
        for name in ("raw_data", "float_data", "int64_data", "int32_data"):
            tensor.ClearField(name)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
