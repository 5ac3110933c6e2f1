"""Write docs/plan.md: how to plan for a budget, what is guaranteed, and tables of plans that were measured again.

``python -m benchmarks.plan_page docs/plan.md results/plan-*.json``; the ``.check.json`` of a plan is the output of
``laconic plan --check`` in a fresh process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.cli.output import markdown
from laconic.core.files import write_atomically

CHECK = ".check.json"
HEAD = """# A budget as a schedule

```bash
laconic plan deit_small_patch16_224 --method etps --target 2.3G         # multiply-adds, exact
laconic plan deit_small_patch16_224 --method bat --target 1.6x --batch-size 8    # measured here and now
laconic plan scenes_vit_small --method tome --target 1.6x-macs --data scenes --limit 1000 --output plan.json
laconic plan --check plan.json                                              # again, in a fresh process
```

```python
laconic.reduce_(model, "etps", budget="2.3G")              # "1.6x-macs"; "1.6x" and "12ms" are measured, with one image a batch
found = laconic.plan(model, "bat", "12ms", batch_size=8)   # the model is not changed; found.schedule is for reduce_
found = laconic.plan(model, "bat", "2.3G", images=images)  # searched: found.comparison says whether that was worth it
```

**What is promised.** Of multiply-adds (`2.3G`, `230M`, `1.6x-macs`) the budget is never exceeded, and a schedule of
counts has no block that could leave one token more within it. A speed-up (`1.6x`, to the unreduced model with fused
attention, in the same process) or a time (`12ms` for one forward of `--batch-size` images) is predicted from a table
of block times measured on this machine, what the reducer costs included; then the real reduced model runs beside the
unreduced one, and the schedule is corrected, twice at most, if it is off by more than 3 %. If it still is, the report
says so. `--check` measures a plan again and leaves with exit code 1 if it is off by more than 10 %; milliseconds are
planned and compared as if the unreduced model always took the least that it has taken (others can only slow it
down), and the clock's own answer stands beside.
Where a method cannot reach a budget, the nearest one that it can is named; where it costs more than it saves (small
models, small batches), that is said instead.

**Without images** the shape is the method's usual one with one keep rate. **With images** (`--data`) nothing is
trained: on every other image a search looks for blocks and counts that change the model's answers least, all at the
same cost; what it found is judged on the other half, beside the usual shape (the papers' uniform three stages) at the
same cost. Methods with a scorer that has to be trained (`dtps`, `dynamicvit`) are planned without images, and methods
that decide for every image (`ats`, `avit`) not at all.

**In a recipe**: `schedule = {{ at = [3, 6], leave = [98, 49] }}` under `[method]`, in the place of `keep` and `at`
(`--set "method.schedule={{at=[3, 6], leave=[98, 49]}}"`). Counts cannot be warmed in.

## Plans that were searched

KL: mean distance to the unreduced model's class probabilities (nats), on {images} held-out images; 95 % intervals. A
change is of the searched schedule against the uniform one, image by image.

{searched}

{verdict}

## Plans measured again in a fresh process

{checked}

{environment}
"""


def page(paths: Sequence[Path]) -> str:
    """Return the text of the page, from plan files."""
    plans = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths if not path.name.endswith(CHECK)}
    searched = [plan for plan in plans.values() if plan["comparison"] is not None]
    header = (
        "model, method, target",
        "batch",
        "schedule",
        "GMACs",
        "measured",
        "KL, uniform",
        "KL, searched",
        "top-1, uniform",
        "searched",
    )
    table = markdown((*header, "change, points"), [row(plan) for plan in searched])
    better = sum(plan["comparison"]["distance"]["mean"] + plan["comparison"]["distance"]["half"] < 0 for plan in searched)
    right = [plan["comparison"]["top1"] for plan in searched]
    clear = sum(found is not None and found["mean"] > found["half"] for found in right)
    verdict = (
        f"The search beats the uniform schedule at equal cost on held-out images, by KL, in {better} of these "
        f"{len(searched)} plans (the interval of the difference leaves out 0), and by top-1 in {clear} of them."
    )
    again = [check_row(plan, path.with_name(f"{path.stem}{CHECK}")) for path, plan in plans.items()]
    columns = (
        "model, method, target",
        "batch",
        "predicted",
        "measured",
        "again",
        "off target",
        "by the clock",
        "unreduced then, now (ms)",
    )
    here = [plan["environment"] for plan in plans.values()]
    kinds = dict.fromkeys(
        f"{e['device']}, threads: {e['threads']}, {e['dtype']}, torch {e['torch']}, timm {e['timm']}" for e in here
    )
    environment = (
        f"{'; '.join(kinds)}; {min(e['date'] for e in here)[:10]}, on a machine that others used at the time. Written by "
    )
    environment += "`python -m benchmarks.plan_page`; commands and all numbers are in `results/plan-*.json`."
    images = ", ".join(map(str, sorted({plan["judged"][0]["images"] for plan in searched})))
    checked = markdown(columns, [cells for cells in again if cells is not None])
    return HEAD.format(searched=table, checked=checked, environment=environment, images=images, verdict=verdict)


def name_of(plan: dict[str, Any]) -> str:
    """Return the model, method and target of a plan."""
    return f"{plan['model']}, {plan['method']['name']}, {plan['target']['text']}"


def row(plan: dict[str, Any]) -> tuple[str, ...]:
    """Return the table row of a searched plan."""
    mine, theirs = plan["judged"]
    blocks = " ".join(f"{block}:{left}" for block, left in zip(plan["schedule"]["at"], plan["schedule"]["leave"], strict=True))
    distances = [f"{one['distance']['mean']:.4f} ± {one['distance']['half']:.4f}" for one in (theirs, mine)]
    shares = ["" if one["top1"] is None else f"{100 * one['top1']:.1f} %" for one in (theirs, mine)]
    top1 = plan["comparison"]["top1"]
    change = "" if top1 is None else f"{100 * top1['mean']:+.1f} ± {100 * top1['half']:.1f}"
    facts = (
        name_of(plan),
        str(plan["batch_size"]),
        blocks,
        f"{plan['macs'] / 1e9:.4f}",
        f"{plan['measured']['ratio'][1]:.2f}x",
    )
    return (*facts, *distances, *shares, change)


def check_row(plan: dict[str, Any], path: Path) -> tuple[str, ...] | None:
    """Return the table row of a plan that was measured again; None if it was not."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    ratios = [f"{found[when]['ratio'][1]:.2f}x" for when in ("before", "now")]
    bases = ", ".join(f"{1e3 * found[when]['base_seconds'][1]:.1f}" for when in ("before", "now"))
    offs = ["" if found[name] is None else f"{found[name]:+.1%}" for name in ("off", "off_raw")]
    predicted = "" if plan["predicted"] is None else f"{plan['predicted']:.2f}x"
    return (name_of(plan), str(plan["batch_size"]), predicted, *ratios, *offs, bases)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_page", description="Write the page of plans.")
    parser.add_argument("path", type=Path, help="the Markdown file to write, e.g. docs/plan.md")
    parser.add_argument("plans", type=Path, nargs="+", help="files that laconic plan wrote")
    given = parser.parse_args(arguments)
    write_atomically(given.path, page(given.plans))


if __name__ == "__main__":
    main()
