"""Measured speed of packed, padded and masked execution, for given numbers of tokens per image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laconic.analysis import machine, timing
from laconic.analysis.macs import summary
from laconic.analysis.per_image_cost import observe
from laconic.analysis.timing import Quartiles, Setting
from laconic.api import reduce_
from laconic.cli.models import create
from laconic.cli.output import markdown
from laconic.core.adaptive import AdaptiveReducer
from laconic.core.attention import AttentionView
from laconic.core.gather import arange_like
from laconic.core.schedule import Schedule
from laconic.core.token_reduction import reduction_of
from laconic.core.tokens import Tokens

BLOCK = 3
SPREADS = {"much alike": (105, 140), "very different": (50, 196)}  # smallest and largest number of patch tokens of an image
INTRO = """## Packed execution

The measured speed-up of adaptive methods, which keep a number of tokens for each image. DeiT-S, batch {batch}; from block
{block} on, every image keeps a given number of its 196 patch tokens, spread evenly between the smallest and the largest.
*mean for all*: every image keeps the mean number. Speed-ups over the unreduced model, interleaved, median (quartiles) of
{rounds} rounds.
"""


class Given(AdaptiveReducer):
    """Keep the first ``counts[b]`` tokens of image b."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.counts = counts

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        return self.hide(tokens, (arange_like(tokens.size) < self.counts.unsqueeze(1)).to(tokens.size.dtype))


def executions(model: str, batch: int, setting: Setting) -> dict[str, Any]:
    """Measure the speed of each execution, for each spread of counts."""
    out = dict[str, Any]()
    for name, (least, most) in SPREADS.items():
        counts = torch.linspace(least, most, batch).round().long()
        mean = round(counts.float().mean().item())
        noise = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        models: dict[str, Any] = {"unreduced": (create(model), noise)}
        fixed = reduce_(create(model), "topk", schedule=Schedule.keep_counts({BLOCK: mean}))
        models["mean for all"] = (fixed, noise)
        for execution in ("packed", "padded", "masked"):
            reduced: Any = reduce_(create(model), "ats", at=[BLOCK], execution=execution)
            reduction = reduction_of(reduced)
            site: Any = reduction.reducers[str(BLOCK)].site
            reduction.reducers[str(BLOCK)] = given = Given(counts)
            given.site = site
            models[execution] = (reduced, noise)
        with machine.prepared(setting):
            samples = timing.time_models(models, setting)
        found = {way: timing.ratios(samples[way])[0] for way in list(models)[1:]}
        seen = observe(models["packed"][0], noise)
        out[name] = {
            "counts": counts.tolist(),
            "implied": summary(models["unreduced"][0]).macs / seen.macs.mean,
            "ratios": {way: [q.low, q.median, q.high] for way, q in found.items()},
        }
    return out


def section(found: dict[str, Any], batch: int, rounds: int) -> str:
    """Return the section of the page with its table."""
    rows = []
    for name, row in found.items():
        ratios = {way: Quartiles(*values) for way, values in row["ratios"].items()}
        cells = [f"{q.median:.2f}× ({q.low:.2f}-{q.high:.2f})" for q in ratios.values()]
        rows.append([f"{name}: {row['counts'][0]} to {row['counts'][-1]}", f"{row['implied']:.2f}×", *cells])
    header = ["patches an image keeps", "MACs imply", *next(iter(found.values()))["ratios"]]
    return f"{INTRO.format(batch=batch, block=BLOCK, rounds=rounds)}\n{markdown(header, rows)}\n"
