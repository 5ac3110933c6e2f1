"""Reduce the tokens of a model in place, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

import laconic.backbones
import laconic.methods  # noqa: F401 (registers the methods that come with laconic; the line above the models)
from laconic.core.arguments import checked
from laconic.core.backbone import HOSTS, ModelSpec, find_host
from laconic.core.dense import Fill
from laconic.core.method import METHODS, Method, Reducer, resolve
from laconic.core.patching import detach
from laconic.core.schedule import Schedule, quarters
from laconic.core.token_reduction import Compute, TokenReduction, find_reduction, reduction_of
from laconic.core.verify import verify

M = TypeVar("M", bound=nn.Module)


def reduce_(
    model: M,
    method: str | Method | Reducer,
    *,
    keep: float | Sequence[float] | None = None,
    at: Sequence[int] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    budget: str | None = None,
    restore: bool | Fill | None = None,
    compute: Compute | None = None,
    example: Tensor | None = None,
    **options: Any,
) -> M:
    """Reduce the tokens of a vision transformer, in place; the same object is returned.

    Parameters, buffers and their names stay; what a method learns is added under ``laconic.``. Before it returns, the
    model is run on one image to prove that its blocks are parted rightly, that tokens really leave and that no prefix
    token is touched. If anything is refused the model is as it was.

    Args:
        model: a supported vision transformer, or a module with exactly one inside (see `laconic.hosts`).
        method: a name (see `laconic.methods`) with ``options``, a config such as ``laconic.ETPS(similarity="cosine")``, or a
            `Reducer` of your own, registered or not.
        keep: keep rate in (0, 1] of each reducing block, as the method's paper counts it; one, or one for each block.
        at: zero-based blocks to reduce at; by default a quarter, a half and three quarters of the depth.
        schedule: a `Schedule` (or its JSON) instead of ``keep`` and ``at``.
        budget: what it may cost, instead of ``keep`` and ``schedule``: "2.3G" multiply-adds of one image, "1.6x-macs" (1.6
            times fewer of them), or, measured now on this machine, "1.6x" (as fast as unreduced) or "12ms" for a forward.
            It is at the size of ``example``, and times are of a forward of that batch (without one: of one image of the
            model's own size). `laconic.plan` does the same and says what it found.
        restore: give every patch features again after the last block and the final norm: those of the token it went to or, if
            it was dropped, those of a fill: ``similar`` (the token that was most similar when it was dropped; this is what
            True means, since it measures best on a dense task), ``nearest`` (the nearest patch that is held), ``mean``,
            ``zeros`` or ``last`` (its own when it was dropped). No pooling of the model counts what was filled. So dense heads
            and readers of ``last_hidden_state`` find as many tokens as ever; it costs what is behind the blocks. Models of
            transformers whose tokens are averaged outside get it by default where tokens were merged, with ``mean``, so
            that every mean is right; there True means ``mean``.
        compute: ``needed`` computes only what the answer reads, at inference: where a model's own forward answers by its class
            token, the last block runs for that token alone; where a method only drops tokens, dropped tokens get no queries.
            The answer is equal up to rounding; `forward_features` and hooks on blocks still get everything. ``all`` computes
            every row. By default ``needed`` where something is reduced.
        example: an input such as the model will get, [B, channels, height, width], for the proof, for ``budget`` and for the
            warning where reduction does not pay; by default noise of the model's own input size, one image.
        options: of the method, when it is given by name.

    Raises:
        TypeError: not a module, an unknown model or block class, an unknown option.
        LookupError: an unknown method, or something the method needs that this model has not (a class token).
        ValueError: a keep rate outside (0, 1], blocks out of range or repeated, a model reduced or compiled already,
            attention that is not fused, a budget that cannot be met, a model whose blocks do not behave as their class says.
    """
    if "rows" in options:
        warnings.warn("reduce_(rows=...) is now reduce_(compute=...)", DeprecationWarning, stacklevel=2)
        compute = options.pop("rows")
    row = METHODS.get(method) if isinstance(method, str) else None
    if row is not None and "budget" in row.config.old_options and budget in ("evit", "log"):
        options["budget"], budget = budget, None
    keep, at, restore = checked(keep=keep, at=at, budget=budget, restore=restore, compute=compute, example=example)
    config = resolve(method, options)
    host, entry = find_host(model)
    if find_reduction(host) is not None:
        raise ValueError("this model is reduced already; laconic.restore_(model) first")
    if schedule is not None and (keep is not None or at is not None):
        raise ValueError("give either schedule, or keep (and at), not both")
    if budget is not None:
        if schedule is not None or keep is not None:
            raise ValueError("give either budget (and at), or keep (and at), or schedule, not more than one of them")
        from laconic.planning import plan as planned_for  # above this layer

        schedule = planned_for(model, config, budget, at=at, example=example).schedule
    plan = planned(config, entry, host, keep, at) if schedule is None else Schedule.of(schedule)
    if schedule is not None and not config.may_rise():
        plan.check_falling([(shape.depth, shape.patches) for shape in entry.shapes(host)])
    reduction = TokenReduction(host, entry, config, plan, restore, compute)
    _refuse_wrapped(model, host, reduction)
    verify(host, entry, reduction, example)
    reduction.note_untrained()
    from laconic.analysis.break_even import warn_unless_it_pays

    warn_unless_it_pays(host, entry, config, plan, example)
    return model


def _refuse_wrapped(model: nn.Module, host: nn.Module, reduction: TokenReduction) -> None:
    """Refuse wrappers and shards that were made of the parameters there were.

    Raises:
        ValueError: the model is sharded, or the method adds parameters to a model that is wrapped already.
    """
    if any(hasattr(p, "device_mesh") for p in host.parameters()):
        raise ValueError("this model is sharded already (fully_shard); reduce it first, then shard it")
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel") and any(True for _ in reduction.parameters()):
        raise ValueError(
            f"{reduction.config.info.name} adds parameters, and this model is wrapped in {wrapper} already, which would not "
            f"synchronise them; reduce it first, then wrap it: {wrapper}(laconic.reduce_(model, ...))"
        )


def planned(
    config: Method, entry: ModelSpec, host: nn.Module, keep: float | Sequence[float] | None, at: Sequence[int] | None = None
) -> Schedule:
    """The schedule of a method on a host for a keep rate.

    Methods that reduce at the quarters of the depth by default do so where the papers put them on this backbone.
    """
    depth = len(entry.blocks(host))
    plan = config.default_schedule(depth, keep, at)
    usual = at is None and entry.at is not None
    if usual and keep is not None:  # a rate that is spread over several blocks does not show where its sites are
        usual = config.default_schedule(depth, 1.0, None).at == quarters(depth)
    elif usual:
        usual = plan.at == quarters(depth)
    return config.default_schedule(depth, keep, entry.at(host)) if usual and entry.at is not None else plan


@contextmanager
def reduced(model: M, method: str | Method | Reducer, **arguments: Any) -> Iterator[M]:
    """Reduce a model inside a ``with`` block; ``arguments`` are those of `reduce_`. The model is restored after it.

    ::

        with laconic.reduced(model, "bat", keep=0.7):
            features = model(images)
    """
    reduce_(model, method, **arguments)
    try:
        yield model
    finally:
        restore_(model)


def is_reduced(model: nn.Module) -> bool:
    """Return True if the model, or a module inside it, is reduced."""
    return find_reduction(model) is not None


def restore_(model: M) -> M:
    """Undo `reduce_`, in place: the model is bit for bit what it was (with whatever training has made of its weights).

    Raises:
        ValueError: the model is not reduced.
    """
    reduction = reduction_of(model)
    detach(reduction.model, HOSTS[reduction.host_path])
    return model
