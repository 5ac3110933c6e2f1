"""LV-ViT and PS-ViT: the sizes of the papers, the authors' files, and what is unusual about each."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import laconic
import laconic.models
from families import EVERY, fill
from laconic.analysis.macs import estimate, summary
from laconic.core.attention import AttentionTap
from laconic.core.backbone import HOSTS
from laconic.core.history import find, mark
from laconic.core.tokens import Tokens
from laconic.methods import BAT, DTPS, ETPS, EViT
from laconic.models.block import Block
from laconic.models.lvvit import checkpoint_filter_fn as lvvit_filter
from laconic.models.mixtoken import Box
from laconic.models.psvit import checkpoint_filter_fn as psvit_filter
from laconic.models.sampling import sample, start_points

SMALL = {
    "lvvit_small": dict(img_size=96, embed_dim=48, depth=4, num_heads=3, stem_width=8, num_classes=10),
    "psvit_base_14": dict(img_size=48, embed_dim=48, depth=4, num_heads=3, stem_width=16, grid_size=6, num_classes=10),
}
NAMES = sorted(SMALL)
# millions of parameters, GMACs: products alone, and with norms as fvcore counts them
PUBLISHED = {
    "lvvit_tiny": (8.535, 2.868, 2.879),
    "lvvit_small": (26.152, 6.551, 6.569),
    "lvvit_medium": (55.831, 12.678, None),
    "psvit_tiny_14": (4.778, 1.565, None),
    "psvit_base_14": (21.344, 5.380, 5.402),
    "psvit_base_16": (21.344, 6.911, None),
    "psvit_base_18": (21.344, 8.741, None),
}


def make(name, **changes):
    torch.manual_seed(0)
    return fill(timm.create_model(name, **{**SMALL[name], **changes}).eval())


def images(name, batch=3):
    size = SMALL[name]["img_size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def on_meta(name, **changes):
    with torch.device("meta"):
        return timm.create_model(name, **changes).eval()


# ---------------------------------------------------------------------------------------------------- published sizes
@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_the_papers(name):
    model = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    parameters, macs, with_norms = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=5e-4)
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, abs=6e-4)
    assert estimate(model).macs == counter.get_total_flops() // 2
    if with_norms:
        assert estimate(model, convention="fvcore").macs / 1e9 == pytest.approx(with_norms, abs=5e-4)


def test_what_changes_the_size_of_lvvit():
    tps = on_meta("lvvit_small", qkv_bias=True)
    assert sum(p.numel() for p in tps.parameters()) / 1e6 == pytest.approx(26.170, abs=5e-4)
    assert estimate(on_meta("lvvit_small", global_pool="token")).macs / 1e9 == pytest.approx(6.476, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "config", "keep", "at", "convention", "macs"),
    [
        ("lvvit_small", DTPS(), 0.5, (4, 8, 12), "fvcore", 3.81),
        ("lvvit_tiny", DTPS(), 0.5, (3, 6, 9), "fvcore", 2.00),
        ("lvvit_small", ETPS(), 0.5, (4, 8, 12), "matmul", 3.85),
        ("lvvit_small", EViT(), 0.7, (4, 8, 12), "fvcore", 4.72),
        ("lvvit_small", EViT(), 0.7, (3, 7, 11), "fvcore", 4.51),
        ("psvit_base_14", DTPS(), 0.5, (2, 5, 8), "fvcore", 3.69),
    ],
    ids=lambda value: value.info.name if hasattr(value, "row") else str(value),
)
def test_reduced_rows_of_the_papers(name, config, keep, at, convention, macs):
    model = on_meta(name)
    cost = estimate(model, config, config.default_schedule(len(model.blocks), keep, at), convention)
    assert cost.macs / 1e9 == pytest.approx(macs, abs=5.5e-3)
    scorers = 0.724e6 if config.info.learns else 0
    if name != "lvvit_tiny":
        assert cost.parameters - sum(p.numel() for p in model.parameters()) == pytest.approx(scorers, abs=5e2)


def test_bat_on_lvvit_prints_as_in_its_table():
    model = on_meta("lvvit_small")
    macs = estimate(model, BAT(), BAT().default_schedule(16, 0.7, (4, 8, 12)), "torchprofile").macs
    assert f"{macs / 1e9:.1f}" == "4.7"


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_is_what_torch_counts(name):
    cost = summary(make(name), count=True)
    assert cost.macs == cost.counted_macs
    reduced = laconic.reduce_(make(name), "topk", keep=0.5, at=(1, 2))
    cost = summary(reduced, count=True)
    assert cost.macs == cost.counted_macs < cost.baseline_macs


# ---------------------------------------------------------------------------------------------------- one block
@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_a_block_divides_what_it_adds(divisor):
    torch.manual_seed(0)
    block = fill(Block(24, 2, divisor=divisor, qkv_bias=True, scale=0.31))
    x = torch.randn(2, 5, 24)
    q, k, v = (part.view(2, 5, 2, 12).transpose(1, 2) for part in block.attn.qkv(block.norm1(x)).chunk(3, -1))
    added = block.attn.proj(((q * 0.31) @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
    half = x + added / divisor
    expected = half + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(half)))) / divisor
    torch.testing.assert_close(block(x), expected)
    assert (block.norm1.eps, block.mlp.fc1.out_features) == (1e-5, 72)


def test_drop_path_comes_before_the_division():
    """Of a kept branch: branch / (1 - rate) / divisor."""
    torch.manual_seed(0)
    block = fill(Block(24, 2, divisor=2.0, drop_path=0.5)).train()
    x = torch.randn(64, 3, 24)
    got = block(x)
    half = [x, x + block.attn(block.norm1(x))]  # 1 / 0.5 / 2 = 1
    allowed = torch.stack([y for h in half for y in (h, h + block.mlp(block.norm2(h)))])
    closest = (allowed - got).abs().amax((2, 3)).min(0)
    assert closest.values.max() < 1e-5
    assert closest.indices.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "scale"), [("psvit_base_14", 48**-0.5), ("lvvit_small", 16**-0.5)])
def test_attention_is_scaled_by_the_width_in_psvit(name, scale):
    calls = []
    with AttentionTap(calls):
        make(name)(images(name))
    assert len(calls) == {"psvit_base_14": 8, "lvvit_small": 4}[name]
    assert [call["scale"] for call in calls] == [scale] * len(calls)
    with AttentionTap(calls := []):
        make(name, scale=0.2)(images(name))
    assert {call["scale"] for call in calls} == {0.2}


# ---------------------------------------------------------------------------------------------------- the authors' files
def as_published(name, weights):
    """The names of the authors for a small model's weights, as in their checkpoints."""
    if name == "lvvit_small":
        return dict(weights)
    out = {"point_coord": torch.zeros(1, 36, 2)}
    for key, tensor in weights.items():
        part, _, rest = key.removeprefix("patch_embed.").partition(".")
        if key.startswith("blocks."):
            out[f"trans_layers.{rest}"] = tensor
        elif part == "layers":
            index, _, inner = rest.partition(".")
            out[f"ps_layers.{index}.transformer_layer.{inner}"] = tensor
        elif part == "offsets":
            index, _, inner = rest.partition(".")
            out[f"ps_layers.{index}.offset_layer.{inner}"] = tensor
        elif part == "pos_layer":
            out |= {f"pos_layer.{rest}": tensor, **{f"ps_layers.{i}.position_layer.{rest}": tensor for i in range(4)}}
        else:
            out[key.removeprefix("patch_embed.")] = tensor
    return out


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_authors_files(name):
    names = as_published(name, make(name).state_dict())
    stem = {"lvvit_small": ["patch_embed.conv1.weight", "patch_embed.bn3.running_var", "patch_embed.proj.bias"]}
    stem["psvit_base_14"] = ["stem.0.weight", "stem.1.bias", "stem.4.conv1.weight", "stem.5.downsample.1.weight"]
    blocks = {"lvvit_small": "blocks.3", "psvit_base_14": "trans_layers.3"}[name]
    layers = ["norm1.weight", "attn.qkv.weight", "attn.proj.bias", "norm2.bias", "mlp.fc1.weight", "mlp.fc2.bias"]
    assert {"cls_token", "norm.weight", "head.bias", *stem[name], *(f"{blocks}.{layer}" for layer in layers)} <= set(names)
    assert f"{blocks}.attn.qkv.bias" not in names
    other = {"lvvit_small": "aux_head.weight", "psvit_base_14": "ps_layers.2.offset_layer.bias"}
    assert other[name] in names
    assert "ps_layers.3.offset_layer.bias" not in names


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "module", "ema"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_the_authors_layout_is_read(name, wrap, tmp_path):
    source = make(name)
    weights = as_published(name, source.state_dict())
    prefixed = {f"module.{key}": tensor for key, tensor in weights.items()}
    content = {
        "plain": weights,
        "state_dict": {"state_dict": weights, "epoch": 3},
        "module": {"state_dict": prefixed},
        "ema": {"state_dict": {key: torch.zeros_like(tensor) for key, tensor in weights.items()}, "state_dict_ema": prefixed},
    }[wrap]
    file = tmp_path / "weights.pth.tar"
    torch.save(content, file)
    overlay = dict(file=str(file), num_classes=10)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL[name]).eval()
    assert torch.equal(model(images(name)), source(images(name)))
    # without timm in between, too
    again = {"lvvit_small": lvvit_filter, "psvit_base_14": psvit_filter}[name](content, model)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_reading_is_strict(name, tmp_path):
    weights = as_published(name, make(name).state_dict())
    key = next(key for key in weights if key.endswith("2.attn.proj.weight"))
    file = tmp_path / "weights.pth"
    overlay = dict(file=str(file), num_classes=10)
    for broken in ({**weights, "extra.weight": torch.zeros(1)}, {k: v for k, v in weights.items() if k != key}):
        torch.save(broken, file)
        with pytest.raises(RuntimeError, match="extra.weight|attn.proj.weight"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL[name])


def test_the_shared_position_layer_may_be_saved_once():
    weights = as_published("psvit_base_14", make("psvit_base_14").state_dict())
    for gone in ("pos_layer", *(f"ps_layers.{i}.position_layer" for i in (0, 1, 3))):
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith(f"{gone}.")}
    model = make("psvit_base_14")
    model.load_state_dict(psvit_filter(weights, model), strict=True)


def test_weights_for_other_points_are_refused():
    model = make("psvit_base_14", grid_size=5)
    with pytest.raises(ValueError, match="sample 36 points, but the model has a grid of 5 x 5"):
        psvit_filter(as_published("psvit_base_14", model.state_dict()), model)


def test_other_classes_and_channels_start_the_heads_anew(tmp_path):
    source = make("lvvit_small")
    file = tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    changes = {**SMALL["lvvit_small"], "num_classes": 4, "in_chans": 1}
    overlay = dict(file=str(file), num_classes=10)
    model = timm.create_model("lvvit_small", pretrained=True, pretrained_cfg_overlay=overlay, **changes).eval()
    assert model(images("lvvit_small")[:, :1]).shape == (3, 4)
    assert model.aux_head.weight.shape == (4, 48)
    assert torch.equal(model.blocks[2].attn.qkv.weight, source.blocks[2].attn.qkv.weight)


@pytest.mark.parametrize("size", [64, (128, 96)])
def test_positions_are_resized_bicubically(size):
    source, model = make("lvvit_small"), make("lvvit_small", img_size=size)
    grid = model.patch_embed.grid_size
    resized = lvvit_filter(source.state_dict(), model)["pos_embed"]
    table = source.pos_embed.detach()
    expected = F.interpolate(table[:, 1:].view(1, 6, 6, -1).permute(0, 3, 1, 2), size=grid, mode="bicubic")
    assert torch.equal(resized[:, 0], table[:, 0])
    torch.testing.assert_close(resized[:, 1:], expected.flatten(2).transpose(1, 2))
    model.load_state_dict(lvvit_filter(source.state_dict(), model), strict=True)


# ---------------------------------------------------------------------------------------------------- LV-ViT's answer
def test_the_answer_is_the_class_token_and_half_the_highest_of_the_tokens():
    model = make("lvvit_small")
    tokens = model.forward_features(images("lvvit_small"))
    one_by_one = torch.stack([model.aux_head(tokens[:, i]) for i in range(1, tokens.shape[1])])
    expected = model.head(tokens[:, 0]) + 0.5 * one_by_one.max(0).values
    torch.testing.assert_close(model.forward_head(tokens), expected)
    torch.testing.assert_close(model(images("lvvit_small")), expected)
    torch.testing.assert_close(model.train().forward_head(tokens), expected)  # in training the same tensor
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(36)])
    torch.testing.assert_close(model.forward_head(tokens[:, order]), expected)


def test_the_highest_is_of_the_tokens_left():
    model = make("lvvit_small")
    logits, token_logits = torch.randn(2, 10), torch.randn(2, 5, 10)
    alive = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    expected = logits.clone()
    expected[0] += 0.5 * token_logits[0, [0, 2]].amax(0)
    expected[1] += 0.5 * token_logits[1, 4]
    torch.testing.assert_close(model.combine(logits, token_logits, alive), expected)
    hidden = token_logits.masked_fill((alive == 0).unsqueeze(-1), -torch.inf)
    torch.testing.assert_close(model.combine(logits, hidden), expected)
    for nobody in (model.combine(logits, token_logits, torch.zeros(2, 5)), model.combine(logits, token_logits[:, :0])):
        assert torch.equal(nobody, logits)


def test_a_reduced_lvvit_reads_the_tokens_it_left():
    model = laconic.reduce_(make("lvvit_small"), "topk", keep=0.5, at=(1, 3))
    answer = model(images("lvvit_small"))
    tokens = model.forward_features(images("lvvit_small"))
    assert tokens.shape == (3, 10, 48)
    expected = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1)
    torch.testing.assert_close(answer, expected)


def test_softly_removed_tokens_are_not_read():
    """In training they are all still there; what they say must not change the answer."""
    model = laconic.reduce_(make("lvvit_small"), "dtps", keep=0.5, at=(1, 2)).train()
    tokens = model.forward_features(images("lvvit_small"))
    entry: Tokens = model.laconic.entry(4)
    assert tokens.shape[1] == 37
    assert 0 < entry.keep_mask.sum() < entry.keep_mask.numel()
    there = entry.keep_mask.detach() > 0
    answer = model.forward_head(tokens)
    noise = torch.cat([torch.zeros(3, 1), (~there).float()], 1).unsqueeze(-1) * torch.randn(tokens.shape) * 100
    noisy = tokens + noise
    with pytest.raises(ValueError, match="come from no known forward"):
        model.forward_head(noisy)
    mark(noisy, find(tokens))
    torch.testing.assert_close(model.forward_head(noisy), answer)
    for b in range(3):
        highest = model.aux_head(tokens[b, 1:][there[b]]).amax(0)
        torch.testing.assert_close(answer[b], model.head(tokens[b, 0]) + 0.5 * highest)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_other_poolings_use_one_head(pool):
    for name in NAMES:
        model = make(name, global_pool=pool)
        tokens = model.forward_features(images(name))
        read = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
        torch.testing.assert_close(model.forward_head(tokens), model.head(read))
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), read)


# ---------------------------------------------------------------------------------------------------- MixToken
def test_a_box_is_cutmix():
    torch.manual_seed(0)
    boxes = [Box.random((14, 10), 1.0) for _ in range(2000)]
    assert all(0 <= b.top <= b.bottom <= 14 and 0 <= b.left <= b.right <= 10 for b in boxes)
    share = torch.tensor([b.share((14, 10)) for b in boxes])
    assert share.min() == 0
    assert share.max() > 0.6
    assert 0.2 < share.mean() < 0.4  # 1/2, if nothing were cut off at the border
    assert Box(2, 1, 5, 3).share((14, 10)) == 6 / 140
    centre = torch.tensor([(b.top + b.bottom) / 2 for b in boxes if b.bottom - b.top == 2])
    assert centre.min() <= 2
    assert centre.max() >= 12


@pytest.mark.parametrize("batch", [4, 5])
def test_mixing_twice_is_mixing_not_at_all(batch):
    tokens, box = torch.randn(batch, 12, 7), Box(1, 0, 3, 2)
    mixed = box.exchange(tokens, (4, 3))
    assert torch.equal(box.exchange(mixed, (4, 3)), tokens)
    for patch in range(12):
        inside = patch // 3 in (1, 2) and patch % 3 in (0, 1)
        assert torch.equal(mixed[:, patch], tokens.flip(0)[:, patch] if inside else tokens[:, patch])
    assert torch.equal(Box().exchange(tokens, (4, 3)), tokens)


def test_mixtoken_is_undone_on_the_token_logits(monkeypatch):
    """Without blocks no token sees another, so the logits must be those of images that were never mixed."""
    box = Box(1, 2, 4, 6)
    monkeypatch.setattr(Box, "random", classmethod(lambda cls, grid, beta: box))
    mixing = make("lvvit_small", return_dense=True, mix_token=1.0, depth=0).train()
    plain = make("lvvit_small", return_dense=True, depth=0).train()
    x = images("lvvit_small", 4)
    mixed, expected = mixing(x), plain(x)
    assert torch.equal(mixed.token_logits, expected.token_logits)
    assert (mixed.box, expected.box) == (box, Box())
    # and what went through the blocks was mixed: other images' patches are inside the box
    seen = mixing.forward_features(x, box)[:, 1:].unflatten(1, (6, 6))
    alone = mixing.forward_features(x)[:, 1:].unflatten(1, (6, 6))
    assert torch.equal(seen[:, 1:4, 2:6], alone.flip(0)[:, 1:4, 2:6])
    assert torch.equal(seen[:, 4:], alone[:, 4:])


def test_dense_training_gives_logits_of_every_patch():
    model = make("lvvit_small", return_dense=True, mix_token=1.0).train()
    torch.manual_seed(3)
    logits, token_logits, box = model(images("lvvit_small"))
    assert (logits.shape, token_logits.shape, len(box)) == ((3, 10), (3, 36, 10), 4)
    (logits.sum() + token_logits.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(images("lvvit_small")).shape == (3, 10)


def test_mixed_images_need_all_their_tokens():
    model = make("lvvit_small", return_dense=True, mix_token=1.0)
    laconic.reduce_(model, "topk", keep=0.5, at=(1,)).train()
    with pytest.raises(ValueError, match="MixToken is undone on all 36 patch tokens, but a method kept 18"):
        model(images("lvvit_small"))
    model.mix_token = 0.0
    assert model(images("lvvit_small")).token_logits.shape == (3, 18, 10)


# ---------------------------------------------------------------------------------------------------- PS-ViT's sampling
def test_start_points_are_cell_centres_column_by_column():
    points = start_points((14, 14), (56, 56))
    assert points[:3].tolist() == [[2, 2], [6, 2], [10, 2]]
    assert points[14].tolist() == [2, 6]
    assert points[-1].tolist() == [54, 54]
    assert start_points((2, 3), (8, 9)).tolist() == [[2, 1.5], [6, 1.5], [2, 4.5], [6, 4.5], [2, 7.5], [6, 7.5]]
    assert start_points((16, 16), (56, 56))[:2, 0].tolist() == [1.75, 5.25]


def by_hand(maps, y, x):
    """The value between four pixels; pixels outside are zero."""
    height, width = maps.shape[-2:]
    out = torch.zeros(maps.shape[0])
    top, left = int(y // 1), int(x // 1)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < height and 0 <= column < width:
            out += maps[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return out


def test_sampling_is_bilinear_in_pixels_and_zero_outside():
    torch.manual_seed(0)
    maps, points = torch.randn(2, 3, 5, 7), torch.rand(2, 40, 2) * torch.tensor([8.0, 10.0]) - 2
    points[:, 0], points[:, 1] = torch.tensor([4.0, 6.0]), torch.tensor([2.0, 3.0])
    expected = torch.stack([torch.stack([by_hand(m, *p.tolist()) for p in ps]) for m, ps in zip(maps, points, strict=True)])
    torch.testing.assert_close(sample(maps, points), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sample(maps, points)[:, 1], maps[:, :, 2, 3])


def test_points_are_exact_whatever_the_precision():
    ramp = (torch.arange(56.0) - 37).view(1, 1, 56, 1).expand(1, 1, 56, 56).to(torch.bfloat16)
    found = sample(ramp, torch.tensor([[[37.3, 20.0]]]))
    assert found.dtype == torch.bfloat16
    assert found.item() == pytest.approx(0.3, abs=1e-3)  # 37.3 is 37.25 in bfloat16


class Coordinates(nn.Module):
    """A map that says where it is: y and x in its first two channels."""

    def forward(self, x):
        y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
        return torch.cat([torch.stack([y, x]), torch.zeros(46, 12, 12)]).expand(3, -1, -1, -1)


def test_a_new_model_samples_the_regular_grid():
    embed = timm.create_model("psvit_base_14", **SMALL["psvit_base_14"]).eval().patch_embed
    assert all(not p.any() for p in embed.offsets.parameters())
    assert len(embed.offsets) == len(embed.layers) - 1 == 3
    embed.stem, embed.layers = Coordinates(), nn.ModuleList(nn.Identity() for _ in range(4))
    nn.init.zeros_(embed.pos_layer.weight)
    found = embed(images("psvit_base_14"))
    torch.testing.assert_close(found[1, :, :2], 4 * start_points((6, 6), (12, 12)))  # four rounds, each added


def test_points_are_moved_by_the_offsets_and_known_by_their_share_of_the_map():
    embed = timm.create_model("psvit_base_14", **SMALL["psvit_base_14"]).eval().patch_embed
    embed.stem, embed.layers = Coordinates(), nn.ModuleList(nn.Identity() for _ in range(4))
    nn.init.zeros_(embed.pos_layer.weight)
    with torch.no_grad():
        embed.pos_layer.weight[2:4] = torch.eye(2)
        for predict, move in zip(embed.offsets, ([-0.5, 0.0], [0.0, -0.25], [0.25, 0.25]), strict=True):
            predict.bias.copy_(torch.tensor(move))
    found = embed(images("psvit_base_14"))[0]
    moves = torch.tensor([[0.0, 0.0], [-0.5, 0.0], [-0.5, -0.25], [-0.25, 0.0]])
    places = start_points((6, 6), (12, 12)) + moves.unsqueeze(1)
    torch.testing.assert_close(found[:, :2], places.sum(0))
    torch.testing.assert_close(found[:, 2:4], places.sum(0) / 12)


def test_an_offset_learns_from_the_samples_it_leads_to():
    embed = make("psvit_base_14").train().patch_embed
    embed.stay()
    embed(images("psvit_base_14")).square().sum().backward()
    assert all(predict.weight.grad.abs().max() > 0 for predict in embed.offsets)


def test_an_offset_does_not_learn_from_positions():
    """On a map that is the same everywhere, moving changes the position embedding alone."""
    embed = make("psvit_base_14", grid_size=4).patch_embed  # no point on the border, outside of which all is zero
    embed.stay()
    embed.stem = Flat()
    embed(images("psvit_base_14")).square().sum().backward()
    assert all(predict.bias.grad.abs().max() < 1e-3 for predict in embed.offsets)
    assert embed.pos_layer.weight.grad.abs().max() > 1


class Flat(nn.Module):
    """A map that is the same everywhere."""

    def forward(self, x):
        return torch.linspace(-1, 1, 48).view(1, 48, 1, 1).expand(len(x), -1, 12, 12)


class Cut(nn.Module):
    """Lets no gradient through."""

    def forward(self, x):
        return x.detach()


def test_points_are_carried_without_gradient():
    embed = make("psvit_base_14").patch_embed
    embed.stay()
    embed.layers[1], embed.layers[2] = Cut(), Cut()
    embed(images("psvit_base_14")).square().sum().backward()
    first, second, third = (predict.weight.grad for predict in embed.offsets)
    assert first is None or not first.any()
    assert second is None or not second.any()
    assert third.abs().max() > 0


def test_images_of_other_sizes_are_sampled_too():
    model = make("psvit_base_14")
    assert model(torch.randn(2, 3, 64, 80)).shape == (2, 10)


# ---------------------------------------------------------------------------------------------------- as timm models are
@pytest.mark.parametrize("name", [*PUBLISHED])
def test_what_timm_knows_of_them(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.crop_pct == (1.0 if name == "lvvit_medium" else 0.9)
    assert (cfg.interpolation, cfg.input_size, cfg.url) == ("bicubic", (3, 224, 224), "")
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        on_meta(name, pretrained=True)


@pytest.mark.parametrize("name", NAMES)
def test_heads_come_and_go(name):
    model = make(name, in_chans=1)
    x = images(name)[:, :1]
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (3, 48)
    model.reset_classifier(7)
    assert model(x).shape == (3, 7)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0, "avg")
    assert torch.equal(model(x), model.forward_features(x)[:, 1:].mean(1))
    assert make(name, num_classes=0)(images(name)).shape == (3, 48)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(3, "map")


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients(name):
    model = make(name)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(images(name)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_training_knobs(name):
    model = make(name, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    start = 0.3 * 4 / 7 if name == "psvit_base_14" else 0.0  # PS-ViT's four rounds have the first four rates
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(start, 0.3, 4))
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1
    assert scale[id(model.cls_token)] < scale[id(model.blocks[0].norm1.weight)] < scale[id(model.blocks[3].norm1.weight)] < 1


@pytest.mark.unchecked
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="images of \\(96, 96\\) pixels, got \\(64, 64\\)"):
        make("lvvit_small")(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="multiples of 16 pixels; got \\(100, 100\\)"):
        make("lvvit_small", img_size=100)
    with pytest.raises(ValueError, match="set return_dense=True"):
        make("lvvit_small", mix_token=1.0)
    with pytest.raises(ValueError, match="multiple of num_heads; got 48 and 5"):
        make("lvvit_small", num_heads=5)
    with pytest.raises(ValueError, match="global_pool must be one of 'max', 'token', 'avg' for LV-ViT, not 'map'"):
        make("lvvit_small", global_pool="map")
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        make("psvit_base_14", rounds=0)


# ---------------------------------------------------------------------------------------------------- reduced
METHODS = ["topk", "evit", "etps", "dtps", "dynamicvit", "bat", "tome"] if EVERY else ["etps", "dtps"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_methods_run_and_images_do_not_see_each_other(name, method):
    model = laconic.reduce_(make(name), method, keep=0.5, at=(1, 2, 3))
    fill(model.laconic)
    x = images(name)
    together = model(x)
    left = laconic.provenance(model).final.where
    assert len(left.unique()) < 36
    assert summary(model).macs < summary(model).baseline_macs
    alone = torch.cat([model(image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_with_nothing_to_reduce_nothing_changes(name, method):
    x = images(name)
    expected = make(name)(x)
    keep = None if method == "tome" else 1.0
    options = {"r": 0} if method == "tome" else {}
    model = laconic.reduce_(make(name), method, keep=keep, at=(1, 2), **options)
    assert torch.equal(model(x), expected)
    assert torch.equal(laconic.restore_(model)(x), expected)


def test_psvit_is_reduced_where_the_paper_does_it():
    assert HOSTS["laconic.models.psvit.PSViT"].at(on_meta("psvit_base_14")) == (2, 5, 8)


@pytest.mark.parametrize("name", NAMES)
def test_reduced_models_are_saved_and_loaded(name, tmp_path):
    model = laconic.reduce_(make(name), "etps", keep=0.5, at=(1, 2))
    args = {key: SMALL[name][key] for key in ("stem_width", "grid_size") if key in SMALL[name]}
    laconic.save(model, tmp_path / name, model_args=args)
    assert torch.equal(laconic.load(tmp_path / name)(images(name)), model(images(name)))
