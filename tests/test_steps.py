"""Ways of training beside the ordinary one: by policy gradient, by a search, with options that change; and what is distilled."""

import pytest
import timm
import torch
import torch.nn.functional as F

import laconic
from families import AT, images, make, reduced
from laconic.core.schedule import Schedule
from laconic.methods.iared import KEPT, LOG_PROBABILITY
from laconic.methods.ops import CLASS_LOGITS
from laconic.methods.spvit import PACKAGE
from laconic.training.checks import check
from laconic.training.consistency import consistency_step
from laconic.training.distillation import token_distillation
from laconic.training.objective import Objective
from laconic.training.optimization import LearningRate, make_optimizer
from laconic.training.policy_gradient import policy_loss, rewards
from laconic.training.recipe import LossPart, Recipe
from laconic.training.reinforce import PolicyGradient, PolicyGradientOptions
from laconic.training.two_passes import TwoPasses, TwoPassesOptions
from test_train import BASE, SHAPE, Stop, changed, copies, go, loop, metrics, rows, same, stop_before, weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")

IARED = ("method.name=iared", "method.options.heads=3", "optimization.ema=0.5")
THIRD = ("step.options.interpreter_epochs=0.333", "step.options.blocks_epochs=0.333")  # a step each
SEARCH = (
    "method.name=diffrate",
    "method.keep=1.0",
    "step.kind=rate-search",
    "step.options.gmacs=0.0017",
    "step.options.weight=1e6",
    "step.options.every=2",
    "optimization.lr=0.5",
    "optimization.min_lr=0.5",
    "optimization.eval_mode=true",
)
EVOVIT = (
    "method.name=evovit",
    "method.options.stages=block",
    'method.later={1={stages="scheduled"}}',
    "method.options.second_head=24",
    "model.options.global_pool=avg",
    "optimization.ema=0.5",
)
MCTF = ("method.name=mctf", "method.options.r=5", "step.kind=two-passes", "step.options.confidence=0.02")
SVITE = ("method.name=svite", "method.keep=0.6", "method.ramps.tau=[10, 0.5]")


# ---------------------------------------------------------------------------------------------------- stopped and resumed
VARIANTS = {
    "policy gradient": (*IARED, "augmentation.mixup=0.8"),
    "group after group": (*IARED, *THIRD),
    "search": SEARCH,
    "two passes": (*MCTF, "augmentation.mixup=0.8"),
    "later options": EVOVIT,
    "ramp": SVITE,
}


@pytest.mark.parametrize(
    ("variant", "stopped"),
    [
        ("policy gradient", 4),
        ("group after group", 5),
        ("search", 4),
        ("two passes", 4),
        ("later options", 4),
        ("ramp", 4),
    ],
)
def test_a_run_that_was_stopped_goes_on_exactly(tmp_path, stop_before, variant, stopped):  # noqa: F811
    go(tmp_path / "a", *VARIANTS[variant])
    stop_before(stopped)
    with pytest.raises(Stop):
        go(tmp_path / "b", *VARIANTS[variant], checkpoint_every=1)
    stop_before()
    assert go(tmp_path / "b", *VARIANTS[variant], resume=True).steps == 6
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    records = [(tmp_path / x / "model" / "laconic.json").read_text() for x in "ab"]
    assert records[0] == records[1]


# ---------------------------------------------------------------------------------------------------- the policy gradient
def test_iared_learns_by_policy_gradient_unless_told_otherwise(tmp_path):
    go(tmp_path / "a", *IARED, "optimization.epochs=1")
    assert {"policy", "reward", "baseline", "cross_entropy"} <= rows(tmp_path / "a")[0].keys()
    made, run = loop(tmp_path / "b", *IARED, "optimization.epochs=1", "optimization.weight_decay=0", "step.kind=ordinary")
    before = copies(run.model)
    made.go()
    assert not [name for name in changed(before, run.model) if name.startswith("laconic.")]
    assert "policy" not in rows(tmp_path / "b")[0]


@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_is_that_of_the_answer_by_draws_and_the_policys(mixed):
    model, x = reduced("iared", "plain").train(), images("plain")
    torch.manual_seed(3)
    labels = model(x).argmax(1)  # two right answers, and a wrong one
    labels[2] = (labels[2] + 5) % 9
    target = F.one_hot(labels, 10) * 0.6 + F.one_hot((labels + 1) % 10, 10) * 0.4 if mixed else labels
    step = PolicyGradient(Objective(model, None, LossPart()), PolicyGradientOptions(penalty=(1.0, 2.0, 3.0)))
    torch.manual_seed(3)
    parts = step(x, target)
    with torch.no_grad():
        greedy = model.eval()(x)
        kept = model.laconic.entry(4).per_image[KEPT]
        baseline = rewards(greedy.argmax(1) == labels, kept, (1.0, 2.0, 3.0))
    torch.manual_seed(3)
    logits = model.train()(x)
    notes = model.laconic.entry(4).per_image
    reward = rewards(logits.argmax(1) == labels, notes[KEPT], (1.0, 2.0, 3.0))
    policy = policy_loss(notes[LOG_PROBABILITY], reward, baseline)
    assert (reward > 0).sum(1).tolist() == [3, 3, 0]
    assert parts["policy"].item() == pytest.approx(policy.item(), rel=1e-5)
    assert abs(policy.item()) > 1e-3
    assert parts["loss"].item() == pytest.approx((F.cross_entropy(logits, target) + policy).item(), rel=1e-5)
    assert parts["reward"].item() == pytest.approx(reward.sum(1).mean().item())
    parts["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.dim() > 1)


def test_groups_learn_one_after_the_other(tmp_path):
    """Of every phase of one step: what moved, who worked, and whether the policy had a part in the loss."""
    made, run = loop(tmp_path, *IARED, *THIRD, "optimization.weight_decay=0")
    before, moved, schedules, original = [copies(run.model)], [], [], made._step

    def step(batches):
        row = original(batches)
        moved.append({".".join(name.split(".")[:3]) for name in changed(before[-1], run.model)})
        before.append(copies(run.model))
        schedules.append([run.model.laconic.schedule, made.ema.module.laconic.schedule])
        return row

    made._step = step
    made.go()
    for group, (interpreter, blocks) in enumerate(zip(moved[::2], moved[1::2], strict=True)):
        assert interpreter == {f"laconic.reducers.{group}"}
        assert {name.rpartition(".")[0] for name in blocks} == ({"blocks.2", "blocks.3"} if group == 2 else {f"blocks.{group}"})
    assert [["policy" in row for row in rows(tmp_path) if "loss" in row]] == [[True, False] * 3]
    partly = [Schedule.rates([0.5, 1.0, 1.0], (0, 1, 2)), Schedule.rates([0.5, 0.5, 1.0], (0, 1, 2))]
    assert [a for a, _ in schedules] == [partly[0]] * 2 + [partly[1]] * 2 + [Schedule.adaptive((0, 1, 2))] * 2
    assert all(a == b for a, b in schedules)
    made.save()
    assert laconic.load(tmp_path / "model").laconic.schedule == Schedule.adaptive((0, 1, 2))
    assert all(p.requires_grad for p in run.model.parameters())


def test_a_model_with_groups_that_do_not_work_yet_is_not_the_best(tmp_path):
    late = ("step.options.interpreter_epochs=0.5", "step.options.blocks_epochs=0.5", "optimization.epochs=3")
    made, _ = loop(tmp_path, *IARED, *late)
    original, found = made._checkpoint, []
    made._checkpoint = lambda: (original(), found.append(made.progress.best_step > 0))[0]
    made.go()
    assert found == [False, False, True]


def test_what_is_fixed_stays_fixed_in_every_phase(tmp_path):
    name = "blocks.0.attn.qkv.weight"
    made, run = loop(tmp_path, *IARED, *THIRD, f'optimization.fixed=["{name}"]')
    before = copies(run.model)
    made.go()
    assert name not in changed(before, run.model)
    assert run.model.blocks[0].attn.qkv.weight.grad is None
    assert "blocks.0.attn.proj.weight" in changed(before, run.model)


# ---------------------------------------------------------------------------------------------------- the search of rates
def test_the_search_writes_the_model_with_what_it_found(tmp_path):
    torch.manual_seed(1)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=24, **SHAPE)
    whole = laconic.summary(plain).macs / 1e9
    assert whole > 0.002
    made, run = loop(tmp_path, *SEARCH, "optimization.epochs=8", eval_every=4)
    before = copies(run.model)
    names_of_logits = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert names_of_logits == {name for name in before if name.startswith("laconic.")}
    accuracies = made.go()
    assert changed(before, run.model) <= names_of_logits
    found = [row["gmacs"] for row in rows(tmp_path) if "gmacs" in row]
    assert abs(found[-1] - 0.0017) < 0.3 * abs(found[0] - 0.0017)
    made.save()
    model = laconic.load(tmp_path / "model")
    config = model.laconic.config
    assert config.merge_kept == run.model.laconic.config.merge_kept
    assert any(n < 25 for n in model.laconic.counts(25))
    cost = laconic.summary(model)
    assert (cost.macs - sum(row.reducer_macs for row in cost.blocks)) / 1e9 == pytest.approx(found[-1], rel=0.05)
    assert same({n: t for n, t in before.items() if not n.startswith("laconic.")}, model.state_dict())
    assert cost.macs == laconic.summary(run.model).macs < whole * 1e9
    assert accuracies["val"].images == 8
    best = laconic.load(tmp_path / "best")
    assert not [name for name in best.state_dict() if name.startswith("laconic.")]


# ---------------------------------------------------------------------------------------------------- two passes
def test_two_passes_are_those_of_the_consistency_step(tmp_path):
    model, x, target = laconic.reduce_(make("plain"), "mctf", r=8).train(), images("plain"), torch.tensor([0, 1, 2])
    step = TwoPasses(Objective(model, None, LossPart()), TwoPassesOptions(weight=2.0, confidence=0.01, most=0.9))
    torch.manual_seed(5)
    parts = step(x, target)
    torch.manual_seed(5)
    expected = consistency_step(model, x, target, weight=2.0, confidence=0.01, most=0.9)
    assert parts["consistency"] > 0
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-6)
    parts["loss"].backward()
    assert model.laconic.schedule.values == (8, 8, 8)
    go(tmp_path, *MCTF, "optimization.epochs=1")
    assert {"teacher", "consistency"} <= rows(tmp_path)[0].keys()


# ---------------------------------------------------------------------------------------------------- options that change
def test_options_change_at_their_epoch_and_the_last_are_written(tmp_path):
    made, run = loop(tmp_path, *EVOVIT, "optimization.epochs=3")
    seen, best, original = [], [], made._step
    checkpoint = made._checkpoint
    made._checkpoint = lambda: (checkpoint(), best.append(made.progress.best_step > 0))[0]

    def step(batches):
        row = original(batches)
        models = (run.model.laconic, made.ema.module.laconic)
        assert all(reducer.config == one.config for one in models for reducer in one.reducers.values())
        seen.append([(one.config.stages, one.counts(25)) for one in models])
        return row

    made._step = step
    made.go()
    assert [one[0][0] for one in seen] == ["block"] * 3 + ["scheduled"] * 6
    assert all(own == averaged for own, averaged in seen)
    assert best == [False, True, True]
    made.save()
    assert laconic.load(tmp_path / "model").laconic.config.stages == "scheduled"


def test_an_option_goes_down_a_ramp(tmp_path):
    made, run = loop(tmp_path, *SVITE)
    seen, original = [], made._step
    made._step = lambda batches: (original(batches), seen.append(run.model.laconic.reducers["0"].tau))[0]
    weight = run.model.laconic.reducers["0"].scorer.weight
    made.go()
    assert seen == pytest.approx([10.0, 8.1, 6.2, 4.3, 2.4, 0.5])
    assert run.model.laconic.reducers["0"].scorer.weight is weight
    assert (tmp_path / "best").is_dir()
    made.save()
    assert laconic.load(tmp_path / "model").laconic.config.tau == pytest.approx(0.5)


def test_options_that_make_other_parts_cannot_come_later(tmp_path):
    settings = ("method.name=dpc-knn", "method.keep=0.6", 'method.later={1={weights="equal"}}')
    with pytest.raises(
        ValueError, match=r"with DPCKNN\(weights='equal', .*the reducers of dpc-knn would have other parameters"
    ):
        go(tmp_path, *settings)


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (("step.kind=search",), LookupError, "step.kind: there is no 'search'. Did you mean 'rate-search'"),
        (("step.kind=rate-search", "method.name=evit", "method.keep=0.7"), ValueError, "trains the method diffrate"),
        (("step.options.penalty=2.0",), ValueError, "there is no key step.options.penalty"),
        ((*IARED, "step.options.penalt=2.0"), ValueError, "no key step.options.penalt. Did you mean 'penalty'"),
        ((*IARED, "step.options.blocks_epochs=-1"), ValueError, "must be 0 or more"),
        ((*IARED, *THIRD, "method.keep=0.5", "method.warm_in_epochs=1"), ValueError, "both set the schedule"),
        ((*SEARCH, "method.keep=0.5"), ValueError, "set method.keep to 1.0"),
        ((*SEARCH, "step.options.gmacs=0"), ValueError, "gmacs must be the target cost"),
        ((*SEARCH, "optimization.eval_mode=false"), ValueError, "set optimization.eval_mode to true"),
        ((*SEARCH, "optimization.ema=0.9"), ValueError, "set optimization.ema to 0"),
        (("step.kind=two-passes",), ValueError, "there is no method"),
        ((*MCTF, "optimization.grad_checkpointing=true"), ValueError, "checkpointed blocks cannot run twice"),
        ((*MCTF, "step.options.most=0.0"), ValueError, "most shares (most above 0)"),
        (
            (*EVOVIT, 'method.later={2={stages="block"}}'),
            ValueError,
            "method.later changes options in epoch 2, and optimization.epochs is 2",
        ),
        ((*EVOVIT, 'method.later={1={stage="block"}}'), TypeError, "evovit has no option 'stage'"),
        ((*EVOVIT, 'method.later={soon={stages="block"}}'), ValueError, "a table of options for an epoch"),
        ((*SVITE, "method.ramps.tau=[10.0, 0.0]"), ValueError, "tau must be above 0"),
        ((*SVITE, "method.ramps.tau=3.0"), ValueError, "method.ramps.tau must be two numbers"),
        (('method.later={1={stages="block"}}',), ValueError, "method.later is set and method.name is not"),
        (("optimization.backbone_lr_cap=1e-3",), ValueError, "optimization.backbone_lr_cap is for methods that add parameters"),
        (("optimization.lr_scales.bias=-1",), ValueError, "optimization.lr_scales must have a factor of 0 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, error, message):
    with pytest.raises(error) as caught:
        check(Recipe().replaced(("optimization.epochs=2", *settings)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            (*IARED, *THIRD, "optimization.epochs=1"),
            "3 groups of interpreter_epochs=0.333 and blocks_epochs=0.333 are 1.998 epochs",
        ),
        ((*IARED, "step.options.penalty=[1.0, 2.0]"), "penalty has 2 values, and this model 3 groups"),
        (("method.name=ats", "step.kind=two-passes"), "ats decides by itself how many tokens to remove"),
        ((*SEARCH, "step.options.gmacs=3.0"), "gmacs must be above 0 and below the"),
        (("optimization.lr_scales.pruning=0.1",), "the name of no parameter of the model ends with 'pruning'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        go(tmp_path, *settings)
    assert not (tmp_path / "recipe.json").exists()


# ---------------------------------------------------------------------------------------------------- learning rates
def test_learning_rates_by_name_and_a_cap():
    settings = (
        "optimization.epochs=4",
        "optimization.lr=1e-2",
        "optimization.min_lr=0",
        "optimization.warmup_epochs=0",
        "optimization.lr_scales.pruning=1e-3",
        "optimization.backbone_lr_cap=6e-3",
        "optimization.freeze_backbone_epochs=1",
    )
    part = Recipe().replaced(settings).optimization
    model = laconic.reduce_(make("plain"), "ltmp")
    optimizer = make_optimizer(model, part)
    of = {id(p): name for name, p in model.named_parameters()}
    rate = LearningRate(optimizer, part, 1)
    for step in range(4):
        shown = rate.set(step)
        by_name = {of[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert by_name["laconic.reducers.1.merging"] == pytest.approx(shown)
        assert by_name["laconic.reducers.1.pruning"] == pytest.approx(shown / 1000)
        assert by_name["head.weight"] == pytest.approx(0 if step == 0 else min(shown, 6e-3))
    assert shown < 6e-3 < 1e-2


# ---------------------------------------------------------------------------------------------------- what is distilled
def distilled(name, kind="mse", **options):
    """Token distillation of a reduced model against its unreduced self, and all that it is made of."""
    student = laconic.reduce_(make("plain"), name, **options) if options else reduced(name, "plain")
    student, teacher, x = student.train(), make("plain"), images("plain")
    objective = Objective(student, teacher, LossPart(tokens=1.0, token_kind=kind))
    answer = objective.answer(x)
    value = objective._distilled(x, *answer)["tokens"]
    with torch.no_grad():
        wanted = teacher.forward_features(x)
    return value, answer.features[:, 1:], wanted[:, 1:], student.laconic.entry(4)


def squared(own, wanted, chosen):
    """Mean of the squared differences over the chosen pairs (image, token, place), by loops."""
    return torch.stack([(own[b, i] - wanted[b, p]).square().mean() for b, i, p in chosen]).mean().item()


def test_parked_tokens_are_distilled_in_the_places_that_they_come_back_to():
    value, own, wanted, left = distilled("evovit")
    assert not torch.equal(left.origin_index, torch.arange(36).expand(3, -1))
    assert left.origin_index.sort().values.tolist() == [list(range(36))] * 3
    pairs = [(b, i, int(left.origin_index[b, i])) for b in range(3) for i in range(36)]
    assert value.item() == pytest.approx(squared(own, wanted, pairs), rel=1e-5)


@pytest.mark.parametrize("name", ["iared", "avit", "dynamicvit"])
def test_hidden_tokens_are_not_distilled(name):
    options = {"gate_scale": 1.0, "gate_center": 1.0} if name == "avit" else {}
    value, own, wanted, left = distilled(name, **options)
    there = left.keep_mask > 0.5
    assert 0 < there.sum() < there.numel()
    pairs = [(b, i, i) for b in range(3) for i in range(36) if there[b, i]]
    assert value.item() == pytest.approx(squared(own, wanted, pairs), rel=1e-5)


def test_packages_are_not_distilled():
    value, own, wanted, left = distilled("spvit")
    packages = left.per_token[PACKAGE] > 0
    assert packages.sum(1).tolist() == [3] * 3
    there = (left.keep_mask > 0.5) & ~packages
    assert there.sum() < 3 * 36
    pairs = [(b, i, int(left.origin_index[b, i])) for b in range(3) for i in range(39) if there[b, i]]
    assert value.item() == pytest.approx(squared(own, wanted, pairs), rel=1e-5)
    with_packages = token_distillation(own, wanted.gather(1, left.origin_index.unsqueeze(2).expand_as(own)), left.keep_mask)
    assert value.item() != pytest.approx(with_packages.item(), rel=1e-3)


def test_patches_that_have_their_tokens_again_are_distilled_in_their_places():
    value, own, wanted, left = distilled("topk", keep=0.6, restore=True)
    assert len(left) < 36 == own.shape[1]
    assert value.item() == pytest.approx(squared(own, wanted, [(b, i, i) for b in range(3) for i in range(36)]), rel=1e-5)


@pytest.mark.parametrize("name", ["dynamicvit", "dtps", "spvit"])
def test_ratio_losses_count_the_tokens_that_are_there(name):
    torch.manual_seed(4)
    model, x = reduced(name, "plain").train(), images("plain")
    parts = Objective(model, None, LossPart(ratio=3.0))(x, torch.tensor([0, 1, 2]))
    by_hand = []
    for stage, block in enumerate(AT):
        entry = model.laconic.entry(block + 1)
        ordinary = 1 - entry.per_token.get(PACKAGE, torch.zeros_like(entry.keep_mask))
        share = (entry.keep_mask * ordinary).sum(1) / 36
        if name == "spvit":
            by_hand.append(
                (share.mean() - model.laconic.reducer(block).ratio).square()
                if model.laconic.reducer(block).ratio
                else (share.mean() - 0.6 ** (stage + 1)).square()
            )
        else:
            by_hand.append((share - 0.6 ** (stage + 1)).square().mean())
    assert parts["ratio"].item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-4)
    assert parts["loss"].item() == pytest.approx((parts["cross_entropy"] + 3 * parts["ratio"]).item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- a second head
def test_a_second_head_counts_as_its_method_says():
    model, x, target = make("plain", global_pool="avg").train(), images("plain"), torch.tensor([0, 1, 2])
    laconic.reduce_(model, "evovit", second_head=10)
    objective = Objective(model, None, LossPart())
    answer = objective.answer(x)
    second = model.laconic.entry(4).per_image[CLASS_LOGITS]
    parts = objective.losses(x, answer, target, None)
    losses = [F.cross_entropy(logits, target).item() for logits in (answer.logits, second)]
    assert parts["cross_entropy"].item() == pytest.approx(losses[0])
    assert parts[CLASS_LOGITS].item() == pytest.approx(losses[1])
    assert parts["loss"].item() == pytest.approx(sum(losses) / 2)
    parts["loss"].backward()
    learned = dict(model.laconic.named_parameters())
    assert learned
    assert all(p.grad.abs().sum() > 0 for p in learned.values())
