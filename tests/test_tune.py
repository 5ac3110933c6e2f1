"""Choosing input size, method and schedule: the measures, the choice at equal cost, and what the result can do."""

import copy
import dataclasses
import importlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import laconic
from families import make
from laconic import api
from laconic.cli import app as cli
from laconic.core.method import resolve
from laconic.planning.candidates import Candidate, Sizes, candidates, fitted
from laconic.planning.measures import Measure, nearest_other
from laconic.planning.reduced_models import ReducedModels
from laconic.planning.refine import refined
from laconic.planning.scores import Scores, halves_of
from laconic.planning.space import ScheduleSpace
from laconic.planning.time_limit import TimeLimit
from laconic.planning.trials import Trial, refitted
from laconic.planning.tuned import Tuned

METHODS = ("tome",)
TARGET = "1.4x-macs"


def pictures(count=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 6, 6, generator=draw), size=(96, 96), mode="bicubic")


@pytest.fixture(autouse=True, scope="module")
def _few_candidates():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laconic.planning.candidates.SHARES", (1.0, 0.84, 0.5))
        patch.setattr("laconic.planning.candidates.REDUCED", 1)
        patch.setattr("laconic.planning.tune.KEPT", 2)
        patch.setattr("laconic.planning.tune.FINAL", 1)
        yield


@pytest.fixture(scope="module")
def tuned():
    model = make("plain")
    before = copy.deepcopy(model.state_dict())
    found = laconic.tune(model, pictures(), TARGET, methods=METHODS, batch_size=1)
    assert not laconic.is_reduced(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return found


def test_the_chosen_row_meets_the_target_and_alternatives_are_there(tuned):
    base = laconic.summary(make("plain")).macs
    assert tuned.best.macs <= base / 1.4
    names = [row.name for row in tuned.rows]
    assert names[0] == "unreduced"
    assert any(name.startswith("input ") for name in names)
    assert any(name.startswith("random") for name in names)
    assert any(name.startswith("avg-pool") for name in names)
    meeting = [row for row in tuned.rows[1:] if row.macs <= base / 1.4 / 0.97]
    assert tuned.best.search == max(row.search for row in meeting)
    assert all(row.search is None for row in tuned.rows if row not in meeting)
    means = [row.score.mean for row in tuned.rows[1:]]
    assert means == sorted(means, reverse=True)
    assert tuned.images == (6, 6)


def test_a_result_survives_json(tuned):
    assert Tuned.of_json(json.loads(json.dumps(tuned.to_json()))) == tuned


def test_a_result_is_applied(tuned):
    for row in tuned.rows[1:]:
        chosen = Tuned(tuned.target, tuned.measure, tuned.own, tuned.images, tuned.rows, row.name)
        model = chosen.apply(make("plain"))
        sides = row.sides or tuned.own
        assert laconic.summary(model).macs == row.macs
        with torch.no_grad():
            assert model(torch.zeros(1, 3, *sides)).shape == (1, 10)
        assert laconic.is_reduced(model) == (row.method is not None)


def test_chains_are_candidates():
    def chained(model, images):
        return torch.full(
            (len(images),), float(laconic.is_reduced(model) and model.laconic.config.describe()["name"] == "chain")
        )

    found = laconic.tune(make("plain"), pictures(8), TARGET, measure=chained, methods=("etps", "pre-merge"), batch_size=1)
    names = [row.name for row in found.rows if row.method is not None]
    chains = [name for name in names if "etps" in name and "pre-merge" in name]
    assert chains
    for name in chains:
        chosen = Tuned.of_json(json.loads(json.dumps({**found.to_json(), "chosen": name})))
        model = chosen.apply(make("plain"))
        assert laconic.summary(model).macs == chosen.best.macs <= laconic.summary(make("plain")).macs / 1.4


def test_a_tuned_model_with_another_input_size_is_saved(tuned, tmp_path):
    row = next(row for row in tuned.rows if row.sides is not None)
    model = Tuned(tuned.target, tuned.measure, tuned.own, tuned.images, tuned.rows, row.name).apply(make("plain"))
    laconic.save(laconic.reduce_(model, "topk", keep=0.9) if row.method is None else model, tmp_path / "model")
    again, x = laconic.load(tmp_path / "model"), torch.randn(2, 3, *row.sides)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_measure_decides():
    """A measure that prefers small images chooses a smaller input; one that counts the tokens left chooses a method."""

    def small(model, images):
        return torch.full((len(images),), -float(images.shape[2]))

    found = laconic.tune(make("plain"), pictures(4), TARGET, measure=small, methods=("topk",), batch_size=1)
    assert found.best.sides == min(row.sides or found.own for row in found.rows)
    found = laconic.tune(make("plain"), pictures(4), TARGET, measure=lambda m, x: -small(m, x), methods=("topk",), batch_size=1)
    assert found.best.sides is None
    assert found.best.method is not None


def test_a_measured_target():
    found = laconic.tune(make("plain"), pictures(8), "1.05x", methods=("topk",), batch_size=2)
    assert found.best.speed.median > 0
    assert found.best.search == max(row.search for row in found.rows if row.search is not None)


def test_measures_of_the_unreduced_model():
    x, labels = pictures(), torch.arange(12) // 2
    for kind in ("same-answer", "dense"):
        model = make("plain")
        measure = Measure(model, x, None, kind)
        assert measure(model) == pytest.approx(torch.ones(12, dtype=torch.float64).numpy(), abs=1e-5)
        restore = "similar" if kind == "dense" else False
        reduced = laconic.reduce_(copy.deepcopy(model), "topk", keep=0.5, restore=restore)
        assert (measure(reduced) < 1 - 1e-4).all()
        torch.testing.assert_close(measure(reduced, count=7, start=2), measure(reduced)[2:7])
    model = make("plain")
    with torch.no_grad():
        right = model(x).argmax(1)
    assert Measure(model, x, right, "labels")(model).tolist() == [1.0] * 12
    assert Measure(model, x, right, "labels")(model, None, 7, 2).tolist() == [1.0] * 5
    assert Measure(model, x, (right + 1) % 10, "labels")(model).tolist() == [0.0] * 12
    assert Measure(model, torch.cat([x, x + 1e-4]), torch.arange(24) % 12, "pairs")(model).tolist() == [1.0] * 24
    assert Measure(model, x, labels, "pairs")(model).mean() < 1


@pytest.mark.parametrize("kind", ["same-answer", "dense"])
def test_the_unreduced_model_runs_once_on_each_image_and_on_no_more_than_are_asked_for(kind):
    base, seen = make("plain"), []
    base.patch_embed.register_forward_pre_hook(lambda module, args: seen.extend(args[0][:, 0, 0, 0].tolist()))
    x, reduced = pictures(12), laconic.reduce_(make("plain"), "topk", keep=0.5, restore="similar")
    measure = Measure(base, x, None, kind, 2)
    for count in (3, 7, 5):
        measure(reduced, None, count)
        assert seen == x[: max(count, len(seen)), 0, 0, 0].tolist()
    assert len(seen) == 7
    assert len(measure.references()) == 12


def test_nearest_others():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-0.9, -0.1]])
    assert nearest_other(features).tolist() == [1, 0, 3, 2]


def a_trial():
    config = laconic.ToMe()
    space = ScheduleSpace(make("plain"), config)
    candidate = Candidate("96 px, tome, blocks 1 2", None, config, (1, 2))
    whole = space.unreduced().macs
    schedule = fitted(space, candidate, 0.88 * whole)
    macs = space.summary(schedule).macs
    return space, Trial(candidate, schedule, macs, cost=macs / whole)


@pytest.mark.parametrize("restore", [False, "similar"])
@pytest.mark.parametrize(
    ("method", "first"), [("tome", None), ("etps", None), ("two-stage", None), ("topk", None), ("etps", "pre-merge")]
)
def test_a_method_is_verified_once_at_a_size_and_its_models_answer_as_those_of_reduce(method, first, restore, monkeypatch):
    """Only their schedules differ."""
    config, first = resolve(method, {}), None if first is None else (resolve(first, {}), 0.85)
    base, images, verified = make("plain"), pictures(2), []
    models = ReducedModels(Sizes(base), restore)
    original = api.verify
    monkeypatch.setattr(api, "verify", lambda *given: verified.append(given) or original(*given))
    for keep in (0.5, 0.7, 0.5):
        schedule = config.default_schedule(4, keep, None)
        trial = Trial(Candidate(method, None, config, None, first), schedule, 0)
        model = models.of(trial)
        assert models.of(trial) is model
        expected = laconic.reduce_(copy.deepcopy(base), trial.applied()[0], schedule=trial.applied()[1], restore=restore)
        with torch.no_grad():
            for name in ("forward", "forward_features"):
                assert torch.equal(getattr(model, name)(images), getattr(expected, name)(images))
        assert model.laconic.skip_unused == expected.laconic.skip_unused
        assert not model.training
    assert len(verified) == 1 + 3  # and those of ``expected``
    models.of(Trial(Candidate("smaller", (80, 80), config, None, first), config.default_schedule(4, 0.6, None), 0))
    assert len(verified) == 1 + 3 + 1


def test_candidates_that_no_schedule_makes_fast_enough_are_left_out():
    _, other = a_trial()
    fast, slow, fitted_again = (dataclasses.replace(other, cost=cost, score=1.0) for cost in (0.6, 0.9, 0.8))
    random = dataclasses.replace(slow, candidate=dataclasses.replace(other.candidate, baseline=True))
    new = dataclasses.replace(fitted_again, macs=1)
    left, out = refitted([slow, fast, random, fitted_again], [None, None, None, new], 0.7)
    assert left == [fast, random, dataclasses.replace(new, score=-math.inf)]
    assert out == [slow]
    assert refitted([slow, random], [None, None], 0.7) == ([slow, random], [])


def test_a_search_finds_what_the_measure_prefers():
    space, trial = a_trial()
    found = refined(space, trial, lambda t: float(min(t.schedule.at)), 30)
    assert found.schedule.at[0] > 1
    assert found.score == found.schedule.at[0]
    assert 0.95 * trial.macs <= found.macs <= trial.macs
    assert found.macs == space.summary(found.schedule).macs
    assert found.cost == pytest.approx(trial.cost * found.macs / trial.macs)
    assert found.candidate.name.startswith("96 px, tome, searched blocks")
    assert fitted(space, found.candidate, float(trial.macs)) == found.schedule


def test_a_search_that_finds_nothing_better_returns_nothing():
    space, trial = a_trial()
    assert refined(space, trial, lambda t: 1.0, 10) is None
    assert refined(space, trial, lambda t: -float(t.schedule != trial.schedule), 10) is None


def test_sizes_are_whole_patches_and_run():
    sizes = Sizes(make("plain"))
    smaller = sizes.smaller()
    assert smaller == sorted(smaller, reverse=True)
    assert all(side % 16 == 0 and side < 96 for sides in smaller for side in sides)
    for sides in smaller:
        with torch.no_grad():
            assert sizes.at(sides)(torch.zeros(1, 3, *sides)).shape == (1, 10)


def test_a_model_of_one_size_has_no_smaller_inputs():
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96, image_size=96)
    model = ViTForImageClassification(config).eval()
    assert Sizes(model).smaller() == []
    found = laconic.tune(model, pictures(8), TARGET, methods=("topk",), batch_size=1)
    assert any("smaller inputs" in note for note in found.notes)
    assert all(row.sides is None and row.over is None for row in found.rows)


def test_candidates_have_unique_names():
    names = [one.name for one in candidates(Sizes(make("plain")))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": pictures(3)}, "4 or more"),
        ({"measure": "labels"}, "label"),
        ({"measure": "beauty"}, "same-answer"),
        ({"target": "1000G"}, "meets it already"),
        ({"target": "0.9x"}, "1x"),
        ({"labels": torch.arange(5), "measure": "pairs"}, "labels"),
    ],
)
def test_what_cannot_be_tuned_is_refused(changed, message):
    asked = {"images": pictures(), "target": TARGET, **changed}
    with pytest.raises((ValueError, TypeError), match=message):  # TypeError if annotations are checked
        laconic.tune(make("plain"), asked.pop("images"), asked.pop("target"), methods=("topk",), **asked)


# ------------------------------------------------------------------------------------------------ time, and runs that go on
def test_halves_are_balanced():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    for kind in ("labels", "same-answer"):
        one, other = halves_of(9, labels, kind)
        assert sorted([*one.tolist(), *other.tolist()]) == list(range(9))
        assert all((labels[one] == label).sum() == 1 for label in range(4))
    one, other = halves_of(9, labels, "pairs")
    assert not set(labels[one].tolist()) & set(labels[other].tolist())
    assert abs(len(one) - len(other)) <= 2


def test_the_first_images_are_of_many_labels_with_two_of_each():
    labels = torch.arange(6).repeat_interleave(10)  # sorted, as the folders of a data set are
    for kind in ("labels", "pairs"):
        for half in halves_of(60, labels, kind):
            known = len(labels[half].unique())
            counts = labels[half[: 2 * known]].bincount(minlength=6)
            assert counts[counts > 0].tolist() == [2] * known
            assert labels[half[:4]].bincount().sort(descending=True).values[:2].tolist() == [2, 2]
            assert labels[half].tolist() != sorted(labels[half].tolist())
    one, other = halves_of(60, None, "dense")
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(60))
    assert one.tolist() != sorted(one.tolist())


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    record, ran = tmp_path / "scores.jsonl", []
    run = Measure.__call__

    def counting(self, *given):
        ran.append(given)
        if len(ran) == 7:
            raise KeyboardInterrupt
        return run(self, *given)

    monkeypatch.setattr(Measure, "__call__", counting)
    asked = dict(methods=METHODS, batch_size=1, record=record)
    with pytest.raises(KeyboardInterrupt):
        laconic.tune(make("plain"), pictures(), TARGET, **asked)
    again = laconic.tune(make("plain"), pictures(), TARGET, **asked)
    total = len(ran) - 1
    ran.clear()
    ran.extend([()] * 7)
    third = laconic.tune(make("plain"), pictures(), TARGET, **asked)
    assert len(ran) == 7  # nothing was scored again
    assert total > 7
    assert [(row.name, row.score) for row in third.rows] == [(row.name, row.score) for row in again.rows]
    other = laconic.tune(make("plain"), pictures(seed=1), TARGET, **asked)
    assert len(ran) > 7  # other images
    assert other.rows[1].score != again.rows[1].score


@pytest.mark.parametrize(("kind", "labels"), [("same-answer", None), ("pairs", torch.arange(12) // 2)])
def test_only_scores_that_do_not_depend_on_other_images_are_used_for_more_images(kind, labels, tmp_path):
    images, record = pictures(), tmp_path / "scores.jsonl"
    measure = Measure(make("plain"), images, labels, kind)
    scores = Scores.read(record, measure, images, labels)
    scores.add("judging", None, 4, np.arange(4.0))
    for found in (scores, Scores.read(record, measure, images, labels)):
        assert found.find("judging", None, 4).tolist() == [0, 1, 2, 3]
        assert found.find("judging", None, 3).tolist() == ([0, 1, 2] if kind == "same-answer" else [])
        assert found.find("judging", None, 6).tolist() == ([0, 1, 2, 3] if kind == "same-answer" else [])
        assert found.find("searching", None, 4).tolist() == []


def test_less_time_means_fewer_images():
    found = laconic.tune(make("plain"), pictures(40), TARGET, methods=METHODS, batch_size=1, minutes=1e-4)
    assert found.images == (4, 4)
    assert any("4 of 20 images" in note for note in found.notes)


@pytest.mark.parametrize(("kind", "labels", "judged"), [("same-answer", None, 6), ("pairs", torch.arange(24) // 2, 3)])
def test_time_that_is_left_is_used_for_more_images_where_scores_of_fewer_are_kept(kind, labels, judged, monkeypatch):
    monkeypatch.setattr(TimeLimit, "affordable", lambda self, runs, wanted, share: min(wanted, 3))
    asked = dict(methods=("topk",), batch_size=1, minutes=60.0, measure=kind, labels=labels)
    found = laconic.tune(make("plain"), pictures(24), TARGET, **asked)
    assert found.images == (judged, judged)
    assert f"the time was enough for {judged} of 12 images of each half" in found.notes


# ------------------------------------------------------------------------------------------------ the command
COMMAND = ("tune", "scenes_vit_small", "--target", "1.3x-macs", "--data", "scenes", "--limit", "8", "--methods", "topk")


def test_the_command_writes_numbers_and_a_plot(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_measure.py").write_text("def large(model, images):\n    return images[:, 0, 0, 0] * 0 + images.shape[2]\n")
    monkeypatch.chdir(tmp_path)
    given = ("--batch-size", "2", "--threads", "1", "--measure", "my_measure:large", "--output", "out.json")
    assert cli.main([*COMMAND, *given]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["measure"] == "large"
    assert Tuned.of_json(found).best.sides is None
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert not (tmp_path / "out.scores.jsonl").exists()
    assert cli.main([*COMMAND, "--repair-split", "train"]) != 0
    assert "--repair closed-form or distil" in capsys.readouterr().err
    for wrong in ("beauty", "my_measure:beauty", "no_module:large"):
        assert cli.main([*COMMAND, "--measure", wrong]) != 0
        assert f"--measure {wrong}" in capsys.readouterr().err


def test_the_command_repairs_with_images_of_another_split(tmp_path, monkeypatch):
    monkeypatch.setattr("laconic.cli.tune.REPAIR_IMAGES", 12)
    given = ("--repair", "closed-form", "--repair-split", "train", "--output", str(tmp_path / "out.json"))
    seen, module = [], importlib.import_module("laconic.planning.tune")
    run = module.repair_by
    monkeypatch.setattr(module, "repair_by", lambda *args: (seen.append(len(args[3])), run(*args))[1])
    assert cli.main([*COMMAND, "--batch-size", "2", "--threads", "1", *given]) == 0
    assert set(seen) == {4 + 12}
