"""The page of methods, and what it is made of."""

import json
import re

import pytest
import torch

import laconic
from benchmarks import executions, methods_table
from families import images, make
from laconic.analysis.timing import Setting
from laconic.methods import AvgPool


def test_the_page_has_a_row_for_every_method_and_dashes_where_nothing_was_run(tmp_path):
    rows = [
        {"method": "unreduced", "kind": "top1-0", "top1": 0.845, "images": 2000},
        {"method": "topk", "kind": "top1-0", "top1": 0.6, "images": 2000},
    ]
    results = tmp_path / "methods.jsonl"
    results.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"method": "cut o')
    methods_table.main([str(tmp_path / "page.md"), "--results", str(results), "--page-only"])
    text = (tmp_path / "page.md").read_text()
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(lines) == set(methods_table.own()) == set(laconic.methods())
    assert lines["topk"].endswith("| – | – | – | 60.0 | – |")
    assert "84.5 %" in text
    assert "± 1.6" in text
    (older,) = [line for line in text.splitlines() if "older than the registry" in line]
    assert set(lines) == set(re.findall(r"`([\w+-]+)`", older.partition("measure")[2]))


def test_executions_do_the_same_and_are_compared_with_the_unreduced_model(monkeypatch):
    monkeypatch.setattr(executions, "create", lambda name: make("plain"))
    monkeypatch.setattr(executions, "BLOCK", 1)
    monkeypatch.setattr(executions, "SPREADS", {"wide": (3, 36)})
    noise = images("plain", 4)
    monkeypatch.setattr(executions.torch, "randn", lambda *_, **__: noise)
    found = executions.executions("plain", 4, Setting(rounds=1, threads=1))
    assert found["wide"]["counts"] == [3, 14, 25, 36]
    assert found["wide"]["implied"] > 1
    assert list(found["wide"]["ratios"]) == ["mean for all", "packed", "padded", "masked"]
    text = executions.section(found, 4, 1)
    assert "| wide: 3 to 36 |" in text


def test_equal_budgets_are_equal():
    cell = methods_table.Cell("avg-pool", 1.0, (), 0, 0, "scenes", "leaving")
    other = methods_table.Cell("avg-pool", 1.0, (), 0, 0, "scenes")
    assert cell.key != other.key
    assert AvgPool().counts(laconic.Schedule.keep_counts(methods_table.KEEP_COUNTS), 8, 100)[-1] == 12
    with pytest.raises(ValueError, match="no images"), torch.no_grad():
        laconic.summary(laconic.reduce_(make("plain"), "ats"), images=[])
