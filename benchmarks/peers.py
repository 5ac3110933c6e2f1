"""Compare the speed of tome with the official patch of its authors, and of etps and bat with the unreduced model.

    git clone https://github.com/facebookresearch/ToMe
    python -m benchmarks.peers --tome ToMe --json results/peers-machine-1.json

All rows run in one process and alternate; a row gives the ratio of the unreduced model's CPU time to its own (median and
quartiles over the rounds). DeiT-S with random weights, 224 px, float32, eager, one thread: the speed of methods with constant
token counts does not depend on the weights. Without ``--tome`` the row of the official patch is left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

import timm
import torch
from torch import nn

import laconic
from laconic.analysis import machine
from laconic.analysis.timing import Setting

ROWS: dict[str, dict[str, Any]] = {"etps": {"keep": 0.7}, "bat": {"keep": 0.7}, "tome": {"r": 13}}
WARM_UP = 3  # rounds


def official(base: nn.Module, folder: Path) -> nn.Module:
    """Return a copy of a model with the official patch of ToMe, from a clone of its repository."""
    sys.path.insert(0, str(folder))
    model: Any = copy.deepcopy(base)
    importlib.import_module("tome").patch.timm(model)
    model.r = ROWS["tome"]["r"]
    return model


def seconds(model: nn.Module, images: torch.Tensor) -> float:
    """Run one forward; return its CPU time."""
    start = time.thread_time()
    model(images)
    return time.thread_time() - start


def compare(models: dict[str, nn.Module], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time all models in turns; return one entry a row."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(rounds + WARM_UP):
            for name, model in models.items():
                took = seconds(model, images)
                if turn >= WARM_UP:
                    times[name].append(took)
    rows = []
    for name in models:
        low, median, high = quantiles([a / b for a, b in zip(times["unreduced"], times[name], strict=True)], n=4)
        rows.append({"batch_size": batch, "name": name, "speed": median, "low": low, "high": high})
    return rows


def main() -> None:
    """Compare and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tome", type=Path, help="a clone of the official repository of ToMe")
    parser.add_argument("--rounds", type=int, default=80, help="of batch 1; of batch 8 a quarter of them")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args()
    setting = Setting(rounds=given.rounds, threads=1, device="cpu")
    base = timm.create_model("deit_small_patch16_224").eval()
    models = {"unreduced": base}
    models |= {name: laconic.reduce_(copy.deepcopy(base), name, **options) for name, options in ROWS.items()}
    if given.tome:
        models["tome, official"] = official(base, given.tome)
    with machine.prepared(setting):
        here = machine.environment(setting)
        rows = [row for batch, rounds in ((1, given.rounds), (8, given.rounds // 4)) for row in compare(models, batch, rounds)]
    print(f"{'batch':>5} {'row':<15} {'speed':>6} quartiles")
    for row in rows:
        print(f"{row['batch_size']:>5} {row['name']:<15} {row['speed']:>6.2f} {row['low']:.2f} to {row['high']:.2f}")
    if given.json:
        given.json.write_text(json.dumps({"environment": here, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
