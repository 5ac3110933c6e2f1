"""A-ViT and AdaViT: their authors' answers, the same written out over plain timm blocks, and what they mean."""

import copy
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import golden_init
import laconic
from families import fill, images, make, observe
from laconic.core.block_gates import Switches
from laconic.core.method import BlockContext
from laconic.core.tokens import Tokens
from laconic.methods.adavit import TOKENS, USED
from laconic.methods.avit import ANSWER, HALTING, PONDER, SPENT, depth_target, halting_divergence
from laconic.methods.ops.usage import LOGITS as NOTED
from laconic.methods.ops.usage import diverse_use, mean_entropy, use_losses
from laconic.training.objective import Objective
from laconic.training.recipe import LossPart
from test_goldens import HERE, LOGITS, close, golden, picture, reduced

EXECUTIONS = ("packed", "padded", "masked")
FULL = "tokens+heads+layers"
executions = pytest.mark.parametrize("execution", EXECUTIONS)


def run(model, x):
    with torch.no_grad():
        return model(x)


def published(name):
    info = json.loads((HERE / f"{name}.json").read_text())
    overrides = info["config"].get("overrides")
    return {k: torch.from_numpy(golden_init.crc32_v1(k, tuple(s), overrides)) for k, s in info["state_dict"].items()}


# ------------------------------------------------------------------------------------------------ A-ViT
@executions
def test_avit_as_published(execution):
    z, model = golden("avit_tiny_official_10_30"), reduced("avit", golden_init.crc32_v1, execution=execution)
    logits = run(model, picture())
    close(logits, z["logits"], LOGITS)
    assert torch.equal(logits.argmax(1), torch.from_numpy(z["logits"]).argmax(1))
    assert all((stage.where >= 0).all() for stage in laconic.provenance(model).stages)
    assert (z["alive_mask_per_layer"] == 1).all()  # so nothing is to leave


def test_losses_of_avit_as_published():
    z, model = golden("avit_tiny_official_10_30"), reduced("avit", golden_init.crc32_v1).train()
    model(picture())
    assert 5e-4 * laconic.losses(model)["ponder"].item() == pytest.approx(float(z["ponder_loss_x0_0005"][0]), rel=1e-5)
    means = torch.from_numpy(z["halting_score"]).mean(2)
    torch.testing.assert_close(model.laconic.entry(12).per_image[HALTING].detach(), means, rtol=1e-4, atol=0)
    model(picture()[1:])  # the published mean over a batch leaves its first image out
    close(model.laconic.entry(12).per_image[HALTING][0].detach(), z["halting_score_layer"], 1e-12)
    assert 1e-3 * laconic.losses(model)["distribution"].item() == pytest.approx(float(z["distr_loss_x0_001"][0]), rel=1e-5)
    close(depth_target(12, 8, range(12), torch.ones(1)), z["distr_target"], 1e-6)


def avit_by_hand(model, x, scale, center):
    """All tokens run to the end; those that have halted are zero, and far below every logit as keys."""
    x = model._pos_embed(model.patch_embed(x))
    there, spent, rest = torch.ones(x.shape[:2]), torch.zeros(x.shape[:2]), torch.ones(x.shape[:2])
    answer, blocks, masks, sums = 0, torch.zeros(x.shape[:2]), [], []
    for i, block in enumerate(model.blocks):
        masks.append(there)
        x = x * there.unsqueeze(2)
        normed = block.norm1(x) * there.unsqueeze(2)
        q, k, v = block.attn.qkv(normed).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - 1000 * (1 - there)[:, None, None]).softmax(3)
        x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x) * there.unsqueeze(2))
        h = (scale * x[..., 0] - center).sigmoid() if i < len(model.blocks) - 1 else torch.ones_like(spent)
        spent = spent + h
        blocks = blocks + there
        reached, goes_on = there * (spent >= 0.99), there * (spent < 0.99)
        blocks = blocks + reached * rest
        weight = reached * rest + goes_on * h
        rest = rest - goes_on * h
        answer = answer + weight.unsqueeze(2) * x
        sums.append(weight)
        there = goes_on
    return model.head(model.norm(answer)[:, 0]), torch.stack(masks, 1), blocks.mean(), torch.stack(sums).sum(0)


# a class token that halts early, one that halts late, one that goes on to the end
@pytest.mark.parametrize(("scale", "center"), [(3.0, 1.0), (10.0, 30.0), (2.0, 5.0), (-4.0, 1.0)])
@executions
def test_avit_by_hand(execution, scale, center):
    x = images("plain")
    expected, masks, ponder, sums = avit_by_hand(make("plain"), x, scale, center)
    model = laconic.reduce_(make("plain"), "avit", execution=execution, gate_scale=scale, gate_center=center)
    assert not torch.allclose(expected, run(make("plain"), x), atol=0.1)
    assert masks[:, -1].sum() < masks.shape[0] * masks.shape[2]  # some halt before the end
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)
    for i in range(3):
        entry = model.laconic.entry(i + 1)
        assert torch.equal((entry.token_of_patch >= 0).float(), masks[:, i + 1, 1:])
        assert torch.equal(entry.visible_prefix, masks[:, i + 1, :1])
    torch.testing.assert_close(model.laconic.entry(4).per_image[PONDER].mean(), ponder)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    model.train()
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(laconic.losses(model)["ponder"], ponder)


def test_class_tokens_halt_in_the_cases_above():
    masks = {
        case: avit_by_hand(make("plain"), images("plain"), *case)[1][:, :, 0]
        for case in ((3.0, 1.0), (10.0, 30.0), (-4.0, 1.0))
    }
    early = torch.stack([mask.sum(1) for mask in masks.values()])
    assert early.min() < 4
    assert early.max() == 4


@pytest.mark.parametrize("family", ["plain", "distilled", "dinov2-reg", "rope-mixed", "parallel"])
def test_executions_of_avit_agree_and_images_are_alone(family):
    x, answers = images(family), []
    for execution in EXECUTIONS:
        model = laconic.reduce_(make(family), "avit", execution=execution, gate_scale=3.0, gate_center=2.0)
        answers.append(run(model, x))
        singles = torch.cat([run(model, image.unsqueeze(0)) for image in x])
        torch.testing.assert_close(answers[-1], singles, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answers[-1], answers[0], rtol=1e-4, atol=1e-4)
    assert (model.laconic.entry(4).token_of_patch < 0).any()


def pass_all(config, features, depth=4, prefix=2):
    """The reducers of all blocks on given features [B, N, C], one for each block."""
    tokens = Tokens.start(features[0], prefix, True)
    for block, x in enumerate(features):
        reducer = config.build(BlockContext(block, block, x.shape[2], 1, None))
        reducer.site = BlockContext(
            block, block, x.shape[2], 1, None, depth=depth, schedule=laconic.Schedule.adaptive(range(depth))
        )
        tokens = reducer.after(tokens.replace(x=x), len(tokens))
    return tokens, reducer


def test_weights_over_depth_sum_to_one():
    scores = torch.randn(4, 5, 9, 1) * 3
    features = list(torch.cat([scores, torch.ones(4, 5, 9, 3)], 3))
    tokens, _ = pass_all(laconic.AViT(gate_scale=1.0, gate_center=0.0), features)
    torch.testing.assert_close(tokens.x[:, :2, 1:], torch.ones(5, 2, 3))
    h = scores[..., 0].sigmoid()
    first = (h[0] >= 0.99).unsqueeze(1).float()  # those that halt at once give the features of the first block alone
    assert first.sum() > 0
    weight = torch.where(first > 0, 1.0, torch.nan)[:, 0, :2]
    torch.testing.assert_close((tokens.x[:, :2, 0] * weight).nan_to_num(), (scores[0, :, :2, 0] * weight).nan_to_num())


def test_a_halted_class_token_is_frozen():
    """What becomes of its features later does not matter."""
    features = list(torch.randn(4, 2, 9, 4))
    features[1][:, 0, 0] = 50.0
    config = laconic.AViT(gate_scale=1.0, gate_center=5.0)
    tokens, _ = pass_all(config, features)
    changed = [x.clone() for x in features]
    for x in changed[2:]:
        x[:, 0] = 1e4
    again, _ = pass_all(config, changed)
    assert torch.equal(tokens.x[:, 0], again.x[:, 0])
    assert torch.equal(tokens.visible_prefix[:, 0], torch.zeros(2))


def test_nothing_halts_behind_a_high_gate():
    x, plain = images("plain"), make("plain")
    model = laconic.reduce_(make("plain"), "avit", gate_center=1e4)
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-6, atol=1e-6)
    assert laconic.losses(model)["ponder"] == 5
    assert set(model.state_dict()) == set(plain.state_dict())


def test_distribution_loss_is_torchs_own():
    share = torch.rand(12)
    target = depth_target(12, 8, range(12), share)
    assert target[:8].sum().item() == pytest.approx(0.98)
    assert target.argmax() == 8
    p = (share / share.sum()).clamp(0.01, 0.99).log().unsqueeze(0)
    expected = nn.KLDivLoss(reduction="batchmean")(p[0], target)
    torch.testing.assert_close(halting_divergence(share, target), expected)
    assert halting_divergence(torch.zeros(12), target).isfinite()
    assert halting_divergence(target / target.sum(), 0.1 * target) == 0
    assert torch.equal(depth_target(12, 8, (2, 8, 11), share), target[[2, 8, 11]])
    assert depth_target(2, 60, range(2), share).isfinite().all()


def test_ponder_pushes_scores_up():
    features = [x.requires_grad_() for x in torch.randn(4, 2, 9, 4)]
    tokens, reducer = pass_all(laconic.AViT(gate_scale=1.0, gate_center=6.0), features)
    reducer.losses(tokens, 1.0)["ponder"].backward()
    for x in features[:3]:
        assert (x.grad[..., 0] < 0).all()
        assert (x.grad[..., 1:] == 0).all()


def test_weights_of_own_losses():
    """A-ViT names its weights, DynamicViT's is the recipe's."""
    x, target = images("plain"), torch.tensor([0, 1, 2])
    for method, options, weights in (
        ("avit", {"gate_scale": 3.0, "gate_center": 2.0}, {"ponder": 5e-4, "distribution": 1e-3}),
        (
            "avit",
            {"gate_scale": 3.0, "gate_center": 2.0, "ponder": 0.5, "distribution": 0.0},
            {"ponder": 0.5, "distribution": 0.0},
        ),
        ("adavit", {"policies": FULL}, {"used_tokens": 3.0, "used_heads": 3.0, "used_layers": 3.0}),
        ("dynamicvit", {"keep": 0.6, "at": [1, 2, 3]}, {"ratio": 3.0}),
    ):
        model = laconic.reduce_(make("plain"), method, **options).train()
        parts = Objective(model, None, LossPart(ratio=3.0))(x, target)
        expected = parts["cross_entropy"] + sum(weight * parts[name] for name, weight in weights.items())
        assert set(parts) == {"loss", "cross_entropy", *weights}
        torch.testing.assert_close(parts["loss"].detach(), expected)


def test_avit_between_the_blocks_of_a_schedule():
    """Tokens may halt at the blocks of at; the last block takes what is left."""
    x = images("plain")
    model = laconic.reduce_(make("plain"), "avit", at=[1, 3], gate_scale=3.0, gate_center=2.0)
    run(model, x)
    assert SPENT not in model.laconic.entry(1).per_image
    assert model.laconic.entry(2).per_image[ANSWER].shape == (3, 1, 48)
    assert model.laconic.entry(4).per_image[HALTING].shape == (3, 2)
    assert laconic.losses(model)["ponder"] <= 3


# ------------------------------------------------------------------------------------------------ AdaViT
@executions
def test_adavit_as_published(execution):
    z = golden("adavit_token_only")
    model = laconic.import_checkpoint(published("adavit_token_only"), "adavit", execution=execution)
    close(run(model, picture()), z["logits"], LOGITS)
    used = torch.stack([model.laconic.entry(i + 1).keep_mask for i in range(12)], 1)
    assert torch.equal(used, torch.from_numpy(z["token_select"])[:, :, 1:].float())
    assert torch.equal(used.sum(2).long() + 1, torch.from_numpy(z["tokens_kept_per_block"]))
    mean = torch.from_numpy(z["token_select"]).float().mean()
    torch.testing.assert_close(laconic.losses(model), {"used_tokens": (mean - 0.5) ** 2})
    back = (used[:, 1:] > used[:, :-1]).any()
    assert back  # a token that was skipped is used again
    assert all(torch.equal(stage.where[0], torch.arange(196)) for stage in laconic.provenance(model).stages)


def adavit_by_hand(model, x):
    """Every decision of a reduced model's own layers, and every mask, on plain blocks; the channels of a head lie together."""
    x = model._pos_embed(model.patch_embed(x))
    used, heads_on, layers_on = [], [], []
    for i, block in enumerate(model.blocks):
        own = model.laconic.reducers[str(i)]
        token = torch.ones(x.shape[:2])
        token[:, 1:] = (own.tokens(own.norm(x[:, 1:]))[..., 0].sigmoid() > 0.6).float()
        head = torch.ones(len(x), 3) if own.heads is None else (own.heads(x[:, 0]).sigmoid() > 0.5).float()
        layer = torch.ones(len(x), 2) if own.layers is None else (own.layers(x[:, 0]).sigmoid() > 0.5).float()
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        pairs = token[:, :, None] * token[:, None]
        blocked = torch.where((pairs + torch.eye(x.shape[1])) > 0, 0.0, -torch.inf).unsqueeze(1)
        attention = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + blocked).softmax(3)
        out = (attention @ v * head[:, :, None, None]).transpose(1, 2).flatten(2)
        x = x + layer[:, :1, None] * token[..., None] * block.attn.proj(out)
        channels = head.repeat_interleave(x.shape[2] // 3, 1).unsqueeze(1)
        x = x + layer[:, 1:, None] * token[..., None] * block.mlp(block.norm2(x) * channels)
        used, heads_on, layers_on = [*used, token], [*heads_on, head], [*layers_on, layer]
    return model.head(model.norm(x)[:, 0]), *(torch.stack(each, 1) for each in (used, heads_on[1:], layers_on[1:]))


def full(family="plain", **options):
    torch.manual_seed(0)
    model = laconic.reduce_(make(family), "adavit", **{"policies": FULL, **options})
    torch.manual_seed(20)  # every half and most heads are used by some images and not by others
    fill(model.laconic)
    return model


@executions
@pytest.mark.parametrize("policies", ["tokens", "tokens+heads", "tokens+layers", FULL])
def test_adavit_by_hand(policies, execution):
    model, x = full(policies=policies, execution=execution), images("plain", 8)
    with torch.no_grad():
        expected, used, heads, layers = adavit_by_hand(unreduced_with(model), x)
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)
    for i in range(4):
        assert torch.equal(model.laconic.entry(i + 1).keep_mask, used[:, i, 1:])
    means = {"used_tokens": (used.mean() - 0.5) ** 2}
    if "heads" in policies:
        means["used_heads"] = (heads.mean() - 0.5).abs()
        assert 0 < heads.mean() < 1
    if "layers" in policies:
        means["used_layers"] = (layers.mean() - 0.5).abs()
        assert 0 < layers.mean() < 1
    torch.testing.assert_close(laconic.losses(model), means)


def unreduced_with(model):
    """A model with the same weights, whose blocks run as they are; its reducers are there to be asked."""
    plain = copy.deepcopy(model)
    reduction = plain.laconic
    laconic.restore_(plain)
    plain.laconic = reduction
    return plain


@pytest.mark.parametrize("family", ["plain", "distilled", "dinov2-reg", "respost", "dinov3", "eva02", "rope-mixed", "pe"])
def test_executions_of_adavit_agree_and_images_are_alone(family):
    x, answers = images(family), []
    for execution in EXECUTIONS:
        model = full(family, execution=execution)
        answers.append(run(model, x))
        singles = torch.cat([run(model, image.unsqueeze(0)) for image in x])
        torch.testing.assert_close(answers[-1], singles, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answers[-1], answers[0], rtol=1e-4, atol=1e-4)
    shares = {name: note.mean().item() for name, note in model.laconic.entry(4).per_image.items()}
    assert len(shares) == 3
    assert 0 < shares[TOKENS] < 1
    tokens_alone = full(family, policies="tokens")
    assert not torch.allclose(run(tokens_alone, x), answers[0], atol=1e-2)


def test_blocks_that_side_by_side_switch_tokens_only():
    x, answers = (
        images("parallel"),
        [run(full("parallel", policies="tokens", execution=e), images("parallel")) for e in EXECUTIONS],
    )
    assert all(torch.allclose(answer, answers[0], rtol=1e-4, atol=1e-4) for answer in answers)
    assert not torch.allclose(answers[0], run(make("parallel"), x), atol=1e-2)
    for policies in ("tokens+heads", "tokens+layers"):
        with pytest.raises(ValueError, match="in parallel.*policies='tokens'"):
            laconic.reduce_(make("parallel"), "adavit", policies=policies)


def test_skipped_tokens_come_out_as_they_went_in():
    model, x, moments = full(), images("plain"), []
    for execution in EXECUTIONS:
        model = full(execution=execution)
        moments.clear()
        observe(model, lambda before, after: moments.append(after))
        run(model, x)
        for entering, leaving in zip(moments[::2], moments[1::2], strict=True):
            same = (entering.patches == leaving.patches).all(2)
            assert same[entering.per_token[USED] == 0].all()
        assert same.any()
        assert not same.all()


def test_a_block_that_decides_nothing_uses_all_tokens():
    x, plain = images("plain"), make("plain")
    model = full(at=[1], policies="tokens")
    run(model, x)
    assert list(model.laconic.reducers) == ["1", "2"]
    assert (model.laconic.entry(2).keep_mask == 0).any()
    assert model.laconic.entry(3).keep_mask is None
    assert laconic.losses(model)["used_tokens"] > 0
    with torch.no_grad():
        model.laconic.reducers["1"].tokens.bias.fill_(1e6)  # uses all
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-5, atol=1e-5)


def test_decisions_in_training_are_those_of_two_gumbels():
    reducer = laconic.AdaViT().build(BlockContext(0, 0, 8, 2, None)).train()
    for threshold, expected in ((0.5, 0.5), (0.6, 1 / (1 + 1.5**5))):  # logistic noise over 5 against logit(threshold)
        logits = torch.zeros(200_000, requires_grad=True)
        hard = reducer.decide(logits, threshold)
        assert hard.detach().mean().item() == pytest.approx(expected, abs=0.005)
        assert set(hard.detach().unique().tolist()) == {0.0, 1.0}
        hard.sum().backward()
        assert 0 < logits.grad.min() < logits.grad.max() <= 0.25 / 5
    reducer.eval()
    logits = torch.tensor([0.0, 0.4, 0.41, 5.0])
    assert reducer.decide(logits, 0.6).tolist() == [0, 0, 1, 1]
    assert reducer.decide(logits, 0.5).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(("diverse", "entropy"), [(0.1, 0.0), (0.0, 0.2), (0.3, 0.5)])
def test_diverse_and_undecided_by_hand(diverse, entropy):
    model, x, logits = full(diverse=diverse, entropy=entropy), images("plain", 8), {"heads": [], "layers": []}

    def look(before, after):
        if before.switches is None and after.switches is not None:
            own = model.laconic.reducers[str(len(logits["heads"]) + len(firsts))]
            if own.heads is None:
                firsts.append(own)
            else:
                logits["heads"].append(own.heads(before.x[:, 0]))
                logits["layers"].append(own.layers(before.x[:, 0]))

    firsts = []
    observe(model, look)
    run(model, x)
    assert (len(firsts), len(logits["heads"])) == (1, 3)
    losses = laconic.losses(model)
    assert set(losses) == {"used_tokens"} | {
        f"{kind}_{part}"
        for kind, weight in (("used", 1), ("diverse", diverse), ("entropy", entropy))
        for part in ("heads", "layers")
        if weight
    }
    for part, of_blocks in logits.items():
        apart, undecided = [], []
        for of_block in of_blocks:
            on = (of_block.sigmoid() > 0.5).float()
            columns = [on[:, i : i + 1] for i in range(3)] if part == "heads" else [on]  # a block is one layer
            apart += [abs(sum(sum(row) for row in column.tolist()) / column.numel() - 0.5) for column in columns]
            for p in of_block.sigmoid().double().flatten().tolist():
                undecided.append(-p * math.log(p) - (1 - p) * math.log(1 - p))
        assert len(apart) == {"heads": 9, "layers": 3}[part]
        if diverse:
            assert losses[f"diverse_{part}"].item() == pytest.approx(diverse * sum(apart) / len(apart), rel=1e-5)
        if entropy:
            assert losses[f"entropy_{part}"].item() == pytest.approx(-entropy * sum(undecided) / len(undecided), rel=1e-5)


def test_what_diverse_and_entropy_ask_for():
    """Half of the heads for all images are as many as all heads for half of the images, and not as diverse."""
    same, turns = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for use, apart in ((same, 0.5), (turns, 0.0)):
        losses = use_losses({"used_heads": use}, 0.5, 2.0, 0.0)
        assert losses["used_heads"] == 0
        assert losses["diverse_heads"] == 2 * apart
    assert diverse_use(same, 0.5, 2) == 0  # the halves of a block are one layer
    logits = torch.tensor([[-8.0, -1.0, 0.5, 40.0]], requires_grad=True)
    use_losses({"used_heads": torch.ones(1, 4), NOTED["used_heads"]: logits}, 0.5, 0.0, 1.0)["entropy_heads"].backward()
    assert torch.equal(logits.grad[:, :3].sign(), logits.detach()[:, :3].sign())  # down: towards one half
    assert mean_entropy(torch.zeros(3)).item() == pytest.approx(math.log(2))
    assert mean_entropy(torch.tensor([200.0, -200.0])) == 0


def test_terms_that_are_off_note_nothing():
    model = full()
    run(model, images("plain"))
    assert set(laconic.losses(model)) == {"used_tokens", "used_heads", "used_layers"}
    assert not any(name in model.laconic.entry(4).per_image for name in NOTED.values())


def test_diverse_and_entropy_are_trained():
    model = full(diverse=0.1, entropy=0.2).train()
    model(images("plain"))
    losses = laconic.losses(model)
    sum(value for name, value in losses.items() if not name.startswith("used")).backward()
    for name, p in model.laconic.named_parameters():
        if ".heads." in name or ".layers." in name:
            assert p.grad.abs().sum() > 0, name


def test_gradients_reach_all_policies():
    model, x = full().train(), images("plain")
    (model(x).square().mean() + laconic.losses(model)["used_tokens"]).backward()
    for name, p in model.laconic.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_reentrant_checkpointing_is_refused():
    """It would lose the gradients of the mean use."""
    model = full().train()
    x = model._pos_embed(model.patch_embed(images("plain")))
    for block in model.blocks:
        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.sum().backward()


def test_gradients_of_switches():
    """That of a factor is what its part would add, on and off alike."""
    halves = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], requires_grad=True)
    out = torch.randn(2, 2, 3)
    Switches(halves).attention(lambda x: out, out).sum().backward()
    torch.testing.assert_close(halves.grad[:, 0], out.sum(2))


@pytest.mark.slow
@pytest.mark.unchecked
def test_adavit_compiles():
    model, x = full(), images("plain")
    torch._dynamo.reset()
    torch.testing.assert_close(
        run(torch.compile(model, fullgraph=True, backend="eager"), x), run(model, x), rtol=1e-4, atol=1e-4
    )


def test_published_names_of_all_policies():
    model = full("plain", policies=FULL)
    theirs = {}
    for name, tensor in model.state_dict().items():
        if ".attn.qkv." in name:
            theirs |= {name.replace("qkv", part): t for part, t in zip(("query", "key", "value"), tensor.chunk(3), strict=True)}
        elif name.startswith("laconic."):
            _, _, block, layer, kind = name.split(".")
            part = {"tokens": "attn.token_select", "heads": "head_select", "layers": "layer_select"}.get(layer)
            if part:
                theirs[f"blocks.{block}.{part}.mlp_head.{kind}"] = tensor
        else:
            theirs[name] = tensor
    ours = laconic.AdaViT(policies=FULL).convert_official(theirs, range(4))
    expected = model.state_dict()
    assert set(ours) == set(expected)
    for name, tensor in ours.items():
        source = (
            name.replace("laconic.reducers", "blocks").replace(".norm.", ".norm1.")
            if ".norm." in name and "laconic" in name
            else name
        )
        assert torch.equal(tensor, expected[source]), name
    assert "head_select.mlp_head.weight" in next(
        iter(laconic.AdaViT().convert_official({"head_select.mlp_head.weight": torch.ones(1)}, [0]))
    )


def test_cost_of_adavit():
    model = full("plain")
    own = sum(p.numel() for p in model.laconic.parameters())
    assert own == 4 * (2 * 48 + 48 + 1) + 3 * (48 + 1) * (3 + 2)
    rows = laconic.summary(model).blocks
    assert [row.reducer_macs for row in rows] == [36 * 48] + [(36 + 5) * 48] * 3
    golden_size = published("adavit_token_only")
    model = laconic.reduce_(timm.create_model("deit_tiny_patch16_224"), "adavit")
    assert laconic.summary(model).parameters == sum(t.numel() for t in golden_size.values()) + 12 * 2 * 192


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("method", ["avit", "adavit"])
def test_no_keep_rate(method):
    for how in ({"keep": 0.7}, {"keep": [1.0, 1.0, 0.5, 1.0], "at": [0, 1, 2, 3]}, {"schedule": {"at": [3], "leave": [9]}}):
        with pytest.raises(ValueError, match=f"^{method} decides for every image.*takes no keep rate"):
            laconic.reduce_(make("plain"), method, **how)
    model, x = laconic.reduce_(make("plain"), method, keep=1.0), images("plain")
    assert torch.equal(run(model, x), run(make("plain"), x))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"eps": 0.0}, ValueError, "eps must be between 0 and 1"),
        ({"target_depth": 0}, ValueError, "target_depth must be a block number of at least 1"),
        ({"at": [0, 2]}, ValueError, "at must end with 3, not with 2"),
        ({"execution": "fast"}, ValueError, "execution must be one of"),
    ],
)
def test_what_avit_refuses(options, error, words):
    with pytest.raises(error, match=words):
        laconic.reduce_(make("plain"), "avit", **options)


def test_avit_needs_a_class_token_that_is_read():
    with pytest.raises(LookupError, match="avit gives its result in the class token"):
        laconic.reduce_(make("gap"), "avit")


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policies": "heads"}, "policies must be one of"),
        ({"threshold": 1.0}, "threshold must be in"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"target": 0.0}, "target must be in"),
        ({"diverse": -0.1}, "diverse must be 0 or more"),
        ({"entropy": -0.1}, "entropy must be 0 or more"),
    ],
)
def test_what_adavit_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        laconic.AdaViT(**options)


def test_heads_and_layers_need_a_class_token():
    model = make("gap")
    with pytest.raises(LookupError, match="by the class token.*policies='tokens'"):
        laconic.reduce_(model, "adavit", policies="tokens+layers")
    assert not hasattr(model, "laconic")
    laconic.reduce_(model, "adavit")


def test_a_head_has_its_channels_at_a_linear_layer():
    switches = Switches(torch.ones(2, 1, 5), torch.ones(2, 3, 1))
    with pytest.raises(ValueError, match="has no linear layer"):
        switches.mlp(F.gelu, torch.ones(2, 5, 12))
    off = Switches(torch.ones(2, 1, 5), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).unsqueeze(2))
    layer = nn.Linear(12, 12, bias=False)
    nn.init.eye_(layer.weight)
    seen = off.mlp(lambda x: layer(x) + layer(x), torch.ones(2, 5, 12))  # two beside each other, as gated MLPs have
    assert torch.equal(seen[:, 0].unflatten(1, (3, 4)).mean(2), 2 * off.heads[..., 0])
