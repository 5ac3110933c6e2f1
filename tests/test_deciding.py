"""Methods that decide for every image: ATS against its authors' output, and the three ways to run such a method."""

import pytest
import timm
import torch

import golden_init
import laconic
from benchmarks.executions import Given
from families import AT, FAMILIES, images, make, options, reduced
from laconic.core.packing import Packing
from laconic.core.tokens import Tokens
from laconic.methods.ats import raster_sample, sorted_sample
from laconic.methods.ops import SCORES
from test_goldens import LOGITS, close, golden, picture

EXECUTIONS = ("packed", "padded", "masked")


def deit_tiny():
    model = timm.create_model("deit_tiny_patch16_224").eval()
    rule = {k: torch.from_numpy(golden_init.crc32_v1(k, tuple(v.shape), {})) for k, v in model.state_dict().items()}
    model.load_state_dict(rule)
    return model


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_ats_of_its_authors(execution):
    """Each image alone in the published code; together here."""
    z = golden("ats_single")
    model = laconic.reduce_(deit_tiny(), "ats", execution=execution)
    with torch.no_grad():
        close(model(picture()), z["logits"], LOGITS)
    for stage, (block, valid) in enumerate(zip(range(3, 12), z["valid_tokens_after_ats"], strict=True)):
        entry = model.laconic.entry(block + 1)
        alive = torch.ones_like(entry.size) if entry.keep_mask is None else entry.keep_mask
        assert (alive.sum(1) + 1).tolist() == valid.tolist(), stage
    first = z["kept_input_pos_ats0"]
    held = model.laconic.entry(4).token_of_patch >= 0
    for image in range(2):
        theirs = sorted(position - 1 for position in first[image].tolist() if position > 0)
        assert held[image].nonzero().flatten().tolist() == theirs


def test_ats_files_of_its_authors():
    plain = deit_tiny()
    weights = plain.state_dict() | {f"blocks.{i}.attn.out_zero_mask": torch.zeros(1, 192) for i in range(3, 12)}
    model = laconic.import_checkpoint({"model": weights}, "ats")
    assert model.laconic.schedule.at == tuple(range(3, 12))
    assert torch.equal(model.blocks[5].attn.qkv.weight, plain.blocks[5].attn.qkv.weight)


def test_ats_of_equal_scores_loses_the_lowest_alone():
    score, there = torch.ones(2, 10), torch.ones(2, 10, dtype=torch.bool)
    assert sorted_sample(score, there, 9).tolist() == [[0.0] + [1.0] * 9] * 2
    assert sorted_sample(score, there, 30).sum(1).tolist() == [9, 9]


def test_ats_ignores_what_is_not_there():
    score = torch.rand(1, 12, generator=torch.Generator().manual_seed(0))
    for sample in (sorted_sample, raster_sample):
        alone = sample(score, torch.ones_like(score, dtype=torch.bool), 6)
        padded = torch.cat([score, torch.zeros(1, 5)], 1)
        there = torch.arange(17).unsqueeze(0) < 12
        assert torch.equal(sample(padded, there, 6), torch.cat([alone, torch.zeros(1, 5)], 1))


def test_ats_keeps_at_most_its_points_and_one_token_alone_survives():
    score = torch.rand(4, 40, generator=torch.Generator().manual_seed(1))
    there = torch.ones_like(score, dtype=torch.bool)
    assert sorted_sample(score, there, 9).sum(1).max() <= 9
    lonely = torch.zeros_like(there)
    lonely[:, 7] = True
    assert sorted_sample(score * lonely, lonely, 9).argmax(1).tolist() == [7] * 4


def test_ats_keep_is_the_share_of_points():
    model = laconic.reduce_(make("plain"), "ats", keep=0.5, at=AT)
    with torch.no_grad():
        model(images("plain"))
    for block, most in zip(AT, (18, 9, 4), strict=True):
        assert model.laconic.entry(block + 1).size.shape[1] <= most


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_executions_give_the_same_answer(family):
    if family == "parallel":
        pytest.skip("no place between attention and MLP")
    x, answers = images(family, 5), {}
    for execution in EXECUTIONS:
        model = laconic.reduce_(make(family), "ats", at=AT, execution=execution, **options("ats", family))
        with torch.no_grad():
            answers[execution] = model(x)
    for execution in ("padded", "masked"):
        torch.testing.assert_close(answers[execution], answers["packed"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["plain", "dinov2-reg", "dinov3", "siglip", "gap", "rope-mixed"])
@pytest.mark.parametrize("counts", [(1, 20, 36), (36, 36, 36), (7, 7, 7), (0, 5, 30)])
def test_an_image_is_answered_as_if_it_were_alone(family, counts):
    """Also with very different counts, and where no patch is left at all."""
    if counts[0] == 0 and family in ("gap", "siglip"):
        counts = (1, 5, 30)  # without a class token something must be left
    x = images(family)
    out = {}
    for execution in EXECUTIONS:
        model = laconic.reduce_(make(family), "ats", at=[1], execution=execution, **options("ats", family))
        model.laconic.reducers["1"] = Given(torch.tensor(counts))
        model.laconic.reducers["1"].site = laconic.BlockContext(0, 1, 48, 3, None)
        with torch.no_grad():
            out[execution] = model(x)
    for execution in ("padded", "masked"):
        torch.testing.assert_close(out[execution], out["packed"], rtol=1e-4, atol=1e-4)
    for image, count in enumerate(counts):
        alone = laconic.reduce_(
            make(family), "topk", schedule=laconic.Schedule.keep_counts({1: max(1, count)}), **options("topk", family)
        )
        alone.laconic.reducers["1"] = Given(torch.tensor([count]))
        alone.laconic.reducers["1"].site = laconic.BlockContext(0, 1, 48, 3, None)
        with torch.no_grad():
            expected = alone(x[image : image + 1])
        torch.testing.assert_close(out["packed"][image : image + 1], expected, rtol=1e-4, atol=1e-4)


def test_packed_execution_runs_the_tokens_there_are_and_no_others():
    model, rows = laconic.reduce_(make("plain"), "ats", at=[1]), []
    model.laconic.reducers["1"] = Given(torch.tensor([3, 10, 20]))
    model.laconic.reducers["1"].site = laconic.BlockContext(0, 1, 48, 3, None)
    for block in model.blocks[1:]:
        block.mlp.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape[:2])))
    with torch.no_grad():
        model(images("plain"))
    assert rows == [(1, 3 + 10 + 20 + 3)] * 3


def test_packing_goes_there_and_back():
    x = torch.randn(2, 5, 4)
    alive = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    tokens = Tokens.start(x, 1, True).replace(keep_mask=alive)
    packing = Packing.of(tokens)
    assert packing.lengths == (4, 2)
    row = packing.pack(x)
    assert torch.equal(row[0], torch.stack([x[0, 0], x[0, 1], x[0, 3], x[0, 4], x[1, 0], x[1, 2]]))
    back = packing.unpack(row + 1, x)
    moved = (back - x).abs().sum(2) > 0
    assert moved.tolist() == [[True, True, False, True, True], [True, False, True, False, False]]
    assert Packing.of(tokens.replace(keep_mask=None)) is None


def test_the_mean_query_is_of_the_tokens_there_are():
    model = laconic.reduce_(make("siglip"), "ats", at=AT, score="mean-query", execution="masked")
    scores = []
    original = SCORES["mean-query"]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(
            SCORES,
            "mean-query",
            lambda t, s: scores.append(original(t, s) * (t.keep_mask if t.keep_mask is not None else 1)) or scores[-1],
        )
        model(images("siglip"))
    assert all(score.sum(1).allclose(torch.ones(3), atol=1e-4) for score in scores)


def test_training_hides_and_removes_nothing():
    model, x = reduced("ats", "plain").train(), images("plain")
    model(x).square().mean().backward()
    assert len(model.laconic.entry(4)) == 36
    assert (model.laconic.entry(4).keep_mask == 0).any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_summary_says_what_single_images_cost():
    model, x = laconic.reduce_(make("plain"), "ats", at=[1]), images("plain")
    model.laconic.reducers["1"] = Given(torch.tensor([3, 10, 20]))
    model.laconic.reducers["1"].site = laconic.BlockContext(0, 1, 48, 3, None)
    found = laconic.summary(model, images=[x, x]).observed
    assert found.images == 6
    assert (found.tokens[0].mean, found.tokens[3].least, found.tokens[3].most) == (36, 3, 20)
    assert found.tokens[3].mean == pytest.approx(11)
    singles = [
        laconic.summary(laconic.reduce_(make("plain"), "topk", schedule=laconic.Schedule.keep_counts({1: n})))
        for n in (3, 10, 20)
    ]
    assert found.macs.least == singles[0].macs
    assert found.macs.most == singles[2].macs
    assert found.macs.mean == pytest.approx(sum(s.macs for s in singles) / 3)
    assert "GMACs per image" in str(laconic.summary(model, images=x))
    with pytest.raises(ValueError, match="no images to observe"):
        laconic.summary(model, images=[])


def test_errors():
    with pytest.raises(ValueError, match="execution must be one of 'packed', 'padded', 'masked'"):
        laconic.ATS(execution="dense")
    with pytest.raises(ValueError, match="each value must be 1"):
        laconic.Schedule((1,), (0.5,), "decide")
    assert laconic.Schedule.of({"at": [1], "decide": [1]}) == laconic.Schedule.adaptive([1])
