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
from laconic.core.schedule import Schedule

CHECK = ".check.json"
HEAD = """# A budget as a schedule

```bash
laconic plan deit_small_patch16_224 --method etps --target 2.3G         # multiply-adds, exact
laconic plan deit_small_patch16_224 --method bat --target 1.6x --batch-size 8    # measured on this machine
laconic plan scenes_vit_small --method tome --target 1.6x-macs --data scenes --limit 1000 --output plan.json
laconic plan --check plan.json                                              # measure it again, in a fresh process
```

```python
laconic.reduce_(model, "etps", budget="2.3G")              # or "1.6x-macs"; "1.6x" and "12ms" are measured, at batch size 1
found = laconic.plan(model, "bat", "12ms", batch_size=8)   # the model is not changed; found.schedule is for reduce_
found = laconic.plan(model, "bat", "2.3G", images=images)  # searched: found.comparison compares it with the uniform schedule
```

**Guarantees.** A budget of multiply-adds (`2.3G`, `230M`, `1.6x-macs`) is never exceeded, and no block of a schedule of
counts could keep one more token within it. A speed-up (`1.6x`, over the unreduced model with fused attention in the
same process) or a time (`12ms` for one forward of `--batch-size` images) is predicted from a table of block times
measured on this machine, including the time of the reducer. Then the reduced model is measured, interleaved with the
unreduced one, and the schedule is corrected, at most twice, if it is off by more than 3 %; if it is still off, the report
says so. `--check` measures a plan again and exits with code 1 if it is off by more than 10 %. Times in milliseconds are
relative to the fastest time of the unreduced model (other processes can only slow it down); the plain clock time is
reported as well.
If a method cannot reach a budget, the error names the nearest budget that it can reach. If the method costs more than it
saves (small models, small batches), the error says so.

**Without images** the schedule has the method's default blocks and one keep rate. **With images** (`--data`) a search,
without training, finds the blocks and counts that change the model's outputs least, among schedules of equal cost. It uses
half of the images (every second one). The result is compared on the other half with the uniform schedule (the papers'
three reducing blocks) of the same cost. Methods with a scorer that has to be trained (`dtps`, `dynamicvit`) are planned
without images; adaptive methods (`ats`, `avit`) cannot be planned.

**In a recipe**: `schedule = {{ at = [3, 6], keep_counts = [98, 49] }}` under `[method]`, instead of `keep` and `at`
(`--set "method.schedule={{at=[3, 6], keep_counts=[98, 49]}}"`). Warm-in works with keep rates only, not with counts.

## Searched plans

KL: mean KL divergence from the unreduced model's class probabilities (nats), on {images} held-out images, with 95 %
intervals. The change is that of the searched schedule against the uniform one, paired by image.

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
        f"{len(searched)} plans (the interval of the difference excludes 0), and by top-1 in {clear} of them."
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
    environment = f"{'; '.join(kinds)}; {min(e['date'] for e in here)[:10]}, on a shared machine. Written by "
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
    schedule = Schedule.of(plan["schedule"])
    blocks = " ".join(f"{block}:{count}" for block, count in zip(schedule.at, schedule.values, strict=True))
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
