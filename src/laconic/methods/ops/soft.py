"""Soft mixing: every new token is a learned weighted sum of all old ones, x' = M x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from laconic.core.method import BlockContext, Method, Reducer
from laconic.core.schedule import of_the_initial
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens
from laconic.methods.ops.learned import in_dtype_of


class Mixer(Reducer):
    """Mix the patch tokens into a fixed number of new ones before the block, one row of M for each."""

    def __init__(self, name: str, site: BlockContext) -> None:
        super().__init__()
        self.name, self.slots = name, site.after

    def matrix(self, x: Float[Tensor, "B L C"], tokens: Tokens) -> tuple[Float[Tensor, "B M L"], Float[Tensor, "B L C"]]:
        """Return M in float32, and the features it mixes: unchanged, or as the method prepares them.

        ``x`` holds the patch tokens in the dtype of the parameters.
        """
        raise NotImplementedError

    def before(self, tokens: Tokens, n: int) -> Tokens:
        if n != self.slots:
            raise ValueError(
                f"{self.name}: this reducer was built to make {self.slots} tokens, and {n} were asked for; its weights fix "
                "the count, so use the image size and the schedule that it was built with (no keep-rate warm-in), or, for "
                "images of any size, schedule=Schedule.keep_counts({block: count})"
            )
        matrix, features = self.matrix(in_dtype_of(self, tokens.patches), tokens)
        x = torch.cat([tokens.x[:, : tokens.prefix], features.to(tokens.x.dtype)], 1)
        return tokens.replace(x=x).mix(matrix)


class Slots(Method):
    """Base of the configs of mixers: counts and official weight names of the benchmark (arXiv:2308.04657)."""

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        return by_stage(weights, at)


def by_stage(
    weights: Mapping[str, Tensor], at: Sequence[int], part: str = "cluster_layers", ours: str = ""
) -> dict[str, Tensor]:
    """Return the weights with ``{part}.{stage}.…`` renamed to (``ours`` in) our reducer of block ``at[stage]``.

    Stages beyond the blocks in ``at`` keep their name, and loading will report them.
    """
    renamed = {}
    for name, tensor in weights.items():
        head, _, rest = name.partition(".")
        stage, _, tail = rest.partition(".")
        if head == part and stage.isdigit() and int(stage) < len(at):
            name = f"laconic.reducers.{at[int(stage)]}.{ours}{tail}"
        renamed[name] = tensor
    return renamed


def transport(scores: Float[Tensor, "B M L"], eps: float, iterations: int) -> Float[Tensor, "B M L"]:
    """Scale exp(scores / eps) by rows and columns so that both (nearly) sum to one; the columns do exactly."""
    log = scores / eps
    rows, columns = torch.zeros_like(log[:, :, :1]), torch.zeros_like(log[:, :1])
    for _ in range(iterations):
        rows = -(log + columns).logsumexp(2, keepdim=True)
        columns = -(log + rows).logsumexp(1, keepdim=True)
    return (log + rows + columns).exp()
