"""The costs that the papers print, and those counted with the authors' code: the rows of docs/macs.md.

Sources: DeiT and EViT as in the tables of BAT (arXiv:2211.11315), DynamicViT (arXiv:2106.02034), TPS (arXiv:2304.10716), BAT
and its published logs. Authors' code was run with random weights on 224 x 224.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laconic.core.method import Method
from laconic.methods import BAT, DTPS, ETPS, DynamicViT, EViT


@dataclass(frozen=True)
class Entry:
    """A row: model and method, the printed cost, and the cost counted with the authors' code.

    ``printed``: GMACs as in the paper; ``cut``: the paper truncates decimals instead of rounding them. ``counted``: GMACs of
    the authors' own code, run with random weights under the profiler of ``convention``; empty if it was not run.
    """

    label: str
    model: str
    config: Method | None
    keep: float | None
    convention: str
    printed: str = ""
    counted: str = ""
    cut: bool = False


def _sweep(label: str, config: Method, convention: str, printed: Sequence[str], counted: Sequence[str]) -> list[Entry]:
    """Return rows of DeiT-S at keep rates .7 to .2."""
    rates = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
    rows = zip(rates, printed, counted, strict=True)
    return [Entry(label, "DeiT-S", config, keep, convention, p, c) for keep, p, c in rows]


NONE = [""] * 6
UNFUSED = EViT(fuse=False)
ENTRIES: tuple[Entry, ...] = (
    Entry("none", "DeiT-T", None, None, "torchprofile", "1.3", "1.2560"),
    Entry("none", "DeiT-S", None, None, "torchprofile", "4.6", "4.6036"),
    Entry("none", "DeiT-B", None, None, "torchprofile", "17.6", "17.5732"),
    Entry("EViT", "DeiT-T", EViT(), 0.7, "torchprofile", "", "0.8221"),
    *_sweep(
        "EViT",
        EViT(),
        "torchprofile",
        ["3.0", "", "2.3", "", "", ""],
        ["3.0321", "2.6378", "2.3110", "2.0455", "1.8185", "1.6457"],
    ),
    Entry("EViT", "DeiT-B", EViT(), 0.7, "torchprofile", "", "11.6156"),
    Entry("EViT, not fused", "DeiT-T", UNFUSED, 0.7, "torchprofile", "", "0.8135"),
    *_sweep(
        "EViT, not fused",
        UNFUSED,
        "torchprofile",
        ["3.0", "", "2.3", "", "", ""],
        ["2.9997", "2.6108", "2.2845", "2.0247", "1.8027", "1.6246"],
    ),
    Entry("EViT, not fused", "DeiT-B", UNFUSED, 0.7, "torchprofile", "", "11.4907"),
    Entry("DynamicViT", "DeiT-T", DynamicViT(), 0.7, "fvcore", "", "0.8046"),
    Entry("DynamicViT", "DeiT-S", DynamicViT(), 0.7, "fvcore", "2.9", "2.9876", cut=True),
    Entry("DynamicViT", "DeiT-B", DynamicViT(), 0.7, "fvcore", "11.4", "11.4892", cut=True),
    Entry("dTPS", "DeiT-T", DTPS(), 0.7, "fvcore", "0.810", "0.8099"),
    Entry("dTPS, previous attention", "DeiT-T", DTPS(similarity="previous-attention"), 0.7, "fvcore", "0.807"),
    *_sweep(
        "dTPS", DTPS(), "fvcore", ["3.0", "", "", "", "", ""], ["2.9983", "2.5810", "2.2437", "1.9545", "1.7183", "1.5289"]
    ),
    Entry("dTPS", "DeiT-B", DTPS(), 0.7, "fvcore", "", "11.5107"),
    Entry("eTPS", "DeiT-T", ETPS(), 0.7, "fvcore", "0.821"),
    Entry("eTPS, previous attention", "DeiT-T", ETPS(similarity="previous-attention"), 0.7, "fvcore", "0.818"),
    *_sweep("eTPS", ETPS(), "fvcore", NONE, NONE),
    Entry("eTPS", "DeiT-B", ETPS(), 0.7, "fvcore"),
    Entry("BAT", "DeiT-T", BAT(), 0.7, "torchprofile", "0.8"),
    *_sweep("BAT", BAT(), "torchprofile", ["3.0", "2.6", "2.3", "2.0", "1.8", "1.6"], NONE),
    Entry("BAT", "DeiT-B", BAT(), 0.7, "torchprofile", "11.6"),
)
# MACs that the logs of BAT on DeiT-S print, by keep rate
LOGS = {0.7: 3004791637, 0.6: 2583245078, 0.5: 2344407958, 0.4: 2083041474, 0.3: 1823257894, 0.2: 1645052990}
