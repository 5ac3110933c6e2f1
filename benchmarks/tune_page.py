"""``python -m benchmarks.tune_page docs/tune.md``: write the page of what `laconic tune` chose, from results/tune-*.json.

The runs were made by the commands on the page, after ``laconic data cutouts FOLDER --views 4 2 0 --pixels 224`` for the folder
``pictures`` (2x and 3x same answer: ``--views 0 2 0``), ``--views 0 4 0`` for ``cutouts224``, ``--views 0 2 0 --pixels 518``
for ``pictures518``. The plot docs/tune.png is made of the first run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.cli import compare, plots
from laconic.cli.output import markdown
from laconic.cli.tune import cells, verdict
from laconic.core.files import write_atomically
from laconic.planning.measures import WORDS
from laconic.planning.tuned import Tuned

RESULTS = Path("results")
EXPORTS = RESULTS / "exports-tuned.json"  # of benchmarks/tuned_exports.py
FIRST = "tune-1.6x"  # the run that the README shows
HEAD = """# Let it choose

```bash
laconic data cutouts pictures --views 4 2 0 --pixels 224     # or pictures of your own, in a folder
{command}
```

`laconic tune` reduces the model in every way that may meet the target: merging and selecting methods, at their usual blocks,
late and in small steps, before the first block, in chains, and on smaller inputs. All are fitted to the target by measured
time and scored by your measure on some of the pictures; the best remain, blocks and counts of the very best are searched, and
the other pictures judge. Smaller inputs, random pruning and average pooling are always in the table. `--repair distil` trains
scales and biases of the choice to meet the unreduced model's answers, and those of the smaller input, and keeps what held-out
pictures confirm; `--repair-split train` adds pictures of another split, which need no labels. Repair moves a smaller input
further than a method, so compare the choice with the repaired smaller input too. Low-rank updates and training of all weights
were tried as well: on some hundreds of pictures they fit these and do worse on others.
[The guide](guide.md) says more.

```python
import json, laconic, safetensors.torch

tuned = laconic.Tuned.of_json(json.load(open("tuned.json")), safetensors.torch.load_file("tuned.safetensors"))
tuned.apply(model)      # the input size, the repaired parameters and the reduction, in place
```

![Score against measured speed of the rows that were judged](tune.png)

The pictures are made by the first command, for folders other than `pictures` with these options: `cutouts224` `--views 0 4 0`,
`pictures518` `--views 0 2 0 --pixels 518` (same answer at 2x and 3x, 224 px: `pictures` with `--views 0 2 0`). *Over a smaller
input*: the difference to the unreduced model on smaller pictures that takes as long, by measured time, with a 95 % interval
over the pictures.

"""
COLUMNS = ("", "GMACs", "speed", "score", "(95 %)", "over a smaller input", "(95 %)")


def read(path: Path) -> tuple[dict[str, Any], Tuned]:
    """Return a run: its JSON, and the result in it."""
    fields = json.loads(path.read_text())
    return fields, Tuned.of_json(fields)


def table(tuned: Tuned) -> str:
    """Return the rows of a run as a table, the chosen one in bold."""
    rows = []
    for row in tuned.rows:
        name, *others = cells(row)
        rows.append([f"**{name}**" if row.name == tuned.chosen else name, *others])
    return markdown(COLUMNS, rows)


def section(fields: dict[str, Any], tuned: Tuned) -> str:
    """Return the section of a run."""
    chosen, judging = tuned.images
    said, here = verdict(tuned), fields["environment"]
    lines = [
        f"## {tuned.target.text}, {WORDS[tuned.measure]}, {tuned.own[0]} px",
        f"`{fields['command']}`",
        f"{chosen} pictures chose, {judging} judge. {here['device']}, {compare.threads(here)}, torch {here['torch']}, "
        f"{here['date'][:10]}.",
        table(tuned),
        f"**{said[0].upper()}{said[1:]}**",
    ]
    return "\n\n".join(lines)


def exported(found: dict[str, Any]) -> str:
    """Return the section of the choices as exported files."""
    rows = []
    for run in found["runs"]:
        speeds = [(row["ratio"]["median"], row["kept"]) for row in run["rows"]]
        cells = [f"{speed:.2f}x" if kept is None else f"{speed:.2f}x ({kept:.2f})" for speed, kept in speeds]
        rows.append(
            [run["run"].removeprefix("tune-"), run["chosen"].removesuffix(", repaired"), str(run["batch_size"]), *cells]
        )
    header = ("run", "chosen", "images", *(row["runtime"] for row in found["runs"][0]["rows"]))
    devices = sorted({f"{run['environment']['device']}, {compare.threads(run['environment'])}" for run in found["runs"]})
    return "\n\n".join(
        [
            "## Exported",
            "`python -m benchmarks.tuned_exports` exports each choice and times it in turns with the unreduced model in the "
            "same runtime; in brackets the share of PyTorch's speed-up that is kept. "
            f"{'; '.join(devices)}.",
            markdown(header, rows),
        ]
    )


def runs_of() -> list[Path]:
    """Return the committed runs, in the order of the page."""
    return sorted(RESULTS.glob("tune-*.json"), key=lambda path: (path.stem != FIRST, path.stem))


def page(paths: Sequence[Path] | None = None) -> str:
    """Return the page of the committed runs, or of other files."""
    runs = [read(path) for path in paths or runs_of()]
    more = [exported(json.loads(EXPORTS.read_text()))] if paths is None and EXPORTS.exists() else []
    head = HEAD.format(command=runs[0][0]["command"]).rstrip()
    return "\n\n".join([head, *(section(*run) for run in runs), *more]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args(arguments).output
    write_atomically(output, page())
    fields, tuned = read(RESULTS / f"{FIRST}.json")
    plots.plot_tuned(output.with_suffix(".png"), tuned, WORDS[tuned.measure], f"{fields['model']}, {tuned.target.text}")


if __name__ == "__main__":
    main()
