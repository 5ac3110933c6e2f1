"""Keep the tokens with the longest features: an example of a method in a package of its own."""

from dataclasses import dataclass

from laconic import BlockContext, Method, Reducer, method
from laconic.methods.ops import topk_split


class LoudestReducer(Reducer):
    """Between attention and MLP, by the length of the features."""

    def between(self, tokens, seen, n):
        loudness = tokens.patches.float().norm(dim=-1)
        return tokens.keep(topk_split(loudness, n)[0])


@method(
    "loudest",
    title="Loudest: keep the longest tokens",
    paper="2308.04657",
    phase="between",
    score="feature length",
    rest="dropped",
    trained=False,
)
@dataclass(frozen=True)
class Loudest(Method):
    """``loudest`` has no options."""

    def build(self, site: BlockContext) -> Reducer:
        return LoudestReducer()

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"elementwise": before * site.dim}
