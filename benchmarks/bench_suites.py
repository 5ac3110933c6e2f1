"""The suites of measurements behind docs/performance.md, and the speed-ups that the project aims at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from laconic.analysis.timing import Setting
from laconic.cli.models import create
from laconic.cli.variants import Variant, class_row_only, reduced, unreduced
from laconic.core.method import resolve
from laconic.core.token_reduction import Compute

# goals for DeiT-S at batch 8 on a CPU: (method, keep) -> speed-up with compute="all", and with compute="needed"
GOALS: dict[tuple[str, float | None], tuple[float | None, float | None]] = {
    ("topk", 0.7): (None, 1.54),
    ("evit", 0.7): (1.48, 1.54),
    ("etps", 0.7): (1.47, 1.52),
    ("dtps", 0.7): (1.48, None),
    ("bat", 0.7): (1.47, 1.52),
    ("tome r=13", None): (1.60, None),
    ("evit", 0.5): (1.94, None),
    ("etps", 0.5): (1.93, None),
    ("bat", 0.5): (1.91, None),
}


@dataclass(frozen=True)
class Job:
    """A method at a keep rate (or with options that set the number of tokens), with ``compute`` as in `laconic.reduce_`."""

    method: str
    keep: float | None
    compute: Compute
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The method with its options; the label of a row adds ``lean`` to it if compute is "needed"."""
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.options)])

    def variant(self, model: nn.Module) -> Variant:
        """Return the reduced model as a row to measure."""
        made = reduced(model, resolve(self.method, dict(self.options)), self.keep, compute=self.compute)
        return dataclasses.replace(made, name=f"{self.name}{', lean' if self.compute == 'needed' else ''}")


@dataclass(frozen=True)
class Suite:
    """A set of models, with their input sizes and batch sizes, and the jobs to measure on each of them."""

    models: tuple[tuple[str, int, tuple[int, ...]], ...]  # timm name, pixels, batch sizes
    jobs: tuple[Job, ...]
    how: tuple[tuple[str, Any], ...]  # the fields of the setting
    eager_attention: bool = False  # also measure the unreduced model without fused attention

    @property
    def setting(self) -> Setting:
        """The setting of the measurement.

        Raises:
            ValueError: the device is not available.
        """
        return Setting(**dict(self.how))


def _jobs(*methods: str, keeps: Sequence[float], compute: Sequence[Compute]) -> list[Job]:
    return [Job(method, keep, which) for method in methods for keep in keeps for which in compute]


_CPU = [
    *_jobs("topk", "evit", "etps", "dtps", "bat", keeps=(0.7,), compute=("all", "needed")),
    *_jobs("topk", "evit", "etps", "dtps", "bat", keeps=(0.5,), compute=("all", "needed")),
    *(Job("tome", None, compute, (("r", r),)) for r in (13, 16) for compute in ("all", "needed")),
]
_GPU = _jobs("topk", "evit", "etps", "bat", keeps=(0.7,), compute=("needed",))
SUITES = {
    "cpu": Suite((("deit_small_patch16_224", 224, (8, 1)),), tuple(_CPU), (("rounds", 12), ("threads", 1))),
    "cpu-compiled": Suite(
        (("deit_small_patch16_224", 224, (1,)),),
        (
            *_jobs("topk", "evit", "etps", "dtps", "bat", keeps=(0.7, 0.5), compute=("needed",)),
            Job("tome", None, "needed", (("r", 13),)),
        ),
        (("rounds", 12), ("threads", 1), ("compile", True)),
    ),
    # not measured yet: no machine with a GPU was available
    "gpu": Suite(
        (
            ("deit_small_patch16_224", 224, (1, 256)),
            ("deit_base_patch16_224", 224, (1, 256)),
            ("vit_large_patch16_224", 224, (1, 256)),
            ("vit_large_patch14_dinov2", 518, (1, 32)),
            ("vit_large_patch16_224", 1024, (1, 8)),
        ),
        (*_GPU, Job("tome", None, "needed", (("r", 13),))),
        (("rounds", 20), ("device", "cuda"), ("dtype", "bfloat16"), ("compile", True)),
        eager_attention=True,
    ),
}


def variants(name: str, pixels: int, suite: Suite) -> list[Variant]:
    """Return the rows of a model: unreduced, class row only (the stronger base), attention not fused, and every job."""
    model = create(name, img_size=pixels)
    rows = [unreduced("unreduced", model), class_row_only(model)]
    if suite.eager_attention:
        eager: Any = create(name, img_size=pixels)
        for block in eager.blocks:
            block.attn.fused_attn = False
        rows.append(unreduced("unreduced, attention not fused", eager, "plain"))
    return [row for row in rows if row is not None] + [job.variant(model) for job in suite.jobs]
