"""Variants as files in another runtime, to be timed as models in PyTorch are (``laconic bench --exported``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from laconic.analysis.timing import Run, Setting
from laconic.cli.export import versions, write_all
from laconic.cli.variants import Variant
from laconic.core.files import Refusal
from laconic.exporting import OPSET, TOLERANCE, runner

Format = Literal["onnx", "torch-export", "openvino"]


@dataclass(frozen=True)
class Exported:
    """Files of one format, by the label of the variant."""

    to: Format
    files: Mapping[str, Path]

    def runs(self, images: Mapping[str, Tensor], threads: int | None) -> dict[str, Run]:
        """Return one forward of every file, ready to be run on its images."""
        return {label: self._run(label, batch, threads) for label, batch in images.items()}

    def _run(self, label: str, images: Tensor, threads: int | None) -> Run:
        run = runner(self.files[label], self.to, threads)
        return lambda: run(images)

    @property
    def facts(self) -> dict[str, str]:
        """The format, and the versions of the installed runtimes."""
        return {"exported": self.to, **versions()}


def check(to: Format | None, setting: Setting) -> None:
    """Refuse options that cannot be measured together.

    Raises:
        Refusal: exported and compiled, or on a GPU, or in another precision.
    """
    if to is None:
        return
    if setting.compile:
        raise Refusal(f"--exported {to} and --compile are two ways to run a model; take one of them at a time")
    if setting.place.type != "cpu":
        raise Refusal(f"--exported {to} measures the runtimes of this CPU; add --device cpu")
    if setting.dtype != "float32":
        raise Refusal(f"--exported {to} takes weights in float32, not {setting.dtype}")


def write(variants: Sequence[Variant], to: Format, place: Path) -> Exported:
    """Export every variant to a directory, with the check of each file (see `laconic.export`).

    Raises:
        ValueError: a method of variable counts, a file with other answers. ImportError: the runtime is missing.
    """
    _, files = write_all(variants, place, "model", (to,), OPSET, TOLERANCE)
    return Exported(to, {label: path for (label, _), path in files.items()})
