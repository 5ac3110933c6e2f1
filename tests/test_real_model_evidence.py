"""The measures and comparisons behind the evidence on the pretrained model."""

import itertools
import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from benchmarks.real_model import rows
from benchmarks.real_model.compare import Results, estimate
from benchmarks.real_model.measure import object_auc, packed, retrieval, unpacked
from benchmarks.real_model.rows import BASE, Row
from laconic.core.schedule import of_the_initial


def test_hits_survive_packing():
    hits = np.random.default_rng(0).random(37) < 0.5
    assert (unpacked(packed(hits), 37) == hits).all()


def test_retrieval_finds_instances_and_categories():
    """Instances 0-3 and 4-7 are two categories, far apart; instances are near each other inside of a category."""
    draw = np.random.default_rng(0)
    centre = np.repeat(np.eye(2, 16), 4, axis=0) * 10
    instance = centre + draw.normal(size=(8, 16))
    views = np.concatenate([instance + 0.01 * draw.normal(size=(8, 16)) for _ in range(4)]).astype(np.float32)
    categories = [0] * 4 + [1] * 4
    found = retrieval(views, 8, categories * 4)
    for measure in ("hits", "category_hits", "probe_hits"):
        assert unpacked(found[measure], 24).all(), measure
    swapped = views.copy()
    swapped[[8, 9]] = views[[9, 8]]  # two queries show the other instance
    hits = unpacked(retrieval(swapped, 8, categories * 4)["hits"], 24)
    assert hits.tolist() == [False, False] + [True] * 22


def test_the_probe_knows_no_instance_of_its_test_half():
    """Features that tell instances apart and say nothing about categories give chance, not one."""
    draw = np.random.default_rng(0)
    instance = draw.normal(size=(40, 64))
    views = np.concatenate([instance] * 3).astype(np.float32)
    found = retrieval(views, 40, ([0] * 20 + [1] * 20) * 3)
    assert unpacked(found["hits"], 80).all()
    assert unpacked(found["probe_hits"], 80).mean() < 0.8


def test_object_auc():
    mask = torch.zeros(2, 56, 56)
    mask[:, :20, :20] = 1
    maps = torch.stack([mask[0], 1 - mask[1]]) + torch.linspace(0, 1e-3, 56 * 56).view(56, 56)
    assert object_auc(maps, mask.bool()).tolist() == [1.0, 0.0]


def test_rows_have_unique_names_and_valid_schedules():
    every = {*rows.every_method(), *rows.late_merging(), *rows.late_selection(), *rows.few(), *rows.large_input()}
    assert len({row.key for row in every}) == len(every)
    late = Row(182, "tome", total=0.25, at=(4, 5, 6, 7, 8, 9))
    counts = late.schedule().counts(12, 169, of_the_initial)
    assert counts[-1] == 42
    assert counts[3] == 169
    assert all(a >= b for a, b in itertools.pairwise(counts))


@pytest.fixture
def results(tmp_path):
    def line(row, hits):
        return {"row": row, "set": "s", "queries": 1, "instances": len(hits), "hits": packed(np.array(hits, bool))}

    draw = np.random.default_rng(1)
    base = draw.random(400) < 0.5
    lines = [
        line(BASE.key, base),
        line("input 168", base & (draw.random(400) < 0.5)),
        line("etps", base | (draw.random(400) < 0.2)),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    speed = tmp_path / "speed.json"
    wall = {"input 168": 2.0, "etps": 4 / 3}  # in time 0.5 and 0.75: half way between the unreduced model and the smaller input
    speed.write_text(json.dumps({BASE.key: {"rows": {name: {"wall": [v, v, v]} for name, v in wall.items()}}}))
    return Results.read(path, speed)


def test_a_smaller_input_is_interpolated_to_equal_time(results):
    base, small, own = (results.values("s", name, "hits") for name in (BASE.key, "input 168", "etps"))
    found = results.over_smaller_input("s", "etps", "hits")
    assert found == estimate(own - (base + small) / 2)
    assert found.clear


def test_no_comparison_outside_of_the_measured_sizes(results):
    results.speed["etps"] = (3.0, 3.0, 3.0)
    assert results.over_smaller_input("s", "etps", "hits") is None
    assert results.values("s", "absent", "hits") is None


def test_estimates_leave_out_nan():
    assert estimate(np.array([1.0, np.nan, 3.0])).mean == 2
