"""Number of attentive tokens, clusters and pairs with which BAT (arXiv:2211.11315) keeps exactly the requested count."""

from __future__ import annotations

from dataclasses import dataclass

from laconic.methods.ops.checks import require

Amount = int | float | tuple[int | float, ...] | None
LOGGED = {0.7: 0, 0.6: -1, 0.5: 3, 0.4: 3, 0.3: 1, 0.2: 1}  # clusters minus pairs that fit the authors' logs, by keep rate


@dataclass(frozen=True)
class TokenDivision:
    """The division at one reducing block: of K attentive and m inattentive tokens K - pairs + clusters remain.

    ``steps``, ``clusters`` and ``pairs`` are the options of BAT; ``net`` is clusters minus pairs, if these are not given.
    """

    owner: str
    steps: str
    clusters: Amount
    pairs: Amount
    net: int
    stage: int

    def sets(self, attentive: int, rest: int) -> tuple[int, int]:
        """Return (clusters, pairs) for these numbers of attentive and inattentive (``rest``) tokens."""
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
        """Return the number of tokens that remain if ``attentive`` of ``before`` tokens are attentive."""
        if self.steps == "diversity":
            return min(before, attentive + self.net)
        clusters, pairs = self.sets(attentive, before - attentive)
        return attentive - pairs + clusters

    def attentive(self, before: int, n: int) -> tuple[int, int, int]:
        """Return (attentive tokens, clusters, pairs) with which n of ``before`` remain: the inverse of `count`.

        If several numbers of attentive tokens do, return the smallest.

        Raises:
            ValueError: no split keeps exactly n.
        """
        if self.steps == "diversity":
            return 0, n, 0
        tied = self.clusters is None or self.pairs is None
        for k in [n - self.net] * tied + list(range(before)):
            if 0 <= k < before and self.count(k, before) == n:
                return k, *self.sets(k, before - k)
        raise ValueError(
            f"{self.owner}: no split with these clusters and pairs keeps {n} of {before} tokens; change clusters, pairs or keep"
        )


def net_of(count_rule: str, keep: float | None) -> int:
    """Return clusters minus pairs: 1 for as many tokens as EViT, or that of the authors' ``log`` at the nearest keep rate."""
    return 1 if count_rule == "evit" or keep is None else LOGGED[min(LOGGED, key=lambda rate: abs(rate - keep))]


def amount(value: Amount, stage: int, whole: int) -> int | None:
    """Convert a count, a fraction of ``whole``, or one of these for each reducing block, to a count."""
    if isinstance(value, tuple):
        if stage >= len(value):
            raise ValueError(f"{len(value)} values of clusters or pairs, but more reducing blocks; give one for each")
        value = value[stage]
    return round(value * whole) if isinstance(value, float) else value


def check_amounts(owner: str, **amounts: Amount) -> None:
    """Raise a ValueError for values that are neither counts nor fractions."""
    for option, value in amounts.items():
        for v in value if isinstance(value, tuple) else (value,):
            fits = v is None or (v >= 0 and not (isinstance(v, float) and v > 1))
            require(owner, option, v, fits, "must be a count or a fraction in [0, 1]")
