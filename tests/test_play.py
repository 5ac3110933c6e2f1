"""`laconic play`: the files of the playground, the runtime it needs, and the page in a browser, next to PyTorch."""

import base64
import gzip
import io
import json
import stat
import tarfile
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import laconic
from browsing import SHOTS, WIDTHS, Visit, browser, served
from laconic.analysis.diagnose import shared_copy
from laconic.cli import app as cli
from laconic.cli import play as command
from laconic.cli.eval_input import Reading, open_eval_input
from laconic.core.files import Refusal
from laconic.play import graphs, runtime, site

pytestmark = pytest.mark.unchecked  # it exports
MODEL = "scenes_vit_small"
METHODS, KEEPS = ("tome", "pitome", "tofu", "bat", "etps", "evit", "topk", "avg-pool"), ("0.9", "0.8", "0.7", "0.6", "0.5")
READY = "laconic.state().ready"


def files(folder):
    """Empty files of the runtime."""
    folder.mkdir(exist_ok=True)
    for name in runtime.FILES:
        (folder / name).write_bytes(name.encode())
    return folder


def export(folder, methods, keeps, place):
    words = [word for name in methods for word in ("--method", name)] + [word for keep in keeps for word in ("--keep", keep)]
    return cli.main(["play", MODEL, "--export", str(folder), *words, "--pictures", "2", "--runtime", str(place), "--json"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A playground of two methods, with the real runtime where it is there."""
    folder = tmp_path_factory.mktemp("play")
    place = next((one for one in runtime._places() if runtime._complete(one)), None)
    assert export(folder / "site", ("tome", "topk"), ("0.7", "0.5"), place or files(folder / "runtime")) == 0
    manifest = json.loads((folder / "site" / site.MANIFEST).read_text())
    return SimpleNamespace(folder=folder / "site", manifest=manifest, runs=place is not None)


def scenes(count, start=0):
    """The model, and pictures as bytes [40, 40, 3] that are not among those of the playground."""
    eval_input = open_eval_input(MODEL, "scenes", Reading(split="val", limit=start + count, workers=0), None)
    shown = [np.asarray(eval_input.images.load(i).convert("RGB")) for i in range(start, start + count)]
    assert all(picture.shape == (40, 40, 3) for picture in shown)
    return eval_input.base, shown


def maps(base, method, keep, picture):
    """Python's provenance of a picture: for each reducing block the token of every patch."""
    model = laconic.reduce_(shared_copy(base), method, keep=keep)
    with torch.inference_mode():
        model(site.exact_pixels(picture, base)[None])
    return [stage.where[0].tolist() for stage in laconic.provenance(model).stages]


# ------------------------------------------------------------------------------------------------ the files
def test_the_manifest_has_costs_and_tokens_of_the_summary(small):
    base, _ = scenes(1)
    assert [method["name"] for method in small.manifest["methods"]] == ["tome", "topk"]
    assert small.manifest["unreduced"]["macs"] == laconic.summary(base).macs
    for method in small.manifest["methods"]:
        assert [rate["keep"] for rate in method["rates"]] == [0.5, 0.7]
        for rate in method["rates"]:
            model = laconic.reduce_(shared_copy(base), method["name"], keep=rate["keep"])
            assert rate["macs"] == laconic.summary(model).macs
            assert len(rate["tokens"]) == len(rate["blocks"]) + 1
            assert (small.folder / rate["graph"]).is_file()
    assert small.manifest["bytes"] == sum(
        f.stat().st_size for f in small.folder.rglob("*") if f.name != site.MANIFEST and f.is_file()
    )


def test_graphs_share_their_weights(small):
    base, _ = scenes(1)
    own = sum(tensor.nbytes for tensor in base.state_dict().values())
    assert small.manifest["weights"]["bytes"] < 1.1 * own
    for file in (small.folder / "graphs").iterdir():
        graph = onnx.load_from_string(gzip.decompress(file.read_bytes()))
        external = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        facts = [{entry.key: entry.value for entry in tensor.external_data} for tensor in external]
        assert {fact["location"] for fact in facts} == {small.manifest["weights"]["file"]}
        assert max(int(fact["offset"]) + int(fact["length"]) for fact in facts) <= small.manifest["weights"]["bytes"]
        assert sum(int(fact["length"]) for fact in facts) > 0.9 * own
        assert file.stat().st_size < 0.02 * own


def test_a_tensor_is_stored_once_and_aligned():
    weights = graphs.Weights()
    places = [weights.place(data) for data in (b"a" * 10, b"b" * 100, b"a" * 10, b"c")]
    assert places[0] == places[2] == 0
    assert len({*places}) == 3
    assert all(place % graphs.ALIGN == 0 for place in places)
    assert bytes(weights.content[places[1] : places[1] + 100]) == b"b" * 100


def test_a_graph_that_merges_other_tokens_is_not_written(monkeypatch):
    base, _ = scenes(1)
    model = laconic.reduce_(shared_copy(base), "topk", keep=0.5)
    true = graphs.runner

    def wrong(*args, **kwargs):
        run = true(*args, **kwargs)
        return lambda images: [out + (not out.is_floating_point()) for out in run(images)]

    monkeypatch.setattr(graphs, "runner", wrong)
    with pytest.raises(ValueError, match="other tokens"):
        graphs.compressed(model, torch.randn(1, 3, 40, 40), graphs.Weights())


def test_methods_that_cannot_be_shown_are_notes(tmp_path, monkeypatch, capsys):
    place = files(tmp_path / "runtime")
    monkeypatch.setattr(site, "compressed", lambda model, example, weights: b"")
    assert export(tmp_path / "site", ("topk", "two-stage", "ats", "sinkhorn"), ("0.5",), place) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [note.split(":")[0] for note in notes] == ["no two-stage", "no ats", "no sinkhorn"]
    assert export(tmp_path / "site", ("ats",), ("0.5",), place) == 1
    assert "none of the methods works" in capsys.readouterr().err


def test_a_playground_is_used_again_only_for_the_same_question(tmp_path, monkeypatch):
    written, shown = [], []
    true = command.write
    monkeypatch.setattr(site, "compressed", lambda model, example, weights: b"")
    monkeypatch.setattr(command, "FOLDER", tmp_path / "site")
    monkeypatch.setattr(command, "serve", lambda folder, port: shown.append((folder, port)))
    monkeypatch.setattr(command, "write", lambda *args, **kwargs: written.append(1) or true(*args, **kwargs))
    how = {"pictures": 1, "runtime": files(tmp_path / "runtime"), "port": 0}
    for keep, count in (((0.5,), 1), ((0.5,), 1), ((0.7,), 2)):
        command.play(MODEL, method=("topk",), keep=keep, **how)
        assert len(written) == count
    assert shown == [(tmp_path / "site", 0)] * 3


def test_random_weights_are_refused(tmp_path, monkeypatch):
    from laconic.cli import weights

    monkeypatch.setattr(weights, "_cached", lambda cfg: None)
    monkeypatch.setattr(weights, "_hub_answers", lambda: False)
    with pytest.raises(Refusal, match="RANDOM"):
        command.play("deit_tiny_patch16_224", export=tmp_path / "site", runtime=files(tmp_path / "runtime"))


# ------------------------------------------------------------------------------------------------ the runtime
@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No cache, no clone and no programs; a folder for programs."""
    monkeypatch.setattr(runtime, "_places", lambda: iter(()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def fake_npm(folder, script):
    file = folder / "bin" / "npm"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


def test_without_npm_the_message_says_what_to_do(nowhere):
    with pytest.raises(Refusal, match="install npm.*--runtime"):
        runtime.find_runtime()
    with pytest.raises(Refusal, match=r"has not all of ort\.wasm"):
        runtime.find_runtime(nowhere)


def test_npm_gets_the_files_once(nowhere):
    with tarfile.open(nowhere / "package.tgz", "w:gz") as package:
        for name in runtime.FILES:
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(name)
            package.addfile(member, io.BytesIO(name.encode()))
    fake_npm(nowhere, f'/bin/cp "{nowhere}/package.tgz" "$5/onnxruntime-web.tgz"')
    found = runtime.find_runtime()
    assert found == runtime.cache()
    assert [(found / name).read_text() for name in runtime.FILES] == list(runtime.FILES)
    assert runtime.find_runtime(found) == found
    assert runtime.write_runtime(nowhere / "out", found) == sum(f.stat().st_size for f in (nowhere / "out").iterdir())
    assert gzip.decompress((nowhere / "out" / f"{runtime.FILES[2]}.gz").read_bytes()).decode() == runtime.FILES[2]


def test_a_package_without_the_files_and_a_failing_npm_are_refused(nowhere):
    with tarfile.open(nowhere / "package.tgz", "w:gz"):
        pass
    fake_npm(nowhere, f'/bin/cp "{nowhere}/package.tgz" "$5/onnxruntime-web.tgz"')
    with pytest.raises(Refusal, match="npm cannot get"):
        runtime.find_runtime()
    fake_npm(nowhere, "echo no network >&2; exit 1")
    with pytest.raises(Refusal, match="no network.*--runtime"):
        runtime.find_runtime()
    assert not runtime.cache().exists()


# ------------------------------------------------------------------------------------------------ in a browser
@contextmanager
def opened_page(folder, width=1200, **options):
    with browser() as opened, served(folder) as address:
        visit = Visit(opened, width, **options)
        visit.page.goto(address)
        visit.page.wait_for_function(READY, timeout=120_000)
        yield visit, visit.page
        assert (visit.outside(address), visit.said) == ([], [])


def drop(page, picture, name):
    """Drop a picture on the page, and wait until it is shown."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="png")
    page.evaluate(
        """([text, name]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            document.querySelector("#map").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [base64.b64encode(content.getvalue()).decode(), name],
    )
    page.wait_for_function(f"{READY} && laconic.state().picture === {json.dumps(name)}")


def choose(page, method, place):
    """Choose a method and the place of its keep rate; return what is shown."""
    page.select_option("#method", method)
    page.locator("#keep").fill(str(place))
    page.wait_for_function(f"{READY} && laconic.state().method === {json.dumps(method)}")
    return page.evaluate("laconic.state()")


def assert_maps_are_pythons(page, manifest, base, picture):
    for method in manifest["methods"]:
        for place, rate in enumerate(method["rates"]):
            shown = choose(page, method["name"], place)
            assert shown["keep"] == rate["keep"]
            assert shown["maps"] == maps(base, method["name"], rate["keep"], picture), (method["name"], rate["keep"])


@pytest.mark.browser
@pytest.mark.parametrize("name", WIDTHS)
def test_the_page(small, name):
    if not small.runs:
        pytest.skip("onnxruntime-web is not there (make front)")
    base, (one, two) = scenes(2)
    with opened_page(small.folder, WIDTHS[name], color_scheme="dark" if name == "phone" else "light") as (visit, page):
        before = page.evaluate("laconic.state().maps")
        drop(page, one, "one")
        assert page.evaluate("laconic.state().maps") != before
        assert_maps_are_pythons(page, small.manifest, base, one)
        page.set_input_files("#file", [{"name": "two.png", "mimeType": "image/png", "buffer": png(two)}])
        page.wait_for_function(f"{READY} && laconic.state().picture === 'two.png'")
        assert page.evaluate("laconic.state().maps") == maps(base, "topk", 0.7, two)
        own, whole = page.evaluate("laconic.state().features"), features(base, two)
        assert float(page.text_content("#similarity")) == pytest.approx(cosine(own, whole), abs=2e-4)
        page.focus("#block")
        page.keyboard.press("Home")
        assert "100 of 100 tokens" in page.text_content("#when")
        page.keyboard.press("ArrowRight")
        assert f"{small.manifest['methods'][1]['rates'][1]['tokens'][1]} of 100 tokens" in page.text_content("#when")
        page.focus("canvas")
        page.keyboard.press("ArrowRight")
        assert "row 1, column 1" in page.text_content("#patch")
        page.click("#measure")
        page.wait_for_function("document.querySelector('#time').textContent.includes('median of')", timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[name]
        assert visit.violations() == []
        page.keyboard.press("End")
        visit.shoot(f"play-{name}")
    assert (SHOTS / f"play-{name}.png").is_file()


def png(picture):
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="png")
    return content.getvalue()


def features(base, picture):
    with torch.inference_mode():
        tokens = base.forward_features(site.exact_pixels(picture, base)[None])
        return base.forward_head(tokens, pre_logits=True)[0].tolist()


def cosine(one, two):
    return float(np.dot(one, two) / np.linalg.norm(one) / np.linalg.norm(two))


@pytest.mark.browser
def test_what_is_no_picture_is_said(small):
    if not small.runs:
        pytest.skip("onnxruntime-web is not there (make front)")
    with opened_page(small.folder) as (_, page):
        before = page.evaluate("laconic.state().maps")
        page.set_input_files("#file", [{"name": "no.png", "mimeType": "image/png", "buffer": b"no"}])
        page.wait_for_function("document.querySelector('#problem').textContent.includes('no.png')")
        assert page.evaluate("laconic.state().maps") == before


@pytest.mark.browser
@pytest.mark.parametrize("methods", [METHODS[:4], METHODS[4:]], ids=" ".join)
def test_the_maps_of_eight_methods_at_five_rates_are_those_of_python(methods, tmp_path, small):
    if not small.runs:
        pytest.skip("onnxruntime-web is not there (make front)")
    base, (picture,) = scenes(1, start=5)
    assert export(tmp_path / "site", methods, KEEPS, runtime.find_runtime()) == 0
    manifest = json.loads((tmp_path / "site" / site.MANIFEST).read_text())
    assert [len(method["rates"]) for method in manifest["methods"]] == [5] * 4
    wasm = sum(file.stat().st_size for file in (tmp_path / "site" / "runtime").iterdir())
    assert manifest["bytes"] - wasm < 4e6
    with opened_page(tmp_path / "site") as (_, page):
        drop(page, picture, "a scene")
        assert_maps_are_pythons(page, manifest, base, picture)
