"""``python -m benchmarks.evidence``: test the papers' claims on the generated benchmark. It can be interrupted and resumed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.experiments import store
from benchmarks.experiments.cells import Cell, fingerprint, run
from benchmarks.experiments.claims import CLAIMS, SEEDS, all_cells
from laconic.analysis import machine
from laconic.analysis.timing import Setting
from laconic.cli.app import run as run_command
from laconic.cli.commands import Command
from laconic.cli.output import Report, Table
from laconic.cli.outputs import reported
from laconic.core.files import Refusal, check_output_file, check_output_folder, write_atomically
from laconic.core.suggestions import nearest_names

LOG = logging.getLogger("laconic.evidence")
COMMAND = "python -m benchmarks.evidence"
VERB = Command(
    "Test the papers' claims on the generated benchmark.",
    "benchmarks.evidence:evidence",
    (f"{COMMAND} --claim 7-toy", f"{COMMAND} --share 1/2", f"{COMMAND} --page docs/evidence-scenes.md"),
)


@dataclass(frozen=True)
class EvidenceReport(Report):
    """Report of a run: the number of cells done and missing, and the files written."""

    claims: tuple[str, ...]
    done: int
    missing: int
    results: Path
    page: Path | None

    def parts(self) -> Iterator[str | Table]:
        yield f"{self.done} cells done, {self.missing} to do, for {', '.join(self.claims)}; results in {self.results}."
        yield (
            "Run the command again to continue."
            if self.missing
            else f"All done. {f'The page is {self.page}.' if self.page else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        page = None if self.page is None else str(self.page)
        return {**vars(self), "claims": list(self.claims), "results": str(self.results), "page": page}


def evidence(
    *,
    claim: tuple[str, ...] = (),
    seeds: int = len(SEEDS),
    share: str = "1/1",
    minutes: float = 0.0,
    threads: int = 1,
    output: Path = Path("results/evidence.jsonl"),
    page: Path | None = None,
) -> EvidenceReport:
    """Run the experiments behind docs/evidence-scenes.md. Cells that the results already hold are not run again.

    Args:
        claim: claims to test (default: all): 1-squeezing, 2-bat, 3-random-policy, 4-tps-ablations, 5-diversity, 6-bat-steps,
            7-toy, digits.
        seeds: number of seeds of every fine-tuned cell.
        share: part of the work that this process does, for example 1/2 and 2/2 for two processes.
        minutes: stop after the cell that is running when this time has passed (default: no limit).
        threads: CPU threads of this process.
        output: file of the results, one JSON object per line.
        page: write the page with its tables and plots here, from the results so far.

    Raises:
        Refusal: an unknown claim, an invalid share, or missing weights.
    """
    import time

    import torch

    check_output_folder(output.parent)
    check_output_file(page, "--page")
    torch.set_num_threads(threads)
    wanted = _cells(claim, seeds)
    number, parts = _share(share)
    weights, start = fingerprint(), time.monotonic()
    for cell in tqdm(_mine(wanted, number, parts), desc="cells", unit="cell", disable=None):
        if cell in store.read(output, weights):  # another process may have added it
            continue
        if minutes and time.monotonic() - start > 60 * minutes:
            break
        LOG.info("%s", cell.key)
        store.append(output, run(cell) | {"threads": threads})
    results = store.read(output, weights) if page is None else store.tidy(output, weights)
    missing = sum(cell not in results for cell in wanted)
    report = EvidenceReport(claim or CLAIMS, len(wanted) - missing, missing, output, page)
    if page is not None:
        with reported(report):
            _write_page(page, results, output)
    return report


def _cells(claims: tuple[str, ...], seeds: int) -> list[Cell]:
    for claim in claims:
        if claim not in CLAIMS:
            raise Refusal(f"there is no claim {claim!r}.{nearest_names(claim, CLAIMS)} There are: {', '.join(CLAIMS)}")
    if seeds < 1:
        raise Refusal(f"--seeds must be at least 1, not {seeds}")
    return all_cells(claims or CLAIMS, range(seeds))


def _share(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise Refusal(f"--share {text!r}: expected something like 1/2, the first of two processes")
    return int(number), int(parts)


def _mine(cells: list[Cell], number: int, parts: int) -> list[Cell]:
    return cells[number - 1 :: parts]


def _write_page(page: Path, results: store.Results, source: Path) -> None:
    from benchmarks.experiments.page import write_page

    environment = machine.environment(Setting(threads=1))
    facts = source.with_suffix(".environment.json")
    if not facts.is_file():
        write_atomically(facts, json.dumps(environment, indent=2))
    write_page(page, results, json.loads(facts.read_text()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run_command(COMMAND, VERB, list(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
