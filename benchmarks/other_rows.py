"""Rows of the tables of TPS and BAT for methods of other papers: the printed figures, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from laconic.analysis.macs import estimate, summary
from laconic.cli.output import NONE, markdown
from laconic.core.method import resolve
from laconic.training.sparsity import StructuredSparsity

PER_IMAGE = "by image"
OWN = "closed form"
INTRO = f"""## Other methods in the tables of TPS and BAT

Parameters in millions and GMACs as TPS or BAT print them, and ours. The multiply-adds of adaptive methods depend on weights and
images and are not given here (*by image*; `laconic.summary(model, images=...)` counts them); their parameters do not depend on
them. {NONE}: not printed, or not known without images.
"""
NOTES = """Where the sources disagree:

- SPViT on DeiT-T has 0.9 G in TPS's table and 1.0 G in BAT's. Its code keeps fixed shares of the patches (.617, .369, .137),
  whatever keep rate is given; counted at these shares, DeiT-S takes less than either table prints. Its table says that it adds
  0.08 M parameters; its code adds 0.02 M.
- BAT lists IA-RED2 with the parameters of a plain DeiT-S; its code adds 1.33 M (a third of its query-key projections is never
  used).
- "SViTE" in BAT's table is S2ViTE, structured sparsity of the weights: no token is removed. The densities are not printed. Both
  figures come out with 70 % of the heads (2 of 3) and 74 % of the neurons removed; its code has 60 to 70 % for the neurons.
- A-ViT adds no parameters; TPS prints 5.00 M for it, a rounded figure of its README.
- Evo-ViT on DeiT-B takes 11.66 G; 11.6 is printed (truncated).
- BAT's Table 4 prints 2.3 G for every merger, and does not say which tokens are pooled. Our row pools the inattentive tokens,
  to as many as BAT has clusters; the cost of the operators is included.
"""


@dataclass(frozen=True)
class Other:
    """A row: the method, its printed figures, and how ours are counted (without ``keep`` or ``built``: only with images)."""

    label: str
    model: str
    method: str = ""
    parameters: str = ""
    gmacs: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    keep: float | tuple[float, ...] | None = None
    built: Callable[[nn.Module], nn.Module] | None = None
    how: str = OWN

    def count(self, make: Callable[[str], nn.Module]) -> tuple[int, int | None]:
        """Return parameters and MACs; MACs are None if they depend on the images."""
        model = make(self.model)
        if self.built is not None:
            cost = summary(self.built(model))
            return cost.parameters, cost.macs
        config = resolve(self.method, dict(self.options))
        found = estimate(model, config, config.default_schedule(12, self.keep, None))
        return found.parameters, None if self.how == PER_IMAGE else found.macs


def sparse(model: nn.Module) -> nn.Module:
    """Return the model with heads and neurons removed, as in S2ViTE-Tiny."""
    return StructuredSparsity(model, until=1, heads=0.7, neurons=0.74).remove_()


_SPVIT = (0.617, 0.369 / 0.617, 0.137 / 0.369)
ROWS: tuple[Other, ...] = (
    Other("ATS", "DeiT-S", "ats", "22.05", "2.9", how=PER_IMAGE),
    Other("A-ViT", "DeiT-T", "avit", "5.00", "0.8", how=PER_IMAGE),
    Other("A-ViT", "DeiT-S", "avit", "", "3.6", (("gate_center", 75.0),), how=PER_IMAGE),
    Other("Evo-ViT", "DeiT-T", "evovit", "5.72", "0.8"),
    Other("Evo-ViT", "DeiT-S", "evovit", "", "3.0"),
    Other("Evo-ViT", "DeiT-B", "evovit", "", "11.6"),
    Other("SPViT", "DeiT-T", "spvit", "", "0.9 (TPS), 1.0 (BAT)", keep=_SPVIT, how="at its fixed shares"),
    Other("SPViT", "DeiT-S", "spvit", "22.13", "2.7", keep=_SPVIT, how="at its fixed shares"),
    Other("IA-RED2", "DeiT-S", "iared", "22.1", "3.2", how=PER_IMAGE),
    Other("IA-RED2", "DeiT-B", "iared", "", "11.6", (("heads", 6),), how=PER_IMAGE),
    Other("S2ViTE", "DeiT-T", "", "4.2", "0.9", built=sparse, how="heads and neurons cut out"),
    Other("AdaViT", "DeiT-S", "adavit", "", "2.3", how=PER_IMAGE),
    *(
        Other(f"BAT, {name}", "DeiT-S", name, "", "2.3", (*options, ("pooled", "inattentive")), 0.5)
        for name, options in (
            ("avg-pool", ()),
            ("max-pool", ()),
            ("spatial-pool", ()),
            ("conv-pool", ()),
            ("mlp-pool", ()),
            ("kmeans", (("iterations", 1),)),
            ("kmeans", (("iterations", 3),)),
        )
    ),
)


def section(make: Callable[[str], nn.Module], rows: Sequence[Other] = ROWS) -> str:
    """Return the section of the page: introduction, table, and the disagreements of the sources."""
    plain: Mapping[str, int] = {row.model: sum(p.numel() for p in make(row.model).parameters()) for row in rows}
    lines = []
    for row in rows:
        parameters, macs = row.count(make)
        told = [row.parameters or None, f"{parameters / 1e6:.2f}", f"{(parameters - plain[row.model]) / 1e6:+.2f}"]
        name = row.label + "".join(f", {key} {value}" for key, value in row.options if key == "iterations")
        lines.append([name, row.model, *told, row.gmacs or None, None if macs is None else f"{macs / 1e9:.3f}", row.how])
    header = ["method", "model", "M params, printed", "ours", "minus DeiT", "GMACs, printed", "ours", "counted"]
    return f"{INTRO}\n{markdown(header, lines)}\n\n{NOTES}"
