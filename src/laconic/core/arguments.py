"""Checks of the arguments of `laconic.reduce_` and `laconic.Schedule`, and their conversion to plain Python values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from laconic.core.values import is_whole, items, plain, shown

FILLS = ("similar", "nearest", "mean", "zeros", "last")  # values of ``restore``


# ------------------------------------------------------------------------------------------------ schedules
def blocks(at: Any) -> tuple[int, ...]:
    """Return block numbers as a tuple of ints.

    Raises:
        TypeError: not a sequence.
        ValueError: no blocks, or not distinct zero-based block numbers in rising order.
    """
    numbers = items(at)
    if numbers is None:
        example = f"at=[{plain(at)}]" if is_whole(plain(at)) else "at=[3, 6, 9]"
        raise TypeError(f"at must be a sequence of block numbers, e.g. {example}, not {shown(at)}{_of_tensor(at)}")
    if not numbers:
        raise ValueError("schedule: no blocks; give at least one, e.g. at=[3, 6, 9]")
    given = f"schedule: at={shown(list(numbers))}"
    if not all(is_whole(number) and number >= 0 for number in numbers):
        raise ValueError(f"{given} must be zero-based block numbers: whole numbers, 0 or more")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{given} repeats a block; each block may reduce once")
    if list(numbers) != sorted(numbers):
        raise ValueError(f"{given} must be in rising order")
    return numbers


def rate(value: Any) -> float:
    """Return one keep rate as a plain number.

    Raises:
        ValueError: not a number in (0, 1].
    """
    number = plain(value)
    if not isinstance(number, int | float) or isinstance(number, bool):
        advice = "a number such as 0.7, or one for each block such as [0.9, 0.8, 0.7]"
        raise ValueError(f"keep rate must be in (0, 1], {advice}, got {shown(value)}{_of_tensor(value)}")
    if not 0 < number <= 1:
        raise ValueError(
            f"keep rate must be in (0, 1], got {shown(number)}; for counts use Schedule.keep_counts or .remove_counts"
        )
    return number


def rates(keep: Any) -> float | tuple[float, ...]:
    """Return one keep rate, or one for each block, as plain numbers.

    Raises:
        ValueError: not numbers in (0, 1].
    """
    several = items(keep)
    return rate(keep) if several is None else tuple(map(rate, several))


def count(value: Any, unit: str) -> int:
    """Return a number of tokens to keep or to remove as an int.

    Raises:
        ValueError: not a whole number, or too small.
    """
    number = plain(value)
    if not is_whole(number) or number < (1 if unit == "keep_counts" else 0):
        raise ValueError(f"schedule: {unit} must be whole numbers of tokens, got {shown(number)}")
    return int(number)


def counts_of(name: str, counts: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the blocks and the counts of a mapping.

    Raises:
        TypeError: not a mapping.
    """
    if not isinstance(counts, Mapping):
        raise TypeError(f"Schedule.{name} takes a mapping from block to count, e.g. {{3: 138, 6: 97}}, not {shown(counts)}")
    return tuple(counts), tuple(counts.values())


def _of_tensor(value: Any) -> str:
    if not isinstance(value, Tensor):
        return ""
    return " (a tensor with gradients learns nothing here)" if value.requires_grad else " (give tensor.tolist())"


# ------------------------------------------------------------------------------------------------ reduce_
def checked(
    *, keep: Any, at: Any, budget: Any, restore: Any, compute: Any, example: Any
) -> tuple[float | Sequence[float] | None, Sequence[int] | None, Any]:
    """Check the arguments of `laconic.reduce_` that need no model; return ``keep``, ``at`` and ``restore`` as plain values.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    if budget is not None:
        check_budget(budget)
    check_compute(compute)
    check_example(example)
    return None if keep is None else rates(keep), None if at is None else blocks(at), fill(restore)


def check_budget(budget: Any) -> None:
    """Raise if a budget is not text; the message says what to write instead of a number.

    Raises:
        TypeError: not text.
    """
    if isinstance(budget, str):
        return
    number = plain(budget)
    advice = '"2.3G" multiply-adds of one image, "1.6x", "1.6x-macs" or "12ms"'
    if isinstance(number, int | float) and 1e6 <= number < 1e15:
        words = f"{number / 1e9:g}G" if number >= 1e9 else f"{number / 1e6:g}M"
        advice = f'"{words}" for as many multiply-adds of one image'
    raise TypeError(f"a budget is text with a unit: write {advice}; got {shown(budget)}")


def check_compute(compute: Any) -> None:
    """Raise if ``compute`` has an unknown value.

    Raises:
        ValueError: neither None nor one of the words.
    """
    if compute is not None and not (isinstance(compute, str) and compute in ("needed", "all")):
        raise ValueError(f"compute must be 'needed', 'all' or None, not {shown(compute)}")


def fill(restore: Any) -> bool | str | None:
    """Return ``restore`` as a plain value.

    Raises:
        ValueError: neither None, nor a bool, nor the name of a fill for dropped patches.
    """
    value = plain(restore)
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value in FILLS):
        return value
    raise ValueError(f"restore must be True, False, None or one of {', '.join(map(repr, FILLS))}, not {shown(restore)}")


def unusable(example: Tensor, error: Exception) -> ValueError:
    """Return the refusal of an example that the model does not run on."""
    return ValueError(
        f"the model does not run on an image of shape {tuple(example.shape)}: {error}; pass an input that fits as example="
    )


def check_example(example: Any, channels: int | None = None) -> None:
    """Raise if an example is not a batch of finite images or clips; ``channels`` is the number the model takes, if known.

    Raises:
        ValueError: not a tensor of four or five dimensions, no images, integers, NaN or infinite values, other channels.
    """
    if example is None:
        return
    if not isinstance(example, Tensor) or example.dim() not in (4, 5):
        raise not_a_batch(example, "[B, channels, height, width]")
    if 0 in example.shape:
        raise ValueError(f"example must hold at least one image, got shape {tuple(example.shape)}")
    if not example.is_floating_point():
        raise ValueError(f"example must hold floats as the model takes them, e.g. pixels.float() / 255, not {example.dtype}")
    if example.is_meta or not example.isfinite().all():
        found = "has no values (meta device)" if example.is_meta else "has NaN or infinite values"
        raise ValueError(f"example {found}, so the model cannot be verified with it; pass an image with finite values")
    if channels is not None and example.shape[-3] != channels:
        raise ValueError(f"example has {example.shape[-3]} channels, but the model takes {channels}: {tuple(example.shape)}")


def not_a_batch(example: Any, axes: str) -> ValueError:
    """Return the refusal of an example that is not a batch with these axes."""
    found = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
    kind = "a batch of clips" if "frames" in axes else "an image batch"
    return ValueError(f"example must be {kind} {axes}, got {found}")
