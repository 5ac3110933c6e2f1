"""Embedding a collection: the same vectors whatever the cut, the engine and the kind of files; failures are rows."""

import io
import json
import pickle
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import laconic
from benchmarks import embed as benchmark
from laconic.cli import models
from laconic.cli.app import main
from laconic.cli.embed import embed
from laconic.core.files import Refusal
from laconic.data.preprocessing import transform_for
from laconic.embed import Embedder, check, run
from laconic.embed.collection import open_collection
from laconic.embed.vectors import VectorFolder, read_vectors

MODEL = "scenes_vit_tiny"
PLAIN = {"workers": 0, "device": "cpu"}
COUNT = 21


def noise(number, size=(50, 40)):
    colours = np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def content(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with pictures in two folders."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for number in range(COUNT):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(noise(number)))
    return folder


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The vectors of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    embed(MODEL, data=pictures, output=output, method="tome", keep=0.5, **PLAIN)
    return output


def by_id(folder):
    return {name: vector for ids, rows in read_vectors(folder) for name, vector in zip(ids, rows, strict=True)}


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------- the vectors
def test_the_vectors_are_those_of_the_model(pictures, whole):
    model = models.create(MODEL, pretrained=True)
    laconic.reduce_(model, "tome", keep=0.5)
    model.head = torch.nn.Identity()
    found, transform = by_id(whole), transform_for(model)
    assert len(found) == COUNT
    for name, vector in found.items():
        with torch.inference_mode():
            expected = model(transform(Image.open(pictures / name))[None])[0]
        torch.testing.assert_close(torch.from_numpy(vector), expected)


@pytest.mark.parametrize("model", [MODEL, "vit_tiny_patch16_224"], ids=["class token", "mean"])
def test_features(model):
    options = {} if model == MODEL else {"img_size": 32, "depth": 2, "global_pool": "avg"}
    own = laconic.reduce_(models.create(model, **options), "topk", keep=0.5)
    pixels = torch.randn(3, 3, *own.patch_embed.img_size)
    with torch.inference_mode():
        tokens = own.forward_features(pixels)
        expected = {
            "pooled": own.forward_head(own.forward_features(pixels), pre_logits=True),
            "class": tokens[:, 0],
            "patches": laconic.restore_dense(own, tokens, fill="nearest"),
        }
    for kind, value in expected.items():
        half = Embedder(own, features=kind, output="float16", forward_size=3)
        found = Embedder(own, features=kind, forward_size=3).embed(pixels)
        if model == MODEL or kind != "class":
            torch.testing.assert_close(torch.from_numpy(found), value)
        assert np.array_equal(half.embed(pixels), found.astype(np.float16))


def test_the_given_model_stays_as_it_is():
    model = models.create(MODEL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    embedder = Embedder(model.train(), "tome", keep=0.5, dtype="bfloat16")
    embedder.embed(torch.randn(2, 3, 40, 40))
    assert model.training
    assert not laconic.is_reduced(model)
    assert isinstance(model.head, torch.nn.Linear)
    assert all(value.requires_grad for value in model.parameters())
    assert {name: value.dtype for name, value in model.state_dict().items()} == {name: v.dtype for name, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("method", "options"), [(None, {}), ("bat", {"keep": 0.5}), ("ats", {}), ("spvit", {})])
def test_a_vector_does_not_depend_on_its_batch(method, options):
    """Also of methods with a count for each image, whose forward is as long as its longest picture."""
    embedder = Embedder(models.create(MODEL), method, **options)
    pixels = torch.nn.functional.interpolate(torch.randn(19, 3, 5, 5), size=(40, 40), mode="bilinear")
    expected, order = embedder.embed(pixels), torch.randperm(19)
    assert embedder.forward_size == (1 if method in ("ats", "spvit") else 8)
    assert np.array_equal(embedder.embed(pixels[order]), expected[order])
    assert np.array_equal(np.concatenate([embedder.embed(part) for part in pixels.split(3)]), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = Embedder(models.create(MODEL), method, **options)
        if not any(name.startswith("laconic.") for name in two.model.state_dict()):  # learned, and random here
            assert two.threads == 2
            assert np.array_equal(two.embed(pixels), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_embedder_can_be_pickled(pictures):
    embedder = Embedder(MODEL, "tome", keep=0.5, column="image")
    batch = {
        "image": [{"bytes": (pictures / "a/0.png").read_bytes(), "path": None}, b"no picture", None],
        "id": ["x", "y", "z"],
        "label": [1, 2, 3],
    }
    found, again = embedder(batch), pickle.loads(pickle.dumps(embedder))(batch)
    assert list(found) == ["id", "label", "width", "height", "error", "vector"]
    assert found["label"] == [1, 2, 3]
    assert (found["width"][0], found["height"][0]) == (50, 40)
    assert found["error"][0] == ""
    assert "not an image" in found["error"][1]
    assert "found nothing" in found["error"][2]
    assert np.isfinite(found["vector"][0]).all()
    assert np.isnan(found["vector"][1:]).all()
    assert np.array_equal(found["vector"], again["vector"], equal_nan=True)
    with pytest.raises(LookupError, match=r"no column 'image', but id.*column="):
        embedder({"id": ["x"]})


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit_tny_patch16_224"}, "timm has no model called 'vit_tny_patch16_224'"),
        ({"features": "pixels"}, "pooled, class, patches"),
        ({"output": "int8"}, "float32 or float16"),
        ({"forward_size": 0}, "at least 1"),
        ({"model": "vit_base_patch16_siglip_224", "features": "class"}, "no class token"),
    ],
)
def test_an_embedder_refuses(arguments, message):
    given = {"model": MODEL, **arguments}
    if "siglip" in given["model"]:
        given["model"] = models.create(given["model"], img_size=32, depth=1)
    with pytest.raises((ValueError, Refusal), match=message):
        Embedder(**given)


# ---------------------------------------------------------------------------------------------------- the cut
def test_batches_workers_and_kinds_of_files_change_no_byte(pictures, whole, tmp_path):
    for number, how in enumerate([{"batch_size": 1}, {"batch_size": 13, "workers": 2}, {"workers": 1}]):
        output = tmp_path / f"{number}"
        embed(MODEL, data=pictures, output=output, method="tome", keep=0.5, **{**PLAIN, **how})
        assert files(output) == files(whole)
    expected, names = by_id(whole), sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png"))
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(pictures, ".")
    rows = {"id": names, "image": [{"bytes": (pictures / name).read_bytes(), "path": None} for name in names]}
    pq.write_table(pa.table(rows), tmp_path / "p.parquet", row_group_size=4)
    (tmp_path / "list.txt").write_text("\n".join(str(pictures / name) for name in reversed(names)) + "\n")
    for name in ("p.tar", "p.parquet", "list.txt"):
        output = tmp_path / f"of {name}"
        report = embed(MODEL, data=tmp_path / name, output=output, method="tome", keep=0.5, **PLAIN)
        found = by_id(output)
        if name == "list.txt":
            found = {str(Path(key).relative_to(pictures)): value for key, value in found.items()}
        assert same(found, expected), name
        assert report.exit_code == 0


def test_a_run_goes_on_where_it_was(pictures, tmp_path, monkeypatch):
    how = {"data": pictures, "shard_size": 8, **PLAIN}
    embed(MODEL, output=tmp_path / "whole", **how)
    write, done = VectorFolder.write, []

    def stop(self, *arguments):
        if done:
            raise KeyboardInterrupt
        done.append(write(self, *arguments))

    monkeypatch.setattr(VectorFolder, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        embed(MODEL, output=tmp_path / "cut", **how)
    monkeypatch.undo()
    assert len(list((tmp_path / "cut").glob("*.parquet"))) == 1
    (tmp_path / "cut" / "vectors-000002.parquet").write_bytes(b"damaged")
    report = embed(MODEL, output=tmp_path / "cut", **how)
    assert (report.here, report.result.pictures) == (COUNT - 8, COUNT)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert embed(MODEL, output=tmp_path / "cut", **how).here == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": "topk"}, "reduction.method.name: 'tome' there, 'topk' here"),
        ({"keep": 0.6}, "reduction.schedule.keep"),
        ({"vectors": "float16"}, "vectors: 'float32' there, 'float16' here"),
        ({"features": "patches"}, "features"),
        ({"forward_size": 4}, "forward_size: 8 there, 4 here"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"model": "scenes_vit_small"}, "weights"),
        ({"data": "one more"}, f"data.pictures: {COUNT} there, {COUNT + 1} here"),
    ],
)
def test_vectors_of_something_else_are_refused_and_stay(pictures, whole, tmp_path, change, named):
    before = files(whole)
    if "data" in change:
        names = [*sorted(pictures.rglob("*.png")), "another.png"]
        change = {"data": tmp_path / "list.txt"}
        change["data"].write_text("\n".join(map(str, names)))
    model = change.get("model", MODEL)
    how = {"data": pictures, "output": whole, "method": "tome", "keep": 0.5, **PLAIN, **change}
    with pytest.raises(Refusal, match="choose another --output") as error:
        embed(model, **{name: value for name, value in how.items() if name != "model"})
    assert named in str(error.value)
    assert files(whole) == before


def test_versions_and_weights_are_in_the_manifest(whole, pictures, monkeypatch):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert {"torch", "timm", "PIL", "numpy", "pyarrow", "laconic", "python"} == manifest["versions"].keys()
    monkeypatch.setattr(laconic, "__version__", "9.9")
    with pytest.raises(Refusal, match=r"versions.laconic: '0.1.0' there, '9.9' here\)"):
        embed(MODEL, data=pictures, output=whole, method="tome", keep=0.5, **PLAIN)


# ---------------------------------------------------------------------------------------------------- the output
def test_a_folder_of_other_files_is_refused(pictures, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Refusal, match="mine.txt.*choose a new or empty folder"):
        embed(MODEL, data=pictures, output=tmp_path, **PLAIN)
    assert files(tmp_path) == {"mine.txt": b"mine"}


def test_a_full_disk_is_a_line_and_the_run_goes_on_after_it(pictures, tmp_path, capsys):
    words = ["embed", MODEL, "--data", str(pictures), "--output", str(tmp_path / "out"), "--workers", "0", "--device", "cpu"]
    words += ["--shard-size", "8"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # the manifest fits, a shard does not
    try:
        assert main(words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "vectors-000000.parquet cannot be written" in capsys.readouterr().err
    assert list(files(tmp_path / "out")) == ["manifest.json"]
    assert main(words) == 0
    embed(MODEL, data=pictures, output=tmp_path / "whole", shard_size=8, **PLAIN)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(pictures, tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("laconic.core.files.tempfile.NamedTemporaryFile", refuse)
    monkeypatch.setattr("laconic.cli.models.create", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(Refusal, match="cannot be written: Read-only file system; choose another place"):
        embed(MODEL, data=pictures, output=tmp_path / "out", **PLAIN)


def test_a_collection_that_vanishes_is_not_a_collection_of_failures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.png").write_bytes(content(noise(number)))
    embedder, collection = Embedder(MODEL, device="cpu"), open_collection(folder)
    (tmp_path / "out").mkdir()
    out = VectorFolder(tmp_path / "out", run.question(embedder, collection))
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(Refusal, match="pictures is gone"):
        run.run(embedder, collection, out, out.missing())
    assert not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------------------------------- broken pictures
def bomb():
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    data = bytearray(content(Image.new("L", (1, 1))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return content(noise(3, (60, 30)), "JPEG", exif=exif)


GOOD = {
    "cmyk.jpg": content(noise(0).convert("CMYK"), "JPEG"),
    "16bit.png": content(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)),
    "animated.gif.png": content(noise(1), "GIF", save_all=True, append_images=[noise(2)]),
    "rotated.jpg": rotated(),
    "png called.jpg": content(noise(4)),
    "clear.png": content(noise(5).convert("RGBA")),
}
BAD = {
    "truncated.jpg": (content(noise(6), "JPEG")[:-40], "cut off"),
    "truncated.png": (content(noise(6))[:-30], ""),
    "zeros.jpg": (bytes(1000), "not an image"),
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"<html>404</html>", "not an image"),
    "bomb.png": (bomb(), "pixels"),
}


def test_broken_pictures_of_every_kind_are_rows_with_a_reason(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in {**GOOD, **{name: data for name, (data, _) in BAD.items()}}.items():
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to(tmp_path / "nothing.png")
    (folder / "readme.md").write_text("no picture")
    words = ["embed", MODEL, "--data", str(folder), "--output", str(tmp_path / "out"), "--workers", "1", "--json"]
    assert main(words) == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["result"]["pictures"], told["result"]["failed"], told["ignored"]) == (
        len(GOOD) + len(BAD) + 1,
        len(BAD) + 1,
        1,
    )
    assert sum(told["result"]["reasons"].values()) == len(BAD) + 1
    (file,) = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(file).to_pylist()
    rows = {row["id"]: row for row in table}
    assert len(table) == len(rows) == len(GOOD) + len(BAD) + 1
    for name, (_, reason) in {**BAD, "link.png": (None, "No such file")}.items():
        assert reason in rows[name]["error"], name
        assert rows[name]["error"], name
        assert (rows[name]["vector"], rows[name]["width"], rows[name]["height"]) == (None, 0, 0)
    for name in GOOD:
        assert rows[name]["error"] == ""
        assert np.isfinite(rows[name]["vector"]).all()
    assert (rows["rotated.jpg"]["width"], rows["rotated.jpg"]["height"]) == (30, 60)
    for name in BAD:
        (folder / name).unlink()
    (folder / "link.png").unlink()
    alone = embed(MODEL, data=folder, output=tmp_path / "alone", **PLAIN)
    assert alone.exit_code == 0
    assert same(by_id(tmp_path / "alone"), by_id(tmp_path / "out"))


def test_patches_are_tensors_of_fixed_shape(pictures, tmp_path):
    embed(MODEL, data=pictures, output=tmp_path, features="patches", vectors="float16", method="tome", keep=0.5, **PLAIN)
    ((_, found),) = read_vectors(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert found.shape == (COUNT, *manifest["shape"])
    assert found.dtype == np.float16
    (file,) = tmp_path.glob("*.parquet")
    assert pq.read_schema(file).field("vector").type == pa.fixed_shape_tensor(pa.float16(), manifest["shape"])


# ---------------------------------------------------------------------------------------------------- collections
def test_collections_that_are_refused(pictures, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.png").write_bytes(content(noise(0)))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "mixed" / "b.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.tar").write_bytes(b"x" * 600)
    cases = {
        "nothing": (FileNotFoundError, "there is nothing at"),
        "mixed": (ValueError, "1 .parquet and pictures; give a folder of one kind"),
        "mixed/b.parquet": (ValueError, "has the columns text; expected one of bytes"),
        "mixed/a.png": (ValueError, "is not a folder, a .tar, a .parquet or a list"),
        "empty": (ValueError, "there are no pictures"),
        "short.tar": (ValueError, "cannot be read as a tar"),
    }
    for name, (kind, message) in cases.items():
        with pytest.raises(kind, match=message):
            open_collection(tmp_path / name)


def test_a_name_that_is_not_utf_8_is_escaped(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / b"caf\xe9.png".decode("utf-8", "surrogateescape")).write_bytes(content(noise(0)))
    embed(MODEL, data=folder, output=tmp_path / "out", **PLAIN)
    assert list(by_id(tmp_path / "out")) == ["caf\\xe9.png"]


def test_several_parquet_files_and_rows_without_ids(pictures, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        rows = [(pictures / f"a/{i}.png").read_bytes() for i in (0, 2)]
        pq.write_table(pa.table({"jpg": [rows[number], None]}), data / f"{number}.parquet")
    report = embed(MODEL, data=data, output=tmp_path / "out", **PLAIN)
    assert list(by_id(tmp_path / "out")) == ["0.parquet#0", "1.parquet#0"]
    assert report.result.reasons == {"the row has no picture": 2}


# ---------------------------------------------------------------------------------------------------- the check
def test_the_check_compares_with_the_unreduced_model(pictures, tmp_path):
    how = {"data": pictures, "method": "random", "keep": 0.3, "check": COUNT, **PLAIN}
    report = embed(MODEL, output=tmp_path / "out", **how)
    plain, own = (tmp_path / name for name in ("plain", "out"))
    embed(MODEL, data=pictures, output=plain, **PLAIN)
    a, b = (np.stack([by_id(folder)[name] for name in sorted(by_id(plain))]) for folder in (plain, own))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert report.check.cosine.mean == pytest.approx(cosine.mean(), abs=1e-5)
    assert report.check.worst == pytest.approx(cosine.min(), abs=1e-5)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b)]
    near = [np.argsort(-(u @ u.T) + 9 * np.eye(COUNT))[:, :10] for u in unit]
    shares = [len(set(one) & set(two)) / 10 for one, two in zip(*near, strict=True)]
    assert report.check.recall.mean == pytest.approx(np.mean(shares), abs=0.02)
    assert report.check.speedup.median > 0
    with pytest.raises(Refusal, match=r"cosine .* wanted; nothing was written") as error:
        embed(MODEL, output=tmp_path / "refused", least_cosine=0.99999, **how)
    assert error.value.report.result is None
    assert not (tmp_path / "refused").exists()
    with pytest.raises(Refusal, match="recall@10"):
        embed(MODEL, output=tmp_path / "refused", least_recall=1.0, **how)


def test_equal_vectors_have_equal_neighbours():
    rows = torch.randn(30, 8)
    assert check.recall(rows, rows) == [1.0] * 30
    assert np.mean(check.recall(rows, torch.randn(30, 8))) < 0.6


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"check": 20}, "is not reduced; give --method"),
        ({"check": 5, "method": "topk"}, "needs 12 pictures"),
        ({"least_cosine": 0.9}, "need --check N"),
        ({"keep": 0.5}, "give --method"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"workers": -1}, "--workers must be at least 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(pictures, tmp_path, how, message):
    with pytest.raises(Refusal, match=message):
        embed(MODEL, data=pictures, output=tmp_path / "out", **{**PLAIN, **how})
    assert not (tmp_path / "out").exists()


def test_a_saved_model_is_embedded_as_it_was_reduced(pictures, whole, tmp_path):
    model = laconic.reduce_(models.create(MODEL, pretrained=True), "tome", keep=0.5)
    laconic.save(model, tmp_path / "saved")
    report = embed(str(tmp_path / "saved"), data=pictures, output=tmp_path / "out", check=COUNT, **PLAIN)
    assert report.check.cosine.mean < 1
    assert same(by_id(tmp_path / "out"), by_id(whole))
    with pytest.raises(Refusal, match="reduced already"):
        embed(str(tmp_path / "saved"), data=pictures, output=tmp_path / "other", method="topk", **PLAIN)


# ---------------------------------------------------------------------------------------------------- the benchmark
def test_the_benchmark_writes_its_section(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "MODEL", MODEL)
    page, results = tmp_path / "page.md", tmp_path / "embed.json"
    page.write_text("# Page\n<!-- measured -->\nold\n<!-- /measured -->\nend\n")
    words = ["--pictures", "20", "--size", "60", "50", "--rounds", "2", "--workers", "0", "--small", "30"]
    benchmark.main(["--run", "--json", str(results), "--page", str(page), *words])
    found, text = json.loads(results.read_text()), page.read_text()
    assert len(found["throughput"]) == 5
    assert found["throughput"][0]["ratio"] == {"low": 1, "median": 1, "high": 1}
    assert all(row["rate"] > 0 for row in found["throughput"])
    assert found["memory"][0]["pictures"] == 30
    assert "old" not in text
    assert all(f"| {row['name']} | {row['rate']:.1f} |" in text for row in found["throughput"])
    before = text
    benchmark.main(["--json", str(results), "--page", str(page)])
    assert page.read_text() == before


def test_the_page_has_the_committed_measurement():
    results = benchmark.TOP / "results" / "embed.json"
    if results.is_file():
        assert benchmark.section(json.loads(results.read_text())) in benchmark.PAGE.read_text()


# ---------------------------------------------------------------------------------------------------- memory
MEMORY = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from laconic.cli.embed import embed
embed("scenes_vit_tiny", data=Path(sys.argv[1]), output=Path(sys.argv[2]), workers=0, device="cpu", batch_size=16)
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_the_memory_does_not_grow_with_the_pictures(tmp_path):
    """1,000 pictures more are 19 MB of pixels more (the benchmark has 100,000)."""
    peaks = []
    for count in (200, 1200):
        rows = [content(noise(number, (24, 24)), "JPEG") for number in range(50)] * (count // 50)
        pq.write_table(pa.table({"jpg": rows}), tmp_path / f"{count}.parquet", row_group_size=100)
        words = [sys.executable, "-c", MEMORY, str(tmp_path / f"{count}.parquet"), str(tmp_path / f"{count}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks
