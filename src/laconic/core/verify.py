"""Verification when a model is reduced: its table entry is checked on the model itself, which is refused if they differ."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.arguments import check_example, not_a_batch, unusable
from laconic.core.attention import AttentionTap
from laconic.core.backbone import ModelSpec, block_spec, path_of
from laconic.core.block_forward import attend, first_of, name_of
from laconic.core.eval_mode import evaluating
from laconic.core.history import History
from laconic.core.patch_layer import find_patch_layer
from laconic.core.patching import apply_settings, attach, detach, names_of, refuse_patched, restore_settings
from laconic.core.readout_check import check_readout, difference_of
from laconic.core.runtime import by_name
from laconic.core.token_reduction import TokenReduction
from laconic.core.tokens import Tokens

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the size of what is compared; on one machine the difference is usually exactly 0


def verify(host: nn.Module, entry: ModelSpec, reduction: TokenReduction, example: Tensor | None) -> None:
    """Attach ``reduction`` and verify it on one image; on any failure detach it and raise.

    Raises:
        ValueError: a block's two halves do not reproduce its forward, its attention is not fused, another tool patched it,
            a prefix token was changed, the tokens are not prefix tokens and a grid, the model's readout ignores the sizes of
            merged tokens, or the example does not fit the model.
        LookupError: the method needs something that this model does not have.
    """
    image = reduction.config.trial(_image(host, entry, example))
    blocks = entry.blocks(host)
    with evaluating(host), torch.no_grad():
        refuse_patched(host, entry)
        reduction.old_settings = apply_settings(host, entry)
        try:
            base, records = _record(host, blocks, image)
            reduction.in_tuples = any(isinstance(output, tuple) for _, _, output, _ in records)
            for index, (block, record) in enumerate(zip(blocks, records, strict=True)):
                _check_block(index, block, record)
            _check_phases(reduction, blocks)
            if reduction.embeds:
                find_patch_layer(host, entry)
            steps_hold = reduction.compute != "all" and all(map(_steps_hold, range(len(blocks)), blocks, records))
        except BaseException:
            restore_settings(host, entry, reduction.old_settings)
            raise
        attach(host, entry, reduction)
        try:
            reduced, history = _run_reduced(host, reduction, image)
            works = _works(reduction, history)
            if not works and not _same(base, reduced):
                raise ValueError("with nothing to reduce the output differs from the model's own; please report this model")
            reduction.merges = history.tokens.merged
            if history.tokens.merged:
                check_readout(host, reduction, image)
            # if nothing is reduced, the output stays the model's own, bit for bit, unless compute="needed" was passed
            if steps_hold and (works or reduction.compute == "needed"):
                reduction.skip_unused = _fast_equals(host, reduction, image, reduced)
        except BaseException:
            detach(host, entry)
            raise
        finally:
            reduction.around = None
            reduction.forget()
    reduction.train(host.training)


def attach_like(host: nn.Module, entry: ModelSpec, reduction: TokenReduction, verified: TokenReduction) -> None:
    """Attach ``reduction`` as ``verified``, which differs in its schedule only, was attached to a copy of the same model."""
    reduction.old_settings = apply_settings(host, entry)
    reduction.in_tuples, reduction.merges, reduction.skip_unused = verified.in_tuples, verified.merges, verified.skip_unused
    attach(host, entry, reduction)
    reduction.train(host.training)


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference allowed between two computations of the same value, given the precision of products."""
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        # products in bfloat16 at "medium"; "high" is TensorFloat32 or two bfloat16
        eps = torch.finfo(torch.bfloat16).eps if torch.get_float32_matmul_precision() == "medium" else 2.0**-10
    return max(TOLERANCE, 8 * eps)


def _fast_equals(host: nn.Module, reduction: TokenReduction, image: Tensor, whole: Any) -> bool:
    """Return True if the output is the same when unused rows are skipped; otherwise all rows will always be computed."""
    reduction.skip_unused = True
    fast, _ = _run_reduced(host, reduction, image)
    difference, size = difference_of(fast, whole)
    if difference <= tolerance(image.dtype if image.is_floating_point() else torch.float32) * max(size, 1e-6):
        return True
    log.warning(
        "%s: its output without the rows that are not read differs by %.2g of %.2g, so all rows are computed",
        path_of(type(host)),
        difference,
        size,
    )
    return False


def _image(host: nn.Module, entry: ModelSpec, example: Tensor | None) -> Tensor:
    reference = next(host.parameters())
    if reference.device.type == "meta":
        raise ValueError("this model has no weights yet (meta device); load them before reducing it")
    if example is None:
        return entry.example(host)
    if not entry.takes(example):
        raise not_a_batch(example, entry.input_axes)
    check_example(example, entry.example(host).shape[-3])
    return example.to(reference.device, reference.dtype)


def _record(host: nn.Module, blocks: list[nn.Module], image: Tensor) -> tuple[Any, list[tuple[Any, Any, Any, int]]]:
    """Run one plain forward; return its output, and for every block (input, keywords, output, fused-attention calls)."""
    records: list[tuple[Any, Any, Any, int]] = []
    calls: list[dict[str, Any]] = []
    before = [0]

    def enter(module: nn.Module, args: Any) -> None:
        before[0] = len(calls)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, named = by_name(names_of(module), args, kwargs, block_spec(module).own_mask)
        records.append((x, named, output, len(calls) - before[0]))

    hooks = [h for b in blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave, with_kwargs=True))]
    try:
        with AttentionTap(calls):
            output = host(image)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise unusable(image, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    if len(records) != len(blocks):
        raise ValueError(f"one forward ran {len(records)} of {len(blocks)} blocks; laconic needs each to run exactly once")
    return output, records


def _check_block(index: int, block: nn.Module, record: tuple[Any, Any, Any, int]) -> None:
    x, kwargs, output, fused = record
    expected, halves = first_of(output), block_spec(block)
    name = name_of(index, block)
    if halves.opaque_attention and halves.attention is not None:
        calls: list[dict[str, Any]] = []
        with AttentionTap(calls):
            halves.attention(block, x, **kwargs)
        fused = len(calls)
    if fused > 1:
        raise ValueError(f"{name} makes {fused} attention calls; laconic supports only blocks with exactly one")
    if fused != 1:
        raise ValueError(
            f"{name} makes {fused} calls of scaled_dot_product_attention; laconic needs one: its attention is not fused. "
            "Switch it on (timm.layers.set_fused_attn(True) before creating the model, or block.attn.fused_attn = True; "
            "transformers: make or load it with attn_implementation='sdpa')"
        )
    if halves.attention is None or halves.mlp is None:
        return  # a parallel block never runs in halves
    y = x + halves.attention(block, x, **kwargs)
    y = y + halves.mlp(block, y)
    difference = (y - expected).abs().max().item()
    if not difference <= tolerance(x.dtype) * (expected - x).abs().max().item():
        raise ValueError(
            f"{name}: its two halves differ from its forward by {difference:.2g}. Laconic's entry is for another version of "
            "this class, or its forward was changed; the model cannot be reduced safely"
        )


def _steps_hold(index: int, block: nn.Module, record: tuple[Any, Any, Any, int]) -> bool:
    """Return True if the steps of a block's attention reproduce it; otherwise all its rows will always be computed."""
    x, kwargs, _, _ = record
    halves = block_spec(block)
    steps = halves.steps
    if steps is None or halves.attention is None or not steps.known(block):
        return True
    whole, first = halves.attention(block, x, **kwargs), x[:, :1]
    h = steps.norm(block, x)
    alone = attend(block, steps, steps.queries(block, steps.norm(block, first)), *steps.keys_values(block, h), None)
    together = attend(block, steps, *steps.project(block, h), None)
    difference = max((alone - whole[:, :1]).abs().max().item(), (together - whole).abs().max().item())
    if difference <= tolerance(x.dtype) * whole.abs().max().item():
        return True
    log.warning(
        "block %d (%s): its attention computed in steps differs by %.2g from its own, so all rows are computed, even those "
        "that are not read",
        index,
        path_of(type(block)),
        difference,
    )
    return False


def _check_phases(reduction: TokenReduction, blocks: list[nn.Module]) -> None:
    row = reduction.config.info
    everywhere = all(shape.has_cls for shape in reduction.stages.shapes)
    if row.class_readout and (not everywhere or reduction.pooling[0] != "token"):
        reads = f"reads its tokens by {reduction.pooling[0]!r}" if everywhere else "has none in all of its stages"
        raise LookupError(
            f"{row.name} gives its result in the class token, and this model {reads}; use a model that reads the "
            "class token, or another method (ats, dtps, dynamicvit)"
        )
    for index, block in enumerate(blocks):
        halves, reducer = block_spec(block), reduction.reducer(index)
        if halves.mlp is None and reducer is not None and reducer.overrides("between"):
            raise ValueError(
                f"block {index} ({path_of(type(block))}) computes attention and MLP side by side, so there is no place between "
                f"them for {reduction.config.info.name}; take a method that reduces before a block (dtps, dynamicvit)"
            )


def _run_reduced(host: nn.Module, reduction: TokenReduction, image: Tensor) -> tuple[Any, History]:
    """Run the reduced model; return its output and its history.

    Raises:
        ValueError: a reducer changed a prefix token, or the forward does not go through the replaced methods.
    """

    def untouched(own: Any, before: Tokens, *arguments: Any) -> Tokens:
        after: Tokens = own(before, *arguments)
        if reduction.config.info.class_readout:
            return after
        if not torch.equal(before.x[:, : before.prefix], after.x[:, : after.prefix]):
            raise ValueError(f"{reduction.config.info.name} changed a prefix token; this is an error in the method")
        return after

    reduction.around = untouched
    reduction.train(False)
    try:
        out = host(image)
    finally:
        reduction.around = None
    history = reduction.last()
    if history is None or (history.block + 1 != reduction.depth and not _idle_after(reduction, history)):
        raise ValueError(
            f"{path_of(type(host))} has a forward of its own (set by another tool) that does not call the methods of its "
            "class; undo that before reducing"
        )
    return out, history


def _idle_after(reduction: TokenReduction, history: History) -> bool:
    """Return True if no block after this entry has a reducer: such blocks may add no entry."""
    return all(reduction.reducer(block) is None for block in range(history.block + 1, reduction.depth))


def _works(reduction: TokenReduction, history: History) -> bool:
    """Return True if any block has anything to reduce."""
    before = 0
    for block, n in enumerate(reduction.counts(history.entry(0).token_of_patch.shape[1])):
        if block in reduction.starts:
            before = history.entry(block + 1).token_of_patch.shape[1]
        reducer = reduction.reducer(block)
        if reducer is not None and reducer.active(before, n):
            return True
        before = n
    return False


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):  # the outputs of transformers' models
        return all(_same(x, b[name]) for name, x in a.items())
    return all(_same(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple | list) else True
