"""Evo-ViT: the authors' outputs, and what must hold by construction."""

import json

import numpy as np
import pytest
import timm
import torch

import golden_init
import laconic
from families import AT, images, make, observe
from laconic.core.tokens import Tokens
from laconic.methods.evovit import ENTERED, EVOLVED, EvoViT
from laconic.methods.ops import CLASS_LOGITS, joined, last_copies, renamed
from laconic.training.objective import Objective
from laconic.training.recipe import LossPart
from test_goldens import HERE, LOGITS, close, golden, picture


def official_weights(name):
    """The weights of a golden by the rule crc32-v1, under the authors' names."""
    shapes = json.loads((HERE / f"{name}.json").read_text())["state_dict"]
    return {key: torch.from_numpy(golden_init.crc32_v1(key, tuple(shape), {})) for key, shape in shapes.items()}


def test_the_authors_model_and_its_checkpoint():
    z = golden("evovit_stagewise")
    model = laconic.import_checkpoint({"model": official_weights("evovit_stagewise")}, "evovit")
    orders, scores = [], []

    def look(before, after):
        if after.parked is not None and before.parked is None:
            orders.append(torch.cat([after.origin_index, after.parked.origin_index], 1))
            scores.append(torch.cat([after.per_token[EVOLVED], after.parked.per_token[EVOLVED]], 1))

    observe(model, look)
    with torch.no_grad():
        close(model(picture()), z["logits"], LOGITS)
    run = [cost.attention_tokens for cost in laconic.summary(model).blocks]
    assert run == z["tokens_in_msa"].tolist()
    for stage in (0, 1):
        assert torch.equal(orders[stage], torch.from_numpy(z[f"selection{stage}_order_orig_patch"]))
        close(scores[stage] * 3, z[f"selection{stage}_global_cls_attn"], 1e-6)  # theirs is a sum over 3 heads


def branch(number):
    weight = torch.from_numpy(0.05 * np.random.RandomState(10 + number).standard_normal((192, 192))).float()
    return lambda x: torch.tanh((x + x.mean(1, keepdim=True)) @ weight)


def unit(branches):
    """The fast update, driven by toy residual branches."""
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((2, 197, 192))).float()
    g = torch.from_numpy(np.abs(np.random.RandomState(2).standard_normal((2, 196))) + 0.01).float()
    schedule = laconic.Schedule.rates(0.5, [1])
    site = laconic.BlockContext(0, 1, 192, 3, 0.5, grid=(14, 14), depth=2, schedule=schedule)
    reducer = EvoViT(update="fast").build(site)
    reducer.site = site
    tokens = reducer.before(Tokens.start(x, 1, True).replace(per_token={EVOLVED: g}), 98)
    representative = tokens.per_image[ENTERED]
    assert len(tokens) == 99
    for number in range(branches):
        tokens = tokens.replace(x=tokens.x + branch(number)(tokens.x))
    return reducer.after(tokens, 196), representative


@pytest.mark.parametrize(("name", "branches"), [("stage", 4), ("cat", 2)])
def test_the_fast_update(name, branches):
    z = golden("evovit_slowfast_unit")
    tokens, representative = unit(branches)
    close(representative, z["rep_token"], 1e-6)
    close(tokens.x, z[f"{name}_out"], 5e-5)
    assert torch.equal(tokens.origin_index, torch.from_numpy(z[f"{name}_order_orig_patch"]))
    assert tokens.parked is None
    assert torch.equal(tokens.size, torch.ones(2, 196))


@pytest.mark.parametrize("stages", ["scheduled", "block"])
@pytest.mark.parametrize("update", ["parked", "fast"])
def test_all_patches_are_there_at_the_end_and_the_parked_were_not_run(stages, update):
    model, x = laconic.reduce_(make("plain"), "evovit", keep=0.5, at=[1, 3], stages=stages, update=update), images("plain")
    run = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: run.append(args[0].shape[1]))
    with torch.no_grad():
        features = model.forward_features(x)
    slow = 1 + 18 + (update == "fast")
    assert run == [37, slow, slow, slow]
    assert [cost.attention_tokens for cost in laconic.summary(model).blocks] == run
    assert features.shape[1] == 37
    final = laconic.provenance(model).final
    assert torch.equal(final.size, torch.ones(3, 36))
    assert torch.equal(final.kept.sort(1).values, torch.arange(36).expand(3, -1))


def test_parked_tokens_come_back_as_they_were_and_fast_ones_all_move_alike():
    x, before, after = images("plain"), {}, {}
    for update in ("parked", "fast"):
        model = laconic.reduce_(make("plain"), "evovit", keep=0.5, at=[2], update=update)

        def look(old, new, update=update):
            if old.parked is None and new.parked is not None:
                before[update] = new.parked
            if old.parked is not None and new.parked is None:
                after[update] = new

        observe(model, look)
        with torch.no_grad():
            model(x)
    moved = {u: after[u].patches[:, 18:] - before[u].patches for u in before}
    assert torch.equal(moved["parked"], torch.zeros_like(moved["parked"]))
    assert moved["fast"].abs().min(2).values.max() > 0
    torch.testing.assert_close(moved["fast"], moved["fast"][:, :1].expand_as(moved["fast"]), rtol=1e-4, atol=1e-5)


def test_what_is_kept_evolves_and_what_is_parked_keeps_its_score():
    model, seen = laconic.reduce_(make("plain"), "evovit", keep=0.5, at=[1, 3]), []
    observe(model, lambda old, new: seen.append((old, new)))
    with torch.no_grad():
        model(images("plain"))
    chosen = next(new for old, new in seen if old.parked is None and new.parked is not None)
    joined = next(new for old, new in seen if old.parked is not None and new.parked is None)
    assert (chosen.per_token[EVOLVED].min(1).values >= chosen.parked.per_token[EVOLVED].max(1).values).all()
    assert torch.equal(joined.per_token[EVOLVED][:, 18:], chosen.parked.per_token[EVOLVED])
    assert (joined.per_token[EVOLVED][:, :18] != chosen.per_token[EVOLVED]).all()
    looks = [new.per_token[EVOLVED] for old, new in seen if new.parked is not None and old.parked is not None][:2]
    assert (looks[0] > chosen.per_token[EVOLVED] / 2).all()  # half of the old, and half of an attention above zero


# ------------------------------------------------------------------------------------------------ the second head
def with_second_head(keep=0.5, classes=7, **options):
    return laconic.reduce_(make("plain"), "evovit", keep=keep, at=[1, 3], second_head=classes, **options)


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("update", ["parked", "fast"])
def test_the_second_head_reads_the_class_token_in_training(update, keep):
    model, seen = with_second_head(keep, update=update), []
    observe(model, lambda before, after: seen.append(after.x[:, 0]))
    head = model.laconic.reducers["3"].second_head
    with torch.no_grad():
        expected = model(images("plain"))
        assert CLASS_LOGITS not in model.laconic.entry(4).per_image  # nothing is computed at inference
        torch.nn.init.normal_(head.norm.weight)
        torch.nn.init.normal_(head.head.bias)
    logits = model.train()(images("plain"))
    torch.testing.assert_close(logits.detach(), expected)
    noted, x = model.laconic.entry(4).per_image[CLASS_LOGITS], seen[-1]
    by_hand = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    by_hand = (by_hand * head.norm.weight + head.norm.bias) @ head.head.weight.T + head.head.bias
    assert noted.shape == (3, 7)
    torch.testing.assert_close(noted, by_hand, rtol=1e-4, atol=1e-5)
    assert set(model.laconic.entry(4).per_image) == {CLASS_LOGITS}
    torch.nn.functional.cross_entropy(noted, torch.tensor([0, 1, 2])).backward()
    for name, p in model.named_parameters():
        if name.startswith(("laconic.", "blocks.0.")):
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().sum() > 0 or name.endswith("attn.qkv.bias"), name
    assert [name for name, _ in model.laconic.named_children()] == ["reducers"]


def test_without_a_second_head_nothing_is_added():
    model = laconic.reduce_(make("plain"), "evovit", keep=0.5, at=[1, 3])
    assert set(model.state_dict()) == set(make("plain").state_dict())
    assert model.laconic.config.loss_weights() == {}
    model = with_second_head()
    added = {
        name.removeprefix("laconic.reducers.3.second_head."): tuple(t.shape) for name, t in model.laconic.named_parameters()
    }
    assert set(model.state_dict()) - set(make("plain").state_dict()) == {
        f"laconic.reducers.3.second_head.{name}" for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")
    }
    assert added["reducers.3.second_head.head.weight"] == (7, 48)
    assert model.laconic.config.loss_weights() == {"cross_entropy": 0.5, CLASS_LOGITS: 0.5}


def test_the_second_head_of_a_checkpoint():
    z, weights = golden("evovit_stagewise"), official_weights("evovit_stagewise")
    model = laconic.import_checkpoint({"model": weights}, "evovit", second_head=len(weights["head_cls.weight"]))
    with torch.no_grad():
        close(model(picture()), z["logits"], LOGITS)
    own = model.laconic.reducers["11"].second_head
    for theirs, ours in (("norm_cls", own.norm), ("head_cls", own.head)):
        assert torch.equal(ours.weight, weights[f"{theirs}.weight"])
        assert torch.equal(ours.bias, weights[f"{theirs}.bias"])
    with pytest.raises(ValueError, match=r"second_head\.head\.weight"):
        laconic.import_checkpoint({"model": weights}, "evovit", second_head=3)
    del weights["head_cls.bias"]
    with pytest.raises(ValueError, match=r"second_head\.head\.bias"):
        laconic.import_checkpoint({"model": weights}, "evovit", second_head=1000)


def test_half_of_the_loss_is_the_second_heads():
    """Published: half the cross-entropy of each head; the trainer finds the logits among the notes."""
    model, x = with_second_head(classes=10).train(), images("plain")
    for target in (torch.tensor([0, 1, 4]), torch.eye(10)[[0, 1, 4]] * 0.9 + 0.01):
        parts = Objective(model, None, LossPart())(x, target)
        noted = model.laconic.entry(4).per_image[CLASS_LOGITS].detach()
        assert set(parts) == {"loss", "cross_entropy", CLASS_LOGITS}
        torch.testing.assert_close(parts[CLASS_LOGITS], torch.nn.functional.cross_entropy(noted, target))
        torch.testing.assert_close(parts["loss"].detach(), (parts["cross_entropy"] + parts[CLASS_LOGITS]) / 2)
        parts["loss"].backward()
        assert model.laconic.reducers["3"].second_head.head.weight.grad.abs().sum() > 0
    assert set(Objective(model.eval(), None, LossPart())(x, target)) == {"loss", "cross_entropy"}


def test_a_second_head_is_saved(tmp_path):
    model = with_second_head()
    with torch.no_grad():
        model.laconic.reducers["3"].second_head.head.bias.fill_(2.0)
    laconic.save(model, tmp_path, model_args="omit")
    again = laconic.load(tmp_path, model=make("plain"))
    assert again.laconic.config.second_head == 7
    assert (again.laconic.reducers["3"].second_head.head.bias == 2).all()


@pytest.mark.unchecked
def test_what_a_second_head_needs():
    with pytest.raises(ValueError, match="evovit: second_head must be a number of classes, or None, not 0"):
        EvoViT(second_head=0)
    with pytest.raises(LookupError, match="no class token, which the second head reads; omit second_head"):
        laconic.reduce_(make("gap"), "evovit", keep=0.5, at=AT, score="mean-query", second_head=5)


# ------------------------------------------------------------------------------------------------ counts
@pytest.mark.parametrize("stages", ["scheduled", "block"])
@pytest.mark.parametrize("update", ["parked", "fast"])
@pytest.mark.parametrize(
    ("schedule", "slow"),
    [
        (laconic.Schedule.rates((1.0, 0.5), (1, 3)), (36, 36, 36, 18)),
        (laconic.Schedule.rates((0.5, 1.0), (1, 2)), (36, 18, 36, 36)),
        (laconic.Schedule.remove_counts({1: 1}), (36, 35, 35, 35)),
        (laconic.Schedule.keep_counts({2: 1}), (36, 36, 1, 1)),
        (laconic.Schedule.keep_counts({1: 99, 3: 5}), (36, 36, 36, 5)),
    ],
)
def test_stages_that_park_much_little_or_nothing(schedule, slow, update, stages):
    model = laconic.reduce_(make("plain"), "evovit", schedule=schedule, stages=stages, update=update)
    run = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: run.append(args[0].shape[1] - 1))
    with torch.no_grad():
        assert model(images("plain")).isfinite().all()
    assert run == [count + (update == "fast" and count < 36) for count in slow]
    left = [len(entry) for entry in model.laconic.ledger[1:]]
    assert tuple(left) == model.laconic.config.counts(schedule, 4, 36)
    assert left[3] == 36


def test_counting_builds_nothing(monkeypatch):
    config = EvoViT()
    schedule = config.default_schedule(12, None, None)
    monkeypatch.setattr(laconic.BlockContext, "__init__", lambda *args, **kwargs: pytest.fail("a BlockContext was built"))
    assert config.counts(schedule, 12, 196)[4] == 98


# ------------------------------------------------------------------------------------------------ names of weights
def test_rules_for_names():
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    theirs = {"x.1.w": a, "new.1.w": b, "other": c}
    assert renamed(theirs, (r"x\.(\d)\.(.)", r"new.\1.\2")) == {"new.1.w": a, "other": c}  # takes the place of b
    assert list(renamed(theirs, ("other", "one", "two"), ("o.*", "never"))) == ["x.1.w", "new.1.w", "one", "two"]
    assert list(renamed(theirs, ("other",), (r"x\.1", "not the whole name"))) == ["x.1.w", "new.1.w"]
    assert list(renamed(theirs, (r"x\.(\d)\.w", lambda m: f"y{int(m[1]) + 1}"))) == ["new.1.w", "other", "y2"]


def test_layers_that_are_put_together():
    theirs = {"b.0.k.w": torch.tensor([2.0]), "b.0.q.w": torch.tensor([1.0]), "b.1.q.w": torch.tensor([3.0])}
    ours = joined(theirs, ("q", "k"), "qk")
    assert ours["b.0.qk.w"].tolist() == [1.0, 2.0]
    assert set(ours) == {"b.0.qk.w", "b.1.q.w"}  # one without its counterpart stays, and will not fit
    weights = official_weights("evovit_stagewise")
    del weights["vs.3.v.weight"]
    with pytest.raises(ValueError, match=r"blocks\.3\.attn\.qk\.weight"):
        laconic.import_checkpoint(weights, "evovit")


def test_the_last_of_copies_is_taken(caplog):
    theirs = {"p.0.w": torch.zeros(1), "p.1.w": torch.zeros(1), "q.0.w": torch.zeros(1)}
    assert set(last_copies(theirs, r"(p)\.\d+\.(.+)")) == {"p.w", "q.0.w"}
    assert not caplog.text
    ours = last_copies({**theirs, "p.2.w": torch.ones(1)}, r"(p)\.\d+\.(.+)")
    assert ours["p.w"] == 1
    assert "copies of p differ; the last one is used" in caplog.text


# ------------------------------------------------------------------------------------------------ as a whole
@pytest.mark.unchecked
def test_counts_and_refusals():
    config = EvoViT()
    assert config.counts(config.default_schedule(12, None, None), 12, 196) == (196,) * 4 + (98,) * 3 + (196,) + (98,) * 3 + (
        196,
    )
    assert config.default_schedule(12, None, None).at == (4, 8)
    with pytest.raises(ValueError, match="attention of the block before"):
        laconic.reduce_(make("plain"), "evovit", at=[0])
    with pytest.raises(ValueError, match="update must be one of 'parked', 'fast'"):
        EvoViT(update="slow")
    model = laconic.reduce_(make("plain"), "evovit", schedule=laconic.Schedule.remove_counts({1: 6, 2: 12}))
    with torch.no_grad():
        model(images("plain"))
    assert [cost.attention_tokens for cost in laconic.summary(model).blocks] == [37, 31, 25, 25]


def test_the_cost_of_the_table():
    """Evo-ViT's table: .8, 3.0 and 11.6 G on DeiT-T, -S and -B; its authors cut the decimals of 11.66 off."""
    printed = {"deit_tiny_patch16_224": "0.8", "deit_small_patch16_224": "3.0", "deit_base_patch16_224": "11.7"}
    for name, gmacs in printed.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        config = EvoViT()
        from laconic.analysis.macs import estimate

        assert f"{estimate(model, config, config.default_schedule(12, None, None)).macs / 1e9:.1f}" == gmacs


@pytest.mark.parametrize("update", ["parked", "fast"])
def test_it_trains(update):
    model = laconic.reduce_(make("qk-norm"), "evovit", keep=0.5, at=AT, update=update).train()
    model(images("qk-norm")).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n.startswith("blocks."))
