"""The shortlist of ``laconic list``: a method for each use, by the numbers of docs/methods.md, evidence.md, performance.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """A use, the methods for it, and the reason."""

    use: str
    methods: tuple[str, ...]
    why: str


SHORTLIST = (
    Advice("no training, most accurate", ("tome", "pitome", "mctf", "atc"), "82-84 % of 84.5 % unreduced; tome is the fastest"),
    Advice(
        "no training, few tokens kept (0.3)",
        ("bat", "etps"),
        "65 % and 61 %, where random pruning has 58 % and evit 52 %; at 0.7, random pruning and avg-pool are better",
    ),
    Advice(
        "least overhead", ("topk", "evit"), "1.5x as fast at keep 0.7, 0.3 % of the time for choosing tokens; less accurate"
    ),
    Advice(
        "with fine-tuning", ("tome", "atc", "bat"), "most accurate after it; bat loses least at keep 0.3 of the papers' methods"
    ),
    Advice(
        "a count for each image", ("spvit", "ats"), "spvit after training: 80 %, 1.8x as fast; ats untrained: 70 %, no faster"
    ),
    Advice(
        "baselines to beat",
        ("random", "avg-pool"),
        "no method of a paper: a method that does not beat them is not worth its cost",
    ),
)
SOURCE = (
    "Accuracies are of a small model on generated pictures, not ImageNet; speeds of DeiT-S on a CPU: docs/methods.md, "
    "docs/evidence.md, docs/performance.md. Measure on your own data with laconic eval and laconic bench."
)
