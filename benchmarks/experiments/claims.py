"""The cells of each claim. Claims share cells; a cell is run once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from benchmarks.experiments.cells import Cell

STEPS = 40  # fine-tuning steps, of 32 images each
SEEDS = (0, 1, 2)
KEEPS = (0.9, 0.7, 0.5, 0.3)
ALTERNATIVES = ("random", "avg-pool", "resolution")
TRAINING_FREE = ("etps", "evit", "bat", "topk", *ALTERNATIVES)
ABLATED = 0.5  # keep rate of the ablations
ABLATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "default": (),
    "1:1 matching": (("matching", "one-to-one"),),
    "attention as similarity": (("similarity", "previous-attention"),),
    "content only": (("features", "content"),),
    "position only": (("features", "position"),),
    "plain average": (("fusing", "average"),),
}
LENGTHS = (10, 120)  # other lengths of fine-tuning
DIGITS_STEPS = 80  # two epochs of the 1,297 digits
DIGITS = ("unreduced", "etps", "evit", "dtps", "bat", "random")
DIVERSITY, CLUSTER = (("steps", "diversity"),), (("steps", "cluster"),)
INATTENTIVE = (("pooled", "inattentive"),)
MERGERS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {  # mergers of the inattentive tokens, BAT's table 4
    "average pooling": ("bat", (("merger", "avg-pool"),)),
    "max pooling": ("bat", (("merger", "max-pool"),)),
    "spatial pooling": ("bat", (("merger", "spatial-pool"),)),
    "convolution": ("conv-pool", INATTENTIVE),
    "MLP": ("mlp-pool", INATTENTIVE),
    "k-means, 1 iteration": ("bat", (("merger", "kmeans-1"),)),
    "k-means, 3 iterations": ("bat", (("merger", "kmeans-3"),)),
    "density peaks (bat)": ("bat", ()),
}
CUTS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def swept(methods: Iterable[str], seeds: Sequence[int], keeps: Sequence[float] = KEEPS) -> list[Cell]:
    """Return fine-tuned cells of methods at keep rates."""
    return [Cell(method, keep, (), STEPS, seed) for seed, method, keep in product(seeds, methods, keeps)]


def cells(claim: str, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Return the cells of a claim, with those of the comparison rows."""
    if claim == "digits":
        return _digits(seeds)
    common = [Cell("unreduced"), Cell("half-at-random"), Cell("object-alone"), Cell("smaller"), *swept(ALTERNATIVES, seeds)]
    return common + _OWN[claim](seeds)


def _digits(seeds: Sequence[int]) -> list[Cell]:
    keeps = {"unreduced": 1.0}  # one seed: a sanity check, not a claim
    return [Cell(m, keeps.get(m, ABLATED), (), DIGITS_STEPS, seeds[0], "digits") for m in DIGITS]


def _squeezing(seeds: Sequence[int]) -> list[Cell]:
    free = [Cell(method, keep) for method in TRAINING_FREE for keep in KEEPS]
    return swept(("etps", "evit", "dtps", "dynamicvit"), seeds) + free


def _ablations(seeds: Sequence[int]) -> list[Cell]:
    methods = ("etps", "dtps")
    kinds = [Cell(m, ABLATED, o, STEPS, s) for s, m, o in product(seeds, methods, ABLATIONS.values())]
    return kinds + [Cell(m, ABLATED, (), n, s) for s, m, n in product(seeds, methods, LENGTHS)]


def _diversity(seeds: Sequence[int]) -> list[Cell]:
    keeps = (0.7, 0.5, 0.3)
    clustered = [Cell("bat", keep, DIVERSITY, STEPS, seed) for seed, keep in product(seeds, keeps)]
    return swept(("topk", "bat"), seeds, keeps) + clustered


def _steps(seeds: Sequence[int]) -> list[Cell]:
    keeps = (0.7, 0.5)
    clustered = [Cell("bat", keep, CLUSTER, STEPS, seed) for seed, keep in product(seeds, keeps)]
    merged = [Cell(m, ABLATED, options, STEPS, seed) for seed, (m, options) in product(seeds, MERGERS.values())]
    return swept(("topk", "evit", "bat"), seeds, keeps) + clustered + merged


def _toy(seeds: Sequence[int]) -> list[Cell]:
    return [Cell(method, keep) for keep in CUTS for method in ("attended-once", "others-once")]


_OWN = {
    "1-squeezing": _squeezing,
    "2-bat": lambda seeds: swept(("bat", "evit", "dynamicvit"), seeds),
    "3-random-policy": lambda seeds: swept(("etps", "evit", "dtps", "dynamicvit"), seeds, (0.7, 0.5)),
    "4-tps-ablations": _ablations,
    "5-diversity": _diversity,
    "6-bat-steps": _steps,
    "7-toy": _toy,
    "digits": _digits,
}
CLAIMS = tuple(_OWN)


def all_cells(claims: Sequence[str] = CLAIMS, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Return the cells of claims without duplicates, ordered by seed; cells of a single table come last."""
    wanted = dict.fromkeys(cell for claim in claims for cell in cells(claim, seeds))

    def late(cell: Cell) -> tuple[bool, bool, bool, int]:
        alone = cell.steps in LENGTHS or (cell.options in ABLATIONS.values() and cell.options != ())
        return cell.method == "smaller", cell.data == "digits", alone, cell.seed

    return sorted(wanted, key=late)
