"""The mergers of BAT's table 4, as methods and inside BAT: each against plain Python, torch's own pools, or a property."""

import dataclasses
import itertools
import typing

import pytest
import torch
import torch.nn.functional as F

import laconic
from benchmarks import tables
from families import AT, images, make, reduced
from laconic.analysis.macs import counted, estimate, summary
from laconic.core.attention import AttentionView
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext
from laconic.core.tokens import Tokens
from laconic.methods import BAT, AvgPool, ConvPool, KMeans, MaxPool, MLPPool, SpatialPool
from laconic.methods.ops import cells, group_normalize, lloyd, runs, strided, topk_split
from laconic.methods.ops.kmeans import _fill as fill_empty
from laconic.methods.ops.mergers import Merger
from laconic.methods.ops.pooling import tiling

POOLS = (AvgPool, MaxPool, SpatialPool, ConvPool, MLPPool, KMeans)
MERGERS = typing.get_args(Merger)
BOTH = ("all", "inattentive")
every_pool = pytest.mark.parametrize("config", POOLS, ids=lambda c: c.info.name)
both = pytest.mark.parametrize("pooled", BOTH)


def tokens(patches=36, batch=2, channels=8):
    grid = (6, 6) if patches == 36 else None
    return Tokens.start(torch.randn(batch, 1 + patches, channels), 1, True, grid=grid)


def look(t):
    return AttentionView(*[t.x.unsqueeze(1)] * 3, None, 1.0, 1, True)


def pool(config, t, n, site=None):
    """(what is left, the reducer) of one reduction to n."""
    site = site or BlockContext(0, 1, t.x.shape[2], 2, 0.5, len(t), n, t.grid or (6, 6))
    reducer = config.build(site)
    reducer.site = site
    return reducer.between(t, look(t), n), reducer


def members(left, b, m):
    return (left.token_of_patch[b] == m).nonzero()[:, 0]


def forward(model, x):
    with torch.no_grad():
        return model(x)


# ------------------------------------------------------------------------------------------------ all of them
@every_pool
@both
def test_as_many_out_as_in_is_the_identity(config, pooled):
    t = tokens()
    left, _ = pool(config(pooled=pooled), t, 36)
    assert torch.equal(left.x[:, 0], t.x[:, 0])
    assert left.size.shape == (2, 36)
    torch.testing.assert_close(left.dense(left.patches), t.patches, rtol=0, atol=1e-6)
    if pooled == "all" and config is not KMeans:  # k-means begins with the highest score, and so do the attentive
        torch.testing.assert_close(left.patches, t.patches, rtol=0, atol=1e-6)


@every_pool
@both
@pytest.mark.parametrize("n", [1, 2, 17, 35])
def test_equal_tokens_are_a_fixed_point(config, pooled, n):
    t = tokens()
    t = t.replace(x=t.x[:, 3:4].expand_as(t.x).clone())
    left, _ = pool(config(pooled=pooled), t, n)
    torch.testing.assert_close(left.x, t.x[:, : n + 1])
    if config is not MLPPool:  # its tokens go everywhere
        assert left.size.sum(1).tolist() == [36.0] * 2
        assert left.size.min() > 0


@every_pool
@both
def test_prefix_dtype_and_gradients(config, pooled):
    t = tokens().replace(x=torch.randn(2, 37, 8, requires_grad=True))
    left, _ = pool(config(pooled=pooled), t, 15)
    left.patches.square().sum().backward()
    assert t.x.grad[:, 1:].abs().sum() > 0
    assert (t.x.grad[:, 0].abs().sum() == 0) == (config is not KMeans)  # its weights are the class token's attention
    assert torch.equal(left.x[:, 0], t.x[:, 0])
    half = t.replace(x=t.x.detach().bfloat16())
    assert pool(config(pooled=pooled), half, 15)[0].x.dtype == torch.bfloat16


@every_pool
@pytest.mark.parametrize(("into", "m"), [(None, 2), (5, 5), (0.5, 8), (99, 20)])
def test_the_attentive_stay_and_the_others_are_pooled(config, into, m):
    t, n = tokens(), 20
    s = look(t).cls
    left, _ = pool(config(pooled="inattentive", into=into), t, n)
    kept, rest = topk_split(s, n - m)
    assert left.size.shape == (2, n)
    torch.testing.assert_close(left.patches[:, : n - m], t.rows(kept), rtol=0, atol=1e-6)
    assert left.size[:, : n - m].eq(1).all()
    torch.testing.assert_close(left.size[:, n - m :].sum(1), torch.full((2,), float(rest.shape[1])))
    assert (left.token_of_patch.gather(1, rest) >= n - m).all()


def test_how_many_the_inattentive_become():
    parts = AvgPool(pooled="inattentive").parts
    assert [parts(196, 98), parts(98, 49), parts(49, 25)] == [(88, 108, 10), (44, 54, 5), (23, 26, 2)]
    assert parts(196, 4) == (2, 194, 2)  # half of the attentive and one, not a tenth
    for before, n in itertools.combinations_with_replacement(range(1, 40), 2):
        n, before = before, n
        kept, rest, m = parts(before, n)
        assert kept + rest == before
        assert kept + m == n
        assert 1 <= m <= min(rest, kept // 2 + 1)


def test_what_needs_no_score_asks_for_none():
    """A host without class token has no class attention: only what is scored may look for it."""
    t = tokens()
    blind = dataclasses.replace(look(t), has_cls=False)
    site = BlockContext(0, 1, 8, 2, 0.5, 36, 18, (6, 6))
    free = [c() for c in POOLS if c is not KMeans]
    for config in [*free, KMeans(init="strided", weights="size"), KMeans(init="strided", weights="even")]:
        assert len(config.build(site).between(t, blind, 18)) == 18
        assert not config.macs(36, 18, site).get("head_mean")
    scored = [c(pooled="inattentive") for c in POOLS] + [AvgPool(order="score"), KMeans(), KMeans(init="strided")]
    for config in [*scored, KMeans(weights="size")]:
        with pytest.raises(LookupError, match="mean-query"):
            config.build(site).between(t, blind, 18)
        stand_in = dataclasses.replace(config, score="mean-query")
        assert len(stand_in.build(site).between(t, blind, 18)) == 18
        assert config.macs(36, 18, site)["head_mean"] == 36


# ------------------------------------------------------------------------------------------------ along a sequence
@pytest.mark.parametrize(("config", "official"), [(AvgPool, F.adaptive_avg_pool1d), (MaxPool, F.adaptive_max_pool1d)])
@pytest.mark.parametrize("n", [1, 4, 18, 36])
def test_torch_pools_the_same_where_windows_do_not_overlap(config, official, n):
    t = tokens()
    left, _ = pool(config(), t, n)
    torch.testing.assert_close(left.patches, official(t.patches.transpose(1, 2), n).transpose(1, 2))


@pytest.mark.parametrize("order", ["raster", "score"])
@both
def test_runs_by_hand(order, pooled):
    t = tokens()
    t = t.replace(size=torch.randint(1, 5, t.size.shape).float())
    s = look(t).cls
    for config, n in itertools.product((AvgPool, MaxPool), (7, 20)):
        options = config(pooled=pooled, order=order, into=4)
        left, _ = pool(options, t, n)
        kept, rest, m = options.parts(36, n)
        for b in range(2):
            ranked = s[b].sort(descending=True, stable=True).indices.tolist()
            sequence = ranked[kept:] if order == "score" else sorted(ranked[kept:])
            groups = [[i for r, i in enumerate(sequence) if r * m // rest == g] for g in range(m)]
            assert max(map(len, groups)) - min(map(len, groups)) <= 1
            for g, group in enumerate(groups):
                x, w = t.patches[b, group], t.size[b, group]
                expected = x.amax(0) if config is MaxPool else (w[:, None] * x).sum(0) / w.sum()
                torch.testing.assert_close(left.patches[b, kept + g], expected)
                assert left.origin_index[b, kept + g] == group[0]
                assert left.size[b, kept + g] == w.sum()


def test_runs_go_by_place_at_later_stages():
    """The attentive come first, by score, at the second stage; what is pooled there are still neighbours in the image."""
    t = tokens().keep(torch.stack([torch.randperm(36)[:30] for _ in range(2)]))
    left, _ = pool(AvgPool(pooled="inattentive", into=3), t, 12)
    kept, rest = topk_split(look(t).cls, 9)
    for b in range(2):
        places = t.origin_index[b, rest[b]].sort().values.tolist()
        for g in range(3):
            assert members(left, b, 9 + g).tolist() == places[g * 7 : g * 7 + 7]


def test_the_highest_of_each_group():
    t = tokens(patches=5).replace(x=torch.randn(2, 6, 8, requires_grad=True), per_token={"c": torch.rand(2, 5)})
    dst = torch.tensor([[1, 0, -1, 1, 1], [0, 0, 1, -1, -1]])
    lead = torch.tensor([[1, 3], [1, 2]])
    left = t.merge_max(dst, lead)
    for b, m in itertools.product(range(2), range(2)):
        assert torch.equal(left.patches[b, m], t.patches[b][dst[b] == m].amax(0))
    same = t.merge(dst, group_normalize(t.size, dst, 2), lead)  # all else is as there
    assert torch.equal(left.size, same.size)
    assert torch.equal(left.token_of_patch, same.token_of_patch)
    assert torch.equal(left.origin_index, same.origin_index)
    assert torch.equal(left.per_token["c"], same.per_token["c"])
    assert left.merged
    assert torch.equal(left.x[:, 0], t.x[:, 0])
    left.patches.sum().backward()
    assert t.x.grad[0, 3].abs().sum() == 0  # the dropped one
    assert t.x.grad[:, 1:].sum() == 2 * 2 * 8


# ------------------------------------------------------------------------------------------------ on the grid
@pytest.mark.parametrize(("grid", "n"), [((6, 6), 9), ((6, 6), 18), ((6, 6), 4), ((4, 8), 8), ((3, 5), 15), ((14, 14), 98)])
def test_torch_pools_the_same_on_a_grid_that_is_tiled(grid, n):
    t = tokens(grid[0] * grid[1]).replace(grid=grid)
    left, _ = pool(SpatialPool(), t, n)
    image = t.patches.transpose(1, 2).unflatten(2, grid)
    expected = F.adaptive_avg_pool2d(image, tiling(grid, n)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(left.patches, expected)


def test_holes_do_not_count():
    """A grid with holes: the mean of a cell is over the patches that are there."""
    gone = torch.tensor([0, 9, 14, 15, 35])
    there = torch.tensor([i for i in range(36) if i not in gone])[torch.randperm(31)]
    t = tokens().keep(there.expand(2, -1))
    left, _ = pool(SpatialPool(), t, 9)
    image = t.dense(t.patches).unflatten(1, (3, 2, 3, 2)).transpose(2, 3).reshape(2, 9, 4, 8)
    count = torch.tensor([3, 3, 4, 4, 2, 4, 4, 4, 3]).view(9, 1)
    expected = {tuple(row.tolist()) for row in (image.sum(2) / count)[0].round(decimals=4)}
    assert {tuple(row.tolist()) for row in left.patches[0].round(decimals=4)} == expected
    assert sorted(left.size[0].tolist()) == sorted(count.flatten().tolist())


def test_every_image_has_so_many_cells_wherever_its_tokens_are():
    for length, n in ((36, 35), (36, 7), (20, 13), (9, 9), (5, 1), (12, 11)):
        place = torch.stack([torch.randperm(36)[:length] for _ in range(20)])
        place[0] = torch.arange(length)  # all in the first rows: most cells are empty
        group, lead = cells(place, (6, 6), n)
        assert all(set(g.tolist()) == set(range(n)) for g in group)
        assert torch.equal(group.gather(1, lead), arange_like(lead))
        assert (lead.diff(dim=1) > 0).all()
        rows, columns = tiling((6, 6), n)
        cell = place // 6 * rows // 6 * columns + place % 6 * columns // 6
        for b in range(20):
            for m in range(n):  # none reaches over two cells of the tiling
                assert len(set(cell[b][group[b] == m].tolist())) == 1


def test_the_fullest_cells_are_cut():
    place = torch.tensor([[0, 1, 2, 6, 7, 8, 12, 35, 34]])  # of 2 x 2 cells one holds seven, one two, two none
    group, lead = cells(place, (6, 6), 4)
    assert group.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 3]]
    assert lead.tolist() == [[0, 3, 5, 8]]  # the first in the raster
    assert cells(place, (6, 6), 5)[0].tolist() == [[0, 0, 1, 1, 2, 2, 3, 4, 4]]


def test_cells_go_by_place_not_by_sequence():
    place = torch.stack([torch.randperm(36)[:25] for _ in range(2)])
    shuffle = torch.stack([torch.randperm(25) for _ in range(2)])
    for n in (4, 7, 20):
        a, b = cells(place, (6, 6), n)[0].gather(1, shuffle), cells(place.gather(1, shuffle), (6, 6), n)[0]
        assert torch.equal(a.unsqueeze(1) == a.unsqueeze(2), b.unsqueeze(1) == b.unsqueeze(2))


def test_tilings():
    assert [tiling((14, 14), n) for n in (98, 49, 25, 1, 2, 97)] == [(7, 14), (7, 7), (5, 5), (1, 1), (1, 2), (8, 12)]
    assert tiling((1, 16), 4) == (1, 4)
    for grid, n in itertools.product(((14, 14), (6, 9), (1, 7)), range(1, 63)):
        rows, columns = tiling(grid, min(n, grid[0] * grid[1]))
        assert rows <= grid[0]
        assert columns <= grid[1]
        assert 1 <= rows * columns <= n


# ------------------------------------------------------------------------------------------------ k-means
def by_hand(x, weight, first, iterations):
    """Lloyd's algorithm in plain Python, for data whose clusters never run empty: (cluster, objectives)."""
    centres, objectives = [x[i] for i in first], []
    for _ in range(iterations):
        cluster = [min(range(len(centres)), key=lambda q, row=row: (row - centres[q]).square().sum().item()) for row in x]
        groups = [[i for i, c in enumerate(cluster) if c == q] for q in range(len(centres))]
        centres = [(weight[g, None] * x[g]).sum(0) / weight[g].sum() for g in groups]
        objectives.append(sum((weight[i] * (x[i] - centres[c]).square().sum()).item() for i, c in enumerate(cluster)))
    return cluster, objectives


@pytest.mark.parametrize("iterations", [1, 2, 3, 6])
def test_k_means_by_hand(iterations):
    x, weight = torch.randn(3, 30, 3), torch.rand(3, 30) + 0.1
    first = strided(x, 4).contiguous()
    cluster, nearest = lloyd(x, weight, first, iterations)
    for b in range(3):
        assert cluster[b].tolist() == by_hand(x[b], weight[b], first[b].tolist(), iterations)[0]
    assert torch.equal(cluster.gather(1, nearest), arange_like(nearest))


def objective(x, weight, cluster, count):
    total = 0.0
    for q in range(count):
        inside = cluster == q
        w = weight[inside]
        mean = (w[:, None] * x[inside]).sum(0) / w.sum()
        total += (w[:, None] * (x[inside] - mean).square()).sum().item()
    return total


@pytest.mark.parametrize("kind", ["spread", "duplicates", "bad start", "far off"])
def test_the_objective_of_k_means_never_rises(kind):
    x, weight = torch.randn(4, 40, 5), torch.rand(4, 40) + 0.01
    first = arange_like(x[:, :9])
    if kind == "duplicates":
        x = x[:, torch.arange(40) % 11]
    if kind == "bad start":
        x[:, 1:9] = x[:, :1] + 1e-3 * torch.randn(4, 8, 5)  # most centres beside each other: clusters run empty
    if kind == "far off":
        x = x * 0.1 + 300  # where |x|^2 - 2xc + |c|^2 would cancel
    falls = 0
    for b in range(4):
        values = [objective(x[b].double(), weight[b].double(), lloyd(x, weight, first, i)[0][b], 9) for i in range(1, 9)]
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(values))
        falls += values[-1] < 0.999 * values[0]
    assert falls > 0 or kind == "duplicates"


@pytest.mark.parametrize("iterations", [1, 3])
def test_no_cluster_is_empty(iterations):
    x = torch.randn(5, 30, 4)
    x[0], x[1] = 1.0, x[1, torch.arange(30) % 4]  # one point, and four, over and over
    for count in (1, 6, 29, 30):
        cluster, nearest = lloyd(x, torch.ones(5, 30), arange_like(x[:, :count]), iterations)
        assert all(set(c.tolist()) == set(range(count)) for c in cluster)
        assert torch.equal(cluster.gather(1, nearest), arange_like(nearest))


def test_an_empty_cluster_takes_the_farthest_token():
    x = torch.tensor([[[0.0], [0.0], [5.0], [1.0], [9.0], [6.0]]])
    cluster, nearest = lloyd(x, torch.ones(1, 6), torch.tensor([[0, 1, 2]]), 1)
    assert cluster.tolist() == [[0, 0, 2, 0, 1, 2]]  # centre 1 is centre 0 again
    assert nearest.tolist() == [[0, 4, 2]]


def test_the_only_token_of_a_cluster_is_not_taken_from_it():
    distance = torch.tensor([[[0.0, 9, 9], [1, 9, 9], [50, 20, 60]]])
    assert fill_empty(distance.amin(2), distance.argmin(2), 3).tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("weights", ["importance", "size", "even"])
@pytest.mark.parametrize("init", ["top-score", "strided"])
@both
def test_clusters_become_weighted_means(weights, init, pooled):
    t = tokens()
    t = t.replace(size=torch.randint(1, 5, t.size.shape).float())
    s = look(t).cls
    config = KMeans(weights=weights, init=init, pooled=pooled, into=5, iterations=2)
    left, _ = pool(config, t, 12)
    weight = {"importance": s, "size": t.size, "even": torch.ones_like(s)}[weights]
    kept, rest = topk_split(s, 7 if pooled == "inattentive" else 0)
    rest = rest if init == "top-score" else rest.sort(1).values
    count = 12 - kept.shape[1]
    first = arange_like(rest[:, :count]) if init == "top-score" else strided(rest, count)
    cluster, _ = lloyd(t.rows(rest), weight.gather(1, rest), first, 2)
    assert torch.equal(left.token_of_patch.gather(1, rest), cluster + kept.shape[1])
    for b, m in itertools.product(range(2), range(12)):
        group = members(left, b, m)
        w = weight[b, group] / weight[b, group].sum()
        assert (w >= 0).all()
        torch.testing.assert_close(left.patches[b, m], w @ t.patches[b, group], rtol=1e-5, atol=1e-5)  # convex hull
        assert left.origin_index[b, m] in group


def test_the_first_centres():
    assert strided(torch.zeros(1, 36), 4).tolist() == [[4, 13, 22, 31]]
    for length, count in ((7, 7), (7, 5), (36, 35), (5, 1)):
        picked = strided(torch.zeros(1, length), count)[0].tolist()
        assert len(set(picked)) == count
        assert 0 <= min(picked) <= max(picked) < length


# ------------------------------------------------------------------------------------------------ learned
@pytest.mark.parametrize("config", [ConvPool(), ConvPool(kernel="full"), MLPPool()], ids=str)
@pytest.mark.parametrize("keep", [0.5, 0.7])
@both
def test_they_begin_as_average_pooling(config, keep, pooled):
    x = images("plain")
    config = dataclasses.replace(config, pooled=pooled, into=4)
    ours = forward(laconic.reduce_(make("plain"), config, keep=keep, at=(1,)), x)
    average = laconic.reduce_(make("plain"), AvgPool(pooled=pooled, into=4), keep=keep, at=(1,))
    torch.testing.assert_close(ours, forward(average, x), rtol=1e-4, atol=1e-4)
    if isinstance(config, ConvPool):  # by size at later stages, as average pooling is
        model = laconic.reduce_(make("plain"), config, keep=keep, at=AT)
        average = laconic.reduce_(make("plain"), AvgPool(pooled=pooled, into=4), keep=keep, at=AT)
        torch.testing.assert_close(forward(model, x), forward(average, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["depthwise", "full"])
def test_a_strided_convolution(kernel):
    t = tokens()
    site = BlockContext(0, 1, 8, 2, 0.5, 36, 12, (6, 6))
    reducer = ConvPool(kernel=kernel).build(site)
    torch.nn.init.normal_(reducer.conv.weight)
    torch.nn.init.normal_(reducer.conv.bias)
    left = reducer.between(t, look(t), 12)
    groups = 8 if kernel == "depthwise" else 1
    assert reducer.conv.weight.shape == (8, 8 // groups, 3)
    expected = F.conv1d(t.patches.transpose(1, 2), reducer.conv.weight, reducer.conv.bias, stride=3, groups=groups)
    torch.testing.assert_close(left.patches, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert left.token_of_patch.tolist() == [[i // 3 for i in range(36)]] * 2


def test_a_short_run_leaves_its_last_tap_out():
    t = tokens(patches=5, channels=1).replace(x=torch.arange(1.0, 7).view(1, 6, 1).expand(2, 6, 1))
    reducer = ConvPool().build(BlockContext(0, 1, 1, 1, 0.5, 5, 2))
    with torch.no_grad():
        reducer.conv.weight.copy_(torch.tensor([1.0, 10, 100]).view(1, 1, 3))
    left = reducer.between(t, look(t), 2)
    assert left.patches[0, :, 0].tolist() == pytest.approx([2 + 30 + 400, (5 + 60) * 3 / 2])


def test_the_mlp_is_a_linear_layer_over_the_tokens():
    t = tokens()
    reducer = MLPPool(pooled="inattentive", into=4).build(BlockContext(0, 1, 8, 2, 0.5, 36, 12, (6, 6)))
    torch.nn.init.normal_(reducer.mix.weight)
    torch.nn.init.normal_(reducer.mix.bias)
    left = reducer.between(t, look(t), 12)
    kept, rest = topk_split(look(t).cls, 8)
    rest = rest.sort(1).values
    expected = reducer.mix.weight @ t.rows(rest) + reducer.mix.bias.unsqueeze(1)
    torch.testing.assert_close(left.patches[:, 8:], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.patches[:, :8], t.rows(kept), rtol=0, atol=0)
    share_of = reducer.mix.weight.abs() / reducer.mix.weight.abs().sum(0)
    torch.testing.assert_close(left.size[:, 8:], share_of.sum(1).expand(2, -1))
    assert torch.equal(left.token_of_patch.gather(1, rest), (8 + reducer.mix.weight.abs().argmax(0)).expand(2, -1))


def test_training_moves_them():
    for method in ("conv-pool", "mlp-pool"):
        model = laconic.reduce_(make("plain"), method, keep=0.6, at=(1, 2)).train()
        model(images("plain")).square().mean().backward()
        parameters = [p for r in model.laconic.reducers.values() for p in r.parameters()]
        assert len(parameters) == 4
        assert all(p.grad.abs().sum() > 0 for p in parameters)


def test_learned_shapes_refuse_other_counts():
    for method, words in (
        ("conv-pool", "conv-pool was built with 2 taps and got 36 tokens to turn into 12; its weights fix the counts"),
        ("mlp-pool", "mlp-pool was built to turn 36 tokens into 18 and got 36 to turn into 12; its weights fix the counts"),
    ):
        model = laconic.reduce_(make("plain"), method, schedule=laconic.Schedule.keep_counts({1: 18}))
        model.laconic.set_schedule(laconic.Schedule.keep_counts({1: 12}))
        with pytest.raises(ValueError, match=words):
            model(images("plain"))
    model = laconic.reduce_(make("plain"), "conv-pool", schedule=laconic.Schedule.keep_counts({1: 18}))
    model.laconic.set_schedule(laconic.Schedule.keep_counts({1: 30}))  # shorter runs fit
    assert forward(model, images("plain")).isfinite().all()


# ------------------------------------------------------------------------------------------------ inside BAT
@pytest.mark.parametrize("merger", MERGERS[1:])
def test_without_pairs_bat_is_the_method_on_the_inattentive(merger):
    x = images("plain")
    method = {
        "kmeans-1": KMeans(iterations=1, pooled="inattentive", into=4),
        "kmeans-3": KMeans(iterations=3, pooled="inattentive", into=4),
        "avg-pool": AvgPool(pooled="inattentive", into=4),
        "max-pool": MaxPool(pooled="inattentive", into=4),
        "spatial-pool": SpatialPool(pooled="inattentive", into=4),
    }[merger]
    plan = laconic.Schedule.keep_counts({1: 22, 2: 14, 3: 9})
    ours = laconic.reduce_(make("plain"), method, schedule=plan)
    expected = forward(ours, x)
    bat = laconic.reduce_(make("plain"), BAT(merger=merger, clusters=4, pairs=0), schedule=plan)
    torch.testing.assert_close(forward(bat, x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(laconic.provenance(bat).final.where, laconic.provenance(ours).final.where)


@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize("method", ["bat", "evit+bat", "dynamicvit+bat"])
def test_mergers_change_the_clusters_and_nothing_else(method, merger):
    t, site = tokens(), BlockContext(0, 1, 8, 2, 0.5, 36, 19, (6, 6))
    s = look(t).cls
    config = laconic.methods()[method].config
    left = config(merger=merger, clusters=3, pairs=2).merge(t, s, 19, site)
    usual = config(clusters=3, pairs=2).merge(t, s, 19, site)
    kept, rest = topk_split(s, 18)
    assert left.size.shape == (2, 19)
    torch.testing.assert_close(left.x[:, :17], usual.x[:, :17])  # class token, attentive ones and pairs
    assert torch.equal(left.token_of_patch.gather(1, kept), usual.token_of_patch.gather(1, kept))
    assert set(left.token_of_patch.gather(1, rest).unique().tolist()) == {16, 17, 18}
    same = torch.allclose(left.x[:, 17:], usual.x[:, 17:])
    assert same == (merger == "dpc")
    for b, m in itertools.product(range(2), range(16, 19)):
        group = members(left, b, m)
        x, w = t.patches[b, group], s[b, group]
        if merger == "max-pool":
            expected = x.amax(0)
        elif merger.endswith("pool"):
            expected = x.mean(0)
        else:
            literal = config().weights != "normalised" and len(group) > 1
            expected = w @ x if literal else w @ x / w.sum()
        torch.testing.assert_close(left.patches[b, m], expected, rtol=1e-5, atol=1e-5)
        assert left.origin_index[b, m] in group


@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize("clusters", [1, 3])
def test_equal_tokens_are_a_fixed_point_of_bat(merger, clusters):
    t, site = tokens(), BlockContext(0, 1, 8, 2, 0.5, 36, 19, (6, 6))
    s = look(t).cls
    t = t.replace(x=t.x[:, :1].expand_as(t.x).clone())
    left = BAT(merger=merger, clusters=clusters, pairs=2).merge(t, s, 19, site)
    torch.testing.assert_close(left.x, t.x[:, :20])
    assert left.size.min() > 0


@pytest.mark.parametrize("merger", MERGERS)
def test_mergers_in_a_model(merger):
    x = images("plain")
    for method, steps in (("bat", "cluster"), ("bat", "diversity"), ("evit+bat", "match"), ("dynamicvit+bat", "match")):
        model = laconic.reduce_(make("plain"), method, keep=0.6, at=AT, merger=merger, steps=steps)
        logits = forward(model, x)
        assert logits.isfinite().all()
        assert (laconic.provenance(model).final.where >= 0).all()
        expected = torch.cat([forward(model, image.unsqueeze(0)) for image in x])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        model.train()
        model(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.parametrize("merger", ["kmeans-3", "max-pool", "spatial-pool"])
def test_mergers_compile(merger):
    torch._dynamo.reset()
    model = laconic.reduce_(make("plain"), "bat", keep=0.6, at=AT, merger=merger)
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), images("plain")
    torch.testing.assert_close(forward(compiled, x), forward(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.parametrize(
    "config",
    [
        AvgPool(order="score"),
        KMeans(init="strided", pooled="inattentive"),
        ConvPool(kernel="full", pooled="inattentive"),
        MLPPool(pooled="inattentive"),
    ],
    ids=str,
)
def test_options_compile(config):
    torch._dynamo.reset()
    model = laconic.reduce_(make("plain"), config, keep=0.6, at=AT)
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), images("plain")
    torch.testing.assert_close(forward(compiled, x), forward(model, x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ costs, errors
@pytest.fixture(scope="module")
def deit():
    return tables.deit("DeiT-S")


TABLE_4 = [c(pooled=p) for c in POOLS for p in BOTH] + [ConvPool(kernel="full"), KMeans(iterations=1)]
TABLE_4 += [BAT(merger=merger) for merger in MERGERS]


@pytest.mark.parametrize("config", TABLE_4, ids=str)
@pytest.mark.parametrize("convention", ["matmul", "torchprofile"])
def test_all_of_table_4_take_2_3_g(deit, config, convention):
    cost = estimate(deit, config, config.default_schedule(12, 0.5, None), convention)
    assert f"{cost.macs / 1e9:.1f}" == "2.3"
    assert cost.tokens[-1] == (27 if isinstance(config, BAT) else 25)


def test_parameters_of_the_learned_ones(deit):
    def own(config):
        return estimate(deit, config, config.default_schedule(12, 0.5, None)).parameters - 22_050_664

    assert own(ConvPool()) == 3 * (2 * 384 + 384)
    assert own(ConvPool(kernel="full")) == 3 * (2 * 384 * 384 + 384)
    assert own(MLPPool()) == sum(n * m + n for m, n in ((196, 98), (98, 49), (49, 25)))
    assert own(MLPPool(pooled="inattentive")) == sum(n * m + n for m, n in ((108, 10), (54, 5), (26, 2)))
    assert all(own(c()) == 0 for c in (AvgPool, MaxPool, SpatialPool, KMeans))


@pytest.mark.parametrize(
    "config",
    [c(pooled="inattentive", into=4) for c in POOLS]
    + [ConvPool(kernel="full"), KMeans(iterations=1), KMeans(init="strided")]
    + [BAT(merger=merger, clusters=3, pairs=2) for merger in MERGERS],
    ids=str,
)
def test_closed_forms_are_what_torch_counts(config):
    model = laconic.reduce_(make("plain"), config, keep=0.6, at=(1, 2))
    assert summary(model).macs == counted(model)


def test_saved_and_loaded(tmp_path):
    x = images("plain")
    for method in ("conv-pool", "mlp-pool"):
        model = reduced(method, "plain")
        laconic.save(model, tmp_path / method)
        assert torch.equal(forward(laconic.load(tmp_path / method), x), forward(model, x))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (AvgPool, {"pooled": "some"}, "avg-pool: pooled must be one of 'all', 'inattentive', not 'some'"),
        (SpatialPool, {"score": "cls"}, "spatial-pool: score must be one of"),
        (MaxPool, {"order": "size"}, "max-pool: order must be one of 'raster', 'score', not 'size'"),
        (MLPPool, {"into": 0}, r"mlp-pool: into must be a count of at least 1 or a fraction in \(0, 1\], not 0"),
        (MLPPool, {"into": 1.5}, r"not 1\.5"),
        (ConvPool, {"kernel": "wide"}, "conv-pool: kernel must be one of 'depthwise', 'full', not 'wide'"),
        (KMeans, {"iterations": 0}, "kmeans: iterations must be at least 1, not 0"),
        (KMeans, {"init": "random"}, "kmeans: init must be one of 'top-score', 'strided', not 'random'"),
        (KMeans, {"weights": "none"}, "kmeans: weights must be one of"),
        (BAT, {"merger": "conv-pool"}, "bat: merger must be one of 'dpc', 'kmeans-1', .*, not 'conv-pool'"),
        (BAT, {"merger": "avg-pool", "steps": "pack"}, "bat: steps='pack' makes no clusters; omit merger='avg-pool'"),
    ],
)
def test_options_are_checked(config, options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


@pytest.mark.parametrize("config", [SpatialPool(), BAT(merger="spatial-pool", clusters=3, pairs=2)], ids=str)
def test_an_unknown_grid_is_refused(config):
    t = tokens().replace(grid=None)
    with pytest.raises(ValueError, match="the grid of these 36 patches is not known"):
        pool(config, t, 19)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (128, 48)])
def test_images_of_another_shape_are_pooled_on_their_own_grid(shape):
    grid, x = (shape[0] // 16, shape[1] // 16), torch.randn(2, 3, *shape)
    model = laconic.reduce_(make("plain", dynamic_img_size=True), SpatialPool(), keep=0.6, at=AT[:1])
    forward(model, x)
    stage = laconic.provenance(model).final
    assert stage.grid == grid
    place = arange_like(stage.where)
    expected, lead = cells(place, grid, stage.size.shape[1])
    assert torch.equal(stage.where, expected)
    assert torch.equal(stage.kept, lead)
    assert not torch.equal(expected, cells(place, grid[::-1], stage.size.shape[1])[0])


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_bat_pools_images_of_another_shape_on_their_own_grid(shape):
    config, x = BAT(merger="spatial-pool", clusters=3, pairs=0), torch.randn(2, 3, *shape)
    model = laconic.reduce_(make("plain", dynamic_img_size=True), config, keep=0.6, at=AT[:1])
    forward(model, x)
    stage = laconic.provenance(model).final
    count = stage.size.shape[1]
    for b in range(2):
        alone = stage.kept[b, : count - 3]
        rest = torch.tensor([[p for p in range(24) if p not in alone]])
        expected, _ = cells(rest, (shape[0] // 16, shape[1] // 16), 3)
        assert torch.equal(stage.where[b, rest[0]], expected[0] + count - 3)


def test_runs():
    group, first = runs(torch.zeros(2, 7), 3)
    assert group.tolist() == [[0, 0, 0, 1, 1, 2, 2]] * 2
    assert first.tolist() == [[0, 3, 5]] * 2
