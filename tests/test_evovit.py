"""Evo-ViT: the authors' outputs, and what must hold by construction."""

import json

import numpy as np
import pytest
import timm
import torch

import golden_init
import laconic
from families import AT, images, make
from laconic.methods.evovit import ENTERED, EVOLVED, EvoViT
from laconic.tokens import Tokens
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
        if after.aside is not None and before.aside is None:
            orders.append(torch.cat([after.place, after.aside.place], 1))
            scores.append(torch.cat([after.columns[EVOLVED], after.aside.columns[EVOLVED]], 1))

    model.laconic.observer = look
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
    site = laconic.Site(0, 1, 192, 3, 0.5, grid=(14, 14), depth=2, schedule=schedule)
    reducer = EvoViT(update="fast").build(site)
    reducer.site = site
    tokens = reducer.before(Tokens.start(x, 1, True).replace(columns={EVOLVED: g}), 98)
    representative = tokens.notes[ENTERED]
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
    assert torch.equal(tokens.place, torch.from_numpy(z[f"{name}_order_orig_patch"]))
    assert tokens.aside is None
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
            if old.aside is None and new.aside is not None:
                before[update] = new.aside
            if old.aside is not None and new.aside is None:
                after[update] = new

        model.laconic.observer = look
        with torch.no_grad():
            model(x)
    moved = {u: after[u].patches[:, 18:] - before[u].patches for u in before}
    assert torch.equal(moved["parked"], torch.zeros_like(moved["parked"]))
    assert moved["fast"].abs().min(2).values.max() > 0
    torch.testing.assert_close(moved["fast"], moved["fast"][:, :1].expand_as(moved["fast"]), rtol=1e-4, atol=1e-5)


def test_what_is_kept_evolves_and_what_is_parked_keeps_its_score():
    model, seen = laconic.reduce_(make("plain"), "evovit", keep=0.5, at=[1, 3]), []
    model.laconic.observer = lambda old, new: seen.append((old, new))
    with torch.no_grad():
        model(images("plain"))
    chosen = next(new for old, new in seen if old.aside is None and new.aside is not None)
    joined = next(new for old, new in seen if old.aside is not None and new.aside is None)
    assert (chosen.columns[EVOLVED].min(1).values >= chosen.aside.columns[EVOLVED].max(1).values).all()
    assert torch.equal(joined.columns[EVOLVED][:, 18:], chosen.aside.columns[EVOLVED])
    assert (joined.columns[EVOLVED][:, :18] != chosen.columns[EVOLVED]).all()
    looks = [new.columns[EVOLVED] for old, new in seen if new.aside is not None and old.aside is not None][:2]
    assert (looks[0] > chosen.columns[EVOLVED] / 2).all()  # half of the old, and half of an attention above zero


@pytest.mark.unchecked
def test_counts_and_refusals():
    config = EvoViT()
    assert config.counts(config.plan(12, None, None), 12, 196) == (196,) * 4 + (98,) * 3 + (196,) + (98,) * 3 + (196,)
    assert config.plan(12, None, None).at == (4, 8)
    with pytest.raises(ValueError, match="attention of the block before"):
        laconic.reduce_(make("plain"), "evovit", at=[0])
    with pytest.raises(ValueError, match="update must be one of 'parked', 'fast'"):
        EvoViT(update="slow")
    model = laconic.reduce_(make("plain"), "evovit", schedule=laconic.Schedule.removing({1: 6, 2: 12}))
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
        from laconic.cost import estimate

        assert f"{estimate(model, config, config.plan(12, None, None)).macs / 1e9:.1f}" == gmacs


@pytest.mark.parametrize("update", ["parked", "fast"])
def test_it_trains(update):
    model = laconic.reduce_(make("qk-norm"), "evovit", keep=0.5, at=AT, update=update).train()
    model(images("qk-norm")).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n.startswith("blocks."))
