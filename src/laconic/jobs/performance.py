"""``python -m laconic.jobs.performance``: docs/performance.md, how much of what the multiply-adds promise is delivered.

``--run`` measures a suite and writes it to results/; without it the page is made of what is there. ``--check`` measures
the suite again and says whether any row has become slower than the committed run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.compression import Rows
from laconic.jobs import compare, machine
from laconic.jobs.compare import Row
from laconic.jobs.measure import Quartiles, Setting
from laconic.jobs.models import create
from laconic.jobs.output import Refusal, markdown, write_atomically
from laconic.jobs.shares import share
from laconic.jobs.variants import Variant, class_row_only, reduced, unreduced
from laconic.reducer import resolve

RESULTS = Path("results")
SLACK = 0.05  # of a ratio: how much slower than the committed run a row may be, beyond both runs' quartiles
# what performance.md of the project's first plans asked for at batch 8: (method, keep) -> plain, without rows nobody needs
GOALS: dict[tuple[str, float | None], tuple[float | None, float | None]] = {
    ("topk", 0.7): (None, 1.54),
    ("evit", 0.7): (1.48, 1.54),
    ("etps", 0.7): (1.47, 1.52),
    ("dtps", 0.7): (1.48, None),
    ("bat", 0.7): (1.47, 1.52),
    ("tome r=13", None): (1.60, None),
    ("evit", 0.5): (1.94, None),
    ("etps", 0.5): (1.93, None),
    ("bat", 0.5): (1.91, None),
}


@dataclass(frozen=True)
class Job:
    """A method at a keep rate (or with options that say how much), with all rows or with those needed."""

    method: str
    keep: float | None
    rows: Rows
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The method with its options, as a row is called (which says ``lean`` where rows are left out)."""
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.options)])

    def variant(self, model: nn.Module) -> Variant:
        """The row."""
        made = reduced(model, resolve(self.method, dict(self.options)), self.keep, rows=self.rows)
        return dataclasses.replace(made, name=f"{self.name}{', lean' if self.rows == 'needed' else ''}")


@dataclass(frozen=True)
class Suite:
    """What is measured together: models with their input sizes, batch sizes and jobs."""

    models: tuple[tuple[str, int, tuple[int, ...]], ...]  # timm name, pixels, batch sizes
    jobs: tuple[Job, ...]
    how: tuple[tuple[str, Any], ...]  # the setting
    eager_attention: bool = False  # is the unreduced model with attention that is not fused a row?

    @property
    def setting(self) -> Setting:
        """How to measure.

        Raises:
            ValueError: on a device that is not there.
        """
        return Setting(**dict(self.how))


def _jobs(*methods: str, keeps: Sequence[float], rows: Sequence[Rows]) -> list[Job]:
    return [Job(method, keep, which) for method in methods for keep in keeps for which in rows]


_CPU = [
    *_jobs("topk", "evit", "etps", "dtps", "bat", keeps=(0.7,), rows=("all", "needed")),
    *_jobs("topk", "evit", "etps", "dtps", "bat", keeps=(0.5,), rows=("all", "needed")),
    *(Job("tome", None, "all", (("r", r),)) for r in (13, 16)),
]
_GPU = _jobs("topk", "evit", "etps", "bat", keeps=(0.7,), rows=("needed",))
SUITES = {
    "cpu": Suite((("deit_small_patch16_224", 224, (8, 1)),), tuple(_CPU), (("rounds", 12), ("threads", 1))),
    # not measured by us yet: no machine with a GPU was at hand
    "gpu": Suite(
        (
            ("deit_small_patch16_224", 224, (1, 256)),
            ("deit_base_patch16_224", 224, (1, 256)),
            ("vit_large_patch16_224", 224, (1, 256)),
            ("vit_large_patch14_dinov2", 518, (1, 32)),
            ("vit_large_patch16_224", 1024, (1, 8)),
        ),
        (*_GPU, Job("tome", None, "needed", (("r", 13),))),
        (("rounds", 20), ("device", "cuda"), ("dtype", "bfloat16"), ("compile", True)),
        eager_attention=True,
    ),
}


def variants(name: str, pixels: int, suite: Suite) -> list[Variant]:
    """The unreduced model first, then as the stronger base, with attention that is not fused, and reduced."""
    model = create(name, img_size=pixels)
    rows = [unreduced("unreduced", model), class_row_only(model)]
    if suite.eager_attention:
        eager: Any = create(name, img_size=pixels)
        for block in eager.blocks:
            block.attn.fused_attn = False
        rows.append(unreduced("unreduced, attention not fused", eager, "plain"))
    return [row for row in rows if row is not None] + [job.variant(model) for job in suite.jobs]


def measure(suite: Suite) -> dict[str, Any]:
    """Everything, as plain JSON."""
    found = []
    with machine.prepared(suite.setting):
        for name, pixels, batches in suite.models:
            for batch in batches:
                made = variants(name, pixels, suite)
                rows = compare.compare(made, batch, suite.setting)
                found.append({"model": name, "pixels": pixels, "batch_size": batch, "rows": [row.to_json() for row in rows]})
                if suite.setting.place.type == "cpu":
                    noise = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
                    whole = [v for v in made if v.kind == "method" and ", lean" not in v.name]
                    found[-1]["shares"] = {v.label: share(v.model, noise) for v in whole}
                for note in compare.busy(rows):
                    print(note, file=sys.stderr)
        return {"environment": machine.environment(suite.setting), "runs": found}


def rows_of(run: dict[str, Any]) -> list[Row]:
    """The rows of a run that was read from a file."""
    out = []
    for row in run["rows"]:
        fields = {field.name: row[field.name] for field in dataclasses.fields(Row)}
        for name in ("seconds", "wall", "cpu"):
            fields[name] = Quartiles(**fields[name])
        out.append(Row(**{**fields, "image": tuple(fields["image"]), "tokens": tuple(fields["tokens"])}))
    return out


# ------------------------------------------------------------------------------------------------ the page
HEAD = """# How much of the promise is delivered

Generated by `make bench` from `results/performance-*.json`; do not edit.

*implied* is what the multiply-adds promise: those of the unreduced model by those of the method as published. *measured* is
the time of the same model unreduced, with timm's fused attention, by the time of the row, interleaved in one process: median
(quartiles). *efficiency* is measured by implied; *reducer* is the share of the forward's CPU time that choosing and merging
take. *lean* rows leave out what the answer does not need, exactly, and so does *class row only*, the stronger base: the last
block is worked out for the class token alone, and where a method only drops tokens those are no queries. So `laconic.reduce_`
runs by default; the other rows have `rows="all"`. A *goal* is the project's own. Weights are
random: they do not change the speed.
"""


def page(results: dict[str, dict[str, Any]]) -> str:
    """All suites that there are results of."""
    parts = [HEAD]
    for found in results.values():
        here = found["environment"]
        kind = f"{here['dtype']}{', compiled' if here['compiled'] else ', eager'}"
        where = f"{here['device']}, {compare.threads(here)}, {kind}, torch {here['torch']}, timm {here['timm']}"
        parts += [section(run, f"{where}, {here['rounds']} rounds, {here['date'][:10]}") for run in found["runs"]]
    return "\n".join(parts)


def section(run: dict[str, Any], where: str) -> str:
    """The table of one model at one batch size."""
    header = ["", "GMACs", "implied", "measured", "(quartiles)", "CPU time", "efficiency", "images/s", "reducer", "goal"]
    rows = []
    for row in rows_of(run):
        cells: list[str | None] = [row.label, f"{row.macs / 1e9:.3f}"]
        if row.kind == "base":
            rows.append([*cells, "1", "1", "", "1", "", f"{row.images_per_second:.1f}", "", ""])
            continue
        part = run.get("shares", {}).get(row.label)
        goal = goal_of(row) if run["batch_size"] == 8 and run["model"] == "deit_small_patch16_224" else None
        met = "" if goal is None else f"{goal:.2f} {'met' if row.wall.median >= goal else 'not met'}"
        ratios = [f"**{row.wall.median:.2f}×**", f"{row.wall.low:.2f}-{row.wall.high:.2f}", f"{row.cpu.median:.2f}×"]
        rows.append([*cells, f"{row.implied:.2f}×", *ratios, f"{row.efficiency:.2f}", f"{row.images_per_second:.1f}"])
        rows[-1] += ["" if part is None else f"{100 * part:.1f} %", met]
    title = f"## {run['model']}, {run['pixels']} px, batch {run['batch_size']}"
    return f"{title}\n\n{where}.\n\n{markdown(header, rows)}\n"


def goal_of(row: Row) -> float | None:
    """What was asked for of a row."""
    name, comma, _ = row.name.partition(", lean")
    return GOALS.get((name, row.keep), (None, None))[bool(comma)]


def slower(committed: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has become slower: rows whose best quartile lies below the committed worst one, and by more than `SLACK`."""
    said = []
    for before, after in zip(committed["runs"], now["runs"], strict=True):
        found = {row.label: row for row in rows_of(after)}
        for old in rows_of(before):
            new = found.get(old.label)
            if new is not None and new.wall.high < old.wall.low * (1 - SLACK):
                ratios = f"{new.wall.median:.2f}x, committed {old.wall.median:.2f}x"
                said.append(f"{before['model']}, batch {before['batch_size']}, {old.label}: {ratios}")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, after a measurement if asked; with ``--check`` 1 if something has become slower."""
    parser = argparse.ArgumentParser(prog="python -m laconic.jobs.performance", description=__doc__)
    parser.add_argument("path", type=Path, help="the Markdown file to write, e.g. docs/performance.md")
    parser.add_argument("--run", choices=tuple(SUITES), help="measure this suite first")
    parser.add_argument("--check", choices=tuple(SUITES), help="measure this suite, and compare with the committed run")
    given = parser.parse_args(arguments)
    paths = {name: RESULTS / f"performance-{name}.json" for name in SUITES}
    if given.run:
        write_atomically(paths[given.run], json.dumps(measure(SUITES[given.run]), indent=1) + "\n")
    read = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    if given.check:
        if given.check not in read:
            raise Refusal(f"there is no {paths[given.check]} to compare with; measure with --run {given.check} first")
        said = slower(read[given.check], measure(SUITES[given.check]))
        print("\n".join(said) if said else "nothing has become slower")
        return 1 if said else 0
    write_atomically(given.path, page(read))
    return 0


if __name__ == "__main__":
    sys.exit(main())
