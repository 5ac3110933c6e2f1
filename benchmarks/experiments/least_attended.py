"""The toy experiment of the TPS paper: accuracy with the tokens that would be dropped, instead of those kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from laconic.api import reduce_
from laconic.core.attention import AttentionView
from laconic.core.backbone import find_host
from laconic.core.method import BlockContext, Method, MethodInfo, Prune, Reducer
from laconic.core.schedule import Schedule
from laconic.core.tokens import Tokens
from laconic.methods.ops import SCORES
from laconic.methods.topk import drop


def _least(tokens: Tokens, seen: AttentionView) -> Tensor:
    return -SCORES["class"](tokens, seen)


@dataclass(frozen=True)
class LeastAttended(Method):
    """Keep the least attended tokens, to measure how much information they hold."""

    info: ClassVar[MethodInfo]

    def build(self, site: BlockContext) -> Reducer:
        return Prune(_least, drop)


LeastAttended.info = MethodInfo(
    "least-attended", "keep the least attended", "2304.10716", LeastAttended, "between", "none", "dropped", False
)


def split_once(model: nn.Module, keep: float, *, others: bool) -> Any:
    """Reduce a model once, at a quarter of its depth: to the most attended share ``keep``, or to all other tokens."""
    host, entry = find_host(model)
    height, width = entry.grid(host)
    attended = round(keep * height * width)
    block = len(entry.blocks(host)) // 4
    schedule = Schedule.keep_counts({block: height * width - attended if others else attended})
    return reduce_(model, LeastAttended() if others else "topk", schedule=schedule)
