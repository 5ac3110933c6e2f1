"""Two-stage merging: the model that pre-merge and then tome make, with the counts that one keep rate gives."""

import itertools

import pytest
import torch

import laconic
from families import FAMILIES, images, make, observe
from laconic.core.schedule import Schedule
from laconic.methods.two_stage import middle
from test_laws import run

SERVED = [family for family in FAMILIES if family != "parallel"]


@pytest.mark.parametrize("family", SERVED)
def test_it_is_pre_merge_and_then_tome(family):
    """With exponent 1 a token counts as often as it has patches, as in both methods alone."""
    one, other, x = make(family), make(family), images(family)
    laconic.reduce_(one, "two-stage", keep=0.25, exponent=1.0)
    counts = one.laconic.counts()
    first, *later = [counts[block] for block in (0, *middle(4))]
    assert first < 36
    chain = laconic.Chain(
        ("pre-merge", {"exponent": 1.0, "schedule": Schedule.keep_counts({0: first})}),
        ("tome", {"schedule": Schedule.keep_counts(dict(zip(middle(4), later, strict=True)))}),
    )
    laconic.reduce_(other, chain)
    assert other.laconic.counts() == counts
    torch.testing.assert_close(run(one, x), run(other, x))
    assert torch.equal(laconic.provenance(one).final.where, laconic.provenance(other).final.where)
    assert laconic.summary(one).macs == laconic.summary(other).macs


def test_merged_tokens_count_as_often_as_their_tokens_did():
    model, seen = laconic.reduce_(make("plain"), "two-stage", keep=0.25), []
    observe(model, lambda before, after: seen.append(after))
    run(model, images("plain"))
    first, *later = seen
    torch.testing.assert_close(first.attn_scale, first.size.sqrt())
    for tokens in later:
        torch.testing.assert_close(tokens.attn_scale.sum(1), first.attn_scale.sum(1))
        torch.testing.assert_close(tokens.size.sum(1), first.size.sum(1))


@pytest.mark.parametrize("depth", [2, 3, 4, 6, 12, 24, 40])
@pytest.mark.parametrize("keep", [1.0, 0.8, 0.5, 0.35, 0.3, 0.2, 0.1, 0.05])
def test_keep_is_the_share_that_is_left(depth, keep):
    config = laconic.TwoStage()
    schedule = config.default_schedule(depth, keep, None)
    counts = config.counts(schedule, depth, 256)
    least = max(0.35, 1 / (1 + len(middle(depth))))
    assert abs(counts[-1] - 256 * keep) <= 1.5
    assert abs(counts[0] - 256 * min(1, keep / least)) <= 1
    steps = [before - after for before, after in itertools.pairwise(counts) if after < before]
    assert not steps or max(steps) - min(steps) <= 1


def test_the_blocks_of_the_second_stage():
    assert middle(12) == (4, 5, 6, 7, 8, 9)
    assert len(middle(40)) == 6
    for depth in range(2, 64):
        assert middle(depth)[0] > 0
        assert middle(depth)[-1] < depth


def test_more_than_half_in_a_step_is_refused():
    model = make("plain")
    with pytest.raises(ValueError, match="two-stage: block 2 is to keep 8 of 20"):
        laconic.reduce_(model, "two-stage", schedule=Schedule.keep_counts({0: 20, 2: 8}))
    with pytest.raises(ValueError, match="two-stage: block 2 is to keep"):
        laconic.reduce_(model, "two-stage", keep=[0.8, 0.4], at=[0, 2])
    assert not laconic.is_reduced(model)
    laconic.reduce_(model, "two-stage", keep=[0.3, 0.5], at=[0, 2])
    assert model.laconic.counts() == (10, 10, 5, 5)
