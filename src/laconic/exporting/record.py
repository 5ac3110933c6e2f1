"""The report of an export: files, sizes, metadata and parity."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.exporting.description import RANDOM
from laconic.exporting.graph import Graph
from laconic.exporting.parity import Parity


@dataclass(frozen=True)
class ExportReport:
    """Report of a written file: its paths, size, metadata and parity with the eager model.

    ``batch`` is None for any number of images. ``metadata`` is also stored in the file. ``graph`` is set for ONNX files only.
    """

    to: str
    paths: tuple[str, ...]
    bytes: int
    batch: int | None
    opset: int | None
    metadata: dict[str, str]
    tolerance: float
    parities: tuple[Parity, ...]
    graph: Graph | None = None

    @property
    def difference(self) -> float:
        """The largest difference from the eager model over all batches, as a share of the largest output."""
        return max(parity.difference for parity in self.parities)

    @property
    def agreement(self) -> float | None:
        """The smallest share of images with the same top class over all batches; None if the model has no classes."""
        shares = [parity.agreement for parity in self.parities if parity.agreement is not None]
        return min(shares) if shares else None

    @property
    def random(self) -> bool:
        """True if the file has random weights, as its metadata says."""
        return RANDOM in self.metadata.get("weights", "")

    def moved(self, to: Path) -> ExportReport:
        """Return the report with its files in another directory."""
        return dataclasses.replace(self, paths=tuple(str(to / Path(path).name) for path in self.paths))

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        graph = None if self.graph is None else self.graph.to_json()
        return {**fields, "graph": graph, "difference": self.difference, "agreement": self.agreement, "random": self.random}

    def __str__(self) -> str:
        sizes = ", ".join(str(parity.batch) for parity in self.parities)
        any_ = "any batch" if self.batch is None else f"batch {self.batch}"
        agreed = "" if self.agreement is None else f", the same top class for {self.agreement:.0%} of the images"
        proof = f"verified at batch {sizes}: difference {self.difference:.1e} (at most {self.tolerance:g}){agreed}"
        replaced = sum(parity.replaced for parity in self.parities)
        proof += f"; {replaced} image(s) replaced, on which PyTorch's own answer depends on rounding" if replaced else ""
        opset = "" if self.opset is None else f", opset {self.opset}"
        precision = f", {self.metadata['precision']}" if "precision" in self.metadata else ""
        random = f", {RANDOM} weights" if self.random else ""
        arithmetic = self.metadata.get("fp16_arithmetic")
        proof += f"; fp16 arithmetic: {arithmetic}" if arithmetic else ""
        line = f"{self.paths[-1]}: {self.to}{opset}{precision}, {any_}, {self.bytes / 1e6:.1f} MB{random}; {proof}"
        return line if self.graph is None else f"{line}\n  {self.graph}"
