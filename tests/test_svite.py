"""SViTE+ (token selection), and SViTE and S2ViTE (sparse weights)."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import laconic
from families import fill, images, make, reduced
from laconic import StructuredSparsity, UnstructuredSparsity
from laconic.core.tokens import Tokens
from laconic.methods.svite import TokenSelection, set_temperature
from laconic.training.sparsity import erk


def run(model, x):
    with torch.no_grad():
        return model(x)


def tokens(batch=2, patches=12, channels=8, prefix=1):
    return Tokens.start(torch.randn(batch, prefix + patches, channels), prefix, True)


def selection(rest="drop", tau=1.0, channels=8):
    return fill(TokenSelection(channels, rest, tau))


def noisy_by_hand(reducer, t, seed):
    """log p + Gumbel noise over all tokens, with the draw that follows ``seed``."""
    torch.manual_seed(seed)
    log_p = reducer.scorer(t.x).squeeze(-1).log_softmax(-1)
    return log_p - torch.empty_like(log_p).exponential_().log()


# ------------------------------------------------------------------------------------------------ token selection
def test_the_counts_are_the_published_ones():
    counts = [
        laconic.SViTE().default_schedule(12, keep, None).counts(12, 196, laconic.SViTE().num_kept)[0]
        for keep in (0.95, 0.9, 0.7)
    ]
    assert counts == [187, 177, 138]
    assert laconic.SViTE().default_schedule(12, 0.7, None).at == (0,)
    assert laconic.SViTE().default_schedule(12, 0.7, (2, 5)).at == (2, 5)


def test_the_highest_scores_stay_and_nothing_is_drawn_at_inference():
    t, reducer = tokens(), selection().eval()
    with torch.no_grad():
        out, again = reducer.before(t, 5), reducer.before(t, 5)
        expected = reducer.scorer(t.patches).squeeze(-1).argsort(dim=1, descending=True)[:, :5]
    assert torch.equal(out.x, again.x)
    assert torch.equal(out.origin_index, expected)
    assert torch.equal(out.patches, t.rows(expected))


@pytest.mark.parametrize("rest", ["drop", "zero"])
def test_training_draws_noise_that_favours_high_scores(rest):
    t, reducer = tokens(batch=1), selection(rest)
    with torch.no_grad():
        reducer.scorer.weight.mul_(0.3)
        chosen = torch.zeros(12)
        for _ in range(400):
            out = reducer.before(t, 4)
            chosen[out.origin_index[0, : 4 - (rest == "zero")]] += 1
        score = reducer.scorer(t.patches).squeeze()
    assert chosen.sum() == 400 * (4 - (rest == "zero"))
    assert (chosen > 0).all()
    assert torch.corrcoef(torch.stack([chosen, score]))[0, 1] > 0.9


@pytest.mark.parametrize("tau", [0.3, 1.0, 10.0])
def test_the_straight_through_gradient_is_that_of_the_softmax(tau):
    t, reducer, weight = tokens(), selection(tau=tau), torch.randn(2, 12)
    torch.manual_seed(5)
    out = reducer.before(t, 5)
    per_token = (t.patches * weight.unsqueeze(-1)).sum(-1)
    assert torch.equal(out.patches, t.rows(out.origin_index))
    (out.patches * weight.gather(1, out.origin_index).unsqueeze(-1)).sum().backward()
    found, reducer.scorer.weight.grad = reducer.scorer.weight.grad, None
    noisy = noisy_by_hand(reducer, t, 5)
    assert torch.equal(noisy[:, 1:].argsort(dim=1, descending=True)[:, :5], out.origin_index)
    soft = (noisy / tau).softmax(-1)[:, 1:]
    (soft.gather(1, out.origin_index) * per_token.gather(1, out.origin_index)).sum().backward()
    torch.testing.assert_close(found, reducer.scorer.weight.grad)
    assert found.abs().max() > 1e-4


def test_prefix_tokens_take_part_in_the_softmax_and_are_never_touched():
    t, reducer = tokens(prefix=3), selection()
    torch.manual_seed(1)
    out = reducer.before(t, 5)
    assert torch.equal(out.x[:, :3], t.x[:, :3])
    out.x.square().sum().backward()
    found, reducer.scorer.bias.grad = reducer.scorer.weight.grad.clone(), None
    reducer.scorer.weight.grad = None
    other = t.replace(x=torch.cat([t.x[:, :3] + 5, t.patches], 1))
    torch.manual_seed(1)
    reducer.before(other, 5).patches.square().sum().backward()
    assert not torch.allclose(found, reducer.scorer.weight.grad)


def published(model, reducer, x, k, seed=None):
    """The published model: tokens multiplied by the mask and kept, with noise in training; no laconic in it."""

    def zero(block, args):
        t = Tokens.start(args[0], 1, True)
        if seed is None:
            noisy = reducer.scorer(t.x).squeeze(-1)[:, 1:]
            soft = torch.zeros_like(noisy)
        else:
            noisy = noisy_by_hand(reducer, t, seed)
            soft, noisy = (noisy / reducer.tau).softmax(-1)[:, 1:], noisy[:, 1:]
        hard = torch.zeros_like(soft).scatter(1, noisy.topk(k, dim=1).indices, 1.0)
        mask = F.pad(hard + soft - soft.detach(), (1, 0), value=1.0)
        return args[0] * mask.unsqueeze(-1)

    hook = model.blocks[0].register_forward_pre_hook(zero)
    out = model(x)
    hook.remove()
    return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["plain", "deit3"])
def test_one_zero_token_does_what_the_published_many_do(family, training):
    """The same answer and the same gradients, of the backbone and of the scores, from 15 tokens in place of 36."""
    x = images(family)
    model = laconic.reduce_(make(family), "svite", schedule=laconic.Schedule.keep_counts({0: 15}), rest="zero")
    fill(model.laconic).train(training)
    plain, reducer = make(family), copy.deepcopy(model.laconic.reducer(0))
    torch.manual_seed(7)
    got = model(x)
    expected = published(plain, reducer, x, 14, 7 if training else None)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(model.laconic.entry(4)) == 15
    assert model.laconic.entry(4).attn_scale[0].tolist() == [1.0] * 14 + [22.0]
    for logits in (got, expected):
        logits.square().mean().backward()
    for (name, p), q in zip(
        plain.named_parameters(), [p for n, p in model.named_parameters() if "laconic" not in n], strict=True
    ):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)
    if training:
        mine, theirs = model.laconic.reducer(0).scorer.weight.grad, reducer.scorer.weight.grad
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
        assert theirs.abs().max() > 1e-3


def test_zero_tokens_of_two_stages_are_zero_again():
    """A second selection takes the zero token of the first for what it is: many."""
    t, reducer = tokens(), selection("zero").eval()
    with torch.no_grad():
        once = reducer.before(t, 6)
        twice = reducer.before(once, 4)
    assert once.attn_scale.tolist() == [[1.0] * 5 + [7.0]] * 2
    assert torch.equal(once.patches[:, 5], torch.zeros(2, 8))
    assert torch.equal(twice.attn_scale.sum(1), torch.full((2,), 12.0))
    assert torch.equal(twice.size.sum(1), torch.full((2,), 12.0))
    assert torch.equal(twice.patches[:, 3], torch.zeros(2, 8))


@pytest.mark.parametrize("rest", ["drop", "zero"])
def test_selection_learns_which_tokens_matter(rest):
    """The loss wants tokens with a large first feature: they are the ones selected in the end."""
    torch.manual_seed(0)
    reducer = TokenSelection(4, rest, 1.0)
    optimizer = torch.optim.Adam(reducer.parameters(), lr=0.05)
    count = 4 - (rest == "zero")
    for _ in range(300):
        optimizer.zero_grad()
        out = reducer.before(Tokens.start(torch.randn(16, 13, 4), 1, True), 4)
        (-out.patches[..., 0].sum(1).mean()).backward()
        optimizer.step()
    t = tokens(64, channels=4)
    with torch.no_grad():
        place = reducer.eval().before(t, 4).origin_index[:, :count]
    best = t.patches[..., 0].topk(count, dim=1).indices
    agreement = (place.unsqueeze(2) == best.unsqueeze(1)).any(2).float().mean()
    assert agreement > 0.9


@pytest.mark.parametrize("rest", ["drop", "zero"])
def test_tokens_leave_in_training_too(rest):
    model = laconic.reduce_(make("plain"), "svite", keep=0.5, rest=rest).train()
    model(images("plain")).square().mean().backward()
    assert [len(model.laconic.entry(i)) for i in range(5)] == [36, 18, 18, 18, 18]
    assert model.laconic.reducer(0).scorer.weight.grad.abs().sum() > 0


def test_the_temperature_is_set_for_all_selections():
    model = laconic.reduce_(make("plain"), "svite", keep=0.6, at=(0, 2), tau=10.0)
    assert [r.tau for r in model.laconic.reducers.children()] == [10.0, 10.0]
    set_temperature(model, 0.1)
    assert [r.tau for r in model.laconic.reducers.children()] == [0.1, 0.1]


@pytest.mark.unchecked
def test_bad_options_are_refused():
    for call in (lambda: set_temperature(make("plain"), 0.0), lambda: laconic.SViTE(tau=-1.0)):
        with pytest.raises(ValueError, match="svite: tau must be above 0, not"):
            call()
    with pytest.raises(ValueError, match="rest must be one of 'drop', 'zero', not 'hide'"):
        laconic.SViTE(rest="hide")
    with pytest.raises(ValueError, match="say how many tokens to keep"):
        laconic.reduce_(make("plain"), "svite")


def test_the_authors_names_are_known():
    model = reduced("svite", "plain")
    weights = {"gumbel.weight": torch.ones(1, 48), "gumbel.bias": torch.zeros(1), "norm.weight": torch.ones(48)}
    ours = model.laconic.config.convert_official(weights, (0,))
    assert sorted(ours) == ["laconic.reducers.0.scorer.bias", "laconic.reducers.0.scorer.weight", "norm.weight"]


# ------------------------------------------------------------------------------------------------ sparse weights
def train_step(model, optimizer, sparsity, x=None):
    x = images("plain", 2) if x is None else x
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    sparsity.step()


def in_use(sparsity):
    return {name: int(mask.sum()) for name, mask in sparsity.masks.items()}


def weights_are_masked(sparsity):
    return all(
        torch.equal(sparsity.weight(name) * ~sparsity.spread(name, mask), torch.zeros_like(sparsity.weight(name)))
        for name, mask in sparsity.masks.items()
    )


def managers(model, optimizer=None, **changes):
    shared = dict(until=40, every=4, optimizer=optimizer, **changes)
    return [UnstructuredSparsity(model, **shared), StructuredSparsity(copy.deepcopy(model), heads=0.6, neurons=0.5, **shared)]


def test_erk_by_hand():
    shapes = {"wide": (400, 100), "square": (50, 50), "small": (4, 5)}
    densities = erk(shapes, 0.3)
    assert densities["small"] == 1.0
    total = sum(math.prod(s) for s in shapes.values())
    assert sum(d * math.prod(shapes[n]) for n, d in densities.items()) == pytest.approx(0.3 * total)
    assert densities["wide"] / densities["square"] == pytest.approx((500 / 40000) / (100 / 2500))
    assert all(0 < d <= 1 for d in densities.values())
    assert set(erk(shapes, 1.0).values()) == {1.0}


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_the_density_is_what_was_asked_for(distribution):
    sparsity = UnstructuredSparsity(make("plain"), until=10, density=0.4, distribution=distribution)
    assert sparsity.density == pytest.approx(0.4, abs=1e-3)
    densities = sparsity.densities()
    assert all(name.startswith("blocks.") for name in densities)
    assert len(densities) == 4 * 4
    spread = max(densities.values()) - min(densities.values())
    assert spread < 1e-3 if distribution == "uniform" else spread > 0.1
    assert weights_are_masked(sparsity)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", [0, 1], ids=["unstructured", "structured"])
def test_as_many_are_in_use_after_a_change_and_the_rest_stays_zero(kind, optimizer):
    model = make("plain")
    sparsity = managers(model)[kind]
    model = model if kind == 0 else sparsity.model
    make_optimizer = {"sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, 1e-3)}
    sparsity.optimizer = make_optimizer[optimizer](model.parameters())
    start, before = in_use(sparsity), {n: m.clone() for n, m in sparsity.masks.items()}
    changed = []
    for step in range(1, 13):
        train_step(model, sparsity.optimizer, sparsity)
        assert in_use(sparsity) == start
        assert weights_are_masked(sparsity)
        now = {n: m.clone() for n, m in sparsity.masks.items()}
        if any(not torch.equal(now[n], before[n]) for n in now):
            changed.append(step)
        before = now
    assert set(changed) <= {4, 8, 12}
    assert changed[0] == 4


@pytest.mark.parametrize("kind", [0, 1], ids=["unstructured", "structured"])
def test_what_grows_starts_at_zero_with_a_fresh_memory_and_then_lives(kind):
    model = make("plain")
    sparsity = managers(model)[kind]
    model = model if kind == 0 else sparsity.model
    sparsity.optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        train_step(model, sparsity.optimizer, sparsity)
    before = {n: m.clone() for n, m in sparsity.masks.items()}
    train_step(model, sparsity.optimizer, sparsity)
    total = 0
    for name, mask in sparsity.masks.items():
        grown = sparsity.spread(name, mask & ~before[name]).expand_as(sparsity.weight(name))
        total += int(grown.sum())
        memory = sparsity.optimizer.state[sparsity.weight(name)]
        assert (sparsity.weight(name)[grown] == 0).all()
        assert (memory["exp_avg"][grown] == 0).all()
        assert (memory["exp_avg_sq"][grown] == 0).all()
    assert total > 0
    masks = {n: m & ~before[n] for n, m in sparsity.masks.items()}
    train_step(model, sparsity.optimizer, sparsity)
    alive = [
        (sparsity.weight(n)[sparsity.spread(n, m).expand_as(sparsity.weight(n))] != 0).float().mean()
        for n, m in masks.items()
        if m.any()
    ]
    assert min(alive) > 0.99


def test_the_smallest_weights_go_and_the_largest_gradients_come():
    layer = nn.Linear(4, 2, bias=False)
    sparsity = UnstructuredSparsity(
        nn.ModuleDict({"a": layer}), until=1000, every=1, density=0.5, distribution="uniform", death=0.5
    )
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    sparsity.masks["a"].copy_(mask)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.1, 2.0, 0.2], [9.0, 9.0, 9.0, 9.0]]))
    layer.weight.grad = torch.tensor([[7.0, 0.1, 7.0, 5.0], [0.1, -6.0, 0.3, 0.2]])
    sparsity.step()
    # two of four go: -0.1 and 0.2; two come: the -6 below, and the 5 of what had just gone, as zero
    assert sparsity.masks["a"].tolist() == [[True, False, True, True], [False, True, False, False]]
    assert layer.weight.tolist() == [[0.5, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_the_share_falls_by_a_cosine_and_changes_end():
    sparsity = UnstructuredSparsity(make("plain"), until=100, every=10, death=0.5)
    shares = []
    for step in (0, 25, 50, 75, 100, 150):
        sparsity.steps = step
        shares.append(sparsity.share())
    assert shares == pytest.approx(
        [0.5, 0.5 * (1 + math.cos(math.pi / 4)) / 2, 0.25, 0.5 * (1 - math.cos(math.pi / 4)) / 2, 0, 0]
    )
    sparsity.steps, before = 100, {n: m.clone() for n, m in sparsity.masks.items()}
    for _ in range(20):  # no gradients are asked for any more
        sparsity.step()
    assert all(torch.equal(m, before[n]) for n, m in sparsity.masks.items())


def test_gradient_criterion_is_the_loss_that_a_head_is_worth():
    """The sum over a head of weight times gradient is the slope of the loss in a factor on that head."""
    model = make("plain")
    sparsity = StructuredSparsity(model, until=100, heads=1.0, neurons=1.0)
    x, factor = images("plain"), torch.ones(4, 3, requires_grad=True)

    def scale(i):
        return lambda m, args: (args[0] * factor[i].repeat_interleave(16),)

    hooks = [b.attn.proj.register_forward_pre_hook(scale(i)) for i, b in enumerate(model.blocks)]
    model(x).square().mean().backward()
    sparsity.step()
    sparsity.step()  # the same gradients once more: they add up
    for hook in hooks:
        hook.remove()
    for i in range(4):
        torch.testing.assert_close(sparsity.sums[f"blocks.{i}.attn.proj"], 2 * factor.grad[i].abs(), rtol=1e-3, atol=1e-6)
        expected = sparsity.sums[f"blocks.{i}.attn.proj"].clone()
        assert torch.equal(sparsity.merit(f"blocks.{i}.attn.proj"), expected)
        assert sparsity.merit(f"blocks.{i}.attn.proj").sum() == 0  # it starts again


def test_the_worst_head_goes_by_either_criterion():
    for criterion in ("gradient", "l1"):
        model = make("plain")
        sparsity = StructuredSparsity(model, until=100, every=1, heads=0.7, neurons=1.0, death=0.6, criterion=criterion)
        attention = model.blocks[0].attn
        kept = sparsity.masks["blocks.0.attn.proj"].nonzero().flatten().tolist()
        weak = slice(kept[0] * 16, (kept[0] + 1) * 16)
        with torch.no_grad():
            attention.proj.weight[:, weak] *= 1e-4
        model(images("plain")).square().mean().backward()
        attention.proj.weight.grad[:, weak] *= 0  # nor does it promise to come back
        sparsity.step()
        assert not sparsity.masks["blocks.0.attn.proj"][kept[0]]
        assert sparsity.masks["blocks.0.attn.proj"].sum() == 2


@pytest.mark.parametrize("kind", [0, 1], ids=["unstructured", "structured"])
def test_training_goes_on_from_a_state_as_if_it_had_never_stopped(kind):
    def start():
        model = make("plain")
        sparsity = managers(model, death=0.4)[kind]
        model = model if kind == 0 else sparsity.model
        return model, sparsity, torch.optim.SGD(model.parameters(), 0.05)

    model, sparsity, optimizer = start()
    for _ in range(6):
        train_step(model, optimizer, sparsity)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(sparsity.state_dict())
    for _ in range(6):
        train_step(model, optimizer, sparsity)
    again, other, optimizer = start()
    again.load_state_dict(weights)
    other.load_state_dict(state)
    for _ in range(6):
        train_step(again, optimizer, other)
    assert other.steps == 12
    assert all(torch.equal(m, other.masks[n]) for n, m in sparsity.masks.items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"masks are of another model; they differ in blocks\.0\.(attn\.proj|attn\.qkv)"):
        managers(make("plain", embed_dim=96))[kind].load_state_dict({**state, "masks": {}})


# ------------------------------------------------------------------------------------------------ removal
@pytest.mark.parametrize("family", ["plain", "deit3", "dinov2-reg", "siglip", "qk-norm", "respost"])
def test_the_model_without_its_masked_parts_computes_the_same(family):
    model, x = make(family), images(family)
    sparsity = StructuredSparsity(model, until=100, every=1, heads=0.7, neurons=0.6)
    model(x).square().mean().backward()
    sparsity.step()
    expected, before = run(model, x), laconic.summary(model)
    assert sparsity.remove_() is model
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)
    after = laconic.summary(model, count=True)
    assert after.parameters < before.parameters
    assert after.macs < before.macs
    assert after.macs == after.counted_macs
    assert [b.attn.num_heads for b in model.blocks] == [2] * 4
    sparsity.step()  # nothing is left to do
    laconic.reduce_(model, "topk", keep=0.5, at=(1, 2), **({"score": "mean-query"} if family == "siglip" else {}))
    assert run(model, x).isfinite().all()


def test_a_part_of_the_heads_of_each_block_may_stay():
    """Blocks may come to have other numbers of heads, if the masks say so."""
    model, x = make("plain"), images("plain")
    sparsity = StructuredSparsity(model, until=10)
    sparsity.masks["blocks.2.attn.proj"][:] = torch.tensor([False, False, True])
    sparsity.apply()
    expected = run(model, x)
    sparsity.remove_()
    assert [b.attn.num_heads for b in model.blocks] == [2, 2, 1, 2]
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)


def test_s2vite_tiny():
    """Published: 4.2 million parameters, 0.9 G."""
    model = timm.create_model("deit_tiny_patch16_224")
    laconic.StructuredSparsity(model, until=10, heads=0.7, neurons=0.74).remove_()
    cost = laconic.summary(model)
    assert [b.attn.num_heads for b in model.blocks] == [2] * 12
    assert f"{cost.parameters / 1e6:.1f} {cost.macs / 1e9:.2f}" == "4.2 0.90"


def test_sparse_weights_and_fewer_tokens_go_together():
    model = laconic.reduce_(make("plain"), "svite", keep=0.5).train()
    for sparsity in (UnstructuredSparsity(model, until=9, every=1), StructuredSparsity(model, until=9, every=1)):
        assert not any(name.startswith("laconic") for name in sparsity.masks)
        train_step(model, torch.optim.SGD(model.parameters(), 0.01), sparsity)
        assert weights_are_masked(sparsity)
    with pytest.raises(ValueError, match="tokens are reduced; call laconic.restore_, then remove_"):
        sparsity.remove_()


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(density=0.0), r"density must be in \(0, 1\], not 0.0"),
        (dict(until=0), "until must be a whole number of steps, at least 1; got 0"),
        (dict(every=1.5), "every must be a whole number of steps, at least 1; got 1.5"),
        (dict(death=2), "death must be a share between 0 and 1, not 2"),
        (dict(distribution="even"), "distribution must be one of 'erk', 'uniform', not 'even'"),
        (dict(start="zero"), "start must be one of 'random', 'magnitude', not 'zero'"),
        (dict(skip=["blocks", "head"]), r"there is no Linear layer outside \['blocks', 'head'\]"),
    ],
    ids=str,
)
def test_bad_settings_of_single_weights(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnstructuredSparsity(make("plain"), **{"until": 10, **arguments})


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("plain", dict(heads=0), r"heads and neurons must be shares in \(0, 1\], not 0"),
        ("plain", dict(neurons=1.5), r"shares in \(0, 1\], not 1.5"),
        ("plain", dict(criterion="l2"), "criterion must be one of 'gradient', 'l1', not 'l2'"),
        ("parallel", {}, r"block 0 \(timm.*ParallelScalingBlock\) has no linear layer attn.proj and no mlp.fc2"),
    ],
    ids=str,
)
def test_bad_settings_of_heads_and_neurons(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        StructuredSparsity(make(family), **{"until": 10, **arguments})


def test_no_gradient_to_grow_by():
    sparsity = UnstructuredSparsity(make("plain"), until=10, every=1)
    with pytest.raises(RuntimeError, match=r"call step\(\) after optimizer.step\(\) and before zero_grad\(\)"):
        sparsity.step()


def test_what_cannot_be_cut_is_refused_and_left_whole():
    model, x = make("eva02"), images("eva02")
    sparsity = StructuredSparsity(model, until=10)
    expected = run(model, x)
    with pytest.raises(ValueError, match=r"heads and neurons of block 0 \(timm.*EvaBlock\) cannot be removed: "):
        sparsity.remove_()
    assert torch.equal(run(model, x), expected)


def test_the_weights_of_largest_magnitude_may_be_the_first():
    model = make("plain")
    weight = model.blocks[0].mlp.fc1.weight.detach().clone()
    sparsity = UnstructuredSparsity(model, until=10, density=0.3, start="magnitude")
    mask = sparsity.masks["blocks.0.mlp.fc1"]
    assert weight.abs()[mask].min() >= weight.abs()[~mask].max()
    other = UnstructuredSparsity(make("plain"), until=10, density=0.3)
    same = UnstructuredSparsity(make("plain"), until=10, density=0.3)
    assert torch.equal(other.masks["blocks.0.mlp.fc1"], same.masks["blocks.0.mlp.fc1"])
    assert not torch.equal(other.masks["blocks.0.mlp.fc1"], mask)
