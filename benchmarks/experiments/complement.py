"""The toy experiment of the TPS paper: what the tokens that are dropped would have said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from laconic.attach import reduce_
from laconic.attention import Seen
from laconic.hosts import find_host
from laconic.methods.topk import drop
from laconic.parts import SCORES
from laconic.reducer import Method, Prune, Reducer, Row, Site
from laconic.schedule import Schedule
from laconic.tokens import Tokens


def _least(tokens: Tokens, seen: Seen) -> Tensor:
    return -SCORES["class"](tokens, seen)


@dataclass(frozen=True)
class LeastAttended(Method):
    """Keep the least attended tokens: nobody would, but to see what is in them."""

    row: ClassVar[Row]

    def build(self, site: Site) -> Reducer:
        return Prune(_least, drop)


LeastAttended.row = Row("least-attended", "keep the least attended", "2304.10716", LeastAttended, "between", "", "", False)


def split_once(model: nn.Module, keep: float, *, others: bool) -> Any:
    """A model that cuts once, a quarter into its blocks: to the most attended share ``keep``, or to all the others."""
    host, entry = find_host(model)
    height, width = entry.grid(host)
    attended = round(keep * height * width)
    block = len(entry.blocks(host)) // 4
    schedule = Schedule.leaving({block: height * width - attended if others else attended})
    return reduce_(model, LeastAttended() if others else "topk", schedule=schedule)
