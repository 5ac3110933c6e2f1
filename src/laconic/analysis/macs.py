"""The cost of a model: parameters, and multiply-adds in closed form under a named convention.

"GFLOPs" in this field are multiply-adds (MACs). Papers count different operations, hence the named conventions:

* ``matmul``: matrix products and convolutions, the reducers' included. The default.
* ``fvcore``: the count of fvcore's default handlers: as ``matmul``, plus 5 for each element of a LayerNorm and 2 for each of
  a BatchNorm (TPS, DynamicViT).
* ``torchprofile``: the count of torchprofile 0.0.4: matrix products and convolutions, plus 1 for each element of a LayerNorm,
  each scaled attention logit, each element that a reducer multiplies by a weight and each averaged attention weight; pairwise
  distances are not counted (EViT, BAT).

A reducer is counted as in its paper's code, so `counted` may differ: on a CPU Laconic merges by index_add, so of the two
products of TPS only the similarities run as a matrix product (on other devices every merge is a one-hot product). No
convention counts attention rows that a method computes again; `counted` includes those of
``similarity="previous-attention"``. Rows that Laconic skips because nothing reads them (see `laconic.reduce_`) are counted
nevertheless: the costs are those of the published method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from laconic.analysis import layer_macs as work
from laconic.analysis.input_size import InputSize, batch_for, whole_batch
from laconic.analysis.summary import BlockCost, Summary
from laconic.core.backbone import StageSpec, block_spec, find_host, path_of
from laconic.core.block_context import BlockContext
from laconic.core.eval_mode import without_recording
from laconic.core.method import Method
from laconic.core.schedule import Schedule
from laconic.core.stages import Stages
from laconic.core.token_reduction import Compute, find_reduction

CONVENTIONS: dict[str, dict[str, int]] = {
    "matmul": {"matmul": 1, "pairwise": 1},
    "fvcore": {"matmul": 1, "pairwise": 1, "layernorm": 5, "batchnorm": 2},
    "torchprofile": {"matmul": 1, "layernorm": 1, "scores": 1, "elementwise": 1, "head_mean": 1},
}


def summary(
    model: nn.Module,
    batch_size: int | None = None,
    convention: str = "matmul",
    *,
    count: bool = False,
    images: Iterable[Tensor] | Tensor | None = None,
    example: Tensor | None = None,
) -> Summary:
    """Return the inference cost of a supported model, reduced or not, at the size of ``example`` (default: its own size).

    For a module that contains a supported model, parameters are of the whole module, MACs and tokens of the model inside.

    Args:
        model: the model.
        batch_size: number of images that ``macs`` are for (default: that of ``example``, or 1).
        convention: ``matmul``, ``fvcore`` or ``torchprofile`` (see `laconic.analysis.macs`).
        count: also run one image and set ``counted_macs`` to torch's count (see `counted`).
        images: batches of images to run, for ``observed``: mean and spread of the tokens and MACs per image. For a method
            that chooses the token count per image, ``tokens`` and ``macs`` are upper bounds.
        example: an input [B, channels, height, width] of the size that costs are for. A reduced model runs on it; if the
            method's own steps may take as long as they save, ``timed`` has the measured times
            (see `laconic.analysis.break_even`).

    Raises:
        TypeError: the model is not supported. ValueError: the convention is unknown, the batch size is below one, the model
            has layers that laconic cannot count, or it does not accept the example.
    """
    reduction = find_reduction(model) if isinstance(model, nn.Module) else None
    config, schedule = (reduction.config, reduction.schedule) if reduction else (None, None)
    batch_size = batch_size if batch_size is not None else len(example) if isinstance(example, Tensor) else 1
    out = estimate(model, config, schedule, convention, batch_size, example=example)
    if reduction is not None:
        from laconic.analysis.break_even import timed  # imported here: it imports this module

        out = dataclasses.replace(out, timed=timed(reduction, example))
    if images is not None:
        from laconic.analysis.per_image_cost import observe  # imported here: it imports this module

        out = dataclasses.replace(out, observed=observe(model, images, convention))
    return dataclasses.replace(out, counted_macs=counted(model, example=example)) if count else out


def estimate(
    model: nn.Module,
    config: Method | None = None,
    schedule: Schedule | None = None,
    convention: str = "matmul",
    batch_size: int = 1,
    *,
    example: Tensor | InputSize | None = None,
    baseline: int | None = None,
) -> Summary:
    """Return the cost of ``model`` under this method and schedule, without reducing it or running a complete forward.

    Costs are at the size of ``example``: an input, or the result of `InputSize.of` (default: the model's own size). The model
    may be on the meta device. It may be reduced already; its own reduction is ignored. Without config and schedule the result
    is the cost of the unreduced model. ``baseline`` are the multiply-adds of the unreduced model, if they are known already.

    Raises:
        TypeError: the model is not supported. ValueError: as `summary`; config without schedule, or the reverse; a schedule
            that does not fit.
    """
    weights = weights_of(convention)
    if (config is None) != (schedule is None):
        raise ValueError(
            "give config and schedule, or neither; config.default_schedule(depth, keep, at) makes a schedule of keep rates"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of images, at least 1; got {batch_size!r}")
    host, entry = find_host(model)
    size = example if isinstance(example, InputSize) else InputSize.of(host, entry, example)
    blocks, shapes = entry.blocks(host), size.shapes
    starts, sites = {sum(s.depth for s in shapes[:i]): shape for i, shape in enumerate(shapes)}, dict[int, BlockContext]()
    own_sites = sites  # parameters belong to the model's own size
    tokens = tuple(shape.patches for shape in shapes for _ in range(shape.depth))
    if config is not None and schedule is not None:
        stages = Stages(config, schedule, shapes)
        tokens, sites = stages.counts(), stages.sites()
        own_sites = sites if size.image is None else Stages(config, schedule, entry.shapes(host)).sites()
    rows, before, shape = list[BlockCost](), shapes[0].patches, shapes[0]
    for index, (block, kept) in enumerate(zip(blocks, tokens, strict=True)):
        if index in starts:
            shape, before = starts[index], starts[index].patches
        rows.append(block_cost(index, block, shape, config, sites.get(index), before, kept, weights, batch_size))
        before = kept
    ends = weigh(work.ends(host, entry, shapes[0].patches + shapes[0].prefix, before + shape.prefix, size), weights)
    macs = ends * batch_size + sum(row.macs + row.reducer_macs for row in rows)
    if baseline is None:
        baseline = macs if config is None else estimate(model, None, None, convention, batch_size, example=size).macs
    method, parameters = None if config is None else config.describe(), _parameters(model, config, own_sites)
    facts = (type(host).__name__, method, convention, batch_size, parameters, macs, baseline, tokens, tuple(rows))
    return Summary(*facts, image_size=size.sides)


def block_cost(
    index: int,
    block: nn.Module,
    shape: StageSpec,
    config: Method | None,
    site: BlockContext | None,
    before: int,
    kept: int,
    weights: Mapping[str, int],
    batch_size: int = 1,
    keys: int | None = None,
) -> BlockCost:
    """Return the cost of a block and its reducer, for ``before`` patch tokens that come in and ``kept`` that remain.

    ``keys`` is the number of patch tokens that are attended to, if it is not the number of those that attend.
    """
    at_attention, at_mlp = (n + shape.prefix for n in _inside(block, config, site, before, kept))
    attended = None if keys is None else keys + shape.prefix
    own, reducer = weigh(work.block(block, at_attention, at_mlp, shape, attended), weights), 0
    works = kept < before or (config is not None and config.info.count == "variable")
    if config is not None and site is not None and (works or config.tokens_inside(before, kept, site) != (before, before)):
        reducer = weigh(config.macs(before, kept, site), weights)
    return BlockCost(index, at_attention, at_mlp, own * batch_size, reducer * batch_size)


def counted(model: nn.Module, compute: Compute = "all", example: Tensor | None = None) -> int:
    """Return the multiply-adds (half the FLOPs) that torch's FlopCounterMode counts while the model runs on one image.

    The model runs in evaluation mode, on the first image of ``example`` or on noise of its own input size; the history of its
    last forward does not change. By default all rows are computed, as the closed forms of `summary` assume; ``needed``
    computes only the rows that are read (see `laconic.reduce_`).

    Raises:
        TypeError: the model is not supported.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imported here because it loads triton

    host, entry = find_host(model)
    # gradients on: without, the counter fails on a pool that starts from an expanded parameter (SigLIP's)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with without_recording(host, compute), torch.inference_mode(False), torch.enable_grad(), counter:
        batch = whole_batch(host, entry.example(host) if example is None else batch_for(host, entry, example)[:1])
        host(batch)
    return counter.get_total_flops() // 2 // len(batch)


class _NoModules:
    """Replacement for the counter's module tracker, whose global hooks would disable the fast path."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _inside(block: nn.Module, config: Method | None, site: BlockContext | None, before: int, kept: int) -> tuple[int, int]:
    """Return the patch tokens at attention and at MLP of a block, of ``before`` that come in and ``kept`` that remain."""
    if config is None or site is None:
        return before, before
    phase, spec = config.info.phase, block_spec(block)
    if kept < before and phase == "between" and spec is not None and spec.mlp is None:
        raise ValueError(
            f"block {site.block} ({path_of(type(block))}) computes attention and MLP side by side, so {config.info.name} "
            "cannot reduce between them; use a method that reduces before a block (dtps, dynamicvit)"
        )
    return config.tokens_inside(before, kept, site)


def _parameters(model: nn.Module, config: Method | None, sites: Mapping[int, BlockContext]) -> int:
    """Count the parameters of the model, without those of its present reducers, and with those of ``config``'s reducers."""
    reduction = find_reduction(model)
    present = 0 if reduction is None else sum(p.numel() for p in reduction.parameters())
    own = sum(p.numel() for p in model.parameters()) - present
    if config is None:
        return own
    with torch.device("meta"):
        return own + sum(p.numel() for site in sites.values() for p in config.build(site).parameters())


def weights_of(convention: str) -> dict[str, int]:
    """Return the weight of each kind of work under a convention.

    Raises:
        ValueError: the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, not {convention!r}")
    return CONVENTIONS[convention]


def weigh(kinds: Mapping[str, int], weights: Mapping[str, int]) -> int:
    """Return the weighted sum of work by kind.

    Raises:
        ValueError: a kind is unknown.
    """
    unknown = sorted(set(kinds) - set(work.KINDS))
    if unknown:
        raise ValueError(f"work of an unknown kind: {', '.join(unknown)}; known kinds: {', '.join(work.KINDS)}")
    return sum(count * weights.get(kind, 0) for kind, count in kinds.items())
