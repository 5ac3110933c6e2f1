import math

import pytest
import torch

import laconic
from families import FIXED, at, make
from laconic.core.half_limit import check_halves
from laconic.core.schedule import Schedule, WarmIn, cumulative, quarters

CEIL = {"evit": [139, 99, 71], "etps": [138, 97, 68], "topk": [138, 97, 68], "bat": [139, 99, 71], "evit+bat": [139, 99, 71]}
INITIAL = {"dynamicvit": [137, 96, 67], "dtps": [137, 96, 67], "tome": [137, 96, 67], "dynamicvit+bat": [138, 97, 68]}


def counts(method, keep, patches=196, **options):
    config = laconic.methods()[method].config(**options)
    return [config.default_schedule(12, keep, None).counts(12, patches, config.num_kept)[b] for b in (3, 6, 9)]


@pytest.mark.parametrize(("method", "expected"), {**CEIL, **INITIAL}.items())
def test_counts_of_the_papers(method, expected):
    assert counts(method, 0.7) == expected


OTHER_SITES = {
    "evovit",
    "svite",
    "tokenlearner",
    "pre-merge",
    "adaptive-patch",
    "two-stage",
}  # parked tokens come back (two); once, late; once, before the blocks (two); before the blocks and in six small steps
SITES = [
    n for n, row in laconic.methods().items() if row.config.accepts_keep and row.count == "constant" and n not in OTHER_SITES
]


@pytest.mark.parametrize("method", SITES)
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("patches", [196, 256])
def test_keep_means_the_same_for_every_method(method, keep, patches):
    """At blocks 3, 6 and 9 of 12: N k, N k^2 and N k^3 tokens, rounded as the method says; elsewhere nothing leaves."""
    config = laconic.methods()[method].config()
    schedule = config.default_schedule(12, keep, None)
    assert schedule == Schedule.rates(keep, (3, 6, 9))
    if config.removes_at_most_half and keep < 0.5:
        with pytest.raises(ValueError, match=f"keep={keep} at block 3 is too low"):
            check_halves(config, schedule, config.counts(schedule, 12, patches), patches)
        return
    counts = config.counts(schedule, 12, patches)
    assert counts == (patches,) * 3 + (counts[3],) * 3 + (counts[6],) * 3 + (counts[9],) * 3
    n = patches
    for stage, now in enumerate((counts[3], counts[6], counts[9]), 1):
        exact = patches * keep**stage
        if method in ("tome", "atc", "dtps", "dynamicvit", "heuristic", "dpc-knn", "kmedoids"):
            expected = max(int(patches * cumulative((keep,) * stage)), n - n // 2 if config.removes_at_most_half else 1)
        elif method in ("pitome", "topk", "etps", "diffrate", "random", "avg-pool", "kmeans"):
            expected = math.ceil(keep * n - 1e-9)
        elif method in ("tofu", "mctf"):  # one class token counted
            expected = max(n - int((n + 1) * (1 - keep) + 1e-9), n - n // 2)
        else:
            expected = now
        assert now == expected
        # at each site at most one token from rounding up, and one made of those that leave (BAT: clusters less pairs)
        assert exact - 2 < now <= exact + 2 * sum(keep**earlier for earlier in range(stage))
        n = now


def test_more_counts():
    assert counts("dynamicvit", 0.5) == [98, 49, 24]
    assert counts("dynamicvit", 0.2) == [39, 7, 1]
    assert counts("dynamicvit", 0.1) == [19, 1, 1]  # never none
    assert counts("evit", 0.7, fuse=False) == [138, 97, 68]
    assert counts("dynamicvit", 0.7, patches=400) == [280, 195, 137]  # int of .7 * .7 * 400, as the published code rounds
    assert counts("etps", 0.55, patches=100)[0] == 56  # and ceil in double precision


def test_bat_splits_into_as_many_as_it_says():
    bat = laconic.BAT()
    assert [bat.attentive(n, m, stage, 0.7) for stage, (n, m) in enumerate([(196, 139), (139, 99), (99, 71)])] == [
        (138, 6, 5),
        (98, 4, 3),
        (70, 3, 2),
    ]
    for options in ({"clusters": 4}, {"pairs": 3}, {"clusters": 0.05, "pairs": 0.03}, {"clusters": (8, 4, 2), "pairs": 2}):
        bat = laconic.BAT(**options)
        for before in (20, 36, 99, 196):
            for keep in (0.3, 0.5, 0.7, 0.9):
                left = bat.num_kept([keep], before, 196)
                k, clusters, pairs = bat.attentive(before, left, 0, keep)
                assert k - pairs + clusters == left
                assert pairs <= k // 2
                assert clusters <= before - k


def test_bat_of_the_logs():
    nets = {0.7: 0, 0.6: -1, 0.5: 3, 0.4: 3, 0.3: 1, 0.2: 1}
    for keep, net in nets.items():
        plain, logged = counts("topk", keep)[0], counts("bat", keep, count_rule="log")[0]
        assert logged - plain == net


def test_default_blocks():
    assert quarters(12) == (3, 6, 9)
    assert quarters(16) == (4, 8, 12)
    assert quarters(20) == (5, 10, 15)
    assert quarters(2) == (0, 1)


def test_rates_of_the_published_code():
    assert cumulative([0.7] * 3) == 0.7**3
    assert cumulative([0.9, 0.5]) == 0.9 * 0.5


def test_removing_is_capped_at_half():
    assert Schedule.remove_counts({0: 16, 1: 16, 2: 2}).counts(4, 36, lambda *_: 0) == (20, 10, 8, 8)


def test_tome_schedules():
    plan = laconic.ToMe(r=8).default_schedule(12, None, None)
    assert plan.values == (8,) * 12
    assert laconic.ToMe(r=(16, 1.0)).default_schedule(12, None, None).values == tuple(int(32 / 11 * i) for i in range(12))
    assert laconic.ToMe(r=(4, 2, 1)).default_schedule(3, None, None).values == (4, 2, 1)


def test_json_round_trip():
    for schedule in (Schedule.rates(0.7, (3, 6)), Schedule.keep_counts({1: 5}), Schedule.remove_counts({0: 3, 2: 4})):
        assert Schedule.of(schedule.to_json()) == schedule


def test_rates_of_one_block_each():
    model = laconic.reduce_(make("plain"), "topk", keep=[0.5, 1.0, 0.25], at=[0, 1, 2])
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    assert [s.size.shape[1] for s in laconic.provenance(model).stages] == [18, 18, 5]


def test_warm_in():
    warm, schedule = WarmIn(start=10, length=100), Schedule.rates(0.6, (3, 6))
    assert warm(schedule, 0).values == (1.0, 1.0)
    assert warm(schedule, 10).values == (1.0, 1.0)
    assert warm(schedule, 60).values == pytest.approx((0.8, 0.8))
    assert warm(schedule, 110) == schedule
    rates = [warm(schedule, step).values[0] for step in range(120)]
    assert rates == sorted(rates, reverse=True)
    with pytest.raises(ValueError, match="only keep rates"):
        warm(Schedule.keep_counts({1: 3}), 0)


@pytest.mark.parametrize("method", sorted(FIXED - {"conv-pool"}))
def test_what_is_learned_for_one_count_says_so(method):
    model = laconic.reduce_(make("plain"), method, keep=0.3, at=[1, 2]).train()
    model.laconic.set_schedule(WarmIn(0, 12)(model.laconic.schedule, 6))
    with pytest.raises(ValueError, match="was built"):
        model(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize("method", [n for n, r in laconic.methods().items() if r.config.accepts_keep and n not in FIXED])
def test_every_method_can_be_warmed_in(method):
    """At any rate on the way the tokens left are as many as scheduled, and the model runs."""
    keep = 0.5 if laconic.methods()[method].config.removes_at_most_half else 0.3
    model = laconic.reduce_(make("plain"), method, keep=keep, at=at(method, (1, 2))).train()
    warm, schedule, x = WarmIn(0, 12), model.laconic.schedule, torch.randn(1, 3, 96, 96)
    for step in range(0, 14):
        model.laconic.set_schedule(warm(schedule, step))
        model(x).sum().backward()
    assert model.laconic.schedule == schedule
    with pytest.raises(ValueError, match="was built for"):
        model.laconic.set_schedule(Schedule.rates(0.6, (0, 1)))


def test_a_changed_schedule_is_that_of_a_model_built_with_it():
    x = torch.randn(1, 3, 96, 96)
    changed = laconic.reduce_(make("plain"), "bat", keep=0.3, at=[1, 2], count_rule="log")
    changed.laconic.set_schedule(Schedule.rates(0.5, (1, 2)))
    built = laconic.reduce_(make("plain"), "bat", keep=0.5, at=[1, 2], count_rule="log")
    with torch.no_grad():
        assert torch.equal(changed(x), built(x))


def test_images_of_another_size_have_counts_of_their_own():
    model = laconic.reduce_(make("plain", dynamic_img_size=True), "etps", keep=0.5, at=[1, 2])
    for size, left in ((96, [36, 36, 18, 9, 9]), (128, [64, 64, 32, 16, 16]), (96, [36, 36, 18, 9, 9])):
        model(torch.randn(2, 3, size, size))
        assert [len(entry) for entry in model.laconic.ledger] == left
        assert model.laconic.counts(left[0]) == tuple(left[1:])
