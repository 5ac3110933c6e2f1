"""Measure the choices of `laconic tune` in PyTorch, ONNX Runtime and OpenVINO.

    python -m benchmarks.tuned_exports

For each run of results/tune-*.json the chosen input size and reduction are applied to the model of its command, which is
exported and timed in each runtime in turns with the unreduced model. Repaired parameters are left out: they change the values
of weights, not the graph. Writes results/exports-tuned.json, which benchmarks/tune_page.py shows. It can be interrupted and
resumed: a run that the file holds is not measured again, unless it chose something else since.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.tune_page import EXPORTS, read, runs_of
from laconic.analysis import machine
from laconic.analysis.timing import Setting
from laconic.cli.export import write_all
from laconic.cli.export_speed import measure_formats
from laconic.cli.models import create
from laconic.cli.variants import as_reduced, unreduced
from laconic.core.files import write_atomically
from laconic.core.token_reduction import find_reduction
from laconic.exporting import OPSET, TOLERANCE
from laconic.planning.tuned import Tuned

FORMATS = ("onnx", "openvino")
PIXELS = 8 * 224 * 224  # of a batch


def plain(tuned: Tuned) -> Tuned:
    """Return a result without its repair."""
    rows = tuple(dataclasses.replace(row, repaired=None) for row in tuned.rows)
    return dataclasses.replace(tuned, rows=rows)


def measure(path: Path, setting: Setting) -> dict[str, Any]:
    """Measure the choice of one run; return it with its speeds."""
    fields, tuned = read(path)
    given = {name: json.loads(value) for name, value in (text.split("=", 1) for text in fields["model_args"])}
    base = create(fields["model"], pretrained=True, **given)
    model = plain(tuned).apply(copy.deepcopy(base))
    chosen = tuned.chosen
    own = unreduced(chosen, model) if find_reduction(model) is None else as_reduced(chosen, model, None)
    variants = [unreduced("unreduced", base), own]
    batch = max(1, PIXELS // (tuned.own[0] * tuned.own[1]))
    with TemporaryDirectory(prefix="laconic-") as place:
        _, files = write_all(variants, Path(place), "model", FORMATS, OPSET, TOLERANCE)
        rows = measure_formats(variants, files, FORMATS, batch, setting.rounds, setting.threads or 1)
    return {
        "run": path.stem,
        "chosen": chosen,
        "batch_size": batch,
        "rows": [row.to_json() for row in rows if row.ratio is not None],
    }


def main() -> None:
    """Measure all runs, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    setting = Setting(rounds=given.rounds, threads=1, device="cpu")
    runs = dict[str, dict[str, Any]]()
    if EXPORTS.exists():
        runs = {run["run"]: run for run in json.loads(EXPORTS.read_text())["runs"]}
    for path in runs_of():
        if path.stem not in runs or runs[path.stem]["chosen"] != read(path)[1].chosen:
            with machine.prepared(setting):
                runs[path.stem] = {**measure(path, setting), "environment": machine.environment(setting)}
            ordered = [runs[one.stem] for one in runs_of() if one.stem in runs]
            write_atomically(EXPORTS, json.dumps({"runs": ordered}, indent=1) + "\n")
        for row in runs[path.stem]["rows"]:
            speed, kept = row["ratio"]["median"], row["kept"] or 1
            print(f"{path.stem:<16} {row['runtime']:<14} {speed:.2f}x  kept {kept:.2f}", flush=True)


if __name__ == "__main__":
    main()
