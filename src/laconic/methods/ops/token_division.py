"""How BAT (arXiv:2211.11315) divides tokens so that just as many leave as are asked for: clusters, pairs, and the attentive."""

from __future__ import annotations

from dataclasses import dataclass

from laconic.methods.ops.checks import require

Amount = int | float | tuple[int | float, ...] | None
LOGGED = {0.7: 0, 0.6: -1, 0.5: 3, 0.4: 3, 0.3: 1, 0.2: 1}  # clusters less pairs that fit the authors' logs, by keep rate


@dataclass(frozen=True)
class TokenDivision:
    """The tokens of one stage: of K attentive and m inattentive ones K - pairs + clusters leave.

    ``steps``, ``clusters`` and ``pairs`` are the options of BAT; ``net`` is clusters less pairs, where these are open.
    """

    owner: str
    steps: str
    clusters: Amount
    pairs: Amount
    net: int
    stage: int

    def sets(self, attentive: int, rest: int) -> tuple[int, int]:
        """(clusters, pairs) for that many attentive and inattentive tokens."""
        if rest == 0 or self.steps == "preserve":
            return 0, 0
        if self.steps == "pack":
            return 1, 0
        clusters = amount(self.clusters, self.stage, rest)
        pairs = 0 if self.steps == "cluster" else amount(self.pairs, self.stage, attentive)
        if clusters is None:
            tied = pairs is not None and self.steps == "match"
            most = attentive // 2 + self.net
            clusters = pairs + self.net if tied and pairs is not None else max(self.net, min(round(0.1 * rest), most))
        clusters = min(rest, max(1, clusters))
        pairs = clusters - self.net if pairs is None else pairs
        return clusters, min(max(0, pairs), attentive // 2)

    def count(self, attentive: int, before: int) -> int:
        """Tokens that leave when that many of ``before`` are attentive."""
        if self.steps == "diversity":
            return min(before, attentive + self.net)
        clusters, pairs = self.sets(attentive, before - attentive)
        return attentive - pairs + clusters

    def attentive(self, before: int, n: int) -> tuple[int, int, int]:
        """(attentive tokens, clusters, pairs) that leave n of ``before``: `count` turned round; of several the fewest.

        Raises:
            ValueError: no split leaves exactly n.
        """
        if self.steps == "diversity":
            return 0, n, 0
        tied = self.clusters is None or self.pairs is None
        for k in [n - self.net] * tied + list(range(before)):
            if 0 <= k < before and self.count(k, before) == n:
                return k, *self.sets(k, before - k)
        raise ValueError(f"{self.owner}: no split with these clusters and pairs leaves {n} of {before} tokens")


def net_of(budget: str, keep: float | None) -> int:
    """Clusters less pairs: one, as many tokens as in EViT; or as in the authors' ``log`` at the nearest keep rate."""
    return 1 if budget == "evit" or keep is None else LOGGED[min(LOGGED, key=lambda rate: abs(rate - keep))]


def amount(value: Amount, stage: int, whole: int) -> int | None:
    """A count, a fraction of ``whole`` or one of these for each stage, as a count."""
    if isinstance(value, tuple):
        if stage >= len(value):
            raise ValueError(f"{len(value)} stages have clusters or pairs of their own, but the schedule has more")
        value = value[stage]
    return round(value * whole) if isinstance(value, float) else value


def check_amounts(owner: str, **amounts: Amount) -> None:
    """Refuse what is neither a count nor a fraction."""
    for option, value in amounts.items():
        for v in value if isinstance(value, tuple) else (value,):
            fits = v is None or (v >= 0 and not (isinstance(v, float) and v > 1))
            require(owner, option, v, fits, "must be a count or a fraction in [0, 1]")
