"""Saving, loading, sharing, and the authors' files."""

import argparse
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import laconic
import laconic.models
from families import AT, FAMILIES, METHODS, images, make, reduced, serves
from golden_init import golden_input, golden_param
from laconic.checkpoints import saved_files
from laconic.checkpoints.hub import from_pretrained, push_to_hub, save_pretrained
from laconic.checkpoints.official_weights import import_checkpoint
from laconic.checkpoints.plain import save_plain
from laconic.checkpoints.save_load import load, save
from laconic.checkpoints.saved_files import RECORD, WEIGHTS
from laconic.core.method import METHODS as REGISTRY
from laconic.core.token_reduction import find_reduction

GOLDENS = Path(__file__).parent / "goldens"
KINDS = pytest.mark.parametrize("method", ["evit", "dtps"])


def run(model, x):
    with torch.no_grad():
        return model(x)


def stirred(model):
    """The same model with every parameter moved, so that nothing fits by having been initialised alike."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before, training):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.training is training
    with pytest.raises(ValueError, match="not reduced"):
        laconic.restore_(model)


# ---------------------------------------------------------------------------------------------------- save and load
@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_what_was_saved(method, tmp_path):
    model, x = stirred(reduced(method, "plain")), images("plain")
    save(model.train(), tmp_path)
    again = load(str(tmp_path))
    assert not any(m.training for m in again.modules())
    assert torch.equal(run(again, x), run(model.eval(), x))
    assert again.laconic.config == model.laconic.config
    assert again.laconic.schedule == model.laconic.schedule
    assert sorted(os.listdir(tmp_path)) == [RECORD, WEIGHTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_built_again_or_refused(family, tmp_path):
    method = "dtps" if serves("dtps", family) else "dynamicvit"
    model, x = stirred(reduced(method, family)), images(family)
    if family in ("respost", "parallel"):  # block_fn is a class: no name and no argument in JSON can say it
        with pytest.raises(ValueError, match="model_args='omit'"):
            save(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()
        save(model, tmp_path / "a", model_args="omit")
        with pytest.raises(ValueError, match="does not tell how to build"):
            load(tmp_path / "a")
        again = load(tmp_path / "a", model=make(family))
    else:
        save(model, tmp_path / "a")
        again = load(tmp_path / "a")
        assert again.pretrained_cfg == model.pretrained_cfg
    assert torch.equal(run(again, x), run(model, x))


def test_the_tag_is_kept_with_what_it_says_of_the_input(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", img_size=96, depth=4, embed_dim=48).eval()
    save(laconic.reduce_(model, "evit", keep=0.6, at=AT), tmp_path)
    again = load(tmp_path)
    assert again.pretrained_cfg == model.pretrained_cfg
    assert again.num_classes == 21843
    model.pretrained_cfg["tag"] = "mine"
    save(model, tmp_path)
    assert torch.equal(run(load(tmp_path), images("plain")), run(model, images("plain")))


def test_the_device_of_a_model_built_here(tmp_path):
    save(reduced("dtps", "plain"), tmp_path)
    assert {p.device.type for p in load(tmp_path, device="meta").parameters()} == {"meta"}
    assert {p.device.type for p in load(tmp_path, model=make("plain"), device="meta").parameters()} == {"cpu"}


@pytest.mark.parametrize(
    "config",
    [
        laconic.BAT(clusters=(4, 3, 2), pairs=(0.1, 0.1, 0.1), weights="literal"),
        laconic.ToMe(r=(3, 0.5), proportional=False),
        laconic.ETPS(similarity="previous-attention", temperature=0.3),
    ],
)
def test_options_survive(config, tmp_path):
    keep = None if isinstance(config, laconic.ToMe) else (0.9, 0.75, 0.5)
    model = laconic.reduce_(make("plain"), config, keep=keep, at=AT)
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.laconic.config == config
    assert hash(again.laconic.config) == hash(config)  # lists would not hash
    assert again.laconic.schedule == model.laconic.schedule
    assert torch.equal(run(again, images("plain")), run(model, images("plain")))


def test_explicit_counts_survive(tmp_path):
    model = laconic.reduce_(make("plain"), "topk", schedule=laconic.Schedule.keep_counts({1: 20, 3: 7}))
    save(model, tmp_path)
    assert load(tmp_path).laconic.schedule == model.laconic.schedule


def test_the_dtype_is_that_of_the_weights(tmp_path):
    model, x = reduced("dtps", "plain").bfloat16(), images("plain").bfloat16()
    save(model, tmp_path)
    again = load(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(run(again, x), run(model, x))
    assert {p.dtype for p in load(tmp_path, model=make("plain")).parameters()} == {torch.float32}


def test_memory_layout_and_shared_weights_do_not_matter(tmp_path):
    model = reduced("evit", "plain").to(memory_format=torch.channels_last)
    model.blocks[1].norm2.weight = model.blocks[1].norm1.weight
    save(model, tmp_path)
    model = model.to(memory_format=torch.contiguous_format)  # convolutions of the two layouts round differently on some CPUs
    assert torch.equal(run(load(tmp_path), images("plain")), run(model, images("plain")))


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, timm.utils.ModelEmaV3, pytest.param(torch.compile, marks=pytest.mark.unchecked)]
)
def test_wrappers_are_taken_off(wrap, tmp_path):
    model = reduced("dtps", "plain")
    save(wrap(model), tmp_path)
    assert torch.equal(run(load(tmp_path), images("plain")), run(model, images("plain")))


def test_a_model_around_a_timm_model_is_filled_not_built(tmp_path):
    def whole():
        return nn.Sequential(nn.BatchNorm2d(3), make("plain")).eval()

    model, x = stirred(laconic.reduce_(whole(), "dtps", keep=0.6, at=AT)), images("plain")
    model.pretrained_cfg = model[1].pretrained_cfg  # even if it says so, it is not the model of that name
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)laconic\.json does not tell.*Sequential.*model=your_model"):
        load(tmp_path)
    fresh = whole()
    assert load(tmp_path, model=fresh) is fresh
    assert torch.equal(run(fresh, x), run(model, x))
    with pytest.raises(ValueError, match="Sequential is not one of timm's"):
        save(model, tmp_path, model_args={"depth": 4})


def test_unreadable_arguments_are_asked_for(tmp_path):
    unusual = {"mlp_ratio": 2, "act_layer": "silu"}
    model = laconic.reduce_(make("plain", **unusual), "evit", keep=0.6, at=AT)
    with pytest.raises(ValueError, match=r"(?s)is not this model.*fc1.weight: \[96, 48\] in this model, \[192, 48\]"):
        save(model, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)mlp_ratio=2.*act: SiLU here, GELU in timm's"):  # the same keys and shapes
        save(model, tmp_path, model_args={"mlp_ratio": 2})
    assert not list(tmp_path.iterdir())
    save(model, tmp_path, model_args=unusual)
    assert torch.equal(run(load(tmp_path), images("plain")), run(model, images("plain")))


def test_the_number_of_heads_counts_though_no_shape_shows_it(tmp_path):
    model = laconic.reduce_(make("plain", num_heads=1), "evit", keep=0.6, at=AT)
    save(model, tmp_path)
    assert json.loads((tmp_path / RECORD).read_text())["model"]["args"]["num_heads"] == 1
    assert torch.equal(run(load(tmp_path), images("plain")), run(model, images("plain")))
    model.blocks[2].attn.num_heads = 3
    with pytest.raises(ValueError, match=r"blocks\.2\.attn: num_heads is 3 here, 1 in timm's"):
        save(model, tmp_path)


def test_arguments_that_timm_does_not_take_one_by_one(tmp_path):
    model = laconic.reduce_(make("siglip", class_token=True, global_pool="token"), "evit", keep=0.6, at=AT)
    save(model, tmp_path)  # this architecture has no class token, so global_pool="token" alone is refused
    assert torch.equal(run(load(tmp_path), images("siglip")), run(model, images("siglip")))


@pytest.mark.parametrize(
    ("model_args", "found"),
    [
        ({"pretrained": True}, "pretrained.*not accepted"),
        ({"checkpoint_path": "x.pth"}, "checkpoint_path.*not accepted"),
        ({"wings": 2}, "cannot build.*wings"),
        ({"act_layer": nn.SiLU}, "plain JSON"),
    ],
)
def test_arguments_that_cannot_be_written(model_args, found, tmp_path):
    with pytest.raises(ValueError, match=found):
        save(reduced("evit", "plain"), tmp_path / "a", model_args=model_args)
    assert not (tmp_path / "a").exists()


@pytest.mark.unchecked
def test_model_args_of_the_wrong_kind(tmp_path):
    with pytest.raises(TypeError, match="'omit' or None, not 'skip'"):
        save(reduced("evit", "plain"), tmp_path, model_args="skip")


@KINDS
def test_a_model_to_fill(method, tmp_path):
    model, fresh = stirred(reduced(method, "plain")), make("plain").train()
    save(model, tmp_path)
    assert load(tmp_path, model=fresh) is fresh
    assert not fresh.training
    assert torch.equal(run(fresh, images("plain")), run(model, images("plain")))
    with pytest.raises(ValueError, match="reduced already"):
        load(tmp_path, model=fresh)


@KINDS
def test_a_model_that_does_not_fit_is_left_alone(method, tmp_path):
    save(reduced(method, "plain"), tmp_path)
    other = make("plain", num_classes=7).train()
    before = snapshot(other)
    with pytest.raises(
        ValueError, match=r"(?s)2 of another shape:\n    head.weight: \[10, 48\] in the file, \[7, 48\] in the model"
    ):
        load(tmp_path, model=other)
    assert_untouched(other, before, training=True)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model, x = reduced("dtps", "plain"), images("plain")
    save(model, tmp_path)
    expected = run(model, x)

    def fails(weights, path, metadata):
        Path(path).write_bytes(b"half of i")
        raise OSError("no space left on device")

    monkeypatch.setattr(saved_files, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        save(stirred(model), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [RECORD, WEIGHTS]
    assert torch.equal(run(load(tmp_path), x), expected)


def test_saving_over_another_model(tmp_path):
    save(reduced("evit", "plain"), tmp_path)
    model = reduced("dtps", "deit3")
    save(model, tmp_path)
    assert torch.equal(run(load(tmp_path), images("deit3")), run(model, images("deit3")))


@pytest.mark.unchecked
def test_an_option_that_is_not_json(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Odd(laconic.TopK):
        note: object = None

    monkeypatch.setitem(REGISTRY, "topk", dataclasses.replace(REGISTRY["topk"], config=Odd))
    model = laconic.reduce_(make("plain"), Odd(note={1}), keep=0.6, at=AT)
    with pytest.raises(ValueError, match=r"option of the method is not plain JSON.*set"):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class FirstHalf(laconic.Reducer):
    """Keep the first patches."""

    def between(self, tokens, seen, n):
        kept = torch.arange(n).expand(len(tokens.patches), n)
        return tokens.keep(kept)


class Renamed(laconic.TopK):
    """Another method, under the name of its base."""


@pytest.mark.parametrize("method", [FirstHalf(), Renamed()], ids=["reducer", "subclass"])
def test_a_method_that_load_would_not_find_is_not_saved(method, tmp_path):
    model = laconic.reduce_(make("plain"), method, keep=0.6, at=AT)
    with pytest.raises(ValueError, match=rf"the method {type(method).__name__} is not registered.*@laconic\.method"):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("before", [None, "evit", "plain"])
def test_a_save_that_is_killed_between_its_two_files(before, tmp_path, monkeypatch):
    """The file of the weights is in its place and ``laconic.json`` is not: the new model is loaded, or none at all."""
    if before == "evit":
        save(reduced("evit", "plain"), tmp_path)
    elif before == "plain":
        save_plain(make("plain"), tmp_path)
    model, x, move = stirred(reduced("dtps", "plain")), images("plain"), os.replace

    def killed(source, target):
        if str(target).endswith(RECORD):
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path)
    monkeypatch.undo()
    if before is None:
        with pytest.raises(FileNotFoundError, match="not a directory that laconic.save has finished"):
            load(tmp_path)
        return
    assert json.loads((tmp_path / RECORD).read_text())["method"] != {"name": "dtps"}
    loaded = load(tmp_path)
    assert find_reduction(loaded).config.info.name == "dtps"
    assert torch.equal(run(loaded, x), run(model, x))


def test_equal_models_give_equal_files_and_an_edited_record_counts(tmp_path):
    for name in "ab":
        save(reduced("evit", "plain"), tmp_path / name)
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in (RECORD, WEIGHTS))
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    (tmp_path / "a" / RECORD).write_text(json.dumps({**record, "schedule": {"at": [1], "keep": [0.25]}}))
    assert find_reduction(load(tmp_path / "a")).schedule.to_json() == {"at": [1], "keep": [0.25]}


def test_own_architectures_load_in_a_new_process(tmp_path):
    """Nothing of laconic has been imported there but ``load``."""
    save(laconic.reduce_(timm.create_model("scenes_vit_tiny"), "tome", keep=0.5), tmp_path)
    code = f"import laconic; print(sum(p.numel() for p in laconic.load({str(tmp_path)!r}).parameters()))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(p.numel() for p in timm.create_model("scenes_vit_tiny").parameters())


def test_what_is_not_reduced_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"not reduced.*torch\.save\(model\.state_dict\(\)"):
        save(make("plain"), tmp_path)


def test_restored_models_are_plain_models(tmp_path):
    model, x = reduced("dtps", "plain"), images("plain")
    save(stirred(model), tmp_path)
    plain = make("plain")
    plain.load_state_dict(laconic.restore_(load(tmp_path)).state_dict())
    assert torch.equal(run(plain, x), run(laconic.restore_(model), x))


# ---------------------------------------------------------------------------------------------------- what load refuses
@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound")
    save(reduced("evit", "plain"), directory)
    load(directory)
    return directory


def edited(**changes):
    def edit(directory):
        record = json.loads((directory / RECORD).read_text())
        for path, value in changes.items():
            *parents, last = path.split("__")
            inner = record
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        (directory / RECORD).write_text(json.dumps(record))

    return edit


def written(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def unchecked(*values):
    return pytest.param(*values, marks=pytest.mark.unchecked)


def cut(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "found"),
    [
        (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, "model.safetensors is missing"),
        (lambda d: (d / RECORD).unlink(), FileNotFoundError, "laconic.json is missing"),
        (cut, ValueError, "model.safetensors is damaged"),
        (written(WEIGHTS, b""), ValueError, "model.safetensors is damaged"),
        (written(WEIGHTS, os.urandom(999)), ValueError, "model.safetensors is damaged"),
        (written(RECORD, b'{"format": 1'), ValueError, "laconic.json is damaged"),
        (written(RECORD, b"\xff\xfe\x00"), ValueError, "laconic.json is damaged"),
        (written(RECORD, b"[1]"), ValueError, "laconic.json is not a record"),
        (written(RECORD, b'{"format": 1}'), ValueError, "laconic.json is not a record"),
        (edited(format=2, laconic="9.1"), ValueError, "format 2, written by laconic 9.1.*pip install --upgrade"),
        (edited(method__name="evitt"), LookupError, "laconic.json: no method is called 'evitt'. Did you mean 'evit'"),
        unchecked(edited(method__name=None), ValueError, "laconic.json: method must be a name"),
        (edited(method__options={"fuze": True}), ValueError, "laconic.json: evit has no option 'fuze'. Did you mean 'fuse'"),
        (edited(method__options=[1]), ValueError, "laconic.json: "),
        unchecked(edited(method__options={"score": "loud"}), ValueError, "laconic.json: evit: score must be one of"),
        (edited(schedule={"at": [1], "keep": [2.0]}), ValueError, "laconic.json: keep rate must be in"),
        (edited(schedule={"at": 1}), ValueError, "laconic.json: schedule must have"),
        (edited(schedule={"at": [7], "keep": [0.5]}), ValueError, "out of range"),
        (edited(model__architecture="vit_gone"), ValueError, "laconic.json: timm .* knows no model 'vit_gone'.*model=your"),
        (edited(model__architecture="hf-hub:user/repo"), ValueError, "knows no model 'hf-hub:user/repo'"),
        (edited(model__args={"checkpoint_path": "x"}), ValueError, "laconic.json: .*checkpoint_path.*not accepted"),
        (edited(model__args={"wings": 1}), ValueError, "laconic.json: timm .* cannot build.*wings"),
        (edited(model__args=3), ValueError, "laconic.json: "),
        (edited(model={"library": "timm"}), ValueError, "laconic.json: 'architecture'"),
        (edited(model={"library": "jax"}), ValueError, "laconic.json does not tell how to build"),
        (edited(model__args__depth=5), ValueError, "(?s)does not fit.*12 missing from the file"),
    ],
)
def test_damaged_directories(damage, error, found, sound, tmp_path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(error, match=found) as caught:
        load(tmp_path)
    assert type(caught.value) is error
    assert "out of range" in found or str(tmp_path) in str(caught.value)


def test_places_that_are_no_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*gone; laconic\.load takes"):
        load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"use laconic\.from_pretrained\('someone/vit-small'\)"):
        load("someone/vit-small")
    file = tmp_path / "weights.pth"
    file.write_bytes(b"x")
    with pytest.raises(NotADirectoryError, match=r"weights\.pth is a file.*import_checkpoint"):
        load(file)
    with pytest.raises(NotADirectoryError, match=r"weights\.pth is a file; laconic\.save takes a directory"):
        save(reduced("evit", "plain"), file)


def test_timm_is_an_extra(sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "laconic\[timm\]"'):
        load(sound)


# ---------------------------------------------------------------------------------------------------- the authors' files
def official(model, prefix=""):
    """The weights of a reduced model, under the names that the authors give them."""
    at = model.laconic.schedule.at
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("laconic."):
            _, _, block, _, rest = name.split(".", 4)
            name = f"score_predictor.{at.index(int(block))}.{rest}"
        weights[prefix + name] = tensor.clone()
    return weights


@pytest.mark.parametrize(
    ("name", "method", "wrapping"),
    [
        ("dynamicvit_deit_tiny_k07_eval", "dynamicvit", "model"),
        ("dtps_deit_tiny_k07_eval", "dtps", "net"),
        ("evit_deit_tiny_k07_fuse", "evit", "args"),
    ],
)
def test_published_files_give_the_published_outputs(name, method, wrapping, tmp_path):
    shapes = json.loads((GOLDENS / f"{name}.json").read_text())["params"]
    weights = {key: torch.from_numpy(golden_param(key, shape)) for key, shape in shapes.items()}
    content, keep = {"model": weights, "epoch": 29, "best": np.float64(0.72)}, 0.7
    if wrapping == "net":
        content = {"net": {f"module.{key}": value for key, value in weights.items()}, "metrics": {"acc1": 72.9}}
    if wrapping == "args":
        args = argparse.Namespace(base_keep_rate=0.7, fuse_token=True, drop_loc="(3, 6, 9)", data_path=None)
        content, keep = {"model": weights, "args": args, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, None
    torch.save(content, tmp_path / "official.pth")
    model = import_checkpoint(tmp_path / "official.pth", method, keep=keep)
    assert type(model).__name__ == "VisionTransformer"
    assert model.pretrained_cfg["architecture"] == "deit_tiny_patch16_224"
    with np.load(GOLDENS / f"{name}.npz") as golden:
        logits = run(model, torch.from_numpy(golden_input()))
        torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), rtol=0, atol=2e-5)
        final = golden["kept_orig_2"]
    kept = laconic.provenance(model).final.kept.numpy()
    n = final.shape[1] - (method == "evit")  # an EViT map says -1 where a packed token was kept
    assert (kept[:, :n] == final[:, :n])[final[:, :n] >= 0].all()


@pytest.mark.parametrize("form", ["dict", "plain", "model", "net", "state_dict", "ddp", "legacy", "safetensors", "ema"])
def test_every_wrapping_is_undone(form, tmp_path):
    source, x = stirred(reduced("dtps", "plain")), images("plain")
    weights, path = official(source, "module." if form == "ddp" else ""), tmp_path / "weights.pth"
    old = {name: torch.zeros_like(value) for name, value in weights.items()}
    content = {
        "ema": {"model": old, "model_ema": weights, "scaler": None},
        "net": {"net": weights, "epoch": np.int64(3)},
        "state_dict": {"state_dict": weights, "best": np.float32(1)},
        "model": {"model": weights, "model_ema": None, "args": argparse.Namespace(lr=1e-3)},
        "legacy": {"model": weights},
    }.get(form, weights)
    if form == "dict":
        path = content
    elif form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    model = import_checkpoint(path, "dtps", model=make("plain").train(), keep=0.6, at=AT, ema=form == "ema")
    assert not model.training
    assert torch.equal(run(model, x), run(source, x))


def test_scalars_of_old_numpy(tmp_path):
    weights = official(reduced("evit", "plain"))
    torch.save({"model": weights, "best": np.float64(0.5)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    assert b"numpy._core.multiarray" in data
    (tmp_path / "a.pth").write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    import_checkpoint(tmp_path / "a.pth", "evit", model=make("plain"), keep=0.6, at=AT)


def test_the_vision_transformer_inside_a_model_is_filled():
    source, whole = stirred(reduced("dtps", "plain")), nn.Sequential(nn.Identity(), make("plain"))
    assert import_checkpoint(official(source), "dtps", model=whole, keep=0.6, at=AT) is whole
    assert torch.equal(run(whole, images("plain")), run(source, images("plain")))


@pytest.mark.parametrize(
    ("args", "given", "keep", "at", "fuse"),
    [
        ({"base_keep_rate": 0.6, "fuse_token": False, "drop_loc": "(1, 3)"}, {}, 0.6, (1, 3), False),
        ({"base_keep_rate": 0.6, "fuse_token": True, "drop_loc": (1, 2)}, {"fuse": False}, 0.6, (1, 2), False),
        ({"base_keep_rate": 0.6, "fuse_token": False, "drop_loc": [2]}, {"keep": 0.8, "at": [1]}, 0.8, (1,), False),
        ({"base_keep_rate": 0.6, "fuse_token": False}, {"at": [3], "fuse": True}, 0.6, (3,), True),
        ({"base_keep_rate": 0.6, "drop_loc": "(2)"}, {}, 0.6, (2,), True),
        ({"base_keep_rate": 0.6, "fuse_token": False}, {"method": laconic.EViT()}, 0.6, (1, 2, 3), True),
        ({"base_keep_rate": 0.6, "drop_loc": "(2,)"}, {"schedule": {"at": [1], "keep": [0.9]}}, 0.9, (1,), True),
    ],
)
def test_evit_files_say_how_they_were_trained(args, given, keep, at, fuse):
    content = {"model": official(reduced("evit", "plain")), "args": argparse.Namespace(**args)}
    model = import_checkpoint(content, **{"method": "evit", "model": make("plain"), **given})
    assert model.laconic.schedule == laconic.Schedule.rates(keep, at)
    assert model.laconic.config.fuse is fuse


def test_topk_reads_evit_files_and_others_must_be_told():
    content = {"model": official(reduced("evit", "plain")), "args": argparse.Namespace(base_keep_rate=0.6, drop_loc=(1, 3))}
    assert import_checkpoint(content, "topk", model=make("plain")).laconic.schedule == laconic.Schedule.rates(0.6, (1, 3))
    with pytest.raises(ValueError, match="say how many tokens to keep"):
        import_checkpoint(content, "etps", model=make("plain"))


@pytest.mark.parametrize("wrong", [{"drop_loc": "3, 6, 9)"}, {"drop_loc": "__import__('os')"}, {"base_keep_rate": [0.7]}])
def test_arguments_that_are_not_evits(wrong):
    content = {"model": official(reduced("evit", "plain")), "args": argparse.Namespace(**wrong)}
    with pytest.raises(ValueError, match="the training arguments in the given dict are not EViT's"):
        import_checkpoint(content, "evit", model=make("plain"), keep=0.6)


def lacks(weights):
    del weights["blocks.2.norm1.bias"]


def has_more(weights):
    weights["aux_head.weight"] = torch.zeros(3, 4)


def is_of_another_shape(weights):
    weights["head.bias"] = torch.zeros(11)


def has_another_stage(weights):
    weights["score_predictor.3.in_conv.0.bias"] = torch.zeros(48)


def has_no_score(weights):
    for name in [name for name in weights if name.startswith("score_predictor")]:
        del weights[name]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lacks, r"1 missing from the file:\n    blocks\.2\.norm1\.bias \[48\]"),
        (has_more, r"1 in the file but not in the model:\n    aux_head\.weight \[3, 4\]"),
        (is_of_another_shape, r"1 of another shape:\n    head\.bias: \[11\] in the file, \[10\] in the model"),
        (has_another_stage, r"score_predictor\.3\.in_conv\.0\.bias \[48\]\n.*more stages than the blocks \[1, 2, 3\]"),
        (has_no_score, r"30 missing from the file:(\n    laconic.*){10}\n    \.\.\. and 20 more\n.*has no learned score"),
    ],
)
def test_whatever_does_not_fit_is_listed_and_nothing_is_loaded(change, found):
    weights, model = official(stirred(reduced("dtps", "plain"))), make("plain").train()
    change(weights)
    before = snapshot(model)
    with pytest.raises(ValueError, match=found) as caught:
        import_checkpoint({"model": weights}, "dtps", model=model, keep=0.6, at=AT)
    assert "the given dict does not fit this VisionTransformer; nothing was loaded" in str(caught.value)
    assert_untouched(model, before, training=True)


def test_a_learned_score_needs_a_method_that_has_one():
    with pytest.raises(ValueError, match=r"30 in the file but not in the model(?s:.*)learned score, and evit does not use one"):
        import_checkpoint(official(reduced("dtps", "plain")), "evit", model=make("plain"), keep=0.6, at=AT)


def test_an_lvvit_file_is_told_apart():
    weights = {f"patch_embed.conv{i}.weight": torch.zeros(64, 64, 3, 3) for i in (1, 2, 3)}
    weights |= {"patch_embed.proj.weight": torch.zeros(192, 64, 8, 8), "cls_token": torch.zeros(1, 1, 192)}
    weights |= {"pos_embed": torch.zeros(1, 197, 192), "aux_head.weight": torch.zeros(1000, 192)}
    with pytest.raises(
        ValueError, match=r"(?s)does not fit.*in the file but not in the model.*patch_embed\.conv1\.weight"
    ) as e:
        import_checkpoint({"model": weights}, "topk", keep=0.7)
    assert r"patch_embed.proj.weight: [192, 64, 8, 8] in the file, [192, 3, 16, 16] in the model" in str(e.value)
    assert "pass it as model=" in str(e.value)


@pytest.mark.parametrize(("name", "tokens"), [("deit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)])
def test_the_deit_is_built_from_the_shapes(name, tokens):
    source = timm.create_model(name, img_size=64, num_classes=7).eval()
    model = import_checkpoint({"model": source.state_dict()}, "topk", keep=1.0)
    assert (model.pretrained_cfg["architecture"], model.num_classes, model.num_prefix_tokens) == (name, 7, tokens)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(run(model, x), run(source, x))


@pytest.mark.parametrize("shape", [None, (1, 197, 48), (1, 198, 192), (197, 192), (1, 1, 192)])
def test_other_shapes_need_a_model(shape):
    weights = {"cls_token": torch.zeros(1, 1, 192)} | ({} if shape is None else {"pos_embed": torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"not of a DeiT-T, -S or -B .*pass it as model="):
        import_checkpoint(weights, "topk", keep=0.7)


@pytest.mark.parametrize(
    ("content", "ema", "found"),
    [
        ([1, 2], False, "holds a list; expected a dict of weights"),
        ({}, False, "has no weights under model, net, state_dict; it has nothing"),
        ({"model": {}}, False, "has no weights"),
        ({"model_ema": {"a": torch.zeros(1)}, "epoch": 3}, False, "it has model_ema, epoch.*change ema="),
        ({"model": {"a": torch.zeros(1)}}, True, "no averaged weights under model_ema, state_dict_ema; it has model"),
        ({"model": {"a": 3.0}}, False, "has no weights"),
    ],
)
def test_files_without_weights(content, ema, found, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth (holds|has)") as caught:
        import_checkpoint(tmp_path / "a.pth", "topk", keep=0.7, ema=ema)
    assert caught.match(found)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))])
def test_no_code_is_run_from_a_file(name, dump, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dump({"model": official(reduced("evit", "plain")), "extra": Evil()}, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds (objects of|a pickle).*could run any code.*torch\.as_tensor"):
        import_checkpoint(tmp_path / name, "topk", keep=0.7)
    assert not Path("evil").exists()


def test_megengine_files_say_how_to_convert(tmp_path):
    (tmp_path / "tps.pkl").write_bytes(pickle.dumps({"state_dict": {"cls_token": np.zeros((1, 1, 192))}}))
    with pytest.raises(ValueError, match=r"tps\.pkl holds .*open it where its library is installed"):
        import_checkpoint(tmp_path / "tps.pkl", "dtps", keep=0.7)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_files_cut_short(share, zipped, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": official(reduced("evit", "plain"))}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"a\.pth is damaged, cut short or not a checkpoint .*download it again"):
        import_checkpoint(path, "topk", keep=0.7)


@pytest.mark.parametrize("content", [b"hello", b"<!DOCTYPE html><html>404</html>", bytes(1000), os.urandom(4000)])
def test_files_that_are_no_checkpoints(content, tmp_path):
    for suffix in (".pth", ".safetensors"):
        path = (tmp_path / "a").with_suffix(suffix)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\{suffix} is damaged"):
            import_checkpoint(path, "topk", keep=0.7)


def test_places_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.pth"):
        import_checkpoint(tmp_path / "gone.pth", "topk", keep=0.7)
    with pytest.raises(ValueError, match=r"is a directory.*laconic\.save.*laconic\.load"):
        import_checkpoint(tmp_path, "topk", keep=0.7)


# ---------------------------------------------------------------------------------------------------- the hub
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: huggingface_hub with its calls to the network replaced."""
    library = pytest.importorskip("huggingface_hub")
    seen = SimpleNamespace(root=tmp_path / "hub", calls=[])

    def create_repo(self, repo_id, **kw):
        (seen.root / repo_id).mkdir(parents=True, exist_ok=kw["exist_ok"])
        seen.calls.append(("create", repo_id, self.token, kw["private"]))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **kw):
        for file in Path(folder_path).iterdir():
            (seen.root / repo_id / file.name).write_bytes(file.read_bytes())
        seen.calls.append(("upload", sorted(os.listdir(folder_path)), kw))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(repo_id, **kw):
        seen.calls.append(("download", repo_id, kw))
        return str(seen.root / repo_id)

    monkeypatch.setattr(library.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(library.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(library.HfApi, "file_exists", lambda self, repo, name, **kw: (seen.root / repo / name).exists())
    monkeypatch.setattr(library, "snapshot_download", download)
    return seen


@KINDS
def test_to_the_hub_and_back(method, hub):
    model, x = stirred(reduced(method, "plain")), images("plain")
    assert push_to_hub(model, "me/tiny", token="hf_x", private=True, revision="main") == "https://hub/me/tiny/commit/1"
    assert hub.calls[0] == ("create", "me/tiny", "hf_x", True)
    assert hub.calls[1][1] == ["README.md", RECORD, WEIGHTS]
    assert hub.calls[1][2] == {"revision": "main", "commit_message": "Upload a model reduced with Laconic"}
    again = from_pretrained("me/tiny", revision="v1", cache_dir="here")
    assert hub.calls[2][1] == "me/tiny"
    expected = {"revision": "v1", "token": None, "cache_dir": "here", "allow_patterns": [RECORD, WEIGHTS]}
    assert hub.calls[2][2] == expected
    assert torch.equal(run(again, x), run(model, x))
    fresh = make("plain")
    assert from_pretrained("me/tiny", model=fresh) is fresh


def test_a_card_on_the_hub_is_kept(hub):
    push_to_hub(reduced("evit", "plain"), "me/tiny")
    (hub.root / "me/tiny/README.md").write_text("mine")
    push_to_hub(reduced("dtps", "plain"), "me/tiny")
    assert (hub.root / "me/tiny/README.md").read_text() == "mine"
    assert from_pretrained("me/tiny").laconic.config == laconic.DTPS()


def test_what_cannot_be_saved_is_not_sent(hub):
    with pytest.raises(ValueError, match="not reduced"):
        push_to_hub(make("plain"), "me/tiny")
    with pytest.raises(ValueError, match="is not this model"):
        push_to_hub(reduced("dtps", "respost"), "me/tiny")
    assert hub.calls == []


def test_a_directory_with_a_card(tmp_path, hub):
    library = pytest.importorskip("huggingface_hub")
    save_pretrained(reduced("bat", "plain"), tmp_path / "tiny-bat", repo_id="me/tiny-bat")
    card = library.ModelCard.load(tmp_path / "tiny-bat" / "README.md")
    assert card.data.library_name == "laconic"
    assert card.data.tags == ["token-reduction", "bat", "vit_tiny_patch16_224"]
    assert card.data.pipeline_tag == "image-classification"
    assert "laconic.from_pretrained('me/tiny-bat')" in card.text
    assert "2211.11315" in card.text
    assert "0.6" in card.text
    assert from_pretrained(tmp_path / "tiny-bat").laconic.config == laconic.BAT()
    (tmp_path / "tiny-bat" / "README.md").write_text("mine")
    save_pretrained(reduced("evit", "plain"), tmp_path / "tiny-bat")
    assert (tmp_path / "tiny-bat" / "README.md").read_text() == "mine"
    assert hub.calls == []


def test_a_card_of_other_models(tmp_path):
    library = pytest.importorskip("huggingface_hub")
    headless = reduced("evit", "plain", num_classes=0)
    around = laconic.reduce_(nn.Sequential(make("plain")), "evit", keep=0.6, at=AT)
    for name, model, task in (("a", headless, "image-feature-extraction"), ("b", around, None)):
        save_pretrained(model, tmp_path / name)
        card = library.ModelCard.load(tmp_path / name / "README.md")
        assert card.data.pipeline_tag == task
        assert f"laconic.from_pretrained('{name}')" in card.text


def test_the_hub_is_an_extra(sound, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert from_pretrained(sound).laconic.config == laconic.EViT()  # a directory needs no hub
    for call in (
        lambda: from_pretrained("me/tiny"),
        lambda: push_to_hub(reduced("evit", "plain"), "me/tiny"),
        lambda: save_pretrained(reduced("evit", "plain"), tmp_path / "b"),
    ):
        with pytest.raises(ImportError, match=r'needs huggingface_hub.*pip install "laconic\[hub\]"'):
            call()
    assert not (tmp_path / "b").exists()
