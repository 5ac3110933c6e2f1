"""The suite of measurements: its rows, its page, and the check against a committed run. Nothing is timed for its speed here."""

import copy
import json

import pytest

from benchmarks import performance
from benchmarks.bench_suites import GOALS, SUITES, Job, Suite
from benchmarks.performance import goal_of, measure, page, rows_of, slower
from laconic.core.files import Refusal

SMALL = Suite(
    (("test_vit", 160, (1, 2)),),
    (Job("etps", 0.5, "all"), Job("etps", 0.5, "needed"), Job("tome", None, "all", (("r", 5),))),
    (("rounds", 1), ("threads", 1), ("device", "cpu")),
    eager_attention=True,
)
LABELS = [
    "unreduced",
    "unreduced, class row only",
    "unreduced, attention not fused",
    "etps 0.5",
    "etps, lean 0.5",
    "tome r=5",
]


@pytest.fixture(scope="module")
def found():
    return json.loads(json.dumps(measure(SMALL)))


def test_rows(found):
    assert [(run["pixels"], run["batch_size"]) for run in found["runs"]] == [(160, 1), (160, 2)]
    rows = rows_of(found["runs"][0])
    assert [row.label for row in rows] == LABELS
    base, lean = rows[0], rows[1]
    assert lean.macs < base.macs
    assert rows[3].macs == rows[4].macs  # as published: what is left out does not make a promise smaller
    assert all(row.wall.median > 0 for row in rows)
    assert found["environment"]["threads"] == 1
    assert found["runs"][0]["shares"].keys() == {"etps 0.5", "tome r=5"}
    assert all(0 < part < 1 for part in found["runs"][0]["shares"].values())


def test_page(found):
    text = page({"cpu": found})
    for label in LABELS:
        assert f"| {label} |" in text
    assert "## test_vit, 160 px, batch 2" in text
    assert "goal" in text
    assert "not met" not in text  # goals are of DeiT-S at batch 8


def test_goals():
    rows = rows_of({"rows": [dict(ROW, name="etps, lean", keep=0.7), dict(ROW, name="etps", keep=0.7), dict(ROW, name="x")]})
    assert [goal_of(row) for row in rows] == [1.52, 1.47, None]
    assert GOALS.keys() <= {(job.name, job.keep) for job in SUITES["cpu"].jobs}
    text = performance.section(
        {"model": "deit_small_patch16_224", "pixels": 224, "batch_size": 8, "rows": [dict(ROW, name="etps", keep=0.7)]}, "here"
    )
    assert "1.47 met" in text


def test_what_has_become_slower(found):
    now = copy.deepcopy(found)
    assert slower(found, now) == []
    for row in now["runs"][1]["rows"]:
        if row["name"] == "etps":
            row["wall"] = {name: value * 0.9 for name, value in row["wall"].items()}
    said = slower(found, now)
    assert len(said) == 1
    assert said[0].startswith("test_vit, batch 2, etps 0.5: ")


def test_command(found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    monkeypatch.setattr(performance, "measure", lambda suite: found)
    with pytest.raises(Refusal, match="there is no .*performance-cpu.json to compare with; measure with --run cpu first"):
        performance.main([str(tmp_path / "page.md"), "--check", "cpu"])
    assert performance.main([str(tmp_path / "page.md"), "--run", "cpu"]) == 0
    assert json.loads((tmp_path / "performance-cpu.json").read_text()) == found
    assert "unreduced, class row only" in (tmp_path / "page.md").read_text()
    assert performance.main([str(tmp_path / "page.md"), "--check", "cpu"]) == 0
    assert "nothing has become slower" in capsys.readouterr().out
    slow = copy.deepcopy(found)
    slow["runs"][0]["rows"][3]["wall"] = {"low": 0.01, "median": 0.01, "high": 0.01}
    monkeypatch.setattr(performance, "measure", lambda suite: slow)
    assert performance.main([str(tmp_path / "page.md"), "--check", "cpu"]) == 1
    assert "etps 0.5: 0.01x, committed" in capsys.readouterr().out


TIMES = {"low": 2.0, "median": 2.0, "high": 2.0}
ROW = {
    "name": "etps",
    "kind": "method",
    "keep": None,
    "image": [224, 224],
    "tokens": [196, 138],
    "parameters": 1,
    "macs": 10**9,
    "batch_size": 8,
    "seconds": TIMES,
    "implied": 1.5,
    "wall": TIMES,
    "cpu": TIMES,
}
