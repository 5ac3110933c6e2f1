"""What both kinds of sparse training share: when the masks change, by how much, and how they are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Topology:
    """Masks over weights (True: in use) that change every so many steps, and hold exactly in between.

    Call `step` after each ``optimizer.step()`` and before the gradients are zeroed. Every ``every`` steps (short of
    ``until``) a share of what is in use is dropped, and as much is grown elsewhere: what grows starts at zero, and may be
    what has just been dropped. The share falls from ``death`` to 0 over ``until`` steps by half a cosine.
    """

    def __init__(self, every: int, until: int, death: float, optimizer: torch.optim.Optimizer | None) -> None:
        for name, value in (("every", every), ("until", until)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"sparsity: {name} must be a whole number of steps, at least 1; got {value!r}")
        if not 0 <= death <= 1:
            raise ValueError(f"sparsity: death must be a share between 0 and 1, not {death!r}")
        self.every, self.until, self.death, self.optimizer = every, until, death, optimizer
        self.steps = 0
        self.masks: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # what is added up between two changes

    # ------------------------------------------------------------------------------------------- what kinds differ in
    def weight(self, name: str) -> Tensor:
        """The weight that the mask of that name belongs to."""
        raise NotImplementedError

    def spread(self, name: str, mask: Tensor) -> Tensor:
        """A mask over units (heads, neurons, single weights) as one that the weight can be multiplied by."""
        raise NotImplementedError

    def merit(self, name: str) -> Tensor:
        """How much each unit in use is worth; the least is dropped."""
        raise NotImplementedError

    def promise(self, name: str) -> Tensor:
        """How much each unit would be worth, by the gradient; the most is grown."""
        raise NotImplementedError

    def note(self) -> None:
        """A look at weights and gradients, once a step."""

    # ------------------------------------------------------------------------------------------- training
    @torch.no_grad()
    def step(self) -> None:
        """Keep the masks, and change them when it is time.

        Raises:
            RuntimeError: it is time, and there are no gradients to grow by.
        """
        self.steps += 1
        self.apply()
        self.note()
        if self.steps % self.every == 0 and self.steps < self.until:
            for name, mask in self.masks.items():
                self._change(name, mask, self.share())
            self.apply()

    def apply(self) -> None:
        """Set to zero what is not in use."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.weight(name).mul_(self.spread(name, mask))

    def share(self) -> float:
        """Which share of what is in use goes when the masks change at this step."""
        return self.death / 2 * (1 + math.cos(math.pi * min(self.steps, self.until) / self.until))

    def gradient(self, name: str) -> Tensor:
        """The gradient of a masked weight, of the parts that are not in use as well."""
        gradient = self.weight(name).grad
        if gradient is None:
            raise RuntimeError(
                f"{name} has no gradient to grow weights by; call step() after optimizer.step() and before zero_grad()"
            )
        return gradient

    def _change(self, name: str, mask: Tensor, share: float) -> None:
        weight = self.weight(name)
        count = round(share * int(mask.sum()))
        merit = self.merit(name).masked_fill(~mask, math.inf).flatten()
        stays = mask.flatten().clone()
        stays[merit.argsort(stable=True)[:count]] = False
        promise = self.promise(name).flatten().masked_fill(stays, -1.0)
        grown = torch.zeros_like(stays)
        grown[promise.argsort(descending=True, stable=True)[:count]] = True
        fresh = self.spread(name, grown.view_as(mask)).expand_as(weight).bool()
        weight.masked_fill_(fresh, 0.0)
        self._forget(weight, fresh)
        mask.copy_((stays | grown).view_as(mask))

    def _forget(self, weight: Tensor, fresh: Tensor) -> None:
        """What the optimizer remembers of weights that start again."""
        state: Mapping[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(weight, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(fresh.to(value.device), 0.0)

    # ------------------------------------------------------------------------------------------- what there is
    def densities(self) -> dict[str, float]:
        """The share in use, by mask."""
        return {name: float(mask.float().mean()) for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on; the weights are the model's own affair."""
        masks, sums = ({name: value.clone() for name, value in part.items()} for part in (self.masks, self.sums))
        return {"steps": self.steps, "masks": masks, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another model.
        """
        theirs, ours = ({n: tuple(m.shape) for n, m in masks.items()} for masks in (state["masks"], self.masks))
        if theirs != ours:
            odd = sorted(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
            raise ValueError(f"these masks are of another model; they differ in {', '.join(odd[:5])}")
        self.steps = int(state["steps"])
        for name, mask in self.masks.items():
            mask.copy_(state["masks"][name])
        for name, value in self.sums.items():
            value.copy_(state["sums"][name])
        self.apply()


def erk(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Erdos-Renyi densities: each proportional to the sum of a weight's sides over their product, at most 1.

    Of all weights together the share ``density`` is in use.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw, full = {name: sum(shape) / size[name] for name, shape in shapes.items()}, set[str]()
    while True:
        budget = density * sum(size.values()) - sum(size[name] for name in full)
        factor = budget / max(1e-12, sum(raw[name] * size[name] for name in raw if name not in full))
        over = {name for name in raw if name not in full and factor * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else factor * raw[name] for name in raw}
        full |= over
