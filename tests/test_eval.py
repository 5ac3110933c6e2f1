"""Evaluation, and the jobs `eval` and `sweep`. The models are tiny and know nothing; what is tested is the counting."""

import csv
import io
import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import laconic
from laconic.analysis.accuracy import Accuracy
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.evaluate import Processes, answers, config_for, evaluate, make_loader, transform_for
from laconic.analysis.intervals import wilson
from laconic.analysis.timing import Setting
from laconic.checkpoints.saved_files import digest
from laconic.cli import plots, record
from laconic.cli import sweep as sweep_job
from laconic.cli.eval import eval_
from laconic.cli.eval_input import Reading, command, parse_args
from laconic.cli.scores import Score
from laconic.cli.sweep import sweep
from laconic.core.files import Refusal
from laconic.core.method import METHODS
from laconic.data import ImageSet, Prepared, Unreadable, open_images

TINY = "deit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 24}
MODEL_ARGS = tuple(f"{name}={value}" for name, value in ARGS.items())
READING = Reading(limit=20, workers=0, batch_size=16)
QUICK = Setting(rounds=1, threads=1, device="cpu")

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")


@pytest.fixture(autouse=True)
def _no_git(monkeypatch):
    monkeypatch.setattr(record, "commit", lambda: "version of a test")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    out = timm.create_model(TINY, **ARGS).eval()
    nn.init.normal_(out.head.weight)  # so that its answers differ
    return out


@pytest.fixture(scope="module")
def images():
    return open_images("scenes", "val", limit=20, size=32)


class Fixed(ImageSet):
    """Images whose every pixel is their number, so that a model may answer by it."""

    def __init__(self, labels, broken=(), classes=7):
        self.labels, self.broken, self.classes = labels, broken, tuple("abcdefghij"[:classes])

    def __len__(self):
        return len(self.labels)

    def load(self, i):
        if i in self.broken:
            raise Unreadable(f"image {i}", "it is cut off")
        return Image.new("RGB", (32, 32), (i, i, i))

    def label(self, i):
        return self.labels[i]

    def name(self, i):
        return f"image {i}"


class Told(nn.Module):
    """A model that answers what it was told, by the number in the image's pixels."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))

    def forward(self, pixels):
        return self.logits[pixels[:, 0, 0, 0].long()]


def number(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def told(logits, fixed, **how):
    return evaluate(Told(logits), DataLoader(Prepared(fixed, number, replace=False), 3), **how)


# ---------------------------------------------------------------------------------------------------- counting
def test_top1_top5_and_loss_are_what_they_say():
    logits = [[9, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [9, 8, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5, 6]]
    found = told(logits, Fixed([0, 6, 1, 1]))
    assert (found.images, found.top1, found.top5) == (4, 0.25, 0.75)
    losses = -torch.tensor(logits).double().log_softmax(1)[range(4), [0, 6, 1, 1]]
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found.interval == wilson(1, 4)
    assert (found.agreement, found.divergence, found.unreadable) == (None, None, ())


def test_what_cannot_be_read_is_left_out_and_listed():
    logits = [[9.0, 0, 0]] * 4
    found = told(logits, Fixed([0, 0, 1, 1], broken=(1,), classes=3))
    assert (found.images, found.top1) == (3, 1 / 3)
    assert found.line == "3 of 4 images; 1 could not be read: image 1: it is cut off"
    assert found.to_json()["unreadable"] == [{"name": "image 1", "reason": "it is cut off"}]
    with pytest.raises(ValueError, match="none of 2 images could be read; the first is image 0: it is cut off"):
        told(logits, Fixed([0, 0], broken=(0, 1), classes=3))


def test_answers_that_are_not_finite_are_wrong():
    found = told([[math.nan] * 3, [math.inf, 0, 0], [9, 0, 0]], Fixed([0, 0, 0], classes=3))
    assert (found.top1, found.top5, found.not_finite) == (1 / 3, 1 / 3, 2)
    assert math.isnan(found.loss)
    assert found.to_json()["loss"] is None
    json.dumps(found.to_json(), allow_nan=False)


def test_equal_answers_for_all_classes_are_not_all_right():
    found = told([[0.0] * 7] * 7, Fixed(list(range(7))))
    assert found.top1 <= 1 / 7


def test_agreement_and_divergence():
    ours, theirs = [[0.0, 1, 2], [3, 1, 0]], [[0.0, 2, 1], [3, 1, 0]]
    found = told(ours, Fixed([0, 0], classes=3), reference=Told(theirs))
    assert found.agreement == 0.5
    p, q = torch.tensor(theirs).double().softmax(1), torch.tensor(ours).double().softmax(1)
    assert found.divergence == pytest.approx((p * (p / q).log()).sum(1).mean().item())
    loader = DataLoader(Prepared(Fixed([0, 0], classes=3), number, replace=False), 1)
    kept = answers(Told(theirs), loader, keep_logits=True)
    assert told(ours, Fixed([0, 0], classes=3), reference=kept) == found
    assert kept.correct.tolist() == [False, True]
    assert kept.read.tolist() == [True, True]


def test_wilson():
    low, high = wilson(81, 263)  # Newcombe (1998), table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == 1
    assert 0.1 < wilson(0, 20)[1] < 0.2


def test_what_cannot_be_evaluated_is_refused():
    fixed = Fixed([0, 1], classes=4)
    with pytest.raises(ValueError, match="have 4 classes, but the model has 3 outputs.*num_classes=4"):
        told([[1.0, 2, 3]] * 2, fixed)
    with pytest.raises(ValueError, match="reference has 5 classes, but the model has 4"):
        told([[1.0] * 4] * 2, fixed, reference=Told([[1.0] * 5] * 2))
    with pytest.raises(ValueError, match="replace=False"):
        evaluate(Told([[1.0] * 4] * 2), DataLoader(Prepared(fixed, number), 1))
    kept = answers(Told([[1.0] * 4] * 2), DataLoader(Prepared(fixed, number, replace=False), 1))
    with pytest.raises(ValueError, match="keep_logits=True"):
        told([[1.0] * 4] * 2, fixed, reference=kept)


# ---------------------------------------------------------------------------------------------------- models
def test_numbers_do_not_depend_on_batches_workers_or_processes(model, images):
    alone = answers(model, images, batch_size=20)
    assert torch.allclose(alone.table, answers(model, images, batch_size=3).table, atol=1e-4)
    assert torch.equal(alone.table, answers(model, images, batch_size=20, workers=1).table)
    tables = []
    for rank in range(3):
        answers(model, images, batch_size=4, processes=Processes(rank, 3, lambda t: tables.append(t.clone()) or t))
    shared = answers(model, images, processes=Processes(0, 3, lambda _: sum(tables)))
    assert torch.allclose(shared.table, alone.table, atol=1e-4)
    assert shared.accuracy.images == 20
    assert shared.accuracy.top1 == alone.accuracy.top1


def test_an_image_that_two_processes_got_counts_once(model, images):
    once = answers(model, images)
    twice = answers(model, images, processes=Processes(0, 1, lambda table: table * 2))
    assert torch.allclose(twice.table, once.table)


def test_modes_and_generators_stay_as_they_are(model, images):
    copy = shared_copy(model)
    copy.train()
    copy.blocks[1].eval()
    modes, state = [m.training for m in copy.modules()], torch.get_rng_state()
    first = evaluate(copy, images)
    assert [m.training for m in copy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert first == evaluate(model, images)


def test_the_input_size_is_that_of_the_model_and_not_of_its_weights(model):
    assert config_for(model)["input_size"] == (3, 32, 32)
    assert transform_for(model)(Image.new("RGB", (50, 70))).shape == (3, 32, 32)
    small = shared_copy(model)
    small.set_input_size(img_size=16)
    assert config_for(small)["input_size"] == (3, 16, 16)
    assert config_for(laconic.reduce_(shared_copy(model), "topk", keep=0.5), 1.0)["crop_pct"] == 1.0
    with pytest.raises(ValueError, match="crop must be a share"):
        config_for(model, 1.5)


def test_evaluation_is_timms(model, images):
    """Against a plain loop over timm's own transform."""
    transform = transform_for(model)
    with torch.no_grad():
        logits = torch.stack([model(transform(images.load(i))[None])[0] for i in range(20)])
    hits = [int(logits[i].argmax()) == images.label(i) for i in range(20)]
    found = answers(model, images, batch_size=7, keep_logits=True)
    assert found.correct.tolist() == hits
    assert torch.allclose(found.logits, logits, atol=1e-4)
    assert next(iter(make_loader(model, images, 5)))[0].shape == (5, 3, 32, 32)


def test_wrapped_models_and_other_dtypes(model, images):
    wrapped = torch.nn.DataParallel(model) if not torch.cuda.is_available() else model
    assert evaluate(wrapped, images) == evaluate(model, images)
    exact, rough = evaluate(model, images), evaluate(model, images, autocast=torch.bfloat16)
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.05)
    assert evaluate(timm.create_model(TINY, **ARGS).bfloat16(), images).images == 20


# ---------------------------------------------------------------------------------------------------- laconic eval
def test_eval(tmp_path):
    report = eval_(
        TINY,
        data="scenes",
        reading=READING,
        method=("etps", "dynamicvit"),
        keep=(0.5,),
        model_args=MODEL_ARGS,
        output=tmp_path / "out.csv",
    )
    assert [row.label for row in report.rows] == ["unreduced", "etps 0.5", "dynamicvit 0.5"]
    base, etps, _ = report.rows
    assert (base.agreement, base.images) == (None, 20)
    assert etps.agreement is not None
    assert etps.macs < base.macs
    assert etps.tokens == (16, 8, 4, 2)
    text = " ".join(str(report).split())
    assert "Weights are RANDOM" in text
    assert "20 images of 24 classes" in text
    assert "Dynamicvit has parameters of its own, which are untrained here" in text
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved == json.loads(json.dumps(report.to_json()))
    assert "--data scenes" in saved["command"]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert list(lines[0])[:6] == ["model", "img_size", "top1", "top1_err", "top5", "top5_err"]
    assert float(lines[0]["top1"]) + float(lines[0]["top1_err"]) == 100


def test_eval_of_a_directory_and_of_a_folder_with_a_broken_file(tmp_path, model):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), (name == "a" and "red") or "blue").save(tmp_path / "images" / name / "1.png")
    (tmp_path / "images" / "a" / "2.png").write_bytes(b"broken")
    laconic.save(laconic.reduce_(shared_copy(model), "etps", keep=0.5), tmp_path / "saved")
    report = eval_(str(tmp_path / "saved"), data=str(tmp_path / "images"), reading=Reading(workers=0))
    assert [row.name for row in report.rows] == ["unreduced", "etps as saved"]
    assert [(row.images, row.unreadable) for row in report.rows] == [(2, 1)] * 2
    text = " ".join(str(report).split())
    assert "2 of 3 images; 1 could not be read: a/2.png: it is not an image that Pillow can read" in text
    assert "The model answers for 24 classes and the data has 2" in text
    assert "No folder for the split 'val'" in text
    with pytest.raises(Refusal, match="leave out --weights"):
        eval_(str(tmp_path / "saved"), data="scenes", model_args=("img_size=32",))


def test_eval_with_weights_of_a_file(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    args = tuple(arg for arg in MODEL_ARGS if not arg.startswith("num_classes"))  # as many as the data has
    report = eval_(TINY, data="scenes", reading=READING, weights=tmp_path / "model.pth", model_args=args)
    assert report.rows[0].top1 == evaluate(model, open_images("scenes", "val", limit=20, size=32)).top1
    assert "come from" in report.weights
    with pytest.raises(Refusal, match="does not hold the weights of .* with 24 classes"):
        eval_(TINY, data="scenes", reading=READING, weights=tmp_path / "model.pth", model_args=("img_size=32",))
    with pytest.raises(Refusal, match="there is no such file"):
        eval_(TINY, data="scenes", weights=tmp_path / "none.pth")


def test_eval_refuses(tmp_path):
    with pytest.raises(Refusal, match="name of a .csv file"):
        eval_(TINY, data="scenes", output=tmp_path / "x.json")
    with pytest.raises(ValueError, match="the images have 24 classes, but the model has 5 outputs"):
        eval_(TINY, data="scenes", reading=READING, model_args=(*MODEL_ARGS[:-1], "num_classes=5"))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Reading(batch_size=0)
    with pytest.raises(Refusal, match="expected NAME=VALUE"):
        parse_args(["img_size"])
    assert parse_args(["a=3", "b=(1, 2)", "c=token"]) == {"a": 3, "b": (1, 2), "c": "token"}


def test_the_command_asks_for_the_same_again():
    asked = {"data": "a folder", "keep": (0.7, 0.5), "speed": True, "weights": None, "limit": 0, "options": ()}
    assert command("sweep", "x", asked) == "laconic sweep x --data 'a folder' --keep 0.7 --keep 0.5 --speed --limit 0"


# ---------------------------------------------------------------------------------------------------- laconic sweep
def run_sweep(path, **given):
    asked = {"data": "scenes", "method": ("etps",), "keep": (0.5,), "reading": READING, "model_args": MODEL_ARGS}
    return sweep(TINY, output=path, setting=QUICK, **{**asked, **given})


LABELS = ["unreduced", "etps 0.5", "random 0.5", "avg-pool 0.5", "input 16x16 0.5"]


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, counted, score = tmp_path / "out.csv", [], sweep_job.score

    def counting(variant, *args):
        counted.append(variant.label)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return score(variant, *args)

    monkeypatch.setattr(sweep_job, "score", counting)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(path)
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["unreduced", "etps"]
    assert len(path.read_text().splitlines()) == 3
    report = run_sweep(path)
    assert counted[3:] == ["unreduced", *LABELS[2:]]  # the reference again, and what was missing
    assert (report.computed, [row.label for row in report.rows]) == (3, LABELS)
    whole = run_sweep(tmp_path / "other.csv")
    assert [row.to_json() | {"run": 0} for row in report.rows] == [row.to_json() for row in whole.rows]
    before, counted[:] = path.with_suffix(".json").read_text(), ["nothing is evaluated again"] * 3
    assert run_sweep(path).computed == 0
    assert len(counted) == 3
    assert path.with_suffix(".json").read_text() == before
    assert len(json.loads(before)["runs"]) == 2
    more = run_sweep(path, keep=(0.9,))  # rows of earlier runs stay
    assert (more.computed, len(more.rows)) == (4, 9)


def test_a_sweep_of_something_else_is_not_mixed_in(tmp_path):
    path = tmp_path / "out.csv"
    other = record.Record(path, {"model": TINY, "images": 20})
    other.begin("laconic sweep", {})
    other.add(("etps", 0.5, "{}"), row("etps", "method", 0.5, 3), [])
    with pytest.raises(Refusal, match="holds another sweep .images 20 there, 10 here.; choose another --output"):
        record.Record(path, {"model": TINY, "images": 10})
    with pytest.raises(Refusal, match="holds another sweep .*data None there, 'scenes' here"):
        run_sweep(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(Refusal, match="not the record of a sweep"):
        run_sweep(path)


def test_a_sweep_measures_and_draws(tmp_path):
    report = run_sweep(tmp_path / "out.csv", speed=True, speed_batch=2)
    assert all(row.ratio and row.images_per_second > 0 and row.speed_batch == 2 for row in report.rows)
    assert report.rows[0].ratio == (1, 1, 1)
    for path in report.files[2:]:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10
    assert [path.name for path in report.files] == ["out.csv", "out.json", "out.png", "out-speed.png"]
    kept = report.rows[1].ratio
    assert run_sweep(tmp_path / "out.csv", speed=True, speed_batch=2).rows[1].ratio == kept
    assert "measured" in str(report)
    assert "timm has no smaller model in the family of deit_tiny" in " ".join(report.record["notes"])


def row(name, kind, keep, macs, ratio=None):
    facts = ({}, (32, 32), (16, 8), 10, int(macs), 0.9, "bicubic", 100, 0, 0.5, 0.9, (0.4, 0.6), 1.0, None, None, 0)
    return Score(name, kind, keep, *facts, ratio)


def test_lines_of_a_plot():
    rows = [
        row("unreduced", "base", None, 4e9, (1.0, 1.0, 1.0)),
        row("etps", "method", 0.7, 3e9),
        row("etps", "method", 0.5, 2e9, (1.1, 1.5, 1.6)),
        row("input 16x16", "resolution", 0.5, 1e9),
        row("input 24x24", "resolution", 0.7, 2e9),
    ]
    lines = plots.lines_of(rows, "GMACs")
    assert lines["etps"] == [(2.0, 50.0, 40.0, 60.0), (3.0, 50.0, 40.0, 60.0)]
    assert [x for x, *_ in lines["lower resolution"]] == [1.0, 2.0]
    assert {name: len(points) for name, points in plots.lines_of(rows, "speed").items()} == {"unreduced": 1, "etps": 1}


def test_a_row_comes_back_from_json():
    made = row("etps", "method", 0.7, 3, (1.0, 1.5, 2.0))
    assert Score.of_json(json.loads(json.dumps(made.to_json()))) == made


def test_the_next_smaller_model_has_weights_of_the_same_kind_or_no_row(tmp_path):
    name = "deit_small_patch16_224"
    torch.save(timm.create_model(name, **ARGS).state_dict(), tmp_path / "small.pth")
    other = sweep(
        name,
        data="scenes",
        output=tmp_path / "b.csv",
        method=("topk",),
        keep=(0.5,),
        reading=READING,
        weights=tmp_path / "small.pth",
        model_args=MODEL_ARGS,
        setting=QUICK,
    )
    assert "no weights of deit_tiny_patch16_224 that were trained like these" in " ".join(other.record["notes"])
    assert all(row.kind != "smaller" for row in other.rows)


def test_the_digest_is_of_the_weights(model):
    assert digest(model) == digest(shared_copy(model))
    assert digest(model) != digest(timm.create_model(TINY, **ARGS))


def test_the_commit_is_that_of_the_code_or_its_version(tmp_path, monkeypatch):
    monkeypatch.undo()
    assert record.commit(tmp_path) == f"version {laconic.__version__}"
    monkeypatch.setenv("PATH", "")
    assert record.commit(tmp_path) == f"version {laconic.__version__}"


def test_accuracy_is_plain():
    found = Accuracy(3, 0.5, 1.0, (0.1, 0.9), 2.0)
    assert found.line == "3 images"
    assert found.to_json()["interval"] == [0.1, 0.9]
    assert METHODS["dynamicvit"].learns
