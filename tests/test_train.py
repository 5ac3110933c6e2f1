"""Training: exact resume, several processes, what is trained and what is not, and what stops a run. Seconds, on a CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import laconic
from laconic.cli import train as job
from laconic.cli.train import prepare, train
from laconic.core.files import Refusal
from laconic.core.schedule import Schedule
from laconic.training import objective, state
from laconic.training.loop import Loop
from laconic.training.optimization import parameter_groups
from laconic.training.recipe import MethodPart, Recipe
from laconic.training.run_config import Running
from laconic.training.schedule_changes import KeepRate
from small_run import BASE, EVIT, SHAPE

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")

DTPS = ("method.name=dtps", "method.keep=0.6", "method.at=[1, 2]")
RANDOM = (
    "model.options.drop_path_rate=0.3",
    "augmentation.crop=[0.3, 1.0]",
    "augmentation.hflip=0.5",
    "augmentation.auto_augment=rand-m9-mstd0.5-inc1",
    "augmentation.erase=0.5",
    "augmentation.mixup=0.8",
    "augmentation.cutmix=1.0",
    "augmentation.smoothing=0.1",
    "augmentation.repeats=2",
)


def running(**changes):
    return Running(**{"device": "cpu", "log_every": 1} | changes)


def go(output, *settings, base=BASE, resume=False, data="", **changes):
    return train(set=(*base, *settings), output=Path(output), resume=resume, data=data, running=running(**changes))


def loop(output, *settings, resume=False, **changes):
    """A loop that has not begun, and the run it is of."""
    run, _ = prepare(Recipe().replaced((*BASE, *settings)), "", Path(output), running(**changes))
    return Loop(run, resume), run


def weights(output, name="model"):
    return load_file(Path(output, name, "model.safetensors"))


def metrics(output):
    return Path(output, "metrics.jsonl").read_text()


def rows(output):
    return [json.loads(line) for line in metrics(output).splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, atol=2e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=atol) for name in a)


def copies(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Settings for a run that starts from weights in a file."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=24, **SHAPE).state_dict(), file)
    return (f"model.weights={file}", "model.pretrained=true")


# ---------------------------------------------------------------------------------------------------- stopped and resumed
class Stop(Exception):
    pass


@pytest.fixture
def stop_before(monkeypatch):
    """Makes runs stop before a step, until it is told otherwise."""
    original, at = Loop._step, []

    def step(self, batches):
        if at and self.progress.step == at[0]:
            raise Stop
        return original(self, batches)

    monkeypatch.setattr(Loop, "_step", step)
    return lambda *steps: at.__setitem__(slice(None), steps)


VARIANTS = {
    "no method": (),
    "batch norm": ("model.name=scenes_vit_tiny", "model.options={}", "optimization.clip_grad=1"),
    "gumbel, moving average, drop path, mixup": (*DTPS, *RANDOM, "optimization.ema=0.8"),
    "warm-in": (*EVIT, "method.warm_in_start=0.5", "method.warm_in_epochs=1.2", "optimization.update=epoch-late"),
    "bf16": (*EVIT, "optimization.precision=bf16"),
    "token labels": ("loss.token_labels=1.0",),
}


STOPPED = [(variant, step) for variant in VARIANTS for step in (1, 5)]


@pytest.mark.parametrize(("variant", "stopped"), [*STOPPED, ("warm-in", 3)])  # step 3 is the first of an epoch
def test_a_run_that_was_stopped_goes_on_exactly(tmp_path, stop_before, variant, stopped):
    go(tmp_path / "a", *VARIANTS[variant])
    stop_before(stopped)
    with pytest.raises(Stop):
        go(tmp_path / "b", *VARIANTS[variant], checkpoint_every=1)
    stop_before()
    report = go(tmp_path / "b", *VARIANTS[variant], resume=True, checkpoint_every=2)
    assert report.steps == 6
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert same(weights(tmp_path / "a", "best"), weights(tmp_path / "b", "best"))


KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from laconic.cli.train import train
from laconic.training.loop import Loop
from laconic.training.run_config import Running
original = Loop._step
def step(self, batches):
    if self.progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, batches)
Loop._step = step
output, *settings = sys.argv[1:]
train(set=tuple(settings), output=Path(output), running=Running(device="cpu", accumulate=2, checkpoint_every=2, log_every=1, workers=1))
"""


def test_a_process_that_was_killed_in_mid_epoch_goes_on_exactly(tmp_path, pretrained):
    """All there is at once: micro-batches, scorers, a teacher, moving average, clipping, everything random; and a reader."""
    distilled = ("loss.logits=0.5", "loss.tokens=0.5", "loss.token_kind=kl")
    settings = (*DTPS, *RANDOM, *pretrained, *distilled, "optimization.ema=0.8", "optimization.clip_grad=1.0")
    go(tmp_path / "a", *settings, accumulate=2)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "b"), *BASE, *settings]
    killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert rows(tmp_path / "b")[-1]["step"] == 5  # beyond the last checkpoint, which is of step 4
    go(tmp_path / "b", *settings, resume=True, accumulate=2)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert {"ratio", "logits", "tokens", "gradient_norm"} <= rows(tmp_path / "a")[0].keys()
    for name in ("model", "unaveraged"):
        assert same(weights(tmp_path / "a", name), weights(tmp_path / "b", name))
    moments = [torch.load(tmp_path / x / "checkpoint.pt")["states"]["optimizer"]["state"] for x in "ab"]
    assert all(same(moments[0][i], moments[1][i]) for i in moments[0])


def test_readers_change_nothing(tmp_path):
    go(tmp_path / "a", *RANDOM, "optimization.epochs=1")
    go(tmp_path / "b", *RANDOM, "optimization.epochs=1", workers=2)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    go(tmp_path, "optimization.epochs=1")
    before, said = weights(tmp_path), metrics(tmp_path)
    report = go(tmp_path, "optimization.epochs=1", resume=True)
    assert (report.steps, report.accuracy) == (3, None)
    assert same(before, weights(tmp_path))
    assert said == metrics(tmp_path)


def test_a_run_is_not_written_over(tmp_path):
    go(tmp_path, "optimization.epochs=1")
    with pytest.raises(Refusal, match="holds a run already; --resume"):
        go(tmp_path, "optimization.epochs=1")


def test_a_run_that_never_came_to_a_checkpoint_may_start_again(tmp_path, stop_before):
    stop_before(1)
    with pytest.raises(Stop):
        go(tmp_path, "optimization.epochs=1")
    assert (tmp_path / "recipe.json").is_file()
    with pytest.raises(Refusal, match=r"there is no checkpoint.pt in .*; start the run without --resume"):
        go(tmp_path, "optimization.epochs=1", resume=True)
    stop_before()
    assert go(tmp_path, "optimization.epochs=1").steps == 3


def test_another_recipe_cannot_go_on(tmp_path):
    go(tmp_path, "optimization.epochs=1")
    with pytest.raises(Refusal, match=r"other settings \(optimization.lr was 0.001, is 0.002\)"):
        go(tmp_path, "optimization.epochs=1", "optimization.lr=2e-3", resume=True)
    with pytest.raises(Refusal, match=r"method.name was '', is 'evit'"):
        go(tmp_path, "optimization.epochs=1", *EVIT, resume=True)
    go(tmp_path, "optimization.epochs=1", 'about.measured="79.6"', resume=True)  # that changes nothing


def test_a_checkpoint_of_before_a_key_was_added_or_taken_away(tmp_path):
    go(tmp_path, "optimization.epochs=1")
    content = torch.load(tmp_path / "checkpoint.pt")
    made = json.loads(content["recipe"])
    del made["optimization"]["warmup"]
    made["data"]["workers"] = 2
    torch.save({**content, "recipe": json.dumps(made)}, tmp_path / "checkpoint.pt")
    assert go(tmp_path, "optimization.epochs=1", resume=True).steps == 3
    with pytest.raises(Refusal, match="optimization.warmup was 'within', is 'before'"):
        go(tmp_path, "optimization.epochs=1", "optimization.warmup=before", resume=True)


@pytest.mark.parametrize("damage", ["cut", "noise", "other"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    go(tmp_path, "optimization.epochs=1")
    path = tmp_path / "checkpoint.pt"
    if damage == "other":
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"noise" * 100)
    with pytest.raises(Refusal, match="checkpoint.pt is not a checkpoint of laconic train"):
        go(tmp_path, "optimization.epochs=1", resume=True)


def test_metrics_that_were_cut_off_are_read_up_to_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert state.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


# ---------------------------------------------------------------------------------------------------- one batch, many ways
def test_micro_batches_are_one_batch(tmp_path):
    """Without batch norm, whose statistics are of a micro-batch, and without anything random."""
    go(tmp_path / "a", *EVIT, "optimization.clip_grad=0.5")
    go(tmp_path / "b", *EVIT, "optimization.clip_grad=0.5", accumulate=4)
    assert close(weights(tmp_path / "a"), weights(tmp_path / "b"))
    for one, other in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


TWO = """
import json, os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from laconic.cli.train import train
from laconic.training.loop import Loop
from laconic.training.run_config import Running
given = json.loads(sys.argv[1])
def say(name, what):
    with Path(given["output"], "said-" + os.environ["RANK"]).open("a") as file:
        file.write(json.dumps([name, what]) + "\\n")
original, stop = Loop._step, [None]
def step(self, batches):
    if self.progress.step == stop[0]:
        raise InterruptedError
    return original(self, batches)
Loop._step = step
def go(name, settings, data="", resume=False, **changes):
    report = train(set=tuple(settings), output=Path(given["output"], name), data=data, resume=resume, running=Running(device="cpu", log_every=1, **changes))
    say(name, None if report is None else report.to_json())
go("evit", given["evit"])
go("warm", given["warm"], accumulate=2)
go("drawn", given["drawn"])
go("norm", given["norm"])
stop[0] = 4
try:
    go("stopped", given["norm"], checkpoint_every=1)
except InterruptedError:
    stop[0] = None
go("stopped", given["norm"], resume=True)
go("folder", given["folder"], data=given["data"])
try:
    go("odd", [*given["evit"], "optimization.batch_size=7"])
except ValueError as error:
    say("odd", str(error))
"""


def test_two_processes_are_one(tmp_path):
    """Launched as users do: the same images make up a step, one process writes and reports, and a resume is exact."""
    data = folder(tmp_path / "data", broken=("train/b/2.png", "train/a/0.png"))
    evit = [*BASE, *EVIT, "optimization.ema=0.5"]
    warm = [*BASE, *DTPS, "method.warm_in_start=0.5", "method.warm_in_epochs=0.5", "optimization.epochs=1"]
    drawn = [
        *BASE,
        "method.name=iared",
        "method.options.heads=3",
        *(f"step.options.{part}_epochs=0.333" for part in ("interpreter", "blocks")),
    ]
    norm = [*BASE, "model.name=scenes_vit_tiny", "model.options={}", "optimization.ema=0.5"]
    of_folder = [*BASE, "data.name=", "data.train_images=0", "data.val_images=0", "optimization.epochs=1"]
    given = {
        "output": str(tmp_path),
        "data": str(data),
        "evit": evit,
        "warm": warm,
        "drawn": drawn,
        "norm": norm,
        "folder": of_folder,
    }
    (tmp_path / "two.py").write_text(TWO)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2"  # accelerate's own needs MPI where there is no GPU
    command = [sys.executable, *launch.split(), str(tmp_path / "two.py"), json.dumps(given)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports, others = (dict(map(json.loads, (tmp_path / f"said-{rank}").read_text().splitlines())) for rank in (0, 1))
    odd = reports.pop("odd")
    assert others.pop("odd") == odd
    assert [type(report) for report in reports.values()] == [dict] * 6
    assert others == dict.fromkeys(["evit", "warm", "drawn", "norm", "stopped", "folder"])
    assert ["policy" in row for row in rows(tmp_path / "drawn") if "loss" in row] == [True, False] * 3  # group after group

    report = go(tmp_path / "alone", *evit[len(BASE) :])
    assert report.accuracy.images == reports["evit"]["accuracy"]["images"] == 8
    for one, other in zip(rows(tmp_path / "alone"), rows(tmp_path / "evit"), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert close(weights(tmp_path / "alone"), weights(tmp_path / "evit"))
    assert metrics(tmp_path / "norm") == metrics(tmp_path / "stopped")
    assert same(weights(tmp_path / "norm"), weights(tmp_path / "stopped"))
    assert reports["folder"]["unreadable"] == ["a/0.png", "b/2.png"]  # whichever process found them
    assert "7 images cannot be divided evenly by 2 processes" in odd


def folder(root, broken=()):
    """Images of two classes on disk, some of them damaged."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                picture = draw.integers(0, 255, (48, 48, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / split / label / f"{number}.png")
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:200])
    return root


def test_unreadable_images_are_reported(tmp_path, caplog):
    data = folder(tmp_path / "data", broken=("train/a/1.png", "val/b/0.png"))
    settings = ("data.name=", "data.train_images=0", "data.val_images=0")
    report = go(tmp_path / "run", *settings, "optimization.batch_size=12", data=str(data))
    assert report.unreadable == ("a/1.png",)
    assert "1 images could not be read and were replaced by the next one: a/1.png" in str(report)
    assert [r.message for r in caplog.records if "cannot be read" in r.message] == [
        "a/1.png cannot be read; the next image replaces it in every epoch"
    ]
    assert report.accuracy.images == 3
    assert "b/0.png" in str(report)


# ---------------------------------------------------------------------------------------------------- what is trained
def test_the_frozen_backbone_stays_bit_for_bit(tmp_path, pretrained):
    frozen = ("optimization.freeze_backbone_epochs=1", "optimization.backbone_lr_scale=0.1")
    made, run = loop(tmp_path, *DTPS, *pretrained, *frozen)
    before = copies(run.model)
    assert {name for name in before if name.startswith("laconic.")}
    moved = []
    original = made._step
    made._step = lambda batches: (original(batches), moved.append(changed(before, run.model)))[0]
    made.go()
    scorers = {name for name in before if name.startswith("laconic.")}
    assert moved[2] <= scorers
    assert moved[2]
    assert moved[3] - scorers  # the second epoch moves the backbone


def changed(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def test_fixed_parameters_stay(tmp_path, pretrained):
    made, run = loop(tmp_path, *pretrained, 'optimization.fixed=["cls_token", "pos_embed"]', "optimization.epochs=1")
    before = copies(run.model)
    made.go()
    assert set(before) - changed(before, run.model) == {"cls_token", "pos_embed"}


def test_an_unknown_fixed_parameter(tmp_path):
    with pytest.raises(ValueError, match="the model has no parameter 'pos_embd'. Did you mean 'pos_embed'"):
        loop(tmp_path, 'optimization.fixed=["pos_embd"]')


def test_layer_decay_scales_by_depth_and_leaves_the_scorers():
    recipe = Recipe().replaced(["optimization.layer_decay=0.5", "optimization.weight_decay=0.1"])
    model = timm.create_model("vit_tiny_patch16_224", num_classes=24, **SHAPE)
    laconic.reduce_(model, "dtps", keep=0.6, at=[1, 2])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale, decay = {}, {}
    for group in parameter_groups(model, recipe.optimization):
        for parameter in group["params"]:
            scale[names[id(parameter)]], decay[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert scale["patch_embed.proj.weight"] == scale["cls_token"] == 0.5**5
    assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scale["head.weight"] == 1
    assert {s for name, s in scale.items() if name.startswith("laconic.")} == {1}
    assert (decay["blocks.0.mlp.fc1.weight"], decay["blocks.0.mlp.fc1.bias"], decay["pos_embed"]) == (0.1, 0, 0)
    whole = parameter_groups(model, Recipe().replaced(["optimization.decay_all=true"]).optimization)
    assert {group["weight_decay"] for group in whole} == {0.05}


def test_the_warm_in_counts_over_the_steps(tmp_path):
    settings = (*EVIT, "method.warm_in_start=0.5", "method.warm_in_epochs=1", "optimization.ema=0.5")
    made, run = loop(tmp_path, *settings)
    seen, original = [], made._step

    def step(batches):
        row = original(batches)
        seen.append((run.model.laconic.counts(25), made.ema.module.laconic.counts(25)))
        return row

    made._step = step
    made.go()
    last = [own[-1] for own, _ in seen]
    assert last[:3] == [25, 25, 25]  # two steps of nothing; then the cosine starts, at one
    assert last == sorted(last, reverse=True)
    assert (
        last[3]
        > last[5]
        == run.model.laconic.config.num_kept((0.6, 0.6), run.model.laconic.config.num_kept((0.6,), 25, 25), 25)
    )
    assert all(own == averaged for own, averaged in seen)


def test_only_a_model_at_its_keep_rate_can_be_the_best(tmp_path):
    settings = (*EVIT, "method.warm_in_epochs=2", "optimization.epochs=3")
    made, run = loop(tmp_path, *settings)
    original, found = made._checkpoint, []
    made._checkpoint = lambda: (original(), found.append(made.progress.best_step > 0))[0]
    made.go()
    made.save()
    assert found == [False, False, True]
    assert laconic.load(tmp_path / "best").laconic.schedule == Schedule.rates(0.6, [1, 2])
    assert laconic.load(tmp_path / "model").laconic.schedule == Schedule.rates(0.6, [1, 2])


def test_without_a_warm_in_the_schedule_is_left_alone():
    keep = KeepRate([], MethodPart(), 10)
    keep.set(3)
    assert keep.arrived(0)


def test_distillation_leaves_the_teacher_alone(tmp_path, pretrained):
    made, run = loop(tmp_path, *DTPS, *pretrained, "loss.logits=0.5", "loss.tokens=0.5", "optimization.epochs=1")
    teacher, student = copies(run.teacher), copies(run.model)
    made.go()
    assert changed(teacher, run.teacher) == set()
    assert "blocks.0.attn.qkv.weight" in changed(student, run.model)
    assert not run.teacher.training
    assert {"logits", "tokens"} <= rows(tmp_path)[0].keys()
    assert rows(tmp_path)[0]["logits"] > 0


def test_evaluation_mode_has_no_drop_path(tmp_path, pretrained):
    drop = (*EVIT, *pretrained, "model.options.drop_path_rate=0.9", "optimization.epochs=1")
    go(tmp_path / "train", *drop)
    go(tmp_path / "eval", *drop, "optimization.eval_mode=true")
    go(tmp_path / "none", *EVIT, *pretrained, "optimization.epochs=1", "optimization.eval_mode=true")
    assert same(weights(tmp_path / "eval"), weights(tmp_path / "none"))
    assert not close(weights(tmp_path / "eval"), weights(tmp_path / "train"))


def test_gradients_are_clipped(tmp_path, pretrained):
    clipped = (
        "optimization.optimizer=sgd",
        "optimization.lr=1.0",
        "optimization.weight_decay=0",
        "optimization.clip_grad=0.01",
    )
    made, run = loop(tmp_path, *pretrained, *clipped, "optimization.epochs=1", "data.train_images=8")
    before = copies(run.model)
    made.go()
    moved = sum((tensor - before[name]).square().sum() for name, tensor in run.model.state_dict().items()).sqrt()
    assert 0 < moved <= 1.9 * 0.01 * 1.001  # timm's SGD starts with a Nesterov step of 1 + 0.9
    assert rows(tmp_path)[0]["gradient_norm"] > 0.01


def test_half_precision_on_a_cpu(tmp_path):
    go(tmp_path / "full", *EVIT)
    go(tmp_path / "bf16", *EVIT, "optimization.precision=bf16")
    full, half = rows(tmp_path / "full")[0]["loss"], rows(tmp_path / "bf16")[0]["loss"]
    assert full != half
    assert full == pytest.approx(half, rel=0.02)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.parametrize("method", [(), DTPS])
def test_gradient_checkpointing_changes_memory_only(tmp_path, method):
    made, run = loop(tmp_path / "b", *method, "optimization.grad_checkpointing=true", "optimization.epochs=1")
    assert run.model.grad_checkpointing
    go(tmp_path / "a", *method, "optimization.epochs=1")
    made.go()
    assert close(weights(tmp_path / "a"), copies(run.model))


def test_a_model_without_gradient_checkpointing():
    with pytest.raises(Refusal, match="scenes_vit_small has no gradient checkpointing; set it to false"):
        job._checkpoint_gradients(nn.Linear(2, 2), Recipe())


# ---------------------------------------------------------------------------------------------------- what stops a run
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    go(tmp_path / "a", "optimization.epochs=1")
    calls, original = [], objective.cross_entropy

    def wrong(logits, target):
        calls.append(1)
        return original(logits, target) * (value if len(calls) > 4 else 1)

    monkeypatch.setattr(objective, "cross_entropy", wrong)
    with pytest.raises(
        Refusal, match=r"the loss is not finite at step 4 \(loss (nan|inf).*the last good checkpoint is .*clip_grad=1"
    ):
        go(tmp_path / "b")
    checkpoint = torch.load(tmp_path / "b" / "checkpoint.pt")
    assert checkpoint["step"] == 3
    assert all(tensor.isfinite().all() for tensor in checkpoint["states"]["model"].values())
    monkeypatch.setattr(objective, "cross_entropy", original)
    assert go(tmp_path / "b", resume=True).steps == 6


def test_weights_that_are_not_finite_are_not_written_over_good_ones(tmp_path, monkeypatch):
    """A finite loss can have gradients that are not: that of a root at zero."""
    original = objective.cross_entropy
    monkeypatch.setattr(objective, "cross_entropy", lambda logits, target: original(logits, target) + (0 * logits.sum()).sqrt())
    with pytest.raises(
        Refusal, match=r"the weights are not finite after step 0 \(cls_token is the first\); there is no checkpoint"
    ):
        go(tmp_path, "optimization.epochs=1", "data.train_images=8")
    assert not (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (("optimization.optimizer=adamq",), {}, "timm cannot make 'adamq'"),
        (("augmentation.hflip=0.5", "augmentation.erase=0.1"), {}, "augmentation.erase needs augmentation.crop"),
        (("augmentation.mixup=0.8", "optimization.batch_size=6"), {"accumulate": 2}, "a process gets 3 at a time"),
        (("optimization.batch_size=7",), {"accumulate": 2}, "cannot be divided evenly by 1 processes x 2 forwards"),
        (("data.train_images=4",), {}, "4 images do not fill one batch of 8"),
        ((), {"trackers": ("tensorbord",)}, "no tracker is called 'tensorbord'. Did you mean 'tensorboard'"),
        (("loss.token_labels=1.0", *EVIT), {}, "loss.token_labels is for unreduced models"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        go(tmp_path, *settings, **changes)
    assert not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "--accumulate must be at least 1, not 0"),
        ({"log_every": 0}, "--log-every must be at least 1, not 0"),
        ({"workers": -1}, "--workers must be at least 0"),
    ],
)
def test_ways_of_running_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        running(**changes)


@pytest.mark.unchecked
def test_an_unknown_device():
    with pytest.raises(ValueError, match="--device must be auto or cpu, not 'cuda:1'"):
        running(device="cuda:1")


def test_settings_of_the_launcher_that_would_change_the_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(Refusal, match=r"2 gradient accumulation steps.*--accumulate 2"):
        go(tmp_path)


# ---------------------------------------------------------------------------------------------------- trackers
def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(Refusal, match="--trackers: trackio is not installed here: pip install trackio"):
        go(tmp_path, trackers=("trackio",))


def test_a_tracker_gets_the_recipe_and_the_metrics(tmp_path, monkeypatch):
    import accelerate.tracking

    got = {"config": None, "rows": []}

    class Notebook(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory = "notebook", False

        def __init__(self, project, **_):
            super().__init__()
            got["project"] = project

        tracker = None

        def store_init_configuration(self, values):
            got["config"] = values

        def log(self, values, step=None, **_):
            got["rows"].append((step, values))

    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", {**accelerate.tracking.LOGGER_TYPE_TO_CLASS})
    accelerate.tracking.register_tracker_class(Notebook)
    monkeypatch.setattr("accelerate.accelerator.LOGGER_TYPE_TO_CLASS", accelerate.tracking.LOGGER_TYPE_TO_CLASS)
    go(tmp_path, "optimization.epochs=1", "optimization.clip_grad=1.0", trackers=("notebook",))
    assert got["project"] == "laconic"
    assert got["config"]["optimization.batch_size"] == 8
    assert [values for _, values in got["rows"]] == rows(tmp_path)
    assert [step for step, _ in got["rows"]] == [1, 2, 3, 3]


# ---------------------------------------------------------------------------------------------------- what comes out
def test_the_report_and_the_files(tmp_path):
    report = go(tmp_path, *EVIT, "optimization.ema=0.5", "optimization.epochs=1")
    facts = json.loads(json.dumps(report.to_json()))
    assert (facts["steps"], facts["recipe"]["method"]["name"], sorted(facts["accuracies"])) == (3, "evit", ["val", "val_ema"])
    assert facts["accuracy"] == facts["accuracies"]["val_ema"]
    text = str(report)
    assert "vit_tiny_patch16_224 with evit, keep 0.6: 3 steps" in text
    assert "Validation of the moving average: top-1" in text
    assert f"The moving average of the model is in {tmp_path / 'model'}" in text
    files = ["best", "checkpoint.pt", "metrics.jsonl", "model", "recipe.json", "unaveraged"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert not same(weights(tmp_path), weights(tmp_path, "unaveraged"))


def test_a_model_without_a_method_is_what_timm_reads(tmp_path):
    report = go(tmp_path, "data.val=", "optimization.epochs=1")
    assert report.accuracies == {}
    assert "the best one" not in str(report)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=24, **SHAPE)
    model.load_state_dict(weights(tmp_path))
    again = go(tmp_path / "again", f"model.weights={tmp_path / 'model' / 'model.safetensors'}", "model.pretrained=true")
    assert "come from" in again.weights


def test_options_that_cannot_be_read_off_the_model_are_written(tmp_path):
    go(tmp_path, *EVIT, "model.options.mlp_ratio=2.0", "optimization.epochs=1")
    assert laconic.load(tmp_path / "model").blocks[0].mlp.fc1.out_features == 96


def test_validation_may_be_rare_and_cropped_otherwise(tmp_path):
    go(tmp_path / "a", "optimization.epochs=3", eval_every=2)
    assert [row["epoch"] for row in rows(tmp_path / "a") if "val_top1" in row] == [1, 2]
    go(tmp_path / "b", "optimization.epochs=3", "data.val_crop=0.5", eval_every=2)
    first, cropped = (next(row for row in rows(tmp_path / x) if "val_top1" in row) for x in "ab")
    assert first["val_loss"] != cropped["val_loss"]
