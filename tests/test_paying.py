"""Where a reduction costs more than it saves, it says so."""

import logging

import pytest

import laconic
from families import METHODS, VARIABLE, make, options
from laconic.hosts import find_host
from laconic.paying import balance


@pytest.mark.parametrize("method", [m for m in METHODS if m not in VARIABLE])
def test_the_balance_is_that_of_the_summary(method):
    model = laconic.reduce_(make("plain"), method, keep=0.6, at=(1, 2), **options(method, "plain"))
    host, entry = find_host(model)
    spared, spent = balance(host, entry, model.laconic.config, model.laconic.schedule)
    cost = laconic.summary(model)
    assert spent == sum(block.reducer_macs for block in cost.blocks)
    # pools at the end may read fewer tokens: here it is the class token that is read
    assert cost.baseline_macs - cost.macs == spared - spent


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
