"""SPViT, IA-RED2 and LTMP, which learn how many tokens an image needs: their authors' answers, and what they mean."""

import itertools
import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import golden_init
import laconic
from families import AT, images, make, reduced
from laconic.core.attention import AttentionView
from laconic.core.schedule import Schedule
from laconic.core.tokens import Tokens
from laconic.methods import iared, spvit
from laconic.methods.iared import KEPT, LOG_PROBABILITY
from laconic.methods.ops import Predictor, Selector
from laconic.methods.ops.work import WORK, cost
from laconic.methods.spvit import PACKAGE
from laconic.training.policy_gradient import curriculum, policy_loss, policy_step, rewards
from test_goldens import HERE, LOGITS, close, golden, picture

EXECUTIONS = ("packed", "padded", "masked")
SITE = laconic.BlockContext(0, 1, 48, 3, None, before=36, after=36, grid=(6, 6), depth=4, schedule=Schedule.adaptive(AT))
GOLDENS = {"spvit": "spvit_senet_nogumbel", "iared": "iared_interpreter", "ltmp": "ltmpinf_m0.35_p0.003"}


def published(method):
    """The authors' state dict, by the rule of the goldens."""
    content = json.loads((HERE / f"{GOLDENS[method]}.json").read_text())
    scales, made = content["config"].get("overrides"), {}
    for name, shape in content["state_dict"].items():
        made[name] = torch.from_numpy(np.asarray(golden_init.crc32_v1(name, shape, scales)))
        for kind in ("merge", "prune"):  # LTMP's were set by hand
            if name.endswith(f"{kind}_masker.threshold"):
                made[name] = torch.full((1,), content["config"][f"{kind}_threshold"])
    return made


def of_the_authors(method, **options):
    return laconic.import_checkpoint(published(method), method, **options)


def forward(model, x):
    with torch.no_grad():
        return model(x)


def counts(model):
    """Patch tokens that are there after each block, of every image: [depth, B]."""
    entries = model.laconic.ledger[1:]
    return [[len(e)] * len(e.size) if e.keep_mask is None else (e.keep_mask > 0).sum(1).tolist() for e in entries]


def tokens(batch=2, patches=20, channels=48, **more):
    return Tokens.start(torch.randn(batch, 1 + patches, channels), 1, True, **more)


def undecided(model, x):
    """Learned scorers with random weights decide one way: shift SPViT's so that about half of the tokens leave a stage."""
    torch.manual_seed(5)
    for p in model.laconic.parameters():
        torch.nn.init.normal_(p, std=0.5)
    for reducer in model.laconic.reducers.values():
        if model.laconic.config.info.name == "spvit":
            seen, last = [], reducer.selector.predictor.out_conv[4]
            hook = reducer.selector.register_forward_hook(lambda module, args, out, seen=seen: seen.append((args[1], out[0])))
            forward(model, x)
            hook.remove()
            alive, log = seen[0]
            with torch.no_grad():
                values = (log[..., 0] - log[..., 1])[alive > 0].sort().values
                middle = values[len(values) // 3 : 2 * len(values) // 3]
                widest = middle.diff().argmax()  # in a gap, so that no decision is a near tie
                last.bias[0] -= (middle[widest] + middle[widest + 1]) / 2
    return model


def there(t):
    return torch.ones_like(t.size) if t.keep_mask is None else t.keep_mask


# ------------------------------------------------------------------------------------------------ the authors' answers
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_spvit_of_the_authors(execution):
    z, model = golden(GOLDENS["spvit"]), of_the_authors("spvit", execution=execution)
    close(forward(model, picture()), z["logits"], LOGITS)
    left = counts(model)
    assert [[left[b][i] + 1 for b in (3, 6, 9)] for i in range(2)] == z["tokens_kept_per_stage"].tolist()


def test_scores_and_decisions_of_spvit():
    z, model, scores = golden(GOLDENS["spvit"]), of_the_authors("spvit", execution="masked"), []
    for reducer in model.laconic.reducers.values():
        reducer.selector.register_forward_hook(lambda module, args, out: scores.append(out))
    forward(model, picture())
    for stage, (log, probability) in enumerate(scores):
        close(log, z[f"stage{stage}_pred_logscore"], 5e-5)
        close(probability, z[f"stage{stage}_softmax_score"], 1e-5)
        alive = model.laconic.entry((3, 6, 9)[stage] + 1).keep_mask
        assert torch.equal(alive.to(torch.int8), torch.from_numpy(z[f"stage{stage}_policy"])[:, 1:])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_iared_of_the_authors(execution):
    z, model = golden(GOLDENS["iared"]), of_the_authors("iared", execution=execution)
    close(forward(model, picture()), z["logits"], LOGITS)
    left = counts(model)
    assert [[left[b][i] + 1 for b in (0, 4, 8)] for i in range(2)] == z["tokens_kept_per_group"].tolist()
    kept = model.laconic.entry(12).per_image[KEPT]
    close(kept * 196, z["tokens_kept_per_group"].astype(np.float32) - 1, 1e-4)


def test_probabilities_of_iared():
    z, model, seen = golden(GOLDENS["iared"]), of_the_authors("iared", execution="masked"), []
    for reducer in model.laconic.reducers.values():
        inner = reducer.informative
        reducer.informative = lambda t, here, inner=inner: seen.append(inner(t, here) * here) or seen[-1]
    forward(model, picture())
    for group, ours in enumerate(seen):
        close(ours, z["prob"][:, group, 1:], 1e-5)
        alive = model.laconic.entry((0, 4, 8)[group] + 1).keep_mask
        assert torch.equal(alive.to(torch.int8), torch.from_numpy(z["policy"])[:, group, 1:])


@pytest.mark.parametrize("execution", ["packed", "padded"])
def test_ltmp_of_the_authors(execution):
    z, model = golden(GOLDENS["ltmp"]), of_the_authors("ltmp", execution=execution)
    close(forward(model, picture()), z["logits"], LOGITS)
    assert (torch.tensor(counts(model)).T + 1).tolist() == z["tokens_after_block"].tolist()


def test_ltmp_masked_is_another_function():
    """By as much as the authors' two differ with these weights: 0.18 on one image, 0.29 on the other."""
    z, model = golden(GOLDENS["ltmp"]), of_the_authors("ltmp", execution="masked")
    apart = (forward(model, picture()) - torch.from_numpy(z["logits"])).abs().amax(1)
    assert [round(value, 2) for value in apart.tolist()] == [0.18, 0.29]
    # the first block parts the same sequence, the second one does not
    assert counts(model)[0] == [142, 147]
    assert counts(model)[1] != [111, 115]


@pytest.mark.parametrize("method", ["spvit", "iared", "ltmp"])
def test_names_of_the_authors(method):
    """All of ours are filled, from the entry that their own code would load last."""
    weights, model = published(method), of_the_authors(method)
    config, at = model.laconic.config, model.laconic.schedule.at
    made = config.convert_official(weights, at)
    assert set(made) == set(model.state_dict())
    if method == "iared":
        assert torch.equal(made["blocks.5.norm1.bias"], weights["groups.1.block_list.1.norm1.bias"])
        assert torch.equal(made["laconic.reducers.8.qk.weight"], weights["groups.2.agent.qk.weight"])
    if method == "spvit":
        ours, theirs = "laconic.reducers.6.selector.predictor.out_conv.2.bias", "score_predictor.1.out_conv.2.2.bias"
        assert torch.equal(made[ours], weights[theirs])
        assert torch.equal(made["laconic.reducers.9.selector.senet.0.bias"], weights["score_predictor.2.senet.0.bias"])
    if method == "ltmp":
        assert torch.equal(made["laconic.reducers.7.pruning"], weights["blocks.7.prune_masker.threshold"])


@pytest.mark.parametrize(
    ("method", "name"), [("spvit", "score_predictor.2.senet.0.bias"), ("iared", "groups.2.block_list.0.norm1.bias")]
)
def test_a_stage_too_many_does_not_fit(method, name):
    made = laconic.methods()[method].config().convert_official(published(method), (3, 6))
    assert name in made
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        of_the_authors(method, at=(3, 6))


def test_copies_of_the_heads_are_compared(caplog):
    weights = published("spvit")
    config = laconic.SPViT()
    config.convert_official(weights, (3, 6, 9))
    assert "copies of score_predictor.0.in_conv, score_predictor.0.out_conv" in caplog.text
    caplog.clear()
    last = {name: w for name, w in weights.items() if ".in_conv." not in name and ".out_conv." not in name}
    for name in weights.keys() - last.keys():
        stem, _, rest = name.partition("conv.")
        last[name] = weights[f"{stem}conv.2.{rest.partition('.')[2]}"]
    with caplog.at_level(logging.DEBUG):
        config.convert_official(last, (3, 6, 9))
    assert not caplog.text


# ------------------------------------------------------------------------------------------------ what all three keep to
@pytest.mark.parametrize("family", ["plain", "gap", "dinov3", "distilled"])
@pytest.mark.parametrize("method", ["spvit", "iared"])
def test_removed_equals_hidden(method, family):
    """However it runs, the answer is the same, and so are the images' counts."""
    x, answers, left = images(family), [], []
    for execution in EXECUTIONS:
        torch.manual_seed(0)
        extra = {"score": "mean-query"} if (method, family) == ("iared", "gap") else {}
        model = undecided(laconic.reduce_(make(family), method, at=AT, execution=execution, **extra), x)
        answers.append(forward(model, x))
        left.append(counts(model))
    assert len({str(one) for one in left}) == 1
    assert any(0 < count < 36 for count in left[0][1])
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["plain", "gap", "dinov3"])
def test_ltmp_packed_equals_padded(family):
    x, answers, left = images(family), [], []
    for execution in ("packed", "padded"):
        model = laconic.reduce_(make(family), "ltmp", execution=execution, merge=0.3, prune=0.02)
        answers.append(forward(model, x))
        left.append(counts(model))
    assert left[0] == left[1]
    assert len({tuple(image) for image in zip(*left[0], strict=True)}) > 1  # images differ
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)
    masked = laconic.reduce_(make(family), "ltmp", execution="masked", merge=0.3, prune=0.02)
    assert (forward(masked, x) - answers[0]).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["spvit", "iared", "ltmp"])
def test_training_hides_and_removes_nothing(method):
    model, x = reduced(method, "plain").train(), images("plain")
    model(x)
    for entry in model.laconic.ledger[2:]:
        assert len(entry) - 36 == (entry.per_token[PACKAGE].sum(1)[0] if method == "spvit" else 0)
        assert 0 < (entry.keep_mask == 0).sum() < entry.keep_mask.numel()
        assert ((entry.keep_mask == 0) | (entry.keep_mask == 1)).all()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("spvit", {"package": "max"}, "spvit: package must be one of 'sum', 'mean'"),
        ("spvit", {"ratios": (0.6, 0.0, 0.1)}, "ratios must be shares"),
        ("spvit", {"ratios": (0.6, 0.3)}, "2 target shares, and block 3 is reducing block 3.*keep="),
        ("spvit", {"execution": "sparse"}, "spvit: execution must be one of"),
        ("iared", {"heads": 0}, "iared: heads must be a number of heads, at least 1, not 0"),
        ("iared", {"heads": 5}, r"5 heads do not divide the 48 channels.*heads= one of \[1, 2, 3, 4, 6, 8, 12, 16\]"),
        ("iared", {"threshold": 1.0}, "threshold must be from 0 to below 1"),
        ("iared", {"score": "keys"}, "iared: score must be one of 'class', 'mean-query'"),
        ("ltmp", {"tau": 0.0}, "ltmp: tau must be a temperature above 0"),
        ("ltmp", {"flops": 0.0}, "ltmp: flops must be a share of the work"),
    ],
)
def test_what_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        laconic.reduce_(make("plain"), method, at=AT, **options)


def test_widths_that_do_not_part():
    with pytest.raises(ValueError, match="two halves: 45 channels of 3 heads"):
        laconic.SPViT().build(laconic.BlockContext(0, 1, 45, 3, None))
    with pytest.raises(LookupError, match="no class query.*score='mean-query'"):
        laconic.reduce_(make("gap"), "iared", at=AT)


# ------------------------------------------------------------------------------------------------ SPViT
def test_the_selector_by_hand():
    selector, x = Selector(48, 3), torch.randn(2, 20, 48)
    for p in selector.parameters():
        torch.nn.init.normal_(p, std=0.5)
    alive = (torch.rand(2, 20) > 0.4).float()
    log, probability = (out.detach() for out in selector(x, alive))
    inner, outer = selector.predictor.in_conv, selector.predictor.out_conv
    for b in range(2):
        weight = selector.senet(torch.stack([x[b, :, 16 * h : 16 * h + 16].mean(1) for h in range(3)], 1)).sigmoid()
        logs, scores = 0, 0
        for h in range(3):
            hidden = inner(x[b, :, 16 * h : 16 * h + 16])
            whole = (hidden[:, 8:] * alive[b, :, None]).sum(0) / alive[b].sum()
            two = outer(torch.cat([hidden[:, :8], whole.expand(20, -1)], 1))
            logs = logs + weight[:, h, None] * two.log_softmax(1)
            scores = scores + weight[:, h, None] * two.softmax(1)
        torch.testing.assert_close(log[b], (logs / weight.sum(1, keepdim=True)).detach())
        torch.testing.assert_close(probability[b], (scores / weight.sum(1, keepdim=True)).detach())
    own = sum(p.numel() for p in selector.senet.parameters())
    assert own + sum(p.numel() for p in Predictor(16).parameters()) == sum(p.numel() for p in selector.parameters())


def selecting(reducer, keep):
    """Make a reducer decide as [B, L] says; scores stay its own."""
    inner = reducer.selector.forward

    def forward(x, alive):
        _, scores = inner(x, alive)
        return torch.stack([keep, 1 - keep], 2).add(1e-9).log(), scores

    reducer.selector.forward = forward
    return reducer


@pytest.mark.parametrize("package", ["sum", "mean"])
def test_the_package_by_hand(package):
    reducer = laconic.SPViT(package=package).build(SITE).eval()
    for p in reducer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    t, keep = tokens(), (torch.rand(2, 20) > 0.3).float()
    keep[1] = 1  # of this image nothing leaves
    score = reducer.selector(t.patches, torch.ones(2, 20))[1][..., 0].detach()
    with torch.no_grad():
        out = selecting(reducer, keep).before(t, 20)
    gone = (keep[0] == 0).nonzero()[:, 0]
    expected = (score[0, gone, None] * t.patches[0, gone]).sum(0)
    if package == "mean":
        expected = expected / score[0, gone].sum()
    torch.testing.assert_close(out.patches[0, -1], expected)
    assert out.origin_index[0, -1] == gone[score[0, gone].argmax()]
    assert torch.equal(out.keep_mask, F.pad(keep, (0, 1), value=1.0))
    assert torch.equal(out.token_of_patch[0, gone], torch.full_like(gone, 20))
    assert out.size[0, -1] == len(gone)
    assert torch.equal(out.patches[1, -1], torch.zeros(48))
    assert out.size[1, -1] == 0
    assert torch.equal(out.per_token[PACKAGE], F.pad(torch.zeros(2, 20), (0, 1), value=1.0))


@pytest.mark.parametrize("package", ["sum", "mean"])
def test_packages_stay_and_are_asked(package):
    """Later selectors want to drop everything: packages stay, hold what left, and are heard by the global half."""
    reducer = laconic.SPViT(package=package).build(SITE).eval()
    with torch.no_grad():
        first = selecting(reducer, (torch.arange(20).expand(2, -1) < 12).float()).before(tokens(), 20)
        second = laconic.SPViT().build(SITE).eval()
        asked = []
        second.selector.register_forward_pre_hook(lambda module, args: asked.append(args))
        out = selecting(second, torch.zeros(2, 13)).before(first.drop_hidden(), 20)
        changed, selector = torch.cat([first.patches[:, :-1], torch.randn(2, 1, 48)], 1), Selector(48, 3)
        scores = [selector(x, first.keep_mask)[0] for x in (first.patches, changed)]
    assert out.keep_mask.tolist() == [[0.0] * 12 + [1.0, 1.0]] * 2
    assert out.size.tolist() == [[0.0] * 12 + [8.0, 12.0]] * 2
    assert torch.equal(out.patches[:, 12], first.patches[:, 20])
    assert not torch.equal(scores[0][:, :20], scores[1][:, :20])


def test_spvit_answers_twice_the_same():
    model, x = reduced("spvit", "plain"), images("plain")
    assert torch.equal(forward(model, x), forward(model, x))


@pytest.mark.parametrize("package", ["sum", "mean"])
@pytest.mark.parametrize("family", ["plain", "gap", "siglip"])
def test_spvit_in_training_is_that_of_inference(family, package, monkeypatch):
    monkeypatch.setattr(spvit, "gumbel_keep", lambda log: (log[..., 0] >= log[..., 1]).float() + 0 * log[..., 0])
    x = images(family)
    model = undecided(laconic.reduce_(make(family), "spvit", at=AT, package=package), x)
    expected, left = forward(model, x), counts(model)
    assert 1 < left[1][0] < 37
    answer = model.train()(x)
    torch.testing.assert_close(answer.detach(), expected, rtol=1e-3, atol=1e-3)
    assert counts(model) == left
    answer.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("package", ["sum", "mean"])
@pytest.mark.parametrize("all_or_none", [0.0, 1.0])
def test_gradients_are_finite_where_all_or_nothing_leaves(package, all_or_none, monkeypatch):
    monkeypatch.setattr(
        spvit, "gumbel_keep", lambda log: all_or_none + log.softmax(-1)[..., 0] - log.softmax(-1)[..., 0].detach()
    )
    model = laconic.reduce_(make("plain"), "spvit", at=AT, package=package).train()
    answer = model(images("plain"))
    (answer.square().mean() + sum(laconic.losses(model).values())).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() and g.abs().max() < 1e6 for g in gradients)
    alive = model.laconic.entry(4).keep_mask
    assert torch.equal(alive.detach(), torch.cat([torch.full((3, 36), all_or_none), torch.ones(3, 3)], 1))
    if all_or_none:
        assert (model.laconic.entry(4).size[:, 36:] == 0).all()


@pytest.mark.parametrize("keep", [None, 0.5, (0.9, 0.5, 0.4)])
def test_ratio_of_the_batch(keep):
    """The square of one difference: images may differ as long as their mean does not."""
    model = laconic.reduce_(make("plain"), "spvit", at=AT, keep=keep).train()
    model(images("plain"))
    aims = {None: (0.617, 0.369, 0.137), 0.5: (0.5, 0.25, 0.125), (0.9, 0.5, 0.4): (0.9, 0.45, 0.18)}[keep]
    shares = [model.laconic.entry(b + 1).keep_mask[:, :36].detach().mean() for b in AT]
    expected = sum((share - aim) ** 2 for share, aim in zip(shares, aims, strict=True)) / 3
    assert laconic.losses(model)["ratio"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_counts_and_work_of_spvit():
    config = laconic.SPViT()
    assert config.default_schedule(12, None, None).at == (3, 6, 9)
    assert config.default_schedule(16, None, None).at == (4, 8, 12)
    # patches by the product of the rates, and the packages so far
    assert config.counts(Schedule.rates(0.5, AT), 4, 36) == (36, 19, 11, 7)
    d = 64
    linear = d * d + d * 32 + 32 * 16 + 16 * 2
    assert config.macs(196, 196, laconic.BlockContext(0, 3, 384, 6, None))["matmul"] == 196 * 6 * (linear + 2 * 3)
    model = laconic.reduce_(make("plain"), "spvit", at=AT)
    assert laconic.summary(model).parameters == sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ IA-RED2
def test_the_interpreter_by_hand():
    reducer, t = laconic.IARED().build(SITE).eval(), tokens()
    torch.nn.init.normal_(reducer.qk.weight, std=0.3)
    with torch.no_grad():
        ours = reducer.informative(t, torch.ones(2, 20))
        out = reducer.before(t, 20)
        for b in range(2):
            x = (t.x[b] - t.x[b].mean(1, keepdim=True)) / (t.x[b].var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            q, k = reducer.qk(x)[0, :48], reducer.qk(x)[1:, 48:96]
            heads = [torch.sigmoid(k[:, 8 * h : 8 * h + 8] @ q[8 * h : 8 * h + 8] / 8**0.5) for h in range(6)]
            expected = torch.stack(heads).mean(0)
            torch.testing.assert_close(ours[b], expected)
            assert torch.equal(out.keep_mask[b], (expected > 0.5).float())
            assert out.per_image[KEPT][b] == (expected > 0.5).float().mean()
        # what has left stays out, whatever the interpreter says of it now
        again = laconic.IARED(threshold=0.0).build(SITE).eval().before(out, 20)
    assert torch.equal(again.keep_mask, out.keep_mask)
    assert again.per_image[KEPT].shape == (2, 2)
    assert LOG_PROBABILITY not in again.per_image


def test_hidden_tokens_are_not_asked_after():
    """Without a class token the mean query is that of the tokens that are there."""
    reducer, t = laconic.IARED(score="mean-query").build(SITE), tokens()
    alive = (torch.rand(2, 20) > 0.5).float()
    other = t.replace(x=torch.cat([t.x[:, :1], t.patches + (1 - alive.unsqueeze(2)) * torch.randn(2, 20, 48)], 1))
    one, two = (reducer.informative(one, alive) * alive for one in (t, other))
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, reducer.informative(t, torch.ones(2, 20)) * alive)


def test_a_threshold_of_zero_keeps_all():
    x, model = images("plain"), make("plain")
    expected = forward(model, x)
    laconic.reduce_(model, "iared", threshold=0.0)
    torch.testing.assert_close(forward(model, x), expected, rtol=1e-5, atol=1e-5)
    assert model.laconic.schedule.at == (0, 1, 2)
    assert laconic.IARED().default_schedule(12, None, None).at == (0, 4, 8)


def test_the_work_of_the_interpreters():
    small = laconic.BlockContext(0, 0, 384, 6, None)
    assert laconic.IARED().macs(196, 196, small)["matmul"] == 197 * 3 * 384 * 384 + 196 * 384
    qk = laconic.IARED().build(small)
    assert 3 * sum(p.numel() for p in qk.parameters()) == 1_330_560  # 1.33M on DeiT-S


def test_draws_and_their_log_probabilities():
    reducer, t = laconic.IARED().build(SITE).train(), tokens(batch=400, patches=6)
    t = t.replace(x=t.x[:1].expand(400, -1, -1), keep_mask=torch.tensor([1.0, 1, 1, 0, 1, 1]).expand(400, -1))
    torch.nn.init.normal_(reducer.qk.weight, std=0.3)
    out = reducer.before(t, 6)
    p = reducer.informative(t, t.keep_mask)[0].detach()
    assert not out.keep_mask.requires_grad
    assert (out.keep_mask[:, 3] == 0).all()
    torch.testing.assert_close(out.keep_mask.mean(0)[[0, 1, 2, 4, 5]], p[[0, 1, 2, 4, 5]], rtol=0, atol=0.1)
    log = torch.where(out.keep_mask > 0, p, 1 - p).log()
    torch.testing.assert_close(out.per_image[LOG_PROBABILITY][:, 0].detach(), log[:, [0, 1, 2, 4, 5]].sum(1))
    assert out.per_image[LOG_PROBABILITY].requires_grad


# ------------------------------------------------------------------------------------------------ its policy gradient
def toy(groups):
    """Two images of four patches each, for a model whose answer depends on which are kept."""
    model = laconic.reduce_(make("plain", img_size=32), "iared", at=groups)
    torch.manual_seed(7)
    for p in model.laconic.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double().train(), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def outcomes(model, x, groups, monkeypatch, act):
    """``act()`` for every outcome of the draws on the first image, with its exact probability (differentiable)."""
    for leaves in itertools.product(range(groups + 1), repeat=4):  # the group before which each patch leaves
        plan, probability = iter(range(groups)), [torch.ones((), dtype=torch.float64)]

        def draw(p, leaves=leaves, plan=plan, probability=probability):
            group = next(plan)
            for patch, leaf in enumerate(leaves):
                if leaf >= group:
                    probability[0] = probability[0] * (p[0, patch] if leaf > group else 1 - p[0, patch])
            return torch.tensor([[float(leaf > group) for leaf in leaves]], dtype=p.dtype).expand_as(p)

        monkeypatch.setattr(iared, "draw", draw)
        yield probability, act()


@pytest.mark.parametrize(
    ("groups", "trained", "penalty"),
    [((1,), None, 1.0), pytest.param((1, 2), None, (2.0, 0.5), marks=pytest.mark.slow), ((1, 2), [0], 3.0)],
)
def test_the_estimate_is_the_exact_gradient(groups, trained, penalty, monkeypatch):
    """Over all outcomes of its draws, the mean of the estimates is the gradient of the expected reward by enumeration."""
    model, x = toy(groups)
    x = x[:1]
    answers = [y.argmax(1).item() for _, y in outcomes(model, x, len(groups), monkeypatch, lambda: model(x).detach())]
    label = torch.tensor([max(set(answers), key=answers.count)])
    assert 0 < sum(a == label.item() for a in answers) < len(answers)  # right or wrong, as the draws fall
    learned = list(model.laconic.parameters())
    estimate, exact, total = [0.0] * len(learned), [0.0] * len(learned), 0.0

    def step():
        return policy_step(model, x, label, penalty=penalty, groups=trained)

    for probability, out in outcomes(model, x, len(groups), monkeypatch, step):
        chance = probability[0].detach()
        total += chance.item()
        gradients = torch.autograd.grad(-out.loss, learned, retain_graph=True, allow_unused=True)
        enumerated = torch.autograd.grad(probability[0] * out.reward.sum(), learned, allow_unused=True)
        for i, (g, e) in enumerate(zip(gradients, enumerated, strict=True)):
            estimate[i] = estimate[i] + (0 if g is None else chance * g)
            exact[i] = exact[i] + (0 if e is None else e)
    assert total == pytest.approx(1, abs=1e-6)
    # a group that is not in training draws too, and has no part in the reward: only the first one's gradient is asked for
    for i in range(len(learned) if trained is None else 2):
        assert exact[i].abs().max() > 1e-4
        torch.testing.assert_close(estimate[i], exact[i], rtol=1e-4, atol=1e-7)


def test_a_step_is_self_critical():
    model, x = toy((1, 2))
    model.float()
    x = x.float()
    labels = torch.stack([forward(model, x)[0], forward(model.eval(), x)[1]]).argmax(1)
    model.train()
    torch.manual_seed(1)
    out = policy_step(model, x, labels, penalty=2.0)
    assert model.training
    assert all(module.training for module in model.modules())
    notes = model.laconic.entry(4).per_image
    right = out.logits.argmax(1) == labels
    assert torch.equal(out.reward, rewards(right, notes[KEPT], 2.0))
    assert out.loss.item() == pytest.approx(policy_loss(notes[LOG_PROBABILITY], out.reward, out.baseline).item())
    torch.manual_seed(1)
    assert torch.equal(model(x), out.logits)
    assert not torch.equal(out.reward, out.baseline)
    greedy = forward(model.eval(), x)
    torch.testing.assert_close(rewards(greedy.argmax(1) == labels, model.laconic.entry(4).per_image[KEPT], 2.0), out.baseline)


def test_rewards_by_hand():
    got = rewards(torch.tensor([True, False]), torch.tensor([[0.5, 0.25], [0.5, 0.25]]), (3.0, 5.0))
    assert got.tolist() == [[0.75, 0.9375], [-3.0, -5.0]]
    log = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]], requires_grad=True)
    loss = policy_loss(log, got, torch.zeros(2, 2))
    assert loss.item() == pytest.approx((3 * 1.6875 - 12 * 8.0) / 2)
    loss.backward()
    assert log.grad.tolist() == [[-0.84375, -0.84375], [4.0, 4.0]]


def test_the_curriculum():
    model, x = reduced("iared", "plain").train(), images("plain")
    curriculum(model, 1)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning == ["laconic.reducers.2.qk.weight", "laconic.reducers.2.qk.bias"]
    labels = forward(model.eval(), x).argmax(1)
    out = policy_step(model.train(), x, labels, groups=[1])
    assert out.reward.shape == (3, 1)
    out.loss.backward()
    assert model.laconic.reducers["2"].qk.weight.grad.abs().sum() > 0
    # the last group does nothing yet
    assert torch.equal(model.laconic.entry(4).keep_mask, model.laconic.entry(3).keep_mask)
    assert model.laconic.entry(4).per_image[KEPT].shape == (3, 2)
    curriculum(model, 2, "blocks")
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"blocks.3.{name}" for name, _ in model.blocks[3].named_parameters()}
    curriculum(model, None)
    assert all(p.requires_grad for p in model.parameters())
    assert model.laconic.schedule == Schedule.adaptive(AT)


@pytest.mark.unchecked
def test_what_the_policy_gradient_refuses():
    model, x, labels = reduced("iared", "plain"), images("plain"), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"in evaluation mode; call model\.train\(\)"):
        policy_step(model, x, labels)
    model.train()
    with pytest.raises(ValueError, match=r"among the 3 groups that are turned on, counted from 0, not \[3\]"):
        policy_step(model, x, labels, groups=[3])
    with pytest.raises(ValueError, match="penalty has 2 values, and 3 groups"):
        policy_step(model, x, labels, penalty=(1.0, 2.0))
    with pytest.raises(ValueError, match="no group 3"):
        curriculum(model, 3)
    with pytest.raises(ValueError, match="part must be"):
        curriculum(model, 0, "all")
    with pytest.raises(ValueError, match="reduced by spvit; the policy gradient is for iared"):
        policy_step(reduced("spvit", "plain"), x, labels)
    off = laconic.reduce_(make("plain"), "iared", keep=1.0, at=AT).train()
    with pytest.raises(ValueError, match="no group of this model is turned on"):
        policy_step(off, x, labels)


# ------------------------------------------------------------------------------------------------ LTMP
def look(t, heads=3):
    """Attention of a block with random queries and keys to these tokens, as `AttentionView`, hidden ones hidden."""
    q, k, v = (torch.randn(len(t.x), heads, t.x.shape[1], 16) for _ in range(3))
    k = k + 3 * torch.randn(1, 1, 1, 16)  # alike enough to merge
    mask = F.pad(there(t), (1, 0), value=1.0).clamp_min(1e-30).log()[:, None, None]
    return AttentionView(q, k, v, mask, 0.25, 1, True, t.keep_mask)


def by_hand(t, seen, b, merge, prune, hidden_ask):
    """What one LTMP step makes of image b: place of each token there is -> (features, size), in order."""
    alive, gate = there(t)[b], torch.ones_like(t.size[b]) if t.attn_scale is None else t.attn_scale[b]
    sent = seen.matrix[b].mean(0)
    asking = torch.ones(len(alive) + 1) if hidden_ask else torch.cat([torch.ones(1), alive])
    importance = ((sent * asking[:, None]).sum(0) / asking.sum())[1:]
    live = [i for i in range(len(alive)) if alive[i] > 0]
    a, b_side = [i for i in live if i % 2 == 1], [i for i in live if i % 2 == 0]  # the class token stands at place 0
    group = {i: [i] for i in live}
    for i in a:
        similar = [F.cosine_similarity(seen.keys[b, i], seen.keys[b, j], dim=0).item() for j in b_side]
        if similar and max(similar) > merge:
            group[b_side[similar.index(max(similar))]] += group.pop(i)
    out = {}
    for i in [i for i in a if i in group] + b_side:
        if max(importance[j].item() for j in group[i]) > prune:
            size = sum(gate[j] for j in group[i])
            out[t.origin_index[b, i].item()] = (sum(gate[j] * t.patches[b, j] for j in group[i]) / size, size)
    return out


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_ltmp_by_hand(execution):
    """Two steps in a row: the second parts what the first has left, or the sequence with its holes."""
    config = laconic.LTMP(merge=0.75, prune=0.03, execution=execution)
    reducer, t = config.build(SITE).eval(), tokens()
    for _ in range(2):
        seen = look(t)
        expected = [by_hand(t, seen, b, 0.75, 0.03, execution == "masked") for b in range(2)]
        before = t
        with torch.no_grad():
            t = reducer.between(t, seen, 20)
        assert [len(one) for one in expected] != there(before).sum(1).tolist()
        for b in range(2):
            live = [i for i in range(len(t)) if t.keep_mask[b, i] > 0]
            assert [t.origin_index[b, i].item() for i in live] == list(expected[b])
            for i, (features, size) in zip(live, expected[b].values(), strict=True):
                torch.testing.assert_close(t.patches[b, i], features, rtol=1e-4, atol=1e-5)
                assert t.attn_scale[b, i] == t.size[b, i] == size
                assert (t.token_of_patch[b] == i).sum() == size
        assert len(t) == len(before)
        t = t if execution == "masked" else t.drop_hidden()
    assert t.size.sum(1).tolist() == (t.token_of_patch >= 0).sum(1).tolist()
    assert t.size.max() > 2


def test_order_of_what_ltmp_leaves():
    t = tokens(patches=6)
    with torch.no_grad():
        out = laconic.LTMP(merge=1.0).build(SITE).eval().between(t, look(t), 6)
    assert out.origin_index.tolist() == [[1, 3, 5, 0, 2, 4]] * 2


def test_ltmp_that_finds_nothing_to_do():
    """Nothing is so alike, and all receive attention."""
    x, model = images("plain"), make("plain")
    expected = forward(model, x)
    for execution in EXECUTIONS:
        laconic.reduce_(model, "ltmp", merge=1.0, execution=execution)
        torch.testing.assert_close(forward(model, x), expected, rtol=1e-4, atol=1e-4)
        assert counts(model) == [[36] * 3] * 4
        laconic.restore_(model)


def test_ltmp_that_leaves_nothing():
    for execution in EXECUTIONS:
        model = laconic.reduce_(make("plain"), "ltmp", prune=1.0, execution=execution)
        assert forward(model, images("plain")).isfinite().all()
        assert counts(model)[0] == [0] * 3


def test_proportional_attention_of_ltmp():
    """Merged tokens count by their sizes at the next block; those pruned do not count at all."""
    model, x, gates = laconic.reduce_(make("plain"), "ltmp", merge=0.2, prune=0.01), images("plain"), []
    inner = model.laconic.reducers["2"].between
    model.laconic.reducers["2"].between = lambda t, seen, n: gates.append((t, seen)) or inner(t, seen, n)
    forward(model, x)
    t, seen = gates[0]
    logits = seen.q @ seen.k.transpose(2, 3) * seen.scale
    weights = logits.exp() * F.pad(t.size * there(t), (1, 0), value=1.0)[:, None, None]
    torch.testing.assert_close(seen.matrix, weights / weights.sum(3, keepdim=True), rtol=1e-4, atol=1e-6)
    assert t.size.max() > 1


def ltmp_in_training(at=None, keep=None, **options):
    model = laconic.reduce_(make("plain"), "ltmp", merge=0.3, prune=0.02, at=at, keep=keep, **options).train()
    return model, model(images("plain"))


@pytest.mark.parametrize("at", [None, (1, 2), (0, 3)])
def test_the_share_of_the_work(at):
    model, _ = ltmp_in_training(at)
    left = [[36] * 3, *([count for count in row] for row in counts(model))]
    full, share = 4 * cost(37, 37, 48), torch.zeros(3)
    for block in range(4):
        share += torch.tensor(
            [cost(before + 1, after + 1, 48) / full for before, after in zip(*left[block : block + 2], strict=True)]
        )
    torch.testing.assert_close(model.laconic.entry(4).per_image[WORK].detach(), share)
    assert 0.2 < share.mean() < 0.95
    assert laconic.losses(model)["flops"].item() == pytest.approx((share.mean().item() - 0.75) ** 2, rel=1e-4)


def test_what_ltmp_aims_at():
    model, _ = ltmp_in_training(flops=0.5)
    share = model.laconic.entry(4).per_image[WORK].mean().item()
    assert laconic.losses(model)["flops"].item() == pytest.approx((share - 0.5) ** 2, rel=1e-4)
    # with keep rates, at what their counts would cost: 18 and then 9 tokens
    model, _ = ltmp_in_training((1, 3), 0.5)
    share = model.laconic.entry(4).per_image[WORK].mean().item()
    planned = (cost(37, 37, 48) + cost(37, 19, 48) + cost(19, 19, 48) + cost(19, 10, 48)) / (4 * cost(37, 37, 48))
    assert laconic.losses(model)["flops"].item() == pytest.approx((share - planned) ** 2, rel=1e-4)
    # a block that is switched off last does not stop the count
    model, _ = ltmp_in_training((1, 3), (0.5, 1.0))
    assert len(laconic.losses(model)) == 1
    assert counts(model)[3] == counts(model)[1]


def test_the_work_teaches_the_thresholds():
    """Too much work: thresholds of merging must fall and of pruning rise; too little, the other way round."""
    for flops, sign in ((0.01, 1), (1.0, -1)):
        model, _ = ltmp_in_training(flops=flops)
        laconic.losses(model)["flops"].backward()
        for reducer in model.laconic.reducers.values():
            assert sign * reducer.merging.grad.item() > 0
            assert sign * reducer.pruning.grad.item() < 0


def test_decisions_have_the_gradients_of_a_sigmoid():
    for tau in (0.1, 0.5):
        reducer = laconic.LTMP(tau=tau, merge=0.3).build(SITE).train()
        values = torch.randn(50)
        hard = reducer.above(values, reducer.merging)
        assert torch.equal(hard.detach(), (values > 0.3).float())
        hard.sum().backward()
        soft = ((values - 0.3) / tau).sigmoid()
        assert reducer.merging.grad.item() == pytest.approx((-soft * (1 - soft) / tau).sum().item(), rel=1e-4)


def test_training_of_ltmp_is_the_masked_function():
    x, model = images("plain"), laconic.reduce_(make("plain"), "ltmp", merge=0.3, prune=0.02, execution="masked")
    expected = forward(model, x)
    left = counts(model)
    torch.testing.assert_close(model.train()(x).detach(), expected, rtol=1e-4, atol=1e-4)
    assert counts(model) == left


def test_the_work_of_ltmp():
    config = laconic.LTMP()
    assert config.default_schedule(12, None, None).at == tuple(range(12))
    assert config.macs(196, 196, laconic.BlockContext(0, 0, 384, 6, None))["matmul"] == 98 * 98 * 64
    assert laconic.methods()["ltmp"].full_attention
    model = laconic.reduce_(make("plain"), "ltmp")
    assert sum(p.numel() for p in model.laconic.parameters()) == 8  # two for each block
