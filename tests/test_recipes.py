"""Recipes: that they are read or refused in plain words, that each runs, and that they say what the papers and logs say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import laconic
from benchmarks.other_rows import ROWS
from benchmarks.paper_costs import ENTRIES, LOGS
from laconic.cli.list import list_
from laconic.cli.train import prepare, train
from laconic.core.files import Refusal
from laconic.training import recipe as recipes
from laconic.training.checks import check
from laconic.training.optimization import LearningRate, make_optimizer
from laconic.training.recipe import Recipe
from laconic.training.run_config import Running

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")
IMAGENET = [name for name in recipes.names() if "_deit_" in name]
TABLES = [name for name in IMAGENET if name.split("_")[0] in ("bat", "dtps", "dynamicvit", "etps", "evit")]  # TPS's and BAT's
OTHERS = [name for name in IMAGENET if name not in TABLES]
SMALL = {"img_size": 96, "embed_dim": 48, "num_heads": 3}
CPU = Running(device="cpu", log_every=1)


def replaced(*settings):
    return Recipe().replaced(settings)


# ---------------------------------------------------------------------------------------------------- reading
def test_settings_replace_keys_and_keep_the_rest():
    changed = replaced("optimization.lr=1e-4", "method.name=evit", "method.keep=[0.7, 0.6]", "model.options.depth=4", "seed=3")
    assert changed.optimization.lr == 1e-4
    assert changed.method.keep == (0.7, 0.6)
    assert changed.model.options == {"depth": 4}
    assert changed.seed == 3
    assert changed.optimization.weight_decay == Recipe().optimization.weight_decay
    assert changed.replaced(["method.keep=none"]).method.keep is None
    assert recipes.from_json(changed.to_json()) == changed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimization.lr", "expected KEY=VALUE"),
        ("optimization.lrr=1", "there is no key optimization.lrr. Did you mean 'lr'"),
        ("optimisation.lr=1", "a recipe has no part 'optimisation'. Did you mean 'optimization'"),
        ("optimizatoin=1", "there is no key optimizatoin. Did you mean 'optimization'"),
        ("optimization=1", "optimization must be a table, not 1"),
        ("optimization.lr=fast", "optimization.lr must be a number, not 'fast'"),
        ("optimization.epochs=1.5", "optimization.epochs must be a whole number, not 1.5"),
        ("optimization.decay_all=1", "optimization.decay_all must be true or false, not 1"),
        ("optimization.betas=[0.9]", "optimization.betas must be an array of 2 numbers"),
        ("optimization.update=steps", "one of 'step', 'epoch', 'epoch-late', not 'steps'"),
        ("method.keep=most", "method.keep must be a number or an array of numbers or none, not 'most'"),
        ("model.options=3", "model.options must be a table"),
        ("optimization.lr=0", "optimization.lr must be positive, not 0"),
        ("optimization.lr=nan", "optimization.lr must be positive, not nan"),
        ("optimization.lr=inf", "optimization.lr must be positive, not inf"),
        ("optimization.epochs=0", "optimization.epochs must be at least 1"),
        ("optimization.batch_size=0", "optimization.batch_size must be at least 1"),
        ("optimization.betas=[0.9, 1.0]", "optimization.betas must be at least 0 and below 1"),
        ("optimization.ema=1.0", "optimization.ema must be at least 0 and below 1"),
        ("optimization.layer_decay=0.0", "optimization.layer_decay must be above 0"),
        ("optimization.weight_decay=-0.1", "optimization.weight_decay must be 0 or more"),
        ("optimization.warmup_epochs=2", "optimization.warmup_epochs must be at most 1, with 1 epochs"),
        ("method.keep=1.5", "method.keep must be above 0 and at most 1, not 1.5"),
        ("method.keep=[0.7, 0]", "method.keep must be above 0"),
        ("method.warm_in_epochs=-1", "method.warm_in_epochs must be 0 or more"),
        ("augmentation.hflip=1.5", "augmentation.hflip must be between 0 and 1, not 1.5"),
        ("augmentation.smoothing=-0.1", "augmentation.smoothing must be between 0 and 1"),
        ("augmentation.repeats=0", "augmentation.repeats must be at least 1"),
        ("augmentation.crop=[0.5, 0.1]", "augmentation.crop must be two shares of the area"),
        ("data.train_images=-1", "data.train_images must be 0 or more"),
        ("data.val_crop=0.0", "data.val_crop must be above 0"),
        ("data.train=", "data.train must be the name of a split"),
        ("loss.ratio=-1", "loss.ratio must be 0 or more"),
        ("seed=-1", "seed must be 0 or more"),
    ],
)
def test_a_wrong_setting_is_named(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replaced(setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method.keep=0.7"], "method.keep is set and method.name is not"),
        (["method.name=evit", "method.warm_in_epochs=1"], "needs method.keep"),
        (["method.name=evit", "method.keep=0.7", "method.warm_in_start=1", "method.warm_in_epochs=1"], "ends after epoch 2"),
        (
            ["method.name=dtps", "method.keep=0.7", "optimization.eval_mode=true"],
            "dtps learns its decisions in training mode only",
        ),
        (["method.name=evit", "method.keep=0.7", "optimization.freeze_backbone_epochs=1"], "evit adds none"),
        (["optimization.backbone_lr_scale=0.1"], "training without a method adds none"),
        (["model.weights=w.safetensors", "model.pretrained=false"], "model.pretrained is false"),
        (["loss.logits=0.5"], "there is no method"),
        (["loss.tokens=0.5", "method.name=evit", "method.keep=0.7", "model.pretrained=false"], "which would be random"),
        (["loss.token_labels=1.0", "augmentation.hflip=0.5"], "augmentation.hflip moves them"),
    ],
)
def test_parts_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(replaced(*settings))


def test_an_unknown_method_or_option_is_refused_before_anything_is_loaded():
    with pytest.raises(LookupError, match="Did you mean 'evit'"):
        check(replaced("method.name=evti", "method.keep=0.7"))
    with pytest.raises(TypeError, match="evit has no option 'fused'"):
        check(replaced("method.name=evit", "method.keep=0.7", "method.options.fused=true"))


def test_a_recipe_from_a_file(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('[method]\nname = "bat"\nkeep = 0.5\noptions = { clusters = [4, 3, 2], pairs = [3, 2, 1] }\n')
    assert recipes.read(str(file)).method.keep == 0.5
    (tmp_path / "recipe.json").write_text(json.dumps(recipes.read(str(file)).to_json()))
    assert recipes.read(str(tmp_path / "recipe.json")) == recipes.read(str(file))
    check(recipes.read(str(file)))  # arrays are tuples to a method


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[method\n", "is not TOML"),
        (b"[methods]\n", "own.toml: there is no key methods. Did you mean 'method'"),
        (b"\xff\xfe", "is not text"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    (tmp_path / "own.toml").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        recipes.read(str(tmp_path / "own.toml"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.toml", "recipe absent.toml cannot be read: No such file"),
        ("bat_deit_small", "Did you mean 'bat_deit_small_keep0.2'"),
        ("dpts_deit_tiny_keep0.7", "Did you mean 'dtps_deit_tiny_keep0.7'"),
    ],
)
def test_no_such_recipe(name, message):
    with pytest.raises(LookupError, match=re.escape(message)):
        recipes.read(name)


# ---------------------------------------------------------------------------------------------------- what they say
def test_there_is_one_for_every_method_and_size():
    rows = {(r.method.name, r.model.name) for r in map(recipes.read, TABLES)}
    sizes = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    assert rows == {(m, size) for m in ("bat", "dtps", "dynamicvit", "etps", "evit") for size in sizes}


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_says_whose_row_it_is(name):
    recipe = recipes.read(name)
    check(recipe)
    found = re.fullmatch(r"(\w+)_(deit_\w+?)_keep(0\.\d)(_scratch|_30epochs)?", name)
    assert (found[1], f"{found[2]}_patch16_224", float(found[3])) == (recipe.method.name, recipe.model.name, recipe.method.keep)
    assert recipe.about.title
    assert "Documented: " in recipe.about.source
    assert recipe.about.paper.startswith(laconic.methods()[recipe.method.name].paper)
    assert recipe.model.pretrained == (recipe.optimization.epochs == 30)
    assert recipe.method.at == (3, 6, 9)


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_of_another_method_says_whose_it_is(name):
    recipe = recipes.read(name)
    check(recipe)
    found = re.fullmatch(r"([\w-]+?)_(deit_\w+?)(?:_(keep|search|r|flops)([\d.]+))?(_scratch)?", name)
    method = recipe.method
    assert (found[1], f"{found[2]}_patch16_224") == (method.name, recipe.model.name)
    said = {"keep": method.keep, "search": recipe.step.options.get("gmacs"), "r": method.options.get("r")}
    assert said.get(found[3], method.options.get("flops")) == (float(found[4]) if found[3] else None)
    assert recipe.model.pretrained == (found[5] is None)
    assert {"Documented: ", "ot documented"} & {
        word for word in ("Documented: ", "ot documented") if word in recipe.about.source
    }
    assert recipe.about.paper.startswith(laconic.methods()[method.name].paper)
    row = laconic.methods()[method.name]
    assert (method.keep is None) == (row.count == "variable" or method.name in ("tokenlearner", "mctf"))
    printed = {float(r.gmacs) for r in ROWS if (r.method, r.model) == (method.name, SIZES[found[2]]) and r.gmacs}
    assert recipe.about.gmacs == (printed or {recipe.about.gmacs}).pop()


SIZES = {"deit_tiny": "DeiT-T", "deit_small": "DeiT-S"}


@pytest.mark.parametrize("name", TABLES)
def test_published_costs_are_those_of_the_table_of_costs(name):
    """docs/macs.md is made of the same entries, and shows that the methods here cost that much."""
    recipe = recipes.read(name)
    size = {"tiny": "DeiT-T", "small": "DeiT-S", "base": "DeiT-B"}[recipe.model.name.split("_")[1]]
    printed = {
        float(entry.printed)
        for entry in ENTRIES
        if (entry.model, entry.keep) == (size, recipe.method.keep) and entry.printed and entry.config == config(recipe)
    }
    logged = recipe.method.options.get("budget") == "log"
    expected = {round(LOGS[recipe.method.keep] / 1e9, 4)} if logged else printed or {None}
    assert {recipe.about.gmacs} == expected


def config(recipe):
    return laconic.methods()[recipe.method.name].config()


SETTINGS = {
    "bat_deit_small_keep0.7_scratch": dict(epochs=300, batch_size=2048, weight_decay=0.05, eval_mode=False, ema=0.99996),
    "bat_deit_small_keep0.5": dict(
        epochs=30, batch_size=1024, weight_decay=1e-6, eval_mode=True, warmup_epochs=0.0, min_lr=2e-6
    ),
    "evit_deit_small_keep0.7_scratch": dict(lr=5e-4, lr_base_size=512, warmup_epochs=5.0, update="epoch-late"),
    "dtps_deit_small_keep0.7": dict(lr=2.5e-4, lr_base_size=0, decay_all=True, warmup_epochs=5.0, backbone_lr_scale=1.0),
    "dynamicvit_deit_small_keep0.7": dict(
        lr=1e-3, backbone_lr_scale=0.01, freeze_backbone_epochs=5, precision="no", ema=0.9999
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_documented_settings(name):
    optimization = recipes.read(name).optimization
    assert {key: getattr(optimization, key) for key in SETTINGS[name]} == SETTINGS[name]


def test_documented_losses():
    losses = {name: recipes.read(name).loss for name in TABLES}
    small, tiny = losses["dtps_deit_small_keep0.7"], losses["dtps_deit_tiny_keep0.7"]
    assert (small.ratio, small.logits, small.tokens, small.token_kind) == (2, 0.5, 0.5, "kl")
    assert (tiny.ratio, tiny.logits, tiny.tokens) == (2, 0, 0)
    dynamic, base = losses["dynamicvit_deit_small_keep0.7"], losses["dynamicvit_deit_base_keep0.7"]
    assert (dynamic.ratio, dynamic.tokens, dynamic.token_kind, base.ratio) == (2, 0.5, "mse", 5)
    assert recipes.read("dynamicvit_deit_base_keep0.7").model.options == {"drop_path_rate": 0.2}
    assert {name: loss.logits for name, loss in losses.items() if name.startswith(("bat", "evit")) and loss.logits} == {}


def test_the_recipes_are_listed():
    report = list_(recipes=True)
    rows = {row["name"]: row for row in report.to_json()["recipes"]}
    assert list(rows) == recipes.names()
    assert rows["bat_deit_small_keep0.7_scratch"]["about"]["top1"] == 79.58
    text = str(report)
    assert all(name in text.split() for name in IMAGENET)
    assert f"Recipes to train by: {len(rows)}" in str(list_())


# ---------------------------------------------------------------------------------------------------- learning rates
class Toy(nn.Module):
    """A backbone and a scorer."""

    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.blocks, self.laconic = nn.Linear(2, 2), nn.Linear(2, 2)


def rates(name, steps=2):
    """For every step of a recipe: the learning rate, that of the scorer and that of the backbone."""
    part = recipes.read(name).optimization
    optimizer = make_optimizer(Toy(), part)
    rate, rows = LearningRate(optimizer, part, steps), []
    for step in range(rate.epochs * steps):
        shown = rate.set(step)
        by_kind = {group["backbone"]: group["lr"] for group in optimizer.param_groups}
        rows.append((shown, by_kind[False], by_kind[True]))
    return rows


def test_the_learning_rates_of_the_log_from_scratch():
    epochs = [row[0] for row in rates("bat_deit_small_keep0.7_scratch")][::2]
    assert len(epochs) == 300
    assert [f"{rate:.2e}" for rate in epochs[:6]] == ["1.00e-06", "1.00e-06", "4.01e-04", "8.01e-04", "1.20e-03", "1.60e-03"]
    assert f"{epochs[10]:.3e}" == "1.996e-03"
    assert f"{epochs[-1]:.0e}" == "1e-05"
    assert epochs == [row[0] for row in rates("evit_deit_small_keep0.7_scratch")][::2]


@pytest.mark.parametrize("keep", [0.2, 0.3, 0.4, 0.5, 0.6])
def test_the_learning_rates_of_the_logs_of_fine_tuning(keep):
    epochs = [row[0] for row in rates(f"bat_deit_small_keep{keep}")][1::2]
    assert len(epochs) == 30
    assert epochs[0] == pytest.approx(4e-5)
    assert f"{epochs[-1]:.0e}" == "2e-06"
    assert epochs == sorted(epochs, reverse=True)


def test_the_learning_rates_of_dynamicvit():
    rows = rates("dynamicvit_deit_small_keep0.7")
    assert rows[0] == (0, 0, 0)
    assert rows[9][1:] == (pytest.approx(9e-4), 0)  # the last step of five epochs
    assert rows[10][1:] == (pytest.approx(1e-3), pytest.approx(1e-5))
    assert all(backbone == pytest.approx(scorer / 100) for _, scorer, backbone in rows[10:])
    assert 1e-6 < rows[-1][0] < 4e-6
    assert len({row[0] for row in rows}) == len(rows)  # every step has its own


def test_the_learning_rates_of_dtps():
    rows = rates("dtps_deit_small_keep0.7")
    assert all(scorer == backbone for _, scorer, backbone in rows)
    assert [f"{row[0]:.3g}" for row in rows[::2][:4]] == ["1e-06", "1e-06", "5.08e-05", "0.000101"]


# ---------------------------------------------------------------------------------------------------- every one runs
def slow_after(names, count):
    """Some of the names, spread over all of them, as ordinary tests, and the others as slow ones."""
    step = max(1, len(names) // count)
    return [pytest.param(name, marks=() if i % step == 0 else pytest.mark.slow) for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A folder as ImageNet is one, but tiny, and weights for a tiny DeiT."""
    root, draw = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for label in ("n01", "n02", "n03"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                picture = draw.integers(0, 255, (60, 72, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / split / label / f"{number}.png")
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224", num_classes=3, **SMALL)
    save_file(model.state_dict(), root / "weights.safetensors")
    return root


def tiny(name, imagenet):
    """What makes a recipe tiny: one step on four images."""
    recipe = recipes.read(name)
    settings = [
        "optimization.batch_size=4",
        "optimization.epochs=1",
        "optimization.warmup_epochs=0",
        "optimization.precision=no",
    ]
    settings += [f"model.options.{key}={value}" for key, value in SMALL.items()]
    if recipe.model.pretrained:
        settings.append(f"model.weights={imagenet / 'weights.safetensors'}")
    if recipe.method.warms_in:
        settings += ["method.warm_in_start=0", "method.warm_in_epochs=0.5"]
    return tuple(settings)


# what a step of the others has beside the cross-entropy
PARTS = {
    "adavit": {"used_tokens", "used_heads", "used_layers"},
    "avit": {"ponder", "distribution"},
    "diffrate": {"gmacs"},
    "evovit": {"class_logits"},
    "iared": {"policy", "reward", "baseline"},
    "ltmp": {"flops"},
    "mctf": {"teacher", "consistency"},
    "spvit": {"ratio", "logits", "tokens"},
}


@pytest.mark.parametrize("name", slow_after(OTHERS, 4))
def test_one_step_of_every_other_recipe(name, imagenet, tmp_path):
    settings = [*tiny(name, imagenet), "data.val=", "augmentation.auto_augment="]
    recipe = recipes.read(name)
    if recipe.step.kind == "policy-gradient":
        settings += ["step.options.interpreter_epochs=0", "step.options.blocks_epochs=0"]
    if recipe.step.kind == "rate-search":
        settings.append("step.options.gmacs=0.01")
    if "second_head" in recipe.method.options:
        settings += ["method.options.second_head=3", "method.later={}"]
    report = train(recipe=name, data=str(imagenet), set=tuple(settings), output=tmp_path, running=CPU)
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    parts = row.keys() - {"step", "epoch", "lr", "loss", "cross_entropy", "gradient_norm"}
    assert parts == PARTS.get(recipe.method.name, set())
    assert report.accuracy is None
    again = laconic.load(tmp_path / "model")
    assert again.laconic.config.info.name == recipe.method.name
    assert again.laconic.schedule.at == (recipe.method.at or again.laconic.schedule.at)
    if laconic.methods()[recipe.method.name].count == "constant":
        assert again.laconic.counts(36) == run_counts(again)


def run_counts(model):
    """Patch tokens that really are there after each block."""
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    return tuple(len(entry) for entry in model.laconic.ledger[1:])


@pytest.mark.parametrize("name", slow_after(TABLES, 6))
def test_one_step_of_every_recipe(name, imagenet, tmp_path):
    report = train(recipe=name, data=str(imagenet), set=tiny(name, imagenet), output=tmp_path, running=CPU)
    row, *validated = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    recipe = report.recipe
    learns = laconic.methods()[recipe.method.name].learns
    wanted = {"ratio": learns, "logits": recipe.loss.logits > 0, "tokens": recipe.loss.tokens > 0}
    assert {part for part, there in wanted.items() if there} == row.keys() - {"step", "epoch", "lr", "loss", "cross_entropy"}
    parts = row["cross_entropy"] + sum(getattr(recipe.loss, part) * row[part] for part, there in wanted.items() if there)
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert len(validated) == 2  # the model and its moving average
    assert report.steps == 1
    assert report.macs < report.base_macs
    assert report.accuracy.images == 3
    again = laconic.load(tmp_path / "model")
    assert again.laconic.config.info.name == recipe.method.name
    assert set(again.laconic.schedule.values) == {recipe.method.keep}


def test_a_recipe_without_its_data_or_weights_is_refused(tmp_path, imagenet):
    recipe = recipes.read("dtps_deit_small_keep0.7")
    with pytest.raises(Refusal, match="--data: this recipe trains on a folder of images"):
        prepare(recipe, "", tmp_path, CPU)
    with pytest.raises(
        Refusal, match="the recipe starts from pretrained weights of deit_small_patch16_224, but weights are RANDOM"
    ):
        prepare(recipe, str(imagenet), tmp_path, CPU)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_needs_a_gpu(tmp_path, imagenet):
    name = "evit_deit_tiny_keep0.7"
    settings = (*(setting for setting in tiny(name, imagenet) if "precision" not in setting),)
    with pytest.raises(Refusal, match=r"fp16 needs a GPU.*set optimization.precision=bf16"):
        train(recipe=name, data=str(imagenet), set=settings, output=tmp_path, running=CPU)
    assert not Path(tmp_path, "recipe.json").exists()
