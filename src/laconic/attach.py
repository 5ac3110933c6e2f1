"""reduce_ and restore_: a method between the halves of a host's blocks, and the ledger of one forward.

The trick, said out loud: every block of the user's model gets a ``forward`` of its own that runs the same submodules in
two halves, and a reducer works on the tokens before, between or after them. Blocks with nothing to do run their class's
own forward. What has become of each patch is written into a ledger, one entry a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.attention import SOFT_FLOOR, Seen, Watch, bias_of
from laconic.hosts import HOSTS, Host, find_host, halves_of, path_of
from laconic.reducer import Method, Reducer, Site, resolve
from laconic.schedule import Schedule
from laconic.tokens import Tokens


class Compression(nn.Module):
    """Lives on the reduced model as ``model.laconic``: its reducers, its schedule, and the ledger of the last forward.

    The ledger makes a reduced model unfit for two threads at once; copies of the model have ledgers of their own.
    """

    def __init__(self, model: nn.Module, host: Host, config: Method, schedule: Schedule) -> None:
        super().__init__()
        blocks = host.blocks(model)
        schedule.check_depth(len(blocks))
        self.config, self.host_path, self.depth = config, host.path, len(blocks)
        self.__dict__["model"] = model  # no child: the model owns this module, not the other way round
        self.prefix, self.has_cls = host.prefix(model)
        self.grid, self.pooling = host.grid(model), host.pooling(model)
        self.schedule = schedule
        keep = schedule.values if schedule.unit == "keep" else (None,) * len(schedule.at)
        dim, heads = host.dim(model), host.heads(model)
        self.reducers = nn.ModuleDict(
            {str(block): config.build(Site(stage, block, dim, heads, keep[stage])) for stage, block in enumerate(schedule.at)}
        )
        reference = next(model.parameters())
        self.to(reference.device, reference.dtype)
        self.train(model.training)
        self.ledger: list[Tokens | None] = [None] * (self.depth + 1)
        self.observer: Callable[[Tokens, Tokens], None] | None = None  # sees the tokens before and after each moment

    # -------------------------------------------------------------------------------------------- schedule
    def set_schedule(self, schedule: Schedule) -> None:
        """Change the schedule between two steps (warm-in); the blocks must stay the same.

        Raises:
            ValueError: the new schedule reduces at other blocks.
        """
        if schedule.at != self.schedule.at:
            raise ValueError(f"schedule reduces at {list(schedule.at)}, but this model was built for {list(self.schedule.at)}")
        self.schedule = schedule

    def counts(self, patches: int) -> tuple[int, ...]:
        """Patch tokens each block leaves, for an image of that many patches."""
        return self.schedule.counts(self.depth, patches, self.config.leaves)

    def losses(self) -> dict[str, Tensor]:
        """The method's own losses of the last forward, each a mean over the reducing blocks."""
        last = self.entry(self.depth)
        targets = self.schedule.targets(self.depth, last.where.shape[1], self.config.leaves)
        parts = [
            self.reducers[str(b)].losses(self.entry(b + 1), rate)  # type: ignore[operator]
            for b, rate in targets.items()
        ]
        names = sorted({name for part in parts for name in part})
        return {name: torch.stack([part[name] for part in parts if name in part]).mean() for name in names}

    # -------------------------------------------------------------------------------------------- one block
    def run(self, index: int, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for the forward of block ``index``."""
        if args or kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("a reduced model takes no attention mask: a mask for all tokens does not fit those that are left")
        tokens = self._arriving(index, x)
        halves = halves_of(block)
        assert halves is not None  # find_host has seen to it
        n = self.counts(tokens.where.shape[1])[index]
        reducer = self.reducer(index) if n < len(tokens) else None
        if reducer is not None:
            tokens = self._moment(reducer, "before", tokens, n)
        if halves.rope is not None and tokens.patch is not None and kwargs.get(halves.rope) is not None:
            kwargs = {**kwargs, halves.rope: _rows_of_table(kwargs[halves.rope], tokens.patch)}
        watcher = self._watcher(index + 1, tokens)
        between = reducer is not None and reducer.overrides("between")
        bias, calls = bias_of(tokens), list[dict[str, Any]]()
        if not between and watcher is None and bias is None:
            tokens = tokens.replace(x=type(block).forward(block, tokens.x, **kwargs))
        else:
            with Watch(calls, bias):
                step = halves.attention if between else None
                x = type(block).forward(block, tokens.x, **kwargs) if step is None else step(block, tokens.x, **kwargs)
            tokens = tokens.replace(x=x if step is None else tokens.x + x)
            seen = _seen(calls, tokens, index, block)
            if watcher is not None:
                tokens = watcher.watch(tokens, seen)
            if between and reducer is not None and halves.mlp is not None:
                tokens = self._moment(reducer, "between", tokens, n, seen)
                tokens = tokens.replace(x=tokens.x + halves.mlp(block, tokens.x))
        if reducer is not None:
            tokens = self._moment(reducer, "after", tokens, n)
            if len(tokens) != n and tokens.alive is None:
                raise RuntimeError(
                    f"{path_of(type(reducer))} left {len(tokens)} patch tokens at block {index}; {n} were asked for"
                )
        self.ledger[index + 1] = tokens.replace(x=tokens.x.new_empty(tokens.x.shape[0], 0, tokens.x.shape[2]))
        return tokens.x

    def _arriving(self, index: int, x: Tensor) -> Tokens:
        if index == 0:
            return Tokens.start(x, self.prefix, self.has_cls, self._positions(x))
        tokens = self.entry(index)
        if tokens.alive is not None and torch.is_grad_enabled() and not tokens.alive.requires_grad and self._learns():
            raise RuntimeError(
                "the keep decisions have lost their gradient: re-entrant gradient checkpointing cannot carry them; use "
                "use_reentrant=False (timm.layers.set_reentrant_ckpt(False))"
            )
        if x.shape[:2] != (tokens.size.shape[0], self.prefix + len(tokens)):
            raise RuntimeError(
                f"block {index} got {tuple(x.shape)}, but the block before it left {tokens.size.shape[0]} images of "
                f"{self.prefix + len(tokens)} tokens; run the blocks of a reduced model in order, one forward at a time"
            )
        return tokens.replace(x=x)

    def entry(self, index: int) -> Tokens:
        """The tokens that came out of block ``index - 1`` in the last forward, without their features."""
        tokens = self.ledger[index]
        if tokens is None:
            raise RuntimeError("this reduced model has not run forward yet; run it on a batch of images first")
        return tokens

    def _learns(self) -> bool:
        return any(p.requires_grad for p in self.reducers.parameters())

    def reducer(self, index: int) -> Reducer | None:
        """The reducer of block ``index``, if it has one."""
        return self.reducers[str(index)] if str(index) in self.reducers else None  # type: ignore[return-value]

    def _watcher(self, index: int, tokens: Tokens) -> Reducer | None:
        reducer = self.reducer(index)
        wanted = reducer is not None and reducer.overrides("watch")
        return reducer if wanted and self.counts(tokens.where.shape[1])[index] < len(tokens) else None

    def _positions(self, x: Tensor) -> Tensor | None:
        table = HOSTS[self.host_path].positions(self.model)
        return table if table is not None and len(table) == x.shape[1] - self.prefix else None

    def _moment(self, reducer: Reducer, moment: str, tokens: Tokens, n: int, seen: Seen | None = None) -> Tokens:
        if not reducer.overrides(moment):
            return tokens
        arguments = (tokens, n) if seen is None else (tokens, seen, n)
        kind = tokens.x.device.type
        if torch.is_autocast_enabled(kind):  # similarities, exponentials and sums of scores stay in float32
            with torch.autocast(kind, enabled=False):
                out = getattr(reducer, moment)(*arguments)
        else:
            out = getattr(reducer, moment)(*arguments)
        if self.observer is not None:
            self.observer(tokens, out)
        return out

    # -------------------------------------------------------------------------------------------- pooling
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """The host's own pooling with every token counted as often as it has patches.

        A mean is over patches: features are scaled by size / mean size first. Attention pooling gets log(size) as a bias.
        """
        host_pool = partial(type(self.model).pool, self.model)
        tokens, kind = self.ledger[self.depth], pool_type or self.pooling[0]
        if tokens is None or not tokens.merged or kind in ("token", "none") or x.shape[1] != self.prefix + len(tokens):
            return host_pool(x, pool_type)
        weight = tokens.size if tokens.alive is None else tokens.size * tokens.alive
        weight = F.pad(weight, (self.prefix, 0), value=1.0)
        counted = weight if self.pooling[1] else weight[:, self.prefix :]
        if kind == "avg":
            return host_pool(x * (weight / counted.mean(1, keepdim=True)).unsqueeze(-1).to(x.dtype), pool_type)
        if kind == "map":
            with Watch([], counted.clamp_min(SOFT_FLOOR).log().unsqueeze(1).unsqueeze(1)):
                return host_pool(x, pool_type)
        raise ValueError(
            f"pooling {kind!r} cannot count merged tokens by their size; use global_pool='avg' or 'token', or a method that "
            "only drops tokens (topk, random)"
        )

    # -------------------------------------------------------------------------------------------- copies
    def __getstate__(self) -> dict[str, Any]:
        # a copy starts with an empty ledger: what is in it belongs to the forward (and the graph) of the original
        return {**self.__dict__, "ledger": [None] * (self.depth + 1)}


def _rows_of_table(table: Tensor, patch: Tensor) -> Tensor:
    """Rotary table [P, D] or [H, P, D], shared by all images, as [B, 1 or H, L, D] for the patches in ``patch``."""
    if table.dim() == 2:
        return table[patch].unsqueeze(1)
    return table[:, patch].transpose(0, 1)


def _seen(calls: list[dict[str, Any]], tokens: Tokens, index: int, block: nn.Module) -> Seen:
    if len(calls) != 1:
        raise RuntimeError(
            f"block {index} ({path_of(type(block))}) made {len(calls)} calls of scaled_dot_product_attention where laconic "
            "needs exactly one; switch fused attention on (timm.layers.set_fused_attn(True) before creating the model)"
        )
    return Seen.of(calls[0], tokens)


# ------------------------------------------------------------------------------------------------ the two verbs
def reduce_(
    model: nn.Module,
    method: str | Method,
    *,
    keep: float | Sequence[float] | None = None,
    at: Sequence[int] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    example: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """Reduce the tokens of a vision transformer, in place; the same object is returned.

    Parameters, buffers and their names stay; what a method learns is added under ``laconic.``. Before it returns, the
    model is run on one image to prove that its blocks are parted rightly, that tokens really leave and that no prefix
    token is touched. If anything is refused the model is as it was.

    Args:
        model: a supported vision transformer, or a module with exactly one inside (see `laconic.hosts`).
        method: a name (see `laconic.methods`) with ``options``, or a config such as ``laconic.ETPS(similarity="cosine")``.
        keep: keep rate in (0, 1] of each reducing block, as the method's paper counts it; one, or one for each block.
        at: zero-based blocks to reduce at; by default a quarter, a half and three quarters of the depth.
        schedule: a `Schedule` (or its JSON) instead of ``keep`` and ``at``.
        example: an input for the proof, [B, channels, height, width]; by default noise of the model's own input size.

    Raises:
        TypeError: not a module, an unknown model or block class, an unknown option.
        LookupError: an unknown method, or something the method needs that this model has not (a class token).
        ValueError: a keep rate outside (0, 1], blocks out of range or repeated, a model reduced or compiled already,
            attention that is not fused, a model whose blocks do not behave as their class says.
    """
    from laconic.verify import verify

    config = resolve(method, options)
    if find_compression(model) is not None:
        raise ValueError("this model is reduced already; laconic.restore_(model) first")
    host, entry = find_host(model)
    if schedule is not None and (keep is not None or at is not None):
        raise ValueError("give either schedule, or keep (and at), not both")
    plan = config.plan(len(entry.blocks(host)), keep, at) if schedule is None else Schedule.of(schedule)
    compression = Compression(host, entry, config, plan)
    verify(host, entry, compression, example)
    return model


def attach(host: nn.Module, entry: Host, compression: Compression) -> None:
    """Put a compression between the halves of the host's blocks."""
    for index, block in enumerate(entry.blocks(host)):
        block.forward = partial(compression.run, index, block)
    host.pool = compression.pool
    host.laconic = compression


def detach(host: nn.Module, entry: Host) -> None:
    """Undo `attach`."""
    for block in entry.blocks(host):
        block.__dict__.pop("forward", None)
    host.__dict__.pop("pool", None)
    del host.laconic


def restore_(model: nn.Module) -> nn.Module:
    """Undo `reduce_`, in place: the model is bit for bit what it was (with whatever training has made of its weights).

    Raises:
        ValueError: the model is not reduced.
    """
    compression = compression_of(model)
    detach(compression.model, HOSTS[compression.host_path])
    return model


def find_compression(model: nn.Module) -> Compression | None:
    """The compression of a reduced model, or None."""
    return next((m for m in model.modules() if isinstance(m, Compression)), None)


def compression_of(model: nn.Module) -> Compression:
    """The compression of a reduced model.

    Raises:
        ValueError: the model is not reduced.
    """
    compression = find_compression(model)
    if compression is None:
        raise ValueError(f"this {type(model).__name__} is not reduced; call laconic.reduce_(model, method, keep=...) first")
    return compression
