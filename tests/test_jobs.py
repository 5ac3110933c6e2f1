"""The jobs behind the command line, and `laconic.doctor`. Nothing here asserts a time."""

import csv
import io
import json
import time
import urllib.error

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import laconic
from laconic.analysis import diagnose, machine, timing
from laconic.analysis.diagnose import doctor, shared_copy
from laconic.analysis.timing import Quartiles, Sample, Setting, Time
from laconic.cli import agreement, compare, draw, image_io, models, variants, weights
from laconic.cli.bench import bench
from laconic.cli.output import sentence
from laconic.cli.show import show
from laconic.core.files import Refusal, write_atomically

TINY = "deit_tiny_patch16_224"
QUICK = Setting(rounds=1, threads=1)


pytestmark = pytest.mark.usefixtures("no_pretrained_weights")


@pytest.fixture(scope="module")
def small():
    """A few blocks on a small image, so that a forward takes milliseconds."""
    return timm.create_model(TINY, img_size=96, depth=4).eval()


def not_blank(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).std() > 10


# ---------------------------------------------------------------------------------------------------- doctor
def test_doctor_says_what_a_model_is(small):
    report = doctor(small)
    assert report.supported
    assert (report.prefix, report.has_cls, report.grid, report.positions, report.pooling) == (
        1,
        True,
        (6, 6),
        "absolute",
        "token",
    )
    assert len(report.blocks) == 4
    assert [t.method for t in report.trials] == list(laconic.methods())
    assert all(t.works != laconic.methods()[t.method].clips for t in report.trials)
    etps = next(t for t in report.trials if t.method == "etps")
    assert etps.example == 'laconic.reduce_(model, "etps", keep=0.7)'
    assert etps.tokens == (26, 19, 14)
    assert json.loads(json.dumps(report.to_json()))["supported"] is True
    assert "self-test:     passed" in str(report)


@pytest.fixture
def few_methods(monkeypatch):
    """The whole registry is tried in test_doctor_says_what_a_model_is."""
    chosen = ("avg-pool", "bat", "dtps", "dynamicvit", "etps", "tome", "topk")
    known = {name: row for name, row in laconic.methods().items() if name in chosen}
    monkeypatch.setattr(diagnose, "all_methods", lambda: known)


@pytest.mark.usefixtures("few_methods")
def test_doctor_leaves_the_model_and_the_generator_alone(small):
    before, state = small(torch.zeros(1, 3, 96, 96)), torch.random.get_rng_state()
    doctor(small)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(small(torch.zeros(1, 3, 96, 96)), before)


@pytest.mark.usefixtures("few_methods")
def test_doctor_finds_the_stand_in_for_a_class_token():
    model = timm.create_model("vit_base_patch16_siglip_224", img_size=64, depth=4, embed_dim=48, num_heads=3).eval()
    trials = {t.method: t for t in doctor(model).trials}
    assert trials["etps"].options == {"score": "mean-query"}
    assert "score='mean-query'" in trials["etps"].example
    assert trials["dtps"].options == {}


@pytest.mark.usefixtures("few_methods")
def test_doctor_gives_the_reason_why_not():
    model = timm.create_model("vit_base_patch16_xp_224", img_size=64, depth=4, embed_dim=48, num_heads=3).eval()
    trials = {t.method: t for t in doctor(model).trials}
    assert not trials["bat"].works
    assert "side by side" in trials["bat"].reason
    assert trials["bat"].example == ""
    assert trials["dynamicvit"].works


@pytest.mark.usefixtures("few_methods")
def test_doctor_examines_a_reduced_model_as_it_was(small):
    assert doctor(laconic.reduce_(shared_copy(small), "bat", keep=0.5)).to_json() == doctor(small).to_json()


def test_doctor_on_an_unknown_model():
    report = doctor(torch.nn.Linear(2, 2))
    assert not report.supported
    assert "does not know torch.nn.modules.linear.Linear" in str(report)


@pytest.mark.unchecked
def test_doctor_wants_a_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        doctor("deit")


def test_a_twin_shares_weights_and_nothing_else(small):
    copy = shared_copy(small)
    assert all(a is b for a, b in zip(copy.parameters(), small.parameters(), strict=True))
    assert not {id(m) for m in copy.modules()} & {id(m) for m in small.modules()}


# ---------------------------------------------------------------------------------------------------- measuring
class Clock:
    """A fake clock: every model takes the time it is given, times how slow the machine is at that moment."""

    def __init__(self, seconds):
        self.seconds, self.order, self.slow = seconds, [], 1.0

    def __call__(self, run):
        name = run()
        self.order.append(name)
        self.slow *= 1.01  # the machine slows down all the while
        return Time(self.seconds[name] * self.slow, 2 * self.seconds[name] * self.slow)


def fake_rounds(seconds, rounds):
    clock = Clock(seconds)
    return clock, timing.interleave({name: lambda name=name: name for name in seconds}, rounds, clock)


def test_rounds_are_interleaved_and_every_other_one_goes_backwards():
    clock, samples = fake_rounds(dict.fromkeys("Xabcdef", 1.0), 2)
    assert "".join(clock.order) == "XabcdXefX" + "XfedcXbaX"
    assert {name: len(s) for name, s in samples.items()} == {"X": 6, **dict.fromkeys("abcdef", 2)}


def test_ratios_do_not_see_that_the_machine_slows_down():
    _, samples = fake_rounds({"base": 3.0, "half": 1.5, "same": 3.0, "slow": 6.0}, 6)
    for name, expected in {"base": 1.0, "half": 2.0, "same": 1.0, "slow": 0.5}.items():
        for quartiles in timing.ratios(samples[name]):
            assert quartiles.median == pytest.approx(expected, rel=0.03)
            assert quartiles.low <= quartiles.median <= quartiles.high


def test_quartiles():
    assert Quartiles.of([2.0]) == Quartiles(2.0, 2.0, 2.0)
    assert Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Quartiles(2.0, 3.0, 4.0)


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"threads": 0}])
def test_setting_refuses(bad):
    with pytest.raises(ValueError, match="at least 1"):
        Setting(**bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_setting_refuses_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="no CUDA device"):
        Setting(device="cuda")
    assert Setting().place.type == "cpu"


def test_the_machine_is_described_and_left_as_it_was():
    before = torch.get_num_threads()
    with machine.prepared(Setting(threads=2)):
        found = machine.environment(Setting(threads=2))
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    assert found["threads"] == 2
    assert found["torch"] == torch.__version__
    assert set(found) >= {"timm", "device", "dtype", "date", "compiled", "laconic"}


def variant(name, kind, macs, keep=None):
    return variants.Variant(name, kind, torch.nn.Identity(), macs, 10, (196, 68), (224, 224), keep)


def rows(**seconds):
    compared = [variant("unreduced", "base", 4_000_000_000), variant("etps", "method", 2_000_000_000, 0.7)]
    compared.append(variant("random", "plain", 2_000_000_000, 0.7))
    labels = dict(zip(seconds, (v.label for v in compared), strict=False))
    samples = {
        label: [Sample(Time(s, s), Time(b, b)) for s, b in zip(seconds[key], seconds["base"], strict=True)]
        for key, label in labels.items()
    }
    return compare.rows_of(compared, 8, samples)


def test_rows_hold_achieved_implied_and_efficiency():
    base, etps, _ = rows(base=[1.0, 1.0, 2.0], etps=[0.8, 0.5, 1.0], random=[1.0, 1.0, 2.0])
    assert etps.implied == 2.0
    assert etps.wall == Quartiles(1.625, 2.0, 2.0)
    assert etps.efficiency == 1.0
    assert etps.images_per_second == 8 / 0.8
    assert (base.wall.median, base.implied) == (1.0, 1.0)


def test_verdict_says_what_was_measured_and_no_more():
    said = compare.verdict(rows(base=[1.0] * 3, etps=[0.5] * 3, random=[0.8] * 3))
    assert said == "etps: 2.00x at batch 8.\nWithout a method, at batch 8: random 0.7 1.25x."
    assert "no faster than unreduced (0.50x)" in compare.verdict(rows(base=[1.0] * 3, etps=[2.0] * 3, random=[1.0] * 3))
    assert "no clear gain" in compare.verdict(rows(base=[1.0] * 3, etps=[0.5, 0.9, 1.9], random=[1.0] * 3))


def test_a_busy_machine_is_mentioned():
    assert compare.busy(rows(base=[1.0] * 4, etps=[1.0] * 4, random=[1.0] * 4)) == []
    (note,) = compare.busy(rows(base=[1.0, 1.0, 9.0, 9.0], etps=[1.0] * 4, random=[1.0] * 4))
    assert "other things to do" in note


def test_csv_has_the_columns_of_timm():
    lines = list(
        csv.DictReader(io.StringIO(compare.to_csv("deit_small_patch16_224", rows(base=[1.0], etps=[0.5], random=[1.0]))))
    )
    assert list(lines[0])[:7] == [
        "model",
        "infer_samples_per_sec",
        "infer_step_time",
        "infer_batch_size",
        "infer_img_size",
        "infer_gmacs",
        "param_count",
    ]
    assert lines[1] | {"infer_step_time": "500.0", "infer_gmacs": "2.0", "ratio": "2.0", "keep": "0.7"} == lines[1]
    assert lines[1]["infer_samples_per_sec"] == "16.0"


def test_bench_measures_the_alternatives_too(tmp_path):
    (tmp_path / "new").mkdir()
    report = bench(
        TINY, method=("bat",), options=("clusters=4",), batch_size=(1, 2), setting=QUICK, output=tmp_path / "new" / "r.csv"
    )
    kinds = [(row.name, row.kind) for row in report.rows if row.batch_size == 1]
    expected = [
        ("unreduced", "base"),
        ("unreduced, class row only", "plain"),
        ("bat", "method"),
        ("random", "plain"),
        ("avg-pool", "plain"),
        ("input 176x176", "resolution"),
    ]
    assert kinds == expected
    assert len(report.rows) == 12
    peaks = {(row.name, row.batch_size): row.peak for row in report.rows}
    assert 1.5 < peaks["unreduced", 2] / peaks["unreduced", 1] < 2.5  # of activations alone
    assert peaks["input 176x176", 1] < peaks["unreduced", 1]
    assert any("no smaller model" in note for note in report.notes)
    assert all(row.wall.median > 0 and row.cpu.median > 0 for row in report.rows)
    with (tmp_path / "new" / "r.csv").open() as file:
        assert [line["variant"] for line in csv.DictReader(file)][:3] == ["unreduced", "unreduced, class row only", "bat"]
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["r.csv", "r.json"]
    assert "bat: " in str(report)


@pytest.mark.unchecked
def test_bench_measures_files(monkeypatch):
    """Every row is a file in the runtime asked for, the unreduced model's too."""
    import laconic.cli.exported as exported

    opened, own = [], exported.runner
    monkeypatch.setattr(exported, "runner", lambda path, to, threads: opened.append((path.name, to)) or own(path, to, threads))
    report = bench(TINY, method=("etps",), batch_size=(1,), setting=QUICK, exported="torch-export")
    assert [name for name, _ in opened][:3] == ["model.pt2", "model.unreduced,-class-row-only.pt2", "model.etps-0.7.pt2"]
    assert {to for _, to in opened} == {"torch-export"}
    assert len(opened) == len(report.rows) == 6
    assert all(row.peak is None and row.wall.median > 0 for row in report.rows)
    assert "float32, exported (torch-export), torch" in str(report)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (dict(compile=True), "--exported onnx and --compile are two ways"),
        (dict(dtype="bfloat16"), "takes weights in float32, not bfloat16"),
    ],
)
def test_bench_refuses_what_no_file_can_be(setting, said):
    with pytest.raises(Refusal, match=said):
        bench(TINY, setting=timing.Setting(rounds=1, device="cpu", **setting), exported="onnx")


@pytest.mark.slow
def test_bench_of_a_saved_model(tmp_path):
    from laconic.checkpoints.save_load import save

    save(laconic.reduce_(models.create(TINY), "evit", keep=0.5), tmp_path / "saved")
    report = bench(str(tmp_path / "saved"), batch_size=(1,), setting=QUICK)
    names = [row.name for row in report.rows][:4]
    assert names == ["unreduced", "unreduced, class row only", "evit as saved", "random"]


def test_every_model_is_compiled_on_its_own(monkeypatch, small):
    """With one code object for all, the ninth model would run uncompiled."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: compiled.append((call, dynamic)) or call)
    unreduced = variants.unreduced("unreduced", small)
    compare.compare([unreduced, variants.reduced(small, laconic.TopK(), 0.5)], 1, Setting(rounds=1, compile=True))
    assert len({id(call.__code__) for call, _ in compiled}) == 2
    assert not any(dynamic for _, dynamic in compiled)


@pytest.mark.unchecked
@pytest.mark.slow
def test_a_dozen_models_are_all_compiled(small):
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    models_ = [laconic.reduce_(shared_copy(small), "topk", keep=keep / 20) for keep in range(8, 18)]
    compile_ = torch.compile
    with pytest.MonkeyPatch.context() as patch, config.patch(fail_on_recompile_limit_hit=True):
        patch.setattr(torch, "compile", lambda call, dynamic: compile_(call, dynamic=dynamic, backend="eager"))
        runs = [timing.forward(model, torch.zeros(1, 3, 96, 96), compiled=True) for model in models_]
        with torch.inference_mode():
            for run in [*runs, *runs]:
                run()
    assert counters["stats"]["unique_graphs"] == len(models_)


# ---------------------------------------------------------------------------------------------------- what is compared
def test_options_go_to_the_methods_that_have_them():
    etps, bat = variants.parse_methods(("etps", "bat"), ("score=mean-query", "bat.clusters=3", "similarity=previous-attention"))
    assert etps == laconic.ETPS(score="mean-query", similarity="previous-attention")
    assert bat == laconic.BAT(score="mean-query", clusters=3)
    assert variants.parse_methods(("evit",), ("fuse=false",)) == [laconic.EViT(fuse=False)]
    assert variants.parse_methods(("bat",), ("pairs=(3, 2, 0.1)",)) == [laconic.BAT(pairs=(3, 2, 0.1))]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("similarity", "expected NAME=VALUE"),
        ("simlarity=cosine", "Did you mean 'similarity'"),
        ("bat.clusters=3", "bat has no such option here"),
        ("similarity=dot", "must be cosine or previous-attention, not dot"),
        ("temperature=warm", "must be a number, not warm"),
    ],
)
def test_options_that_are_refused(option, message):
    with pytest.raises(Refusal, match=message):
        variants.parse_methods(("etps",), (option,))


def test_a_lower_resolution_has_about_as_many_patches_and_the_same_weights():
    model = models.create(TINY)
    lower = models.lower_resolution(model, 125.0)
    assert lower.patch_embed.img_size == (176, 176)
    assert lower(torch.zeros(1, 3, 176, 176)).shape == (1, 1000)
    assert lower.head.weight is model.head.weight
    assert model.patch_embed.img_size == (224, 224)
    assert models.lower_resolution(torch.nn.Linear(2, 2), 10.0) is None


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("deit_base_patch16_224", "deit_small_patch16_224"),
        ("deit_small_patch16_224.fb_in1k", "deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224", None),
        ("vit_large_patch14_dinov2", "vit_base_patch14_dinov2"),
        ("vit_base_patch14_reg4_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2"),
        ("vit_base_patch16_siglip_224", None),
        ("beit_unknown", None),
    ],
)
def test_the_next_smaller_model(name, smaller):
    assert models.smaller_name(name) == smaller


def test_the_smaller_model_gets_a_row(small):
    found, notes = variants.alternatives("deit_small_patch16_224", small, [0.5], lambda name: shared_copy(small))
    assert [v.label for v in found] == ["random 0.5", "avg-pool 0.5", "input 64x64 0.5", TINY]
    assert notes == []


def test_alternatives_that_a_model_does_not_allow_are_notes():
    model = timm.create_model("vit_base_patch16_xp_224", img_size=64, depth=4, embed_dim=48, num_heads=3).eval()
    found, notes = variants.alternatives("vit_base_patch16_xp_224", model, [0.5])
    assert [v.label for v in found] == ["input 48x48 0.5"]
    assert [note[:11] for note in notes] == ["no random r", "no avg-pool", "no smaller "]
    assert variants.mean_tokens(model, 0.5) == (8 + 4 + 2 + 16) / 4


def test_an_unknown_model_is_refused_with_the_nearest_names():
    with pytest.raises(Refusal, match="did you mean deit_small_patch16_224"):
        models.create("diet_small_patch16_224")


def test_models_do_not_depend_on_the_generator_and_leave_it_alone():
    state = torch.random.get_rng_state()
    a = models.create(TINY, depth=1).head.weight
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(models.create(TINY, depth=1).head.weight, a)


# ---------------------------------------------------------------------------------------------------- weights
def test_random_weights_are_said_to_be_random():
    loaded = weights.load(TINY)
    assert loaded.random
    assert loaded.line.startswith(
        "weights are RANDOM (seed 0): accuracy and agreement mean nothing; speed, MACs and token counts"
    )
    assert loaded.remark == " (random weights)"


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_of_a_file(tmp_path, suffix):
    from safetensors.torch import save_file

    torch.manual_seed(5)
    state, path = timm.create_model(TINY).state_dict(), tmp_path / f"own.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
    loaded = weights.load(TINY, path)
    assert torch.equal(loaded.model.head.weight, state["head.weight"])
    assert not loaded.random
    assert str(path) in loaded.line


def test_cached_weights_are_taken_without_a_network(tmp_path, monkeypatch):
    path = tmp_path / "cached.pth"
    torch.save(timm.create_model(TINY).state_dict(), path)
    monkeypatch.setattr(weights, "_cached", lambda cfg: path)
    loaded = weights.load(TINY)
    assert not loaded.random
    assert "timm's pretrained ones" in loaded.line
    assert torch.equal(loaded.model.head.weight, torch.load(path)["head.weight"])


def test_a_download_that_fails_is_no_failure(monkeypatch):
    monkeypatch.setattr(weights, "_hub_answers", lambda: True)
    create = models.create

    def failing(name, **options):
        if options.get("pretrained"):
            raise OSError("connection reset\nby peer")
        return create(name, **options)

    monkeypatch.setattr(weights, "create", failing)
    loaded = weights.load(TINY)
    assert loaded.random
    assert "connection reset;" in loaded.line


def test_weights_that_are_refused(tmp_path):
    with pytest.raises(Refusal, match="no such file"):
        weights.load(TINY, tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(Refusal, match=f"does not hold the weights of {TINY}"):
        weights.load(TINY, tmp_path / "text.pth")
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(Refusal, match=f"does not hold the weights of {TINY}"):
        weights.load(TINY, tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (urllib.error.HTTPError("", 404, "", None, None), True),
        (urllib.error.URLError("no network"), False),
        (None, False),  # no answer at all
    ],
)
def test_the_hub_is_asked_once_and_not_for_long(monkeypatch, answer, expected):
    monkeypatch.undo()  # the real one
    from huggingface_hub import constants

    def answering(*_, **__):
        if answer is None:
            time.sleep(0.5)
            raise OSError("at last")
        raise answer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "TIMEOUT", 0.2)
    monkeypatch.setattr(urllib.request, "urlopen", answering)
    assert weights._hub_answers() is expected


# ---------------------------------------------------------------------------------------------------- photographs
def test_the_photograph_is_the_crop_that_the_model_sees(small):
    path = next(iter(image_io.shipped(1)))
    photo = image_io.read(path, small)
    assert photo.picture.shape == (224, 224, 3)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    seen = photo.pixels.permute(1, 2, 0).numpy() * std + mean
    assert np.abs(seen - photo.picture).max() < 1e-5


def test_files_that_are_not_images(tmp_path, small):
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(Refusal, match=r"text\.jpg is not an image"):
        image_io.read(tmp_path / "text.jpg", small)
    with pytest.raises(Refusal, match="No such file"):
        image_io.read(tmp_path / "absent.jpg", small)
    with pytest.raises(Refusal, match="cannot be read as an image"):
        image_io.read(tmp_path, small)
    whole = next(iter(image_io.shipped(1))).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refusal, match=r"half\.png cannot be read as an image"):
        image_io.read(tmp_path / "half.png", small)


def test_agreement(small):
    read = [image_io.Photo("noise", None, torch.randn(3, 96, 96), np.zeros((96, 96, 3)))]
    full = agreement.answers(small, read, (96, 96))
    same = agreement.agree(full, full)
    assert same.cosine == pytest.approx(1.0)
    assert (same.kl, same.top1) == (pytest.approx(0.0, abs=1e-6), 1.0)
    lower = agreement.agree(agreement.answers(models.lower_resolution(small, 16.0), read, (64, 64)), full)
    assert lower.cosine < 1
    assert lower.kl > 0
    other = agreement.answers(timm.create_model(TINY, img_size=96, depth=1, embed_dim=96, num_classes=0).eval(), read, (96, 96))
    assert agreement.agree(other, full) == agreement.Agreement(None, None, None)


# ---------------------------------------------------------------------------------------------------- pictures
def stage(holder, block=3):
    holder = np.array(holder)
    return draw.Map(holder, (2, len(holder) // 2), block, len(set(holder) - {-1}))


def test_maps_say_which_patches_share_a_token(small):
    reduced = laconic.reduce_(shared_copy(small), "bat", keep=0.5)
    reduced(torch.randn(2, 3, 96, 96))
    ledger = laconic.provenance(reduced)
    for number in range(2):
        for found, told in zip(draw.maps(ledger, number), ledger.stages, strict=True):
            assert found.tokens == told.size.shape[1]
            sizes = sorted(len(patches) for patches in found.groups.values())
            assert sizes == sorted(int(s) for s in told.size[number] if s > 1)


def test_painting_gives_groups_their_mean_colour_darkens_what_was_dropped_and_leaves_the_rest():
    photo, found = np.full((48, 96, 3), 0.8), stage([0, 0, 2, 3, 4, 5, -1, -1])
    photo[:24, :24] = 0.4  # one of the two patches of token 0
    out = draw.paint(photo, found)
    assert np.allclose(out[12, 12], 0.6)
    assert np.allclose(out[12, 24], 0.6)  # no line inside a group
    assert (out[2:24, 50:72] == 0.8).all()  # patch 2, with a token of its own
    assert (out[24:, 48:] < 0.4).all()  # patches 6 and 7, dropped
    assert (out[12, 48] > 0.8).all()  # the line between two tokens
    assert photo[0, 0, 0] == 0.4  # the picture itself is unchanged


def test_two_tokens_in_one_place_stay_two_groups():
    ledger = laconic.Provenance(
        (laconic.Stage(0, torch.tensor([[0, 1, 1, 0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([[3, 3]]), None, (2, 2)),),
        (2, 2),
    )
    (found,) = draw.maps(ledger, 0)
    assert {place: list(patches) for place, patches in found.groups.items()} == {0: [0, 3], 1: [1, 2]}


def test_show_draws_every_image_method_and_rate(tmp_path):
    images = tuple(image_io.shipped(2))
    report = show(images, model=TINY, method=("bat", "topk"), keep=(0.7,), output=tmp_path / "maps")
    assert [p.file.name for p in report.pictures] == [
        "astronaut-bat-0.7.png",
        "chelsea-bat-0.7.png",
        "astronaut-topk-0.7.png",
        "chelsea-topk-0.7.png",
    ]
    assert all(not_blank(p.file) for p in report.pictures)
    assert report.pictures[2].tokens == (196, 138, 97, 68)
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == sorted(p.file.name for p in report.pictures)
    json.dumps(report.to_json())
    assert "Token maps" in str(report)


def test_show_draws_a_saved_model(tmp_path):
    from laconic.checkpoints.save_load import save

    save(laconic.reduce_(models.create(TINY), "evit", keep=0.5), tmp_path / "saved")
    image = next(iter(image_io.shipped(1)))
    (picture,) = show((image,), model=str(tmp_path / "saved"), output=tmp_path).pictures
    assert picture.file.name == "astronaut-evit-as-saved.png"
    assert not_blank(picture.file)
    with pytest.raises(Refusal, match="reduced by evit already"):
        show((image,), model=str(tmp_path / "saved"), method=("bat",), output=tmp_path)
    with pytest.raises(Refusal, match="holds weights already"):
        show((image,), model=str(tmp_path / "saved"), weights=image, output=tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(Refusal, match="does not hold a model that laconic saved"):
        models.open_model(str(tmp_path))


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path):
    path = next(iter(image_io.shipped(1)))
    report = show((path, path), model=TINY, output=tmp_path)
    assert [p.file.name for p in report.pictures] == ["astronaut-1-bat-0.7.png", "astronaut-2-bat-0.7.png"]


# ---------------------------------------------------------------------------------------------------- files
def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Refusal, match="No space left"):
        write_atomically(path, "second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_sentences():
    assert [sentence(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
