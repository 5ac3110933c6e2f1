"""Zero-TPrune, written a second time with plain loops from the paper's definition."""

import pytest
import torch
import torch.nn.functional as F

import laconic
from laconic.core.attention import AttentionView
from laconic.core.tokens import Tokens
from laconic.methods.zero_tprune import ZeroTPruneReducer, page_rank


def rank_by_hand(matrix, there, rounds):
    """One image: [H, N, N], a list of tokens; a dict of importances."""
    heads = []
    for head in matrix:
        graph = head[there][:, there]
        graph = graph / graph.sum(1, keepdim=True)
        s = torch.full((len(there),), 1 / len(there))
        for _ in range(rounds):
            s = graph.T @ s
        heads.append(s * len(there))
    good = [s for s in heads if 0.01 <= ((s - 1) ** 2).mean() <= 0.7] or heads
    return dict(zip(there, torch.stack(good).square().mean(0).sqrt().tolist(), strict=True))


def keep_by_hand(matrix, keys, n, similar, rounds):
    length = len(keys)
    everything = list(range(length + 1))  # the class token is node 0
    importance = rank_by_hand(matrix, everything, rounds)
    order = sorted(range(length), key=lambda i: -importance[i + 1])
    kept, candidates = order[::2], order[1::2]
    best = {i: max(F.cosine_similarity(keys[i], keys[j], dim=0).item() for j in kept) for i in candidates}
    dropped = sorted(candidates, key=lambda i: -best[i])[: int(similar * (length - n))]
    there = [node for node in everything if node - 1 not in dropped]
    importance = rank_by_hand(matrix, there, rounds)
    return set(sorted((i for i in range(length) if i not in dropped), key=lambda i: -importance[i + 1])[:n])


@pytest.mark.parametrize("similar", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rounds", [1, 7])
def test_by_hand(similar, rounds):
    torch.manual_seed(0)
    q, k, v = 2 * torch.randn(3, 2, 4, 21, 8)
    tokens = Tokens.start(torch.randn(2, 21, 32), 1, True)
    seen = AttentionView(q, k, v, None, 8**-0.5, 1, True)
    out = ZeroTPruneReducer(similar, rounds).between(tokens, seen, 12)
    for image in range(2):
        expected = keep_by_hand(seen.matrix[image], seen.keys[image], 12, similar, rounds)
        assert set(out.origin_index[image].tolist()) == expected


def test_heads_without_information_do_not_count():
    flat = torch.full((1, 1, 5, 5), 0.2)  # variance 0: filtered out
    peaked = torch.softmax(torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(1)), -1)
    there = torch.ones(1, 5)
    both = page_rank(torch.cat([flat, peaked], 1), there, 5)
    torch.testing.assert_close(both, page_rank(peaked, there, 5))
    torch.testing.assert_close(page_rank(flat, there, 5), torch.ones(1, 5))  # none is left: all count


def test_rounds_follow_the_depth():
    site = laconic.BlockContext(ordinal=0, block=3, dim=8, heads=2, keep=0.7, depth=12)
    rounds = [laconic.ZeroTPrune()._rounds(laconic.BlockContext(0, block, 8, 2, 0.7, depth=12)) for block in (0, 3, 4, 8, 11)]
    assert rounds == [30, 30, 5, 1, 1]
    assert laconic.ZeroTPrune(rounds=9)._rounds(site) == 9
    with pytest.raises(ValueError, match="similar"):
        laconic.ZeroTPrune(similar=1.5)
