"""What a model costs: parameters, and multiply-adds in closed form under a stated convention.

"GFLOPs" in this field are multiply-adds (MACs). Papers count different things, so a convention has a name:

* ``matmul``: matrix products and convolutions, the reducer's own among them. The default.
* ``fvcore``: what fvcore's default handlers count: that, 5 for each element of a LayerNorm and 2 for each of a BatchNorm
  (TPS, DynamicViT).
* ``torchprofile``: what torchprofile 0.0.4 counts, 1 for each element of a LayerNorm, each scaled attention logit, each
  element a reducer weighs and each averaged attention weight; it does not see pairwise distances (EViT, BAT).

A reducer is counted as its paper's code does it, and what `counted` sees may differ: on a CPU Laconic merges by index_add, so
of the two products of TPS only the similarities run as one (elsewhere every merge is a one-hot product). Attention rows
that a method reads once more are in no convention; of these `counted` sees those of ``similarity="previous-attention"``.
Compute that are not computed since nobody needs them (see `laconic.reduce_`) are counted all the same: costs are of the method
as published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from laconic.analysis import layer_macs as work
from laconic.analysis.input_size import InputSize, batch_for
from laconic.analysis.summary import BlockCost, Summary
from laconic.core.backbone import StageSpec, block_spec, find_host, path_of
from laconic.core.block_context import BlockContext
from laconic.core.eval_mode import aside
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
    """Return what a supported model costs, reduced or not, at inference: at the size of ``example``, or else at its own.

    Of a module with a supported model inside, parameters are of the whole, MACs and tokens of the model inside.

    Args:
        model: the model.
        batch_size: images that ``macs`` are for (default: as many as ``example`` has, or 1).
        convention: what counts as a multiply-add: ``matmul``, ``fvcore`` or ``torchprofile`` (see `laconic.analysis.macs`).
        count: also run one image, and say in ``counted_macs`` what torch counts (see `counted`).
        images: batches of images to run, for ``observed``: mean and spread over them of tokens and MACs of one image. Of a
            method that decides for every image, ``tokens`` and ``macs`` are the most that it may leave and cost.
        example: an input [B, channels, height, width] of the size that counts. A reduced model runs on it, and where its
            method's own steps may take as long as they save, ``timed`` says what was measured (see `laconic.analysis.break_even`).

    Raises:
        TypeError: no supported model. ValueError: an unknown convention, a batch size below one, a model with layers of
            its own that laconic cannot count, an example that the model does not take.
    """
    reduction = find_reduction(model) if isinstance(model, nn.Module) else None
    config, schedule = (reduction.config, reduction.schedule) if reduction else (None, None)
    batch_size = batch_size if batch_size is not None else len(example) if isinstance(example, Tensor) else 1
    out = estimate(model, config, schedule, convention, batch_size, example=example)
    if reduction is not None:
        from laconic.analysis.break_even import timed  # it stands on this module

        out = dataclasses.replace(out, timed=timed(reduction, example))
    if images is not None:
        from laconic.analysis.per_image_cost import observe  # it stands on this module

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
) -> Summary:
    """What ``model`` would cost under this method and schedule; nothing is attached and no forward is finished.

    It is at the size of ``example`` if that is given: an input, or what `InputSize.of` found. The model may be on the meta
    device. It may be reduced already, and what by does not matter. Without config and schedule it is the cost of the
    unreduced model.

    Raises:
        TypeError: no supported model. ValueError: as `summary`; config without schedule; a schedule that does not fit.
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
    own_sites = sites  # parameters are learned for the model's own size
    tokens = tuple(shape.patches for shape in shapes for _ in range(shape.depth))
    if config is not None and schedule is not None:
        staging = Stages(config, schedule, shapes)
        tokens, sites = staging.counts(), staging.sites()
        own_sites = sites if size.image is None else Stages(config, schedule, entry.shapes(host)).sites()
    rows, before, shape = list[BlockCost](), shapes[0].patches, shapes[0]
    for index, (block, left) in enumerate(zip(blocks, tokens, strict=True)):
        if index in starts:
            shape, before = starts[index], starts[index].patches
        rows.append(block_cost(index, block, shape, config, sites.get(index), before, left, weights, batch_size))
        before = left
    ends = weigh(work.ends(host, entry, shapes[0].patches + shapes[0].prefix, before + shape.prefix, size), weights)
    macs = ends * batch_size + sum(row.macs + row.reducer_macs for row in rows)
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
    left: int,
    weights: Mapping[str, int],
    batch_size: int = 1,
) -> BlockCost:
    """What one block of a stage costs that gets ``before`` patch tokens and leaves ``left``, its reducer included."""
    at_attention, at_mlp = (n + shape.prefix for n in _inside(block, config, site, before, left))
    own, reducer = weigh(work.block(block, at_attention, at_mlp, shape), weights), 0
    works = left < before or (config is not None and config.info.count == "variable")
    if config is not None and site is not None and (works or config.tokens_inside(before, left, site) != (before, before)):
        reducer = weigh(config.macs(before, left, site), weights)
    return BlockCost(index, at_attention, at_mlp, own * batch_size, reducer * batch_size)


def counted(model: nn.Module, compute: Compute = "all", example: Tensor | None = None) -> int:
    """Multiply-adds that torch's FlopCounterMode counts (half its FLOPs) while the model really runs on one image.

    The model runs in evaluation mode, on the first image of ``example`` or on noise of its own input size; the ledger of its
    last forward stays as it was. By default all rows are computed, as the closed forms of `summary` have it; with ``needed``
    those that the model computes as it was reduced (see `laconic.reduce_`).

    Raises:
        TypeError: no supported model.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it loads triton: not at import

    host, entry = find_host(model)
    # with gradients: without, the counter fails on a pool that starts from an expanded parameter (SigLIP's)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with aside(host, compute), torch.inference_mode(False), torch.enable_grad(), counter:
        host(entry.example(host) if example is None else batch_for(host, example)[:1])
    return counter.get_total_flops() // 2


class _NoModules:
    """In place of a counter's tracker of modules, whose global hooks would switch the fast path off."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _inside(block: nn.Module, config: Method | None, site: BlockContext | None, before: int, left: int) -> tuple[int, int]:
    """Patch tokens at the attention and at the MLP of a block that gets ``before`` and leaves ``left``."""
    if config is None or site is None:
        return before, before
    moment, halves = config.info.phase, block_spec(block)
    if left < before and moment == "between" and halves is not None and halves.mlp is None:
        raise ValueError(
            f"block {site.block} ({path_of(type(block))}) computes attention and MLP side by side, so there is no place "
            f"between them for {config.info.name}; take a method that reduces before a block (dtps, dynamicvit)"
        )
    return config.tokens_inside(before, left, site)


def _parameters(model: nn.Module, config: Method | None, sites: Mapping[int, BlockContext]) -> int:
    """Parameters of the model, without those of the reducers it may have, and with those of ``config``'s reducers."""
    reduction = find_reduction(model)
    present = 0 if reduction is None else sum(p.numel() for p in reduction.parameters())
    own = sum(p.numel() for p in model.parameters()) - present
    if config is None:
        return own
    with torch.device("meta"):
        return own + sum(p.numel() for site in sites.values() for p in config.build(site).parameters())


def weights_of(convention: str) -> dict[str, int]:
    """What each kind of work counts under a convention.

    Raises:
        ValueError: there is no such convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, not {convention!r}")
    return CONVENTIONS[convention]


def weigh(kinds: Mapping[str, int], weights: Mapping[str, int]) -> int:
    """Work by kind, as one number.

    Raises:
        ValueError: work of an unknown kind.
    """
    unknown = sorted(set(kinds) - set(work.KINDS))
    if unknown:
        raise ValueError(f"work of an unknown kind: {', '.join(unknown)}; there are: {', '.join(work.KINDS)}")
    return sum(count * weights.get(kind, 0) for kind, count in kinds.items())
