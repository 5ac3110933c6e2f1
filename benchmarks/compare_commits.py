"""Compare the speed of two commits: forwards of both alternate in one run, each timed against its own unreduced model.

    python benchmarks/compare_commits.py a8dbe28 HEAD --json results/compare-commits.json

Each commit is checked out under a temporary directory and runs in a worker process of its own; the workers take turns, so
that both meet the same load. A row gives the speed-up over the unreduced model of each commit (median and quartiles of the
ratios of CPU times of forwards that follow each other) and the ratio of the two commits' times.

``sliced`` is a bound, not a method: the first tokens are kept, without any scores, at the blocks where the keep rate 0.7
reduces. No method that keeps as many tokens, and computes all rows of the last block, can be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

ROWS = {"etps": {"keep": 0.7}, "bat": {"keep": 0.7}, "evit": {"keep": 0.7}, "topk": {"keep": 0.7}, "tome": {"r": 13}}
SLICED = {3: 138, 6: 97, 9: 68}  # patch tokens that the keep rate 0.7 leaves of 196

WORKER = """
import copy, sys, time, timm, torch, laconic
torch.set_num_threads(1)
rows, sliced, batch = eval(sys.argv[1]), eval(sys.argv[2]), int(sys.argv[3])
base = timm.create_model("deit_small_patch16_224").eval()
def cut(model):
    for index, count in sliced.items():
        def forward(x, attn_mask=None, is_causal=False, block=model.blocks[index], count=count):
            x = (x + block.attn(block.norm1(x)))[:, : count + 1].contiguous()
            return x + block.mlp(block.norm2(x))
        model.blocks[index].forward = forward
    return model
models = {"unreduced": base, "sliced": cut(copy.deepcopy(base))}
models |= {name: laconic.reduce_(copy.deepcopy(base), name, **options) for name, options in rows.items()}
x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    for line in sys.stdin:
        start = time.thread_time()
        models[line.strip()](x)
        print("took", time.thread_time() - start, flush=True)
"""


class Worker:
    """A process that runs forwards of the models of one commit when it is asked to."""

    def __init__(self, source: Path, batch: int) -> None:
        command = [sys.executable, "-c", WORKER, repr(ROWS), repr(SLICED), str(batch)]
        environment = {**os.environ, "PYTHONPATH": str(source / "src")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def seconds(self, name: str) -> float:
        """Run one forward; return its CPU time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("took "):
                return float(line.split()[1])
        raise RuntimeError(f"a worker stopped with exit code {self.process.wait()}")

    def stop(self) -> None:
        """End the process."""
        self.process.communicate()


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, median, high = quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def compare(sources: dict[str, Path], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time all rows of both commits, in turns; return one entry a row."""
    workers = {commit: Worker(source, batch) for commit, source in sources.items()}
    names = ["unreduced", "sliced", *ROWS]
    times: dict[tuple[str, str], list[float]] = {(commit, name): [] for commit in workers for name in names}
    for turn in range(rounds + 2):
        for name in names:
            for commit, worker in workers.items():
                seconds = worker.seconds(name)
                if turn >= 2:  # two rounds to warm up
                    times[commit, name].append(seconds)
        print(f"\rbatch {batch}: round {max(0, turn - 1)} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for worker in workers.values():
        worker.stop()
    old, new = workers
    rows = []
    for name in names[1:]:
        row: dict[str, Any] = {"batch_size": batch, "name": name}
        for label, commit in (("old", old), ("new", new)):
            both = zip(times[commit, "unreduced"], times[commit, name], strict=True)
            row[label] = spread([base / reduced for base, reduced in both])
        row["old_by_new"] = spread([a / b for a, b in zip(times[old, name], times[new, name], strict=True)])
        rows.append(row)
    return rows


def main() -> None:
    """Compare two commits and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--batch-size", type=int, action="append", help="1 and 8 unless given")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for commit in (given.old, given.new):
            name = subprocess.run(["git", "rev-parse", "--short", commit], capture_output=True, text=True, check=True).stdout
            sources[name.strip()] = Path(folder) / name.strip()
            archive = subprocess.run(["git", "archive", commit], capture_output=True, check=True).stdout
            sources[name.strip()].mkdir()
            subprocess.run(["tar", "-x", "-C", str(sources[name.strip()])], input=archive, check=True)
        rows = [row for batch in given.batch_size or (1, 8) for row in compare(sources, batch, given.rounds)]
    print(f"{'batch':>5} {'row':<8} {next(iter(sources)):>18} {list(sources)[1]:>18} {'old / new time':>20}")
    for row in rows:
        cells = [f"{row[k]['median']:.2f} [{row[k]['low']:.2f}, {row[k]['high']:.2f}]" for k in ("old", "new", "old_by_new")]
        print(f"{row['batch_size']:>5} {row['name']:<8} {cells[0]:>18} {cells[1]:>18} {cells[2]:>20}")
    if given.json:
        environment = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine(), "threads": 1}
        found = {"commits": list(sources), "rounds": given.rounds, "environment": environment, "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
