"""``python -m benchmarks.readme``: write the tables of README.md and the demo table of docs/evidence.md.

They come from committed runs of ``laconic demo`` and from the registry of methods.

The runs are made by ``laconic demo --json > results/demo.json`` and
``laconic demo --model deit_small_patch16_224 --rounds 24 --json > results/demo-deit-small.json``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.cli.output import markdown
from laconic.core.files import write_atomically
from laconic.core.method import methods
from laconic.training.token_labels import COVERED

TOP = Path(__file__).parents[1]
RUNS = ("demo", "demo-deit-small")  # the names of the tables in README.md, and of the files in results/
COST = ("", "M params", "GMACs", "patch tokens", "MACs-implied", "**measured**", "(quartiles)")
FATES = ("", "object: kept", "merged", "dropped", "surroundings: kept", "merged", "dropped")


def cost_cells(row: dict[str, Any]) -> list[str]:
    """What a row of a run costs, and how much faster it is."""
    label = row["name"] if row["keep"] is None else f"{row['name']} {row['keep']:g}"
    size = [label, f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:#.4g}", " ".join(map(str, row["tokens"]))]
    if row["kind"] == "base":
        return [*size, "1", "1", ""]
    wall = row["wall"]
    return [*size, f"{row['implied']:.2f}×", f"**{wall['median']:.2f}×**", f"{wall['low']:.2f}-{wall['high']:.2f}"]


def answer_cells(row: dict[str, Any]) -> list[str]:
    """How often a row is right."""
    found, same = row["accuracy"], row["agreement"]["top1"]
    if found is None:
        return ["n/a", "", "n/a"]
    low, high = found["interval"]
    return [f"**{found['top1'] * 100:.1f}**", f"{low * 100:.1f}-{high * 100:.1f}", f"{same * 100:.1f}"]


def fate_cells(row: dict[str, Any]) -> list[str]:
    """What became of the object and of its surroundings."""
    shares = [row["fate"][part][share] for part in ("object", "surroundings") for share in ("kept", "merged", "dropped")]
    return [cost_cells(row)[0], *(f"{share * 100:.0f}" for share in shares)]


def measured_on(run: dict[str, Any]) -> str:
    """What the times of a run are, and where they were measured."""
    here, batch = run["environment"], run["rows"][0]["batch_size"]
    threads = f"{here['threads']} thread{'s' * (here['threads'] != 1)}"
    return (
        f"{here['dtype']}, batch {batch}, {here['rounds']} interleaved rounds, {threads} of {here['device']}, "
        f"torch {here['torch']}, timm {here['timm']}. Measured: the time of the unreduced model, fused attention and all, by "
        "the time of the row, median and quartiles."
    )


def demo_table(run: dict[str, Any]) -> str:
    """A run with labelled images: cost, speed, accuracy; and what became of the object, where that is known."""
    rows = run["rows"]
    first = markdown((*COST, "**top-1 %**", "(95 %)", "agrees %"), [[*cost_cells(row), *answer_cells(row)] for row in rows])
    notes = " ".join(f"{note[0].upper()}{note[1:]}." for note in (run["weights"], *run["notes"]))
    said = (
        f"`laconic demo` on {run['model']} ({run['images']}), {measured_on(run)} (95 %): Wilson's interval. Agrees: the same "
        "answer as the unreduced model's, right or wrong. One backbone for all rows but the smaller model's, nothing "
        f"fine-tuned for a method. **{run['best']}** {notes}"
    )
    known = [row for row in rows if row["fate"] is not None]
    if not known:
        return f"{first}\n\n{said}"
    means = (
        "In % of the patches, at the end. Kept: a token stands in the patch's own place. Merged: a token elsewhere holds it. "
        f"The object's patches are those of which it covers more than {COVERED:.0%}, the others are its surroundings."
    )
    fates = markdown(FATES, [fate_cells(row) for row in known])
    summary = "The scenes know where their object is. How much of it each method keeps, and how much of the rest"
    return f"{first}\n\n{said}\n\n<details><summary>{summary}</summary>\n\n{fates}\n\n{means}\n\n</details>"


def speed_table(run: dict[str, Any]) -> str:
    """A run without labelled images, of which only the speed is told."""
    rows = markdown(COST, [cost_cells(row) for row in run["rows"]])
    command = f"laconic demo --model {run['model']} --rounds {run['environment']['rounds']}"
    weights = run["weights"].partition(":")[0]
    return f"{rows}\n\n`{command}`, {measured_on(run)} Only the speed is shown: {weights}."


def methods_table() -> str:
    """One line a method."""
    yes = {True: "yes", False: "no"}
    rows = [
        (f"`{row.name}`", f"{row.title} ([{row.paper}](https://arxiv.org/abs/{row.paper}))", yes[row.trained], yes[row.learns])
        for row in methods().values()
    ]
    table = markdown(("name", "what it does", "needs training", "adds parameters"), rows)
    return f"{table}\n\n`laconic list` shows the methods of your version."


def filled(text: str, runs: Sequence[dict[str, Any]]) -> str:
    """README.md with its generated parts made anew, from the runs named in `RUNS`."""
    demo, speed = runs
    for name, content in ((RUNS[0], demo_table(demo)), (RUNS[1], speed_table(speed)), ("methods", methods_table())):
        block = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        if not block.search(text):
            raise ValueError(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
        text = block.sub(lambda m, content=content: m[1] + content + m[2], text)  # type: ignore[misc]
    return text


def read_runs() -> list[dict[str, Any]]:
    """The runs that README.md shows."""
    return [json.loads((TOP / "results" / f"{name}.json").read_text()) for name in RUNS]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables into README.md, or into the file named."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    readme = Path(given[0]) if given else TOP / "README.md"
    write_atomically(readme, filled(readme.read_text(), read_runs()))


if __name__ == "__main__":
    main()
