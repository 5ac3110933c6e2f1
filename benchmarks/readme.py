"""``python -m benchmarks.readme``: write the tables of README.md and the demo table of docs/evidence-scenes.md.

They come from the registry of methods and from committed runs of ``laconic demo``, made on an idle machine by
``laconic demo --rounds 6 --json > results/demo.json``,
``laconic demo --model scenes_vit_small --json > results/demo-scenes.json`` and
``laconic demo --model deit_small_patch16_224 --rounds 24 --json > results/demo-deit-small.json``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.cli.demo_photographs import OWN
from laconic.cli.output import markdown
from laconic.core.files import write_atomically
from laconic.core.method import methods
from laconic.training.token_labels import COVERED

TOP = Path(__file__).parents[1]
RUNS = ("demo", "demo-scenes", "demo-deit-small")  # the names of the tables, and of the files in results/
PAGES = {  # tables of each page
    "README.md": ("demo", "methods"),
    "docs/evidence-scenes.md": ("demo-scenes",),
    "docs/guide.md": ("demo-deit-small",),
}
SHOWN = (
    "etps 0.7",
    "bat 0.7",
    "tome 0.7",
    "atc 0.7",
    "etps 0.5",
    "bat 0.5",
    "tome 0.5",
    "atc 0.5",
    "random 0.5",
)  # in README.md, besides laconic's own method
FIDELITY = (
    "",
    "GMACs",
    "**measured**",
    "(quartiles)",
    "class token",
    "patches",
    "saliency map",
    "class token, over a smaller input",
)
COST = ("", "M params", "GMACs", "patch tokens", "MACs-implied", "**measured**", "(quartiles)")
FATES = ("", "object: kept", "merged", "dropped", "background: kept", "merged", "dropped")


def cost_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells for the cost and the speed-up of a row."""
    label = row["name"] if row["keep"] is None else f"{row['name']} {row['keep']:g}"
    size = [label, f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:#.4g}", " ".join(map(str, row["tokens"]))]
    if row["kind"] == "base":
        return [*size, "1", "1", ""]
    wall = row["wall"]
    return [*size, f"{row['implied']:.2f}×", f"**{wall['median']:.2f}×**", f"{wall['low']:.2f}-{wall['high']:.2f}"]


def answer_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells for the accuracy of a row."""
    found, same = row["accuracy"], row["agreement"]["top1"]
    if found is None:
        return ["n/a", "", "n/a"]
    low, high = found["interval"]
    return [f"**{found['top1'] * 100:.1f}**", f"{low * 100:.1f}-{high * 100:.1f}", f"{same * 100:.1f}"]


def fate_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells for the shares of object and background patches that were kept, merged and dropped."""
    shares = [row["fate"][part][share] for part in ("object", "surroundings") for share in ("kept", "merged", "dropped")]
    return [cost_cells(row)[0], *(f"{share * 100:.0f}" for share in shares)]


def measured_on(run: dict[str, Any]) -> str:
    """Return a sentence on how and on which machine the times of a run were measured."""
    here, batch = run["environment"], run["rows"][0]["batch_size"]
    threads = f"{here['threads']} thread{'s' * (here['threads'] != 1)}"
    return (
        f"{here['dtype']}, batch {batch}, {here['rounds']} interleaved rounds, {threads} of {here['device']}, "
        f"torch {here['torch']}, timm {here['timm']}. Measured: time of the unreduced model with fused attention divided by "
        "the time of the row, median and quartiles."
    )


def demo_table(run: dict[str, Any]) -> str:
    """Return the table of a run with labelled images: cost, speed, accuracy, and the shares of the object if it is known."""
    rows = run["rows"]
    first = markdown((*COST, "**top-1 %**", "(95 %)", "agrees %"), [[*cost_cells(row), *answer_cells(row)] for row in rows])
    notes = " ".join(f"{note[0].upper()}{note[1:]}." for note in (run["weights"], *run["notes"]))
    said = (
        f"`laconic demo --model {run['model']}` ({run['images']}), {measured_on(run)} (95 %): Wilson's interval. Agrees: same "
        "prediction as the unreduced model. All rows but that of the smaller model have the same backbone, which is not "
        f"fine-tuned for any method. **{run['best']}** {notes}"
    )
    known = [row for row in rows if row["fate"] is not None]
    if not known:
        return f"{first}\n\n{said}"
    means = (
        "In % of the patches, after the last block. Kept: the patch is the origin of a token. Merged: another token holds it. "
        f"Object patches are those that the object covers by more than {COVERED:.0%}; the others are background."
    )
    fates = markdown(FATES, [fate_cells(row) for row in known])
    summary = "Shares of object and background patches that each method keeps, merges and drops"
    return f"{first}\n\n{said}\n\n<details><summary>{summary}</summary>\n\n{fates}\n\n{means}\n\n</details>"


def photographs_table(run: dict[str, Any]) -> str:
    """Return the table of the demo on photographs, with the rows in `SHOWN`, laconic's own choice and all smaller inputs."""
    rows = []
    for row in run["rows"]:
        label = row["name"] if row["keep"] is None else f"{row['name']} {row['keep']:g}"
        if row["keep"] is not None and label not in SHOWN and row["name"] != OWN:
            continue
        wall, over = row["wall"], row["over_smaller_input"]
        speed = ["1", ""] if row["kind"] == "base" else [f"**{wall['median']:.2f}×**", f"{wall['low']:.2f}-{wall['high']:.2f}"]
        level = [f"{row[name]:.3f}" for name in ("class", "patches", "map")]
        ahead = "" if over is None else f"{over['mean']:+.3f} ({over['low']:+.3f} to {over['high']:+.3f})"
        if over is not None and over["low"] > 0:
            ahead = f"**{ahead}**"
        rows.append([label, f"{row['macs'] / 1e9:.2f}", *speed, *level, ahead])
    rounds = run["environment"]["rounds"]
    said = (
        f"`laconic demo --rounds {rounds}` ({len(run['rows'])} rows), {measured_on(run)} Class token and patches: cosine to "
        f"the unreduced model's; saliency map: correlation; means over {run['photographs']} photographs and a crop of each. "
        "Over a smaller input: than the unreduced model on smaller pictures that takes as long (95 % interval over photos)."
    )
    return f"{markdown(FIDELITY, rows)}\n\n{said}"


def speed_table(run: dict[str, Any]) -> str:
    """Return the table of a run without labelled images: cost and speed only."""
    rows = markdown(COST, [cost_cells(row) for row in run["rows"]])
    command = f"laconic demo --model {run['model']} --rounds {run['environment']['rounds']}"
    weights = run["weights"].partition(":")[0]
    return f"{rows}\n\n`{command}`, {measured_on(run)} Cost and speed only: {weights}."


def methods_table() -> str:
    """Return the table of methods, one line each."""
    yes = {True: "yes", False: "no"}
    rows = [
        (f"`{row.name}`", f"{row.title} ([{row.paper}](https://arxiv.org/abs/{row.paper}))", yes[row.trained], yes[row.learns])
        for row in methods().values()
    ]
    table = markdown(("name", "what it does", "needs training", "adds parameters"), rows)
    return f"{table}\n\n`laconic list` shows the methods of your version."


def read_runs() -> list[dict[str, Any]]:
    """Return the committed runs named in `RUNS`."""
    return [json.loads((TOP / "results" / f"{name}.json").read_text()) for name in RUNS]


def block(name: str) -> str:
    """Return a table between its markers: the name of a run (see `RUNS`) or "methods"."""
    demo, scenes, speed = read_runs()
    tables = {
        RUNS[0]: lambda: photographs_table(demo),
        RUNS[1]: lambda: demo_table(scenes),
        RUNS[2]: lambda: speed_table(speed),
        "methods": methods_table,
    }
    return f"<!-- {name} -->\n{tables[name]()}\n<!-- /{name} -->"


def filled(text: str, names: Sequence[str]) -> str:
    """Replace the named tables in the text of a page.

    Raises:
        ValueError: the page lacks the markers of a table.
    """
    for name in names:
        old = re.compile(f"<!-- {name} -->\n.*?\n<!-- /{name} -->", re.S)
        if not old.search(text):
            raise ValueError(f"expected <!-- {name} --> ... <!-- /{name} --> in the page")
        text = old.sub(block(name).replace("\\", "\\\\"), text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables into README.md and docs/evidence-scenes.md, of this repository or of the folder given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for page, names in PAGES.items():
        path = (Path(given[0]) if given else TOP) / page
        write_atomically(path, filled(path.read_text(), names))


if __name__ == "__main__":
    main()
