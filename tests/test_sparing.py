"""Work that nobody needs is left out, and what comes out is the same."""

import copy
import dataclasses
import logging

import pytest
import torch
from torch import nn

import laconic
from families import AT, AVERAGED, FAMILIES, FIXED, METHODS, at, fill, images, make, options, rate, reduced, serves
from laconic.analysis.macs import counted
from laconic.core.backbone import BLOCKS, block_spec, path_of

CLOSE = dict(rtol=1e-5, atol=1e-5)
READ_BY_TOKEN = sorted(set(FAMILIES) - AVERAGED)


def whole(model):
    """The same model with all rows computed."""
    other = copy.deepcopy(model)
    other.laconic.skip_unused = False
    return other


def both(method, family, blocks=(1, 2)):
    """Reduced before its last block, so that this is worked out for the prefix tokens alone; the answer, and that of all rows."""
    model = laconic.reduce_(make(family), method, keep=rate(method), at=at(method, blocks), **options(method, family))
    fill(model.laconic)
    x = images(family)
    with torch.no_grad():
        return model, x, model(x), whole(model)(x)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_the_same(method):
    for blocks in (AT,) if method == "avit" else ((1, 2), AT):  # avit answers after the last block, where it must work
        model, x, spared, full = both(method, "plain", blocks)
        assert model.laconic.skip_unused
        torch.testing.assert_close(spared, full, **CLOSE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "parallel"])
@pytest.mark.parametrize("method", ["topk", "tome"])
def test_every_family_answers_the_same(method, family):
    model, x, spared, full = both(method, family)
    torch.testing.assert_close(spared, full, **CLOSE)


@pytest.mark.parametrize("family", READ_BY_TOKEN)
def test_provenance_features_and_sizes_are_the_same(family):
    method = "etps" if serves("etps", family) else "dtps"
    model, x, *_ = both(method, family)
    other = whole(model)
    with torch.no_grad():
        other(x)
        assert torch.equal(laconic.provenance(model).final.where, laconic.provenance(other).final.where)
        assert torch.equal(laconic.provenance(model).final.size, laconic.provenance(other).final.size)
        features = model.forward_features(x)
        assert features.shape == other.forward_features(x).shape
        torch.testing.assert_close(features, other.forward_features(x), **CLOSE)
        assert laconic.restore_dense(model, features).shape[1] == laconic.provenance(model).final.where.shape[1]


@pytest.mark.parametrize("method", ["topk", "tome", "pitome", "tofu"])
def test_the_last_block_is_spared_where_a_method_works_there(method):
    """Nobody reads the features of its patch tokens; what becomes of them is known all the same."""
    model, x, spared, full = both(method, "plain", (1, 3))
    torch.testing.assert_close(spared, full, **CLOSE)
    assert queries_of(model, x)[-1] == 1
    other = whole(model)
    other(x)
    for mine, theirs in zip(laconic.provenance(model).stages, laconic.provenance(other).stages, strict=True):
        assert torch.equal(mine.where, theirs.where)
        assert torch.equal(mine.size, theirs.size)
    assert queries_of(laconic.reduce_(make("plain"), "etps", keep=0.6, at=[1, 3]), x)[-1] == 23  # it goes by features


def rows_through(model, layer, x):
    seen = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen


def queries_of(model, x):
    """Rows of the queries in each call of fused attention."""
    calls = []
    from laconic.core.attention import AttentionTap

    with AttentionTap(calls), torch.no_grad():
        model(x)
    return [call["query"].shape[2] for call in calls]


def test_what_is_left_out():
    # 36 patches and a class token; topk leaves 22, 14, 9 after blocks 1, 2, 3 of 4; etps likewise
    drops = laconic.reduce_(make("plain"), "topk", keep=0.6, at=[0, 1])
    merges = laconic.reduce_(make("plain"), "etps", keep=0.6, at=[0, 1])
    x = images("plain")
    assert queries_of(drops, x) == [23, 15, 15, 1]  # dropped tokens are no queries; at last the class token asks alone
    assert queries_of(merges, x) == [37, 23, 15, 1]  # squeezed ones are
    assert queries_of(laconic.reduce_(make("plain"), "etps", keep=0.6, at=[0, 1], compute="all"), x) == [37, 23, 15, 15]
    assert queries_of(laconic.reduce_(make("distilled"), "etps", keep=0.6, at=[0, 1]), images("distilled"))[-1] == 2
    assert queries_of(laconic.reduce_(make("siglip"), "etps", keep=0.6, at=[0, 1], score="mean-query"), x)[-2:] == [
        14,
        1,
    ]  # a pool
    assert queries_of(laconic.reduce_(make("qk-norm"), "etps", keep=0.6, at=[0, 1]), x)[-1] == 15  # it reads a mean
    assert queries_of(laconic.reduce_(make("plain"), "etps", keep=0.6, at=[0, 1], restore=True), x)[-1] == 15


def test_families_without_known_steps_spare_the_mlp():
    model = laconic.reduce_(make("rope-mixed"), "etps", keep=0.6, at=[0, 1])
    x, weight, seen = images("rope-mixed"), model.blocks[3].mlp.fc1.weight, []

    class Rows(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear and args[1] is weight:
                seen.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Rows():
        model(x)
    assert seen == [1]


@pytest.mark.parametrize("method", ["etps", "bat", "tome"])
def test_known_steps_need_no_listening(method, monkeypatch):
    model = laconic.reduce_(make("plain"), method, keep=0.6, at=[0, 1])
    other, x = whole(model), images("plain")
    expected = other(x)

    def listen(*args, **kwargs):
        raise AssertionError("every operation of a block is listened to")

    monkeypatch.setattr("laconic.core.block_forward.AttentionTap", listen)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    with pytest.raises(AssertionError, match="listened"):
        other(x)


def test_blocks_that_never_have_anything_to_do_run_as_they_stand(monkeypatch):
    model = laconic.reduce_(make("plain"), "etps", keep=0.6, at=[1])
    assert model.laconic.passthrough == {0, 2}  # the last may be spared
    x, steps, own = images("plain"), [], laconic.core.runtime.pass_block
    record = lambda run, tokens: (steps.append(run.link.index), own(run, tokens))[1]  # noqa: E731
    monkeypatch.setattr("laconic.core.runtime.pass_block", record)
    model(x)
    assert steps == [1, 3]
    assert [len(entry) for entry in model.laconic.ledger] == [36, 36, 22, 22, 22]
    tome = laconic.reduce_(make("plain"), "tome", keep=0.6, at=[1])
    assert tome.laconic.passthrough == {0, 2}
    steps.clear()
    tome(x)  # sizes are to be added to the logits: the block after it does not run as it stands
    assert steps == [1, 2, 3]


def test_a_block_that_runs_as_it_stands_refuses_what_others_do():
    model = laconic.reduce_(make("plain"), "etps", keep=0.6, at=[1])
    model(images("plain"))
    x = torch.randn(images("plain").shape[0], 37, 48)
    with pytest.raises(ValueError, match="takes no attn_mask"):
        model.blocks[0](x, attn_mask=torch.ones(37, 37))
    with pytest.raises(RuntimeError, match="block 2 .* got features of shape"):
        model.blocks[2](x)


def test_multiply_adds_that_are_run():
    model = laconic.reduce_(make("plain"), "topk", keep=0.6, at=[0, 1])
    assert counted(model) == laconic.summary(model).macs
    # 48 channels; block 0: 14 of 37 rows are no queries and not projected, in block 1 8 of 23; the class row's look is extra
    dropped = (14 + 8) * 2 * 48 * 48 + (14 * 37 + 8 * 23) * 2 * 48
    last = 14 * (2 * 48 * 48 + 8 * 48 * 48) + 14 * 15 * 2 * 48  # queries, projection and MLP of all but the class token
    asked = 2 * 48 * 48  # the class query once more in both blocks
    assert counted(model) - counted(model, compute="needed") == dropped + last - asked


def test_nothing_reduced_is_the_model_itself_unless_asked():
    x = images("plain")
    for rows in (None, "all"):
        model = laconic.reduce_(make("plain"), "topk", keep=1.0, compute=rows)
        assert not model.laconic.skip_unused
        assert torch.equal(model(x), make("plain")(x))
    model = laconic.reduce_(make("plain"), "topk", keep=1.0, compute="needed")
    assert queries_of(model, x) == [37, 37, 37, 1]
    torch.testing.assert_close(model(x), make("plain")(x), **CLOSE)


def test_training_computes_everything():
    model = laconic.reduce_(make("plain"), "topk", keep=0.6, at=[0, 1]).train()
    assert queries_of(model, images("plain")) == [37, 23, 15, 15]
    assert queries_of(model.eval(), images("plain"))[-1] == 1


def test_gradients_are_the_same():
    model = reduced("topk", "plain")
    other, x = whole(model), images("plain")
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("place", ["block", "inside", "norm"])
def test_who_listens_gets_every_row(place):
    model = laconic.reduce_(make("plain"), "etps", keep=0.6, at=[0, 1])
    layer = {"block": model.blocks[3], "inside": model.blocks[3].norm2, "norm": model.norm}[place]
    assert rows_through(model, layer, images("plain")) == [15]
    assert queries_of(model, images("plain"))[-1] == 1


def test_adapters_and_hooks_in_the_attention_are_kept():
    """What is not a plain linear layer any more is not taken apart."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    for change in ("class", "hook", "weight"):
        model = reduced("topk", "plain")
        qkv = model.blocks[1].attn.qkv
        if change == "class":
            qkv.__class__ = Adapted
        elif change == "hook":
            qkv.register_forward_hook(lambda module, args, out: out + 1.0)
        else:
            qkv.weight.data.add_(0.5)
        with torch.no_grad():
            torch.testing.assert_close(model(images("plain")), whole(model)(images("plain")), **CLOSE)
        assert block_spec(model.blocks[1]).steps.known(model.blocks[1]) == (change == "weight")


def test_steps_that_do_not_hold_are_not_used(caplog):
    """A host's attention that is more than its entry knows: its rows are all computed, and it is said."""
    model = make("plain")
    own = type(model.blocks[2].attn)

    class More(own):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    More.__module__, More.__qualname__ = own.__module__, own.__qualname__  # passes for the class itself
    model.blocks[2].attn.__class__ = More
    with caplog.at_level(logging.WARNING, logger="laconic"):
        laconic.reduce_(model, "etps", keep=0.6, at=[0, 1])
    assert "block 2" in caplog.text
    assert "its attention computed in steps differs" in caplog.text
    assert not model.laconic.skip_unused
    assert queries_of(model, images("plain"))[-1] == 15


@pytest.mark.parametrize("step", ["queries", "keys_values", "project", "added"])
def test_every_step_is_proved(step, monkeypatch, caplog):
    """A host's entry that is wrong in one of its steps: they are not taken."""
    path = path_of(type(make("plain").blocks[0]))
    own = BLOCKS[path]

    right = getattr(own.steps, step)
    wrong = dataclasses.replace(own.steps, **{step: lambda block, h: doubled(right(block, h))})

    def doubled(out):
        return tuple(2 * t for t in out) if isinstance(out, tuple) else 2 * out

    monkeypatch.setitem(BLOCKS, path, dataclasses.replace(own, steps=wrong))
    with caplog.at_level(logging.WARNING, logger="laconic"):
        model = laconic.reduce_(make("plain"), "etps", keep=0.6, at=[0, 1])
    assert "its attention computed in steps differs" in caplog.text
    assert not model.laconic.skip_unused


def test_rows_are_saved(tmp_path):
    for rows in ("all", "needed", None):
        laconic.save(laconic.reduce_(make("plain"), "etps", keep=0.6, at=AT, compute=rows), tmp_path / str(rows))
        assert laconic.load(tmp_path / str(rows)).laconic.compute == rows


def test_another_tools_forward_is_left_alone():
    model = make("plain")
    model.forward = own = lambda x: type(model).forward(model, x)
    laconic.reduce_(model, "etps", keep=0.6, at=[0, 1])
    assert vars(model)["forward"] is own
    assert queries_of(model, images("plain"))[-1] == 15
    laconic.restore_(model)
    assert vars(model)["forward"] is own


@pytest.mark.unchecked
def test_a_wrong_word_is_refused():
    model = make("plain")
    with pytest.raises(ValueError, match="compute must be 'needed', 'all' or None, not 'some'"):
        laconic.reduce_(model, "etps", keep=0.6, compute="some")
    assert not hasattr(model, "laconic")


@pytest.mark.parametrize("method", sorted(set(METHODS) - FIXED))
def test_half_precision(method):
    model = laconic.reduce_(make("plain"), method, keep=rate(method), at=at(method), **options(method, "plain")).bfloat16()
    x = images("plain").bfloat16()
    assert model(x).isfinite().all()
