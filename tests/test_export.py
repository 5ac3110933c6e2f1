"""Exports: every method of constant counts, on three kinds of host, answers in other runtimes as in eager mode."""

import copy
import dataclasses
import json
from functools import partial

import onnx
import pytest
import torch

import laconic
import test_lvvit_psvit
import test_pvt_cvt
import test_transformers
from benchmarks import export_page
from families import CLASS_SCORED, METHODS, OF_CLIPS, VARIABLE, fill, images, make, options, rate, serves
from laconic.analysis.timing import Quartiles
from laconic.cli import app as cli
from laconic.cli import export as job
from laconic.cli import export_input
from laconic.cli.export_speed import EAGER, Speed
from laconic.cli.weights import Loaded
from laconic.core.files import Refusal
from laconic.exporting import graph, inspect, openvino, proof, runner, trace, write
from laconic.exporting.trace import Traced
from zoo import ZOO

FAMILIES = {
    **{name: kind.make for name, kind in ZOO.items() if name != "parallel"},  # no place between its halves
    **{f"transformers {name}": partial(test_transformers.make, name) for name in test_transformers.FAMILIES},
    **{name: partial(test_lvvit_psvit.make, name) for name in test_lvvit_psvit.SMALL},
    **{name: partial(test_pvt_cvt.small, name) for name in test_pvt_cvt.SIZES},
}
pytestmark = [pytest.mark.unchecked, pytest.mark.usefixtures("no_pretrained_weights")]
HOSTS = ("plain", "dinov3", "siglip")
CONSTANT = [m for m in METHODS if m not in VARIABLE]
LOOK_BACK = {"evovit", "kmedoids"}  # they choose by the attention of the block before
QUICK = {("etps", "plain"), ("bat", "siglip"), ("tome", "dinov3"), ("dtps", "plain")}


def small(method, family):
    """As few blocks as show that tokens left: one must come after the block that reduces."""
    depth, at = (3, 1) if method in LOOK_BACK else (2, 0)
    model = laconic.reduce_(make(family, depth=depth), method, keep=rate(method), at=(at,), **options(method, family))
    fill(model.laconic)
    return model


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    """Wherever there is something to merge by the similarity of keys or (where keys are of cells of a grid) of features."""
    method = "dpc-knn" if family in test_pvt_cvt.SIZES else "tome"
    model = laconic.reduce_(FAMILIES[family](), method, keep=0.6)
    report = laconic.export(model, tmp_path / "m.onnx")
    assert report.difference < 1e-5
    assert report.graph.problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("opset", range(graph.OPSETS[0], graph.OPSETS[1] + 1))
def test_every_opset(tmp_path, opset):
    report = laconic.export(small("bat", "plain"), tmp_path / "m.onnx", opset=opset)
    assert report.opset == opset
    assert report.difference < 1e-5
    assert {o.version for o in onnx.load(tmp_path / "m.onnx").opset_import if o.domain in ("", "ai.onnx")} == {opset}


@pytest.mark.parametrize(
    ("method", "family"),
    [pytest.param(m, f, marks=() if (m, f) in QUICK else pytest.mark.slow) for m in CONSTANT for f in HOSTS if serves(m, f)],
)
def test_a_method_on_a_host(tmp_path, method, family):
    """In torch and in ONNX Runtime, at batches that neither the trace nor the proof has seen; nothing for TensorRT to trip on."""
    model, more = small(method, family), images(family, 5) + 1
    traced = trace(model)
    expected = model(more).detach()
    with torch.no_grad():
        same(traced.program.module()(more), expected)
    report = write(traced, tmp_path / "m.onnx", "onnx")
    same(runner(tmp_path / "m.onnx", "onnx", 1)(more)[0], expected)
    assert report.graph.problems == ()
    assert report.difference < 1e-5
    assert [p.batch for p in report.parities] == [1, 3]
    assert report.agreement == 1
    assert set(report.graph.domains) == {"ai.onnx"}


class Sorts(torch.nn.Module):
    """Give the order of scores, and of scores by images, rising and falling."""

    def forward(self, x):
        orders = [y.sort(dim=d, descending=d == 2, stable=True).indices for y in (x, x.square()) for d in (1, 2)]
        return torch.cat([order.flatten(1) for order in orders], 1)


@pytest.mark.parametrize("length", [1, 36, 300])
def test_sorts_in_openvino_are_stable(tmp_path, length):
    x = torch.randint(-2, 3, (2, length, 4), generator=torch.Generator().manual_seed(0)).float()
    traced = Traced(Sorts(), torch.export.export(Sorts(), (x,)), (length, 4), 2)
    graph.write_onnx(traced, tmp_path / "m.onnx")
    openvino.write_openvino(traced, tmp_path / "m.onnx", tmp_path / "m.xml", 20)
    assert torch.equal(runner(tmp_path / "m.xml", "openvino", 1)(x)[0], Sorts()(x))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pre-merge", "adaptive-patch"])
def test_equal_scores_are_decided_as_in_eager_mode(tmp_path, method):
    """Positions of tokens matter on this host; the patches of both halves score the same."""
    model, x = small(method, "dinov3"), images("dinov3")[..., :48]
    x = torch.cat([x, x], -1)
    expected = model(x).detach()
    traced = trace(model)
    for to, name in (("openvino", "m.xml"), ("onnx", "m.onnx")):
        write(traced, tmp_path / name, to)
        same(runner(tmp_path / name, to, 1)(x)[0], expected)


@pytest.mark.parametrize("method", sorted(CLASS_SCORED & set(CONSTANT)))
def test_class_attention_needs_a_class_token(method):
    with pytest.raises((LookupError, ValueError), match="class token"):
        laconic.reduce_(make("siglip", depth=2), method, keep=0.6, at=(1,))


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    return trace(small("topk", "plain"))


def test_every_format_says_what_it_is(traced, tmp_path):
    from openvino import Core

    x = images("plain", 4)
    expected = traced.model(x).detach()
    for to, name in (("torch-export", "m.pt2"), ("openvino", "m.xml"), ("onnx", "m.onnx")):
        report = write(traced, tmp_path / name, to)
        same(runner(tmp_path / name, to, 1)(x)[0], expected)
        assert report.difference < 1e-5
        assert report.paths[-1] == str(tmp_path / name)
        assert f"{to}" in str(report)
        assert json.loads(json.dumps(report.to_json()))["metadata"]["laconic"] == laconic.__version__
    assert {p.name for p in tmp_path.iterdir()} == {"m.pt2", "m.xml", "m.bin", "m.onnx"}
    facts = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(facts["laconic.method"])["name"] == "topk"
    assert laconic.Schedule.of(json.loads(facts["laconic.schedule"])).at == (0,)
    assert facts["laconic.opset"] == "20"
    inside = {"laconic.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=inside)
    assert json.loads(inside["laconic.json"])["patch_tokens"] == facts["laconic.patch_tokens"]
    assert Core().read_model(tmp_path / "m.xml").get_rt_info(["laconic", "method"]).value == facts["laconic.method"]
    for file in tmp_path.iterdir():
        assert b"site-packages" not in file.read_bytes()


def test_the_model_is_unharmed(tmp_path):
    model, x = small("topk", "plain").train(), images("plain")
    weights, before = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()(x)
    laconic.export(model, tmp_path / "m.pt2", "torch-export")
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(x), before)
    assert torch.equal(copy.deepcopy(model)(x), before)
    assert torch.equal(laconic.restore_(model)(x), make("plain", depth=2)(x))


def test_a_plain_model_and_a_fixed_batch(tmp_path):
    report = laconic.export(make("plain", depth=1), tmp_path / "m.pt2", "torch-export", batch=2)
    assert report.metadata["method"] == "none"
    assert (report.batch, [p.batch for p in report.parities]) == (2, [2])
    assert "batch 2" in str(report)


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (dict(to="tflite"), LookupError, "no format is called 'tflite'; there are onnx, torch-export, openvino"),
        (dict(path="m.pt"), ValueError, "a file for onnx ends in .onnx"),
        (dict(batch=0), ValueError, "batch must be at least 1"),
        (dict(example=torch.zeros(3, 96, 96)), ValueError, "example must be"),
    ],
)
def test_wrong_arguments(tmp_path, changes, error, match):
    path = tmp_path / changes.pop("path", "m.onnx")
    with pytest.raises(error, match=match):
        laconic.export(make("plain", depth=1), path, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", sorted(VARIABLE - OF_CLIPS))
def test_variable_counts_are_refused_with_the_reason(tmp_path, method):
    model = laconic.reduce_(make("plain"), method)
    with pytest.raises(ValueError, match=r"decides for every image.*mask tokens.*save nothing"):
        laconic.export(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(traced, tmp_path):
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
        laconic.export("deit", tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="float32, and this model has torch.float16"):
        laconic.export(make("plain", depth=1).half(), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="opset must be from 18 to 23, not 9"):
        write(traced, tmp_path / "m.onnx", "onnx", opset=9)
    with pytest.raises(ValueError, match="tolerance must be above 0"):
        write(traced, tmp_path / "m.onnx", "onnx", tolerance=0)

    class Depends(torch.nn.Module):
        def forward(self, x):
            return x[: int(x.sum())]

    with pytest.raises(ValueError, match="torch cannot trace this Depends with a batch of any size"):
        laconic.export(Depends(), tmp_path / "m.pt2", "torch-export", example=torch.zeros(1, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_what_differs_leaves_what_was_there(traced, tmp_path):
    path = tmp_path / "m.pt2"
    path.write_text("older")
    wrong = dataclasses.replace(traced, model=small("random", "plain"))
    with pytest.raises(
        ValueError, match=r"in torch the exported model differs from the eager one by .* at batch 1; at most 0.0001"
    ):
        write(wrong, path, "torch-export")
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_comparing():
    a = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert proof.compare(2, [a], [a]) == proof.Parity(2, 0.0, 1.0)
    assert proof.compare(2, [a.flip(1)], [a]) == proof.Parity(2, 0.25, 0.0)
    assert proof.compare(2, [a[:1]], [a]).difference == float("inf")
    assert proof.compare(2, [a * float("nan")], [a]).difference == float("inf")


def test_images_without_a_stable_answer_are_replaced():
    """A runtime may choose other tokens where scores are equal up to rounding; everywhere else its answer counts."""
    traced = Traced(None, None, (1, 4, 4), 3)
    means = traced.images(3).mean((1, 2, 3))

    class Above(torch.nn.Module):
        def forward(self, x):
            return (x.mean((1, 2, 3)) > means[1]).float().unsqueeze(1)

    traced = dataclasses.replace(traced, model=Above())
    tie = lambda x: [(x.mean((1, 2, 3)) >= means[1]).float().unsqueeze(1)]  # noqa: E731
    assert proof.prove(traced, tie, "a runtime", 1e-4) == [proof.Parity(3, 0.0, None, 1)]
    wrong = lambda x: [traced.model(x) + (x.mean((1, 2, 3)) == means[0]).unsqueeze(1)]  # noqa: E731
    for run in (wrong, lambda x: [tie(x)[0] + wrong(x)[0]], lambda x: [tie(x)[0] * float("nan")], lambda x: [x]):
        with pytest.raises(ValueError, match="in a runtime the exported model differs"):
            proof.prove(traced, run, "a runtime", 1e-4)


def test_what_tensorrt_would_trip_on_is_found(tmp_path):
    h = onnx.helper
    nodes = [
        h.make_node("NonZero", ["x"], ["places"]),
        h.make_node("TopK", ["x", "k"], ["values", "order"]),
        h.make_node("TopK", ["x", "many"], ["v2", "o2"]),
        h.make_node("ScatterND", ["x", "places", "values"], ["y"], reduction="add"),
        h.make_node("Own", ["y"], ["z"], domain="mine"),
    ]
    floats = onnx.TensorProto.FLOAT
    ends = [h.make_tensor_value_info(n, floats, shape) for n, shape in (("x", ["batch", "words"]), ("z", ["batch"]))]
    k = h.make_tensor_value_info("k", onnx.TensorProto.INT64, [1])
    many = h.make_tensor("many", onnx.TensorProto.INT64, [1], [graph.TOPK_LIMIT + 1])
    onnx.save(h.make_model(h.make_graph(nodes, "g", [ends[0], k], ends[1:], [many])), tmp_path / "m.onnx")
    found = inspect(tmp_path / "m.onnx")
    text = "; ".join(found.problems)
    for part in ("mine", "k that is not constant", "reduction=add", "1 NonZero", "k=3841", "dimension words"):
        assert part in text
    assert "for TensorRT: custom domain mine" in str(found)


# ---------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def tiny(monkeypatch):
    loaded = Loaded(make("plain", depth=2), "the weights come from a test", False)
    monkeypatch.setattr(export_input, "open_weights", lambda *_: loaded)


def test_the_command(tiny, tmp_path, capsys):
    words = ["export", "tiny", "--method", "topk", "--keep", "0.5", "--rounds", "1", "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--record", str(tmp_path / "r.json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"tiny.onnx", "tiny.topk-0.5.onnx"}
    assert [e["paths"] for e in report["exports"]] == [
        [str(tmp_path / "out" / name)] for name in ("tiny.onnx", "tiny.topk-0.5.onnx")
    ]
    assert [e["variant"] for e in report["exports"]] == ["unreduced", "topk 0.5"]
    assert [(s["runtime"], s["label"]) for s in report["speeds"]] == [
        (runtime, label) for runtime in ("eager PyTorch", "ONNX Runtime") for label in ("unreduced", "topk 0.5")
    ]
    assert [s["kept"] is None for s in report["speeds"]] == [True, True, True, False]


@pytest.mark.slow
def test_the_command_with_int8(tiny, tmp_path):
    done = job.export("tiny", output=tmp_path, method=("topk",), keep=(0.5,), int8=True, rounds=1)
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}.onnx" for name in ("tiny", "tiny.int8", "tiny.topk-0.5", "tiny.topk-0.5.int8")
    }
    assert all(1e-5 < row.difference < 1 for row in done.int8)  # it is int8, and no nonsense
    assert {s.runtime for s in done.speeds} == {"eager PyTorch", "ONNX Runtime", "ONNX Runtime, int8"}
    assert "int8 matrix products" in str(done)
    assert export_page.page(done.to_json()).count("| topk 0.5 |") == 5


def test_the_command_refuses_and_leaves_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["export", "tiny", "--rounds", "0", "--to", "torch-export", "--output", str(out)]
    assert cli.main([*words, "--method", "topk", "--keep", "0.5", "--tolerance", "0"]) == 1
    assert "tolerance must be above 0" in capsys.readouterr().err
    assert cli.main([*words, "--method", "ats"]) == 1
    assert "save nothing" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(to=("tflite",)), "--to tflite: there is no such format"),
        (dict(rounds=-1), "--rounds must be at least 0, not -1"),
        (dict(threads=0), "--threads must be at least 1"),
        (dict(batch_size=(0,)), "--batch-size must be at least 1"),
        (dict(to=("openvino",), int8=True), "--int8 quantizes the ONNX file; add --to onnx"),
        (dict(output="file"), "is a file; --output takes a directory"),
        (dict(output="file/below"), "is a file; --output takes a directory"),
    ],
)
def test_wrong_words(tiny, tmp_path, given, match):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=match):
        job.export("tiny", **{**given, "output": tmp_path / given.get("output", "out")})
    assert not (tmp_path / "out").exists()


def test_the_verdict():
    def speed(label, kept):
        return Speed(label, "OpenVINO", 1, Quartiles(1, 1, 1), None if kept is None else Quartiles(1, 1, 1), kept, 1.0)

    def files(*speeds):
        return job.Files("m", (), (), speeds, {})

    assert "No reduced model" in files(speed("unreduced", None)).verdict
    assert "survive everywhere (least 0.90)" in files(speed("a", 0.9), speed("b", 1.1)).verdict
    assert "left to b in OpenVINO at batch 1 (0.89)" in files(speed("a", 0.9), speed("b", 0.89)).verdict


def test_the_verdict_says_where_nothing_is_gained():
    def speed(label, runtime, seconds, ratio=None):
        times = None if ratio is None else Quartiles(ratio, ratio, ratio)
        return Speed(label, runtime, 8, Quartiles(seconds, seconds, seconds), times, None if runtime == EAGER else ratio, 1.0)

    base, fast, slow = speed("unreduced", EAGER, 2.0), speed("a", EAGER, 1.0, 2.0), speed("b", EAGER, 2.5, 0.8)
    files = [speed("unreduced", "OpenVINO", 1.0), speed("a", "OpenVINO", 1.5, 1.0), speed("b", "OpenVINO", 1.0, 1.0)]
    said = job.Files("m", (), (), (base, fast, slow, *files), {}).verdict
    assert "In eager PyTorch no faster reduced than unreduced: b at batch 8 (0.80x)." in said
    assert "Slower exported than the same model in eager PyTorch: a in OpenVINO at batch 8 (0.67x)." in said
    assert "lower" not in job.Files("m", (), (), (base, fast), {}).verdict


def test_a_missing_library_is_named(traced, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"laconic\[export\]"):
        openvino.write_openvino(traced, tmp_path / "m.onnx", tmp_path / "m.xml", 20)
