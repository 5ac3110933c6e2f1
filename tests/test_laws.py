"""What must hold for every method on every supported family."""

import copy
import pickle
from functools import partial

import pytest
import torch
from timm.utils import ModelEmaV3

import laconic
from families import (
    AT,
    BEFORE,
    EVERY,
    FAMILIES,
    METHODS,
    MIXERS,
    NO_CLASS_TOKEN,
    PAIRS,
    PAIRS_TOO,
    PARKING,
    VARIABLE,
    at,
    images,
    make,
    observe,
    options,
    rate,
    reduced,
)
from laconic.core import gather
from laconic.core.attention import AttentionTap
from laconic.core.gather import arange_like
from laconic.core.method import Reducer
from laconic.core.tokens import Tokens
from laconic.methods import dynamicvit
from laconic.methods.ops import arbitrary, class_attention, mean_query_attention, topk_split

FEWER = [p for p in PAIRS if EVERY or p[1] == "plain" or p[0] == "etps"]
every_pair = pytest.mark.parametrize(("method", "family"), FEWER)
more_pairs = pytest.mark.parametrize(("method", "family"), PAIRS_TOO)
DROPS = {name for name, row in laconic.methods().items() if row.rest == "dropped"}
BOTH = {name for name, row in laconic.methods().items() if row.rest.startswith("dropped ")}  # it drops some and merges some
# these go by the place of a token, in the sequence or on the grid, by definition
IN_SEQUENCE = {"tome", "tofu", "mctf", "ltmp", "random", "patch-slimming", "heuristic"}
IN_SEQUENCE |= {"avg-pool", "max-pool", "spatial-pool", "conv-pool", "mlp-pool", "two-stage"} | BEFORE
SAMPLED = {"iared"}  # its decisions are learned from rewards, see tests/test_deciding_learned.py


def served_on(*families):
    """Every method on those of the families that it serves."""
    return pytest.mark.parametrize(("method", "family"), [(m, f) for m in METHODS for f in families if (m, f) in PAIRS])


def run(model, x):
    with torch.no_grad():
        return model(x)


@more_pairs
def test_keep_1_is_the_identity(method, family):
    model, x = make(family), images(family)
    expected = run(model, x)
    laconic.reduce_(model, method, keep=1.0, at=at(method), **options(method, family))
    assert torch.equal(run(model, x), expected)


@every_pair
def test_sums_by_products_are_the_same(method, family, monkeypatch):
    """Exported files add the rows of merged tokens by a matrix product."""
    model, x = reduced(method, family), images(family)[:1]
    x = torch.cat([x, torch.ones_like(x), torch.cat([x[..., : x.shape[-1] // 2]] * 2, -1)])  # tokens that are equal too
    expected = run(model, x)
    merge = Tokens.merge

    def checked(tokens, dst, weight, lead, *, complete=False):
        assert not complete or torch.equal(dst.gather(1, lead), arange_like(lead))
        return merge(tokens, dst, weight, lead, complete=complete)

    monkeypatch.setattr(Tokens, "merge", checked)
    monkeypatch.setattr(gather, "_exporting", lambda: True)
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)


@more_pairs
def test_tokens_leave_as_scheduled_and_every_patch_is_accounted_for(method, family):
    model, moments = reduced(method, family), []
    observe(model, lambda before, after: moments.append((before, after)))
    run(model, images(family))
    stages, config, expected = laconic.provenance(model).stages, model.laconic.config, [36]
    for stage in stages:
        expected.append(config.counts(model.laconic.schedule, 4, 36)[stage.block])
        if method in VARIABLE:
            assert stage.size.shape[1] <= 36
        elif method in PARKING:  # what comes back is there at the end
            assert stage.size.shape[1] == expected[-1]
        else:
            assert stage.size.shape[1] == expected[-1] < expected[-2]
        gone = (stage.where < 0).sum(1)
        torch.testing.assert_close(stage.size.sum(1) + gone, torch.full((3,), 36.0), rtol=1e-5, atol=0)
        if method in MIXERS:
            continue
        held = (stage.where.unsqueeze(1) == arange_like(stage.size).unsqueeze(2)).sum(2)
        assert torch.equal(held.float(), stage.size)
        if method not in PARKING | VARIABLE | BOTH:
            assert (gone.min() > 0) if method in DROPS else (gone.max() == 0)
        # a token stands in the place of a patch that it holds, and no two in the same place
        at_home = stage.where.gather(1, stage.kept) == arange_like(stage.kept)
        assert (at_home | (stage.size == 0)).all() if method in VARIABLE else at_home.all()
    assert len(stages) == len(at(method))
    assert len(moments) >= len(at(method))
    if laconic.methods()[method].class_readout:
        return
    for before, after in moments:  # prefix tokens are untouched
        assert torch.equal(before.x[:, : before.prefix], after.x[:, : after.prefix])


@more_pairs
def test_a_batch_equals_its_images_one_by_one(method, family):
    model, x = reduced(method, family), images(family)
    singles = torch.cat([run(model, image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(run(model, x), singles, rtol=1e-4, atol=1e-4)


def permute_patches(model, order):
    """Permute the patch tokens at the first block, and the rotary tables and biases that every block gets, in the same way."""
    prefix = model.num_prefix_tokens

    def first(block, args, kwargs):
        x = args[0]
        return (torch.cat([x[:, :prefix], x[:, prefix:][:, order]], 1), *args[1:]), kwargs

    def tables(block, args, kwargs):
        rope = kwargs.get("rope")
        return args, kwargs if rope is None else {**kwargs, "rope": rope[..., order, :]}

    every = torch.cat([torch.arange(prefix), order + prefix])
    for module in model.modules():
        if hasattr(module, "relative_position_index") and module.relative_position_index is not None:
            module.relative_position_index = module.relative_position_index[every][:, every]
    model.blocks[0].register_forward_pre_hook(first, with_kwargs=True)
    for block in model.blocks:
        block.register_forward_pre_hook(tables, with_kwargs=True)


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if pair[0] not in IN_SEQUENCE])
def test_permuted_patches_give_the_same_answer(method, family):
    model, x = reduced(method, family), images(family)
    expected = run(model, x)
    permute_patches(model, torch.randperm(36, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)


class Hidden(Reducer):
    """Pure pruning by hiding: the tokens stay, but nobody sees them from here on."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def between(self, tokens, seen, n):
        dead = torch.zeros_like(tokens.size) if tokens.keep_mask is None else 1 - tokens.keep_mask
        kept, _ = topk_split(self.score(tokens, seen) - dead, n)
        alive = torch.zeros_like(tokens.size).scatter(1, kept, 1.0)
        return tokens.soft_drop(alive, torch.where(alive > 0, arange_like(alive), -1))


@pytest.mark.parametrize(("method", "family"), [p for p in PAIRS if p[0] in ("topk", "random")])
def test_removed_equals_hidden(method, family):
    x, schedule = images(family), laconic.Schedule.keep_counts({1: 22, 2: 14, 3: 9})
    removed = laconic.reduce_(make(family), method, schedule=schedule, **options(method, family))
    expected = run(removed, x)
    hidden = laconic.reduce_(make(family), method, schedule=schedule, **options(method, family))
    for stage, block in enumerate(AT):
        by_attention = mean_query_attention if family in NO_CLASS_TOKEN else class_attention
        score = by_attention if method == "topk" else partial(arbitrary_score, stage)
        hidden.laconic.reducers[str(block)] = Hidden(score)
    torch.testing.assert_close(run(hidden, x), expected, rtol=1e-4, atol=1e-4)
    assert len(hidden.laconic.entry(4)) == 36
    assert torch.equal(hidden.laconic.entry(4).token_of_patch >= 0, removed.laconic.entry(4).token_of_patch >= 0)


def arbitrary_score(stage, tokens, seen):
    return arbitrary(tokens, stage)


@every_pair
def test_restore_gives_the_original_back(method, family):
    model, x = make(family), images(family)
    expected, keys = run(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    laconic.reduce_(model, method, keep=rate(method), at=at(method), **options(method, family))
    adds = bool(model.laconic.state_dict())  # parameters, or positions that were calibrated
    assert adds or not laconic.methods()[method].learns
    assert [n for n in model.state_dict() if not n.startswith("laconic.")] == list(keys)
    assert any(n.startswith("laconic.") for n in model.state_dict()) == adds
    model.load_state_dict(keys, strict=not adds)
    run(model, x)
    assert laconic.restore_(model) is model
    assert torch.equal(run(model, x), expected)
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert list(model.state_dict()) == list(keys)
    assert all(torch.equal(v, keys[k]) for k, v in model.state_dict().items())


@every_pair
def test_fused_attention_goes_on(method, family):
    model, x = make(family), images(family)
    base, calls = [], []
    with AttentionTap(base):
        run(model, x)
    laconic.reduce_(model, method, keep=rate(method), at=at(method), **options(method, family))
    with AttentionTap(calls):
        run(model, x)
    if method in VARIABLE:  # one for every image, where they differ
        assert len(base) <= len(calls) <= 3 * len(base)
    else:  # one that looks ahead makes a call more, and where it hands over weights that block makes none
        assert len(calls) == len(base)


@served_on("plain", "siglip")
def test_copies_are_independent_and_equal(method, family):
    model, x = reduced(method, family), images(family)
    expected = run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.laconic is not model.laconic
        assert other.laconic.model is other
        assert torch.equal(run(other, x), expected)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert torch.equal(run(model, x), expected)
        laconic.restore_(other)
        assert laconic.provenance(model).stages


@served_on("plain", "siglip")
def test_a_copy_can_be_made_in_mid_training(method, family):
    model, x = reduced(method, family).train(), images(family)
    loss = model(x).square().mean()
    copy.deepcopy(model)
    loss.backward()


@every_pair
def test_half_precision(method, family):
    x = images(family)
    model = reduced(method, family)
    full = run(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model, x)
    assert mixed.isfinite().all()
    assert len(laconic.provenance(model).final.size[0]) < (23 if method in BEFORE else 20) or method in VARIABLE | PARKING
    half = run(model.to(torch.bfloat16), x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    # decisions near a tie may fall otherwise, so only the size of the answer is compared
    assert 0.5 < mixed.float().norm() / full.norm() < 2


@every_pair
def test_gradients_reach_every_parameter(method, family):
    model, x = reduced(method, family).train(), images(family)
    loss = model(x)
    loss = (loss[0] if isinstance(loss, tuple) else loss).square().mean() + sum(laconic.losses(model).values())
    loss.backward()
    for name, p in model.named_parameters():
        if (name.startswith("laconic.") and method not in SAMPLED) or name.startswith("blocks."):
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
    stem = ("patch_embed.proj.weight", "embeds.proj.weight")
    assert next(p for n, p in model.named_parameters() if n.endswith(stem)).grad.abs().sum() > 0


@served_on("plain", "siglip")
def test_gradient_checkpointing_changes_nothing(method, family):
    gradients = []
    for checkpointing in (False, True):
        model, x = reduced(method, family).train(), images(family)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        (model(x).square().mean() + sum(laconic.losses(model).values())).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dtps", "dynamicvit"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_soft_training_agrees_with_removal(method, family, monkeypatch):
    """With the decisions of inference in its mouth, the training path gives the answer of the inference path."""
    model, x = reduced(method, family), images(family)
    expected = run(model, x)
    counts = iter([stage.size.shape[1] for stage in laconic.provenance(model).stages])

    def decide(log_probs):
        n = next(counts)
        kept = topk_split(log_probs[..., 0].masked_fill(dead[0], -99.0), n)[0]
        keep = torch.zeros_like(log_probs[..., 0]).scatter(1, kept, 1.0)
        dead[0] = keep == 0
        return keep

    dead = [torch.zeros(3, 36, dtype=torch.bool)]
    monkeypatch.setattr(dynamicvit, "gumbel_keep", decide)
    model.train()
    soft = run(model, x)
    soft = torch.stack(soft).mean(0) if isinstance(soft, tuple) else soft
    torch.testing.assert_close(soft, expected, rtol=1e-3, atol=1e-3)
    stage = laconic.provenance(model).final
    assert torch.equal(stage.size.sum(1) + (stage.where < 0).sum(1), torch.full((3,), 36.0))


@pytest.mark.parametrize("method", ["dtps", "dynamicvit"])
@pytest.mark.parametrize("family", ["plain", "gap", "siglip", "dinov3"])
def test_nothing_breaks_when_every_token_is_dropped(method, family, monkeypatch):
    monkeypatch.setattr(dynamicvit, "gumbel_keep", lambda log_probs: 0 * log_probs[..., 0])
    model = reduced(method, family).train()
    logits = model(images(family))
    (logits.square().mean() + laconic.losses(model)["ratio"]).backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert (laconic.provenance(model).final.where == -1).all()


def test_arbitrary_pruning_differs_by_seed_and_stage():
    x = images("plain")
    kept = []
    for seed in (0, 1):
        model = laconic.reduce_(make("plain"), "random", keep=0.6, at=AT, seed=seed)
        run(model, x)
        kept.append(laconic.provenance(model).stages[0].kept)
    assert not torch.equal(kept[0].sort(1).values, kept[1].sort(1).values)
    first, second = laconic.provenance(model).stages[:2]
    assert not torch.equal(second.kept.sort(1).values, first.kept[:, : second.kept.shape[1]].sort(1).values)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["bat", "dtps"])
def test_data_parallel_training_and_moving_averages(method, one_process):
    x, gradients = images("plain"), []
    for wrap in (lambda model: model, torch.nn.parallel.DistributedDataParallel):
        model = reduced(method, "plain").train()
        torch.manual_seed(3)
        wrap(model)(x).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][name], rtol=1e-5, atol=1e-6)
    average = ModelEmaV3(model, decay=0.0)
    average.update(model)
    assert torch.equal(run(average.module.eval(), x), run(model.eval(), x))
    assert average.module.laconic is not model.laconic
