"""`laconic.Chain`: several methods in one model, each with its own schedule."""

import copy
import json
import pickle

import pytest
import torch

import laconic
from families import FAMILIES, fill, images, make
from laconic.checkpoints import load, save
from laconic.core.method import resolve
from laconic.core.schedule import Schedule
from test_laws import run


def chain(first=("dtps", {"keep": 0.5, "at": [1]}), second=("tome", {"keep": 0.7, "at": [2, 3]})):
    return laconic.Chain(first, second)


def chained(family, config):
    model = laconic.reduce_(make(family), config)
    fill(model.laconic)
    return model


def served(family):
    """The second method of a chain that the family has a place for."""
    return ("dtps", {"keep": 0.6, "at": [3]}) if family == "parallel" else ("tome", {"keep": 0.7, "at": [2, 3]})


@pytest.mark.parametrize("family", list(FAMILIES))
def test_keep_1_of_both_is_the_identity(family):
    model, x = make(family), images(family)
    expected = run(model, x)
    name, arguments = served(family)
    laconic.reduce_(model, chain(("dtps", {"keep": 1.0, "at": [1]}), (name, {**arguments, "keep": 1.0})))
    assert torch.equal(run(model, x), expected)
    assert model.laconic.counts() == (36,) * 4


@pytest.mark.parametrize("family", list(FAMILIES))
def test_counts_are_those_of_each_schedule_and_provenance_goes_through_both(family):
    model, x = chained(family, chain(second=served(family))), images(family)
    run(model, x)
    after_dtps = 18
    expected = (36, 18, 18, 10) if family == "parallel" else (36, 18, int(18 * 0.7), int(18 * 0.7**2))
    if family == "parallel":  # ceil(0.6 * 18) = 11 for EViT's count, int for DynamicViT's
        expected = (36, 18, 18, laconic.DTPS().num_kept((0.6,), after_dtps, after_dtps))
    assert model.laconic.counts() == expected
    stages = laconic.provenance(model).stages
    assert tuple(stage.size.shape[1] for stage in stages) == tuple(expected[stage.block] for stage in stages)
    for stage in stages:
        held = (stage.where.unsqueeze(1) == torch.arange(stage.size.shape[1])[None, :, None]).sum(2)
        assert torch.equal(held.float(), stage.size)
    first, last = stages[0], stages[-1]
    for image in range(3):  # patches that the first method put together stay together
        for token in range(first.size.shape[1]):
            assert len(set(last.where[image][first.where[image] == token].tolist())) <= 1


@pytest.mark.parametrize("family", ["plain", "siglip", "dinov3"])
def test_a_batch_equals_its_images_one_by_one(family):
    model, x = chained(family, chain()), images(family)
    singles = torch.cat([run(model, image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(run(model, x), singles, rtol=1e-4, atol=1e-4)


def test_a_chain_equals_its_methods_one_after_the_other():
    """The tokens after a first method, which drops, are those that the second one alone gets from the first block on."""
    x, schedule = images("plain"), Schedule.keep_counts({1: 20, 3: 9})
    whole = laconic.reduce_(make("plain"), "topk", schedule=schedule)
    parts = laconic.Chain(("topk", {"schedule": {"at": [1], "keep_counts": [20]}}), ("topk", {"keep": 0.45, "at": [3]}))
    chained = laconic.reduce_(make("plain"), parts)
    assert chained.laconic.counts() == whole.laconic.counts()
    assert torch.equal(run(chained, x), run(whole, x))


def test_restore_gives_the_original_back():
    model, x = make("plain"), images("plain")
    expected, keys = run(model, x), list(model.state_dict())
    laconic.reduce_(model, chain())
    assert not torch.equal(run(model, x), expected)
    laconic.restore_(model)
    assert torch.equal(run(model, x), expected)
    assert list(model.state_dict()) == keys


def test_a_saved_chain_is_loaded(tmp_path):
    config = laconic.Chain(("svite", {"keep": 0.5}), ("tome", {"r": (2, -1.0)}))
    model, x = laconic.reduce_(make("plain"), config), images("plain")
    fill(model.laconic)
    save(model, tmp_path)
    record = json.loads((tmp_path / "laconic.json").read_text())
    assert [part[0] for part in record["method"]["options"]["parts"]] == ["svite", "tome"]
    again = load(tmp_path)
    assert again.laconic.config == config
    assert again.laconic.schedule == model.laconic.schedule
    assert torch.equal(run(again, x), run(model, x))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, x), run(model, x))
        assert hash(other.laconic.config) == hash(config)


def test_two_methods_in_one_block():
    """Before the first block, and between its attention and MLP: sizes and counts are those of both."""
    model, x = laconic.reduce_(make("plain"), laconic.Chain(("svite", {"keep": 0.5}), ("tome", {"r": 2}))), images("plain")
    run(model, x)
    assert model.laconic.counts() == (16, 14, 12, 10)
    rows = laconic.summary(model).blocks
    assert [(row.attention_tokens, row.mlp_tokens) for row in rows] == [(19, 17), (17, 15), (15, 13), (13, 11)]
    counted = laconic.summary(model, count=True)
    assert counted.macs == counted.counted_macs
    model.train()
    sum(p.square().mean() for p in [model(x)]).backward()
    assert model.laconic.reducers["0"].inner["0"].scorer.weight.grad.abs().sum() > 0


def test_rates_can_be_warmed_in():
    model, x = laconic.reduce_(make("plain"), chain()), images("plain")
    old = model.laconic.schedule
    model.laconic.set_schedule(laconic.WarmIn(0, 10)(old, 5))
    assert 18 < model.laconic.counts()[1] < 36
    run(model, x)
    model.laconic.set_schedule(old)
    run(model, x)
    assert laconic.provenance(model).stages[0].size.shape[1] == 18
    assert Schedule.of(json.loads(json.dumps(old.to_json()))) == old


def test_an_adaptive_method_may_come_last():
    x = images("plain")
    model = laconic.reduce_(make("plain"), laconic.Chain(("topk", {"keep": 0.5, "at": [1]}), ("ats", {"at": [2, 3]})))
    torch.testing.assert_close(run(model, x), torch.cat([run(model, one[None]) for one in x]), rtol=1e-4, atol=1e-4)
    assert laconic.provenance(model).final.size.shape[1] <= 18


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("tome", {"r": 2})], "needs two methods"),
        ([("topk", {"keep": 0.5, "at": [2]}), ("tome", {"keep": 0.5, "at": [1]})], "must end before the next one begins"),
        ([("topk", {"keep": 0.5, "at": [2]}), ("tome", {"keep": 0.5, "at": [2]})], "must end before the next one begins"),
        ([("ats", {}), ("tome", {"keep": 0.5, "at": [3]})], "cannot follow ats"),
        ([("evovit", {"keep": 0.5}), ("tome", {"keep": 0.5, "at": [3]})], "only be the last"),
        ([("topk", {"keep": 0.5, "at": [1]}), ("tome", {"keep": 0.3, "at": [3]})], "smallest rate is 0.5"),
        ([("topk", {"keep": 0.5, "schedule": {"at": [1], "keep": [0.5]}}), ("tome", {"r": 1})], "not both"),
    ],
)
def test_a_chain_that_cannot_run_is_refused(parts, message):
    model, x = make("plain"), images("plain")
    expected = run(model, x)
    with pytest.raises(ValueError, match=message):
        laconic.reduce_(model, laconic.Chain(*parts))
    assert torch.equal(run(model, x), expected)


def test_arguments_of_a_chain_are_those_of_its_methods():
    with pytest.raises(ValueError, match="belong to each method"):
        laconic.reduce_(make("plain"), chain(), keep=0.5)
    with pytest.raises(TypeError, match="no option 'kep'"):
        laconic.Chain(("topk", {"kep": 0.5}), "ats")
    with pytest.raises(TypeError, match="a dict of its arguments"):
        laconic.Chain(("topk", 0.5), "ats")
    assert resolve("chain", chain().describe()["options"]) == chain()
    assert "chain" not in laconic.methods()
    config = laconic.Chain((laconic.TopK(score="mean-query"), {"keep": 0.5}), laconic.ATS())
    assert config.members[0].score == "mean-query"
