"""What the options of the methods mean, each by a property or a few lines of plain Python."""

import math

import pytest
import torch
from torch import nn

import laconic
from families import AT, images, make, observe, reduced
from laconic.core.attention import AttentionTap, AttentionView
from laconic.core.attention_bias import bias_of
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext
from laconic.core.tokens import Tokens
from laconic.methods.evit import pack
from laconic.methods.ops import Predictor, cosine, density_peaks, greedy_pairs, group_normalize, one_to_one, topk_split
from laconic.methods.pool import AvgPoolReducer
from laconic.methods.squeeze import NOTED

SITE = BlockContext(ordinal=0, block=3, dim=8, heads=2, keep=0.7)


def tokens(batch=2, patches=20, channels=8, **more):
    return Tokens.start(torch.randn(batch, 1 + patches, channels), 1, True, **more)


def scores(t):
    return torch.rand(len(t.x), len(t)).softmax(1)


def forward(model, x):
    with torch.no_grad():
        return model(x)


# ------------------------------------------------------------------------------------------------ TPS
def test_squeeze_by_hand():
    t = tokens()
    s = scores(t)
    squeezed = laconic.ETPS().squeeze(t, None, s, 12)
    for b in range(2):
        order = s[b].sort(descending=True, stable=True).indices.tolist()
        kept, rest = order[:12], order[12:]
        weight, total = {j: [(math.e, j)] for j in kept}, dict.fromkeys(kept, math.e)
        for i in rest:
            c = [torch.cosine_similarity(t.patches[b, i], t.patches[b, j], dim=0).item() for j in kept]
            j = kept[max(range(12), key=c.__getitem__)]
            weight[j].append((math.exp(max(c)), i))
            total[j] += math.exp(max(c))
        for new, j in enumerate(kept):
            expected = sum(w / total[j] * t.patches[b, i] for w, i in weight[j])
            torch.testing.assert_close(squeezed.patches[b, new], expected, rtol=1e-5, atol=1e-5)
            if len(weight[j]) == 1:
                torch.testing.assert_close(squeezed.patches[b, new], t.patches[b, j], rtol=0, atol=1e-6)


def test_equal_tokens_are_a_fixed_point_of_squeezing():
    t = tokens()
    t = t.replace(x=t.x[:, :1].expand_as(t.x).clone())
    for options in ({}, {"fusing": "average"}, {"matching": "one-to-one"}, {"temperature": 0.3}):
        squeezed = laconic.ETPS(**options).squeeze(t, None, scores(t), 7)
        torch.testing.assert_close(squeezed.x, t.x[:, :8])


def test_average_fusing():
    t = tokens()
    s = scores(t)
    squeezed = laconic.ETPS(fusing="average").squeeze(t, None, s, 12)
    for b in range(2):
        for new in range(12):
            members = t.patches[b][squeezed.token_of_patch[b] == new]
            torch.testing.assert_close(squeezed.patches[b, new], members.mean(0), rtol=1e-5, atol=1e-5)


def test_one_to_one_matching_gives_a_host_one_guest_at_most():
    t = tokens()
    s = scores(t)
    many, one = (laconic.ETPS(matching=m).squeeze(t, None, s, 8) for m in ("many-to-one", "one-to-one"))
    assert many.size.max() > 2
    assert one.size.max() == 2
    # the guest that stays is the most similar of those that chose the host
    for b in range(2):
        for new in range(8):
            guests = [i for i in range(20) if many.token_of_patch[b, i] == new and many.origin_index[b, new] != i]
            if guests:
                c = cosine(t.patches[b : b + 1], t.patches[b : b + 1])[0][many.origin_index[b, new]]
                assert one.token_of_patch[b, max(guests, key=lambda i: c[i])] == new
    assert one_to_one(torch.tensor([[0.5, 0.5, 0.1]]), torch.tensor([[2, 2, 2]]), 3).tolist() == [[2, -1, -1]]


def test_features_position_and_content():
    t, s = tokens(), None
    t = t.replace(positions=torch.randn(20, 8))
    s = scores(t)
    kept, rest = topk_split(s, 12)
    for features, x in (("position", t.positions.expand(2, -1, -1)), ("content", t.patches - t.positions), ("full", t.patches)):
        host = cosine(x, x)[torch.arange(2)[:, None, None], rest[:, :, None], kept[:, None, :]].argmax(2)
        squeezed = laconic.ETPS(features=features).squeeze(t, None, s, 12)
        assert torch.equal(squeezed.token_of_patch.gather(1, rest), host)
    with pytest.raises(LookupError, match="absolute position embedding"):
        laconic.reduce_(make("rope-mixed", use_abs_pos_emb=False), "etps", keep=0.5, at=AT, features="position")


@pytest.mark.parametrize("features", ["full", "content", "position"])
@pytest.mark.parametrize("method", ["etps", "dtps"])
def test_positions_follow_the_tokens(method, features):
    """A later stage compares the positions of the tokens that are left, not of the first so many patches."""
    x, model = images("plain"), make("plain")
    laconic.reduce_(model, method, keep=0.6, at=AT, features=features)
    moments = []
    observe(model, lambda before, after: moments.append((before, after)))
    forward(model, x)
    before, after = moments[1]
    view = model.laconic.config.view(before, arange_like(before.size))
    table = model.pos_embed[0, 1:]
    expected = {
        "full": before.patches,
        "position": table[before.origin_index],
        "content": before.patches - table[before.origin_index],
    }
    assert torch.equal(view, expected[features])
    assert before.origin is not None


@pytest.mark.parametrize("method", ["etps", "dtps"])
def test_previous_attention(method):
    """The host is the kept token that the pruned one attends to most: in this block (eTPS) or the one before (dTPS)."""
    model, x = make("plain"), images("plain")
    laconic.reduce_(model, method, keep=0.5, at=[2], similarity="previous-attention")
    block = model.blocks[2 if method == "etps" else 1]
    attention = []

    def look(module, args):
        qkv = module.qkv(args[0]).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        attention.append((qkv[0] @ qkv[1].transpose(2, 3) * 16**-0.5).softmax(-1).mean(1)[:, 1:, 1:])

    block.attn.register_forward_pre_hook(look)
    forward(model, x)
    stage = laconic.provenance(model).final
    for b in range(len(x)):
        kept = stage.kept[b].tolist()
        for i in set(range(36)) - set(kept):
            best = max(kept, key=lambda j: attention[0][b, i, j].item())
            assert kept[stage.where[b, i]] == best
    assert not model.laconic.entry(3).per_token
    with pytest.raises(LookupError, match="block before"):
        laconic.reduce_(make("plain"), "dtps", keep=0.5, at=[0], similarity="previous-attention")


@pytest.mark.parametrize("options", [{"matching": "one-to-one"}, {"fusing": "average"}, {"similarity": "previous-attention"}])
def test_soft_squeeze_agrees_with_hard_for_every_option(options):
    t = tokens()
    s = scores(t)
    config = laconic.DTPS(**options)
    if "similarity" in options:
        t = t.replace(per_token={NOTED: torch.rand(2, 20, 20)})
    hard = config.squeeze(t, None, s, 9)
    keep = torch.zeros_like(s).scatter(1, topk_split(s, 9)[0], 1.0)
    soft = config.soft_squeeze(t, keep, 1 - keep)
    rows = soft.patches.gather(1, topk_split(s, 9)[0].unsqueeze(2).expand(-1, -1, 8))
    torch.testing.assert_close(rows, hard.patches, rtol=1e-5, atol=1e-5)
    # the same patches are with the same tokens
    left = topk_split(s, 9)[0]
    assert torch.equal(soft.size.gather(1, left), hard.size)


def test_random_policy():
    x, maps = images("plain"), []
    for seed in (0, 0, 1):
        model = laconic.reduce_(make("plain"), "etps", keep=0.5, at=AT, policy="random", seed=seed)
        forward(model, x)
        maps.append(laconic.provenance(model).stages[0].kept)
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0].sort(1).values, maps[2].sort(1).values)


def test_predictor_has_the_papers_parameters():
    for dim, expected in ((192, 60_722), (384, 241_250), (768, 961_730)):
        assert sum(p.numel() for p in Predictor(dim).parameters()) == expected
    norm = next(m for m in Predictor(192).modules() if isinstance(m, nn.LayerNorm))
    assert norm.eps == 1e-5


def test_gradients_reach_the_predictor_through_the_decisions():
    """Detaching who leaves from the squeeze would change the predictor's gradients."""
    t = tokens()
    gone = (torch.rand(2, 20) < 0.5).float().requires_grad_()
    laconic.DTPS().soft_squeeze(t, (1 - gone).detach(), gone).x.square().sum().backward()
    assert gone.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ EViT, BAT
def test_pack_by_hand():
    t = tokens()
    s = scores(t)
    packed = pack(t, s, 8)
    kept, rest = topk_split(s, 7)
    for b in range(2):
        torch.testing.assert_close(packed.patches[b, :7], t.patches[b, kept[b]])
        torch.testing.assert_close(packed.patches[b, 7], (s[b, rest[b], None] * t.patches[b, rest[b]]).sum(0))


def test_the_four_steps_of_table_3():
    x = images("plain")
    base = {m: forward(laconic.reduce_(make("plain"), m, keep=0.3, at=AT), x) for m in ("topk", "evit")}
    steps = {
        s: forward(laconic.reduce_(make("plain"), "bat", keep=0.3, at=AT, steps=s), x)
        for s in ("preserve", "pack", "cluster", "match", "diversity")
    }
    torch.testing.assert_close(steps["preserve"], base["topk"])
    torch.testing.assert_close(steps["pack"], base["evit"])
    answers = list(steps.values())
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
    one = laconic.reduce_(make("plain"), "evit+bat", keep=0.3, at=AT, clusters=1, pairs=0)
    torch.testing.assert_close(forward(one, x), base["evit"])


def test_bat_merges_by_hand():
    t = tokens(patches=30)
    s = scores(t)
    for weights in ("normalised", "literal", "literal-clusters"):
        bat = laconic.BAT(clusters=3, pairs=4, weights=weights)
        left = bat.merge(t, s, 20 - 4 + 3, SITE)
        kept, rest = topk_split(s, 20)
        first, second = greedy_pairs(torch.stack([t.patches[b, kept[b]] for b in range(2)]), 4)
        for b in range(2):
            for m in range(19):
                members = (left.token_of_patch[b] == m).nonzero()[:, 0]
                literal = weights == "literal" or (weights == "literal-clusters" and m >= 16)
                w = s[b, members]
                w = torch.ones(1) if len(members) == 1 else w if literal else w / w.sum()
                torch.testing.assert_close(left.patches[b, m], (w[:, None] * t.patches[b, members]).sum(0))
                assert left.origin_index[b, m] in members
            pairs = {frozenset((left.token_of_patch[b] == m).nonzero()[:, 0].tolist()) for m in range(16)}
            assert {p for p in pairs if len(p) == 2} == {
                frozenset((kept[b, i].item(), kept[b, j].item())) for i, j in zip(first[b], second[b], strict=True)
            }
            # a fused pair stands where the more attentive of the two stood, and attentive tokens stay in order
            assert s[b, left.origin_index[b, :16]].tolist() == sorted(s[b, left.origin_index[b, :16]].tolist(), reverse=True)
            clustered = torch.isin(torch.arange(30), rest[b])
            assert torch.equal(left.token_of_patch[b] >= 16, clustered)


def test_bipartite_matching_takes_as_many():
    t = tokens(patches=30)
    s = scores(t)
    left = laconic.BAT(clusters=3, pairs=4, matching="bipartite").merge(t, s, 19, SITE)
    assert left.size.shape == (2, 19)
    assert left.size[:, :16].sum(1).tolist() == [20.0, 20.0]


def test_greedy_pairs_are_the_best_disjoint_ones():
    x = torch.randn(1, 9, 5)
    c = cosine(x, x)[0]
    edges = sorted(((c[i, j].item(), i, j) for i in range(9) for j in range(i + 1, 9)), reverse=True)
    used, expected = set(), []
    for _, i, j in edges:
        if i not in used and j not in used:
            expected.append((i, j))
            used |= {i, j}
    first, second = greedy_pairs(x, 4)
    assert list(zip(first[0].tolist(), second[0].tolist(), strict=True)) == expected[:4]


def test_density_peaks_finds_separate_groups():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    x = (centres.repeat_interleave(7, 0) + 0.1 * torch.randn(21, 2)).unsqueeze(0)
    for assign in ("denser", "nearest"):
        cluster, found = density_peaks(x, 3, "knn", assign)
        groups = cluster.view(3, 7)
        assert (groups == groups[:, :1]).all()
        assert cluster[0, found[0]].tolist() == [0, 1, 2]


def test_densities_do_not_underflow():
    x = torch.randn(1, 40, 384) * 10
    for density in ("knn", "paper"):
        cluster, centres = density_peaks(x, 5, density)
        assert len(set(centres[0].tolist())) == 5
        assert cluster.max() == 4
    same = torch.ones(1, 6, 4)
    cluster, centres = density_peaks(same, 2)  # all ties: the first are the centres, nothing breaks
    assert len(set(centres[0].tolist())) == 2


def test_share_sums_to_one():
    dst = torch.tensor([[0, 0, 1, 2, -1]])
    w = group_normalize(torch.tensor([[0.2, 0.6, 0.5, 0.0, 9.0]]), dst, 4)
    torch.testing.assert_close(w[0, :4], torch.tensor([0.25, 0.75, 1.0, 1.0]))


def test_learned_merge_teaches_the_predictor():
    model = reduced("dynamicvit+bat", "plain").train()
    model(images("plain")).square().mean().backward()
    for reducer in model.laconic.reducers.values():
        assert all(p.grad.abs().sum() > 0 for p in reducer.predictor.parameters())
    values = [forward(m, images("plain")) for m in (model, model.eval())]
    torch.testing.assert_close(*values)  # straight through: training changes gradients, not values


# ------------------------------------------------------------------------------------------------ ToMe, pooling
def test_tome_keeps_constant_tokens_and_mass():
    model = laconic.reduce_(make("plain"), "tome", r=8)
    forward(model, images("plain"))
    assert laconic.provenance(model).final.size.sum(1).tolist() == [36.0] * 3
    assert [len(model.laconic.entry(i)) for i in range(5)] == [36, 28, 20, 12, 6]
    without = laconic.reduce_(make("plain"), "tome", r=8, proportional=False)
    assert not torch.allclose(forward(without, images("plain")), forward(model, images("plain")))


def test_proportional_attention_equals_repeated_tokens():
    """log(size) on a key is the same as that many copies of the token."""
    t = tokens(patches=3)
    t = t.replace(attn_scale=torch.tensor([[1.0, 3, 2]] * 2))
    q, k = t.x.unsqueeze(1), t.x.unsqueeze(1)
    calls = []
    with AttentionTap(calls, bias_of(t)):
        ours = nn.functional.scaled_dot_product_attention(q, k, k)
    copies = k[:, :, [0, 1, 2, 2, 2, 3, 3]]
    torch.testing.assert_close(ours, nn.functional.scaled_dot_product_attention(q, copies, copies))
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["gap", "siglip", "qk-norm", "dinov3", "pe"])
def test_pooling_counts_patches_not_tokens(family):
    """Pooling the merged tokens by size is pooling all patches with the features of their tokens."""
    model, x = reduced("etps" if family not in ("gap", "siglip") else "tome", family), images(family)
    with torch.no_grad():
        features = model.forward_features(x)
        ours = model.pool(features)
        dense = laconic.restore_dense(model, features)
        full = torch.cat([features[:, : model.laconic.prefix], dense], 1)
        laconic.restore_(model)
        torch.testing.assert_close(ours, model.pool(full), rtol=1e-4, atol=1e-4)


def test_average_pooling_is_even():
    t = tokens(patches=10)
    pooled = AvgPoolReducer().between(t, AttentionView(*[t.x.unsqueeze(1)] * 3, None, 1.0, 1, True), 4)
    assert pooled.size.sum(1).tolist() == [10.0, 10.0]
    assert pooled.size.max() - pooled.size.min() <= 1
    assert (pooled.token_of_patch[:, 1:] >= pooled.token_of_patch[:, :-1]).all()
    torch.testing.assert_close(pooled.patches[0, 0], t.patches[0][pooled.token_of_patch[0] == 0].mean(0))


# ------------------------------------------------------------------------------------------------ diversity
def test_diversity_score():
    z = torch.randn(2, 15, 6)
    score = laconic.diversity_score(z, relative=False)
    median = z.median(1, keepdim=True).values
    torch.testing.assert_close(score, (z - median).abs().sum((1, 2)))
    for norm in ("l1", "fro"):  # no other z does better
        best = laconic.diversity_score(z, norm, relative=False)
        centre = median if norm == "l1" else z.mean(1, keepdim=True)
        for _ in range(20):
            other = z - centre - 0.1 * torch.randn(2, 1, 6)
            size = other.abs().sum((1, 2)) if norm == "l1" else other.square().sum((1, 2)).sqrt()
            assert (size >= best - 1e-5).all()
    for norm in ("l1", "l1_induced", "linf_induced", "composite", "fro"):
        assert torch.allclose(laconic.diversity_score(z[:, :1].expand(-1, 15, -1), norm), torch.zeros(2), atol=1e-6)
        assert (laconic.diversity_score(3 * z, norm) - laconic.diversity_score(z, norm)).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ ledger
def test_restore_dense():
    model, x = reduced("bat", "distilled"), images("distilled")
    with torch.no_grad():
        features = model.forward_features(x)
    dense = laconic.restore_dense(model, features)
    stage = laconic.provenance(model).final
    for p in (0, 17, 35):
        assert torch.equal(dense[1, p], features[1, 2 + stage.where[1, p]])
    grid = laconic.restore_dense(model, features[:, 2:], layout="NCHW")
    assert torch.equal(grid.flatten(2).transpose(1, 2), dense)
    with pytest.raises(ValueError, match="are not a known output"):
        laconic.restore_dense(model, features[:, 1:])


def test_provenance_before_any_forward():
    model = reduced("bat", "plain")
    with pytest.raises(RuntimeError, match="not run forward"):
        laconic.provenance(model)


def test_iota():
    assert arange_like(torch.zeros(2, 3, 4)).tolist() == [[0, 1, 2]] * 2
