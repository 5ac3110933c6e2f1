"""Run one block of a reduced model on one of four execution paths; `pass_block` chooses the path.

1. Untouched: the block's own forward, if these tokens need nothing else.
2. In two halves: attention, the method with a view of that attention, MLP. If the steps of the block's attention are known
   (`laconic.core.backbone.AttentionSteps`), q, k and v are computed explicitly; otherwise an `AttentionTap` intercepts the
   call of fused attention. A method that only drops tokens, by keys and the class query, runs before the queries of the
   other tokens are computed.
3. Prefix tokens only: the last block, if the model's output reads no other rows. Keys and values are computed for all tokens.
4. Packed: if every image has its own number of tokens, the tokens of all images run as one row (`laconic.core.packing`).

Tokens that share the features of others (`Tokens.shared_from`) are not in that row; on the other paths all tokens run, and
then get the features that they share.

All paths give the same output up to rounding; `laconic.core.verify` compares them on the user's model. Hooks, adapters and
overrides inside a block are detected at each forward, and a path that would skip them is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.attention import AttentionTap, AttentionView
from laconic.core.attention_bias import bias_of
from laconic.core.backbone import AttentionSteps, BlockSpec, path_of
from laconic.core.gather import table_rows
from laconic.core.grid import GridMap
from laconic.core.method import Reducer
from laconic.core.packing import Packing
from laconic.core.tokens import Tokens

Reads = Literal["all", "needed", "prefix"]  # needed rows of a block: all; those of the kept tokens; those of the prefix tokens


class BlockRun(NamedTuple):
    """One run of a block of a reduced model.

    Args:
        block: the module.
        own: the forward of the block's class.
        link: facts about the block that were recorded when the model was reduced (`laconic.core.links.BlockLink`).
        reduction: the model's `laconic.core.token_reduction.TokenReduction`.
        kwargs: the block's arguments besides the features, by name.
        reducer: the block's reducer; None if it has nothing to do.
        watcher: the reducer of the next block, if it reads this block's attention.
        n: patch tokens to keep.
        reads: rows of the output that are read; "all" also if the fast path is off.
    """

    block: Any
    own: Any
    link: Any
    reduction: Any
    kwargs: dict[str, Any]
    reducer: Reducer | None
    watcher: Reducer | None
    n: int
    reads: Reads

    @property
    def spec(self) -> BlockSpec:
        """The table entry of the block's class."""
        return self.link.spec  # type: ignore[no-any-return]


def pass_block(run: BlockRun, tokens: Tokens) -> Tokens:
    """Run a block on tokens, and its reducer in each of its phases."""
    reducer, reduction = run.reducer, run.reduction
    if run.reads == "prefix":
        alone = prefix_only(run, tokens)
        if alone is not None:
            return alone
    phases = () if reducer is None else reducer.phases
    if reducer is not None and "before" in phases:
        tokens = apply(reduction, reducer, "before", tokens, run.n)
    if reducer is not None and "ahead" in phases:
        tokens = _look_ahead(run, reducer, tokens)
    tokens = _run(run, reducer if "between" in phases else None, tokens)
    if tokens.shared_from is not None and not packs(reduction, run.spec, tokens):
        tokens = tokens.share(tokens.shared_from)
    if reducer is not None and "after" in phases:
        tokens = apply(reduction, reducer, "after", tokens, run.n)
    return tokens


def apply(reduction: Any, reducer: Reducer, phase: str, tokens: Tokens, *arguments: Any) -> Tokens:
    """Call a reducer in one phase; similarities, exponentials and sums of scores stay in float32 under autocast."""
    work, kind = getattr(reducer, phase), tokens.x.device.type
    if reduction.around is not None:
        work = partial(reduction.around, work)
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            out: Tokens = work(tokens, *arguments)
    else:
        out = work(tokens, *arguments)
    if reduction.compacts and reduction.execution in ("packed", "padded") and not reduction.training:
        return out.drop_hidden(reduction.bucket)
    return out


# ------------------------------------------------------------------------------------------------ whole blocks
def _run(run: BlockRun, between: Reducer | None, tokens: Tokens) -> Tokens:
    """Run the block untouched, by known steps, or with its attention tapped; ``between`` is applied after the attention."""
    block, spec, reduction = run.block, run.link.spec, run.reduction
    packing = Packing.of(tokens) if packs(reduction, spec, tokens) else None
    rows = _bias_rows(spec, tokens) if spec.relative else None
    # transformers checkpoints a block inside its class's forward; here `patching.checkpointed` already wraps the whole run
    checkpointing = block.training and getattr(block, "gradient_checkpointing", False)
    idle = between is None and run.watcher is None and packing is None and rows is None and not checkpointing
    if idle and tokens.attention is None and tokens.switches is None and (tokens.is_plain or _bias(spec, tokens) is None):
        return tokens.replace(x=first_of(run.own(block, tokens.x, **_placed(spec, tokens, None, run.kwargs))))
    if run.reads != "all" and run.watcher is None and packing is None and not (reduction.adaptive and reduction.packed):
        steps = known_steps(run, tokens)
        if steps is not None:
            return _by_steps(run, steps, between, tokens)
    return _tapped(run, between, tokens, packing, rows, checkpointing)


def _tapped(
    run: BlockRun, between: Reducer | None, tokens: Tokens, packing: Packing | None, rows: Tensor | None, checkpointing: bool
) -> Tokens:
    """Run the block with its call of fused attention intercepted; on a packed row if ``packing`` is given."""
    block, spec, watcher = run.block, run.spec, run.watcher
    bias = None if packing is not None else _bias(spec, tokens)
    kwargs = _placed(spec, tokens, packing, run.kwargs)
    calls: list[dict[str, Any]] = []
    x = tokens.x if packing is None else packing.pack(tokens.x)
    in_halves = between is not None or tokens.switches is not None or spec.opaque_attention or checkpointing
    with AttentionTap(calls, bias, tokens.attention, rows) if packing is None else packing.watch(calls, rows):
        if in_halves and spec.attention is not None:
            x = x + switched(tokens, packing, "attention", partial(spec.attention, block, **kwargs), x)
        elif tokens.switches is not None:
            x = x + switched(tokens, packing, "whole", partial(run.own, block, **kwargs), x)
        else:
            x = first_of(run.own(block, x, **kwargs))
    if not calls and (bias is not None or rows is not None):
        AttentionView.of(calls, tokens, run.link.name)  # raises: without an attention call the bias had no effect
    tokens = tokens.replace(x=x if packing is None else packing.unpack(x, tokens.x), attention=None)
    if watcher is not None or between is not None:
        padded = calls if packing is None else packing.seen(calls)
        seen = AttentionView.of(padded, tokens, run.link.name, coarse=spec.grid is not None)
        if watcher is not None:
            tokens = apply(run.reduction, watcher, "watch", tokens, seen)
        if between is not None:
            tokens = apply(run.reduction, between, "between", tokens, seen, run.n)
    if in_halves and spec.mlp is not None:
        tokens = tokens.replace(x=_mlp(block, spec, run.reduction, tokens))
    return tokens.replace(switches=None)


def _mlp(block: Any, spec: BlockSpec, reduction: Any, tokens: Tokens) -> Tensor:
    mlp: Any = spec.mlp
    packing, half = Packing.of(tokens) if packs(reduction, spec, tokens) else None, partial(mlp, block)
    if packing is None:
        return tokens.x + switched(tokens, None, "mlp", half, tokens.x)
    row = packing.pack(tokens.x)
    return packing.unpack(row + switched(tokens, packing, "mlp", half, row), tokens.x)


def _look_ahead(run: BlockRun, reducer: Reducer, tokens: Tokens) -> Tokens:
    """Run the reducer's ``ahead`` phase, with a view of the block's attention: its attention half runs one extra time."""
    spec = run.spec
    calls: list[dict[str, Any]] = []
    with AttentionTap(calls, _bias(spec, tokens), rows=_bias_rows(spec, tokens)):
        half = spec.attention or run.own
        half(run.block, tokens.x, **_placed(spec, tokens, None, run.kwargs))
    seen = AttentionView.of(calls, tokens, run.link.name, coarse=spec.grid is not None)
    return apply(run.reduction, reducer, "ahead", tokens, seen, run.n)


# ------------------------------------------------------------------------------------------------ by known steps
def known_steps(run: BlockRun, tokens: Tokens) -> AttentionSteps | None:
    """Return the steps of this block's attention; None if they are not known or do not suffice for these tokens."""
    steps = run.link.spec.steps
    if steps is None or not _only_gated(tokens) or not (not run.kwargs or bare(run.kwargs)) or not steps.known(run.block):
        return None
    return steps  # type: ignore[no-any-return]


def _by_steps(run: BlockRun, steps: AttentionSteps, between: Reducer | None, tokens: Tokens) -> Tokens:
    """Run both halves; a method that only drops tokens, by the class query, runs before the other queries are computed."""
    block, spec, reduction = run.block, run.link.spec, run.reduction
    mlp: Any = spec.mlp
    bias = _bias(spec, tokens)
    h = steps.norm(block, tokens.x)
    if between is not None and between.reads == "class" and not reduction.adaptive and no_hooks_inside(block):
        k, v = steps.keys_values(block, h)
        call = {"query": steps.queries(block, h[:, :1]), "key": k, "value": v, "attn_mask": bias}
        tokens = apply(reduction, between, "between", tokens, AttentionView.of([call], tokens, run.link.name), run.n)
        q = steps.queries(block, steps.norm(block, tokens.x))
        x = tokens.x + attend(block, steps, q, k, v, bias)
        return tokens.replace(x=x + mlp(block, x))
    q, k, v = steps.project(block, h)
    bias = bias if bias is None or bias.dtype == k.dtype else bias.to(k.dtype)
    tokens = tokens.replace(x=tokens.x + attend(block, steps, q, k, v, bias))
    if between is not None:
        seen = AttentionView.of([{"query": q, "key": k, "value": v, "attn_mask": bias}], tokens, run.link.name)
        tokens = apply(reduction, between, "between", tokens, seen, run.n)
    return tokens.replace(x=tokens.x + mlp(block, tokens.x))


def prefix_only(run: BlockRun, tokens: Tokens) -> Tokens | None:
    """Run the block for its prefix tokens only; record which patch tokens are kept, without their features.

    Return None if that is not possible. If the steps of the attention are not known, the attention runs on all rows and only
    the MLP is limited to the prefix tokens; a block with a reducer then returns None.
    """
    block, spec, reducer, reduction = run.block, run.spec, run.reducer, run.reduction
    decides = reducer is not None and (reducer.reads == "anywhere" or reduction.adaptive)
    if decides or run.watcher is not None or spec.attention is None or spec.mlp is None or not _only_gated(tokens):
        return None
    if spec.grid is not None or spec.relative or not no_hooks_inside(block):
        return None
    kwargs, bias = _placed(spec, tokens, None, run.kwargs), _bias(spec, tokens)
    steps = known_steps(run._replace(kwargs=kwargs), tokens)
    first = tokens.x[:, : tokens.prefix]
    if steps is None:
        if reducer is not None or tokens.shared_from is not None:
            return None
        with AttentionTap([], bias):
            x = first + spec.attention(block, tokens.x, **kwargs)[:, : tokens.prefix]
        return tokens.replace(x=x + spec.mlp(block, x))
    packing = Packing.of(tokens) if tokens.shared_from is not None and packs(reduction, run.spec, tokens) else None
    h = steps.norm(block, tokens.x if packing is None else packing.pack(tokens.x))
    k, v = steps.keys_values(block, h)
    if packing is not None:
        h, k, v = steps.norm(block, first), packing.heads(k), packing.heads(v)
    q = steps.queries(block, h[:, : tokens.prefix])
    bias = None if bias is None else bias.to(k.dtype)
    x = first + attend(block, steps, q, k, v, bias)
    if reducer is not None:
        seen = AttentionView.of([{"query": q, "key": k, "value": v, "attn_mask": bias}], tokens, run.link.name)
        # such a reducer reads no features, and its merged ones are not read: give it features of width 0
        tokens = apply(reduction, reducer, "between", tokens.replace(x=tokens.x[..., :0]), seen, run.n)
    return tokens.replace(x=x + spec.mlp(block, x))


def attend(block: Any, steps: AttentionSteps, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return the attention output for the rows of the queries, as it is added to x."""
    bias = bias if bias is None or bias.dtype == k.dtype else bias.to(k.dtype)
    return steps.added(block, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


# ------------------------------------------------------------------------------------------------ hooks and overrides
def no_hooks_inside(module: nn.Module) -> bool:
    """Return True if neither this module nor a submodule has a hook or a forward set on the instance."""
    waiting: list[Any] = [module]
    while waiting:
        one = waiting.pop()
        if one is None:
            continue
        if one._forward_hooks or one._forward_pre_hooks or one._backward_hooks or one._backward_pre_hooks:
            return False
        if "forward" in one.__dict__:
            return False
        waiting.extend(one._modules.values())
    return True


# ------------------------------------------------------------------------------------------------ parts of the above
def switched(tokens: Tokens, packing: Packing | None, part: str, half: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the output that one half of the block adds to ``x``, times its gates (see `laconic.core.block_gates`)."""
    switches = tokens.switches
    if switches is None:
        return half(x)
    added: Tensor = getattr(switches if packing is None else switches.packed(packing.index), part)(half, x)
    return added


def first_of(output: Any) -> Tensor:
    """Return the features in a block's output, which may be a tuple that starts with them."""
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features


def packs(reduction: Any, spec: BlockSpec, tokens: Tokens) -> bool:
    """Return True if the block may run packed; False if it uses a grid, or a bias for pairs of tokens some of which left."""
    return reduction.packed and spec.grid is None and (not spec.relative or tokens.shared_from is not None)


def _only_gated(tokens: Tokens) -> bool:
    """Return True if these tokens need nothing but a factor on the attention towards each token."""
    return (
        tokens.keep_mask is None
        and tokens.visible_prefix is None
        and tokens.attention is None
        and tokens.switches is None
        and tokens.parked is None
    )


def bare(kwargs: Mapping[str, Any]) -> bool:
    """Return True if every argument is None or False."""
    for value in kwargs.values():  # noqa: SIM110 (a generator would cost a frame for every value)
        if value is not None and value is not False:
            return False
    return True


def _bias(spec: BlockSpec, tokens: Tokens) -> Tensor | None:
    """Return the bias of the tokens on attention logits; None if they have none, or if keys are cells of the full grid."""
    if spec.grid is not None or (tokens.attn_scale is None and tokens.keep_mask is None and tokens.visible_prefix is None):
        return None
    return bias_of(tokens)


def _bias_rows(spec: BlockSpec, tokens: Tokens) -> Tensor | None:
    """Return the original indices [B, N] of the tokens, to index a bias that was made for all original tokens."""
    if not spec.relative or tokens.origin is None:
        return None
    first = torch.arange(tokens.prefix, device=tokens.origin.device).expand(tokens.origin.shape[0], -1)
    return torch.cat([first, tokens.origin + tokens.prefix], 1)


def _placed(spec: BlockSpec, tokens: Tokens, packing: Packing | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a block's keywords with the tokens' positions: patches, rows of the rotary table, or the map of the grid."""
    if spec.grid is not None:
        moved = GridMap.of(tokens)
        return kwargs if moved is None else {**kwargs, spec.grid: moved}
    if spec.origin is not None:
        if packing is None and tokens.origin is None:
            return kwargs
        return {**kwargs, spec.origin: tokens.origin_index if packing is None else packing.pack(tokens.origin_index)}
    table = None if spec.rope is None else kwargs.get(spec.rope)
    if spec.rope is None or table is None or (packing is None and tokens.origin is None):
        return kwargs
    if isinstance(table, tuple):  # transformers has separate cosines and sines: concatenate, gather, split
        cos, sin = table
        rows = _rotary(torch.cat([sin, cos], -1), tokens, packing)
        return {**kwargs, spec.rope: (rows[..., sin.shape[-1] :], rows[..., : sin.shape[-1]])}
    return {**kwargs, spec.rope: _rotary(table, tokens, packing)}


def _rotary(table: Tensor, tokens: Tokens, packing: Packing | None) -> Tensor:
    return table_rows(table, tokens.origin_index) if packing is None else packing.rotary(table, tokens)


def name_of(index: int, block: nn.Module) -> str:
    """Return the name of a block for messages."""
    return f"block {index} ({path_of(type(block))})"
