"""The calls of a reduced model, and the forwards of its blocks.

`laconic.core.patching` makes these functions methods of the model and its blocks. A `Call` lasts for one execution of one of
the model's methods, on one thread; a block finds its input tokens by its input features (`laconic.core.history`) or, if
these were changed in between, by the running call.

Under torch.compile and torch.export one trace is one call, and features are not marked: the call carries the forward.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from laconic.core.backbone import HOSTS, ModelSpec, unhooked
from laconic.core.block_forward import BlockRun, Reads, bare, no_hooks_inside, pass_block
from laconic.core.dense import finish_output
from laconic.core.grid import GridMap
from laconic.core.history import History, find, mark
from laconic.core.links import LINK, BlockLink, ModelRef, reduction_in
from laconic.core.running_calls import calls as running
from laconic.core.running_calls import on_thread, traced

MASKS = ("attn_mask", "attention_mask", "is_causal", "head_mask", "layer_head_mask", "output_attentions")
# norms that process each token independently
NORMS = ("torch.nn.modules.normalization", "torch.nn.modules.linear", "timm.layers.norm", "laconic.models")


class Call:
    """One call of a method of a reduced model.

    ``grid`` is the grid of the image, if known. ``fast``: rows that are not read may be skipped; ``answers``: of the last
    block's output only the prefix tokens are read. ``history`` is the newest entry of the forward, ``begun`` the number of
    forwards that began in this call; ``runs_blocks``: the call runs blocks itself, not only through an inner call.
    ``tracing``: a graph is traced, and features cannot be marked.
    """

    def __init__(
        self,
        host: Any,
        ref: ModelRef,
        reduction: Any,
        grid: tuple[int, ...] | None,
        fast: bool,
        answers: bool,
        tracing: bool,
    ) -> None:
        self.host, self.ref, self.reduction, self.grid, self.fast, self.answers = host, ref, reduction, grid, fast, answers
        self.tracing = tracing
        self.history: History | None = None
        self.group: Tensor | None = None  # [B, P] of the patches at the patch embedding (`laconic.core.patch_input`)
        self.begun, self.runs_blocks = 0, False


def call_of(ref: ModelRef) -> Call | None:
    """Return the innermost running call if it belongs to this model, else None."""
    calls = traced or on_thread.calls
    return calls[-1] if calls and calls[-1].ref is ref else None


# ------------------------------------------------------------------------------------------------ calls of the model
def run_call(name: str, module: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Replacement for the method ``name`` of the model, which runs its blocks or reads their features: run it as a `Call`.

    The name is given, since in torch.compile ``own.__name__`` is that of a decorator's inner function.
    """
    if call_of(module._laconic.ref) is None and _empty(module, args, kwargs) is not None:
        return _of_no_images(name, module, own, args, kwargs)
    return call_method(name, module, own, args, kwargs)[0]


def _empty(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the input images (or clips) if the batch is empty, else None."""
    x = args[0] if args else kwargs.get(module._laconic.names[0])
    return x if isinstance(x, Tensor) and x.dim() in (4, 5) and x.shape[0] == 0 and not torch.compiler.is_compiling() else None


def _of_no_images(method: str, module: Any, own: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the result for an empty batch: that for the smallest batch, of black images, sliced to zero images."""
    x = _empty(module, args, kwargs)
    assert x is not None
    host, name = module if "laconic" in module._modules else module._laconic.ref(), module._laconic.names[0]
    few = x.new_zeros(reduction_in(host).config.batch_multiple, *x.shape[1:])
    out, call = call_method(method, module, own, (few, *args[1:]) if args else (), kwargs if args else {**kwargs, name: few})
    if call.begun:
        call.reduction.complete(call.history.images(0, 0, 1))  # type: ignore[union-attr]
    return _none_of(out)


def _none_of(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out[:0]
    if isinstance(out, tuple | list):
        values = [_none_of(value) for value in out]
        return type(out)(*values) if hasattr(out, "_fields") else type(out)(values)
    if isinstance(out, Mapping):
        for key in list(out):
            out[key] = _none_of(out[key])  # type: ignore[index]
    return out


def call_method(name: str, module: Any, own: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Call]:
    """Run a method of the model (or of its encoder) as a call.

    Returns:
        the result, with features marked and, with ``restore``, expanded to all patches; and the call.
    """
    tracing = torch.compiler.is_compiling()
    calls = traced if tracing and torch.compiler.is_dynamo_compiling() else on_thread.calls
    link = module._laconic
    outer = calls[-1] if calls and calls[-1].ref is link.ref else None
    host = module if "laconic" in module._modules else link.ref() if outer is None else outer.host
    call = _open(host, name if module is host else "", args, kwargs, outer, tracing)
    calls.append(call)
    try:
        out = own(module, *args, **kwargs)
        if call.history is not None and (outer is None or name not in HOSTS[call.reduction.host_path].head_methods):
            out = finish_output(host, module, name, out, call)
    finally:
        calls.pop()
        # the inner call is part of the outer one, unless a hook made it while the outer one was running blocks
        if outer is not None and call.begun and not outer.runs_blocks and not (module is host and name == "forward"):
            outer.history, outer.begun = call.history, outer.begun + call.begun
    if call.begun:
        call.reduction.complete(call.history, tracing)
    return out, call


def _open(host: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], outer: Call | None, tracing: bool) -> Call:
    reduction, link = reduction_in(host), host._laconic
    entry, image = HOSTS[reduction.host_path], args[0] if args else kwargs.get(link.names[0])
    grid = None if outer is None else outer.grid
    if outer is not None and not outer.begun:
        pass  # the same images
    elif entry.takes(image):
        grid = entry.grid_of(host, entry.sides(image))
    elif image is not None:
        _refuse_proxy(image)
    if (tracing or torch._C._is_tracing()) and _in_onnx_export():
        raise ValueError(
            "torch.onnx.export cannot write the stable sorting of a reduced model; use laconic.export(model, path), which "
            "writes and verifies ONNX files"
        )
    if entry.unsupported_kwargs and name == "forward":
        _refuse_arguments(host, entry.unsupported_kwargs, args, kwargs)
    ends = _check_blocks(host, entry, reduction) if outer is None else False
    if not tracing and reduction._fresh and not host.training:
        reduction.warn_untrained()
    fast = outer.fast if outer is not None else reduction.skip_unused and not host.training and (tracing or not _global_hooks())
    if name == "forward":
        answers = fast and ends and _answers(host, entry, reduction)
    else:  # forward_features may skip rows if the model's own forward calls it first; any other caller needs all rows
        answers = name == "forward_features" and outer is not None and outer.answers and not outer.begun
    call = Call(host, link.ref, reduction, grid, fast, answers, tracing)
    if outer is not None and not outer.begun:
        call.group = outer.group
    if name in entry.head_methods and isinstance(image, Tensor):
        call.history = known(image, call.ref) or (None if outer is None or outer.begun != 1 else outer.history)
    return call


def _in_onnx_export() -> bool:
    """Return True inside torch.onnx.export; its second attempt traces by dynamo, where is_in_onnx_export is False."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return torch.onnx.is_in_onnx_export() or bool(getattr(flags, "_is_onnx_exporting", False))


def _global_hooks() -> bool:
    module: Any = torch.nn.modules.module  # torch 2.6 has no function for it
    forward = module._global_forward_pre_hooks or module._global_forward_hooks
    return bool(forward or module._global_backward_pre_hooks or module._global_backward_hooks)


def _answers(host: Any, entry: ModelSpec, reduction: Any) -> bool:
    """Return True if the model, as it is now, reads only the prefix tokens of the last block's output."""
    if reduction.restore or not reduction.known_readout or entry.pooling(host)[0] != "token":
        return False
    for name in entry.head_reads_prefix_only:
        if name in host.__dict__:
            return False
    for child in host._modules.values():  # a hook on the container of the blocks would see the last block's output
        if isinstance(child, nn.Sequential | nn.ModuleList) and not unhooked(child):
            return False
    norm = entry.final_norm(host)
    return norm is None or (type(norm).__module__.startswith(NORMS) and no_hooks_inside(norm))


def _check_blocks(host: Any, entry: ModelSpec, reduction: Any) -> bool:
    """Return True if the last block is the one that was last when the model was reduced.

    Raises:
        RuntimeError: a block was added since, or the blocks cannot be found.
    """
    last = None
    try:
        blocks = entry.blocks(host)
    except (TypeError, AttributeError) as error:
        raise RuntimeError(
            f"the blocks of this {type(host).__name__} are not found where they were when it was reduced ({error}); "
            "call laconic.restore_(model), change its blocks, and reduce it again"
        ) from error
    for number, block in enumerate(blocks):
        link = block.__dict__.get(LINK)
        if link is None:  # the block may be inside a wrapper, e.g. of FSDP
            link = next((one.__dict__[LINK] for one in block.modules() if isinstance(one.__dict__.get(LINK), BlockLink)), None)
        if link is None:
            raise RuntimeError(
                f"block {number} was put into the model after it was reduced, so Laconic does not track its tokens; "
                "call laconic.restore_(model), change its blocks, and reduce it again"
            )
        last = link
    return last is not None and last.index + 1 == reduction.depth


def _refuse_arguments(host: Any, refused: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    given = {**dict(zip(host._laconic.names, args, strict=False)), **kwargs}
    for name in refused:
        if given.get(name) is not None:
            raise ValueError(
                f"a reduced {type(host).__name__} takes no {name}: it is made for all tokens and does not fit the kept ones"
            )


def _refuse_proxy(x: Any) -> None:
    if type(x).__module__.startswith("torch.fx"):
        raise TypeError(
            "a reduced model cannot be traced symbolically by torch.fx, because its control flow depends on its tokens. Use "
            "torch.export.export (or laconic.export), or trace the model before it is reduced"
        )


# ------------------------------------------------------------------------------------------------ blocks
def run_block(block: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Replacement for the forward of a block."""
    link: BlockLink = block._laconic
    x = args[0] if args else kwargs.get(link.names[0])
    calls = traced or on_thread.calls
    call = calls[-1] if calls and calls[-1].ref is link.ref else None
    history = find_history(link, call, x)
    if link.passthrough and history.plain and len(args) == 1 and not block.training and (not kwargs or bare(kwargs)):
        out = own(block, x, **kwargs)
        record_output(call, history, out[0] if isinstance(out, tuple) else out, link.index)
        return out
    named: dict[str, Any] = {}
    if kwargs or len(args) != 1:
        x, named = by_name(link.names, args, kwargs, link.spec.own_mask)
    reduction, tokens = history.reduction, history.tokens.replace(x=x)
    if tokens.shared_from is not None and not (call is not None and call.tracing) and find(tokens.x) is None:
        tokens = tokens.replace(shared_from=None)  # a hook has changed the features, perhaps those of each image in its own way
    if block.training:
        reduction.refuse_lost(history, tokens)
    count, n = len(tokens), history.counts[link.index - history.start]
    reducer = reduction.reducer(link.index)
    if reducer is not None and not reducer.active(count, n):
        reducer = None
    watcher = reduction.watcher(link.index + 1, history, count)
    last = link.index + 1 == reduction.depth
    reads: Reads = "all"
    options = call if call is not None else history if _recomputing() else None
    reduces = not reduction.adaptive or reducer is not None or tokens.origin is not None or tokens.shared_from is not None
    if options is not None and options.fast and not block.training and reduces:  # else the output stays the model's own
        reads = "prefix" if last and options.answers else "needed"
    tokens = pass_block(BlockRun(block, own, link, reduction, named, reducer, watcher, n, reads), tokens)
    if reducer is not None and not reduction.adaptive and len(tokens) != n and tokens.keep_mask is None:
        raise RuntimeError(
            f"{reduction.config.info.name} kept {len(tokens)} patch tokens at block {link.index}; the schedule says {n}"
        )
    history, x = history.after(link.index, tokens), tokens.x
    if not last and link.index + 1 in reduction.starts:
        full = GridMap.of(tokens)
        x = x if full is None else torch.cat([x[:, : tokens.prefix], full.fill(tokens.patches)], 1)
    record_output(call, history, x, link.index)
    return (x,) if reduction.in_tuples else x


def find_history(link: BlockLink, call: Call | None, x: Any) -> History:
    """Return the history of a block's input features: by their mark, or else from the running call of the model.

    Raises:
        TypeError: the input is not a tensor.
        RuntimeError: the features belong to no forward of this model.
    """
    if not isinstance(x, Tensor):
        _refuse_proxy(x)
        raise TypeError(f"{link.name} got a {type(x).__name__}; a tensor of features was expected")
    host = link.ref() if call is None else call.host
    reduction = reduction_in(host) if call is None else call.reduction
    if link.index in reduction.starts:
        return _begin(host, reduction, call, link, x)
    history = None if call is not None and call.tracing else find(x)
    if history is not None and history.reduction.ref is not link.ref:
        history = None
    if history is None and call is not None:
        history = call.history  # features changed by a hook or by the model: they still belong to this call
    if history is None or history.shape != x.shape[:2]:
        _refuse_features(link, x, history)
    return history


def _begin(host: Any, reduction: Any, call: Call | None, link: BlockLink, x: Tensor) -> History:
    """Return the history of the tokens that enter the model, or one of its stages."""
    if host is None:
        raise RuntimeError(
            f"the model of {link.name} no longer exists; keep a reference to it, or restore_ it before using its blocks alone"
        )
    stage = reduction.stages.stage(link.index)
    if call is None and _recomputing():
        history = known(x, link.ref)
        if history is not None and history.block < link.index:
            return history
    history = reduction.begin(host, x, stage, call, call.history if call and stage else None)
    if call is not None:
        call.history, call.runs_blocks = history, True
        call.begun += stage == 0
        history.fast, history.answers = call.fast, call.answers
        if not call.tracing:
            mark(x, history)
    return history


def _recomputing() -> bool:
    """Return True in a backward pass, where a block that runs is being recomputed by gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def record_output(call: Call | None, history: History, x: Tensor, index: int) -> None:
    """Mark a block's output features with their history; after the last block the forward is complete."""
    if call is not None:
        call.history = history
        if call.tracing:
            return
    elif index + 1 == history.reduction.depth and not _recomputing():
        history.reduction.complete(history)  # blocks that the user runs one by one; not a recomputation in a backward pass
    mark(x, history)


def known(x: Tensor, ref: ModelRef) -> History | None:
    """Return the history that features are marked with, if it belongs to this model."""
    call = call_of(ref)
    if call is not None and call.tracing:
        return None
    history = find(x)
    return history if history is not None and history.reduction.ref is ref else None


def current(x: Tensor, ref: ModelRef) -> History | None:
    """Return the history of features after the last block: by their mark, or else from the running call."""
    history = known(x, ref)
    if history is None:
        call = call_of(ref)
        if call is not None and call.begun <= 1:
            history = call.history
    return history


def _refuse_features(link: BlockLink, x: Tensor, history: History | None) -> NoReturn:
    if torch.compiler.is_compiling() and not running():
        raise RuntimeError(f"{link.name} cannot be compiled alone: only the whole model tracks its tokens; compile the model")
    if history is None:
        raise RuntimeError(
            f"{link.name} got features of shape {tuple(x.shape)} that come from no block of this model: a copy, or the result "
            "of an operation, outside the model's own forward. Run the model's forward, or pass what a block returned"
        )
    images, count = history.tokens.shape
    raise RuntimeError(
        f"block {link.index} got {tuple(x.shape)}, but the block before it returned {images} images of {count} tokens; pass "
        "what that block returned"
    )


def by_name(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], own_mask: str | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Return a block's input features, and its other arguments by name (``names`` are its parameters).

    A mask under the name ``own_mask`` is the model's own: a boolean one hides nothing, and is omitted.

    Raises:
        ValueError: an attention mask is passed, or attention weights are requested: neither fits the kept tokens.
    """
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    own = named.get(own_mask) if own_mask is not None else None
    if own_mask is not None and own is not None and own.dtype == torch.bool:
        named[own_mask] = None
    for name in MASKS:
        if name != own_mask and named.get(name) is not None and named[name] is not False:
            raise ValueError(f"a reduced model takes no {name}: it is made for all tokens and does not fit the kept ones")
    return named.pop(names[0]), named
