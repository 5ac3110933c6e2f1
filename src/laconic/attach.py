"""reduce_ and restore_: put a method into somebody's model, in place, and take it out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from laconic.arguments import checked
from laconic.compression import Compression, Rows, compression_of, find_compression
from laconic.dense import Fill
from laconic.hosts import HOSTS, Host, find_host
from laconic.patching import detach
from laconic.paying import warn_unless_it_pays
from laconic.reducer import Method, methods, resolve
from laconic.schedule import Schedule, quarters
from laconic.verify import verify


def reduce_(
    model: nn.Module,
    method: str | Method,
    *,
    keep: float | Sequence[float] | None = None,
    at: Sequence[int] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    budget: str | None = None,
    restore: bool | Fill | None = None,
    rows: Rows | None = None,
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
        budget: what it may cost, instead of ``keep`` and ``schedule``: "2.3G" multiply-adds of one image, "1.6x-macs" (1.6
            times fewer of them), or, measured now on this machine, "1.6x" (as fast as unreduced) or "12ms" for a forward.
            It is at the size of ``example``, and times are of a forward of that batch (without one: of one image of the
            model's own size). `laconic.plan` does the same and says what it found.
            (The option of ``bat`` of this name, "evit" or "log", is told from it by its words.)
        restore: give every patch features again after the last block and the final norm: those of the token it went to or, if
            it was dropped, those of a fill: ``similar`` (the token that was most similar when it was dropped; this is what
            True means, since it measures best on a dense task), ``nearest`` (the nearest patch that is held), ``mean``,
            ``zeros`` or ``last`` (its own when it was dropped). No pooling of the model counts what was filled. So dense heads
            and readers of ``last_hidden_state`` find as many tokens as ever; it costs what is behind the blocks. Models of
            transformers whose tokens are averaged outside get it by default where tokens were merged, with ``mean``, so
            that every mean is right; there True means ``mean``.
        rows: which rows are computed at inference: those that are ``needed``, or ``all``. Where a model's own forward answers
            by its class token, its last block is worked out for that token alone; where a method only drops tokens, those
            are no queries. The answer is equal but for rounding; `forward_features`, and whoever hooks a block, get
            everything. By default ``needed`` where something is reduced.
        example: an input such as the model will get, [B, channels, height, width], for the proof, for ``budget`` and for the
            warning where reduction does not pay; by default noise of the model's own input size, one image.
        options: of the method, when it is given by name.

    Raises:
        TypeError: not a module, an unknown model or block class, an unknown option.
        LookupError: an unknown method, or something the method needs that this model has not (a class token).
        ValueError: a keep rate outside (0, 1], blocks out of range or repeated, a model reduced or compiled already,
            attention that is not fused, a budget that cannot be met, a model whose blocks do not behave as their class says.
    """
    keep, at, restore = checked(keep=keep, at=at, budget=budget, restore=restore, rows=rows, example=example)
    if budget is not None and _is_an_option(method, budget):
        budget, options = None, {**options, "budget": budget}
    config = resolve(method, options)
    host, entry = find_host(model)
    if find_compression(host) is not None:
        raise ValueError("this model is reduced already; laconic.restore_(model) first")
    if schedule is not None and (keep is not None or at is not None):
        raise ValueError("give either schedule, or keep (and at), not both")
    if budget is not None:
        if schedule is not None or keep is not None:
            raise ValueError("give either budget (and at), or keep (and at), or schedule, not more than one of them")
        from laconic.planning import plan as planned_for  # it stands on this module

        schedule = planned_for(model, config, budget, at=at, example=example).schedule
    plan = planned(config, entry, host, keep, at) if schedule is None else Schedule.of(schedule)
    if schedule is not None and not config.may_rise():
        plan.check_falling([(shape.depth, shape.patches) for shape in entry.shapes(host)])
    compression = Compression(host, entry, config, plan, restore, rows)
    _refuse_wrapped(model, host, compression)
    verify(host, entry, compression, example)
    compression.note_untrained()
    warn_unless_it_pays(host, entry, config, plan, example)
    return model


def _refuse_wrapped(model: nn.Module, host: nn.Module, compression: Compression) -> None:
    """Refuse wrappers and shards that were made of the parameters there were.

    Raises:
        ValueError: the model is sharded, or the method adds parameters to a model that is wrapped already.
    """
    if any(hasattr(p, "device_mesh") for p in host.parameters()):
        raise ValueError("this model is sharded already (fully_shard); reduce it first, then shard it")
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel") and any(True for _ in compression.parameters()):
        raise ValueError(
            f"{compression.config.row.name} adds parameters, and this model is wrapped in {wrapper} already, which would not "
            f"synchronise them; reduce it first, then wrap it: {wrapper}(laconic.reduce_(model, ...))"
        )


def _is_an_option(method: str | Method, budget: str) -> bool:
    """Whether these words are for a method that has an option called budget, and no budget of cost."""
    if not isinstance(method, str) or method not in methods():
        return False
    from laconic.planning.budget import PATTERN

    named = "budget" in (field.name for field in dataclasses.fields(methods()[method].config))
    return named and PATTERN.fullmatch(budget.strip()) is None


def planned(
    config: Method, entry: Host, host: nn.Module, keep: float | Sequence[float] | None, at: Sequence[int] | None = None
) -> Schedule:
    """The schedule of a method on a host for a keep rate.

    Methods that reduce at the quarters of the depth by default do so where the papers put them on this backbone.
    """
    depth = len(entry.blocks(host))
    plan = config.plan(depth, keep, at)
    usual = at is None and entry.at is not None
    if usual and keep is not None:  # a rate that is spread over several blocks does not show where its sites are
        usual = config.plan(depth, 1.0, None).at == quarters(depth)
    elif usual:
        usual = plan.at == quarters(depth)
    return config.plan(depth, keep, entry.at(host)) if usual and entry.at is not None else plan


def restore_(model: nn.Module) -> nn.Module:
    """Undo `reduce_`, in place: the model is bit for bit what it was (with whatever training has made of its weights).

    Raises:
        ValueError: the model is not reduced.
    """
    compression = compression_of(model)
    detach(compression.model, HOSTS[compression.host_path])
    return model
