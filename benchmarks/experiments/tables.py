"""The tables of the claims, in Markdown, from the results so far; a dash marks a missing result."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.experiments.cells import Cell, unpacked
from benchmarks.experiments.claims import (
    ABLATED,
    ABLATIONS,
    ALTERNATIVES,
    CLUSTER,
    CUTS,
    DIGITS,
    DIGITS_STEPS,
    DIVERSITY,
    KEEPS,
    LENGTHS,
    MERGERS,
    SEEDS,
    STEPS,
    TRAINING_FREE,
)
from benchmarks.experiments.statistics import Estimate, accuracy, difference
from benchmarks.experiments.store import Results
from laconic.cli.output import NONE, markdown

Options = tuple[tuple[str, Any], ...]


class Reader:
    """Look up results, for tables and plots."""

    def __init__(self, results: Results, seeds: Sequence[int] = SEEDS) -> None:
        self.results, self.seeds = results, seeds

    def runs(
        self, method: str, keep: float, options: Options = (), steps: int = STEPS, data: str = "scenes"
    ) -> list[dict[str, Any]]:
        """Return the available results, one per seed."""
        seeds = self.seeds if steps else (0,)
        found = [self.results.get(Cell(method, keep, options, steps, seed, data)) for seed in seeds]
        return [row for row in found if row is not None]

    def outcomes(self, *cell: Any) -> list[list[int]]:
        """Return 1 (correct) or 0, by seed and image."""
        return [unpacked(row["correct"]) for row in self.runs(*cell)]

    def accuracy(self, *cell: Any) -> Estimate | None:
        """Return the accuracy over the seeds; None without results."""
        runs = self.outcomes(*cell)
        return accuracy(runs) if runs else None

    def difference(self, one: Sequence[Any], other: Sequence[Any]) -> Estimate | None:
        """Return the accuracy of ``one`` minus that of ``other``, on the seeds that both have; None without any."""
        a, b = ({row["seed"]: unpacked(row["correct"]) for row in self.runs(*cell)} for cell in (one, other))
        both = sorted(a.keys() & b.keys())
        return difference([a[seed] for seed in both], [b[seed] for seed in both]) if both else None

    def mean(self, name: str, *cell: Any) -> str:
        """Return the mean of field ``name`` over the seeds, as text."""
        rows = [row for row in self.runs(*cell) if name in row]
        return f"{statistics.fmean(row[name] for row in rows):.3f}" if rows else NONE

    def macs(self, *cell: Any) -> str:
        """Return the multiply-adds of one image, in millions, as text."""
        rows = self.runs(*cell)
        return f"{rows[0]['macs'] / 1e6:.1f}" if rows else NONE


def signed(value: Estimate | None) -> str:
    """Format a difference; bold if its interval excludes zero."""
    if value is None:
        return NONE
    text = f"{value.mean:+.1f} ± {value.half:.1f}"
    return f"**{text}**" if value.clear else text


def _references(read: Reader, keeps: Sequence[float], steps: int = STEPS) -> list[list[Any]]:
    """Return the comparison rows that every table has."""
    rows = [[name, *(read.accuracy(name, keep, (), steps) for keep in keeps)] for name in ALTERNATIVES]
    return rows + [[name, read.accuracy(name, 1.0, (), 0), *[""] * (len(keeps) - 1)] for name in ("smaller", "unreduced")]


def _sweep(read: Reader, methods: Sequence[str], pairs: Sequence[tuple[str, str]], steps: int = STEPS) -> str:
    header = ["top-1, %", *(f"keep {keep:g}" for keep in KEEPS)]
    rows = [[name, *(read.accuracy(name, keep, (), steps) for keep in KEEPS)] for name in methods]
    for one, other in pairs:
        gaps = (signed(read.difference((one, keep, (), steps), (other, keep, (), steps))) for keep in KEEPS)
        rows.append([f"{one} − {other}", *gaps])
    costs = [f"MACs of {methods[0]}, M", *(read.macs(methods[0], keep, (), steps) for keep in KEEPS)]
    return markdown(header, [*rows, *_references(read, KEEPS, steps), costs])


def squeezing(read: Reader) -> str:
    """Return the table of claim 1."""
    pairs = (("dtps", "dynamicvit"), ("etps", "evit"))
    tuned = _sweep(read, ("dtps", "dynamicvit", "etps", "evit"), pairs)
    plain = [name for name in TRAINING_FREE if name not in ALTERNATIVES]
    free = _sweep(read, plain, (("etps", "evit"), ("etps", "topk"), ("bat", "evit")), 0)
    return f"Fine-tuned, {STEPS} steps:\n\n{tuned}\n\nTraining-free:\n\n{free}"


def bat(read: Reader) -> str:
    """Return the table of claim 2."""
    return _sweep(read, ("bat", "evit", "dynamicvit"), (("bat", "evit"), ("evit", "dynamicvit"), ("bat", "dynamicvit")))


def random_policy(read: Reader) -> str:
    """Return the table of claim 3."""
    rows: list[list[Any]] = []
    for keep in (0.7, 0.5):
        for name in ("dynamicvit", "dtps", "evit", "etps"):
            runs = read.runs(name, keep)
            if not runs:
                rows.append([name, f"{keep:g}", *[NONE] * 5])
                continue
            own = [100 * row["top1"] for row in runs]
            chance = [100 * statistics.fmean(row["random_policy"]) for row in runs]
            lost = [a - b for a, b in zip(own, chance, strict=True)]
            mean, share = statistics.fmean(lost), statistics.fmean(lost) / statistics.fmean(own)
            means = (f"{statistics.fmean(values):.1f}" for values in (own, chance))
            rows.append([name, f"{keep:g}", *means, f"{mean:.1f}", f"{share:.1%}", f"{min(lost):.1f} to {max(lost):.1f}"])
    header = ["", "keep", "own scores", "random", "points lost", "relative", "points lost, each seed"]
    references = [[name, "0.7, 0.5", f"{a}, {b}" if b else a, *[""] * 4] for name, a, b in _references(read, (0.7, 0.5))]
    return markdown(header, [*rows, *references])


def ablations(read: Reader) -> str:
    """Return the table of claim 4."""
    methods = ("dtps", "etps")
    rows = []
    for name, options in ABLATIONS.items():
        gaps = (signed(read.difference((m, ABLATED, options), (m, ABLATED))) if options else "" for m in methods)
        values = (read.accuracy(m, ABLATED, options) for m in methods)
        rows.append([name, *(cell for pair in zip(values, gaps, strict=True) for cell in pair)])
    for steps in LENGTHS:
        gaps = (signed(read.difference((m, ABLATED, (), steps), (m, ABLATED))) for m in methods)
        values = (read.accuracy(m, ABLATED, (), steps) for m in methods)
        rows.append([f"{steps} steps instead of {STEPS}", *(cell for pair in zip(values, gaps, strict=True) for cell in pair)])
    references = [[row[0], row[1], "", "", ""] for row in _references(read, (ABLATED,))]
    return markdown([f"top-1, %, keep {ABLATED:g}", "dtps", "against default", "etps", "against default"], [*rows, *references])


def diversity(read: Reader) -> str:
    """Return the table of claim 5."""
    kinds: tuple[tuple[str, str, Options], ...] = (
        ("importance (topk)", "topk", ()),
        ("diversity (cluster all)", "bat", DIVERSITY),
        ("both (bat)", "bat", ()),
        ("neither (random)", "random", ()),
        ("neither (avg-pool)", "avg-pool", ()),
    )
    looks = ("diversity", "object_own", "surroundings_own", "object_held", "surroundings_held")
    rows = [
        [label, f"{keep:g}", read.accuracy(name, keep, options), *(read.mean(look, name, keep, options) for look in looks)]
        for keep in (0.7, 0.5, 0.3)
        for label, name, options in kinds
    ]
    rows += [[name, "", read.accuracy(name, 1.0, (), 0), *[""] * 5] for name in ("smaller", "unreduced")]
    header = [
        "",
        "keep",
        "top-1, %",
        "diversity score",
        "object, own token",
        "background, own token",
        "object, held",
        "background, held",
    ]
    return markdown(header, rows)


def steps(read: Reader) -> str:
    """Return the table of claim 6."""
    kinds: tuple[tuple[str, str, Options], ...] = (
        ("preserve the attentive only (topk)", "topk", ()),
        ("+ pack the rest into one (evit)", "evit", ()),
        ("+ cluster the rest", "bat", CLUSTER),
        ("+ match the attentive (bat)", "bat", ()),
    )
    rows = []
    for label, name, options in kinds:
        row: list[Any] = [label]
        for keep in (0.7, 0.5):
            row += [read.accuracy(name, keep, options), signed(read.difference((name, keep, options), ("topk", keep)))]
            row += [read.macs(name, keep, options)]
        rows.append(row)
    references = [[name, a, "", "", b, "", ""] for name, a, b in _references(read, (0.7, 0.5))]
    header = ["", "keep 0.7", "against the first", "M MACs", "keep 0.5", "against the first", "M MACs"]
    return f"{markdown(header, [*rows, *references])}\n\n{_mergers(read)}"


def _mergers(read: Reader) -> str:
    """Return the table of mergers of the inattentive tokens (BAT's table 4)."""
    ours = ("bat", ABLATED)
    rows = []
    for label, (method, options) in MERGERS.items():
        cell = (method, ABLATED, options)
        rows.append([label, read.accuracy(*cell), signed(read.difference(cell, ours)) if cell[2] else "", read.macs(*cell)])
    return markdown([f"merger of the inattentive, keep {ABLATED:g}", "top-1, %", "against density peaks", "M MACs"], rows)


def toy(read: Reader) -> str:
    """Return the table of claim 7."""
    rows: list[list[Any]] = []
    for keep in CUTS:
        attended, others = read.outcomes("attended-once", keep, (), 0), read.outcomes("others-once", keep, (), 0)
        if not attended or not others:
            rows.append([f"{keep:g}", None, None, None])
            continue
        bonus = accuracy([[int(not a and b) for a, b in zip(attended[0], others[0], strict=True)]])
        rows.append([f"{keep:g}", accuracy(attended), accuracy(others), bonus])
    return markdown(
        ["share kept", "the most attended, %", "the others instead, %", "bonus: only the others are right, %"], rows
    )


def digits(read: Reader) -> str:
    """Return the table of the sanity check on a real data set."""
    base = ("unreduced", 1.0, (), DIGITS_STEPS, "digits")
    rows: list[list[Any]] = []
    for name in DIGITS:
        cell = (name, 1.0 if name == "unreduced" else ABLATED, (), DIGITS_STEPS, "digits")
        rows.append([name, read.accuracy(*cell), "" if cell == base else signed(read.difference(cell, base)), read.macs(*cell)])
    return markdown([f"keep {ABLATED:g}", "top-1, %", "against unreduced", "M MACs"], rows)


TABLES = {
    "1-squeezing": squeezing,
    "2-bat": bat,
    "3-random-policy": random_policy,
    "4-tps-ablations": ablations,
    "5-diversity": diversity,
    "6-bat-steps": steps,
    "7-toy": toy,
    "digits": digits,
}
