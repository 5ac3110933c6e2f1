"""The experiments: what is counted, and that a run goes on where it was stopped. No timings, no trained weights needed."""

import json
import math
import random
import statistics

import pytest
import torch

from benchmarks.evidence import evidence, main
from benchmarks.experiments import cells, store
from benchmarks.experiments.cells import Cell
from benchmarks.experiments.claims import CLAIMS, STEPS, all_cells
from benchmarks.experiments.statistics import accuracy, difference
from benchmarks.experiments.tables import NONE, TABLES, Reader, signed
from laconic.core.files import Refusal


def outcomes(seed, share, count=400):
    draw = random.Random(seed)
    return [int(draw.random() < share) for _ in range(count)]


def test_outcomes_are_packed_and_unpacked():
    for start in (0, 1):  # leading zeros count too
        bits = [start, 0, 0, 1, 1, 1, 0, 1]
        assert cells.unpacked(cells._packed(torch.tensor(bits, dtype=torch.bool))) == bits


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for trial in range(300):
        estimate = accuracy([outcomes(3 * trial + seed, 0.8) for seed in range(3)])
        hits += abs(estimate.mean - 80) <= estimate.half
    assert hits >= 280  # 95 %, and never too narrow: both sources of variation are counted
    one = accuracy([outcomes(0, 0.8)])
    assert one.half == pytest.approx(196 * math.sqrt(statistics.variance(outcomes(0, 0.8)) / 400))


def test_differences_are_paired():
    run = outcomes(1, 0.6)
    better = [max(bit, int(index % 20 == 0)) for index, bit in enumerate(run)]
    gap = difference([better], [run])
    assert gap.mean == pytest.approx(100 * (sum(better) - sum(run)) / 400)
    assert gap.half < accuracy([run]).half / 2  # the same pictures: far narrower than either
    assert gap.clear
    assert signed(gap).startswith("**+")
    assert not difference([run], [run]).clear


def test_every_claim_has_cells_a_table_and_comparisons():
    assert set(TABLES) == set(CLAIMS)
    for claim in CLAIMS[:-1]:  # the last one is the sanity row
        methods = {cell.method for cell in all_cells((claim,))}
        assert {"unreduced", "smaller", "random", "avg-pool", "resolution"} <= methods
    every = all_cells()
    assert len(every) == len(set(every))
    sweep = [cell.seed for cell in every if cell.steps == STEPS and not cell.options and cell.data == "scenes"]
    assert sweep == sorted(sweep)  # all of one seed before the next


def result(cell, share=0.5):
    bits = torch.tensor(outcomes(hash(cell.key) % 1000, share), dtype=torch.bool)
    row = {"method": cell.method, "keep": cell.keep, "options": dict(cell.options), "steps": cell.steps, "seed": cell.seed}
    row["data"] = cell.data
    measures = {"diversity": 0.5, "object_own": 0.5, "surroundings_own": 0.2, "object_held": 1.0, "surroundings_held": 1.0}
    facts = {"weights": "w", "macs": 1_000_000, "top1": share, "correct": cells._packed(bits), "random_policy": [0.4, 0.3, 0.2]}
    return row | measures | facts


def test_tables_hold_what_the_results_say():
    results = {cell: result(cell) for cell in all_cells()}
    for table in TABLES.values():
        text = table(Reader(results))
        assert NONE not in text
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")} - {0}) <= 2
    assert "-" not in TABLES["3-random-policy"](Reader(results)).splitlines()[2]
    assert "20.0" in TABLES["3-random-policy"](Reader(results))  # 50 % less 30 %
    own = accuracy([cells.unpacked(results[Cell("bat", 0.3, (), STEPS, seed)]["correct"]) for seed in range(3)])
    assert str(own) in TABLES["2-bat"](Reader(results))


def test_tables_say_what_is_missing():
    for table in TABLES.values():
        assert NONE in table(Reader({}))


def test_results_survive_a_torn_line_and_other_weights(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second, third = (Cell("etps", keep) for keep in (0.9, 0.7, 0.5))
    store.append(path, result(first))
    path.write_text(path.read_text() + '{"method": "bat", "ke')  # killed in the middle of a line
    store.append(path, result(second))
    store.append(path, result(third) | {"weights": "other"})
    assert set(store.read(path, "w")) == {first, second}
    store.tidy(path, "w")
    assert [json.loads(line)["keep"] for line in path.read_text().splitlines()] == [0.9, 0.7]


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.evidence.fingerprint", lambda: "w")
    asked = []

    def run(cell):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(cell)
        return result(cell)

    monkeypatch.setattr("benchmarks.evidence.run", run)
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evidence(claim=("7-toy",), output=path)
    first = list(asked)
    monkeypatch.setattr("benchmarks.evidence.run", lambda cell: (asked.append(cell), result(cell))[1])
    for share in ("1/2", "2/2"):
        report = evidence(claim=("7-toy",), output=path, share=share)
    assert report.missing == 0
    assert len(asked) == len(set(asked)) == report.done
    assert asked[:5] == first


def test_refusals(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.evidence.fingerprint", lambda: "w")
    with pytest.raises(Refusal, match="no claim '7'"):
        evidence(claim=("7",), output=tmp_path / "r.jsonl")
    with pytest.raises(Refusal, match="expected something like 1/2"):
        evidence(share="3/2", output=tmp_path / "r.jsonl")
    with pytest.raises(Refusal, match="at least 1"):
        evidence(seeds=0, output=tmp_path / "r.jsonl")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.evidence.fingerprint", lambda: "w")
    monkeypatch.setattr("benchmarks.evidence.run", result)
    words = ["--claim", "7-toy", "--minutes", "1e-9", "--output", str(tmp_path / "r.jsonl")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] in (0, 1)
    assert main(["--claim", "7"]) == 1
    assert "7-toy" in capsys.readouterr().err
    assert main(["--nothing"]) == 2


def test_the_others_are_what_the_attended_are_not():
    import timm

    import laconic
    import laconic.models
    from benchmarks.experiments.least_attended import split_once

    torch.manual_seed(0)
    model = timm.create_model("scenes_vit_tiny").eval()
    pixels, places = torch.randn(2, 3, 40, 40), []
    for others in (False, True):
        reduced = split_once(model, 0.3, others=others)
        reduced(pixels)
        places.append(laconic.provenance(reduced).final.kept)
        laconic.restore_(reduced)
    for kept, rest in zip(*places, strict=True):
        assert len(kept) == 30
        assert sorted([*kept.tolist(), *rest.tolist()]) == list(range(100))
