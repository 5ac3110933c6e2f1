"""The outputs of the papers' own code (tests/goldens), within their tolerances."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import golden_init
import laconic
from families import observe
from laconic.core.tokens import Tokens
from laconic.methods import dynamicvit
from laconic.methods.ops import density_peaks
from laconic.training.distillation import logit_distillation, token_distillation

HERE = Path(__file__).parent / "goldens"
LOGITS, CHANNELS, ATTENTION = 2e-5, 5e-5, 1e-6
AT = (3, 6, 9)


def golden(name):
    return np.load(HERE / f"{name}.npz")


def official_name(name):
    """Our name of a parameter -> the official one."""
    if not name.startswith("laconic.reducers."):
        return name
    _, _, block, _, rest = name.split(".", 4)
    return f"score_predictor.{AT.index(int(block))}.{rest}"


def weights(model, rule):
    return {k: torch.from_numpy(rule(official_name(k), tuple(v.shape))) for k, v in model.state_dict().items()}


def deit_tiny(rule=golden_init.golden_param):
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(weights(model, rule))
    return model.eval()


def reduced(method, rule=golden_init.golden_param, **kwargs):
    model = laconic.reduce_(timm.create_model("deit_tiny_patch16_224").eval(), method, **kwargs)
    model.load_state_dict(weights(model, rule))
    return model


def picture():
    return torch.from_numpy(golden_init.golden_input())


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=tolerance)


def test_plain_deit():
    z = golden("deit_t_plain")
    with torch.no_grad():
        close(deit_tiny(golden_init.crc32_v1)(picture()), z["logits"], LOGITS)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("evit_deit_tiny_k07_fuse", "evit"),
        ("etps_deit_tiny_k07_eval", "etps"),
        ("dynamicvit_deit_tiny_k07_eval", "dynamicvit"),
        ("dtps_deit_tiny_k07_eval", "dtps"),
    ],
)
def test_reduced_deit(name, method):
    z, model, moments = golden(name), reduced(method, keep=0.7), []
    observe(model, lambda before, after: moments.append((before, after)))
    with torch.no_grad():
        logits = model(picture())
    close(logits, z["logits"], LOGITS)
    assert len(moments) == len(AT)
    for i, (before, after) in enumerate(moments):
        kept = z[f"kept_rel_{i}"]
        count = kept.shape[1]
        close(after.x[..., :8], z[f"tokens8_{i}"], CHANNELS)
        # which tokens stayed, in which order: the place of each is that of the token it was before
        ours = before.origin_index.gather(1, torch.from_numpy(kept))
        assert torch.equal(after.origin_index[:, :count], ours)
        if f"host_{i}" in z.files:
            dropped = before.origin_index.gather(1, torch.from_numpy(z[f"dropped_rel_{i}"]))
            assert torch.equal(after.token_of_patch.gather(1, dropped), torch.from_numpy(z[f"host_{i}"]))


def test_class_attention_and_scores():
    """The scores themselves, as the reducers saw them."""
    z, model, seen_scores = golden("evit_deit_tiny_k07_fuse"), reduced("evit", keep=0.7), []
    for reducer in model.laconic.reducers.values():
        reducer.score = lambda tokens, seen: seen_scores.append(seen.cls) or seen_scores[-1]
    with torch.no_grad():
        model(picture())
    for i, ours in enumerate(seen_scores):
        close(ours, z[f"cls_attn_{i}"], ATTENTION)


@pytest.mark.parametrize("k", range(12))
def test_tome(k):
    z, model = golden("tome_r8_propattn"), reduced("tome", golden_init.crc32_v1, r=8)
    with torch.no_grad():
        logits = model(picture())
    close(logits, z["logits"], LOGITS)
    stage, before = laconic.provenance(model).stages[k], model.laconic.entry(k)
    assert model.laconic.prefix + stage.size.shape[1] == z["tokens_after_block"][k]
    # the official map of tokens to tokens, composed with where the patches were, is where the patches are
    assignment = torch.from_numpy(z[f"assign_block{k}"])[:, 1:] - 1
    assert torch.equal(assignment.gather(1, before.token_of_patch), stage.where)
    if k == 11:
        close(F.pad(stage.size, (1, 0), value=1.0), z["final_size"], 0)


def test_topk_of_haurum():
    z = golden("tr_topk")
    schedule = laconic.Schedule.keep_counts({3: 137, 6: 96, 9: 67})
    model = reduced("topk", golden_init.crc32_v1, schedule=schedule)
    with torch.no_grad():
        close(model(picture()), z["logits"], LOGITS)


def test_squeeze_alone():
    z = golden("tps_module_unit")
    x, kept = torch.from_numpy(z["full"]), torch.from_numpy(z["kept"])
    tokens = Tokens.start(x, 0, False)
    score = torch.zeros(x.shape[:2]).scatter(1, kept, torch.arange(kept.shape[1], 0, -1.0).expand(len(x), -1))
    for temperature, name in ((1.0, "out_eval"), (0.5, "out_eval_temp05")):
        squeezed = laconic.ETPS(temperature=temperature).squeeze(tokens, None, score, kept.shape[1])
        close(squeezed.x, z[name], 1e-6)
    keep = (score > 0).float()
    close(laconic.DTPS().soft_squeeze(tokens, keep, 1 - keep).x, z["out_train"], 1e-6)
    # tokens pruned at an earlier stage neither give nor receive
    previous = torch.from_numpy(z["prev2"])[..., 0]
    later = laconic.DTPS().soft_squeeze(tokens, keep * previous, (1 - keep) * previous)
    close(later.x, z["out_train_prev2"], 1e-6)


def test_density_peaks_alone():
    z = golden("dpcknn_unit")
    x = torch.from_numpy(z["x"])
    cluster, centres = density_peaks(x, 6, assign="nearest", farthest="sample")
    assert torch.equal(centres, torch.from_numpy(z["centers"]))
    assert torch.equal(cluster, torch.from_numpy(z["assign"]))
    weight = torch.from_numpy(z["weight"])[..., 0]
    total = torch.zeros(2, 6).scatter_add(1, cluster, weight) + 1e-6
    merged = Tokens.start(x, 0, False).merge(cluster, weight / total.gather(1, cluster), centres)
    close(merged.x, z["merged"], 1e-5)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_dynamicvit_training(kind, monkeypatch):
    """Masks, losses and gradients of one training step, with the official noise."""
    z, stages = golden("dynamicvit_deit_tiny_k07_train"), iter(range(3))
    expected = json.loads((HERE / "dynamicvit_deit_tiny_k07_train.json").read_text())["losses"][kind]

    def decide(log_probs):
        soft = (log_probs + torch.from_numpy(golden_init.golden_gumbel(next(stages), log_probs.shape))).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), 2).float()
        return (hard - soft.detach() + soft)[..., 0]

    monkeypatch.setattr(dynamicvit, "gumbel_keep", decide)
    model, teacher = reduced("dynamicvit", keep=0.7).train(), deit_tiny()
    features = model.forward_features(picture())
    logits = model.forward_head(features)
    with torch.no_grad():
        their_features = teacher.forward_features(picture())
        their_logits = teacher.forward_head(their_features)
    close(logits.detach(), z["train_logits"], LOGITS)
    close(features[:, 1:, :8].detach(), z["train_features8"], CHANNELS)
    for i, block in enumerate(AT):
        assert torch.equal(model.laconic.entry(block + 1).keep_mask.detach(), torch.from_numpy(z[f"decision_{i}"]).float())
    alive = laconic.provenance(model).final.alive
    assert torch.equal(alive, torch.from_numpy(z["final_mask"])[..., 0])
    ours = {
        "cls": -(torch.from_numpy(z["labels"]) * logits.log_softmax(-1)).sum(-1).mean(),
        "ratio_sum": laconic.losses(model)["ratio"] * 3,
        "cls_kl": logit_distillation(logits.double(), their_logits.double()),  # in single precision 1e-5 off by rounding alone
        "token": token_distillation(features[:, 1:], their_features[:, 1:], alive, kind),
    }
    total = ours["cls"] + 2 * ours["ratio_sum"] / 3 + 0.5 * ours["cls_kl"] + 0.5 * ours["token"]
    for name, loss in {**ours, "total": total}.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-5), name
    total.backward()
    gradients = {official_name(name): p.grad for name, p in model.named_parameters()}
    checked = [key.split("::")[1] for key in z.files if key.startswith(f"grad_{kind}::") and key.endswith("::norm")]
    assert len(checked) == 6
    for name in checked:
        assert gradients[name].norm().item() == pytest.approx(float(z[f"grad_{kind}::{name}::norm"]), rel=1e-4)
        head = gradients[name].flatten()[:8]
        torch.testing.assert_close(head, torch.from_numpy(z[f"grad_{kind}::{name}::head8"]), rtol=1e-3, atol=1e-6)
