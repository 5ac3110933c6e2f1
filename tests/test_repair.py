"""Repair of a reduced model: scales and biases meet the unreduced model's answers, and held-out images decide."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import laconic
from families import make
from laconic.analysis.diagnose import shared_copy
from laconic.planning.measures import Measure
from laconic.planning.repair import Repaired, scales_and_biases
from laconic.planning.scores import halves_of
from laconic.planning.tuned import Tuned


def pictures(count=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 6, 6, generator=draw), size=(96, 96), mode="bicubic")


def unreduced():
    model = make("plain").eval()
    model.reset_classifier(0)
    return model


def reduced():
    return laconic.reduce_(unreduced(), "topk", keep=0.3)


def parameters(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


@pytest.fixture(scope="module")
def distilled():
    model = reduced()
    before = parameters(model)
    found = laconic.repair_(model, pictures(64), held_out=pictures(16, 1), steps=60)
    return model, before, found


def test_distillation_changes_scales_and_biases_only_and_helps(distilled):
    model, before, found = distilled
    assert found.kept
    assert found.gain.low > 0
    assert found.steps == 60
    assert found.images == (64, 16)
    assert found.after.mean - found.before.mean == pytest.approx(found.gain.mean)
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert changed
    assert all(before[name].dim() == 1 for name in changed)
    assert all(one.requires_grad and one.grad is None for one in model.parameters())
    measured = Measure(unreduced(), pictures(16, 1), None, "same-answer")
    assert float(measured(model).mean()) == pytest.approx(found.after.mean, abs=1e-6)


def test_the_same_steps_give_the_same_parameters(distilled):
    model = reduced()
    laconic.repair_(model, pictures(64), held_out=pictures(16, 1), steps=60)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), distilled[0].parameters(), strict=True))


def test_a_repair_that_does_not_help_is_undone():
    model = reduced()
    before = parameters(model)
    found = laconic.repair_(model, pictures(), steps=3, measure=lambda model, images: torch.zeros(len(images)))
    assert not found.kept
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())


def test_an_interrupted_repair_is_undone(monkeypatch):
    model = reduced()
    before, calls = parameters(model), []

    def measure(model, images):
        calls.append(len(images))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return torch.zeros(len(images))

    with pytest.raises(KeyboardInterrupt):
        laconic.repair_(model, pictures(8), steps=1, measure=measure)
    assert all(torch.equal(one, before[name]) and one.requires_grad for name, one in model.named_parameters())


@pytest.mark.parametrize("measure", ["same-answer", "dense"])
def test_the_closed_form_finds_a_scale_and_bias_that_were_changed(measure):
    base = unreduced()
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    with torch.no_grad():
        model.norm.weight.mul_(1 + 0.3 * torch.randn(len(model.norm.weight)))
        model.norm.bias.add_(torch.randn(len(model.norm.bias)))
    found = laconic.repair_(model, pictures(), "closed-form", base=base, measure=measure)
    assert found.kept
    assert found.parameters == 2 * len(base.norm.bias)
    assert found.after.mean > 1 - 0.1 * (1 - found.before.mean)  # shrunk to the values it had, so not quite 1


def test_a_smaller_input_is_repaired_towards_the_larger():
    base, small = unreduced(), unreduced()
    small.set_input_size(img_size=(64, 64))
    found = laconic.repair_(small, pictures(32), base=base, held_out=pictures(8, 1), steps=40, measure="dense")
    assert found.kept


def test_the_mode_stays():
    model = reduced().train()
    laconic.repair_(model, pictures(8), steps=1)
    assert model.training
    assert model.blocks[0].training


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": pictures(6)}, "1 judge"),
        ({"minutes": 1.0, "steps": 1}, "minutes or steps"),
        ({"labels": torch.zeros(4)}, "held_out"),
        ({"steps": 0}, "steps must be more than 0"),
        ({"steps": None, "minutes": -1.0}, "minutes must be more than 0"),
    ],
)
def test_mistakes_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        laconic.repair_(reduced(), **{"images": pictures(), "steps": 1, **change})


def test_models_that_cannot_be_repaired_are_refused():
    with pytest.raises(ValueError, match="reduce_"):
        laconic.repair_(make("plain"), pictures(), steps=1)
    with pytest.raises(ValueError, match="float32"):
        laconic.repair_(reduced().to(torch.bfloat16), pictures(), steps=1)


def test_a_base_that_shares_parameters_is_refused():
    base = unreduced()
    before = parameters(base)
    model = laconic.reduce_(shared_copy(base), "topk", keep=0.3)
    with pytest.raises(ValueError, match="share parameters"):
        laconic.repair_(model, pictures(), base=base, steps=1)
    assert all(torch.equal(one, before[name]) for name, one in base.named_parameters())


def test_scales_and_biases_are_the_models_own():
    model = laconic.reduce_(make("plain"), "dtps", keep=0.7)
    base = make("plain")
    found = scales_and_biases(model, base)
    assert set(found) == {name for name, one in base.named_parameters() if one.dim() == 1}


# ------------------------------------------------------------------------------------------------ in tune
@pytest.fixture(scope="module")
def tuned():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laconic.planning.candidates.SHARES", (1.0, 0.84, 0.5))
        patch.setattr("laconic.planning.candidates.REDUCED", 0)
        patch.setattr("laconic.planning.tune.FINAL", 1)
        base = unreduced()
        before = copy.deepcopy(base.state_dict())
        given = {"methods": ("topk",), "repair": "distil", "batch_size": 1}
        found = laconic.tune(base, pictures(96), "1.6x-macs", repair_images=pictures(32, 7), **given)
        assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
        return found


def test_a_tuned_model_is_repaired_and_applied(tuned):
    found = tuned
    assert found.best.repaired is not None
    assert found.chosen.endswith(", repaired")
    assert found.best.repaired.images == (48 + 32, 48)
    assert found.best.score.mean > found.best.repaired.before.mean
    again = Tuned.of_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    model = unreduced()
    with pytest.raises(ValueError, match="safetensors"):
        again.apply(model)
    assert not laconic.is_reduced(model)
    whole = Tuned.of_json(found.to_json(), found.parameters)
    model = whole.apply(model)
    held_out = pictures(96)[halves_of(96, None, "same-answer")[1]]
    judged = Measure(unreduced(), held_out, None, "same-answer")(model.eval(), found.best.sides)
    assert float(judged.mean()) == pytest.approx(found.best.score.mean, abs=1e-6)


def test_parameters_of_another_model_are_refused(tuned):
    other = Tuned.of_json(tuned.to_json(), {"norm.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="norm.bias"):
        other.apply(unreduced())


def test_a_repair_in_numbers_survives_json(distilled):
    found = distilled[2]
    assert Repaired.of_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.unchecked
def test_repairs_are_named():
    with pytest.raises(ValueError, match="closed-form, distil"):
        laconic.repair_(reduced(), pictures(), "magic")
    with pytest.raises(ValueError, match="closed-form, distil"):
        laconic.tune(make("plain"), pictures(8), "1.4x-macs", repair="magic")
