"""Wrong arguments are refused by name, and the model stays as it was; unusual ones become plain Python values."""

import dataclasses
import json
import types
import typing
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch

import laconic
from families import make
from laconic.checkpoints.saved_files import RECORD
from laconic.core.arguments import check_example
from laconic.core.method import METHODS
from laconic.core.schedule import Schedule
from laconic.core.values import plain, shown
from laconic.training import recipe
from test_errors import refused

pytestmark = pytest.mark.unchecked  # bad arguments on purpose

NAN, INF = float("nan"), float("inf")
IMAGES = torch.randn(2, 3, 96, 96)


def nested(depth):
    tree = []
    for _ in range(depth):
        tree = [tree]
    return tree


# ------------------------------------------------------------------------------------------------ reduce_
@pytest.mark.parametrize(
    "keep", ["0.7", b"0.7", True, np.bool_(True), NAN, INF, -0.5, np.float32(1.5), {0.7}, {1: 0.7}, lambda: 0.7, nested(3000)]
)
def test_keep_is_a_rate(keep):
    refused(make("plain"), ValueError, r"keep rate must be in \(0, 1\]", keep=keep)
    refused(make("plain"), ValueError, r"keep rate must be in \(0, 1\]", keep=[0.9, keep], at=[1, 2])


def test_keep_is_no_tensor_of_several_and_learns_nothing():
    refused(make("plain"), ValueError, r"keep rate .*tolist", keep=torch.full((3,), 0.7))
    refused(make("plain"), ValueError, r"keep rate .*learns nothing", keep=torch.tensor(0.7, requires_grad=True))
    refused(make("plain"), ValueError, r"keep rate", keep=torch.tensor(0.7, device="meta"))
    refused(make("plain"), ValueError, r"keep rate", keep=np.full((1, 3), 0.7))


ONE_RATE = [np.float32(0.7), np.float64(0.7), np.float16(0.7), np.array(0.7), torch.tensor(0.7), torch.tensor(0.7).bfloat16()]


@pytest.mark.parametrize(
    "keep", [*ONE_RATE, Fraction(7, 10), np.full(3, 0.7), np.full(3, 0.7, "float32"), (0.7,) * 3, ONE_RATE[:3]]
)
def test_rates_of_numpy_and_torch(keep, tmp_path):
    model = laconic.reduce_(make("plain"), "topk", keep=keep)
    assert model.laconic.schedule.values == (0.7, 0.7, 0.7)
    assert {type(value) for value in model.laconic.schedule.values} == {float}
    laconic.save(model, tmp_path)
    assert laconic.load(tmp_path).laconic.schedule == Schedule.rates(0.7, [1, 2, 3])


def test_plain_values():
    assert (type(plain(np.int8(3))), type(plain(np.bool_(True))), type(plain(np.str_("a")))) == (int, bool, str)
    assert plain(np.float32(0.1)) == 0.1
    assert plain(np.float32(1 / 3)) == pytest.approx(1 / 3, rel=1e-7)
    assert np.float32(plain(np.float32(1 / 3))) == np.float32(1 / 3)
    assert plain(torch.tensor(2**40)) == 2**40
    assert plain(np.float64(1 / 3)) == 1 / 3
    assert np.isnan(plain(np.float32(NAN)))
    several = np.ones(2)
    assert plain(several) is several
    assert len(shown(list(range(10**5)))) < 200
    assert "\n" not in shown(torch.zeros(50, 50))
    assert len(shown(10**5000)) < 100


@pytest.mark.parametrize(
    ("at", "error", "match"),
    [
        (3, TypeError, r"at must be a sequence of block numbers, e.g. at=\[3\]"),
        (np.int64(3), TypeError, r"e.g. at=\[3\]"),
        ("3", TypeError, "at must be a sequence"),
        (b"\1\2", TypeError, "at must be a sequence"),
        ({1, 2}, TypeError, "at must be a sequence"),
        ({1: 2}, TypeError, "at must be a sequence"),
        ((i for i in (1, 2)), TypeError, "at must be a sequence"),
        (torch.tensor([1, 2]), TypeError, "at must be a sequence.*tolist"),
        (np.ones((1, 2), int), TypeError, "at must be a sequence"),
        ([1.0, 2.0], ValueError, r"at=\[1.0, 2.0\] must be zero-based block numbers"),
        (["1"], ValueError, "zero-based block numbers"),
        ([True, 2], ValueError, "zero-based block numbers"),
        ([[1], [2]], ValueError, "zero-based block numbers"),
        ([NAN], ValueError, "zero-based block numbers"),
        (np.array([-1, 2]), ValueError, "zero-based block numbers"),
        (np.array([1, 1]), ValueError, "repeats a block"),
        ((2, 1), ValueError, "rising order"),
        (np.array([], int), ValueError, "no blocks"),
        (np.array([1, 9]), ValueError, "out of range"),
    ],
)
def test_blocks(at, error, match):
    refused(make("plain"), error, match, at=at)
    if "range" not in match and not isinstance(at, types.GeneratorType):
        with pytest.raises(error, match=match):
            laconic.plan(make("plain"), "evovit", "1.1x-macs", at=at)
        with pytest.raises(error, match=match):
            Schedule.adaptive(at)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("at", [np.array([1, 3]), [np.int32(1), np.int64(3)], range(1, 4, 2), (1, torch.tensor(3))])
def test_blocks_of_numpy(method, at):
    config = METHODS[method].config()
    if config.before_blocks:
        refused(make("plain"), ValueError, "block 0 only", method, keep=0.5 if config.accepts_keep else None, at=at)
        return
    if method == "diffrate":
        config = dataclasses.replace(config, pruned=0.25)
    model = laconic.reduce_(make("plain"), config, keep=0.5 if config.accepts_keep else None, at=at)
    assert model.laconic.schedule.at == (1, 3)
    assert {type(block) for block in model.laconic.schedule.at} == {int}


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        (2.3e9, 'write "2.3G"'),
        (np.float64(2.3e9), 'write "2.3G"'),
        (230_000_000, 'write "230M"'),
        (1.6, "1.6x"),
        (True, "a budget is text"),
        (NAN, "a budget is text"),
        (10**400, "a budget is text"),
        (["2.3G"], "a budget is text"),
    ],
)
def test_a_budget_has_a_unit(budget, match):
    for method in ("topk", "bat"):
        refused(make("plain"), TypeError, match, method, budget=budget, keep=None)
    with pytest.raises(TypeError, match=match):
        laconic.plan(make("plain"), "topk", budget)


@pytest.mark.parametrize("value", ["no", "yes", "", 1, 0, 1.0, ["zeros"], {}, np.array([True, False]), torch.ones(2)])
def test_restore_and_compute_are_choices(value):
    refused(make("plain"), ValueError, "restore must be True, False, None or one of", restore=value)
    refused(make("plain"), ValueError, "compute must be 'needed', 'all' or None", rows=value)
    refused(make("plain"), ValueError, "compute must be", rows=True)


def test_restore_by_a_bool_of_numpy():
    assert laconic.reduce_(make("plain"), "topk", keep=0.5, restore=np.bool_(True)).laconic.restore is True


@pytest.mark.parametrize(
    ("example", "match"),
    [
        (IMAGES[:0], "at least one image"),
        (IMAGES[:, :, :0], "at least one image"),
        (IMAGES * NAN, "NaN or infinite"),
        (IMAGES.index_fill(0, torch.tensor(1), INF), "NaN or infinite"),
        (IMAGES[0], "must be an image batch"),
        (IMAGES[None], "must be an image batch"),
        (IMAGES.numpy(), "must be an image batch.*ndarray"),
        ([IMAGES], "must be an image batch"),
        (IMAGES.to(torch.uint8), "must hold floats.*uint8"),
        (IMAGES.bool(), "must hold floats"),
        (IMAGES.to(torch.complex64), "must hold floats"),
        (IMAGES.to("meta"), "meta device"),
    ],
)
def test_an_example_is_images(example, match):
    refused(make("plain"), ValueError, f"example {match}|example has {match}|example.*{match}", example=example)


def test_an_example_of_other_channels():
    with pytest.raises(ValueError, match="example has 1 channels, but the model takes 3"):
        check_example(IMAGES[:, :1], 3)
    check_example(IMAGES.half(), 3)
    check_example(None, 3)


# ------------------------------------------------------------------------------------------------ schedules
@pytest.mark.parametrize(
    ("schedule", "error", "match"),
    [
        ({"at": [1], "keep": 0.5}, TypeError, "keep must be a list"),
        ({"at": [1], "keep_counts": 5}, TypeError, "keep_counts must be a list"),
        ({"at": [1], "keep_counts": "5"}, TypeError, "keep_counts must be a list"),
        ({"at": 1, "keep": [0.5]}, TypeError, "at must be a sequence"),
        ({"at": [1], 2: [0.5]}, ValueError, "must have 'at'"),
        ({1: 0.5}, ValueError, "must have 'at'"),
        ({"at": [1], "keep": [0.5, 0.5]}, ValueError, "2 values for 1 blocks"),
        ({"at": [1], "keep": ["0.5"]}, ValueError, "keep rate must be"),
        ({"at": [1], "keep": nested(3000)}, ValueError, "keep rate must be"),
        ({"at": nested(3000), "keep": [0.5]}, ValueError, "zero-based block numbers"),
        ({"at": [1], "keep_counts": [True]}, ValueError, "keep_counts must be whole numbers"),
        ({"at": [1], "keep_counts": [10.0]}, ValueError, "keep_counts must be whole numbers"),
        ({"at": [1], "keep_counts": [0]}, ValueError, "keep_counts must be whole numbers"),
        ({"at": [1], "remove_counts": [-1]}, ValueError, "remove_counts must be whole numbers"),
        ({"at": [1], "remove_counts": ["4"]}, ValueError, "remove_counts must be whole numbers"),
        ({"at": [1], "adaptive": [0.5]}, ValueError, "value must be 1"),
        ({"at": [1], "adaptive": ["1"]}, ValueError, "value must be 1"),
        ('{"at": [1], "keep": [0.5]}', TypeError, "schedule must be"),
        ({"at": [1, 2], "keep_counts": [10, 20]}, ValueError, "block 2 is to keep 20 tokens, but block 1 keeps only 10"),
        ({"at": [0, 1, 3], "keep_counts": [10, 99, 11]}, ValueError, "block 3 is to keep 11 .*block 0 keeps only 10"),
    ],
)
def test_schedules(schedule, error, match):
    refused(make("plain"), error, match, keep=None, schedule=schedule)


@pytest.mark.parametrize("counts", [[1, 2], 5, "12", {1, 2}, None])
def test_counts_are_a_mapping(counts):
    for made in (Schedule.keep_counts, Schedule.remove_counts):
        with pytest.raises(TypeError, match=f"Schedule.{made.__name__} takes a mapping from block to count"):
            made(counts)


def test_counts_of_numpy():
    schedule = Schedule.keep_counts({np.int64(1): np.int32(10), np.int64(2): np.int32(10)})
    assert schedule == Schedule.keep_counts({1: 10, 2: 10})
    assert json.loads(json.dumps(schedule.to_json())) == {"at": [1, 2], "keep_counts": [10, 10]}
    assert Schedule.of({"at": np.array([1]), "remove_counts": np.array([3])}) == Schedule.remove_counts({1: 3})
    assert Schedule([1], [0.5]) == Schedule((1,), (0.5,))
    assert laconic.reduce_(make("plain"), "topk", schedule=schedule).laconic.counts() == (36, 10, 10, 10)


def test_counts_may_rise_from_stage_to_stage_and_above_what_there_is():
    Schedule.keep_counts({1: 10, 3: 20, 4: 20}).check_falling([(2, 100), (4, 25)])
    Schedule.keep_counts({1: 10, 3: 101}).check_falling([(4, 100)])
    with pytest.raises(ValueError, match="block 4 is to keep 21 tokens, but block 3 keeps only 20"):
        Schedule.keep_counts({1: 10, 3: 20, 4: 21}).check_falling([(2, 100), (4, 25)])
    Schedule.remove_counts({1: 10, 2: 20}).check_falling([(4, 100)])
    published = laconic.DiffRate(merge_kept=(37, 18, 25, 20))  # passed over where they rise; so it can be saved and loaded
    schedule = laconic.reduce_(make("plain"), published).laconic.schedule
    assert laconic.reduce_(make("plain"), published, schedule=schedule).laconic.counts() == (36, 17, 17, 17)


# ------------------------------------------------------------------------------------------------ options of methods
FIELDS = [(row.name, field) for row in laconic.methods().values() for field in dataclasses.fields(row.config)]
FIELD = pytest.mark.parametrize(("method", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
POOL = ["13", "no", b"x", 2.5, True, False, 1, 0, -1, NAN, INF, None, {"a": 1}, {1}, object(), int, 10**400, nested(3000)]
POOL += [("a",), (True,), (NAN,), ([1],), (None,), torch.ones(3), np.array(["a", "b"]), torch.tensor(True), np.bool_(False)]


def hints(method, field):
    hint = typing.get_type_hints(METHODS[method].config)[field.name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def surely_wrong(kinds, value):
    """Whether no method may take this value, by a reading of the annotation of its own."""
    if value is None:
        return types.NoneType not in kinds
    if isinstance(value, bool | np.bool_) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool):
        return bool not in kinds
    if type(value) is int:
        if abs(value) > 2**64:  # no float
            return int not in kinds
        return int in kinds or float not in kinds if value < 0 else int not in kinds and float not in kinds
    if type(value) is float:
        return float not in kinds or not np.isfinite(value)
    return True  # no option takes anything else of the pool


@FIELD
def test_every_option_refuses_what_it_cannot_be(method, field):
    kinds = hints(method, field)
    wrong = [value for value in POOL if surely_wrong(kinds, value)]
    assert len(wrong) > 12
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{method.replace('+', '[+]')}: {field.name} must be"):
            METHODS[method].config(**{field.name: value})
    unlike = typing.get_origin(kinds[0]) is Literal
    error, words = (TypeError, "a budget is text") if field.name == "budget" else (ValueError, f"{field.name} must be")
    refused(make("plain"), error, words, method, **{field.name: [1, "a"] if unlike else "13"})


@FIELD
def test_every_option_takes_scalars_of_numpy_and_torch(method, field):
    config = METHODS[method].config
    usual = field.default
    values = {bool: [np.bool_, torch.tensor], int: [np.int64, np.uint8, torch.tensor, np.array], str: [np.str_]}
    values |= {float: [np.float32, np.float64, torch.tensor, Fraction], tuple: [list, np.array, torch.tensor]}
    for kind in values.get(type(usual), []):
        given = list(map(torch.tensor, usual)) if (type(usual), kind) == (tuple, torch.tensor) else kind(usual)
        found = config(**{field.name: given})
        assert found == config()
        assert type(getattr(found, field.name)) is type(usual)
        assert json.dumps(found.describe()) == json.dumps(config().describe())
        hash(found)


def test_amounts_are_counts_or_shares():
    assert laconic.BAT(clusters=[np.int64(8), np.float32(0.1)]).clusters == (8, 0.1)
    assert type(laconic.KMeans(into=np.int64(3)).into) is int
    for wrong in (-1, -0.5, 1.5, (-1,), (NAN,), np.float64(1.5)):
        with pytest.raises(ValueError, match="clusters must be"):
            laconic.BAT(clusters=wrong)
        with pytest.raises(ValueError, match="into must be"):
            laconic.KMeans(into=wrong)


@pytest.mark.parametrize(
    "r", ["13", 2.5, True, -1, NAN, (4, True), (4, "a"), (4, 2.5, 1, 1), (2.5, 0.5), (-4, 2, 1, 1), (4, 9.0)]
)
def test_tokens_taken_away(r):
    refused(make("plain"), ValueError, "tome: r must be", "tome", r=r, keep=None)


def test_tokens_taken_away_of_numpy():
    for r in ([4, 3, 2, 1], np.array([4, 3, 2, 1]), range(4, 0, -1)):
        assert laconic.ToMe(r=r).r == (4, 3, 2, 1)
    assert laconic.reduce_(make("plain"), "tome", r=np.int64(4)).laconic.schedule == Schedule.remove_counts(
        dict.fromkeys(range(4), 4)
    )
    assert laconic.MCTF(r=[np.int8(2)] * 3).r == (2, 2, 2)


def test_shares_and_temperatures():
    with pytest.raises(ValueError, match="etps: temperature must be .* at least 0.02"):
        laconic.ETPS(temperature=0.01)
    assert laconic.reduce_(make("plain"), "etps", keep=0.5, temperature=0.02)(IMAGES).isfinite().all()
    for switch in (-0.1, 1.1):
        with pytest.raises(ValueError, match="tofu: switch is a share"):
            laconic.ToFu(switch=switch)


def test_any_seed_can_be_drawn_by():
    answers = []
    for seed in (0, 2**31, 123456789012, 10**40):
        model = laconic.reduce_(make("plain"), "random", keep=0.5, seed=seed)
        model(IMAGES)
        answers.append(laconic.provenance(model).final.where)
    assert not torch.equal(answers[1], answers[2])


def test_what_is_missing_or_misspelt():
    refused(make("plain"), ValueError, "tome: say how many.* r=.*keep=0.7", "tome", keep=None)
    refused(make("plain"), ValueError, "mctf: say how many.* r=.*keep=0.7", "mctf", keep=None)
    refused(make("plain"), TypeError, "no option 'keep_rate'.*'keep'", keep_rate=0.7, keep=None)
    refused(make("plain"), TypeError, "no option 'similarty'.*'similarity'", similarty="cosine")
    refused(make("plain"), TypeError, "not the class ETPS", laconic.ETPS)


def test_options_of_other_packages():
    @dataclasses.dataclass(frozen=True)
    class Other(laconic.TopK):
        layer: int = -1
        sizes: list[int] = dataclasses.field(default_factory=list)
        wrap: typing.Callable[[int], int] | None = None
        pair: tuple[int, str] = (1, "a")
        anything: Any = None

    one = Other(layer=np.int64(-1), sizes=(1, np.int8(2)), wrap=abs, pair=[2, "b"], anything={1: [2]})
    assert (one.layer, one.sizes, one.pair) == (-1, [1, 2], (2, "b"))
    for wrong in ({"layer": -2}, {"sizes": ["a"]}, {"wrap": 3}, {"pair": (1, "a", 2)}, {"pair": (1, 2)}, {"score": "none"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Other(**wrong)

    @dataclasses.dataclass(frozen=True)
    class Unreadable(laconic.TopK):
        what: "Unseen" = 1

    assert Unreadable(what="this").what == "this"


# ------------------------------------------------------------------------------------------------ files
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    laconic.save(laconic.reduce_(make("plain"), "random", keep=0.5), directory)
    return directory


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        *(({"format": value}, "format must be a whole number from 1") for value in (True, -1, 0, "1", 1.0, NAN, [1], {})),
        *(({"restore": value}, "restore must be") for value in ("no", 1, 0, [])),
        *(({"compute": value}, "compute must be") for value in ("some", True, ["all"])),
        ({"method": {"name": "random", "options": {"seed": [1]}}}, "random: seed must be a whole number"),
        ({"method": {"name": "random", "options": {"seed": {"a": 1}}}}, "random: seed must be a whole number"),
        ({"method": {"name": "random", "options": {"seed": nested(90)}}}, "random: seed must be a whole number"),
        ({"method": {"name": "random", "options": 3}}, "method must be a name and a table"),
        ({"method": {"name": ["random"], "options": {}}}, "method must be a name and a table"),
        ({"schedule": {"at": [1], "keep": 0.5}}, "keep must be a list"),
        ({"schedule": {"at": [1], "keep": [NAN]}}, "keep rate must be"),
        ({"schedule": {"at": [1e400], "keep": [0.5]}}, "zero-based block numbers"),
        ({"schedule": nested(200)}, "nested"),
        ({"more": nested(200)}, "nested"),
    ],
)
def test_damaged_records(saved, tmp_path, changed, match):
    record = json.loads((saved / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**record, **changed}))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    model = make("plain")
    for given in (None, model):
        with pytest.raises(ValueError, match=rf"laconic\.json.*{match}"):
            laconic.load(tmp_path, model=given)
    assert not hasattr(model, "laconic")


def test_records_and_recipes_nested_too_deep(saved, tmp_path):
    text = (saved / RECORD).read_text()
    (tmp_path / RECORD).write_text(text.replace('"schedule": {', f'"more": {DEEP}, "schedule": {{'))
    with pytest.raises(ValueError, match=r"laconic\.json.*nested"):
        laconic.load(tmp_path)
    for depth in (100_000, 900, 101):
        for name, text in (("a.json", '{"seed": %s}'), ("a.toml", "seed = %s")):
            (tmp_path / name).write_text(text % ("[" * depth + "]" * depth))
            with pytest.raises(ValueError, match=f"recipe .*{name}.*nested"):
                recipe.read(str(tmp_path / name))
        with pytest.raises(ValueError, match="seed must be a whole number"):
            recipe.Recipe().replaced([f"seed={'[' * depth + ']' * depth}"])
        with pytest.raises(ValueError, match="nested"):
            recipe.from_json({"method": {"options": {"a": nested(depth)}}})
    (tmp_path / "a.json").write_text('{"seed": [1]}')
    with pytest.raises(ValueError, match="seed must be a whole number"):
        recipe.read(str(tmp_path / "a.json"))


@pytest.mark.parametrize("seed", [[1], "1", True, None, 1.5, -1])
def test_the_seed_of_a_recipe(seed):
    with pytest.raises(ValueError, match="seed must be"):
        recipe.Recipe(seed=seed)
    with pytest.raises(ValueError, match="seed must be"):
        recipe.from_json({"seed": seed})
