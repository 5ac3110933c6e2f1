"""Budgets: parsing, multiply-adds to the last token, times by a clock of our own, the search, and the command."""

import dataclasses
import json
import math
import random

import pytest
import torch

import laconic
from families import AT, make, options
from laconic.analysis.summary import BlockCost
from laconic.analysis.timing import Quartiles
from laconic.cli import app as cli
from laconic.cli import plan as plan_job
from laconic.cli.plan_report import CheckReport, checked
from laconic.cli.plan_scores import Scores
from laconic.core.files import Refusal
from laconic.core.schedule import Schedule
from laconic.planning.budget import Target
from laconic.planning.curve import Curve, not_negative
from laconic.planning.fidelity import Fidelity, Mean, difference
from laconic.planning.latency import Table, measure_table
from laconic.planning.planner import Planner
from laconic.planning.result import Comparison, relative_error, remarks
from laconic.planning.search import Found, Search, weights_of
from laconic.planning.space import ScheduleSpace
from laconic.planning.timing import Measured, Measuring, Stopwatch, measure
from laconic.training.checks import check
from laconic.training.recipe import from_json

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")


# ---------------------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2.3G", "macs", 2.3e9),
        ("230M", "macs", 230e6),
        ("1.6x", "speedup", 1.6),
        ("1.6x-macs", "macs-ratio", 1.6),
        ("12ms", "time", 0.012),
        (" .5G ", "macs", 5e8),
    ],
)
def test_budgets_are_read(text, kind, value):
    target = Target.parse(text)
    assert (target.kind, target.value) == (kind, pytest.approx(value))


@pytest.mark.parametrize("text", ["", "2.3", "fast", "2.3 G", "-1G", "1.6X", "12s", "nan x", "1e3M", "2,3G"])
def test_what_is_no_budget_is_refused_and_told_what_is(text):
    with pytest.raises(ValueError, match=r"expected multiply-adds of one image \(2.3G, 230M\).*1.6x.*1.6x-macs.*12ms"):
        Target.parse(text)


def test_budgets_of_nothing_are_refused():
    with pytest.raises(ValueError, match="must be greater than 0"):
        Target.parse("0ms")
    for text in ("1x", "0.5x", "1.0x-macs"):
        with pytest.raises(ValueError, match="the unreduced model is 1x"):
            Target.parse(text)


@pytest.mark.unchecked
def test_a_number_is_no_budget():
    with pytest.raises(TypeError, match="a budget is text"):
        Target.parse(2.3)


# ---------------------------------------------------------------------------------------------------- multiply-adds
PAIRS = [
    *((m, "plain") for m in ("etps", "bat", "tome", "dtps", "evit", "topk", "diffrate", "tofu", "mctf", "patchmerger")),
    *((m, "gap") for m in ("tome", "dtps", "avg-pool")),
    ("etps", "dinov3"),
    ("dynamicvit", "parallel"),
    ("etps", "siglip"),
]


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_multiply_adds_are_met_to_the_last_token(method, family):
    model = make(family)
    found = laconic.plan(model, method, "1.2x-macs", at=AT, **options(method, family))
    limit, space = found.baseline_macs / 1.2, ScheduleSpace(model, laconic.methods()[method].config(**options(method, family)))
    assert found.macs <= limit
    assert found.schedule.unit == "keep_counts"
    larger = space.larger(found.schedule)
    assert larger
    assert all(space.cost(more) > limit for more in larger)
    laconic.reduce_(model, method, schedule=found.schedule, **options(method, family))
    assert laconic.summary(model).macs == found.macs
    assert laconic.summary(model).tokens[-1] == found.schedule.values[-1]


def test_what_is_left_of_a_budget_goes_where_a_token_costs_most():
    space = ScheduleSpace(make("plain"), laconic.TopK())
    few = Schedule.keep_counts({1: 20, 2: 10})
    prices = {block: space.cost(more) for block, more in zip(few.at, space.larger(few), strict=True)}
    assert prices[2] > prices[1]
    assert space._filled(few, prices[2]) == Schedule.keep_counts({1: 20, 2: 11})


def test_rates_stay_rates_where_counts_would_say_something_else():
    """Parked tokens come back, so that what a block leaves is not what it runs."""
    found = laconic.plan(make("plain"), "evovit", "1.2x-macs")
    assert found.schedule.unit == "keep"
    assert found.macs <= found.baseline_macs / 1.2
    rate = found.schedule.values[0] + 1e-4
    more = ScheduleSpace(make("plain"), laconic.EvoViT()).cost(Schedule.rates(rate, found.schedule.at))
    assert more > found.baseline_macs / 1.2


def test_the_papers_schedule_is_found_again():
    model = make("plain", depth=12)
    laconic.reduce_(model, "etps", keep=0.7)
    macs, tokens = laconic.summary(model).macs, laconic.summary(model).tokens
    found = laconic.plan(model, "etps", f"{macs / 1e6}M")  # it may be reduced already
    assert found.macs == macs
    assert found.schedule.at == (3, 6, 9)
    assert found.schedule.values == tuple(tokens[b] for b in (3, 6, 9))
    assert laconic.summary(model).macs == macs  # and stays so


def test_merging_takes_half_at_most():
    found = laconic.plan(make("plain"), "tome", "1.4x-macs", at=AT)
    before = (36, *found.schedule.values)
    assert all(left >= n - n // 2 for n, left in zip(before, found.schedule.values, strict=False))


@pytest.mark.parametrize("method", ["tome", "pitome", "tofu"])
def test_merging_takes_more_where_it_may_spread(method):
    """At the usual blocks what a method can reach ends with half of half of half, or goes on in the blocks behind each."""
    model = make("plain", depth=12)
    with pytest.raises(ValueError, match="cannot reach it at blocks"):
        laconic.plan(model, method, "2.1x-macs")
    found = laconic.plan(model, method, "2.1x-macs", spread=True)
    assert found.macs <= found.baseline_macs / 2.1
    laconic.reduce_(model, method, schedule=found.schedule)
    assert laconic.summary(model).macs == found.macs


def test_stages_start_afresh():
    import timm

    import laconic.models

    model = timm.create_model("pvt_tiny", img_size=64, num_classes=5)
    found = laconic.plan(model, "dtps", "1.2x-macs")
    assert found.macs <= found.baseline_macs / 1.2
    laconic.reduce_(model, "dtps", schedule=found.schedule)
    assert laconic.summary(model).macs == found.macs


# ---------------------------------------------------------------------------------------------------- other sizes
def test_a_budget_is_met_at_the_size_of_the_example():
    model, x = make("plain", dynamic_img_size=True), torch.randn(2, 3, 160, 96)
    found = laconic.plan(model, "etps", "1.3x-macs", at=AT, example=x)
    base = laconic.summary(model, 1, example=x).macs
    assert found.baseline_macs == base
    space = ScheduleSpace(model, laconic.ETPS(), example=x)
    assert found.macs <= base / 1.3
    assert all(space.cost(more) > base / 1.3 for more in space.larger(found.schedule))
    assert max(found.schedule.values) > 36  # more than there are at the model's own size
    laconic.reduce_(model, "etps", schedule=found.schedule, example=x)
    assert laconic.summary(model, 1, example=x).macs == found.macs


def test_the_nearest_budget_is_that_of_the_example():
    model, x = make("plain", dynamic_img_size=True), torch.randn(1, 3, 160, 96)
    with pytest.raises(ValueError, match="nearest budget that it can reach is") as refused:
        laconic.plan(model, "tome", "1.9x-macs", example=x)
    nearest = str(refused.value).partition("nearest budget that it can reach is ")[2].partition(". Ask")[0]
    assert laconic.plan(model, "tome", nearest, example=x).macs < laconic.summary(model, example=x).macs


def test_an_example_that_the_model_does_not_take_is_refused():
    model = make("plain")
    with pytest.raises(ValueError, match="does not run on an image of shape"):
        laconic.plan(model, "etps", "1.3x-macs", example=torch.randn(1, 3, 160, 96))


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(("method", "text"), [("etps", "3x-macs"), ("tome", "1.9x-macs"), ("bat", "1M")])
def test_the_nearest_budget_that_can_be_reached_is_named_and_can_be(method, text):
    model = make("plain")
    with pytest.raises(ValueError, match="cannot reach it at blocks .* the nearest budget that it can reach is") as refused:
        laconic.plan(model, method, text)
    nearest = str(refused.value).partition("nearest budget that it can reach is ")[2].partition(". Ask")[0]
    assert laconic.plan(model, method, nearest).macs < laconic.summary(model).macs


def test_more_than_the_unreduced_model_takes_is_nothing_to_do():
    with pytest.raises(ValueError, match=r"the unreduced model takes .*M already, so there is nothing to do"):
        laconic.plan(make("plain"), "etps", "1G")


@pytest.mark.parametrize("method", ["ats", "avit", "ltmp", "adavit"])
def test_methods_that_decide_are_refused(method):
    with pytest.raises(ValueError, match=r"decides for every image how many tokens.*can be planned: .*etps"):
        laconic.plan(make("plain"), method, "1.2x-macs")


def test_options_that_say_how_many_are_refused_by_the_method():
    with pytest.raises(ValueError, match="either r .* or keep"):
        laconic.plan(make("plain"), "tome", "1.2x-macs", r=3)


def test_a_scorer_that_is_to_be_learned_cannot_be_searched_for():
    with pytest.raises(ValueError, match="dtps has parameters that must be trained .* plan it without images"):
        laconic.plan(make("plain"), "dtps", "1.2x-macs", images=torch.randn(4, 3, 96, 96))


def test_rates_cannot_be_searched_for():
    with pytest.raises(ValueError, match="evovit accepts keep rates only"):
        laconic.plan(make("plain"), "evovit", "1.2x-macs", images=torch.randn(4, 3, 96, 96))


@pytest.mark.unchecked
def test_images_must_be_images():
    with pytest.raises(ValueError, match="two or more"):
        Fidelity(ScheduleSpace(make("plain"), laconic.ETPS()), torch.randn(1, 3, 96, 96))
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        Fidelity(ScheduleSpace(make("plain"), laconic.ETPS()), torch.randn(3, 3, 96, 96), torch.zeros(2))
    with pytest.raises(ValueError, match="expected logits or features"):
        Fidelity(ScheduleSpace(make("plain", num_classes=0, global_pool=""), laconic.ETPS()), torch.randn(2, 3, 96, 96))


# ---------------------------------------------------------------------------------------------------- reduce_
def test_reduce_takes_a_budget():
    a, b = make("plain"), make("plain")
    laconic.reduce_(a, "bat", budget="1.3x-macs", at=AT)
    laconic.reduce_(b, "bat", schedule=laconic.plan(b, "bat", "1.3x-macs", at=AT).schedule)
    x = torch.randn(2, 3, 96, 96)
    assert a.laconic.schedule == b.laconic.schedule
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


def test_reduce_takes_a_budget_at_the_size_of_the_example():
    a, b, x = make("plain", dynamic_img_size=True), make("plain", dynamic_img_size=True), torch.randn(2, 3, 160, 96)
    laconic.reduce_(a, "bat", budget="1.3x-macs", at=AT, example=x)
    assert a.laconic.schedule == laconic.plan(b, "bat", "1.3x-macs", at=AT, example=x).schedule
    assert a.laconic.schedule != laconic.plan(b, "bat", "1.3x-macs", at=AT).schedule
    assert laconic.summary(a, example=x).macs <= laconic.summary(a, example=x).baseline_macs / 1.3


def test_a_budget_is_no_option():
    with pytest.raises(ValueError, match="expected multiply-adds"):
        laconic.reduce_(make("plain"), "etps", budget="log")


@pytest.mark.parametrize("also", [{"keep": 0.7}, {"schedule": Schedule.rates(0.7, AT)}])
def test_a_budget_stands_alone(also):
    model = make("plain")
    with pytest.raises(ValueError, match="not more than one of them"):
        laconic.reduce_(model, "etps", budget="1.3x-macs", **also)
    assert not hasattr(model, "laconic")


# ---------------------------------------------------------------------------------------------------- times
def test_a_curve_never_falls_and_goes_on_to_the_left():
    curve = Curve.through({10: (1.0, 1.0), 20: (3.0, 1.0), 30: (2.0, 1.0), 40: (4.0, 2.0)})
    assert curve.y == (1.0, 2.5, 2.5, 4.0)
    assert curve(15) == pytest.approx(1.75)
    assert curve(5) == pytest.approx(0.25)
    assert curve(0) == 0.0
    assert Curve((7.0,), (2.0,))(3) == 2.0


def test_costs_are_never_negative():
    generator = random.Random(0)
    rows = [[1.0, generator.random(), generator.random()] for _ in range(12)]
    assert not_negative(rows, [2 + 3 * b + 0.5 * c for _, b, c in rows], 3) == pytest.approx((2, 3, 0.5))
    found = not_negative(rows, [2 - 3 * b for _, b, _ in rows], 3)
    assert min(found) >= 0
    assert not_negative([], [], 3) == (0, 0, 0)


class Pretended(Stopwatch):
    """Time goes on only where a module of the model says so."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def between(self, begin, end):
        return end - begin


def pretend(model, watch, per_token=1e-4, per_pair=1e-6, stem=2e-3, noise=None):
    """A model whose parts take what we say: attention a pair, everything a token, and a stem."""

    def spend(seconds):
        watch.now += seconds * (1 if noise is None else noise())

    def attention(module, args, out):
        spend(per_token * args[0].shape[1] + per_pair * args[0].shape[1] ** 2)

    def mlp(module, args, out):
        spend(2 * per_token * args[0].shape[1])

    for block in model.blocks:
        block.attn.register_forward_hook(attention)
        block.mlp.register_forward_hook(mlp)
    model.patch_embed.register_forward_hook(lambda *_: spend(stem))
    return model


def planned(target, method="etps", noise=None, at=AT, **changes):
    watch = Pretended()
    model = pretend(make("plain", depth=6), watch, noise=noise, **changes)
    return Planner(ScheduleSpace(model, laconic.methods()[method].config()), Target.parse(target), at, Measuring(2, 5, watch))


def test_the_table_predicts_what_the_parts_take():
    made = planned("1.3x")
    assert made.table.outside * made.table.seconds == pytest.approx(2e-3)
    assert made.table.seconds == pytest.approx(2e-3 + 6 * (3e-4 * 37 + 1e-6 * 37**2))
    for schedule in (Schedule.keep_counts({1: 30, 2: 20, 3: 9}), Schedule.keep_counts({2: 12})):
        real = measure(made.space, [schedule], made.measuring)[0]
        assert made.table(made.space.summary(schedule)) == pytest.approx(1 / real.ratio.median, rel=0.05)
    assert Table.of_json(json.loads(json.dumps(made.table.to_json()))) == made.table


def test_each_half_of_a_block_goes_by_its_own_tokens():
    table = Table(1.0, 0.1, (0.5,), (0.25,), (0,), {0: 36}, (Curve((1, 37), (0.0, 1.0)),), ())
    assert table.block(BlockCost(0, 37, 10, 0, 0)) == pytest.approx(0.5 * (0.25 + 0.75 * 0.25))


@pytest.mark.parametrize("target", ["1.3x", "50ms", "1.5x"])
@pytest.mark.parametrize("method", ["etps", "tome", "dtps"])
def test_times_are_met(target, method):
    found = planned(target, method).plain()
    assert abs(found.off) <= 0.03
    assert found.predicted == pytest.approx(found.measured.ratio.median, rel=0.05)
    assert found.measured.batch_size == 2
    assert not found.notes


def test_times_are_of_the_example():
    """Its size, its images, and as many of them as are asked for."""
    watch, seen, x = Pretended(), list[torch.Tensor](), torch.randn(3, 3, 96, 160)
    model = pretend(make("plain", depth=6, dynamic_img_size=True), watch)
    model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if not args[0].is_meta else None)
    space = ScheduleSpace(model, laconic.ETPS(), example=x)
    seen.clear()
    made = Planner(space, Target.parse("1.4x"), AT, Measuring(4, 5, watch))
    proofs = [images for images in seen if len(images) == 1]
    assert all(torch.equal(images, torch.cat([x, x[:1]])) for images in seen if len(images) > 1)
    assert len(seen) > len(proofs)
    assert {images.shape for images in proofs} == {(1, 3, 96, 160)}
    assert made.table.seconds == pytest.approx(2e-3 + 6 * (3e-4 * 61 + 1e-6 * 61**2))
    found = made.plain()
    assert abs(found.off) <= 0.03
    assert max(found.schedule.values) > 36
    assert torch.equal(space.batch(2), x[:2])
    assert ScheduleSpace(model, laconic.ETPS()).batch(2).shape == (2, 3, 96, 96)


@pytest.mark.parametrize(("batch_size", "expected"), [(None, 3), (2, 2)])
def test_a_time_is_of_as_many_images_as_the_example_has(monkeypatch, batch_size, expected):
    asked, own = [], Planner.plain

    def plain(self):
        asked.append((self.measuring.batch_size, self.space.size.sides))
        return own(self)

    monkeypatch.setattr(Planner, "plain", plain)
    model, x = make("plain", dynamic_img_size=True), torch.randn(3, 3, 96, 160)
    laconic.plan(model, "etps", "1.3x-macs", batch_size=batch_size, example=x)
    laconic.plan(model, "etps", "1.3x-macs")
    assert asked == [(expected, (96, 160)), (1, None)]


def test_what_slows_both_down_for_a_while_changes_no_plan():
    """A time is planned as if the unreduced model always took the least that it took."""
    busy = [1.0]
    made = planned("50ms", noise=lambda: busy[0])
    busy[0] = 2.0
    found = made.plain()
    assert abs(found.off) <= 0.03
    assert found.base_seconds == pytest.approx(made.table.seconds)
    assert "raw milliseconds" in found.notes[0]
    assert found.schedule == planned("50ms").plain().schedule


def test_noise_is_no_obstacle():
    generator = random.Random(1)
    found = planned("1.4x", noise=lambda: generator.lognormvariate(0, 0.1)).plain()
    watch = Pretended()
    quiet = pretend(make("plain", depth=6), watch)
    real = measure(ScheduleSpace(quiet, laconic.ETPS()), [found.schedule], Measuring(2, 3, watch))[0]
    assert real.ratio.median == pytest.approx(1.4, rel=0.1)


def test_a_table_that_is_wrong_is_corrected_by_what_is_measured():
    made = planned("1.3x")
    lying = dataclasses.replace(made.table, outside=made.table.outside + 0.1)
    other = planned("1.3x")
    corrected = Planner(other.space, other.target, AT, other.measuring, lying)
    assert abs(corrected.plain().off) <= 0.03
    assert corrected.space.fit(corrected.usual, corrected.limit) != corrected.plain().schedule


def test_times_that_cannot_be_reached_are_refused():
    with pytest.raises(ValueError, match=r"nearest budget that it can reach is [\d.]+x\. Ask for that$") as refused:
        planned("20x").plain()
    nearest = str(refused.value).partition("can reach is ")[2].partition(". Ask")[0]
    assert abs(planned(nearest).plain().off) <= 0.03
    with pytest.raises(ValueError, match=r"the unreduced model takes [\d.]+ms already"):
        planned("900ms")


def test_where_reduction_does_not_pay_it_says_so():
    """As on a machine where every operation takes the same time: the tokens do not matter, the reducer does."""
    watch = Pretended()
    model = make("plain", depth=6)
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: setattr(watch, "now", watch.now + 1.0))
    config = laconic.ETPS()

    made = Planner(ScheduleSpace(model, config), Target.parse("1.1x"), AT, Measuring(2, 3, watch))
    with pytest.raises(ValueError, match="costs more than it saves.*larger batches"):
        made.plain()
    measured = Measured(Quartiles(0.8, 0.9, 0.95), Quartiles(1.0, 1.0, 1.0), Quartiles(0.9, 0.9, 0.9), 2, 3)
    assert "SLOWER than the unreduced model (0.90x)" in remarks(measured, Target.parse("2G"))[0]
    torn = dataclasses.replace(measured, ratio=Quartiles(0.9, 0.99, 1.1), base_seconds=Quartiles(1.0, 2.0, 3.0))
    assert "no faster" in remarks(torn, Target.parse("2G"))[0]
    assert "other load disturbed" in remarks(torn, Target.parse("2G"))[1]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rounds": 0}])
def test_measurements_are_of_something(wrong):
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        Measuring(**wrong)


def test_a_real_clock_gives_a_plan():
    """No number is looked at: the machine that runs this may be busy."""
    space = ScheduleSpace(make("plain"), laconic.ETPS())
    table = measure_table(space, space.usual(AT), Measuring(1, 1))
    assert table.seconds > 0
    assert len(table.blocks) == 4


# ---------------------------------------------------------------------------------------------------- the search
def synthetic(schedule):
    """Reducing late is good, and block 1 must be left alone."""
    return sum(abs(value) / 10 for value in schedule.values) / len(schedule.at) + 5 * (1 in schedule.at) - max(schedule.at)


def search(score=synthetic, steps=12, seed=0, at=None):
    space = ScheduleSpace(make("plain", depth=6), laconic.ETPS())
    limit = space.unreduced().macs / 1.3
    uniform = space.fit(space.usual(at), limit)
    first = Found(tuple(weights_of(space, uniform).items()), uniform, score(uniform))
    return space, limit, first, Search(space, limit, score, seed, at).run([first], steps)


def test_a_search_is_never_worse_and_keeps_the_budget():
    space, limit, first, found = search()
    assert found[0].score < first.score
    assert 1 not in found[0].schedule.at
    assert all(space.cost(one.schedule) <= limit for one in found)
    assert all(space.cost(one.schedule) > 0.98 * limit for one in found)
    assert [one.score for one in found] == sorted(one.score for one in found)
    assert len(found) > 8


def test_a_search_that_finds_nothing_gives_back_what_it_had():
    uniform = search(steps=1)[2].schedule
    _, _, first, found = search(lambda schedule: float(schedule != uniform), steps=6)
    assert found[0] == first


def test_a_search_is_seeded_and_may_be_told_where():
    assert search()[3] == (once := search()[3])
    assert search(seed=1)[3] != once
    _, _, first, found = search(at=(2, 3, 4), steps=6)
    assert all(set(one.schedule.at) <= {2, 3, 4} for one in found if one != first)


def test_what_a_method_refuses_comes_last():
    def picky(schedule):
        if 2 in schedule.at:
            raise ValueError("not at block 2")
        return synthetic(schedule)

    _, _, first, found = search(picky)
    assert math.isinf(found[-1].score)
    assert 2 not in found[0].schedule.at


def test_a_search_that_was_stopped_goes_on(tmp_path):
    calls = []

    def counted(schedule):
        calls.append(schedule)
        return synthetic(schedule)

    def once(path, steps, question="x"):
        scores = Scores(path, {"q": question})
        scores.begin(None)
        return search(scores.remember(counted), steps)[3]

    whole = once(tmp_path / "whole.jsonl", 12)
    many = len(calls)
    once(tmp_path / "part.jsonl", 7)
    with (tmp_path / "part.jsonl").open("a") as file:
        file.write('{"schedule": {"at": [1')  # the power failed
    calls.clear()
    assert once(tmp_path / "part.jsonl", 12) == whole
    assert 0 < len(calls) < many
    with pytest.raises(Refusal, match="another search"):
        Scores(tmp_path / "part.jsonl", {"q": "y"})


def test_a_plan_with_images():
    model, x = make("plain"), torch.randn(12, 3, 96, 96)
    found = laconic.plan(model, "topk", "1.3x-macs", images=x, labels=torch.arange(12) % 10, steps=6)
    assert found.macs <= found.baseline_macs / 1.3
    assert [one.name for one in found.judged] == ["searched", "uniform"]
    assert {one.images for one in found.judged} == {6}
    assert found.evaluated >= 4
    assert len(found.front) >= 4
    assert found.comparison.top1 is not None
    assert json.loads(json.dumps(found.to_json()))["comparison"]["verdict"] == found.comparison.verdict
    assert not hasattr(model, "laconic")
    assert found.recipe.startswith('[method]\nname = "topk"\nschedule = { at = [')


def test_a_schedule_is_judged_on_images_that_the_search_has_not_seen(monkeypatch):
    shown, own = [], Fidelity.__init__
    monkeypatch.setattr(
        Fidelity, "__init__", lambda judge, space, x, names: (shown.append((x, names)), own(judge, space, x, names))[1]
    )
    x, labels = torch.randn(8, 3, 96, 96), torch.arange(8)
    laconic.plan(make("plain"), "topk", "1.3x-macs", images=x, labels=labels, steps=1)
    assert [names.tolist() for _, names in shown] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert all(torch.equal(part, x[names]) for part, names in shown)


def test_distances_are_those_of_the_answers():
    space = ScheduleSpace(make("plain"), laconic.TopK())
    x = torch.randn(4, 3, 96, 96)
    judge, whole = Fidelity(space, x), Schedule.keep_counts({1: 36})
    assert judge(whole).distance == pytest.approx([0] * 4, abs=1e-6)
    assert judge(whole).agrees == (True,) * 4
    assert judge(whole).correct is None
    own = laconic.reduce_(make("plain"), "topk", schedule=Schedule.keep_counts({1: 9}))
    with torch.no_grad():
        a, b = make("plain")(x).double().log_softmax(1), own(x).double().log_softmax(1)
    assert judge(Schedule.keep_counts({1: 9})).distance == pytest.approx((a.exp() * (a - b)).sum(1).tolist(), rel=1e-3)
    bare = Fidelity(ScheduleSpace(make("plain", num_classes=0), laconic.TopK()), x)
    assert 0 < max(bare(Schedule.keep_counts({1: 9})).distance) < 2


@pytest.mark.parametrize(("shift", "words"), [(-1.0, "closer"), (1.0, "WORSE"), (0.0, "not clearly better")])
def test_the_verdict_is_plain(shift, words):
    assert words in Comparison(Mean(shift, 0.5), None).verdict


def test_differences_are_of_pairs():
    space, x = ScheduleSpace(make("plain"), laconic.TopK()), torch.randn(4, 3, 96, 96)
    judge = Fidelity(space, x, torch.zeros(4, dtype=torch.long))
    one = judge(Schedule.keep_counts({1: 9}))
    assert difference(one, one) == (Mean(0.0, 0.0), Mean(0.0, 0.0))


# ---------------------------------------------------------------------------------------------------- recipes
def test_a_recipe_may_have_a_schedule():
    recipe = from_json({"method": {"name": "etps"}}).replaced(["method.schedule={at=[1, 2], leave=[20, 10]}"])
    assert recipe.method.schedule == {"at": [1, 2], "leave": [20, 10]}
    assert from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"schedule": {"at": [1], "leave": [9]}, "keep": 0.7}, "method.keep is set too"),
        ({"schedule": {"at": [1], "leave": [9]}, "at": [1]}, "method.at is set too"),
        ({"schedule": {"at": [1], "leaves": [9]}}, "method.schedule: schedule must have 'at' and one of"),
        ({"schedule": {"at": [1], "leave": [9]}, "warm_in_epochs": 0.5}, "only keep rates can be warmed in"),
    ],
)
def test_a_recipes_schedule_is_checked(part, words):
    with pytest.raises(ValueError, match=words):
        check(from_json({"method": {"name": "etps", **part}}))


def test_a_schedule_needs_a_method():
    with pytest.raises(ValueError, match="method.schedule is set and method.name is not"):
        check(from_json({"method": {"schedule": {"at": [1], "leave": [9]}}}))


def test_a_planned_schedule_trains(tmp_path):
    pytest.importorskip("accelerate")
    from laconic.cli.train import train
    from laconic.training.run_config import Running

    sizes = ("model.pretrained=false", "data.train_images=4", "data.val_images=4", "optimization.batch_size=4")
    schedule = "method.schedule={at=[2, 5], leave=[40, 11]}"
    report = train(
        set=(*sizes, "method.name=etps", schedule), output=tmp_path / "run", running=Running(device="cpu", workers=0)
    )
    trained = laconic.load(report.saved)
    assert report.steps == 1
    assert trained.laconic.schedule == Schedule.keep_counts({2: 40, 5: 11})
    assert "leave" in str(report)


# ---------------------------------------------------------------------------------------------------- the command
TINY = ("scenes_vit_small", "--method", "etps", "--threads", "1", "--rounds", "1", "--batch-size", "1")


def test_the_command_writes_a_plan_that_can_be_checked(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert cli.main(["plan", *TINY, "--target", "1.5x-macs", "--output", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert printed["macs"] <= printed["baseline_macs"] / 1.5
    assert printed["environment"]["torch"] == torch.__version__
    model = plan_job.create("scenes_vit_small")
    laconic.reduce_(model, printed["method"]["name"], schedule=printed["schedule"])
    assert laconic.summary(model).macs == printed["macs"]
    assert cli.main(["plan", "--check", str(path), "--rounds", "1", "--output", str(tmp_path / "check.json")]) == 0
    assert json.loads((tmp_path / "check.json").read_text())["before"] == printed["measured"]
    assert "as planned for 1.5x-macs" in capsys.readouterr().out
    printed["macs"] += 1
    path.write_text(json.dumps(printed))
    assert cli.main(["plan", "--check", str(path), "--rounds", "1"]) == 1
    assert "multiply-adds, and takes" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_searches_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # the weights that come with laconic
    words = [*TINY, "--target", "1.5x-macs", "--data", "scenes", "--limit", "12", "--steps", "3"]
    words += ["--output", str(tmp_path / "p.json")]
    assert cli.main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "Held-out images: 6 of scenes, val, 12 images" in out
    assert "Verdict: the searched schedule is" in out
    lines = (tmp_path / "p.search.jsonl").read_text().splitlines()
    assert cli.main(["plan", *words]) == 0
    assert (tmp_path / "p.search.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "MODEL and --method and --target missing"),
        (["deit_tiny_patch16_224", "--method", "etps"], "--target missing"),
        (["deit_tiny_patch16_224", "--method", "etps", "--target", "quick"], "expected multiply-adds"),
        (["x", "--check", "nowhere.json"], "leave out everything else"),
        (["--check", "nowhere.json"], "is not a plan that laconic wrote"),
        (
            ["deit_tiny_patch16_224", "--method", "etps", "--target", "1G", "--data", "scenes"],
            "a search by them would find nothing",
        ),
    ],
)
def test_the_command_refuses(words, said, capsys):
    assert cli.main(["plan", *words]) == 1
    assert said in capsys.readouterr().err


def report(target, ratio, before=0.1, now=0.1):
    def spans(value):
        return Quartiles(value, value, value)

    own = before / (1.5 if target.endswith("x") else before / 0.05)
    first = Measured(spans(before / own), spans(own), spans(before), 1, 10)
    return CheckReport(
        "p.json", Target.parse(target), first, Measured(spans(ratio), spans(now / ratio), spans(now), 1, 10), 1, before, {}
    )


def test_a_check_goes_by_ratios():
    assert checked(report("1.5x", 1.45)).off == pytest.approx(1.5 / 1.45 - 1)
    slow = report("50ms", 2.0, now=0.2)  # a machine that is half as quick now
    assert checked(slow).off == pytest.approx(0)
    assert slow.raw == pytest.approx(1.0)
    assert "200% of its earlier time" in str(slow)
    for bad in (report("1.5x", 1.3), report("1.5x", 1.8), report("50ms", 1.7)):
        with pytest.raises(Refusal, match=r"now off by .*Plan it again"):
            checked(bad)
    assert relative_error(Target.parse("2G"), slow.now) is None
