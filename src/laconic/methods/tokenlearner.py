"""TokenLearner: What Can 8 Learned Tokens Do for Images and Videos? (Ryoo et al., NeurIPS 2021, arXiv:2106.11297).

Before one block, by default three quarters into the depth, the patch tokens become S new ones. Each has a map over the
places of its own, from the layer-normalised tokens, and sums the tokens as they came by it:

* ``version="1.1"``: the maps are softmaxes over the places of Linear(GELU(Linear(LN(x)))), C to 64 to S channels.
* ``version="1"`` (sec. 2, eqs. 1-2): the maps are sigmoids of four 3x3 convolutions to S channels (no bias, GELU between
  them), and the sum is not normalised. It needs all patches on their grid.

GELU is the tanh approximation, as in the published code. Departures: the published model has no class token, here prefix
tokens go around; TokenFuser, which the paper has as an option, is left out, and tokens do not come back. S is the count of
the schedule; without a keep rate it is their 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from laconic.parts import Mixer, Slots
from laconic.reducer import Reducer, Site, choice, method
from laconic.schedule import Schedule
from laconic.tokens import Tokens

LEARNED = 16  # tokens, in the published configuration
HIDDEN = 64


class TokenLearnerReducer(Mixer):
    """Version 1.1: maps by an MLP, softmax over the places."""

    def __init__(self, site: Site) -> None:
        super().__init__("tokenlearner", site)
        self.norm = nn.LayerNorm(site.dim, eps=1e-6)
        self.maps = nn.Sequential(
            nn.Linear(site.dim, HIDDEN), nn.GELU(approximate="tanh"), nn.Linear(HIDDEN, max(1, self.slots))
        )

    def matrix(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return self.maps(self.norm(x)).float().softmax(1).transpose(1, 2), tokens.patches


class ConvolutionalReducer(Mixer):
    """Version 1: maps by convolutions over the grid, sigmoid, plain sum."""

    def __init__(self, site: Site) -> None:
        super().__init__("tokenlearner", site)
        self.grid, slots = site.grid, max(1, self.slots)
        self.norm = nn.LayerNorm(site.dim, eps=1e-6)
        layers: list[nn.Module] = [nn.Conv2d(site.dim, slots, 3, padding=1, bias=False)]
        for _ in range(3):
            layers += [nn.GELU(approximate="tanh"), nn.Conv2d(slots, slots, 3, padding=1, bias=False)]
        self.maps = nn.Sequential(*layers)

    def matrix(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        rows, columns = self.grid
        if tokens.patch is not None or len(tokens) != rows * columns:
            raise ValueError(
                f"tokenlearner: version='1' was built for all patches on their grid, {rows} x {columns}, and got "
                f"{len(tokens)} tokens{'' if tokens.patch is None else ' that an earlier block has reduced'}; reduce at one "
                "block only, use images of the size it was built for, or pass version='1.1'"
            )
        image = self.norm(x).transpose(1, 2).unflatten(2, (rows, columns))
        return self.maps(image).float().sigmoid().flatten(2), tokens.patches


@method(
    "tokenlearner",
    title="TokenLearner: a few tokens, each with a learned map",
    paper="2106.11297",
    moment="before",
    score="learned maps",
    rest="mixed by learned maps",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class TokenLearner(Slots):
    """Options of ``tokenlearner``: ``version``, ``1.1`` (an MLP, softmax) or ``1`` (convolutions, sigmoid; one block only)."""

    version: Literal["1.1", "1"] = "1.1"

    def __post_init__(self) -> None:
        choice("tokenlearner", "version", self.version, ("1.1", "1"))

    def build(self, site: Site) -> Reducer:
        return TokenLearnerReducer(site) if self.version == "1.1" else ConvolutionalReducer(site)

    def plan(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        blocks = (depth * 3 // 4,) if at is None else tuple(at)
        return Schedule.leaving(dict.fromkeys(blocks, LEARNED)) if keep is None else Schedule.rates(keep, blocks)

    def macs(self, before: int, after: int, site: Site) -> dict[str, int]:
        one = (site.dim + after) * HIDDEN if self.version == "1.1" else 9 * (site.dim * after + 3 * after * after)
        return {"matmul": before * one + before * after * (site.dim + 1), "layernorm": before * site.dim}
