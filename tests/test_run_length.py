"""Run-length (RLT): tubelets that repeat the one before them are dropped before the first block."""

import copy

import pytest
import torch

import families
import host_laws
import laconic
from clips import CLASSIFIERS, CLIPS, GRID, PATCHES, answer, clips, make, pooled
from laconic.analysis.macs import summary
from laconic.core.dense import as_patches
from laconic.core.token_reduction import reduction_of
from laconic.methods.run_length import change, runs_of
from zoo import ZOO

pytest.importorskip("transformers")
every_model = pytest.mark.parametrize("name", CLIPS)
on_classifiers = pytest.mark.parametrize("name", CLASSIFIERS)
COUNTS = [16, 48, 64]  # tokens of the clips of `moving`


def moving():
    """Three clips: of one frame, of a left half that stands still from the second tubelet on, of noise."""
    x = clips()
    x[0] = x[0, :1]
    x[1, 4:, :, :, :16] = x[1, 2:4, :, :, :16].repeat(2, 1, 1, 1)
    return x


def first_of_runs(x, threshold, compare):
    """The definition, tubelet by tubelet: the first tubelet of the run of each."""
    out = []
    for clip in x:
        cells = clip.view(4, 2, 3, 4, 8, 4, 8).permute(0, 3, 5, 1, 2, 4, 6)  # times, rows, columns, frames, channels, h, w
        group = []
        for time in range(4):
            for row in range(4):
                for column in range(4):
                    own = cells[time, row, column]
                    before = cells[time - 1, row, column] if time else own + 1e9
                    gap = own - before if compare == "tubelets" else own[-1] - before[0]
                    repeats = gap.abs().mean() <= threshold
                    group.append(group[len(group) - 16] if repeats else len(group))
        out.append(group)
    return torch.tensor(out)


# ------------------------------------------------------------------------------------------------ the method
@pytest.mark.parametrize("compare", ["tubelets", "ends"])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.8, 1.1, 5.0])
def test_runs_are_those_of_the_definition(compare, threshold):
    model, x = make("vjepa2"), moving()
    x[2, 4:] = x[2, 3:4] + 0.05 * x[2, 4:]  # small changes
    laconic.reduce_(model, "run-length", threshold=threshold, compare=compare)
    answer(model, x)
    stage, expected = laconic.provenance(model).final, first_of_runs(x, threshold, compare)
    origin = stage.kept.gather(1, stage.where)
    assert torch.equal(origin, expected)
    for clip in range(3):
        assert torch.equal(stage.size[clip][stage.size[clip] > 0].long(), expected[clip].unique(return_counts=True)[1])
    if threshold == 5.0:
        assert (stage.size > 0).sum(1).tolist() == [16] * 3
    if threshold == 0.0:  # the tubelets of the first clip are equal, but the frames inside those of the second differ
        assert (stage.size > 0).sum(1).tolist() == [16, 48 if compare == "tubelets" else 64, 64]


def test_change_and_runs():
    tubelets = torch.zeros(1, 4, 2, 1, 2, 1, 1)  # one pixel: times 4, places 2, frames 2
    tubelets[0, :, 0, 0, :, 0, 0] = torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0], [3.0, 1.0]])
    torch.testing.assert_close(change(tubelets, "tubelets")[0, :, 0], torch.tensor([0.0, 1.5, 0.0]))
    torch.testing.assert_close(change(tubelets, "ends")[0, :, 0], torch.tensor([1.0, 1.0, 2.0]))
    static = torch.tensor([[[True, False], [False, True], [True, True]]])
    assert runs_of(static).tolist() == [[0, 1, 0, 3, 4, 3, 4, 3]]


@every_model
def test_an_unchanging_clip_keeps_the_tokens_of_one_frame(name):
    model, x = make(name), clips()
    x[:] = x[:, :1]
    laconic.reduce_(model, "run-length")
    out = pooled(model, x)
    stage = laconic.provenance(model).final
    assert stage.size.tolist() == [[4.0] * 16] * 3
    assert stage.kept.tolist() == [list(range(16))] * 3
    assert torch.equal(stage.where, torch.arange(PATCHES).expand(3, -1) % 16)
    torch.testing.assert_close(torch.cat([pooled(model, clip[None]) for clip in x]), out, rtol=1e-4, atol=1e-4)


@every_model
def test_a_clip_without_static_tubelets_is_answered_bit_for_bit(name):
    model, x = make(name), clips()
    expected = answer(model, x)
    laconic.reduce_(model, "run-length")
    assert torch.equal(answer(model, x), expected)
    assert reduction_of(model).entry(1).is_plain  # the blocks run unchanged
    answer(model, moving())
    assert torch.equal(answer(model, x), expected)  # nothing is left of the batch before


@every_model
def test_every_execution_and_single_clips_give_the_same(name):
    x, outputs = moving(), []
    for execution in ("packed", "padded", "masked"):
        model = laconic.reduce_(make(name), "run-length", execution=execution)
        outputs += [pooled(model, x), torch.cat([pooled(model, clip[None]) for clip in x])]
        answer(model, x)
        stage = laconic.provenance(model).final
        assert (stage.size > 0).sum(1).tolist() == COUNTS
        assert stage.size.sum(1).tolist() == [64.0] * 3
        assert stage.grid == GRID
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


def test_without_positions_run_length_is_exact():
    """Equal tubelets differ in their positions only: without them a token of a run counts as all of its tubelets."""
    model, x = make("videomae"), moving()
    model.videomae.embeddings.position_embeddings.zero_()
    expected = answer(model, x)
    laconic.reduce_(model, "run-length")
    torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-4)
    laconic.restore_(model)
    laconic.reduce_(model, "run-length", proportional=False)
    assert (answer(model, x) - expected).abs().max() > 1e-2


@on_classifiers
def test_dense_features_repeat_in_a_run(name):
    model, x = laconic.reduce_(make(name), "run-length", restore="zeros"), moving()
    answer(model, x)
    tokens = as_patches(reduction_of(model).entry(4))
    assert tokens.size.sum(1).tolist() == [64.0] * 3
    features = make("vjepa2-model")
    laconic.reduce_(features, "run-length", restore="zeros")
    dense = laconic.restore_dense(features, answer(features, x), layout="NCTHW")
    assert torch.equal(dense[0, :, 1:], dense[0, :, :1].expand(-1, 3, -1, -1))
    assert torch.equal(dense[1, :, 2:, :, :2], dense[1, :, 1:2, :, :2].expand(-1, 2, -1, -1))
    assert not torch.equal(dense[1, :, 1, :, :2], dense[1, :, 0, :, :2])


@on_classifiers
def test_it_is_undone_copied_saved_and_chained(name, tmp_path):
    model, x = make(name), moving()
    expected = answer(model, x)
    laconic.reduce_(model, laconic.RunLength(threshold=0.2))
    out = answer(model, x)
    laconic.save(model, tmp_path)
    for other in (copy.deepcopy(model), laconic.load(tmp_path)):
        assert torch.equal(answer(other, x), out)
        assert other.get_submodule("videomae" if name == "videomae" else "").laconic.config.threshold == 0.2
    laconic.restore_(model)
    assert torch.equal(answer(model, x), expected)
    laconic.reduce_(model, laconic.Chain(("run-length", {}), ("ats", {"score": "mean-query", "at": [2]})))
    torch.testing.assert_close(answer(model, x), torch.cat([answer(model, clip[None]) for clip in x]), rtol=1e-4, atol=1e-4)
    answer(model, x)
    assert (laconic.provenance(model).final.size > 0).sum(1).tolist() < COUNTS
    assert summary(laconic.reduce_(make(name), "run-length"), images=[x]).observed.tokens[-1].mean == sum(COUNTS) / 3


def test_a_higher_threshold_keeps_fewer_tokens():
    x, counts = clips(), []
    x[:, 1:] = x[:, :1] + 0.3 * x[:, 1:]
    for threshold in (0.0, 0.2, 0.34, 0.4):
        model = laconic.reduce_(make("vjepa2"), "run-length", threshold=threshold)
        answer(model, x)
        counts.append(int((laconic.provenance(model).final.size > 0).sum()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 3 * PATCHES > counts[-1]


@on_classifiers
def test_it_trains(name):
    model = laconic.reduce_(make(name), "run-length").train()
    model(moving()).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    embedding = next(p for key, p in model.named_parameters() if "patch_embeddings" in key)
    assert embedding.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3", "naflex", "torchvision", "open-clip"])
def test_models_for_images_are_refused(name):
    kind = ZOO[name]
    model, x = kind.make(), kind.images()
    expected = host_laws.run(kind, model, x)
    with pytest.raises(
        ValueError, match=r"run-length compares patches .* and this model takes single images; .* pass frames= .* use dedup"
    ):
        laconic.reduce_(model, "run-length")
    assert not laconic.is_reduced(model)
    assert torch.equal(host_laws.run(kind, model, x), expected)


@pytest.mark.unchecked
def test_arguments_are_checked():
    with pytest.raises(ValueError, match="run-length: threshold"):
        laconic.RunLength(threshold=-0.1)
    with pytest.raises(ValueError, match="compare"):
        laconic.RunLength(compare="frames")
    with pytest.raises(ValueError, match="takes no keep rate and no counts"):
        laconic.reduce_(make("vjepa2"), "run-length", keep=0.5)
    with pytest.raises(ValueError, match="block 0 only"):
        laconic.reduce_(make("vjepa2"), "run-length", at=[1])
    report = laconic.doctor(families.make("plain"), ["run-length"])
    assert "single images" in report.trials[0].reason
