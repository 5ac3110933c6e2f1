"""Run-length on models of images that see a video frame by frame: of a run of patches only the first is computed."""

import copy
import pickle

import pytest
import timm
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import clips
import families
import host_laws
import laconic
import test_transformers
from laconic.analysis.macs import _NoModules, counted, summary
from laconic.core.token_reduction import reduction_of
from test_before_blocks_hosts import REFUSED
from zoo import ZOO

FRAMES = 4
HOSTS = sorted(set(ZOO) - REFUSED)
# class token, registers, none (mean, attention pool), rotary tables, a bias for pairs, hidden attention, parallel halves
KINDS = ["dinov2-reg", "siglip", "dinov3", "beit", "open-clip", "torchvision", "parallel", "naflex"]
every_host = pytest.mark.parametrize("name", HOSTS)
every_kind = pytest.mark.parametrize("name", KINDS)


def close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


def video(size=96):
    """Two clips: the lower half of the first stands still from its second frame on, a third of the second throughout."""
    x = torch.randn(2 * FRAMES, 3, size, size, generator=torch.Generator().manual_seed(3))
    x[2:4, :, size // 2 :] = x[1, :, size // 2 :] + 0.02
    x[5:, :, :, : size // 3] = x[4, :, :, : size // 3]
    return x


def computed(model):
    """The number of patches of each frame that the blocks computed in the last forward."""
    tokens = reduction_of(model).entry(1)
    return [len(tokens)] * tokens.shape[0] if tokens.shared_from is None else (tokens.shared_from == 0).sum(1).tolist()


def attending_to_all(model, x, back):
    """The features of a plain timm ViT by the definition, token by token of a frame, without any of Laconic's code."""
    frames, prefix = len(x), model.num_prefix_tokens
    h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    first = [[frame - int(back[frame, place]) for place in range(back.shape[1])] for frame in range(frames)]

    def spread(z):  # the features of every frame: prefix tokens its own, patches those of the first of their run
        patches = torch.stack([torch.stack([z[t, prefix + p] for p, t in enumerate(row)]) for row in first])
        return torch.cat([z[:, :prefix], patches], 1)

    h = spread(h)
    for block in model.blocks:
        out = torch.zeros_like(h)
        for frame in range(frames):
            own = [*range(prefix), *(prefix + p for p, t in enumerate(first[frame]) if t == frame)]
            attn, normed = block.attn, block.norm1(h[frame])
            q, k, v = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
            seen = functional.softmax(q[:, own] @ k.transpose(-2, -1) * attn.scale, dim=-1) @ v
            rows = h[frame, own] + block.ls1(attn.proj(seen.transpose(0, 1).flatten(1)))
            out[frame, own] = rows + block.ls2(block.mlp(block.norm2(rows)))
        h = spread(out)
    return model.norm(h)


# ------------------------------------------------------------------------------------------------ the method
@pytest.mark.parametrize("threshold", [0.0, 0.1, 1.2])
def test_it_is_the_definition(threshold):
    model, x = families.make("plain"), video()
    cells = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    back = torch.zeros(cells.shape[:2], dtype=torch.long)
    for frame in range(len(x)):
        for place in range(cells.shape[1]):
            still = frame % FRAMES > 0 and (cells[frame, place] - cells[frame - 1, place]).abs().mean() <= threshold
            back[frame, place] = back[frame - 1, place] + 1 if still else 0
    with torch.no_grad():
        expected = attending_to_all(model, x, back)
        logits = model.forward_head(expected)
        laconic.reduce_(model, "run-length", frames=FRAMES, threshold=threshold)
        close(model(x), logits)
        assert torch.equal(reduction_of(model).entry(2).shared_from, back)
        close(model.forward_features(x), expected)
    counts = {0.0: [36, 36, 36, 18, 36, 24, 24, 24], 0.1: [36, 36, 18, 18, 36, 24, 24, 24]}
    assert computed(model) == counts.get(threshold, back.eq(0).sum(1).tolist())


@every_host
def test_a_clip_of_equal_frames_is_answered_exactly(name):
    kind = ZOO[name]
    model, x = kind.make(), kind.images(2).repeat_interleave(FRAMES, 0)
    expected = host_laws.run(kind, model, x)
    laconic.reduce_(model, "run-length", frames=FRAMES)
    close(host_laws.run(kind, model, x), expected)
    assert computed(model) == [36, 0, 0, 0] * 2


@every_host
def test_a_clip_without_static_patches_is_answered_bit_for_bit(name):
    kind = ZOO[name]
    model, x = kind.make(), kind.images(2 * FRAMES)
    expected = host_laws.run(kind, model, x)
    laconic.reduce_(model, "run-length", frames=FRAMES, threshold=0.0)
    assert torch.equal(host_laws.run(kind, model, x), expected)
    assert reduction_of(model).entry(1).is_plain  # the blocks run unchanged
    host_laws.run(kind, model, video(kind.size))
    assert torch.equal(host_laws.run(kind, model, x), expected)  # nothing is left of the batch before


@every_host
def test_clips_do_not_mix(name):
    kind = ZOO[name]
    model, x = laconic.reduce_(kind.make(), "run-length", frames=FRAMES), video(kind.size)
    out = host_laws.run(kind, model, x)
    assert sum(computed(model)) < 8 * 36
    close(torch.cat([host_laws.run(kind, model, x[:4]), host_laws.run(kind, model, x[4:])]), out)
    close(host_laws.run(kind, model, torch.cat([x[4:], x[:4]])), torch.cat([out[4:], out[:4]]))
    still = x[3:4].repeat(8, 1, 1, 1)  # frames of different clips are never compared
    host_laws.run(kind, model, still)
    assert computed(model) == [36, 0, 0, 0] * 2


@every_host
def test_every_execution_gives_the_same(name):
    kind = ZOO[name]
    x = video(kind.size)
    packed, masked = (laconic.reduce_(kind.make(), "run-length", frames=FRAMES, execution=e) for e in ("packed", "masked"))
    close(host_laws.run(kind, masked, x), host_laws.run(kind, packed, x))
    assert computed(masked) == computed(packed)
    assert (host_laws.run(kind, laconic.restore_(packed), x) - host_laws.run(kind, masked, x)).abs().max() > 0


@pytest.mark.parametrize("family", test_transformers.FAMILIES)
def test_models_of_transformers(family):
    model = test_transformers.make(family)
    x = test_transformers.images(2).repeat_interleave(FRAMES, 0)
    expected = test_transformers.answer(model, x)
    other = video(x.shape[2])
    laconic.reduce_(model, "run-length", frames=FRAMES)
    close(test_transformers.answer(model, x), expected)
    assert computed(model) == [36, 0, 0, 0] * 2
    out = test_transformers.answer(model, other)
    close(torch.cat([test_transformers.answer(model, clip) for clip in other.split(FRAMES)]), out)
    masked = laconic.reduce_(test_transformers.make(family), "run-length", frames=FRAMES, execution="masked")
    close(test_transformers.answer(masked, other), out)


# ------------------------------------------------------------------------------------------------ features
def test_every_patch_has_features_at_every_block():
    model, x, seen = families.make("dinov2-reg"), video(84), {}
    laconic.reduce_(model, "run-length", frames=FRAMES)
    hooks = [b.register_forward_hook(lambda _, args, out, i=i: seen.update({i: out})) for i, b in enumerate(model.blocks)]
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        maps = model.forward_intermediates(x, indices=4, output_fmt="NCHW", intermediates_only=True)
        for hook in hooks:
            hook.remove()
        close(model.forward_head(features), logits)
        close(model(x), logits)
    back, prefix = reduction_of(model).entry(2).shared_from, model.num_prefix_tokens
    assert back.any()
    for block, out in seen.items():
        assert out.shape == (8, prefix + 36, 48)
        shared = out[:, prefix:][torch.arange(8).unsqueeze(1) - back, torch.arange(36)]
        assert torch.equal(out[:, prefix:], shared), block
        close(maps[block].flatten(2).transpose(1, 2), out[:, prefix:])
    stage = laconic.provenance(model).final
    assert torch.equal(stage.where, torch.arange(36).expand(8, -1))
    assert (stage.size == 1).all()
    restored = laconic.reduce_(laconic.restore_(model), "run-length", frames=FRAMES, restore=True)
    with torch.no_grad():
        close(restored.forward_features(x), features)


@pytest.mark.parametrize("name", ["dinov2-reg", "beit", "parallel"])
def test_blocks_and_heads_run_later_on_a_part_of_the_batch(name):
    kind = ZOO[name]
    model, x = laconic.reduce_(kind.make(), "run-length", frames=FRAMES), video(kind.size)
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        close(model.forward_head(features[2:7]), logits[2:7])  # features are complete, so a head needs no whole clip
        last = model.blocks[3]
        held, hook = [], model.blocks[2].register_forward_hook(lambda _, args, out: held.append(out))
        expected, _ = [], hook
        later = last.register_forward_hook(lambda _, args, out: expected.append(out))
        model.forward_features(x)
        hook.remove()
        later.remove()
        close(last(held[0][4:]), expected[0][4:])  # a whole clip
        part = last(held[0][2:4])  # frame 2 has no first frame here: it is computed, and frame 3 shares with it
        close(part[0], alone(model, held[0][2], last))
        back = reduction_of(model).last().tokens.shared_from
        assert back[0].eq(0).all()
        assert back[1].max() == 1
        close(last(held[0][::2])[1], alone(model, held[0][2], last))  # with a step, no token is shared
        if name != "beit":  # it cannot run on no images itself
            assert last(held[0][:0]).shape == held[0][:0].shape


def alone(model, x, block):
    """The output of a block of the unreduced model for one image."""
    plain = laconic.restore_(copy.deepcopy(model))
    return plain.blocks[list(model.blocks).index(block)](x[None])[0]


# ------------------------------------------------------------------------------------------------ cost
@pytest.mark.parametrize("name", ["dinov2-reg", "beit", "siglip"])
def test_observed_macs_are_those_that_run(name):
    model, x = families.make(name), video(84 if name == "dinov2-reg" else 96)
    laconic.reduce_(model, "run-length", frames=FRAMES, compute="all")
    cost = summary(model, images=[x]).observed
    model(x)
    assert cost.tokens[-1].mean == sum(computed(model)) / 8 < 36
    counter = FlopCounterMode(display=False)
    with counter:
        model(x)
    assert counter.get_total_flops() / 2 / 8 == cost.macs.mean
    assert summary(model, images=[x[4:]]).observed.macs.most == summary(model).macs
    assert counted(model) == summary(model, example=x[:1]).macs == summary(model).macs  # upper bounds, on a moving clip


def test_the_last_block_computes_what_is_read():
    model, x = laconic.reduce_(families.make("plain"), "run-length", frames=FRAMES), video()
    found = []
    for run in (model, model.forward_features):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()
        with counter:
            out = run(x)
        found.append(counter.get_total_flops())
    assert found[0] < found[1]
    close(model(x), model.forward_head(out))


# ------------------------------------------------------------------------------------------------ uses
def test_copies_pickles_and_files_keep_the_frames(tmp_path):
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=96, **families.SMALL).eval(), video()
    with torch.no_grad():
        expected = model(x)
        laconic.reduce_(model, laconic.RunLength(threshold=0.2, frames=FRAMES))
        out = model(x)
        laconic.save(model, tmp_path)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), laconic.load(tmp_path)):
            assert torch.equal(other(x), out)
            assert other.laconic.config == laconic.RunLength(threshold=0.2, frames=FRAMES)
        assert torch.equal(laconic.restore_(model)(x), expected)


@every_kind
def test_an_empty_batch(name):
    kind = ZOO[name]
    model = laconic.reduce_(kind.make(), "run-length", frames=FRAMES)
    x = video(kind.size)
    out = host_laws.run(kind, model, x)
    empty = host_laws.run(kind, model, x[:0])
    assert empty.shape == out[:0].shape


@pytest.mark.parametrize("family", ["dinov2-reg", "gap"])
def test_it_trains(family):
    """Masked in training: the gradients are those of the definition, as packed in evaluation mode."""
    grads = []
    for mode in (True, False):
        model = laconic.reduce_(families.make(family), "run-length", frames=FRAMES).train(mode)
        model(video(84 if family == "dinov2-reg" else 96)).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        close(grads[1][name], grad)
        assert grad.abs().sum() > 0, name


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = laconic.reduce_(families.make("plain"), "run-length", frames=FRAMES).train()
        model.set_grad_checkpointing(checkpointing)
        model(video()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        close(other, one)


def test_under_autocast():
    model, x = families.make("plain"), video()
    laconic.reduce_(model, "run-length", frames=FRAMES)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x).float()
    with torch.no_grad():
        assert (half - model(x)).abs().max() < 0.1 * model(x).abs().max()


@pytest.mark.unchecked
def test_compiled_and_exported_it_runs_masked():
    model, x = laconic.reduce_(families.make("plain"), "run-length", frames=FRAMES), video()
    with torch.no_grad():
        expected = model(x)
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        close(torch.export.export(model, (x,), strict=False).module()(x), expected)
        with pytest.raises(ValueError, match="decides for every image how many tokens"):
            laconic.export(model, "unused.onnx")


# ------------------------------------------------------------------------------------------------ refusals
def test_a_batch_of_no_whole_clips_is_refused():
    model, x = laconic.reduce_(families.make("plain"), "run-length", frames=FRAMES), video()
    for images in (1, 6):
        with pytest.raises(ValueError, match=rf"frames=4 .* this batch has {images} images; pass a multiple of 4"):
            model(x[:images])
    with torch.no_grad():
        assert model(x).shape == (8, 10)  # it still runs


@pytest.mark.parametrize("name", clips.CLASSIFIERS)
def test_models_of_clips_are_refused(name):
    model = clips.make(name)
    with pytest.raises(ValueError, match="this model takes clips; leave out frames="):
        laconic.reduce_(model, "run-length", frames=FRAMES)
    assert not laconic.is_reduced(model)


@pytest.mark.unchecked
def test_arguments_are_checked():
    with pytest.raises(ValueError, match="takes single images; .* pass frames="):
        laconic.reduce_(families.make("plain"), "run-length")
    for options in ({"compare": "ends"}, {"proportional": False}, {"execution": "padded"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be .* with frames=4"):
            laconic.RunLength(frames=4, **options)
    with pytest.raises(ValueError, match="frames must be 2 or more"):
        laconic.RunLength(frames=1)
    with pytest.raises(ValueError, match="chain: run-length on single frames .* use it alone"):
        laconic.Chain(("run-length", {"frames": 4}), ("ats", {}))


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_features_that_a_hook_changes_are_not_shared(execution):
    """A hook may change each frame in its own way: the blocks after it compute every token of its output."""
    base, x = families.make("plain"), video()
    model = laconic.reduce_(copy.deepcopy(base), "run-length", frames=FRAMES, execution=execution)
    other = torch.randn(8, 37, 1, generator=torch.Generator().manual_seed(5))
    seen = list[torch.Tensor]()

    def steer(block, args, out):
        seen.append(out + other)
        return seen[0]

    model.blocks[1].register_forward_hook(steer)
    with torch.no_grad():
        out, features = model.forward_features(x), seen[0]
        for block in base.blocks[2:]:
            features = block(features)
        close(out, base.norm(features))
