"""Where a reduction costs more than it saves, it says so: multiply-adds in closed form, and time by a clock of our own."""

import copy
import logging

import pytest
import torch

import laconic
from families import METHODS, VARIABLE, at, make, options
from laconic.analysis import break_even as paying
from laconic.analysis.break_even import Balance, balance, expected, time_balance, timed, warn_unless_it_pays
from laconic.analysis.stopwatch import Stopwatch
from laconic.core.backbone import find_host
from laconic.methods.atc import ATCReducer


@pytest.mark.parametrize("method", [m for m in METHODS if m not in VARIABLE])
def test_the_balance_is_that_of_the_summary(method):
    model = laconic.reduce_(make("plain"), method, keep=0.6, at=at(method, (1, 2)), **options(method, "plain"))
    host, entry = find_host(model)
    spared, spent, whole = balance(host, entry, model.laconic.config, model.laconic.schedule)
    cost = laconic.summary(model)
    assert spent == sum(block.reducer_macs for block in cost.blocks)
    # pools at the end may read fewer tokens: here it is the class token that is read
    assert cost.baseline_macs - cost.macs == spared - spent
    assert whole - spared == sum(block.macs for block in cost.blocks)


def test_a_schedule_that_does_not_pay(caplog):
    """Distances of all 1,024 tokens, to leave out one in twenty in the last block."""
    with caplog.at_level(logging.WARNING, logger="laconic"):
        laconic.reduce_(make("plain", img_size=512), "dpc-knn", keep=0.95, at=[3])
    assert "dpc-knn costs more than it saves with this schedule: its reducers take" in caplog.text
    assert "Reduce in fewer or in earlier blocks" in caplog.text


def test_one_that_does(caplog):
    with caplog.at_level(logging.WARNING, logger="laconic"):
        laconic.reduce_(make("plain", img_size=512), "dpc-knn", keep=0.5, at=[1])
        laconic.reduce_(make("plain"), "etps", keep=1.0)
        laconic.reduce_(make("plain"), "ats")
    assert caplog.text == ""


def test_a_use_before_training_is_said_once_and_a_measurement_is_no_use(caplog):
    with caplog.at_level(logging.WARNING, logger="laconic"):
        model = laconic.reduce_(make("plain"), "dpc-knn", keep=0.5, at=[1])
        laconic.summary(model, example=torch.zeros(2, 3, 96, 96))
        warn(model, torch.zeros(3, 3, 96, 96))
        assert "trained" not in caplog.text
        for _ in range(2):
            model(torch.zeros(1, 3, 96, 96))
    assert caplog.text.count("neither trained nor loaded") == 1


def test_multiply_adds_are_judged_at_the_size_of_the_example(caplog):
    """At 512 px the last block is not worth the distances; at 96 px it is."""
    model = make("plain", dynamic_img_size=True)
    host, entry = find_host(model)
    config, schedule = laconic.DPCKNN(), laconic.Schedule.rates(0.95, [3])
    laconic.reduce_(model, config, schedule=schedule)
    with caplog.at_level(logging.WARNING, logger="laconic"):
        warn_unless_it_pays(host, entry, config, schedule)
        assert caplog.text == ""
        warn_unless_it_pays(host, entry, config, schedule, torch.zeros(1, 3, 512, 512))
    assert "costs more than it saves" in caplog.text


# ---------------------------------------------------------------------------------------------------- time
class Pretended(Stopwatch):
    """Time goes on only where the model's parts say so."""

    def __init__(self):
        self.now, self.forwards = 0.0, 0

    def mark(self):
        return self.now

    def between(self, begin, end):
        return end - begin


@pytest.fixture
def clock(monkeypatch):
    watch = Pretended()
    monkeypatch.setattr(paying, "LEAST_MACS", 0)
    monkeypatch.setattr(paying, "stopwatch", lambda device: watch)
    return watch


def pretend(model, watch):
    """A token takes a millisecond in each block, two thirds of it in the MLP; and forwards are counted."""

    def spend(seconds):
        return lambda module, args, out: setattr(watch, "now", watch.now + seconds * args[0].shape[1])

    for block in model.blocks:
        block.attn.register_forward_hook(spend(1e-3 / 3))
        block.mlp.register_forward_hook(spend(2e-3 / 3))
    model.blocks[0].register_forward_hook(lambda *_: setattr(watch, "forwards", watch.forwards + 1))
    return model


def slow(monkeypatch, watch, seconds):
    """Clustering takes so long in each block, and draws a number."""
    own = ATCReducer.between

    def between(self, tokens, seen, n):
        watch.now += seconds + 0 * torch.rand(1).item()
        return own(self, tokens, seen, n)

    monkeypatch.setattr(ATCReducer, "between", between)


def clustered(watch, **changes):
    """Three blocks of four, 36 tokens and the class token: 148 ms unreduced; reduced 121 / 3 + 94 / 1.5 = 103 ms."""
    with paying.quiet():
        return laconic.reduce_(pretend(make("plain", **changes), watch), "atc", schedule=laconic.Schedule.keep_counts(COUNTS))


COUNTS = {1: 27, 2: 18, 3: 9}
UNREDUCED, BLOCKS = 0.148, 0.103


def warn(model, example=None):
    host, entry = find_host(model)
    warn_unless_it_pays(host, entry, model.laconic.config, model.laconic.schedule, example)


def test_steps_that_take_longer_than_the_blocks_are_spared(caplog, monkeypatch, clock):
    model = clustered(clock)
    slow(monkeypatch, clock, 0.02)
    with caplog.at_level(logging.WARNING, logger="laconic"):
        warn(model)
    found = laconic.summary(model).timed
    assert found.ratio == pytest.approx(UNREDUCED / (BLOCKS + 0.06))
    assert (found.unreduced, found.reduced, found.steps) == pytest.approx((UNREDUCED, BLOCKS + 0.06, 0.06))
    assert (found.shape, found.device) == ((1, 3, 96, 96), "cpu")
    for told in (caplog.text, str(laconic.summary(model))):
        assert "SLOWER than unreduced (0.91x)" in told
        assert "163 ms per forward instead of 148 ms" in told
    assert laconic.summary(model).macs < laconic.summary(model).baseline_macs


def test_steps_that_pay_cost_one_forward_and_no_word(caplog, monkeypatch, clock):
    model = clustered(clock)
    slow(monkeypatch, clock, 0.0001)
    before = clock.forwards
    with caplog.at_level(logging.WARNING, logger="laconic"):
        warn(model)
    assert clock.forwards - before == 2  # one to warm up
    assert caplog.text == ""
    assert laconic.summary(model).timed is None


def test_what_may_not_pay_is_measured_and_no_warning_if_it_does(caplog, monkeypatch, clock):
    model = clustered(clock)
    slow(monkeypatch, clock, 0.012)
    with caplog.at_level(logging.WARNING, logger="laconic"):
        warn(model)
    assert caplog.text == ""
    found = laconic.summary(model).timed
    assert found.ratio == pytest.approx(UNREDUCED / (BLOCKS + 0.036))
    assert "1.06x as fast as unreduced" in str(laconic.summary(model))


def test_one_slow_forward_is_not_taken_for_slow_steps(clock, monkeypatch):
    model, times = clustered(clock), iter([(0.2, 0.15), (0.12, 0.001)])
    monkeypatch.setattr(paying, "time_reduced", lambda *_: next(times))
    assert time_balance(model.laconic, torch.zeros(1, 3, 96, 96), Balance(30, 0, 100)) is None


def test_the_least_of_several_forwards_counts(clock, monkeypatch):
    model, times = clustered(clock), iter([(0.2, 0.1), (0.3, 0.2), (0.19, 0.09), *[(0.5, 0.4)] * 9])
    monkeypatch.setattr(paying, "time_reduced", lambda *_: next(times))
    found = time_balance(model.laconic, torch.zeros(1, 3, 96, 96), Balance(30, 0, 100))
    assert (found.reduced, found.steps) == (0.19, 0.09)


def test_what_is_expected_of_the_share_of_the_steps():
    """Of 10 s the steps take 2, and the other 8 are half of the unreduced model's blocks."""
    assert expected(10.0, 2.0, Balance(50, 7, 100)) == pytest.approx(1.6)
    assert expected(10.0, 6.0, Balance(50, 7, 100)) == pytest.approx(0.8)


def test_the_example_says_how_much_is_timed(monkeypatch, clock):
    """What was found is of one input; another is measured again, and the same one is not."""
    model = clustered(clock, dynamic_img_size=True)
    slow(monkeypatch, clock, 0.2)
    small, large = torch.zeros(2, 3, 96, 96), torch.zeros(1, 3, 96, 192)
    cost = laconic.summary(model, example=large)
    assert cost.timed.shape == (1, 3, 96, 192)
    assert cost.timed.unreduced == pytest.approx(4e-3 * 73)
    assert laconic.summary(model, example=small).timed.shape == (2, 3, 96, 96)
    before = clock.forwards
    assert laconic.summary(model, example=small).timed.shape == (2, 3, 96, 96)
    assert clock.forwards == before
    assert laconic.summary(model).timed.shape == (2, 3, 96, 96)
    model.laconic.set_schedule(laconic.Schedule.keep_counts({1: 30, 2: 20, 3: 10}))
    assert laconic.summary(model).timed is None


def test_measuring_leaves_no_trace(monkeypatch, clock):
    model = clustered(clock).train()
    slow(monkeypatch, clock, 0.2)
    model.blocks[0].eval()
    model(torch.zeros(2, 3, 96, 96))
    before, state, named = laconic.provenance(model).final.where, torch.get_rng_state(), dict(vars(model.laconic))
    warn(model)
    assert laconic.summary(model).timed.ratio < 1
    assert laconic.provenance(model).final.where is before
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.blocks[0].training) == (True, False)
    assert vars(model.laconic).keys() == named.keys()
    assert timed(copy.deepcopy(model).laconic, None) is None  # what a copy takes has not been measured


def test_what_is_small_or_different_for_every_image_is_not_timed(monkeypatch, clock):
    model = clustered(clock)
    slow(monkeypatch, clock, 0.2)
    before = clock.forwards
    with paying.quiet():
        warn(model)
        assert clock.forwards == before
        laconic.reduce_(pretend(make("plain"), clock), "ats")
    proof, before = clock.forwards - before, clock.forwards
    variable = laconic.reduce_(pretend(make("plain"), clock), "ats")
    warn(variable)
    assert clock.forwards - before == proof
    assert laconic.summary(variable).timed is laconic.summary(model).timed is None
    monkeypatch.setattr(paying, "LEAST_MACS", 1e9)
    warn(model)
    assert laconic.summary(model).timed is None


def test_a_warning_that_cannot_be_made_is_no_failure(monkeypatch, clock, caplog):
    model = clustered(clock)

    def full(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(paying, "time_reduced", full)
    with caplog.at_level(logging.INFO, logger="laconic"):
        warn(model)
    assert "out of memory" in caplog.text
    assert vars(model.laconic).get("_moment") is None


def test_reduce_says_so_at_the_size_of_the_example(caplog, monkeypatch, clock):
    slow(monkeypatch, clock, 0.2)
    model, x = pretend(make("plain", dynamic_img_size=True), clock), torch.zeros(2, 3, 96, 160)
    with caplog.at_level(logging.WARNING, logger="laconic"):
        laconic.reduce_(model, "atc", keep=0.6, at=(1, 2), example=x)
    assert "SLOWER than unreduced" in caplog.text
    assert laconic.summary(model).timed.shape == (2, 3, 96, 160)
