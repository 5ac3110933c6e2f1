"""PVT and CvT: sizes, the ports in transformers, the authors' files, and blocks on fewer tokens than the grid has cells."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.optim import param_groups_layer_decay
from torch.utils.flop_counter import FlopCounterMode

import laconic
from families import fill
from laconic import api as attach
from laconic.analysis.macs import counted, estimate
from laconic.core.backbone import find_host
from laconic.core.grid import GridMap, cells_of, image_of
from laconic.core.tokens import Tokens
from laconic.methods import DTPS, dynamicvit
from laconic.methods.ops import topk_split
from laconic.models import cvt, pvt

SIZES = {
    "pvt_tiny": dict(img_size=96, depths=(1, 2, 2, 2), embed_dims=(16, 32, 40, 64), num_classes=10),
    "cvt_13": dict(img_size=96, depths=(1, 2, 4), embed_dims=(16, 24, 48), num_classes=10),
}
STEMS = {"pvt_tiny": "patch_embed1.proj", "cvt_13": "stage0.patch_embed.proj"}
BOTH = pytest.mark.parametrize("name", list(SIZES))


def small(name, **changes):
    torch.manual_seed(0)
    model = fill(timm.create_model(name, **{**SIZES[name], **changes}))
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(torch.randn_like(buffer) * 0.3)
        elif key.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def pictures(batch=2, size=96, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def block_of(name, stage):
    """A block of a stage (counted from 0), its width, the side of its grid and its prefix tokens."""
    model = small(name)
    if name == "pvt_tiny":
        return getattr(model, f"block{stage + 1}")[0], SIZES[name]["embed_dims"][stage], 24 >> stage, int(stage == 3)
    return model.stages[stage].blocks[0], SIZES[name]["embed_dims"][stage], 24 >> stage, int(stage == 2)


GRIDDED = [("pvt_tiny", 0), ("pvt_tiny", 1), ("pvt_tiny", 2), ("cvt_13", 0), ("cvt_13", 1), ("cvt_13", 2)]


def squeezed(patches, kept, batch=2, lost=0):
    """A map after a reduction: ``kept`` random patches stay, the others go to one of them, ``lost`` of them nowhere."""
    where, place = torch.empty(batch, patches, dtype=torch.long), torch.empty(batch, kept, dtype=torch.long)
    for b in range(batch):
        order = torch.randperm(patches)
        place[b] = order[:kept]
        where[b] = torch.randint(kept, (patches,))
        where[b, order[:kept]] = torch.arange(kept)
        where[b, order[patches - lost :]] = -1
    return GridMap(where, place)


# ---------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("pvt_tiny", 13.23, 1.933),
        ("pvt_small", 24.49, 3.816),
        ("pvt_medium", 44.21, 6.659),
        ("cvt_13", 20.00, 4.566),
        ("cvt_21", 31.62, 7.178),
    ],
)
def test_the_published_sizes(name, parameters, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter:
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    assert round(counter.get_total_flops() / 2e9, 3) == gmacs


# ---------------------------------------------------------------------------------------------------- transformers
@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def port_of(transformers, name, **changes):
    torch.manual_seed(0)
    sizes = dict(num_labels=10, **changes)
    if name == "pvt_tiny":
        config = transformers.PvtConfig(image_size=96, depths=[1, 2, 2, 2], hidden_sizes=[16, 32, 40, 64], **sizes)
        model = transformers.PvtForImageClassification(config)
    else:
        config = transformers.CvtConfig(depth=[1, 2, 4], embed_dim=[16, 24, 48], **sizes)
        model = transformers.CvtForImageClassification(config)
    model = fill(model)
    for key, buffer in model.named_buffers():
        if key.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def ours_of(port, name, **changes):
    model = timm.create_model(name, **{**SIZES[name], **changes}).eval()
    filtered = (pvt if name == "pvt_tiny" else cvt).checkpoint_filter(port.state_dict(), model)
    model.load_state_dict(filtered)
    return model


@BOTH
@torch.no_grad()
def test_the_ports_compute_the_same(transformers, name):
    port, x = port_of(transformers, name), pictures()
    ours = ours_of(port, name, **({"act": "gelu"} if name == "cvt_13" else {}))
    expected = port(x).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_authors_activation_is_not_the_ports(transformers):
    port, x = port_of(transformers, "cvt_13"), pictures()
    ours = ours_of(port, "cvt_13")
    assert isinstance(ours.stage0.blocks[0].mlp.act, QuickGELU)
    assert (ours(x) - port(x).logits).abs().max() > 1e-3


@torch.no_grad()
def test_the_port_fails_at_another_size_and_ours_resizes_its_tables(transformers):
    port, x = port_of(transformers, "pvt_tiny"), pictures(size=128)
    with pytest.raises(RuntimeError):
        port(x)
    ours = ours_of(port, "pvt_tiny")
    # a model made for that size gets its tables when the file is read: the same
    torch.testing.assert_close(ours(x), ours_of(port, "pvt_tiny", img_size=128)(x), atol=1e-6, rtol=1e-6)
    table = port.pvt.encoder.patch_embeddings[3].position_embeddings
    grid = F.interpolate(table[:, 1:].transpose(1, 2).view(1, 64, 3, 3), (4, 4), mode="bilinear", align_corners=False)
    expected = torch.cat([table[0, :1], grid[0].flatten(1).T])
    assert torch.equal(ours_of(port, "pvt_tiny", img_size=128).pos_embed4[0], expected)
    wide = torch.randn(1, 3, 64, 128)
    torch.testing.assert_close(ours(wide), ours_of(port, "pvt_tiny", img_size=(64, 128))(wide), atol=1e-6, rtol=1e-6)


def test_drop_path_grows_over_the_layers_of_the_last_stage(transformers):
    def rates(blocks):
        return [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks]

    ours = small("cvt_13", drop_path_rate=0.3)
    assert [rates(stage.blocks) for stage in ours.stages] == [[0], [0, 0], pytest.approx([0, 0.1, 0.2, 0.3])]
    port = port_of(transformers, "cvt_13", drop_path_rate=[0.0, 0.0, 0.3])
    assert rates(port.cvt.encoder.stages[2].layers) == pytest.approx([0.2] * 4)  # it takes the rate of the stage's number
    blocks = [b for stage in (1, 2, 3, 4) for b in getattr(small("pvt_tiny", drop_path_rate=0.6), f"block{stage}")]
    assert rates(blocks) == pytest.approx([0.1 * i for i in range(7)])


# ---------------------------------------------------------------------------------------------------- the grid
@pytest.mark.parametrize("lost", [0, 4])
def test_filling_by_hand(lost):
    grid = squeezed(12, 5, lost=lost)
    x, full = torch.randn(2, 5, 3), torch.randn(2, 12, 3)
    filled, own = grid.fill(x), grid.own(full)
    for b in range(2):
        for p in range(12):
            token = int(grid.where[b, p])
            assert torch.equal(filled[b, p], x[b, token] if token >= 0 else torch.zeros(3))
        for token in range(5):
            assert torch.equal(own[b, token], full[b, grid.place[b, token]])
    assert (grid.where < 0).sum() == 2 * lost


@pytest.mark.parametrize("tokens", [12, 14, 7])
def test_filling_in_training_by_hand(tokens):
    """As many tokens as cells; two appended ones that stand where others do; and fewer, after a reduction that was hard."""
    order = torch.stack([torch.randperm(12) for _ in range(2)])
    place = torch.arange(12).expand(2, 12) if tokens >= 12 else order[:, :tokens]
    place = torch.cat([place, torch.tensor([[3, 4], [5, 5]])], 1) if tokens == 14 else place
    where = torch.randint(-1, tokens, (2, 12))
    alive, x = torch.rand(2, tokens, requires_grad=True), torch.randn(2, tokens, 3)
    filled = GridMap(where, place, alive).fill(x)
    for b in range(2):
        for p in range(12):
            host = x[b, where[b, p]] if where[b, p] >= 0 else torch.zeros(3)
            here = (place[b] == p).nonzero().flatten().tolist()
            expected = alive[b, here[0]] * x[b, here[0]] + (1 - alive[b, here[0]]) * host if here else host
            torch.testing.assert_close(filled[b, p], expected)
    weight = torch.randn_like(filled)
    (gradient,) = torch.autograd.grad((filled * weight).sum(), alive)
    first = min(tokens, 12)
    expected = torch.stack(
        [
            torch.stack([((x[b, t] - (x[b, w] if w >= 0 else 0)) * weight[b, p]).sum() for t, p, w in cells])
            for b in range(2)
            for cells in [[(t, int(place[b, t]), int(where[b, place[b, t]])) for t in range(first)]]
        ]
    )
    torch.testing.assert_close(gradient[:, :first], expected)
    assert not gradient[:, first:].any()  # appended tokens stand where another one does


def test_the_map_follows_the_tokens():
    x = torch.randn(2, 17, 8)
    start = Tokens.start(x, prefix=1, has_cls=True)
    assert GridMap.of(start) is None
    kept = torch.stack([torch.randperm(16)[:9] for _ in range(2)])
    reduced = start.keep(kept)
    grid = GridMap.of(reduced)
    assert torch.equal(grid.own(x[:, 1:]), reduced.patches)
    assert torch.equal(grid.fill(reduced.patches).nonzero()[:, :2].unique(dim=0).shape[0] * torch.ones(()), torch.tensor(18.0))
    dst = torch.zeros(2, 16, dtype=torch.long)
    faded = start.soft_drop(torch.cat([torch.ones(2, 1), torch.zeros(2, 15)], 1), dst)
    soft = GridMap.of(faded)
    assert torch.equal(soft.fill(faded.patches), x[:, 1:2].expand(-1, 16, -1))
    assert torch.equal(soft.own(x[:, 1:]), x[:, 1:])


def test_tokens_of_another_batch_are_refused():
    grid = squeezed(12, 5)
    for shape in ((1, 5, 3), (2, 6, 3)):
        with pytest.raises(ValueError, match=r"is for \(2, 5\) \(images, patch tokens\), but got"):
            grid.fill(torch.randn(shape))


def test_images_and_cells():
    cells = torch.randn(2, 12, 5)
    image = image_of(cells, (3, 4))
    assert torch.equal(image[1, :, 2, 1], cells[1, 2 * 4 + 1])
    assert torch.equal(cells_of(image), cells)


# ---------------------------------------------------------------------------------------------------- blocks
@pytest.mark.parametrize(("name", "stage"), GRIDDED)
@torch.no_grad()
def test_a_map_in_which_nothing_has_moved_changes_nothing(name, stage):
    block, dim, side, prefix = block_of(name, stage)
    x = torch.randn(2, prefix + side * side, dim)
    everyone = torch.arange(side * side).expand(2, -1)
    plain = block(x, size=(side, side))
    assert torch.equal(block(x, size=(side, side), grid=GridMap(everyone, everyone)), plain)
    alive = torch.ones(2, side * side)
    assert torch.equal(block(x, size=(side, side), grid=GridMap(everyone, everyone, alive)), plain)


def normed(layer, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias


def attended(q, k, v, heads, scale):
    out = []
    for one, key, value in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
        out.append((one @ key.T * scale).softmax(-1) @ value)
    return torch.cat(out, -1)


def brute_pvt(attn, h, grid, b, side):
    """Attention of one image: its keys are sums over blocks of sr x sr cells."""
    full = torch.stack([h[w] if w >= 0 else torch.zeros_like(h[0]) for w in grid.where[b].tolist()]).view(side, side, -1)
    s, rows = attn.sr_ratio, []
    for i in range(side // s):
        for j in range(side // s):
            patch = full[i * s : (i + 1) * s, j * s : (j + 1) * s]
            rows.append(torch.einsum("ocyx,yxc->o", attn.sr.weight, patch) + attn.sr.bias)
    k, v = attn.kv(normed(attn.norm, torch.stack(rows))).chunk(2, -1)
    return attn.proj(attended(attn.q(h), k, v, attn.num_heads, (h.shape[1] // attn.num_heads) ** -0.5))


def brute_cvt(attn, h, grid, b, side):
    """Attention of one image: 3 x 3 sums around each token's own cell, and around every other cell for keys and values."""
    cls, body = h[: attn.prefix], h[attn.prefix :]
    full = {}
    for p, w in enumerate(grid.where[b].tolist()):
        full[p // side, p % side] = body[w] if w >= 0 else torch.zeros_like(body[0])

    def around(projection, i, j):
        total = 0
        for dy in range(3):
            for dx in range(3):
                if (i + dy - 1, j + dx - 1) in full:
                    total = total + projection.conv.weight[:, 0, dy, dx] * full[i + dy - 1, j + dx - 1]
        bn = projection.bn
        return (total - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias

    q = torch.stack([around(attn.conv_proj_q, p // side, p % side) for p in grid.place[b].tolist()])
    every = [(i, j) for i in range(0, side, 2) for j in range(0, side, 2)]
    k, v = (torch.stack([around(one, i, j) for i, j in every]) for one in (attn.conv_proj_k, attn.conv_proj_v))
    q, k, v = (torch.cat([cls, t]) for t in (q, k, v))
    return attn.proj(attended(attn.proj_q(q), attn.proj_k(k), attn.proj_v(v), attn.num_heads, h.shape[1] ** -0.5))


@pytest.mark.parametrize(("name", "stage"), [("pvt_tiny", 1), ("pvt_tiny", 2), ("cvt_13", 1), ("cvt_13", 2)])
@torch.no_grad()
def test_reduced_blocks_by_brute_force(name, stage):
    block, dim, side, prefix = block_of(name, stage)
    grid = squeezed(side * side, side * side // 3, lost=3)
    x = torch.randn(2, prefix + grid.place.shape[1], dim)
    out = block(x, size=(side, side), grid=grid)
    assert out.shape == x.shape
    for b in range(2):
        brute = brute_pvt if name == "pvt_tiny" else brute_cvt
        y = x[b] + brute(block.attn, normed(block.norm1, x[b]), grid, b, side)
        hidden = F.linear(normed(block.norm2, y), block.mlp.fc1.weight, block.mlp.fc1.bias)
        gate = torch.sigmoid(1.702 * hidden) if name == "cvt_13" else 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        y = y + F.linear(hidden * gate, block.mlp.fc2.weight, block.mlp.fc2.bias)
        torch.testing.assert_close(out[b], y, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("name", "stage"), [("pvt_tiny", 2), ("cvt_13", 2)])
def test_gradients_reach_the_soft_decisions_of_a_block(name, stage):
    block, dim, side, prefix = block_of(name, stage)
    everyone = torch.arange(side * side).expand(2, -1)
    alive = torch.ones(2, side * side, requires_grad=True)
    grid = GridMap(torch.zeros_like(everyone), everyone, alive)
    block(torch.randn(2, prefix + side * side, dim), size=(side, side), grid=grid).square().sum().backward()
    assert (alive.grad[:, 1:] != 0).all()
    assert not alive.grad[:, 0].any()  # where it stands and where it went are the same


@BOTH
@torch.no_grad()
def test_every_block_makes_one_call_of_fused_attention(name, monkeypatch):
    calls, real = [], F.scaled_dot_product_attention

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    small(name)(pictures())
    assert len(calls) == 7
    assert calls[-1][2] == (10 if name == "pvt_tiny" else 37)  # class token and patches


@BOTH
@torch.no_grad()
def test_blocks_may_be_replaced_by_ones_that_shorten_the_sequence(name):
    """Between the blocks of a stage nothing asks how many tokens there are."""
    model = small(name)
    blocks = model.block2 if name == "pvt_tiny" else model.stage1.blocks
    side = 12
    keep = torch.arange(0, side * side, 2).expand(2, -1)
    where = (torch.arange(side * side) // 2).expand(2, -1)
    grid, lengths = GridMap(where, keep), []

    def first(x, **kwargs):
        return type(blocks[0]).forward(blocks[0], x[:, ::2], **kwargs, grid=grid)

    def last(x, **kwargs):
        lengths.append(x.shape[1])
        return grid.fill(type(blocks[1]).forward(blocks[1], x, **kwargs, grid=grid))

    before = model(pictures())
    blocks[0].forward, blocks[1].forward = first, last
    after = model(pictures())
    assert lengths == [side * side // 2]
    assert after.shape == before.shape
    assert not torch.allclose(before, after)
    for block in blocks:
        del block.forward
    assert torch.equal(model(pictures()), before)
    final = model.block4 if name == "pvt_tiny" else model.stage2.blocks  # after the last stage nobody needs the grid
    final[-1].forward = lambda x, **kwargs: x[:, :4]
    assert model(pictures()).shape == before.shape


# ---------------------------------------------------------------------------------------------------- files
LAYOUT = {
    "pvt_tiny": {
        "patch_embed1.proj.weight": (64, 3, 4, 4),
        "patch_embed3.proj.weight": (320, 128, 2, 2),
        "patch_embed2.norm.bias": (128,),
        "pos_embed1": (1, 3136, 64),
        "pos_embed3": (1, 196, 320),
        "pos_embed4": (1, 50, 512),
        "cls_token": (1, 1, 512),
        "block1.0.attn.sr.weight": (64, 64, 8, 8),
        "block1.0.attn.norm.weight": (64,),
        "block1.1.mlp.fc1.weight": (512, 64),
        "block3.1.attn.kv.weight": (640, 320),
        "block4.1.attn.q.bias": (512,),
        "block4.0.attn.proj.weight": (512, 512),
        "block4.1.mlp.fc2.weight": (512, 2048),
        "block2.0.norm1.weight": (128,),
        "block2.0.norm2.weight": (128,),
        "norm.weight": (512,),
        "head.weight": (1000, 512),
    },
    "cvt_13": {
        "stage0.patch_embed.proj.weight": (64, 3, 7, 7),
        "stage2.patch_embed.proj.weight": (384, 192, 3, 3),
        "stage1.patch_embed.norm.bias": (192,),
        "stage2.cls_token": (1, 1, 384),
        "stage0.blocks.0.norm1.weight": (64,),
        "stage1.blocks.1.attn.conv_proj_q.conv.weight": (192, 1, 3, 3),
        "stage2.blocks.9.attn.conv_proj_k.bn.running_var": (384,),
        "stage2.blocks.9.attn.conv_proj_v.bn.num_batches_tracked": (),
        "stage2.blocks.0.attn.proj_q.weight": (384, 384),
        "stage2.blocks.0.attn.proj_v.bias": (384,),
        "stage2.blocks.0.attn.proj.weight": (384, 384),
        "stage2.blocks.0.mlp.fc1.weight": (1536, 384),
        "stage2.blocks.0.norm2.bias": (384,),
        "norm.weight": (384,),
        "head.weight": (1000, 384),
    },
}


@BOTH
def test_the_names_are_the_authors(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    state = model.state_dict()
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6 if name == "pvt_tiny" else 1e-5}
    assert {key: tuple(state[key].shape) for key in LAYOUT[name]} == LAYOUT[name]
    count = {"pvt_tiny": 2 * 4 * (12 + 2) + 2 * 3 * 4 + 4 * 5 + 5, "cvt_13": 13 * (4 + 3 * 6 + 8 + 4) + 3 * 4 + 5}[name]
    assert len(state) == count
    assert not [key for key in state if "attn.sr" in key and key.startswith("block4")]


@BOTH
def test_a_file_of_the_authors_is_read(name, tmp_path):
    model, x = small(name), pictures()
    file = tmp_path / "weights.pth"
    torch.save({"model": {f"module.{key}": tensor for key, tensor in model.state_dict().items()}, "epoch": 3}, file)

    def read(**changes):
        cfg = {"file": str(file), "num_classes": 10}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **{**SIZES[name], **changes}).eval()

    with torch.no_grad():
        assert torch.equal(read()(x), model(x))
        larger = read(img_size=128)
        torch.testing.assert_close(larger(pictures(size=128)), model(pictures(size=128)), atol=1e-6, rtol=1e-6)
        other = read(num_classes=4, in_chans=1)
        assert other(pictures(channels=1)).shape == (2, 4)
    assert other.get_submodule(STEMS[name]).weight.shape[1] == 1
    own = model.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in other.norm.state_dict(prefix="norm.").items())


def test_a_table_of_no_grid_is_refused():
    model = small("pvt_tiny")
    weights = {**model.state_dict(), "pos_embed2": torch.zeros(1, 7, 32)}
    with pytest.raises(ValueError, match="pos_embed2 has 7 positions, expected a square grid"):
        pvt.checkpoint_filter(weights, model)


# ---------------------------------------------------------------------------------------------------- timm's ways
@BOTH
def test_heads_as_timm_has_them(name):
    model, x = small(name), pictures()
    width = SIZES[name]["embed_dims"][-1]
    features = model.forward_features(x)
    assert features.shape == (2, 10 if name == "pvt_tiny" else 37, width)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
    assert torch.equal(model.get_classifier()(features[:, 0]), model(x))
    model.reset_classifier(3, "avg")
    assert model.num_classes == 3
    torch.testing.assert_close(model(x), model.head(features[:, 1:].mean(1)))
    model.reset_classifier(0, "token")
    assert torch.equal(model(x), features[:, 0])
    assert small(name, num_classes=0)(x).shape == (2, width)


@BOTH
def test_checkpointed_gradients_are_the_same(name):
    model, x = small(name).train(), pictures()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()

    def gradients():
        model.zero_grad()
        features = model.forward_features(x)  # the last queries of the patches reach no class token
        (features.square().sum() + model.forward_head(features).square().sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    assert all(g.abs().sum() > 0 for g in plain)
    model.set_grad_checkpointing()
    runs = []
    first = (model.block1 if name == "pvt_tiny" else model.stage0.blocks)[0]
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(plain, gradients(), strict=True))
    assert len(runs) == 2


@BOTH
def test_layerwise_learning_rates_fall_towards_the_image(name):
    model = small(name)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    order = {
        "pvt_tiny": "patch_embed1.proj block1.0.attn.q patch_embed2.proj block2.0.attn.q block2.1.attn.q block4.1.attn.q head",
        "cvt_13": "stage0.patch_embed.proj stage0.blocks.0.attn.proj stage1.patch_embed.proj stage1.blocks.0.attn.proj "
        "stage2.blocks.3.attn.proj head",
    }[name].split()
    rates = [scale[f"{key}.weight"] for key in order]
    assert rates == sorted(set(rates))
    token = "cls_token" if name == "pvt_tiny" else "stage2.cls_token"
    assert scale[token] == scale["patch_embed4.proj.weight" if name == "pvt_tiny" else "stage2.patch_embed.proj.weight"]
    assert token not in decayed
    assert "head.weight" in decayed


@pytest.mark.unchecked
def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match=r"at least 32 x 32 pixels, img_size is \(64, 16\)"):
        timm.create_model("pvt_tiny", img_size=(64, 16))
    with pytest.raises(ValueError, match="act must be one of 'quick_gelu', 'gelu', not 'relu'"):
        timm.create_model("cvt_13", act="relu")


# ---------------------------------------------------------------------------------------------------- reduction
PUBLISHED = [("pvt_tiny", 0.7, 1.94, 1.69, 0.623, 1.6894), ("cvt_13", 0.5, 4.58, 3.04, 0.724, 3.0406)]
PUBLISHED += [("pvt_small", 0.7, 3.83, 3.14, 0.623, 3.1353), ("cvt_21", 0.5, 7.21, 4.10, 0.724, 4.0969)]


@pytest.mark.parametrize(("name", "keep", "base", "table", "more", "gmacs"), PUBLISHED)
def test_the_rows_of_tps(name, keep, base, table, more, gmacs):
    """Table 5 of arXiv:2304.10716 counts as fvcore does: PVT 0.7 at the first blocks of three stages, CvT 0.5 at 2, 5, 8."""
    with torch.device("meta"):
        model = timm.create_model(name)
    before, plan = laconic.summary(model, convention="fvcore"), planned(model, keep)
    after = estimate(model, DTPS(), plan, "fvcore")
    assert round(before.macs / 1e9, 2) == base
    assert round(after.macs / 1e9, 2) == table
    assert round(after.macs / 1e9, 4) == gmacs
    assert round((after.parameters - before.parameters) / 1e6, 3) == more
    left = dict(zip(plan.at, [after.tokens[block] for block in plan.at], strict=True))
    assert list(left.values()) == ([548, 137, 34] if name.startswith("pvt") else [98, 49, 24])


def planned(model, keep):
    host, entry = find_host(model)
    return attach.planned(DTPS(), entry, host, keep)


@pytest.mark.parametrize("size", [96, (64, 128), 70])
@BOTH
def test_the_closed_form_is_what_torch_counts(name, size):
    model = small(name, img_size=size)
    assert laconic.summary(model).macs == counted(model)
    laconic.reduce_(model, "dynamicvit", keep=0.6)  # it drops: no merge that runs otherwise than it is counted
    assert laconic.summary(model).macs == counted(model)


def reduced(name, method="dtps", keep=0.6, at=None, **options):
    model = laconic.reduce_(small(name, **options), method, keep=keep, at=at)
    fill(model.laconic)
    return model


@BOTH
@torch.no_grad()
def test_keeping_all_changes_nothing_and_restoring_brings_all_back(name):
    model, x = small(name), pictures()
    expected, keys = model(x), list(model.state_dict())
    laconic.reduce_(model, "dtps", keep=1.0)
    assert torch.equal(model(x), expected)
    laconic.restore_(model)
    laconic.reduce_(model, "dtps", keep=0.5)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    laconic.restore_(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


@BOTH
@torch.no_grad()
def test_a_batch_is_as_its_images_alone(name):
    model, x = reduced(name), pictures(3)
    together = model(x)
    alone = torch.cat([model(image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


@BOTH
@torch.no_grad()
def test_a_stage_hands_on_its_full_grid(name):
    """The next patch embedding gets, at every cell, the token that the cell's patch was squeezed into."""
    model, seen = reduced(name, at=(1,), keep=0.3), []
    embed = model.patch_embed3 if name == "pvt_tiny" else model.stage2.patch_embed
    embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(pictures())
    cells = cells_of(seen[0])
    assert cells.shape[1] == 144
    tokens = model.laconic.entry(3)
    assert len(tokens) == int(0.3 * 144)
    for b in range(2):
        assert len(cells[b].unique(dim=0)) == len(tokens)
        for p, q in torch.randint(144, (200, 2)).tolist():
            assert torch.equal(cells[b, p], cells[b, q]) == bool(tokens.token_of_patch[b, p] == tokens.token_of_patch[b, q])


@pytest.mark.parametrize("method", ["dtps", "dynamicvit"])
@BOTH
@torch.no_grad()
def test_soft_training_agrees_with_removal(name, method, monkeypatch):
    """With the decisions of inference in its mouth, the training path gives the answer of the inference path."""
    model, x = reduced(name, method), pictures()
    expected = model(x)
    at = model.laconic.schedule.at
    counts = iter([model.laconic.entry(block + 1).size.shape[1] for block in at])
    dead = {}

    def decide(log_probs):
        score, n = log_probs[..., 0], next(counts)
        gone = dead.get(score.shape[1], torch.zeros_like(score, dtype=torch.bool))  # stages differ in their patches
        keep = torch.zeros_like(score).scatter(1, topk_split(score.masked_fill(gone, -99.0), n)[0], 1.0)
        dead[score.shape[1]] = keep == 0
        return keep

    monkeypatch.setattr(dynamicvit, "gumbel_keep", decide)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    assert len(model.laconic.entry(at[-1] + 1)) == (9 if name == "pvt_tiny" else 36)
    assert (model.laconic.entry(at[0] + 1).keep_mask.sum(1) < (144 if name == "pvt_tiny" else 36)).all()


@pytest.mark.parametrize("checkpointing", [False, True])
@BOTH
def test_training_reaches_every_scorer(name, checkpointing):
    model = reduced(name).train()
    model.set_grad_checkpointing(checkpointing)
    (model(pictures()).square().sum() + sum(laconic.losses(model).values())).backward()
    for reducer in model.laconic.reducers.values():
        gradients = [p.grad for p in reducer.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert sum(g.abs().sum() for g in gradients) > 0
    assert model.get_submodule(STEMS[name]).weight.grad.abs().sum() > 0


@pytest.mark.unchecked
@torch.no_grad()
def test_methods_that_look_at_attention_need_keys_that_are_tokens():
    for name, method, at in (("pvt_tiny", "tome", 3), ("cvt_13", "topk", 4), ("cvt_13", "tome", 0)):
        with pytest.raises(LookupError, match="keys of this block are cells of its grid, not its"):
            laconic.reduce_(small(name), method, keep=0.5, at=[at])
    model = laconic.reduce_(small("pvt_tiny"), "topk", keep=0.5, at=[5])  # the last stage of PVT is a plain one
    assert model(pictures()).shape == (2, 10)
    assert len(model.laconic.entry(7)) == 5


@BOTH
@torch.no_grad()
def test_a_reduced_model_is_saved_and_loaded(name, tmp_path):
    model, x = reduced(name), pictures()
    sizes = {key: value for key, value in SIZES[name].items() if key in ("depths", "embed_dims")}
    laconic.save(model, tmp_path, model_args=sizes)
    again = laconic.load(tmp_path)
    assert torch.equal(again(x), model(x))


@pytest.mark.slow
@pytest.mark.unchecked
@BOTH
@torch.no_grad()
def test_a_reduced_model_compiles_into_one_graph(name):
    model, x = reduced(name), pictures()
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
