"""MCTF's own training: two passes, the one that takes away less teaching the other."""

import copy

import pytest
import torch
import torch.nn.functional as F

import laconic
from families import AT, fill, images, make
from laconic.core.schedule import Schedule
from laconic.training.consistency import (
    Answer,
    certainty,
    consistency_losses,
    consistency_step,
    lessened,
    removing_less,
    teacher_pass,
)

LABELS = torch.tensor([1, 7, 7])


def drawn(seed=2, most=0.5):
    """The share that a step draws after `torch.manual_seed`, which is called again here."""
    torch.manual_seed(seed)
    share = most * float(torch.rand(()))
    torch.manual_seed(seed)
    return share


def answer(model, x):
    features = model.forward_features(x)
    return features[:, 0], model.head(features[:, 0])


def with_r(r):
    return laconic.reduce_(make("plain"), "mctf", r=r).train()


def apart(a, b):
    return ((a - b) ** 2).mean(1)


@pytest.mark.parametrize(("count", "weight", "most"), [(3, 3.0, 0.5), (2, 0.5, 1.0), (1, 3.0, 0.5), (0, 3.0, 0.5)])
def test_a_step_by_hand(count, weight, most):
    """With so many images of which the student is sure."""
    x, model = images("plain"), with_r(8)
    bounds = answer(model, x)[1].softmax(1)[range(3), LABELS].sort(descending=True).values.tolist()
    confidence = sum([1.0, *bounds, 0.0][count : count + 2]) / 2
    share = drawn(most=most)
    fewer = int(share * 8)
    assert 0 < fewer < 8
    losses = consistency_step(model, x, LABELS, confidence=confidence, weight=weight, most=most)
    losses["loss"].backward()

    less, more = with_r(fewer), with_r(8)
    less.load_state_dict(more.state_dict())
    (read, logits), (taught, teacher_logits) = answer(more, x), answer(less, x)
    probability = logits.softmax(1)[range(3), LABELS]
    sure = [i for i in range(3) if probability[i] > confidence]
    assert len(sure) == count
    expected = sum(apart(read, taught.detach())[i] for i in sure) / len(sure) if sure else read.sum() * 0
    entropies = [F.cross_entropy(one, LABELS) for one in (logits, teacher_logits)]
    total = sum(entropies) + weight * expected
    total.backward()
    for name, value in zip(("cross_entropy", "teacher", "consistency", "loss"), (*entropies, expected, total), strict=True):
        torch.testing.assert_close(losses[name], value)
    # gradients come from both passes, and none through what the teacher's features are compared with
    for ours, one, other in zip(model.parameters(), more.parameters(), less.parameters(), strict=True):
        both = sum(p.grad for p in (one, other) if p.grad is not None)
        torch.testing.assert_close(ours.grad, both, rtol=1e-3, atol=1e-5)
    assert less.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_as_many_as_are_drawn_leave_and_the_schedule_comes_back():
    model, x, seen = with_r(8), images("plain"), []
    schedule, forward_features = model.laconic.schedule, model.forward_features

    def spy(pixels):
        out = forward_features(pixels)
        seen.append([len(model.laconic.entry(i + 1)) for i in range(4)])
        return out

    model.forward_features = spy
    shares = [drawn(seed) for seed in range(4)]
    for seed in range(4):
        torch.manual_seed(seed)
        consistency_step(model, x, LABELS)
        assert model.laconic.schedule is schedule
        assert all(reducer.site.schedule is schedule for reducer in model.laconic.reducers.values())
    teachers, students = seen[::2], seen[1::2]
    assert teachers == [[36 - i * int(share * 8) for i in range(4)] for share in shares]
    assert students == [[36, 28, 20, 12]] * 4
    assert len({tuple(counts) for counts in teachers}) > 1
    assert len(model.laconic.entry(4)) == 12  # the ledger is the student's


def test_every_smaller_half_is_drawn_alike():
    torch.manual_seed(0)
    shares = [0.5 * float(torch.rand(())) for _ in range(4000)]
    counts = [[int(share * 16) for share in shares].count(r) for r in range(9)]
    assert counts[8] == 0
    assert all(400 < count < 600 for count in counts[:8])


@pytest.mark.parametrize("wrong", ["target", "images"])
def test_the_schedule_comes_back_whatever_happens(wrong):
    model = with_r(8)
    schedule = model.laconic.schedule
    broken = {"target": (images("plain"), torch.tensor([99, 0, 0])), "images": (torch.zeros(1, 3, 5, 5), LABELS)}[wrong]
    with pytest.raises((IndexError, AssertionError, RuntimeError)):
        consistency_step(model, *broken)
    assert model.laconic.schedule is schedule
    with pytest.raises(RuntimeError, match=r"on purpose with \(4, 4, 4\)"), removing_less(model, 0.5):
        raise RuntimeError(f"on purpose with {model.laconic.schedule.values}")
    assert model.laconic.schedule is schedule


@pytest.mark.parametrize(
    ("schedule", "share", "expected"),
    [
        (Schedule.remove_counts({1: 6, 2: 5, 3: 1}), 0.5, Schedule.remove_counts({1: 3, 2: 2, 3: 0})),
        (Schedule.remove_counts({1: 6}), 0.0, Schedule.remove_counts({1: 0})),
        (Schedule.keep_counts({1: 26, 3: 12}), 0.5, Schedule.keep_counts({1: 31, 3: 24})),
        (Schedule.keep_counts({1: 26, 3: 99}), 0.25, Schedule.keep_counts({1: 34, 3: 36})),
        (Schedule.rates((0.6, 1.0), (1, 2)), 0.25, Schedule.rates((0.9, 1.0), (1, 2))),
        (Schedule.rates(0.5, (0, 2)), 0.0, Schedule.rates(1.0, (0, 2))),
    ],
)
def test_every_kind_of_schedule(schedule, share, expected):
    model = laconic.reduce_(make("plain"), "topk", schedule=schedule)
    found = lessened(model.laconic, share)
    assert (found.at, found.unit) == (expected.at, expected.unit)
    assert found.values == pytest.approx(expected.values)


def test_a_teacher_that_takes_nothing_is_the_model_itself():
    x, plain = images("plain"), make("plain")
    model = laconic.reduce_(copy.deepcopy(plain), "mctf", r=8)
    with torch.no_grad(), removing_less(model, 0.0):
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("method", ["mctf", "tome", "evit", "dynamicvit", "etps"])
def test_any_method_with_a_schedule(method):
    model = laconic.reduce_(make("plain"), method, keep=0.5, at=AT).train()
    fill(model.laconic)
    losses = consistency_step(model, images("plain"), LABELS, confidence=0.0)
    losses["loss"].backward()
    assert losses["consistency"] > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.laconic.schedule.values == (0.5, 0.5, 0.5)
    assert set(laconic.losses(model)) == ({"ratio"} if method == "dynamicvit" else set())


@pytest.mark.parametrize("family", ["gap", "qk-norm", "distilled", "dinov2-reg"])
def test_what_the_head_reads(family):
    model, x = laconic.reduce_(make(family), "tome", r=6), images(family)
    features = model.forward_features(x)
    found = Answer.of(model, features)
    if family in ("gap", "qk-norm"):  # pooled by size, as the head has it
        torch.testing.assert_close(found.read, model.fc_norm(model.pool(features)))
    elif family == "distilled":
        torch.testing.assert_close(found.read, (features[:, 0] + features[:, 1]) / 2)
    else:
        torch.testing.assert_close(found.read, features[:, 0])
    torch.testing.assert_close(found.logits, model.forward_head(features))


# ------------------------------------------------------------------------------------------------ who is sure
def test_the_probability_of_the_label():
    logits = torch.randn(5, 4)
    p = logits.softmax(1)
    torch.testing.assert_close(certainty(logits, torch.tensor([0, 1, 2, 3, 0])), p[range(5), [0, 1, 2, 3, 0]])
    smooth = torch.full((5, 4), 0.025)
    smooth[0, 2] += 0.9  # one class
    smooth[1, 2], smooth[1, 0] = 0.3, 0.65  # two, mixed
    smooth[2] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    smooth[3] = torch.tensor([0.5, 0.0, 0.5, 0.0])
    smooth[4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = [p[0, 2], p[1, 2] + p[1, 0], p[2, 3], p[3, 0] + p[3, 2], 1 - p[4, 0]]
    torch.testing.assert_close(certainty(logits, smooth), torch.stack(expected))


def sure_of(*probabilities):
    """Logits of two classes, of which the first has these probabilities."""
    p = torch.tensor(probabilities)
    return torch.stack([p.log(), (1 - p).log()], 1)


def test_only_those_count_of_which_the_judge_is_sure():
    read, taught, target = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True), torch.zeros(3).long()
    student = Answer(read, sure_of(0.39, 0.41, 0.9))
    teacher = Answer(taught, sure_of(0.5, 0.2, 0.9))
    each = apart(read, taught).detach()
    for judge, counted in (("student", [1, 2]), ("teacher", [0, 2])):
        losses = consistency_losses(student, teacher, target, judge=judge)
        torch.testing.assert_close(losses["consistency"].detach(), each[counted].mean())
        read.grad = None
        losses["consistency"].backward()
        assert read.grad.abs().sum(1).gt(0).tolist() == [i in counted for i in range(3)]
        assert taught.grad is None
    nobody = consistency_losses(student, teacher, target, confidence=0.95)["consistency"]
    read.grad = None
    nobody.backward()
    assert nobody == 0
    assert not read.grad.any()


def test_consistency_brings_the_passes_together():
    """With nothing else in the loss the student comes nearer to a teacher that takes nothing."""
    model, x = with_r(8), images("plain")
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(12):
        with removing_less(model, 0.0):
            teacher = Answer.of(model, model.forward_features(x))
        loss = consistency_losses(Answer.of(model, model.forward_features(x)), teacher, LABELS, confidence=0.0)["consistency"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.9 * found[0]


# ------------------------------------------------------------------------------------------------ refusals
def test_what_cannot_be_taught_is_refused():
    x = images("plain")
    with pytest.raises(ValueError, match="not reduced"):
        consistency_step(make("plain"), x, LABELS)
    alone = laconic.reduce_(make("plain"), "ats").train()
    with pytest.raises(ValueError, match="ats decides by itself how many tokens to remove; give it a keep rate"):
        consistency_step(alone, x, LABELS)
    model = with_r(4)
    for most in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="most must be a share of the removed tokens"):
            teacher_pass(model, x, most)
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="two passes before one backward"):
        consistency_step(model, x, LABELS)
    model.set_grad_checkpointing(False)
    assert consistency_step(model, x, LABELS)["loss"].isfinite()


@pytest.mark.unchecked
def test_the_judge_is_one_of_the_two():
    with pytest.raises(ValueError, match="consistency: judge must be one of 'student', 'teacher', not 'both'"):
        consistency_step(with_r(4), images("plain"), LABELS, judge="both")


def test_learned_shapes_refuse_the_other_count_and_the_schedule_comes_back():
    model = laconic.reduce_(make("plain"), "tokenlearner", keep=0.5, at=(1,))
    schedule = model.laconic.schedule
    with pytest.raises(ValueError, match="its weights fix the count"):
        consistency_step(model, images("plain"), LABELS)
    assert model.laconic.schedule is schedule
