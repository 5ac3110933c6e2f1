"""Peak memory as operations make and free it, and the page of growth."""

import json
import sys

import pytest
import torch

from benchmarks import scaling
from laconic.analysis.memory import peak_bytes

MB = 4 * 1000 * 1000


def test_what_is_alive_at_a_time_is_counted():
    def freed():
        x = torch.zeros(1000, 1000)
        for _ in range(10):
            x = x + 1
        return x

    def kept():
        return [torch.zeros(1000, 1000) + i for i in range(3)]

    def viewed():
        x = torch.zeros(1000, 1000).view(-1)  # the storage goes on in a view
        return x[10:] + 1

    given = torch.zeros(1000, 1000)
    assert peak_bytes(freed) == 2 * MB
    assert peak_bytes(kept) == 4 * MB
    assert peak_bytes(viewed) == 2 * MB - 40
    assert peak_bytes(lambda: given.view(-1).add_(1)) == 0  # not new


@pytest.mark.parametrize("method", [m for m in scaling.METHODS if m != "kmeans"])
def test_memory_grows_with_the_number_of_tokens_and_not_its_square(method, monkeypatch):
    monkeypatch.setattr("laconic.core.gather.WHOLE", 1 << 14)
    monkeypatch.setattr("laconic.core.gather.ROWS", 32)  # so that already the small ones are made in several blocks
    monkeypatch.setattr(sys.modules["laconic.methods.ops.nearest"], "WINDOW", 8)  # the function of that name hides the module
    small, large = (peak_bytes(scaling.reduction(method, side, 16, 2)) for side in (24, 48))
    assert large < 5.2 * small  # four times as many tokens; a matrix of pairs would be 16 times as large


def test_page(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path / "scaling.json")
    monkeypatch.setattr(scaling, "ENOUGH", 0.0)
    monkeypatch.setattr(scaling, "WIDTHS", ((32, 2), (64, 2)))
    monkeypatch.setattr(scaling, "SIDES", (8, 12))
    found = scaling.measure((8, 12))
    assert len(found["rows"]) == 2 * 2 * len(scaling.METHODS)
    (tmp_path / "scaling.json").write_text(json.dumps(found))
    scaling.main([str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    for part in ("## Time, 32 channels", "## Memory, 64 channels", "| N = | 64 | 144 | growth |", "| `dpc-knn` |"):
        assert part in text


def test_growth_and_the_point_where_it_does_not_pay():
    rows = [
        {"method": "topk", "dim": dim, "patches": n, "seconds": share, "spared": 1.0, "bytes": 1000 * n**power}
        for dim, power in ((384, 1), (1024, 2))
        for n, share in ((100, 0.5), (200, 1.5))
    ]
    text = scaling.page({"environment": {"device": "d", "torch": "t", "date": "2026-01-01T"}, "rows": rows})
    assert "| `topk` | 50 % | 150 % |" in text
    assert "| `topk` | 0.1 | 0.2 | 1.00 |" in text
    assert "| `topk` | 10.0 | 40.0 | 2.00 |" in text
    assert "`topk` from N = 200." in text
