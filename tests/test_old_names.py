"""Names of version 0.1 still work, with a warning that says what they are now."""

import importlib
import pickle

import pytest
import torch

import laconic
from families import images, make
from laconic import _moved
from laconic.core.tokens import OLD_NAMES, Tokens

pytestmark = pytest.mark.filterwarnings("default:.* is now :DeprecationWarning")


@pytest.mark.parametrize("old", sorted(set(_moved.MODULES) - {"cli"}))
def test_modules(old):
    new = importlib.import_module(f"laconic.{_moved.MODULES[old]}")
    with pytest.warns(DeprecationWarning, match=f"laconic.{old} is now laconic.{_moved.MODULES[old]}"):
        module = _moved.OldNames().create_module(importlib.machinery.ModuleSpec(f"laconic.{old}", None))
    names = [name for name, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
    for name in names:
        assert getattr(module, name) is getattr(new, name)


@pytest.mark.parametrize(("package", "names"), _moved.NAMES.items())
def test_classes_and_functions(package, names):
    for new in names.values():
        assert hasattr(importlib.import_module(f"laconic.{package}"), new)


def test_old_imports():
    from laconic.hosts import Halves, register_block  # noqa: F401
    from laconic.hosts.timm import _example  # noqa: F401
    from laconic.parts.matching import split
    from laconic.reducer import Method, Site
    from laconic.tokens import Tokens as OldTokens

    assert OldTokens is laconic.Tokens
    assert Site is laconic.BlockContext is laconic.Site
    assert Method is laconic.Method
    assert torch.equal(split(torch.tensor([[1.0, 3.0, 2.0]]), 2)[0], torch.tensor([[1, 2]]))


def test_functions_that_had_a_module_of_their_name_stay_functions():
    importlib.import_module("laconic.hosts")
    assert laconic.hosts() == importlib.import_module("laconic.backbones").hosts()


def test_pickles_of_old_classes_load():
    data = pickle.dumps(laconic.Schedule.rates(0.7, [1]), protocol=0).replace(b"laconic.core.schedule", b"laconic.schedule")
    assert pickle.loads(data) == laconic.Schedule.rates(0.7, [1])


@pytest.mark.parametrize("old", OLD_NAMES)
def test_fields_and_verbs_of_tokens(old):
    tokens = Tokens.start(torch.randn(2, 5, 8), 1, True)
    with pytest.warns(DeprecationWarning, match=f"Tokens.{old} is now Tokens.{OLD_NAMES[old]}"):
        getattr(tokens, old)


def test_fields_of_tokens_in_replace():
    tokens = Tokens.start(torch.randn(2, 5, 8), 1, True)
    with pytest.warns(DeprecationWarning, match=r"Tokens\.gate"):
        assert tokens.replace(gate=tokens.size).attn_scale is tokens.size
    with pytest.raises(AttributeError, match="no field 'gates_'"):
        tokens.gates_  # noqa: B018


def test_schedules():
    for old, new, value in (
        ("leaving", "keep_counts", {1: 5}),
        ("removing", "remove_counts", {1: 5}),
        ("deciding", "adaptive", [1]),
    ):
        with pytest.warns(DeprecationWarning, match=f"Schedule.{old} is now Schedule.{new}"):
            assert getattr(laconic.Schedule, old)(value) == getattr(laconic.Schedule, new)(value)
    for old, new in (("leave", "keep_counts"), ("remove", "remove_counts")):
        assert laconic.Schedule.of({"at": [1], old: [5]}) == laconic.Schedule.of({"at": [1], new: [5]})


def test_options():
    with pytest.warns(DeprecationWarning, match="compute"):
        model = laconic.reduce_(make("plain"), "topk", keep=0.6, rows="all")
    assert model.laconic.compute == "all"
    with pytest.warns(DeprecationWarning, match="count_rule"):
        model = laconic.reduce_(make("plain"), "bat", keep=0.5, budget="log")
    assert model.laconic.config == laconic.BAT(count_rule="log")


def test_methods_written_for_version_0_1():
    with pytest.warns(DeprecationWarning, match="num_kept"):

        class Old(laconic.Method):
            def leaves(self, rates, n, patches):
                return n - 1

    assert Old.num_kept is Old.leaves


def test_models_saved_by_version_0_1_load(tmp_path):
    import json

    model = laconic.reduce_(make("plain"), "bat", keep=0.5, at=[1, 2], count_rule="log", compute="all")
    laconic.save(model, tmp_path)
    record = json.loads((tmp_path / "laconic.json").read_text())
    record["method"]["options"]["budget"] = record["method"]["options"].pop("count_rule")
    record["rows"] = record.pop("compute")
    (tmp_path / "laconic.json").write_text(json.dumps(record))
    loaded = laconic.load(tmp_path, model=make("plain"))
    assert loaded.laconic.config == model.laconic.config
    assert loaded.laconic.compute == "all"
    x = images("plain")
    assert torch.equal(loaded(x), model.eval()(x))
