"""The baselines of Haurum et al. (ICCV Workshops 2023), ATC and TokenLearner: their authors' answers, and what they mean."""

import json
import math
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import golden_init
import laconic
from families import AT, fill, images, make, observe, reduced
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext
from laconic.core.tokens import Tokens
from laconic.methods.kmedoids import RECEIVED
from laconic.methods.ops import (
    agglomerate,
    by_stage,
    cosine,
    distances,
    group_normalize,
    medoids_of,
    precise,
    ring,
    spread,
    squared_distances,
    transport,
)
from test_goldens import HERE, LOGITS, close, golden, picture

BLOCKS = (3, 6, 9)
LEFT = (137, 96, 67)
MIXING = ("patchmerger", "sinkhorn", "sit", "tokenlearner")


def published_name(name):
    """Our name of a parameter -> the one in the benchmark's checkpoints."""
    if not name.startswith("laconic.reducers."):
        return name
    _, _, block, rest = name.split(".", 3)
    return f"cluster_layers.{BLOCKS.index(int(block))}.{rest}"


def deit(method, **options):
    model = laconic.reduce_(timm.create_model("deit_tiny_patch16_224").eval(), method, **{"keep": 0.7, **options})
    state = model.state_dict()
    made = {k: torch.from_numpy(golden_init.crc32_v1(published_name(k), tuple(v.shape))) for k, v in state.items()}
    model.load_state_dict(made)
    return model


def answer(model, x):
    """The logits, and the tokens before and after each reduction."""
    moments = []

    def look(before, after):
        if len(after) < len(before):
            moments.append((before, after))

    observe(model, look)
    with torch.no_grad():
        return model(x), moments


def test_names_and_shapes_of_the_parameters_are_the_published_ones():
    for method, name in (("dpc-knn", "dpcknn"), ("patchmerger",) * 2, ("sinkhorn",) * 2, ("kmedoids",) * 2):
        expected = json.loads((HERE / f"tr_{name}.json").read_text())["state_dict"]
        ours = {published_name(k): list(v.shape) for k, v in deit(method).state_dict().items()}
        assert ours == expected
        assert set(by_stage(dict.fromkeys(expected, torch.zeros(1)), BLOCKS)) == set(deit(method).state_dict())


@pytest.mark.parametrize(("name", "method"), [("tr_dpcknn", "dpc-knn"), ("tr_kmedoids", "kmedoids")])
def test_hard_clusters(name, method):
    z = golden(name)
    logits, moments = answer(deit(method), picture())
    close(logits, z["logits"], LOGITS)
    for block, left, (before, after) in zip(BLOCKS, LEFT, moments, strict=True):
        centres, cluster = (torch.from_numpy(z[f"{part}_block{block}"]) for part in ("Kept_Tokens", "Assignment_Maps"))
        assert len(after) == left
        assert torch.equal(after.origin_index, before.origin_index.gather(1, centres))
        assert torch.equal(after.token_of_patch, cluster.gather(1, before.token_of_patch))


@pytest.mark.parametrize(("name", "method"), [("tr_patchmerger", "patchmerger"), ("tr_sinkhorn", "sinkhorn")])
def test_soft_mixers(name, method):
    z, model, matrices = golden(name), deit(method), []
    for reducer in model.laconic.reducers.values():
        reducer.matrix = lambda x, tokens, own=reducer.matrix: matrices.append(own(x, tokens)) or matrices[-1]
    logits, moments = answer(model, picture())
    close(logits, z["logits"], LOGITS)
    assert [len(after) for _, after in moments] == list(LEFT)
    for block, (matrix, _) in zip(BLOCKS, matrices, strict=True):
        close(matrix[:, :8], z[f"Soft_block{block}"], 1e-6)


def test_atc():
    z = golden("atc_average_prop")
    logits, moments = answer(deit("atc"), picture())
    close(logits, z["logits"], LOGITS)
    # labels are arbitrary there, and follow the order of the tokens: compare who is together with whom
    theirs = arange_like(moments[0][0].token_of_patch)
    for block, (_, after) in zip(BLOCKS, moments, strict=True):
        theirs = torch.from_numpy(z[f"cluster_of_token_block{block}"])[:, 1:].sub(1).gather(1, theirs)
        assert torch.equal(
            theirs.unsqueeze(1) == theirs.unsqueeze(2), after.token_of_patch.unsqueeze(1) == after.token_of_patch.unsqueeze(2)
        )


@pytest.mark.parametrize(
    ("keep", "left"), [(0.7, (137, 96, 67)), (0.5, (98, 49, 24)), (0.9, (176, 158, 142)), (0.25, (49, 12, 3))]
)
@pytest.mark.parametrize("method", ["dpc-knn", "kmedoids", "atc", "patchmerger", "sinkhorn", "sit", "heuristic"])
def test_counts_are_those_of_the_benchmark(method, keep, left):
    config = laconic.methods()[method].config()
    assert [config.counts(config.default_schedule(12, keep, None), 12, 196)[block] for block in BLOCKS] == list(left)


def tokens(batch=2, patches=20, channels=8, **more):
    return Tokens.start(torch.randn(batch, 1 + patches, channels), 1, True, **more)


def site(after, before=20, dim=8, grid=(4, 5)):
    return BlockContext(0, 3, dim, 2, None, before=before, after=after, grid=grid)


def stir(module, scale=0.7):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * scale)
    return module


def check_mass(t):
    held = (t.token_of_patch.unsqueeze(1) == arange_like(t.size).unsqueeze(2)).sum(2)
    assert torch.equal(held.float(), t.size)
    assert torch.equal(t.token_of_patch.gather(1, t.origin_index), arange_like(t.size))


# ------------------------------------------------------------------------------------------------ DPC-KNN
def density_peaks_by_hand(x, count, k):
    """The published rule, token by token, in float64: centres in order, cluster of each token."""
    x = x.double()
    d = (x.unsqueeze(0) - x.unsqueeze(1)).norm(dim=2) / math.sqrt(x.shape[1])
    density = [math.exp(-sum(v**2 for v in sorted(row)[:k]) / k) for row in d.tolist()]
    delta = []
    for i, own in enumerate(density):
        denser = [d[i, j].item() for j, other in enumerate(density) if other > own]
        delta.append(min(denser) if denser else d.max().item())
    score = [a * b for a, b in zip(density, delta, strict=True)]
    centres = sorted(range(len(x)), key=lambda i: -score[i])[:count]
    cluster = [min(range(count), key=lambda c: d[i, centres[c]].item()) for i in range(len(x))]
    for c, i in enumerate(centres):
        cluster[i] = c
    return centres, cluster


@pytest.mark.parametrize("weights", ["learned", "equal"])
@pytest.mark.parametrize("k", [3, 5, 20])  # with 2, mutual neighbours are equally dense
def test_dpc_knn_by_hand(weights, k):
    t, config = tokens(), laconic.DPCKNN(weights=weights, neighbours=k)
    reducer = stir(config.build(site(7)))
    with torch.no_grad():
        out = reducer.before(t, 7)
    check_mass(out)
    for b in range(2):
        centres, cluster = density_peaks_by_hand(t.patches[b], 7, k)
        assert out.origin_index[b].tolist() == centres
        assert out.token_of_patch[b].tolist() == cluster
        score = [0.0] * 20 if weights == "equal" else reducer.score(t.patches[b])[:, 0].tolist()
        for new in range(7):
            members = [i for i in range(20) if cluster[i] == new]
            total = sum(math.exp(score[i]) for i in members)
            expected = sum(math.exp(score[i]) / total * t.patches[b, i] for i in members)
            torch.testing.assert_close(out.patches[b, new], expected, rtol=1e-4, atol=1e-5)


def test_untrained_dpc_knn_weighs_equally():
    t = tokens()
    learned, equal = (laconic.DPCKNN(weights=w).build(site(7)) for w in ("learned", "equal"))
    assert torch.equal(learned.before(t, 7).x, equal.before(t, 7).x)
    assert sum(p.numel() for p in learned.parameters()) == 9
    assert not list(equal.parameters())


def test_scores_of_any_size_neither_overflow_nor_vanish():
    t, reducer = tokens(), laconic.DPCKNN().build(site(7))
    for bias in (-1e4, 1e4):
        reducer.score.bias.data.fill_(bias)
        reducer.zero_grad()
        out = reducer.before(t, 7)
        torch.testing.assert_close(out.x, laconic.DPCKNN(weights="equal").build(site(7)).before(t, 7).x)
        out.x.square().sum().backward()
        assert reducer.score.weight.grad.isfinite().all()
        assert reducer.score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["dpc-knn", "kmedoids", "atc"])
def test_equal_tokens_stay_what_they_are(method):
    """However they are parted, every token leaves as it came, and all patches are accounted for."""
    model, x = make("plain"), images("plain")
    laconic.reduce_(model, method, keep=0.6, at=AT)
    model.blocks[0].register_forward_pre_hook(
        lambda _, args: (torch.cat([args[0][:, :1], args[0][:, 1:2].expand(-1, 36, -1)], 1),)
    )
    _, moments = answer(model, x)
    for before, after in moments:
        assert len(after) < len(before)
        check_mass(after)
        torch.testing.assert_close(after.patches, before.patches[:, : len(after)], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ K-medoids
def kmedoids_by_hand(x, weight, medoids, iterations, cost):
    x, count = x.double(), len(medoids)
    d = (x.unsqueeze(0) - x.unsqueeze(1)).norm(dim=2)
    medoids = list(medoids)

    def assign():
        return [min(range(count), key=lambda c: d[i, medoids[c]].item()) for i in range(len(x))]

    for _ in range(iterations):
        cluster = assign()
        for c in range(count):
            members = [i for i in range(len(x)) if cluster[i] == c]
            if cost == "published":
                price = {i: weight[i] * d[i].sum().item() for i in members}
            else:
                price = {i: sum(weight[j] * d[i, j].item() for j in members) for i in members}
            medoids[c] = min(members, key=price.__getitem__)
    return medoids, assign()


@pytest.mark.parametrize("cost", ["published", "members"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("weights", ["attention", "equal"])
def test_kmedoids_by_hand(cost, iterations, weights):
    t, weight = tokens(), torch.rand(2, 20)
    reducer = laconic.KMedoids(iterations=iterations, cost=cost, weights=weights).build(site(6))
    if weights == "attention":
        out = reducer.before(t.replace(per_token={RECEIVED: weight, "other": weight}), 6)
        assert list(out.per_token) == ["other"]
        starts = [weight[b].argsort(descending=True)[:6].tolist() for b in range(2)]
    else:
        out = reducer.before(t, 6)
        weight, starts = torch.ones_like(weight), spread(torch.cdist(t.patches, t.patches), 6).tolist()
    check_mass(out)
    assert torch.equal(out.x, torch.cat([t.x[:, :1], t.rows(out.origin_index)], 1))  # nothing is averaged
    for b in range(2):
        medoids, cluster = kmedoids_by_hand(t.patches[b], weight[b].tolist(), starts[b], iterations, cost)
        assert out.origin_index[b].tolist() == medoids
        assert out.token_of_patch[b].tolist() == cluster


def test_the_two_costs_of_kmedoids_differ_as_said():
    """Of a cluster as tight as a point the published cost takes the least attended, the other the most attended."""
    x = torch.tensor([[0.0], [0.1], [10.0], [10.1]])
    distance, weight = torch.cdist(x, x).unsqueeze(0), torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    start = torch.tensor([[0, 2]])
    assert medoids_of(distance, weight, start, 1, "published").tolist() == [[1, 3]]
    assert medoids_of(distance, weight, start, 1, "members").tolist() == [[0, 2]]


def test_medoids_are_spread_out():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.1], [9.0]])
    assert spread(torch.cdist(x, x).unsqueeze(0), 4).tolist() == [[2, 4, 0, 3]]
    assert spread(torch.zeros(1, 4, 4), 4).sort(1).values.tolist() == [[0, 1, 2, 3]]


def test_weights_of_kmedoids_are_the_attention_received_in_the_block_before():
    model, x, attention = make("plain"), images("plain"), []
    laconic.reduce_(model, "kmedoids", keep=0.5, at=[2], iterations=0)

    def look(module, args):
        qkv = module.qkv(args[0]).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        attention.append((qkv[0] @ qkv[1].transpose(2, 3) * 16**-0.5).softmax(-1).sum((1, 2))[:, 1:])

    model.blocks[1].attn.register_forward_pre_hook(look)
    answer(model, x)
    assert torch.equal(laconic.provenance(model).final.kept, attention[0].argsort(1, descending=True)[:, :18])
    assert not model.laconic.entry(3).per_token


def test_kmedoids_needs_a_block_before():
    model = make("plain")
    with pytest.raises(LookupError, match="none before the first"):
        laconic.reduce_(model, "kmedoids", keep=0.5, at=[0])
    laconic.reduce_(model, "kmedoids", keep=0.5, at=[0], weights="equal")
    assert laconic.summary(model).tokens == (18, 18, 18, 18)


# ------------------------------------------------------------------------------------------------ ATC
def agglomerate_by_hand(d, count, linkage):
    clusters = [[i] for i in range(len(d))]
    between = {"average": lambda v: sum(v) / len(v), "complete": max, "single": min}[linkage]
    while len(clusters) > count:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))]
        i, j = min(pairs, key=lambda p: between([d[a][b] for a in clusters[p[0]] for b in clusters[p[1]]]))
        clusters[i] += clusters.pop(j)
    out = [0] * len(d)
    for c, members in enumerate(sorted(clusters, key=min)):
        for i in members:
            out[i] = c
    return out


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("count", [1, 2, 7, 13, 14])
def test_agglomeration_by_hand(linkage, count):
    x = torch.randn(3, 14, 5)
    d = 1 - cosine(x, x)
    cluster = agglomerate(d, count, linkage)
    assert cluster.tolist() == [agglomerate_by_hand(one.tolist(), count, linkage) for one in d]


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("count", [137, 49, 3])
def test_agglomeration_against_scipy(linkage, count):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    x = torch.randn(2, 196, 64)
    d = (1 - cosine(x, x)).double()
    for ours, one in zip(agglomerate(d, count, linkage), d.numpy(), strict=True):
        tree = hierarchy.linkage(one[np.triu_indices(196, 1)], linkage)
        theirs = torch.from_numpy(hierarchy.cut_tree(tree, count)[:, 0])
        assert len(theirs.unique()) == count
        assert torch.equal(ours.unsqueeze(0) == ours.unsqueeze(1), theirs.unsqueeze(0) == theirs.unsqueeze(1))


def test_the_three_linkages_differ():
    """A chain with growing gaps and a far pair: single follows the chain, complete cuts it."""
    x = torch.tensor([0.0, 1.0, 2.1, 3.3, 4.6, 8.0, 9.8])
    d = (x.unsqueeze(0) - x.unsqueeze(1)).abs().unsqueeze(0)
    parts = {linkage: agglomerate(d, 3, linkage)[0].tolist() for linkage in ("average", "complete", "single")}
    assert parts["single"] == [0, 0, 0, 0, 0, 1, 2]
    assert parts["complete"] == [0, 0, 1, 1, 1, 2, 2]
    assert len({tuple(p) for p in parts.values()}) >= 2


def test_ties_go_to_the_first():
    assert agglomerate(torch.ones(2, 5, 5), 3).tolist() == [[0, 0, 0, 1, 2]] * 2


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("proportional", [True, False])
def test_atc_counts_sizes_in_the_mean_and_in_attention_or_in_neither(linkage, proportional):
    model, x, keys = make("plain"), images("plain"), []
    laconic.reduce_(model, "atc", keep=0.6, at=AT, linkage=linkage, proportional=proportional)
    for reducer in model.laconic.reducers.values():
        own = reducer.between
        reducer.between = lambda t, seen, n, own=own: keys.append(seen.keys) or own(t, seen, n)
    _, moments = answer(model, x)
    assert len(moments) == 3
    for (before, after), k in zip(moments, keys, strict=True):
        check_mass(after)
        # of the last block's tokens: which became which (a token holds at least one patch)
        became = torch.full_like(before.origin_index, -1).scatter(1, before.token_of_patch, after.token_of_patch)
        for b, one in enumerate(F.normalize(k, dim=-1)):
            assert became[b].tolist() == agglomerate_by_hand((1 - one @ one.T).tolist(), len(after), linkage)
        weight = group_normalize(before.size if proportional else torch.ones_like(before.size), became, len(after))
        expected = torch.zeros_like(after.patches).scatter_add(
            1, became.unsqueeze(2).expand_as(before.patches), before.patches * weight.unsqueeze(2)
        )
        torch.testing.assert_close(after.patches, expected, rtol=1e-4, atol=1e-5)
        assert (after.attn_scale is after.size) if proportional else (after.attn_scale is None)


# ------------------------------------------------------------------------------------------------ soft mixers
def test_patchmerger_by_hand():
    t, reducer = tokens(), stir(laconic.PatchMerger().build(site(6)))
    x = F.layer_norm(t.patches, (8,), reducer.norm.weight, reducer.norm.bias, 1e-5)
    matrix = (reducer.queries @ x.transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(reducer.before(t, 6).patches, matrix @ x)


def test_sit_by_hand():
    t, reducer = tokens(), stir(laconic.SiT().build(site(6)))
    norm, first, _, second = reducer.weight
    assert tuple(first.weight.shape) == (4, 8)
    x = F.layer_norm(t.patches, (8,), norm.weight, norm.bias, 1e-5)
    hidden = F.gelu(x @ first.weight.T + first.bias)
    logits = (hidden @ second.weight.T + second.bias) * reducer.scale
    matrix = logits.transpose(1, 2).softmax(2)
    assert matrix.std(2).mean() > 0.01  # far from a plain mean
    torch.testing.assert_close(reducer.before(t, 6).patches, matrix @ t.patches)


@pytest.mark.parametrize(("eps", "iterations"), [(1.0, 3), (0.5, 1), (0.2, 20)])
def test_sinkhorn_by_hand(eps, iterations):
    """Plain scalings towards the published marginals, 1 / (m + N) for every centre and token."""
    t, reducer = tokens(), stir(laconic.Sinkhorn(eps=eps, iterations=iterations).build(site(6)))
    x = t.patches / t.patches.norm(dim=-1, keepdim=True)
    centres = reducer.v / reducer.v.norm(dim=-1, keepdim=True)
    kernel = (centres @ x.transpose(1, 2) / eps).exp().double()
    u, v, mass = kernel.new_ones(2, 6, 1), kernel.new_ones(2, 1, 20), 1 / 26
    for _ in range(iterations):
        u = mass / (kernel * v).sum(2, keepdim=True)
        v = mass / (kernel * u).sum(1, keepdim=True)
    plan = (kernel * u * v * 26).float()
    torch.testing.assert_close(reducer.before(t, 6).patches, plan @ x, rtol=1e-4, atol=1e-5)


def test_transport_gives_every_token_away_whole():
    plan = transport(torch.randn(2, 6, 20) * 50, 1.0, 3)
    torch.testing.assert_close(plan.sum(1), torch.ones(2, 20))
    # equal scores: all centres get the same of every token
    torch.testing.assert_close(transport(torch.zeros(1, 4, 8), 1.0, 2), torch.full((1, 4, 8), 0.25))


def test_sinkhorn_leaves_its_centres_alone_and_only_looks_at_their_directions():
    t, reducer = tokens(), stir(laconic.Sinkhorn().build(site(6)))
    v, first = reducer.v.detach().clone(), reducer.before(t, 6).x
    assert torch.equal(reducer.v, v)
    reducer.v.data *= torch.rand(6, 1) + 0.5
    torch.testing.assert_close(reducer.before(t, 6).x, first)
    torch.testing.assert_close(reducer.before(t.replace(x=t.x * 3), 6).patches, first[:, 1:])  # the lengths are lost


def test_tokenlearner_by_hand():
    t, reducer = tokens(), stir(laconic.TokenLearner().build(site(6)))
    assert sum(p.numel() for p in reducer.parameters()) == 2 * 8 + 64 * 8 + 64 + 64 * 6 + 6
    x = F.layer_norm(t.patches, (8,), reducer.norm.weight, reducer.norm.bias, 1e-6)
    first, _, second = reducer.maps
    hidden = x @ first.weight.T + first.bias
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    maps = (hidden @ second.weight.T + second.bias).softmax(1)
    torch.testing.assert_close(reducer.before(t, 6).patches, maps.transpose(1, 2) @ t.patches)


@pytest.mark.parametrize("method", ["SiT", "TokenLearner"])
def test_equal_logits_give_the_mean_token(method):
    t, reducer = tokens(), stir(getattr(laconic, method)().build(site(6)))
    last = (reducer.weight if method == "SiT" else reducer.maps)[-1]
    nn.init.zeros_(last.weight)
    out = reducer.before(t, 6)
    torch.testing.assert_close(out.patches, t.patches.mean(1, keepdim=True).expand(-1, 6, -1))
    torch.testing.assert_close(out.size, torch.full((2, 6), 20 / 6))


def test_tokenlearner_1_by_hand():
    """Four convolutions over the grid, rows first, without bias; sigmoid; a plain sum."""
    t, reducer = tokens(grid=(4, 5)), stir(laconic.TokenLearner(version="1").build(site(3)))
    convolutions = [layer for layer in reducer.maps if isinstance(layer, nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convolutions] == [(3, 8, 3, 3)] + [(3, 3, 3, 3)] * 3
    assert len(list(reducer.parameters())) == 6  # the LayerNorm's two, and no bias
    x = F.layer_norm(t.patches, (8,), reducer.norm.weight, reducer.norm.bias, 1e-6)
    image = x.reshape(2, 4, 5, 8).permute(0, 3, 1, 2)
    for i, c in enumerate(convolutions):
        image = F.conv2d(image if i == 0 else F.gelu(image, approximate="tanh"), c.weight, padding=1)
    expected = torch.einsum("bsl,blc->bsc", image.flatten(2).sigmoid(), t.patches)
    torch.testing.assert_close(reducer.before(t, 3).patches, expected)


def test_tokenlearner_1_needs_the_whole_grid():
    with pytest.raises(ValueError, match="an earlier block has reduced"):
        laconic.reduce_(make("plain"), "tokenlearner", keep=0.6, at=(1, 2), version="1")
    model = laconic.reduce_(make("plain"), "tokenlearner", keep=0.25, at=[2], version="1")
    assert laconic.summary(model).tokens == (36, 36, 9, 9)
    reducer = laconic.TokenLearner(version="1").build(site(3))
    for grid in ((4, 5), None):  # another number of tokens; a grid that is not known
        with pytest.raises(ValueError, match="on their grid, and got 16 tokens;"):
            reducer.before(tokens(patches=16, grid=grid), 3)


def test_tokenlearner_1_goes_by_the_grid_of_the_image():
    reducer = stir(laconic.TokenLearner(version="1").build(site(3)))
    wide = tokens(grid=(4, 5))
    turned = torch.arange(20).view(4, 5).T.flatten()
    tall = wide.replace(x=torch.cat([wide.x[:, :1], wide.patches[:, turned]], 1), grid=(5, 4))
    for layer in reducer.maps:
        if isinstance(layer, nn.Conv2d):  # rows and columns alike
            layer.weight.data = layer.weight.data + layer.weight.data.transpose(2, 3)
    torch.testing.assert_close(reducer.before(tall, 3).patches, reducer.before(wide, 3).patches)
    assert not torch.allclose(reducer.before(tall.replace(grid=(4, 5)), 3).patches, reducer.before(wide, 3).patches)


def test_tokenlearner_leaves_16_tokens_three_quarters_into_the_depth():
    model = laconic.reduce_(timm.create_model("deit_tiny_patch16_224"), "tokenlearner")
    assert laconic.summary(model).tokens == (196,) * 9 + (16,) * 3
    assert laconic.TokenLearner().default_schedule(24, None, None) == laconic.Schedule.keep_counts({18: 16})
    assert laconic.TokenLearner().default_schedule(12, 0.5, [6]) == laconic.Schedule.rates(0.5, [6])


def fused(version="1.1", at=(2, 3), family="plain", keep=0.25, **changes):
    model = laconic.reduce_(make(family, **changes), "tokenlearner", keep=keep, at=at, after="fused", version=version)
    return model, fill(model.laconic)


def normed(x, layer):
    return F.layer_norm(x, (48,), layer.weight, layer.bias, 1e-6)


@pytest.mark.parametrize("version", ["1.1", "1"])
def test_the_token_fuser_by_hand(version):
    """Nine tokens go through a block of their own, and all 36 places take of them."""
    model, x = fused(version)[0], images("plain")
    y = model._pos_embed(model.patch_embed(x))
    for index, block in enumerate(model.blocks):
        reducer = model.laconic.reducers[str(index)] if index >= 2 else None
        if reducer is None:
            y = block.attn(block.norm1(y)) + y
            y = block.mlp(block.norm2(y)) + y
            continue
        grid = y[:, 1:]
        learner, f = reducer.learner, reducer.fuser
        maps = learner.norm(grid)
        if version == "1.1":
            weights = learner.maps(maps).softmax(1).transpose(1, 2)
        else:
            weights = learner.maps(maps.transpose(1, 2).reshape(3, 48, 6, 6)).sigmoid().flatten(2)
        z = torch.cat([y[:, :1], weights @ grid], 1)
        z = z + block.attn(block.norm1(z))
        z = z + block.mlp(block.norm2(z))
        assert z.shape == (3, 10, 48)
        tokens = torch.einsum("bsc,ts->btc", normed(z[:, 1:], f.before), f.mix.weight) + f.mix.bias[:, None]
        hidden = F.gelu(normed(grid, f.norm) @ f.maps[0].weight.T + f.maps[0].bias, approximate="tanh")
        take = (hidden @ f.maps[2].weight.T + f.maps[2].bias).sigmoid()
        y = torch.cat([z[:, :1], grid + torch.einsum("bns,bsc->bnc", take, normed(tokens, f.after))], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.head(model.norm(y)[:, 0]), rtol=1e-4, atol=1e-4)
    final = laconic.provenance(model).final
    assert torch.equal(final.where, torch.arange(36).expand(3, -1))
    assert model.laconic.entry(4).parked is None
    assert not model.laconic.entry(4).merged


def test_places_take_nothing_at_first():
    """Only the class token has gone through the blocks; what places take grows from the linear layer at zero."""
    model = laconic.reduce_(make("gap"), "tokenlearner", keep=0.25, at=(2, 3), after="fused")
    x = images("gap")
    y = model._pos_embed(model.patch_embed(x))
    for block in model.blocks[:2]:
        y = block(y)
    torch.testing.assert_close(model.forward_features(x), model.norm(y))
    model.train()(x).square().mean().backward()
    assert all(reducer.fuser.mix.weight.grad is not None for reducer in model.laconic.reducers.values())


def test_where_tokens_are_fused():
    config = laconic.TokenLearner(after="fused")
    assert config.default_schedule(12, None, None) == laconic.Schedule.keep_counts({9: 16, 10: 16, 11: 16})
    assert config.default_schedule(12, 0.5, [6]) == laconic.Schedule.rates(0.5, [6])
    for schedule in (
        laconic.Schedule.keep_counts({2: 9}),
        laconic.Schedule.remove_counts({2: 27}),
        laconic.Schedule.rates(0.25, [2]),
    ):
        model = laconic.reduce_(make("plain"), "tokenlearner", schedule=schedule, after="fused")
        assert model.laconic.counts(36) == (36,) * 4
        assert model.laconic.reducers["2"].learner.slots == 9
        assert [row.attention_tokens for row in laconic.summary(model).blocks] == [37, 37, 10, 37]
    model.laconic.set_schedule(laconic.Schedule.rates(1 / 3, [2]))
    with pytest.raises(ValueError, match="built to make 9 tokens, and 12 were asked for"):
        model(images("plain"))
    plain, x = make("plain"), images("plain")
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(laconic.reduce_(plain, "tokenlearner", keep=1.0, after="fused")(x), expected)


@pytest.mark.parametrize("version", ["1.1", "1"])
def test_work_of_the_fuser(version):
    model, _ = fused(version)
    cost, reduction = laconic.summary(model, count=True), model.laconic
    sites = [reduction.reducer(block).site for block in (2, 3)]
    own = sum(reduction.config.macs(36, 36, site)["matmul"] for site in sites)
    assert cost.counted_macs == cost.macs - sum(row.reducer_macs for row in cost.blocks) + own
    assert cost.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["dinov2-reg", "siglip"])
def test_fused_images_are_alone_and_half_precision_stays(family):
    model, x = fused(family=family)[0], images(family)
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), together, rtol=1e-4, atol=1e-4)
        assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_fused_tokens_are_saved(tmp_path):
    model, x = fused()[0], images("plain")
    laconic.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(laconic.load(tmp_path)(x), model(x))


@pytest.mark.unchecked
def test_fused_tokens_compile():
    model, x = fused()[0], images("plain")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("method", MIXING)
def test_the_count_of_a_mixer_is_part_of_it(method):
    config = laconic.methods()[method].config()
    with pytest.raises(ValueError, match=f"{method}: .* built to make 6 tokens, and 5 were asked for"):
        config.build(site(6)).before(tokens(), 5)


@pytest.mark.parametrize("method", [*MIXING, "dpc-knn"])
def test_mixing_keeps_mass_and_prefix(method):
    model = reduced(method, "dinov2-reg")
    _, moments = answer(model, images("dinov2-reg"))
    for before, after in moments:
        assert torch.equal(before.x[:, :5], after.x[:, :5])
        torch.testing.assert_close(after.size.sum(1), torch.full((3,), 36.0))
        assert (after.size >= 0).all()


# ------------------------------------------------------------------------------------------------ heuristic
def published_distances(patches, norm):
    line = torch.linspace(-patches // 2, patches // 2, steps=patches)
    y, x = torch.meshgrid(line, line, indexing="ij")
    z = {"l1": x.abs() + y.abs(), "l2": (x * x + y * y).sqrt(), "linf": torch.maximum(x.abs(), y.abs())}[norm]
    return z.flatten()


def masked(model, x, masks):
    """The published way: patches outside the pattern are hidden from the block on."""
    x = model._pos_embed(model.patch_embed(x))
    mask = None
    for index, block in enumerate(model.blocks):
        if index in masks:
            seen = F.pad(masks[index], (1, 0), value=True)
            mask = torch.zeros(len(seen), len(seen)).masked_fill(~seen.unsqueeze(0), torch.finfo(torch.float32).min)
        x = block(x, attn_mask=mask)
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("keep", [0.7, 0.5])
def test_the_published_radius_rule_and_masks(norm, keep):
    model, x = make("plain", img_size=224), torch.randn(2, 3, 224, 224)
    z, masks = published_distances(14, norm), {}
    for stage, block in enumerate(AT):
        target = int(196 * keep ** (stage + 1))
        radius = min(z.unique().tolist(), key=lambda r: abs((z <= r).sum().item() - target))
        masks[block] = z <= radius
    with torch.no_grad():
        expected = masked(model, x, masks)
    laconic.reduce_(model, "heuristic", keep=keep, at=AT, norm=norm, count="radius")
    logits, moments = answer(model, x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for (_, after), mask in zip(moments, masks.values(), strict=True):
        assert torch.equal(after.origin_index, mask.nonzero()[:, 0].expand(2, -1))


def test_the_counts_that_the_benchmark_reports_for_discs():
    config = laconic.Heuristic(count="radius")
    assert [config.counts(config.default_schedule(12, 0.7, None), 12, 196)[block] for block in BLOCKS] == [140, 96, 68]


@pytest.mark.parametrize("side", [7, 14, 16, 24, 37])
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_published_distances(side, norm):
    """To the last bit, but for square roots: of those, libraries differ in it."""
    expected = published_distances(side, norm).tolist()
    assert list(distances(side, side, norm, True)) == (pytest.approx(expected, rel=2e-7) if norm == "l2" else expected)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (9, 4)])
def test_the_nearest_n_patches_stay(norm, grid):
    t = tokens(patches=36, grid=grid)
    out = laconic.Heuristic(norm=norm).build(site(11, 36)).before(t, 11)
    order = {"l1": 1, "l2": 2, "linf": math.inf}[norm]
    y, x = torch.meshgrid(*(torch.arange(s) - (s - 1) / 2 for s in grid), indexing="ij")
    far = torch.linalg.vector_norm(torch.stack([y, x], 2), ord=order, dim=2).flatten().tolist()
    expected = sorted(sorted(range(36), key=lambda p: (round(far[p], 5), p))[:11])
    assert out.origin_index.tolist() == [expected] * 2
    assert torch.equal(out.patches, t.patches[:, expected])
    assert (out.token_of_patch >= 0).sum() == 22


def test_the_pattern_goes_by_the_places_of_the_tokens():
    """Whatever has left before: of those that are there, the ones nearest to the centre stay."""
    t = tokens(patches=36, grid=(6, 6)).keep(torch.tensor([[35, 0, 14, 1, 21], [7, 15, 3, 30, 5]]))
    out = laconic.Heuristic().build(site(2, 36, grid=(6, 6))).before(t, 2)
    assert out.origin_index.tolist() == [[14, 21], [7, 15]]


def test_a_square_image_of_another_size():
    out = laconic.Heuristic().build(site(4, 36, grid=(6, 6))).before(tokens(patches=16), 4)
    assert out.origin_index.tolist() == [[5, 6, 9, 10]] * 2
    with pytest.raises(ValueError, match="20 patches do not form a square"):
        laconic.Heuristic().build(site(4, 36, grid=(6, 6))).before(tokens(patches=20), 4)
    out = laconic.Heuristic().build(site(4, 36, grid=(6, 6))).before(tokens(patches=20, grid=(2, 10)), 4)
    assert out.origin_index.tolist() == [[4, 5, 14, 15]] * 2


@pytest.mark.parametrize("smallest", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_shrinking_radius(norm, smallest):
    config, z = laconic.Heuristic(norm=norm, count="shrinking", smallest=smallest), published_distances(14, norm)
    schedule = config.default_schedule(12, None, None)
    assert schedule.at == tuple(range(3, 10))
    radii = torch.linspace(z[0], smallest or z[7 * 14 + 7], 9).tolist()
    expected = [196] * 3 + [int((z <= r).sum()) for r in radii[1:8]]
    assert config.counts(schedule, 12, 196) == (*expected, expected[-1], expected[-1])
    model = laconic.reduce_(timm.create_model("deit_tiny_patch16_224", depth=4), config, at=[1, 2])
    assert laconic.summary(model).tokens == config.counts(laconic.Schedule.adaptive([1, 2]), 4, 196)


def test_shrinking_takes_no_rate_but_explicit_counts():
    config = laconic.Heuristic(count="shrinking")
    with pytest.raises(ValueError, match="omit keep"):
        laconic.reduce_(make("plain"), config, keep=0.7)
    model = laconic.reduce_(make("plain"), config, schedule=laconic.Schedule.keep_counts({1: 16}))
    assert laconic.summary(model).tokens == (36, 16, 16, 16)


def test_the_nearest_ring_is_the_smaller_of_two_as_near():
    assert [ring(16, "linf", target) for target in (1, 4, 9, 10, 11, 16)] == [4, 4, 4, 4, 16, 16]


# ------------------------------------------------------------------------------------------------ options and weights
@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (partial(laconic.DPCKNN, weights="size"), "dpc-knn: weights must be one of 'learned', 'equal'"),
        (partial(laconic.DPCKNN, neighbours=0), "neighbours must be at least 1"),
        (partial(laconic.KMedoids, weights="size"), "kmedoids: weights must be one of"),
        (partial(laconic.KMedoids, cost="mean"), "kmedoids: cost must be one of 'published', 'members'"),
        (partial(laconic.KMedoids, iterations=-1), "iterations must be 0 or more"),
        (partial(laconic.ATC, linkage="ward"), "atc: linkage must be one of 'average', 'complete', 'single'"),
        (partial(laconic.Sinkhorn, eps=0), "sinkhorn: eps must be positive"),
        (partial(laconic.Sinkhorn, iterations=0), "sinkhorn: iterations must be at least 1"),
        (partial(laconic.TokenLearner, version="2"), "tokenlearner: version must be one of '1.1', '1'"),
        (partial(laconic.TokenLearner, after="nothing"), "tokenlearner: after must be one of 'tokens', 'fused'"),
        (partial(laconic.Heuristic, norm="l3"), "heuristic: norm must be one of 'l1', 'l2', 'linf'"),
        (partial(laconic.Heuristic, count="all"), "heuristic: count must be one of"),
        (partial(laconic.Heuristic, smallest=-1), "smallest must be a radius"),
    ],
)
def test_options_that_there_are_not(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()


@pytest.mark.parametrize("method", ["dpc-knn", "patchmerger", "sinkhorn", "sit"])
def test_published_weights_are_read(method):
    model = deit(method)
    published = {published_name(k): v for k, v in model.state_dict().items()}
    assert any(name.startswith("cluster_layers.2.") for name in published)
    again = laconic.import_checkpoint({"model": published}, method, keep=0.7)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="cluster_layers"):  # more stages than the model has
        laconic.import_checkpoint({"model": published}, method, keep=0.7, at=[3, 6])


def test_work_of_the_convolutions_and_of_learned_maps():
    for version in ("1.1", "1"):
        model = laconic.reduce_(make("plain"), "tokenlearner", keep=0.25, at=[2], version=version)
        cost = laconic.summary(model, count=True)
        assert cost.macs == cost.counted_macs
        assert cost.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.unchecked
def test_a_compiler_sees_one_operator_that_agrees_with_the_plain_loop():
    x = torch.randn(2, 12, 5)
    d = 1 - cosine(x, x)
    torch.library.opcheck(torch.ops.laconic.agglomerate.default, (d, 5, "average"))
    compiled = torch.compile(agglomerate, fullgraph=True, backend="eager")
    assert torch.equal(compiled(d, 5, "complete"), agglomerate(d, 5, "complete"))


def test_double_precision_is_kept_where_it_is_asked_for():
    """One part in 10^9 nearer: float32 cannot tell, and takes the earlier."""
    x = torch.tensor([[[0.0, 0.0], [1 + 1e-9, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    assert squared_distances(precise(x)).diff(dim=2)[0, 0, 1] < 0
    assert squared_distances(x.float()).diff(dim=2)[0, 0, 1] == 0
    assert precise(torch.zeros(1, 2, 3)).dtype == torch.float64
    assert squared_distances(torch.zeros(1, 2, 3, dtype=torch.bfloat16)).dtype == torch.float32
