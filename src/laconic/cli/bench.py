"""``laconic bench``: measured speed-ups of reduced models on this machine, next to those that multiply-adds imply."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from laconic.analysis import machine
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.timing import Setting
from laconic.api import restore_
from laconic.cli import compare
from laconic.cli.compare import Row, threads
from laconic.cli.exported import Format, check, write
from laconic.cli.models import open_model
from laconic.cli.output import Report, Table
from laconic.cli.outputs import holds, reported
from laconic.cli.variants import (
    ALWAYS,
    Variant,
    alternatives,
    as_reduced,
    class_row_only,
    pairs,
    parse_methods,
    reduced,
    unreduced,
)
from laconic.core.files import Refusal
from laconic.core.token_reduction import find_reduction

LOG = logging.getLogger(__name__)
METHODS = ("etps", "bat")  # measured by default
EXPLAINED = (
    "implied: the unreduced model's multiply-adds divided by this one's. measured: its time, before and after, divided by this "
    "one's, median and quartiles over the rounds. efficiency: measured divided by implied; above 1 where rows that the answer "
    "does not need are not computed. Peak MB: the most that tensors of one forward hold, without weights and images. Class "
    "row only: the unreduced model without those rows, the stronger base. Images are noise, and a model named as in timm has "
    "random weights: neither changes the speed."
)


@dataclass(frozen=True)
class BenchReport(Report):
    """Rows at every batch size, the machine they were measured on, and a verdict."""

    model: str
    rows: tuple[Row, ...]
    environment: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The measurements in words."""
        return compare.verdict(self.rows)

    def parts(self) -> Iterator[str | Table]:
        here = self.environment
        for batch in dict.fromkeys(row.batch_size for row in self.rows):
            of_batch = [row for row in self.rows if row.batch_size == batch]
            yield compare.table(of_batch, f"{self.model}, batch {batch}, {here['rounds']} rounds")
        way = f", exported ({here['exported']})" if "exported" in here else ", compiled" if here["compiled"] else ""
        kind = f"{here['dtype']}{way}"
        yield f"{here['device']}, {threads(here)}, {kind}, torch {here['torch']}, timm {here['timm']}, {here['date']}"
        yield " ".join([EXPLAINED, *(f"{note[0].upper()}{note[1:]}." for note in self.notes)])
        yield f"\n{self.verdict}"

    def to_json(self) -> dict[str, Any]:
        rows = [row.to_json() for row in self.rows]
        facts = {"model": self.model, "environment": self.environment, "notes": list(self.notes)}
        return {**facts, "rows": rows, "verdict": self.verdict}


@holds("output")
def bench(
    model: str,
    /,
    *,
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    options: tuple[str, ...] = (),
    batch_size: tuple[int, ...] = (),
    setting: Setting = Setting(),  # noqa: B008 (it is frozen)
    output: Path | None = None,
    exported: Format | None = None,
) -> BenchReport:
    """Measure reduced models against the unreduced one, interleaved in one process.

    Rows for random pruning, average pooling, a lower input resolution and the next smaller model are always there.

    Args:
        model: timm name, or a directory that laconic.save wrote.
        method: a method to measure (default: etps and bat, or what the directory holds).
        keep: keep rate of every reducing block (default: 0.7).
        options: option of the methods, as NAME=VALUE or METHOD.NAME=VALUE.
        batch_size: images in a batch (default: 8).
        setting: how to measure.
        output: write the rows to this CSV file, in timm's columns, and all of it to a JSON file next to it.
        exported: measure all models as files in ONNX Runtime, in OpenVINO or of torch.export, on the CPU.

    Raises:
        Refusal: no such model, an option that no method has, a file that cannot be written.
        LookupError, TypeError, ValueError, ImportError: as `laconic.reduce_` and `laconic.export`.
    """
    if any(size < 1 for size in batch_size):
        raise Refusal(f"--batch-size must be at least 1, not {min(batch_size)}")
    if output is not None and output.suffix == ".json":
        raise Refusal(f"--output {output}: give the name of a .csv file; the JSON file is written next to it")
    check(exported, setting)
    rows = list[Row]()
    with machine.prepared(setting), TemporaryDirectory(prefix="laconic-") as place:
        LOG.info("reducing copies of %s, and checking each of them", model)
        variants, notes = collect(model, method, keep or (0.7,), options)
        files = None if exported is None else write(variants, exported, Path(place))
        for size in dict.fromkeys(batch_size or (8,)):
            found = compare.compare(variants, size, setting, exported=files)
            rows += found if files is not None else compare.with_peaks(found, variants, setting)
        environment = {**machine.environment(setting), **({} if files is None else files.facts)}
    report = BenchReport(model, tuple(rows), environment, (*notes, *compare.busy(rows)))
    if output is not None:
        with reported(report):
            compare.write_files(output, model, rows, report.to_json())
    return report


def collect(
    name: str, methods: Sequence[str], keeps: Sequence[float], options: Sequence[str]
) -> tuple[list[Variant], list[str]]:
    """Return the unreduced model (with and without unread rows), the model a directory holds, methods, and alternatives."""
    model = open_model(name)
    saved = find_reduction(model)
    base = model if saved is None else restore_(shared_copy(model))
    variants = [row for row in (unreduced("unreduced", base), class_row_only(base)) if row is not None]
    if saved is not None:
        variants.append(as_reduced(f"{saved.config.info.name} as saved", model, None))
    wanted = methods or (METHODS if saved is None else ())
    configs = parse_methods([method for method in dict.fromkeys(wanted) if method not in ALWAYS], options)
    variants += [reduced(base, config, keep) for config, keep in pairs(configs, keeps)]
    others, notes = alternatives(name if saved is None else "", base, list(dict.fromkeys(keeps)))
    return variants + others, notes
