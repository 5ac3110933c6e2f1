"""Open an exported file of any format: its metadata, the shape of its images, and a function that runs it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.optional_deps import need
from laconic.exporting.description import RANDOM
from laconic.exporting.runtimes import Runner, runner

KINDS = {".onnx": "onnx", ".pt2": "torch-export", ".xml": "openvino"}
PREFIX = "laconic."  # of the metadata in ONNX
Shape = tuple[int | None, ...]  # None: any number


@dataclass(frozen=True)
class ExportedFile:
    """An exported file: its format, metadata, shape of one image [channels, height, width] and images in a batch.

    ``batch`` is None for any number of images.
    """

    path: Path
    to: str
    facts: dict[str, str]
    image: tuple[int, ...]
    batch: int | None
    run: Runner

    @property
    def classes(self) -> list[str] | None:
        """Names of its outputs, in order; None if the file does not have them."""
        names: list[str] | None = self._json("classes")
        return names

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """Preprocessing of its images, as timm's data config; None if the file does not have it."""
        config: dict[str, Any] | None = self._json("preprocessing")
        return config

    @property
    def random(self) -> bool:
        """True if the file has random weights, as its metadata says."""
        return RANDOM in self.facts.get("weights", "")

    def _json(self, name: str) -> Any:
        text = self.facts.get(name)
        if text is None:
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self.path}: its metadata {name!r} is damaged ({error}); export the model again") from error


class FileModel(nn.Module):
    """An exported file as a module: images [B, channels, height, width] to its first output."""

    def __init__(self, file: ExportedFile) -> None:
        super().__init__()
        self.file = file

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the first output; a file for a fixed batch gets full batches, the last one filled with zeros."""
        size = self.file.batch
        if size is None:
            return self.file.run(pixels)[0]
        missing = -len(pixels) % size
        filled = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        return torch.cat([self.file.run(part)[0] for part in torch.split(filled, size)])[: len(pixels)]


def open_exported(path: Path, threads: int | None = None) -> ExportedFile:
    """Open a file of `laconic.export`, or another one of these formats with one float32 input for images.

    Raises:
        FileNotFoundError: the file, or the .bin next to an .xml, is missing.
        ValueError: an unknown suffix, a damaged file, or an input that is not images of one size in float32.
        ImportError: the runtime is not installed.
    """
    to = KINDS.get(path.suffix.lower())
    if to is None:
        raise ValueError(f"{path} is not an exported file: expected one that ends in {', '.join(KINDS)}")
    for part in (path, path.with_suffix(".bin")) if to == "openvino" else (path,):
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing; copy it there, or export the model again")
    try:
        facts, shape, dtype = {"onnx": _read_onnx, "torch-export": _read_program, "openvino": _read_openvino}[to](path)
        run = runner(path, to, threads)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # three libraries raise many types
        message = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"{path} cannot be read as a file for {to}: {message}; export the model again") from error
    image = tuple(size for size in shape[1:] if size is not None)
    if len(shape) != 4 or len(image) != 3 or dtype != "float32":
        given = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{path} takes an input of {given} in {dtype}; expected images, batch x channels x height x width, "
                         "of one size in float32, as laconic export writes them")  # fmt: skip
    return ExportedFile(path, to, facts, image, shape[0], run)


def _read_onnx(path: Path) -> tuple[dict[str, str], Shape, str]:
    onnx = need("onnx", "export")
    model = onnx.load(str(path), load_external_data=False)
    facts = {entry.key.removeprefix(PREFIX): entry.value for entry in model.metadata_props if entry.key.startswith(PREFIX)}
    weights = {tensor.name for tensor in model.graph.initializer}
    kind = next(value for value in model.graph.input if value.name not in weights).type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return facts, shape, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


def _read_openvino(path: Path) -> tuple[dict[str, str], Shape, str]:
    openvino = need("openvino", "export")
    model = openvino.Core().read_model(str(path))
    facts = dict[str, str]()
    if model.has_rt_info("laconic"):
        facts = {name: str(model.get_rt_info(["laconic", name]).value) for name in model.get_rt_info("laconic").value}
    given = model.input(0)
    shape = tuple(dim.get_length() if dim.is_static else None for dim in given.partial_shape)
    return facts, shape, str(given.element_type.to_dtype())


def _read_program(path: Path) -> tuple[dict[str, str], Shape, str]:
    inside = {"laconic.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(path, extra_files=inside)
    name = program.graph_signature.user_inputs[0]
    value = next(node for node in program.graph.nodes if node.name == name).meta["val"]
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return json.loads(inside["laconic.json"] or "{}"), shape, str(value.dtype).removeprefix("torch.")
