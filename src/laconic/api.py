"""Reduce the tokens of a model in place, and undo the reduction."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

import laconic.methods  # noqa: F401 (registers laconic's methods)
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
    """Reduce the tokens of a vision transformer in place, and return the same object.

    Parameters, buffers and their names stay as they are; parameters that a method learns are added under ``laconic.``.
    Before this function returns, it runs the model on one image to verify that attention and MLP together reproduce each
    block, that tokens are really removed and that no prefix token is changed. If a check fails, the model is as it was.

    Args:
        model: a supported vision transformer, or a module with exactly one inside (see `laconic.hosts`).
        method: a name (see `laconic.methods`) with ``options``, a config such as ``laconic.ETPS(similarity="cosine")``, or a
            `Reducer` of your own, registered or not.
        keep: keep rate in (0, 1] of each reducing block, as the method's paper defines it; one for all blocks, or one each.
        at: zero-based indices of the reducing blocks; by default a quarter, a half and three quarters of the depth.
        schedule: a `Schedule` (or its JSON) instead of ``keep`` and ``at``.
        budget: target cost, instead of ``keep`` and ``schedule``: "2.3G" multiply-adds of one image, "1.6x-macs" (1.6
            times fewer of them), or, measured now on this machine, "1.6x" (1.6 times as fast as unreduced) or "12ms" for a
            forward. Costs refer to the size of ``example``, and times to a forward of that batch (without an example: to
            one image of the model's own input size). `laconic.plan` does the same and reports what it found.
        restore: return features for every patch after the last block and the final norm: those of the token that holds the
            patch or, for a dropped patch, a fill: ``similar`` (the token that was most similar when the patch was dropped;
            True means this one, since it measures best on a dense task), ``nearest`` (the nearest patch that a token holds),
            ``mean``, ``zeros`` or ``last`` (the patch's own features when it was dropped). The model's pooling ignores filled
            patches. Dense heads and code that reads ``last_hidden_state`` then get the full number of tokens, and layers after
            the blocks run on all patches again. For models of transformers whose tokens are averaged outside the model,
            restoring with ``mean`` is the default if tokens were merged, so that every mean is right; there True means
            ``mean``.
        compute: ``needed`` computes, at inference, only the rows that the output reads: if the model's own forward reads
            only the class token, the last block runs for that token alone; if a method only drops tokens, dropped tokens get
            no queries. The output is equal up to rounding; `forward_features` and hooks on blocks still get all rows.
            ``all`` computes every row. The default is ``needed`` if the schedule reduces anything.
        example: an input such as the model will get, [B, channels, height, width]; used to verify the reduced model, for
            ``budget`` and for the warning that a reduction does not pay. Default: one noise image of the model's input size.
        options: options of the method, if it is given by name.

    Raises:
        TypeError: not a module, an unknown model or block class, an unknown option.
        LookupError: an unknown method, or a model without something that the method needs (a class token).
        ValueError: a keep rate outside (0, 1], blocks out of range or repeated, a model that is already reduced or compiled,
            attention that is not fused, a budget that cannot be met, a model whose blocks differ from their class's entry.
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
    """Raise if wrappers or shards were made before the method's parameters existed.

    Raises:
        ValueError: the model is sharded, or the method adds parameters to a model that is already wrapped.
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
    """Return the schedule of a method on a model for a keep rate.

    A method whose default is the quarters of the depth uses the blocks that the papers use on this backbone (`ModelSpec.at`).
    """
    depth = len(entry.blocks(host))
    plan = config.default_schedule(depth, keep, at)
    at_quarters = at is None and entry.at is not None
    if at_quarters and keep is not None:  # a rate spread over several blocks hides the default blocks: ask with rate 1
        at_quarters = config.default_schedule(depth, 1.0, None).at == quarters(depth)
    elif at_quarters:
        at_quarters = plan.at == quarters(depth)
    return config.default_schedule(depth, keep, entry.at(host)) if at_quarters and entry.at is not None else plan


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
    """Undo `reduce_` in place: the model is bit for bit what it was, except for weights that were trained since.

    Raises:
        ValueError: the model is not reduced.
    """
    reduction = reduction_of(model)
    detach(reduction.model, HOSTS[reduction.host_path])
    return model
