"""``python -m benchmarks.real_model``: the evidence on a pretrained model. It can be interrupted and resumed."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.real_model import measure, rows, sets
from benchmarks.real_model.rows import Row
from laconic.core.files import append_line, json_lines
from laconic.core.locks import locked_file

LOG = logging.getLogger(__name__)
OUTPUT = Path("results/real-model.jsonl")
PLANS: dict[str, tuple[tuple[str, ...], tuple[Row, ...]]] = {
    "object": (("large-many",), rows.few()),
    "regions": (("regions",), rows.few()),
    "answer": (("views",), (*rows.every_method(), *rows.late_merging(), *rows.few())),
    "settings": (("medium", "three-things", "five-grounds"), rows.fewest()),
    "small": (("small",), rows.small()),
    "sites": (("large",), rows.late_selection()),
    "methods": (("large",), rows.every_method((0.5,))),
    "large-input": (("views-518",), rows.large_input()),
    "before": (("views",), (*rows.before_blocks(), *itertools.chain(*rows.exponents().values()))),
    "before-518": (("views-518",), rows.before_blocks(rows.LARGE, rows.LARGE_SMALLER)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows of one or more plans on their sets of pictures, skipping those that the results hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="+", choices=PLANS, help="groups of rows and pictures")
    parser.add_argument("--packages", type=Path, help="folder in which the packages of the cutouts are unpacked")
    parser.add_argument("--share", default="1/1", help="part of the work of this process, for example 1/2")
    parser.add_argument("--minutes", type=float, default=0, help="stop after this time (default: no limit)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the results, one JSON object per line")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    sets.PACKAGES = args.packages
    work = [(row, name) for plan in args.plans for name in PLANS[plan][0] for row in PLANS[plan][1]]
    number, parts = map(int, args.share.split("/"))
    work, start = list(dict.fromkeys(work))[number - 1 :: parts], time.monotonic()
    for row, name in work:
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            LOG.info("stopped after %g minutes; run the command again to continue", args.minutes)
            return 0
        if any(line["row"] == row.key and line["set"] == name for line in json_lines(args.output)):
            continue
        result = measure.run(row, name)
        with locked_file(args.output, wait=60.0):
            append_line(args.output, json.dumps(result))
        LOG.info("%s: %s, %.0f s", name, row.key, result["seconds"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
