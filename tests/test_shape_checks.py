"""The checks of shapes can fail, each on what it is for."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from laconic.core.gather import arange_like
from shape_checks import checked


@checked
def product(x: Float[Tensor, "B N"], y: Float[Tensor, "B N"]) -> Float[Tensor, "N N"]:
    return x.T @ y


@checked
def claimed(x: Float[Tensor, "B N"], result: Tensor) -> Float[Tensor, "B"]:
    return result


@checked
def calls(f: Callable[[Float[Tensor, "B"]], int], x: Float[Tensor, "B C"]) -> list[Float[Tensor, "C"]]:
    product(torch.ones(7, 5), torch.ones(7, 5))  # has its own B
    return list(x)


@checked
def counted(n: int, *more: float, name: str = "") -> Iterator[int]:
    yield from range(n)


@checked
@dataclass
class Pair:
    left: Float[Tensor, "B N"]
    right: Float[Tensor, "B"]
    rest: "Pair | None" = None

    @property
    @checked
    def size(self) -> int:
        return self.left

    @classmethod
    @checked
    def of(cls, left: Float[Tensor, "B N"]) -> "Pair":
        return cls(left, left[:, 0])


def test_what_fits_goes_through():
    assert product(torch.ones(2, 3), torch.ones(2, 3)).shape == (3, 3)
    assert claimed(torch.ones(2, 3), torch.ones(2)).shape == (2,)
    assert len(calls(len, torch.ones(2, 3))) == 2
    assert list(counted(3, 0.5, name="x")) == [0, 1, 2]
    assert Pair.of(torch.ones(2, 3)).right.shape == (2,)
    assert product.__name__ == "product"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: product(torch.ones(2, 3), torch.ones(4, 3)),  # B is 2, and then it is 4
        lambda: product(torch.ones(2, 3), torch.ones(2, 3, 1)),
        lambda: product(torch.ones(2, 3), y=torch.ones(2, 3, dtype=torch.int64)),
        lambda: claimed(torch.ones(2, 3), torch.ones(3)),  # what is returned counts as well
        lambda: calls(None, torch.ones(2, 3)),
        lambda: counted("3"),
        lambda: counted(3, "0.5"),
        lambda: counted(3, name=3),
        lambda: Pair(torch.ones(2, 3), torch.ones(3)),
        lambda: Pair(torch.ones(2, 3), torch.ones(2), rest=3),
        lambda: Pair.of(torch.ones(2)),
        lambda: Pair.of(torch.ones(2, 3)).size,
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(TypeError, match="violates type hint|Type-check error"):
        wrong()


@pytest.mark.skipif(not os.environ.get("LACONIC_CHECK_SHAPES"), reason="without the checks")
def test_laconic_is_checked():
    with pytest.raises(TypeError, match="violates type hint"):
        arange_like("tokens")
