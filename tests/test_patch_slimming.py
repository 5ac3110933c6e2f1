"""Patch Slimming and its calibration: the recursion, the nested masks, the tolerance, and what travels with a model."""

import itertools
import math

import pytest
import torch

import laconic
from families import images, make
from laconic import Schedule
from laconic.core.attention import AttentionTap
from laconic.core.tokens import Tokens
from laconic.methods.patch_slimming.method import StaticPrune, evenly_spread
from laconic.methods.patch_slimming.patch_importance import back, energy

DEPTH = 4


def slim(family="plain", schedule=None, **options):
    options = options or ({"schedule": schedule} if schedule else {"keep": 0.6, "at": (1, 2, 3)})
    return laconic.reduce_(make(family), "patch-slimming", **options)


def run(model, x):
    with torch.no_grad():
        return model(x)


def kept(model):
    """Block -> positions, most important first."""
    return {b: r.kept.tolist() for b in range(DEPTH) if (r := model.laconic.reducer(b)) is not None}


def seen_by_hand(model, x):
    """Attention [B, H, N, N] and input of every block of an unreduced model, without laconic's own recorder."""
    inputs, matrices = [], []
    hooks = [block.register_forward_pre_hook(lambda m, a: inputs.append(a[0])) for block in model.blocks]
    calls = []
    with AttentionTap(calls):
        run(model, x)
    for hook in hooks:
        hook.remove()
    for call in calls:
        q, k = call["query"], call["key"]
        matrices.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1))
    return matrices, inputs


def brute_force(matrices, inputs, masks, layer):
    """The score by its definition, a sum over all tuples of heads; [N] for one image. P [H, N, N], Z [N, C], m [N]."""
    heads, n = matrices[0].shape[:2]
    above = range(len(matrices) - 1, layer, -1)
    score = torch.zeros(n, dtype=matrices[0].dtype)
    for tuple_ in itertools.product(range(heads), repeat=len(above)):
        a = torch.eye(n, dtype=score.dtype)
        for layer_above, head in zip(above, tuple_, strict=True):
            a = a @ torch.diag(masks[layer_above]) @ matrices[layer_above][head]
        for head in range(heads):
            u = matrices[layer][head] @ inputs[layer].abs()
            for i in range(n):
                score[i] += torch.outer(a[:, i], u[i]).square().sum()
    return score


# ------------------------------------------------------------------------------------------------ scores
def test_the_recursion_is_the_sum_over_all_tuples_of_heads():
    layers, heads, n, channels = 4, 2, 5, 3
    matrices = [torch.randn(heads, n, n, dtype=torch.float64).softmax(-1) for _ in range(layers)]
    inputs = [torch.randn(n, channels, dtype=torch.float64) for _ in range(layers)]
    masks = [torch.tensor(m, dtype=torch.float64) for m in ([1, 1, 1, 1, 0], [1, 1, 0, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0])]
    g = torch.eye(n, dtype=torch.float64).unsqueeze(0)
    for layer in range(layers - 1, -1, -1):
        # the mean over heads that stands in for a sum, undone
        energies = (matrices[layer] @ inputs[layer].abs()).square().sum((0, 2))
        score = g[0].diagonal() * heads ** (layers - 1 - layer) * energies
        torch.testing.assert_close(score, brute_force(matrices, inputs, masks, layer), rtol=1e-12, atol=1e-14)
        g = back(g, matrices[layer].unsqueeze(0), masks[layer])


def test_energy_is_the_squared_length_of_the_mixed_magnitudes():
    weights, x = torch.rand(2, 3, 5, 5), torch.randn(2, 5, 4)
    for b in range(2):
        for i in range(5):
            expected = sum((weights[b, h, i] @ x[b].abs()).square().sum() for h in range(3))
            torch.testing.assert_close(energy(weights, x)[b, i], expected)


@pytest.mark.parametrize("family", ["plain", "distilled", "dinov3"])
def test_positions_are_those_of_the_definition(family):
    """Calibrated on a small model with a schedule at every block, against the sum over tuples."""
    x, schedule = images(family)[:2], Schedule.keep_counts({0: 30, 1: 20, 2: 12, 3: 5})
    matrices, inputs = seen_by_hand(make(family), x)
    model = laconic.calibrate(slim(family, schedule), x)
    prefix, found, n = model.num_prefix_tokens, kept(model), 36 + model.num_prefix_tokens
    masks, order = [torch.ones(n)] * DEPTH, []
    for layer in (3, 2, 1, 0):
        scores = [brute_force([m[b] for m in matrices], [z[b] for z in inputs], masks, layer) for b in range(2)]
        ranking = (scores[0] + scores[1])[prefix:].argsort(descending=True).tolist()
        order = [*order, *(i for i in ranking if i not in order)][: schedule.values[layer]]
        assert found[layer] == order
        mask = torch.zeros(n)
        if family != "dinov3" or layer < DEPTH - 1:
            mask[:prefix] = 1
        if (
            family == "dinov3" or layer < DEPTH - 1
        ):  # of the last layer this one averages the patches; the others read the class
            mask[prefix + torch.tensor(order)] = 1
        masks = [*masks[:layer], mask, *masks[layer + 1 :]]


@pytest.mark.parametrize("family", ["plain", "gap"])
def test_blocks_without_a_reducer_prune_nothing(family):
    x = images(family)
    matrices, inputs = seen_by_hand(make(family), x)
    model = laconic.calibrate(slim(family, Schedule.keep_counts({1: 9})), x)
    prefix = model.num_prefix_tokens
    last = torch.ones(36 + prefix)
    if family == "plain":  # which reads the class token
        last[prefix:] = 0
    total = 0
    for b in range(3):
        p = [m[b] for m in matrices]
        a = torch.stack([torch.diag(last) @ p[3][i] @ p[2][j] for i in range(3) for j in range(3)])
        u = torch.stack([p[1][h] @ inputs[1][b].abs() for h in range(3)])
        total = total + a.square().sum((0, 1)) * u.square().sum((0, 2))
    assert kept(model)[1] == total[prefix:].argsort(descending=True)[:9].tolist()


def permute_heads(model):
    """The same function: heads in another order."""
    for block in model.blocks:
        attention, order = block.attn, [2, 0, 1]
        d = attention.head_dim
        rows = torch.cat([torch.arange(h * d, (h + 1) * d) for h in order])
        qkv = torch.cat([rows + part * 3 * d for part in range(3)])
        with torch.no_grad():
            attention.qkv.weight.copy_(attention.qkv.weight[qkv])
            attention.qkv.bias.copy_(attention.qkv.bias[qkv])
            attention.proj.weight.copy_(attention.proj.weight[:, rows])
    return model


def test_the_order_of_heads_does_not_matter():
    x = images("plain")
    expected = run(make("plain"), x)
    torch.testing.assert_close(run(permute_heads(make("plain")), x), expected, rtol=1e-4, atol=1e-4)
    other = laconic.reduce_(permute_heads(make("plain")), "patch-slimming", keep=0.6, at=(1, 2, 3))
    assert kept(laconic.calibrate(other, x)) == kept(laconic.calibrate(slim(), x))


def test_images_count_alike_however_they_are_batched():
    x = images("plain", 5)
    whole = kept(laconic.calibrate(slim(), x))
    assert kept(laconic.calibrate(slim(), [x[:1], x[1:4], x[4:]])) == whole
    assert kept(laconic.calibrate(slim(), ((batch, "label") for batch in (x[:2], x[2:])))) == whole
    assert kept(laconic.calibrate(slim(), x[:1])) != whole


# ------------------------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("calibrated", [False, True])
def test_masks_are_nested(calibrated):
    model = slim(keep=0.8, at=(0, 1, 2, 3))
    if calibrated:
        laconic.calibrate(model, images("plain"))
    found = [kept(model)[b] for b in range(DEPTH)]
    assert [len(k) for k in found] == [len(set(k)) for k in found] == list(model.laconic.counts(36))
    for below, above in itertools.pairwise(found):
        assert below[: len(above)] == above
    run(model, images("plain"))
    for block in range(DEPTH):
        entry = model.laconic.entry(block + 1)
        assert all(set(row.tolist()) == set(found[block]) for row in entry.origin_index)


def test_the_placeholder_is_spread_evenly():
    order = evenly_spread(196)
    assert sorted(order.tolist()) == list(range(196))
    for n in (20, 49, 98, 140):
        rows = torch.bincount(order[:n] // 14, minlength=14)
        columns = torch.bincount(order[:n] % 14, minlength=14)
        gaps = order[:n].sort().values.diff()
        for counts in (rows, columns):
            assert counts.max() - counts.min() <= 4
        assert gaps.max() <= 3 * 196 / n


def test_positions_are_looked_up_where_tokens_have_come_from():
    t = Tokens.start(torch.randn(2, 10, 4), 1, True).keep(torch.tensor([[8, 1, 5, 3, 0, 2], [2, 3, 5, 7, 8, 1]]))
    reducer = StaticPrune(laconic.BlockContext(0, 1, 4, 2, None, before=9, after=3, grid=(3, 3)))
    reducer.hold(torch.tensor([3, 8, 5]))
    seen = laconic.AttentionView(*torch.zeros(3, 2, 2, 7, 2), None, 1.0, 1, True)
    out = reducer.between(t, seen, 3)
    assert out.origin_index.tolist() == [[3, 8, 5], [3, 8, 5]]
    assert torch.equal(out.x[:, 1:], torch.stack([t.x[0, [4, 1, 3]], t.x[1, [2, 5, 3]]]))
    # fewer than it was built for: the most important; more: others too, all different
    assert reducer.between(t, seen, 2).origin_index.tolist() == [[3, 8], [3, 8]]
    five = reducer.between(t, seen, 5).origin_index
    assert all({3, 8, 5} < set(row.tolist()) and len(set(row.tolist())) == 5 for row in five)


def test_pruned_patches_are_those_that_matter_little():
    """Calibrated positions change the answer less than their complement does: the scores are not upside down."""
    x, schedule = images("plain", 8), Schedule.keep_counts({1: 18})
    expected = run(make("plain"), x)
    model = laconic.calibrate(slim(schedule=schedule), x)
    good = (run(model, x) - expected).norm()
    reducer = model.laconic.reducer(1)
    reducer.hold(torch.tensor([i for i in range(36) if i not in set(reducer.kept.tolist())]))
    assert good < 0.8 * (run(model, x) - expected).norm()


# ------------------------------------------------------------------------------------------------ tolerance
def test_an_infinite_tolerance_leaves_what_the_schedule_must():
    model = laconic.calibrate(slim(), images("plain"), tolerance=math.inf)
    assert model.laconic.counts(36) == (1, 1, 1, 1)
    assert model.laconic.schedule == Schedule.keep_counts({0: 1})
    assert run(model, images("plain")).isfinite().all()


def test_no_tolerance_at_all_prunes_nothing_that_is_read():
    x = images("plain")
    model = laconic.calibrate(slim(), x, tolerance=0.0)
    assert model.laconic.counts(36) == (36, 36, 36, 1)
    torch.testing.assert_close(run(model, x), run(make("plain"), x))


@pytest.mark.parametrize("family", ["plain", "distilled", "dinov2-reg", "dinov3", "eva02", "deit3"])
def test_the_tolerance_is_kept_by_each_layer_and_by_no_fewer_patches(family):
    x, tolerance, step = images(family), 0.05, 5
    model = slim(family)
    if model.laconic.pooling[0] != "token":
        with pytest.raises(ValueError, match="reads all its tokens"):
            laconic.calibrate(model, x, tolerance=tolerance)
        return
    laconic.calibrate(model, x, tolerance=tolerance, step=step)
    counts, found = model.laconic.counts(36), kept(model)
    assert counts[-1] == 1
    plain, prefix = make(family), model.num_prefix_tokens
    outputs, keywords = [], []

    def note(module, args, kwargs, output):
        outputs.append(output)
        keywords.append(kwargs)

    for block in plain.blocks:
        block.register_forward_hook(note, with_kwargs=True)
    run(plain, x)

    def error(block, positions):
        """Block + 1 on these tokens alone, really removed; the relative squared error of what is kept of it."""
        index = torch.cat([torch.arange(prefix), prefix + torch.tensor(sorted(positions))])
        above = [] if block + 1 == DEPTH - 1 else found_at(block + 1)
        rows = [i for i, t in enumerate(index.tolist()) if t < prefix or t - prefix in above]
        kwargs = dict(keywords[block + 1])
        if kwargs.get("rope") is not None:
            kwargs["rope"] = kwargs["rope"][..., sorted(positions), :]
        with torch.no_grad():
            got = type(plain.blocks[block + 1]).forward(plain.blocks[block + 1], outputs[block][:, index], **kwargs)[:, rows]
        true = outputs[block + 1][:, index][:, rows]
        return ((got - true).square().sum() / true.square().sum()).item()

    def found_at(block):
        return next((found[b] for b in range(block, -1, -1) if b in found), list(range(36)))

    for block in range(DEPTH - 1):
        positions = found_at(block)
        if len(positions) < 36:
            assert error(block, positions) <= tolerance * 1.001
        fewer = max(len(found_at(block + 1)) if block + 1 < DEPTH else 1, len(positions) - step)
        if fewer < len(positions) and len(positions) < 36:
            assert error(block, positions[:fewer]) > error(block, positions)
    assert any(1 < n < 36 for n in counts)


def test_a_larger_tolerance_prunes_more():
    totals = [
        sum(laconic.calibrate(slim(), images("plain"), tolerance=t).laconic.counts(36)) for t in (0.0, 0.02, 0.1, 0.5, math.inf)
    ]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) >= 4


# ------------------------------------------------------------------------------------------------ fine-tuning
def off(model, x):
    """Squared distance of the answer from the unreduced model's."""
    return (run(model, x) - run(make("plain"), x)).square().sum().item()


def altered(model):
    """Blocks that have other weights than at first."""
    pairs = zip(model.blocks, make("plain").blocks, strict=True)
    return [
        i
        for i, (a, b) in enumerate(pairs)
        if any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    ]


def test_fine_tuning_restores_what_the_next_block_puts_out():
    """One block prunes: what its successor puts out at the patches it keeps is nearer to the unreduced model's, and so the answer."""
    x, schedule, errors = images("plain", 6), Schedule.keep_counts({1: 9}), []
    expected = []
    for tuning in (0, 30):
        outputs = []
        plain = make("plain")
        plain.blocks[2].register_forward_hook(lambda m, a, out, outputs=outputs: outputs.append(out))
        run(plain, x)
        model = laconic.calibrate(slim(schedule=schedule), x, tuning=tuning, lr=1e-3)
        positions = kept(model)[1]
        expected.append(positions)
        laconic.restore_(model)
        # block 2 on the tokens that are left, really removed
        index = torch.tensor([0, *(1 + p for p in positions)])
        made = []
        model.blocks[1].register_forward_hook(lambda m, a, out, made=made: made.append(out))
        run(model, x)
        with torch.no_grad():
            got = model.blocks[2](made[0][:, index])
        true = outputs[0][:, index]
        errors.append(((got - true).square().sum() / true.square().sum()).item())
        assert altered(model) == ([1] if tuning else [])
    assert expected[0] == expected[1]  # positions are found before anything is trained
    assert errors[1] < 0.5 * errors[0]


def test_fine_tuned_answers_are_nearer_to_those_of_the_unreduced_model():
    x, schedule = images("plain", 6), Schedule.keep_counts({0: 24, 1: 16, 2: 9})
    plain, tuned = (laconic.calibrate(slim(schedule=schedule), x, tuning=tuning, lr=1e-3) for tuning in (0, 30))
    assert altered(tuned) == [0, 1, 2]
    assert off(tuned, x) < 0.7 * off(plain, x)


def test_with_fine_tuning_the_same_tolerance_is_kept_by_fewer_patches():
    x = images("plain", 4)
    plain, tuned = (laconic.calibrate(slim(), x, tolerance=0.1, step=3, tuning=tuning, lr=1e-3) for tuning in (0, 10))
    assert sum(tuned.laconic.counts(36)) < sum(plain.laconic.counts(36))
    assert altered(plain) == []
    assert all(p.grad is None and p.requires_grad for p in tuned.parameters())


def test_a_block_that_loses_nothing_is_as_it_was():
    model = laconic.calibrate(slim(), images("plain"), tolerance=0.0, step=12, tuning=2, lr=1e-3)
    assert model.laconic.counts(36) == (36, 36, 36, 1)
    assert altered(model) == []


def test_a_block_below_sees_the_fine_tuned_one():
    """Scores of the blocks below go through the attention that the fine-tuned block has now."""
    x, schedule = images("plain", 4), Schedule.keep_counts({1: 30, 2: 6})
    model = laconic.calibrate(slim(schedule=schedule), x, tuning=40, lr=3e-2)
    tuned = make("plain")
    tuned.blocks[2].load_state_dict(model.blocks[2].state_dict())
    matrices, inputs = seen_by_hand(tuned, x)
    matrices[3] = seen_by_hand(make("plain"), x)[0][3]  # what is above has been looked at already
    masks = [torch.ones(37) for _ in range(4)]
    masks[2][1:], masks[3][1:] = 0, 0
    masks[2][1 + torch.tensor(kept(model)[2])] = 1
    scores = torch.zeros(37)
    g = [torch.eye(37)] * 4
    for layer in (3, 2):
        g = [
            back(one.unsqueeze(0), m[layer].unsqueeze(0), masks[layer])[0]
            for one, m in zip(g, matrices_by_image(matrices), strict=True)
        ]
    for one, m, b in zip(g, matrices_by_image(matrices), range(4), strict=True):
        scores += one.diagonal() * (m[1] @ inputs[1][b].abs()).square().sum((0, 2))
    order = kept(model)[2]
    best = [i for i in scores[1:].argsort(descending=True).tolist() if i not in order]
    assert kept(model)[1] == [*order, *best[: 30 - len(order)]]
    assert kept(model) != kept(laconic.calibrate(slim(schedule=schedule), x))


def matrices_by_image(matrices):
    return [[m[b] for m in matrices] for b in range(len(matrices[0]))]


def test_a_frozen_block_cannot_be_fine_tuned():
    model = slim()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="block 2 cannot be fine-tuned: none of its parameters requires gradients"):
        laconic.calibrate(model, images("plain"), tuning=1)


# ------------------------------------------------------------------------------------------------ what travels
@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_positions_are_saved_and_loaded(tolerance, tmp_path):
    model, x = laconic.calibrate(slim(), images("plain"), tolerance=tolerance), images("plain")
    assert not any(p.requires_grad for p in model.laconic.parameters())
    laconic.save(model, tmp_path)
    again = laconic.load(tmp_path)
    assert kept(again) == kept(model)
    assert all(bool(r.calibrated) for r in again.laconic.reducers.children())
    assert torch.equal(run(again, x), run(model, x))
    names = {n for n in model.state_dict() if n.startswith("laconic.")}
    assert names == {f"laconic.reducers.{b}.{n}" for b in kept(model) for n in ("kept", "calibrated")}


def test_a_reducer_says_whether_it_is_calibrated():
    model = slim()
    assert "keep 22 of 36 patches, calibrated=False" in repr(model)
    assert "calibrated=False" not in repr(laconic.calibrate(model, images("plain")))
    assert model.laconic.reducer(1).kept.dtype == torch.int64
    model.to(torch.bfloat16)
    assert model.laconic.reducer(1).kept.dtype == torch.int64


def test_calibration_leaves_the_model_otherwise_alone():
    model = slim().train()
    model.blocks[1].eval()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    assert laconic.calibrate(model, images("plain")) is model
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    expected = run(make("plain"), images("plain"))
    assert torch.equal(run(laconic.restore_(model.eval()), images("plain")), expected)


def test_it_is_found_inside_another_module_and_can_be_done_again():
    inner = slim()
    outer = torch.nn.Sequential(torch.nn.Identity(), inner)
    x = images("plain")
    assert laconic.calibrate(outer, x) is outer
    first = kept(inner)
    assert first == kept(laconic.calibrate(slim(), x))
    laconic.calibrate(outer, x, tolerance=0.05)
    tight = inner.laconic.counts(36)
    laconic.calibrate(outer, x)  # for the counts it has now
    assert inner.laconic.counts(36) == tight


def test_what_is_kept_in_half_precision():
    model = laconic.calibrate(slim().to(torch.bfloat16), images("plain"))
    assert run(model, images("plain").bfloat16()).isfinite().all()
    both = [set(kept(m)[1]) for m in (model, laconic.calibrate(slim(), images("plain")))]
    assert len(both[0] & both[1]) >= 18


def test_a_warmed_in_model_is_calibrated_for_what_it_was_built_for():
    model = slim()
    model.laconic.set_schedule(Schedule.rates(0.9, (1, 2, 3)))
    laconic.calibrate(model, images("plain"))
    assert [len(k) for k in kept(model).values()] == [22, 14, 9]
    run(model, images("plain"))
    assert laconic.provenance(model).stages[0].size.shape[1] == 33


# ------------------------------------------------------------------------------------------------ refusals
def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="only patch-slimming can be calibrated; this model is reduced by topk"):
        laconic.calibrate(laconic.reduce_(make("plain"), "topk", keep=0.5), images("plain"))
    with pytest.raises(ValueError, match="is not reduced"):
        laconic.calibrate(make("plain"), images("plain"))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(images=[]), "there are no images to calibrate with"),
        (dict(images=torch.zeros(0, 3, 96, 96)), "images must be batches"),
        (dict(images=["cat.png"]), r"images must be batches \[B, channels, height, width\], got str"),
        (dict(tolerance=-0.1), "tolerance must be None or a relative squared error of at least 0, not -0.1"),
        (dict(tolerance=math.nan), "not nan"),
        (dict(tuning=-1), "tuning must be a number of steps, 0 or more, and lr positive; got tuning=-1"),
        (dict(tuning=1, lr=0.0), "lr positive; got tuning=1, lr=0.0"),
        (dict(step=0), "step must be a whole number of patches, at least 1; got 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_and_the_model_is_as_it_was(arguments, message):
    model = slim()
    before = run(model, images("plain"))
    with pytest.raises(ValueError, match=message):
        laconic.calibrate(model, **{"images": images("plain"), **arguments})
    assert torch.equal(run(model, images("plain")), before)


def test_images_of_another_size_are_refused():
    model = laconic.reduce_(make("plain", dynamic_img_size=True), "patch-slimming", keep=0.5, at=(1,))
    larger = torch.randn(1, 3, 128, 96)
    with pytest.raises(ValueError, match=r"built for 6 x 6 = 36 patches and got 48: .* resize the images"):
        run(model, larger)
    with pytest.raises(ValueError, match="got images of 48 patches, and this model was reduced for 36"):
        laconic.calibrate(model, larger)
    run(model, images("plain"))


@pytest.mark.parametrize("positions", [[1, 2], [1, 1, 2], [0, 1, 36], [-1, 2, 3]])
def test_positions_that_cannot_be_are_refused(positions):
    reducer = StaticPrune(laconic.BlockContext(0, 1, 4, 2, None, before=36, after=3, grid=(6, 6)))
    with pytest.raises(ValueError, match="built to keep 3 of 36 positions here, each once"):
        reducer.hold(torch.tensor(positions))
