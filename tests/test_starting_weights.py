"""Fine-tuning from weights of other classes, another input size, Lightning, and directories that laconic wrote."""

import sys
import types

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import laconic
from laconic.cli.eval import eval_
from laconic.cli.eval_input import Reading, open_eval_input
from laconic.cli.train import prepare, train
from laconic.core.files import Refusal
from laconic.training.recipe import Recipe
from laconic.training.run_config import Running

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")

NAME = "vit_tiny_patch16_224"
SHAPE = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3}
BASE = (
    f"model.name={NAME}",
    *(f"model.options.{key}={value}" for key, value in SHAPE.items()),
    "data.train_images=16",
    "data.val_images=8",
    "optimization.batch_size=8",
    "optimization.epochs=1",
)
DTPS = ("method.name=dtps", "method.keep=0.6", "method.at=[1, 2]")


def made(name=NAME, seed=5, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SHAPE, **options})


def start(tmp_path, *settings, base=BASE):
    """The model that a run would train first, and the line on its weights."""
    run, line = prepare(Recipe().replaced((*base, *settings)), "", tmp_path / "run", Running(device="cpu"))
    return run.model, line


def without_head(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def go(output, *settings):
    return train(set=(*BASE, *settings), output=output, running=Running(device="cpu"))


# ---------------------------------------------------------------------------------------------------- other classes, other sizes
@pytest.mark.parametrize("classes", [1000, 0])
def test_a_file_of_other_classes_gets_a_new_head(tmp_path, classes):
    there = made(num_classes=classes)
    torch.save({"model": there.state_dict()}, tmp_path / "w.pth")
    model, line = start(tmp_path, f"model.weights={tmp_path / 'w.pth'}")
    assert same(without_head(model), without_head(there))
    assert model.head.weight.shape == (24, 48)
    assert 0.01 < float(model.head.weight.detach().std()) < 0.03  # as timm begins a head, not as torch does
    assert f"a new head for 24 classes (the file has {classes or 'none'})" in line


def test_the_head_stays_where_it_fits(tmp_path):
    save_file(made(num_classes=24).state_dict(), tmp_path / "w.safetensors")
    model, line = start(tmp_path, f"model.weights={tmp_path / 'w.safetensors'}")
    assert torch.equal(model.head.weight, load_file(tmp_path / "w.safetensors")["head.weight"])
    assert "with its head for 24 classes" in line


@pytest.mark.parametrize(
    ("name", "options", "changed"),
    [
        (NAME, SHAPE, "pos_embed resized from [1, 65, 48] to [1, 26, 48]"),
        ("deit3_small_patch16_224", SHAPE, "pos_embed resized from [1, 64, 48] to [1, 25, 48]"),
        ("deit_tiny_distilled_patch16_224", SHAPE, "pos_embed resized from [1, 66, 48] to [1, 27, 48]"),
        ("beit_base_patch16_224", SHAPE, "blocks.0.attn.relative_position_bias_table resized from [228, 3] to [84, 3]"),
    ],
)
@pytest.mark.parametrize("classes", [24, 10])
@pytest.mark.filterwarnings("ignore:Using a non-tuple", "ignore:torch.searchsorted")  # of timm, for beit
def test_another_input_size_is_taken_as_timm_takes_it(tmp_path, name, options, changed, classes):
    torch.manual_seed(1)
    there = timm.create_model(name, **{**options, "img_size": 64, "num_classes": classes})
    torch.save(there.state_dict(), tmp_path / "w.pth")
    base = (f"model.name={name}", *BASE[1:])
    model, line = start(tmp_path, f"model.weights={tmp_path / 'w.pth'}", base=base)
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": classes, "custom_load": False}
    theirs = timm.create_model(name, pretrained=True, num_classes=24, pretrained_cfg_overlay=overlay, **options)
    assert same(without_head_of(model), without_head_of(theirs))
    assert changed in line
    if classes == 24:
        assert torch.equal(model.head.weight, there.head.weight)


def without_head_of(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head")}


def test_a_file_is_taken_as_timms_users_give_it(tmp_path):
    there = made(num_classes=1000)
    torch.save(there.state_dict(), tmp_path / "w.pth")
    overlay = f'{{file="{tmp_path / "w.pth"}", num_classes=1000, mean=[0.1, 0.2, 0.3]}}'
    model, line = start(tmp_path, f"model.options.pretrained_cfg_overlay={overlay}")
    assert same(without_head(model), without_head(there))
    assert f"come from {tmp_path / 'w.pth'}" in line
    assert list(model.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    with pytest.raises(Refusal, match="leave one out"):
        start(tmp_path, f"model.options.pretrained_cfg_overlay={overlay}", "model.weights=other.pth")
    with pytest.raises(Refusal, match=r"model\.pretrained=false"):
        start(tmp_path, f"model.options.pretrained_cfg_overlay={overlay}", "model.pretrained=false")


def test_a_run_from_such_a_file_is_saved_as_one_that_opens(tmp_path):
    torch.save(made(num_classes=7, img_size=64, mlp_ratio=2.0).state_dict(), tmp_path / "w.pth")
    overlay = f'model.options.pretrained_cfg_overlay={{file="{tmp_path / "w.pth"}"}}'
    report = go(tmp_path / "run", overlay, "model.options.mlp_ratio=2.0", "method.name=evit", "method.keep=0.6")
    assert "a new head for 24 classes (the file has 7)" in report.weights
    assert laconic.load(tmp_path / "run" / "model").num_classes == 24


# ---------------------------------------------------------------------------------------------------- Lightning and wrappers
@pytest.fixture
def lightning(monkeypatch):
    """The class of Lightning that is pickled with hyper-parameters, without Lightning."""

    class AttributeDict(dict):
        pass

    module = types.ModuleType("lightning.fabric.utilities.data")
    AttributeDict.__module__, AttributeDict.__qualname__ = module.__name__, "AttributeDict"
    module.AttributeDict = AttributeDict
    for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return lambda **values: AttributeDict(values)


@pytest.mark.parametrize("prefix", ["model.", "net._orig_mod.", "module."])
def test_a_file_of_lightning(tmp_path, lightning, prefix):
    there = made(num_classes=10)
    state = {f"{prefix}{key}": value for key, value in there.state_dict().items()}
    state |= {"criterion.weight": torch.ones(10)} if prefix == "model." else {}
    content = {"epoch": 3, "pytorch-lightning_version": "2.4.0", "state_dict": state, "hyper_parameters": lightning(lr=1e-3)}
    torch.save(content | {"callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}}}, tmp_path / "last.ckpt")
    model, line = start(tmp_path, f"model.weights={tmp_path / 'last.ckpt'}")
    assert same(without_head(model), without_head(there))
    assert "a new head for 24 classes (the file has 10)" in line
    assert ("1 tensors outside 'model.' are left out (criterion.weight)" in line) == (prefix == "model.")


@pytest.mark.parametrize("prefix", ["model.", "net._orig_mod."])
def test_eval_takes_a_file_of_lightning_too(tmp_path, lightning, prefix):
    there = made(num_classes=24)
    state = {f"{prefix}{key}": value for key, value in there.state_dict().items()} | {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": state, "hyper_parameters": lightning(lr=1e-3)}, tmp_path / "last.ckpt")
    torch.save(there.state_dict(), tmp_path / "plain.pth")
    args = tuple(f"{key}={value}" for key, value in SHAPE.items())
    reports = [
        eval_(NAME, data="scenes", reading=Reading(limit=24, workers=0), weights=tmp_path / file, model_args=args)
        for file in ("last.ckpt", "plain.pth")
    ]
    assert reports[0].rows[0].loss == reports[1].rows[0].loss
    assert f"1 tensors outside {prefix!r} are left out (criterion.weight)" in reports[0].weights
    with pytest.raises(Refusal, match=r"last\.ckpt does not hold the weights of .* with 24 classes: .*--model-args"):
        eval_(NAME, data="scenes", weights=tmp_path / "last.ckpt", model_args=(*args, "num_classes=10"))


def test_eval_leaves_out_what_a_method_has_learned(tmp_path):
    model = laconic.reduce_(made(num_classes=24), "dtps", keep=0.5, at=[1])
    laconic.save(model, tmp_path)
    args = tuple(f"{key}={value}" for key, value in SHAPE.items())
    opened = open_eval_input(NAME, "scenes", Reading(limit=8), tmp_path / "model.safetensors", args)
    assert same(opened.base.state_dict(), made(num_classes=24).state_dict())
    assert "what a method had learned there" in opened.weights


def test_of_two_copies_the_line_says_which(tmp_path):
    state = {}
    for prefix, seed in (("model.", 1), ("ema_model.", 2)):
        state |= {f"{prefix}{key}": value for key, value in made(seed=seed, num_classes=24).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    model, line = start(tmp_path, f"model.weights={tmp_path / 'w.ckpt'}")
    assert same(model.state_dict(), made(seed=1, num_classes=24).state_dict())
    assert "of the copies under 'model.' and 'ema_model.', the one under 'model.'" in line


# ---------------------------------------------------------------------------------------------------- directories of laconic
def test_a_second_stage_from_a_plain_run(tmp_path):
    go(tmp_path / "first", "model.pretrained=false")
    for place in ("model", "model/model.safetensors"):
        model, line = start(tmp_path, f"model.weights={tmp_path / 'first' / place}", "method.name=bat", "method.keep=0.6")
        held = load_file(tmp_path / "first" / "model" / "model.safetensors")
        assert same({key: value for key, value in model.state_dict().items() if not key.startswith("laconic.")}, held)
        assert "with its head for 24 classes" in line
    with pytest.raises(Refusal, match="is a directory without weights; give .*first/model"):
        start(tmp_path, f"model.weights={tmp_path / 'first'}")


@pytest.mark.parametrize("place", ["model", "model/model.safetensors"])
def test_a_second_stage_takes_over_the_scorers(tmp_path, place):
    go(tmp_path / "first", "model.pretrained=false", *DTPS)
    held = load_file(tmp_path / "first" / "model" / "model.safetensors")
    weights = f"model.weights={tmp_path / 'first' / place}"
    model, line = start(tmp_path, weights, "method.name=dtps", "method.keep=0.4", "method.at=[1, 2]")
    assert same(model.state_dict(), held)
    assert "what dtps had learned there is taken over" in line
    _, line = start(tmp_path, weights, "method.name=dtps", "method.keep=0.4", "method.at=[0, 2]")
    assert "left out (they are of other blocks or options): those of dtps start untrained" in line
    _, line = start(tmp_path, weights, "method.name=dynamicvit", "method.keep=0.4", "method.at=[1, 2]")
    assert "left out (they are of dtps): those of dynamicvit start untrained" in line
    _, line = start(tmp_path, weights, "method.name=evit", "method.keep=0.4")
    assert "what dtps had learned there" in line
    assert "is left out" in line


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.weights=none.pth",), "there is no such file"),
        (("model.weights={w}", "model.options.depth=2"), r"does not hold the weights of .*depth=2.*blocks\.2"),
        (("model.weights={w}", "model.options.depth=4"), r"does not hold the weights of .*blocks\.3"),
        (("model.weights={w}", "model.options.embed_dim=96"), "does not hold the weights of"),
        (("model.weights={text}",), "does not hold the weights of"),
        (("model.weights={none}",), "has no weights under state_dict_ema"),
        (("model.weights={saved}", "model.name=deit3_small_patch16_224"), f"set model.name={NAME}"),
    ],
)
def test_weights_that_are_not_of_the_model(tmp_path, settings, message):
    torch.save(made(num_classes=24).state_dict(), tmp_path / "w.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    laconic.save(laconic.reduce_(made(num_classes=24).eval(), "evit", keep=0.6), tmp_path / "saved")
    places = {
        name: tmp_path / file for name, file in (("w", "w.pth"), ("none", "none.pth"), ("text", "text.pth"), ("saved", "saved"))
    }
    with pytest.raises(Refusal, match=message):
        start(tmp_path, *(text.format(**places) for text in settings))
