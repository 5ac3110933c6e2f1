"""Methods that merge by matching: ToMe, PiToMe, ToFu, MCTF, DiffRate. Official outputs, and plain Python beside ours."""

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

import golden_init
import laconic
from families import AT, images, make
from laconic.core.attention import AttentionView
from laconic.core.half_limit import check_halves
from laconic.core.schedule import cumulative
from laconic.core.tokens import Tokens
from laconic.methods import diffrate
from laconic.methods.diffrate import MIN_ATTN_SCALE, DiffRateReducer
from laconic.methods.mctf import LEAST, LateMCTFReducer, MCTFReducer, fuse
from laconic.methods.ops import SCORES, as_in_0_1, by_parity, cosine, soft_matching
from laconic.methods.pitome import PiToMeReducer
from laconic.methods.tofu import ToFuReducer
from laconic.training.diffrate_search import SLOPE, Count, DiffRateSearch, search
from test_goldens import HERE, LOGITS, close, golden, picture, reduced

PAIRING = ("tome", "pitome", "tofu", "mctf")
CLOSE = dict(rtol=1e-5, atol=1e-5)
OPTIONS = {"pitome_0.9": ("pitome", dict(ratio=0.9)), "tofu_0.9": ("tofu", dict(ratio=0.9))}


def published(name="diffrate_0.8"):
    config = json.loads((HERE / f"{name}.json").read_text())["config"]
    return laconic.DiffRate(prune_kept=tuple(config["prune_kept"]), merge_kept=tuple(config["merge_kept"]))


def forward(model, x):
    with torch.no_grad():
        return model(x)


# ------------------------------------------------------------------------------------------------ goldens
@pytest.mark.parametrize("name", list(OPTIONS))
def test_official_merging(name):
    method, options = OPTIONS[name]
    z, model = golden(name), reduced(method, golden_init.crc32_v1, **options)
    close(forward(model, picture()), z["logits"], LOGITS)
    for k in range(12):
        stage, before = laconic.provenance(model).stages[k], model.laconic.entry(k)
        assert 1 + stage.size.shape[1] == z["tokens_after_block"][k]
        assignment = torch.from_numpy(z[f"assign_block{k}"])[:, 1:] - 1
        there = before.token_of_patch >= 0
        ours = assignment.gather(1, before.token_of_patch.clamp_min(0))
        # of a pruned token the official map says where it would have gone
        left = stage.where >= 0
        assert torch.equal(ours[left], stage.where[left])
        assert method == "tofu" or (there.all() and left.all())


def test_official_diffrate():
    z, model = golden("diffrate_0.8"), reduced(published(), golden_init.crc32_v1)
    close(forward(model, picture()), z["logits"], LOGITS)
    tokens = model.laconic.entry(12)
    assert [1 + n for n in model.laconic.counts(196)] == z["tokens_after_block"].tolist()
    close(tokens.attn_scale, z["final_size"][:, 1:], 1e-5)
    group = torch.from_numpy(z["final_group_of_input_token"])[:, 1:]
    assert torch.equal(torch.where(group < 0, -1, group - 1), tokens.token_of_patch)
    # the published cost leaves the matching out, and counts the class token at the patch embedding
    cost = laconic.summary(model)
    assert cost.macs - sum(row.reducer_macs for row in cost.blocks) + 3 * 16 * 16 * 192 == z["flops"].item()


def test_official_mctf():
    z, model = golden("mctf_r16_all"), reduced("mctf", golden_init.crc32_v1, r=16)
    close(forward(model, picture()), z["logits"], LOGITS)
    final = laconic.provenance(model).final
    assert [1 + n for n in model.laconic.counts(196)] == z["tokens_after_block"].tolist()
    assert torch.equal(final.where + 1, torch.from_numpy(z["final_group_of_input_token"])[:, 1:])
    close(F.pad(final.size, (1, 0), value=1.0), z["final_size"], 0)


# ------------------------------------------------------------------------------------------------ counts
@pytest.mark.parametrize(
    ("config", "keep", "counts"),
    [
        (laconic.PiToMe(ratio=0.9), None, [177, 160, 144, 130, 117, 106, 96, 87, 79, 72, 65, 59]),
        (laconic.ToFu(ratio=0.9), None, [177, 160, 144, 130, 117, 106, 96, 87, 79, 71, 64, 58]),
        (laconic.PiToMe(ratio=0.925), None, [182, 169, 157, 146, 136, 126, 117, 109, 101, 94, 87, 81]),
        (laconic.PiToMe(), 0.9, [196, 196, 196, 177, 177, 177, 160, 160, 160, 144, 144, 144]),
        (laconic.PiToMe(), 0.5, [196, 196, 196, 98, 98, 98, 49, 49, 49, 25, 25, 25]),
        (laconic.ToFu(), 0.7, [196, 196, 196, 137, 137, 137, 96, 96, 96, 67, 67, 67]),
        (laconic.ToMe(r=13), None, [196 - 13 * i for i in range(1, 13)]),
        (laconic.ToMe(r=16), None, [*(196 - 16 * i for i in range(1, 12)), 10]),
        # from 32 down to 0 in twelve steps
        (laconic.ToMe(r=(16, -1.0)), None, [164, 135, 109, 86, 66, 49, 35, 24, 16, 11, 9, 9]),
        (laconic.ToMe(r=(16, -1)), None, [164, 135, 109, 86, 66, 49, 35, 24, 16, 11, 9, 9]),
        (laconic.MCTF(r=16), None, [196, *(196 - 16 * i for i in range(1, 12))]),
        (laconic.MCTF(r=30), None, [196, 166, 136, 106, 76, 46, 23, 12, 9, 9, 9, 9]),
        (laconic.MCTF(r=tuple(range(11))), None, [196, 196, 195, 193, 190, 186, 181, 175, 168, 160, 151, 141]),
        (laconic.MCTF(), 0.65, [196, 196, 196, 128, 128, 128, 83, 83, 83, 54, 54, 54]),
        (laconic.ToMe(), 0.7, [196, 196, 196, 137, 137, 137, 96, 96, 96, 67, 67, 67]),
        (laconic.ToMe(), 0.5, [196, 196, 196, 98, 98, 98, 49, 49, 49, 25, 25, 25]),
        (laconic.ToMe(spread=True), 0.7, [196, 196, 196, 137, 137, 137, 96, 96, 96, 67, 67, 67]),
        (laconic.ToMe(spread=True), 0.3, [196, 196, 196, 107, 58, 58, 32, 17, 17, 9, 5, 5]),
        (laconic.ToMe(spread=True), [0.3, 1.0, 0.2], [196, 196, 196, 107, 58, 58, 58, 58, 58, 34, 20, 11]),
        (laconic.PiToMe(spread=True), 0.3, [196, 196, 196, 108, 60, 60, 33, 19, 19, 11, 7, 7]),
        (laconic.ToFu(spread=True), 0.3, [196, 196, 196, 107, 59, 59, 32, 18, 18, 10, 6, 6]),
        (laconic.MCTF(spread=True), 0.25, [196, 196, 196, 98, 49, 49, 25, 13, 13, 9, 9, 9]),
        (laconic.DiffRate(), 0.9, [196, 196, 196, 177, 177, 177, 160, 160, 160, 144, 144, 144]),
        (published(), None, [196, 195, 189, 171, 153, 124, 106, 95, 83, 77, 69, 2]),
    ],
    ids=str,
)
def test_counts(config, keep, counts):
    assert list(config.counts(config.default_schedule(12, keep, None), 12, 196)) == counts


def test_never_fewer_than_ten_tokens_unless_told():
    config = laconic.MCTF()
    assert config.num_kept([0.5], 10, 196) == LEAST
    assert config.num_kept([0.5], 5, 196) == 5
    assert config.counts(laconic.Schedule.keep_counts({1: 4}), 2, 8) == (8, 4)
    assert laconic.MCTF(r=4).counts(laconic.Schedule.remove_counts({0: 4}), 1, 6) == (6,)


# ------------------------------------------------------------------------------------------------ by hand
def slowly(model, x, reduce, proportional, blocks=AT):
    """A plain vision transformer, one image at a time; ``reduce(x, keys, size, b)`` gives new tokens as {old: weight}."""
    out = []
    for image in x:
        t, prefix = model._pos_embed(model.patch_embed(image[None]))[0], model.num_prefix_tokens
        size = torch.ones(len(t))
        for b, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv(block.norm1(t)).unflatten(1, (3, 3, 16)).permute(1, 2, 0, 3)
            logits = q @ k.transpose(1, 2) * 16**-0.5 + (size.log() if proportional else 0)
            t = t + block.attn.proj((logits.softmax(2) @ v).transpose(0, 1).flatten(1))
            if b in blocks:
                groups = reduce(t[prefix:], k[:, prefix:].mean(0), size[prefix:], b)
                t = torch.cat([t[:prefix], torch.stack([sum(w * t[prefix + i] for i, w in g.items()) for g in groups])])
                size = torch.cat([size[:prefix], torch.stack([sum(size[prefix + i] for i in g) for g in groups])])
            t = t + block.mlp(block.norm2(t))
        out.append(model.head(model.norm(t)[0]))
    return torch.stack(out)


def similar(keys, i, j):
    return torch.cosine_similarity(keys[i], keys[j], dim=0).item()


def matched(keys, a, b, r):
    """{token of a: its host in b} for the r best, by falling similarity."""
    pairs = [(max(b, key=lambda j: similar(keys, i, j)), i) for i in a]
    best = sorted(pairs, key=lambda p: -similar(keys, *p))[:r]
    return {i: j for j, i in best}


def by_size(groups, size):
    return [{i: size[i] / sum(size[j] for j in g) for i in g} for g in groups]


@pytest.mark.parametrize("proportional", [True, False])
def test_tome_by_hand(proportional):
    def reduce(x, keys, size, b):
        a, hosts = list(range(1, len(x), 2)), list(range(0, len(x), 2))  # the class token stands at 0
        went = matched(keys, a, hosts, 7)
        stay = [i for i in a if i not in went]
        return by_size([[i] for i in stay] + [[j, *(i for i, h in went.items() if h == j)] for j in hosts], size)

    model, x = make("plain"), images("plain")
    with torch.no_grad():
        expected = slowly(model, x, reduce, proportional)
    laconic.reduce_(model, "tome", r=7, at=AT, proportional=proportional)
    torch.testing.assert_close(forward(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("proportional", [True, False])
def test_pitome_by_hand(proportional):
    def reduce(x, keys, size, b):
        count, r = len(x), math.floor(len(x) - 0.7 * len(x))
        margin = 0.6 * (1 - b / 4)
        energy = [sum(F.elu(torch.tensor(similar(keys, i, j) - margin)).item() for j in range(count)) for i in range(count)]
        line = sorted(range(count), key=lambda i: -energy[i])
        line, protected = (line, []) if b < 2 else (line[: 2 * r], line[2 * r :])
        went = matched(keys, line[::2], line[1::2], r)
        protected += [i for i in line[::2] if i not in went]
        return by_size([[i] for i in protected] + [[j, *(i for i in went if went[i] == j)] for j in line[1::2]], size)

    model, x = make("plain"), images("plain")
    with torch.no_grad():
        expected = slowly(model, x, reduce, proportional)
    laconic.reduce_(model, "pitome", keep=0.7, at=AT, margin=0.6, proportional=proportional)
    torch.testing.assert_close(forward(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["host", "mean", "none"])
@pytest.mark.parametrize("switch", [0.25, 0.5, 1.0])
def test_tofu_by_hand(norm, switch):
    def reduce(x, keys, size, b):
        a, hosts = list(range(1, len(x), 2)), list(range(0, len(x), 2))
        went = matched(keys, a, hosts, math.floor(len(x) + 1 - 0.7 * (len(x) + 1)))
        groups = [[i] for i in a if i not in went]
        prune = b <= switch * 4
        groups += [[j, *(i for i in went if went[i] == j and not prune)] for j in hosts]
        out = []
        for g in groups:
            mean, longest = x[g].mean(0), x[g].norm(dim=1).max()
            factor = {"host": longest / x[g[0]].norm(), "mean": longest / mean.norm(), "none": 1.0}[norm]
            out.append({i: factor / len(g) for i in g})
        return out

    model, x = make("plain"), images("plain")
    with torch.no_grad():
        expected = slowly(model, x, reduce, False)
    laconic.reduce_(model, "tofu", keep=0.7, at=AT, switch=switch, norm=norm)
    torch.testing.assert_close(forward(model, x), expected, rtol=1e-4, atol=1e-4)
    dropped = laconic.provenance(model).final.where < 0
    assert dropped.any() == (switch >= 0.25)
    assert (laconic.provenance(model).stages[-1].where < 0).sum() == (laconic.provenance(model).stages[-2].where < 0).sum() or (
        switch == 1.0
    )


def some(batch=2, patches=20, channels=8, **more):
    return Tokens.start(torch.randn(batch, 1 + patches, channels), 1, True, **more)


def look(t, bias=None, heads=2):
    q, k, v = torch.randn(3, len(t.x), heads, t.x.shape[1], 4)
    return AttentionView(q, k, v, bias, 0.5, t.prefix, t.has_cls)


def equal(t):
    return t.replace(x=t.x[:, :1].expand_as(t.x).clone())


class Late(LateMCTFReducer):
    """Both of its moments in one."""

    def both(self, tokens, seen, n):
        return self.after(self.between(tokens, seen, n), n)


REDUCERS = {
    "pitome early": (PiToMeReducer(0.75, True, True), "between"),
    "pitome late": (PiToMeReducer(0.2, False, False), "between"),
    "tofu early": (ToFuReducer(True, "host"), "between"),
    "tofu late": (ToFuReducer(False, "host"), "between"),
    "tofu mean": (ToFuReducer(False, "mean"), "between"),
    "mctf": (MCTFReducer((1.0, 20.0, 40.0), "both"), "ahead"),
    "mctf late": (Late((1.0, 20.0, 40.0), "both"), "both"),
    "diffrate": (DiffRateReducer(SCORES["class"], None, 0.5), "between"),
}


@pytest.mark.parametrize("name", list(REDUCERS))
@pytest.mark.parametrize("n", [19, 13, 10])
def test_equal_tokens_are_a_fixed_point(name, n):
    reducer, moment = REDUCERS[name]
    t = equal(some())
    out = getattr(reducer, moment)(t, look(t), n)
    torch.testing.assert_close(out.x, t.x[:, : n + 1])


@pytest.mark.parametrize("name", list(REDUCERS))
def test_half_precision_stays(name):
    reducer, moment = REDUCERS[name]
    t = some()
    t = t.replace(x=t.x.to(torch.bfloat16))
    assert getattr(reducer, moment)(t, look(t), 12).x.dtype == torch.bfloat16


@pytest.mark.parametrize("prune_kept", [None, 20, 15, 12, 3])
@pytest.mark.parametrize("sizes", [False, True])
def test_diffrate_by_hand(prune_kept, sizes):
    t, n = some(), 12
    if sizes:
        t = t.replace(attn_scale=torch.rand(2, 20) * 3)
    seen = look(t)
    out = DiffRateReducer(SCORES["class"], prune_kept, 0.25).between(t, seen, n)
    p = 18 if prune_kept is None else max(n, prune_kept)  # a quarter of the eight that leave is pruned
    for b in range(2):
        line = sorted(range(20), key=lambda i: -seen.cls[b, i].item())
        head, tail = line[:n], line[n:p]
        groups, grown = {j: [j] for j in head}, {j: t.attn_scale[b, j].item() if sizes else 1.0 for j in head}
        for i in tail:
            c = {j: torch.cosine_similarity(t.patches[b, i], t.patches[b, j], dim=0).item() for j in head}
            host = max(head, key=c.__getitem__)
            groups[host].append(i)
            grown[host] += c[host] * (t.attn_scale[b, i].item() if sizes else 1.0)
        for new, j in enumerate(head):
            torch.testing.assert_close(out.patches[b, new], t.patches[b, groups[j]].mean(0), **CLOSE)
            assert all(out.token_of_patch[b, i] == new for i in groups[j])
            if tail:
                assert out.attn_scale[b, new].item() == pytest.approx(max(grown[j], MIN_ATTN_SCALE), rel=1e-4)
        assert all(out.token_of_patch[b, i] == -1 for i in line[p:])


def test_unlike_tokens_take_weight_away_but_never_all():
    t = some(patches=3, channels=2)
    t = t.replace(x=torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]]]).expand(2, -1, -1))
    seen = look(t)
    seen.k.zero_()  # equal attention: they stand in line as they are
    out = DiffRateReducer(SCORES["class"], None, 0.0).between(t, seen, 1)
    torch.testing.assert_close(out.attn_scale, torch.full((2, 1), MIN_ATTN_SCALE))
    torch.testing.assert_close(out.patches[:, 0], torch.tensor([[-2 / 3, 0.0]] * 2))
    assert torch.equal(out.size, torch.full((2, 1), 3.0))


def test_counts_above_what_there_is_do_nothing():
    """A schedule of all tokens is the model itself; a count that comes too high is passed over."""
    model, x = make("plain"), images("plain")
    expected = forward(model, x)
    laconic.reduce_(model, laconic.DiffRate(prune_kept=(37,) * 4, merge_kept=(99,) * 4))
    assert torch.equal(forward(model, x), expected)
    config = laconic.DiffRate(prune_kept=(37, 20, 30, 15), merge_kept=(37, 18, 25, 30))
    assert config.default_schedule(4, None, None) == laconic.Schedule.keep_counts({0: 36, 1: 17, 2: 24, 3: 14})
    laconic.reduce_(laconic.restore_(model), config)
    assert model.laconic.counts(36) == (36, 17, 17, 14)
    forward(model, x)
    stages = laconic.provenance(model).stages
    # block 1 prunes 17 and merges 2, block 2 does nothing, block 3 prunes 3 and merges none
    assert torch.equal((stages[-1].where >= 0).sum(1), stages[-1].size.sum(1).long())
    assert ((model.laconic.entry(2).token_of_patch < 0).sum(1) == 17).all()
    assert torch.equal(model.laconic.entry(2).token_of_patch, model.laconic.entry(3).token_of_patch)


def slow_match(x, received, size, r, tau, both):
    """MCTF's groups for one image, as old tokens, and the order they come out in."""
    a, b = list(range(1, len(x), 2)), list(range(0, len(x), 2))
    power = [1 / t if t else 0 for t in tau]

    def score(i, j):
        alike = ((torch.cosine_similarity(x[i], x[j], dim=0) + 1) / 2).item()
        return (
            alike ** power[0]
            * (1 / (received[i] * received[j])).item() ** power[1]
            * (1 / (size[i] * size[j])).item() ** power[2]
        )

    def best(sources, hosts, count):
        pairs = [(max(hosts, key=lambda j: score(i, j)), i) for i in sources]
        pairs.sort(key=lambda p: -score(p[1], p[0]))
        return {i: j for j, i in pairs[:count]}, [i for _, i in pairs[count:]]

    there, _ = best(a, b, r // 2 if both else r)
    stay_a = [i for i in a if i not in there]
    back, stay_b = best(b, stay_a, r - len(there)) if both else ({}, b)
    into = {i: back.get(j, j) for i, j in there.items()} | back
    return [[j, *(i for i in into if into[i] == j)] for j in stay_a + stay_b]


@pytest.mark.parametrize("direction", ["both", "one"])
@pytest.mark.parametrize("tau", [(1.0, 20.0, 40.0), (2.0, 1.0, 3.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("r", [1, 6, 7, 10])
def test_mctf_by_hand(direction, tau, r):
    t = some()
    t = t.replace(size=torch.randint(1, 5, (2, 20)).float())
    t = t.replace(attn_scale=t.size)
    seen = look(t, F.pad(t.attn_scale.log(), (1, 0))[:, None, None])
    out = MCTFReducer(tau, direction).ahead(t, seen, 20 - r)
    for b in range(2):
        received = seen.matrix[b].mean((0, 1))[1:]
        groups = slow_match(t.patches[b], received, t.size[b], r, tau, direction == "both")
        assert len(groups) == 20 - r
        matrix = torch.zeros(21 - r, 21)
        matrix[0, 0] = 1
        for new, g in enumerate(groups):
            assert all(out.token_of_patch[b, i] == new for i in g)
            weight = received[g] * t.size[b, g]
            matrix[1 + new, [1 + i for i in g]] = weight / weight.sum()
            assert out.attn_scale[b, new] == out.size[b, new] == t.size[b, g].sum()
        torch.testing.assert_close(out.x[b], matrix @ t.x[b], **CLOSE)
        torch.testing.assert_close(out.attention[b], matrix @ seen.matrix[b] @ (matrix > 0).float().T, **CLOSE)


def test_merged_attention_is_attention():
    attention = torch.randn(2, 3, 7, 7).softmax(-1)
    dst, weight = torch.tensor([[0, 1, 0, 2, 0]] * 2), torch.tensor([[0.5, 1.0, 0.2, 1.0, 0.3]] * 2)
    merged = fuse(attention, dst, weight, torch.tensor([[0, 1, 3]] * 2))
    assert merged.shape == (2, 3, 5, 5)
    torch.testing.assert_close(merged.sum(-1), torch.ones(2, 3, 5))
    assert torch.equal(merged[:, :, :2, :2], attention[:, :, :2, :2])  # prefix tokens keep to themselves
    torch.testing.assert_close(merged[:, :, 0, 2], attention[:, :, 0, [2, 4, 6]].sum(-1))
    torch.testing.assert_close(
        merged[:, :, 2, 3], 0.5 * attention[:, :, 2, 3] + 0.2 * attention[:, :, 4, 3] + 0.3 * attention[:, :, 6, 3]
    )


def test_mctf_looks_one_step_ahead():
    """The block of a merge uses attention of the unmerged tokens; without it the answer differs."""
    model, x = make("plain"), images("plain")
    laconic.reduce_(model, "mctf", keep=0.6, at=AT)
    answer = forward(model, x)
    for reducer in model.laconic.reducers.values():
        ahead = reducer.ahead
        reducer.ahead = lambda tokens, seen, n, ahead=ahead: ahead(tokens, seen, n).replace(attention=None)
    assert (forward(model, x) - answer).abs().max() > 1e-3
    assert model.laconic.entry(4).attention is None


@pytest.mark.parametrize("direction", ["both", "one"])
def test_mctf_without_looking_ahead_by_hand(direction):
    """Every block runs on what it is given, and then its tokens are merged by the attention that it has computed."""
    model, x, tau, answers = make("plain"), images("plain"), (1.0, 20.0, 40.0), []
    with torch.no_grad():
        for image in x:
            t = model._pos_embed(model.patch_embed(image[None]))[0]
            size = torch.ones(len(t))
            for b, block in enumerate(model.blocks):
                q, k, v = block.attn.qkv(block.norm1(t)).unflatten(1, (3, 3, 16)).permute(1, 2, 0, 3)
                weights = (q @ k.transpose(1, 2) * 16**-0.5 + size.log()).softmax(2)
                t = t + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
                t = t + block.mlp(block.norm2(t))
                if b in (1, 2):
                    received = weights.mean((0, 1))[1:]
                    groups = slow_match(t[1:], received, size[1:], 10, tau, direction == "both")
                    shares = [received[g] * size[1:][g] for g in groups]
                    new = [(s / s.sum()) @ t[1:][g] for s, g in zip(shares, groups, strict=True)]
                    t = torch.cat([t[:1], torch.stack(new)])
                    size = torch.cat([size[:1], torch.stack([size[1:][g].sum() for g in groups])])
            answers.append(model.head(model.norm(t)[0]))
    laconic.reduce_(model, "mctf", r=10, at=[1, 2], one_step_ahead=False, direction=direction)
    torch.testing.assert_close(forward(model, x), torch.stack(answers), rtol=1e-4, atol=1e-4)
    assert model.laconic.counts() == (36, 26, 16, 16)
    assert not model.laconic.entry(3).per_token


def test_the_cost_of_looking_ahead():
    ahead, late = (laconic.reduce_(make("plain"), "mctf", keep=0.6, one_step_ahead=way) for way in (True, False))
    ahead, late = laconic.summary(ahead, count=True), laconic.summary(late, count=True)
    assert ahead.tokens == late.tokens == (36, 22, 13, 9)
    assert [row.attention_tokens for row in ahead.blocks] == [row.mlp_tokens for row in ahead.blocks] == [37, 23, 14, 10]
    assert [row.attention_tokens for row in late.blocks] == [row.mlp_tokens for row in late.blocks] == [37, 37, 23, 14]
    assert [row.reducer_macs for row in late.blocks] == [0, 18 * 18 * 48, 11 * 11 * 48, 6 * 7 * 48]
    # the attention of the reducing blocks, read once more, is in no convention
    assert late.counted_macs - late.macs == 48 * (37**2 + 23**2 + 14**2)
    assert ahead.macs < late.macs < late.baseline_macs


# ------------------------------------------------------------------------------------------------ parts
def test_parity_counts_prefix_tokens():
    for prefix, even in ((0, [0, 2, 4]), (1, [1, 3]), (2, [0, 2, 4]), (5, [1, 3])):
        a, b = by_parity(Tokens.start(torch.zeros(1, prefix + 5, 2), prefix, prefix > 0))
        assert a[0].tolist() == even
        assert sorted(a[0].tolist() + b[0].tolist()) == list(range(5))


@pytest.mark.parametrize("order", ["sequence", "similarity"])
def test_soft_matching(order):
    t = some()
    a, b = by_parity(t)
    dst, stay = soft_matching(t.patches, a, b, 4, order)
    c = cosine(t.patches, t.patches)
    for image in range(2):
        best = {i: max(c[image, i, j].item() for j in b[image].tolist()) for i in a[image].tolist()}
        falling = sorted(best, key=lambda i: -best[i])
        assert stay[image].tolist() == (sorted(falling[4:]) if order == "sequence" else falling[4:]) + b[image].tolist()
        for i in falling[:4]:
            assert c[image, i, stay[image, dst[image, i]]].item() == pytest.approx(best[i])
        assert dst[image, stay[image]].tolist() == list(range(stay.shape[1]))


def test_ties_go_to_the_lower_index():
    t = equal(some())
    dst, stay = soft_matching(t.patches, *by_parity(t), 3)
    assert {1, 3, 5}.isdisjoint(stay[0].tolist())
    assert stay[0, dst[0, [1, 3, 5]]].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize("method", PAIRING)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(keep=0.49), r"keep=0.49 at block 1 is too low; the smallest rate is 0\.5, .*2 blocks .*spread=True"),
        (dict(keep=[0.6, 0.3, 0.7]), "keep=0.3 at block 2"),
        (
            dict(schedule=laconic.Schedule.keep_counts({1: 17})),
            "block 1 is to keep 17 of 36 tokens, and the smallest count there is 18",
        ),
        (dict(schedule=laconic.Schedule.keep_counts({1: 25, 3: 12})), "block 3 is to keep 12 of 25 .* there is 13"),
        (
            dict(keep=0.3, at=[1, 2], spread=True),
            "needs 2 consecutive blocks.* there is 1 before the next reducing block; keep 0.5 or more",
        ),
        (dict(keep=0.1, at=[2], spread=True), "needs 4 consecutive blocks.* there are 2 before the end; keep 0.25 or more"),
    ],
)
def test_less_than_half_in_one_block(method, given, message):
    model = make("plain")
    with pytest.raises(ValueError, match=message):
        laconic.reduce_(model, method, **given)
    assert not hasattr(model, "laconic")


@pytest.mark.parametrize("method", PAIRING)
def test_half_is_no_less_than_half(method):
    for schedule in (
        laconic.Schedule.rates(0.5, AT),
        laconic.Schedule.keep_counts({1: 18, 2: 9, 3: 9 if method == "mctf" else 5}),
    ):
        model = laconic.reduce_(make("plain"), method, schedule=schedule)
        assert model.laconic.counts() == (36, 18, 9, 9 if method == "mctf" else 5)
        forward(model, images("plain"))


def test_less_than_half_of_an_image_of_another_size():
    model = laconic.reduce_(make("plain", dynamic_img_size=True), "tome", schedule=laconic.Schedule.keep_counts({1: 20}))
    with pytest.raises(ValueError, match="block 1 is to keep 20 of 64"):
        forward(model, torch.randn(1, 3, 128, 128))
    assert forward(model, images("plain")).shape == (3, 10)


def test_a_schedule_that_is_set_later_is_refused_too():
    model = laconic.reduce_(make("plain"), "tome", keep=0.6)
    with pytest.raises(ValueError, match="keep=0.4 at block 1"):
        model.laconic.set_schedule(laconic.Schedule.rates(0.4, AT))
    assert model.laconic.schedule.values == (0.6,) * 3


@pytest.mark.parametrize("method", PAIRING)
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.45, 0.3, 0.25, 0.2, 0.125])
def test_spread_keeps_what_was_asked_for_in_steps_of_at_least_half(method, keep):
    config = laconic.methods()[method].config(spread=True)
    schedule = config.default_schedule(12, keep, None)
    steps = next(m for m in range(1, 4) if 0.5**m <= keep)
    assert schedule.at == tuple(site + step for site in (3, 6, 9) for step in range(steps))
    assert all(value >= 0.5 for value in schedule.values)
    for patches in (196, 576, 1000, 1369):
        counts = config.counts(schedule, 12, patches)
        check_halves(config, schedule, counts, patches)
        for stage, site in enumerate((3, 6, 9), 1):
            now, exact = counts[site + steps - 1], patches * keep**stage
            # the rounding of each step is less than a token; tome counts from the initial patches, so only the last one is left
            up = sum(keep ** (step / steps) for step in range(stage * steps)) if method != "tome" else 0.1
            assert exact - 1 < now < max(exact + up, LEAST + 1 if method == "mctf" else 0) + (keep == 0.5**steps)


@pytest.mark.parametrize("method", PAIRING)
def test_spread_models_run_and_say_what_they_leave(method, tmp_path):
    model, x = laconic.reduce_(make("plain", depth=6), method, keep=0.4, at=[1, 3], spread=True), images("plain")
    expected = forward(model, x)
    assert model.laconic.schedule.at == (1, 2, 3, 4)
    assert model.laconic.schedule.values == pytest.approx((0.4**0.5,) * 4)
    stages = laconic.provenance(model).stages
    assert [stage.block for stage in stages] == [1, 2, 3, 4]
    assert [stage.size.shape[1] for stage in stages] == list(model.laconic.counts()[1:5])
    laconic.save(model, tmp_path)
    record = json.loads((tmp_path / "laconic.json").read_text())
    assert record["schedule"] == {"at": [1, 2, 3, 4], "keep": list(model.laconic.schedule.values)}
    again = laconic.load(tmp_path)
    assert again.laconic.schedule == model.laconic.schedule
    assert torch.equal(forward(again, x), expected)


# ------------------------------------------------------------------------------------------------ models of version 0.1
def rule_of_0_1(method, rates, n, patches):
    least = n - n // 2
    if method == "tome":
        return max(int(patches * cumulative(rates)), least)
    if method == "mctf":
        return max(n - int((n + 1) * (1 - rates[-1]) + 1e-9), least, min(n, LEAST))
    total = n + (method == "tofu")
    return max(n - math.floor(total - rates[-1] * total), least)


@pytest.mark.parametrize("method", PAIRING)
def test_saved_rates_below_half_mean_what_they_did_in_0_1(method):
    draw = random.Random(0)
    config = laconic.methods()[method].config()
    for _ in range(200):
        rates = [draw.choice((0.1, 0.25, 0.3, 0.45, 0.5, 0.7, 0.9, 1.0)) for _ in AT]
        old, patches = laconic.Schedule.rates(rates, AT), draw.randint(2, 700)
        new = as_in_0_1(config, old)
        assert min(new.values) >= 0.5
        assert (new == old) == (min(rates) >= 0.5)
        expected = old.counts(4, patches, lambda *facts: rule_of_0_1(method, *facts))
        assert config.counts(new, 4, patches) == expected, (rates, patches)


@pytest.mark.parametrize(
    ("method", "record", "counts"),
    [
        ("tome", {"at": [1, 2, 3], "keep": [0.3, 0.3, 0.3]}, (36, 18, 9, 5)),
        ("tome", {"at": [1, 2, 3], "keep": [0.3, 0.9, 0.9]}, (36, 18, 9, 8)),
        ("pitome", {"at": [0, 1, 2, 3], "keep": [0.4, 0.4, 0.4, 0.4]}, (18, 9, 5, 3)),
        ("pitome", {"at": [0, 1, 2, 3], "keep": [0.9, 0.9, 0.9, 0.9]}, (33, 30, 27, 25)),
        ("tofu", {"at": [0, 1, 2, 3], "keep": [0.3, 0.3, 0.3, 0.3]}, (18, 9, 5, 3)),
        ("mctf", {"at": [1, 2, 3], "keep": [0.3, 0.3, 0.3]}, (36, 18, 9, 9)),
        ("tome", {"at": [1, 2], "remove": [30, 4]}, (36, 18, 14, 14)),
    ],
)
def test_models_of_0_1_are_loaded_as_they_were(method, record, counts, tmp_path):
    model, x = laconic.reduce_(make("plain"), method, keep=0.6), images("plain")
    laconic.save(model, tmp_path)
    saved = json.loads((tmp_path / "laconic.json").read_text())
    new = ("spread", "ratio", "one_step_ahead")
    options = {name: value for name, value in saved["method"]["options"].items() if name not in new}
    saved |= {"laconic": "0.1.0", "schedule": record, "method": {"name": method, "options": options}}
    (tmp_path / "laconic.json").write_text(json.dumps(saved))
    for again in (laconic.load(tmp_path), laconic.load(tmp_path, model=make("plain"))):
        assert again.laconic.counts() == counts
        forward(again, x)
        assert laconic.provenance(again).final.size.shape[1] == counts[-1]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tofu", dict(norm="max"), "tofu: norm must be one of"),
        ("mctf", dict(direction="up"), "mctf: direction must be one of"),
        ("mctf", dict(tau_info=-1.0), "tau_info must be 0 .off. or a positive temperature"),
        ("mctf", dict(r=(3, 4)), "2 values of r for 3 blocks"),
        ("diffrate", dict(score="value"), "diffrate: score must be one of"),
        ("diffrate", dict(pruned=1.5), "pruned must be a share"),
        ("diffrate", dict(merge_kept=(37, 1, 1, 1)), "merge_kept must count the class token"),
        ("diffrate", dict(prune_kept=(37, 30.5)), "prune_kept must be .* whole numbers"),
        ("diffrate", dict(merge_kept=(37, 30)), "2 in merge_kept for 4 blocks"),
        ("diffrate", dict(merge_kept=(37,) * 4, prune_kept=(37,) * 3), "3 counts in prune_kept and 4 in merge_kept"),
        ("diffrate", dict(prune_kept=(37, 30), keep=0.7), "prune_kept has 2 counts, none for block 2"),
        ("diffrate", dict(merge_kept=(37,) * 4, keep=0.7), "do not give keep or at"),
        ("diffrate", dict(merge_kept=(37,) * 4, at=AT), "do not give keep or at"),
        ("diffrate", dict(), "say how many tokens to keep"),
        ("mctf", dict(r=4, keep=0.5), "either r .* or keep"),
        ("tome", dict(r=4, spread=True), "spread is for keep rates, but r is given"),
        ("pitome", dict(ratio=0.9, keep=0.5), "either ratio .* or keep"),
        ("tofu", dict(ratio=0.9, spread=True), "spread is for keep rates, but ratio is given"),
        ("pitome", dict(ratio=0.3), "ratio must be the share of its tokens that a block keeps, from 0.5 to 1, not 0.3"),
        ("tofu", dict(ratio=1.2), "ratio must be the share of its tokens that a block keeps, from 0.5 to 1, not 1.2"),
    ],
)
def test_refusals(method, options, message):
    with pytest.raises(ValueError, match=message):
        laconic.reduce_(make("plain"), method, **options)


def test_where_they_work_by_default():
    for method, options in (("tome", dict(r=2)), ("pitome", dict(ratio=0.9)), ("tofu", dict(ratio=0.9)), ("mctf", dict(r=2))):
        assert laconic.reduce_(make("plain"), method, keep=0.9).laconic.schedule == laconic.Schedule.rates(0.9, AT)
        every = tuple(range(method == "mctf", 4))
        assert laconic.reduce_(make("plain"), method, **options).laconic.schedule.at == every
    assert laconic.reduce_(make("plain"), "mctf", r=3).laconic.schedule == laconic.Schedule.remove_counts({1: 3, 2: 3, 3: 3})
    for method, at in (("pitome", 3), ("tofu", 3)):
        deep = laconic.reduce_(make("plain", depth=7), method, ratio=0.9).laconic.reducers
        early = [r.early if method == "pitome" else r.prune for r in deep.values()]
        assert early == [True] * (at + 1) + [False] * (6 - at)
    margins = [r.margin for r in laconic.reduce_(make("plain"), "pitome", ratio=0.9).laconic.reducers.values()]
    assert margins == pytest.approx([0.75, 0.5625, 0.375, 0.1875])


# ------------------------------------------------------------------------------------------------ the search of DiffRate
def test_a_learned_count():
    count = Count(36, 4)
    assert count.candidates.tolist() == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    with torch.no_grad():
        count.logits.fill_(-99.0)[3:5] = 0.0
    number, stays = count()
    assert number.item() == 18
    assert stays.detach().tolist() == pytest.approx([1.0] * 18 + [0.0] * 18)
    # one more token within costs probability of the lower candidate: the gradient of a place is that of its probability
    (slope,) = torch.autograd.grad(stays[17], count.logits, retain_graph=True)
    assert slope[4].item() == pytest.approx(0.25)
    assert slope[3].item() == pytest.approx(-0.25)
    (slope,) = torch.autograd.grad(number, count.logits)
    assert slope[3:5].tolist() == pytest.approx([-1.0, 1.0])
    whole = Count(7, 3)
    assert whole.candidates.tolist() == [1, 4, 7]
    assert torch.equal(whole.logits.detach(), SLOPE * whole.candidates / 7)


@pytest.fixture
def toy():
    model, x = make("plain"), images("plain", 8)
    return model, x, forward(model, x).argmax(1)


def scatter_counts(run):
    """Counts that prune and merge something everywhere."""
    with torch.no_grad():
        for block, reducer in run.reducers.items():
            for count, target in ((reducer.prune, 34 - 6 * block), (reducer.merge, 31 - 6 * block)):
                count.logits.copy_(-(count.candidates - target).square())


def test_hiding_is_removing(toy, monkeypatch):
    """With the counts fixed the search computes what the reduced model does."""
    monkeypatch.setattr(diffrate, "MIN_ATTN_SCALE", 1.0)  # as in the search
    model, x, _ = toy
    run = DiffRateSearch(model, gmacs=0.004)
    scatter_counts(run)
    hidden, last = forward(model, x), model.laconic.entry(4)
    cost = run.cost().item()
    found = run.finish()
    assert found.merge_kept[1] < found.prune_kept[1] < 37
    assert all(a >= b for a, b in zip(found.merge_kept, found.merge_kept[1:], strict=False))
    laconic.reduce_(model, found)
    torch.testing.assert_close(forward(model, x), hidden, rtol=1e-4, atol=1e-4)
    removed = model.laconic.entry(4)
    assert torch.equal(last.token_of_patch < 0, removed.token_of_patch < 0)
    assert torch.equal((last.keep_mask > 0).sum(1), torch.full((8,), len(removed)))
    whole = laconic.summary(model)
    assert cost * 1e9 == pytest.approx(whole.macs - sum(row.reducer_macs for row in whole.blocks), rel=1e-5)


def test_every_count_learns(toy):
    model, x, labels = toy
    run = DiffRateSearch(model, gmacs=0.004, every=1)
    scatter_counts(run)
    F.cross_entropy(model(x), labels).backward()
    # what the last block does to patch tokens the class token does not see: there only the cost learns
    assert all(p.grad.abs().max() > 0 for block in (1, 2) for p in run.reducers[block].parameters())
    run.loss(x, labels).backward()
    assert all(p.grad.abs().max() > 0 for p in run.reducers[3].merge.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("laconic."))


def test_the_search_finds_its_cost_and_gives_the_model_back(toy):
    model, x, labels = toy
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, whole = forward(model, x), laconic.summary(model).macs / 1e9
    found = search(model, [(x, labels)] * 40, gmacs=0.7 * whole, lr=0.3, weight=20 / whole**2, every=2)
    assert torch.equal(forward(model, x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    laconic.reduce_(model, found)
    cost = laconic.summary(model)
    assert (cost.macs - sum(row.reducer_macs for row in cost.blocks)) / 1e9 == pytest.approx(0.7 * whole, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gmacs=9.0), "gmacs must be above 0 and below"),
        (dict(gmacs=0.0), "gmacs must be above 0 and below"),
        (dict(gmacs=0.004, weight=0.0), "weight must be positive"),
        (dict(gmacs=0.004, every=0), "every at least 1"),
    ],
)
def test_a_search_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DiffRateSearch(make("plain"), **options)
