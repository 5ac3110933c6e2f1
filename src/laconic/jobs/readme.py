"""``python -m laconic.jobs.readme``: the tables of README.md, from a committed run of ``laconic demo`` and the registry.

The run is made by ``laconic demo --json > results/demo.json``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.jobs.output import write_atomically
from laconic.reducer import methods

TOP = Path(__file__).parents[3]


def demo_table(run: dict[str, Any]) -> str:
    """The rows of a run of the demo, and what they were measured on."""
    lines = [
        "| | M params | GMACs | patch tokens | MACs-implied | **measured** | (quartiles) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        label = row["name"] if row["keep"] is None else f"{row['name']} {row['keep']:g}"
        wall = row["wall"]
        speed = ["1", "1", ""] if row["kind"] == "base" else [f"{row['implied']:.2f}×", f"**{wall['median']:.2f}×**"]
        if row["kind"] != "base":
            speed.append(f"{wall['low']:.2f}-{wall['high']:.2f}")
        tokens = " ".join(map(str, row["tokens"]))
        cells = [label, f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.3f}", tokens, *speed]
        lines.append(f"| {' | '.join(cells)} |")
    here, batch = run["environment"], run["rows"][0]["batch_size"]
    lines.append("")
    lines.append(
        f"`laconic demo` on {run['model']}, {here['dtype']}, batch {batch}, {here['rounds']} interleaved rounds, "
        f"{here['threads']} thread of {here['device']}, torch {here['torch']}, timm {here['timm']}. Measured: the time of the "
        "unreduced model, fused attention and all, by the time of the row, median and quartiles. **No accuracy stands here: no "
        "pretrained weights could be had where this was measured.** With them `make demo` also says how far each answer is "
        "from the full model's."
    )
    return "\n".join(lines)


def methods_table() -> str:
    """One line a method."""
    lines = ["| name | what it does | needs training | adds parameters |", "|---|---|---|---|"]
    for row in methods().values():
        link = f"[{row.paper}](https://arxiv.org/abs/{row.paper})"
        yes = {True: "yes", False: "no"}
        lines.append(f"| `{row.name}` | {row.title} ({link}) | {yes[row.trained]} | {yes[row.learns]} |")
    return "\n".join(lines)


def filled(text: str, run: dict[str, Any]) -> str:
    """README.md with its generated parts made anew."""
    for name, table in (("demo", demo_table(run)), ("methods", methods_table())):
        block = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        if not block.search(text):
            raise ValueError(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
        text = block.sub(lambda m, table=table: m[1] + table + m[2], text)  # type: ignore[misc]
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables into README.md (or the file named) from results/demo.json (or the run named second)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    readme = Path(given[0]) if given else TOP / "README.md"
    run = json.loads((Path(given[1]) if len(given) > 1 else TOP / "results" / "demo.json").read_text())
    write_atomically(readme, filled(readme.read_text(), run))


if __name__ == "__main__":
    main()
