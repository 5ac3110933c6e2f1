"""Shared base of structured and unstructured sparse training: changes of the masks over time, and their state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Topology:
    """Masks over weights (True: in use) that change at regular intervals; in between, masked weights are exactly zero.

    Call `step` after each ``optimizer.step()`` and before the gradients are zeroed. Every ``every`` steps (before step
    ``until``) a share of the units in use is dropped and as many are grown. Grown weights start at zero, and may be those
    just dropped. The share falls from ``death`` to 0 over ``until`` steps by half a cosine.
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
        self.sums: dict[str, Tensor] = {}  # accumulated between two changes

    # ------------------------------------------------------------------------------------------- for subclasses
    def weight(self, name: str) -> Tensor:
        """Return the weight of the mask ``name``."""
        raise NotImplementedError

    def spread(self, name: str, mask: Tensor) -> Tensor:
        """Expand a mask over units (heads, neurons, single weights) so that it can multiply the weight."""
        raise NotImplementedError

    def merit(self, name: str) -> Tensor:
        """Return the importance of each unit in use; the least important are dropped."""
        raise NotImplementedError

    def promise(self, name: str) -> Tensor:
        """Return the gradient-based importance of each unit not in use; the most important are grown."""
        raise NotImplementedError

    def note(self) -> None:
        """Record statistics of weights and gradients, once per step."""

    # ------------------------------------------------------------------------------------------- training
    @torch.no_grad()
    def step(self) -> None:
        """Apply the masks, and change them every ``every`` steps.

        Raises:
            RuntimeError: the masks are to change, and there are no gradients.
        """
        self.steps += 1
        self.apply()
        self.note()
        if self.steps % self.every == 0 and self.steps < self.until:
            for name, mask in self.masks.items():
                self._change(name, mask, self.share())
            self.apply()

    def apply(self) -> None:
        """Set the weights that are not in use to zero."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.weight(name).mul_(self.spread(name, mask))

    def share(self) -> float:
        """Return the share of the units in use that is dropped if the masks change at this step."""
        return self.death / 2 * (1 + math.cos(math.pi * min(self.steps, self.until) / self.until))

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of a masked weight, including its parts that are not in use."""
        gradient = self.weight(name).grad
        if gradient is None:
            raise RuntimeError(
                f"{name} has no gradient, which is needed to grow weights; call step() after optimizer.step() and before "
                "zero_grad()"
            )
        return gradient

    def _change(self, name: str, mask: Tensor, share: float) -> None:
        weight = self.weight(name)
        count = round(share * int(mask.sum()))
        merit = self.merit(name).masked_fill(~mask, math.inf).flatten()
        kept = mask.flatten().clone()
        kept[merit.argsort(stable=True)[:count]] = False
        promise = self.promise(name).flatten().masked_fill(kept, -1.0)
        grown = torch.zeros_like(kept)
        grown[promise.argsort(descending=True, stable=True)[:count]] = True
        fresh = self.spread(name, grown.view_as(mask)).expand_as(weight).bool()
        weight.masked_fill_(fresh, 0.0)
        self._reset_moments(weight, fresh)
        mask.copy_((kept | grown).view_as(mask))

    def _reset_moments(self, weight: Tensor, fresh: Tensor) -> None:
        """Reset the optimizer's state to zero for weights that are grown."""
        state: Mapping[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(weight, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(fresh.to(value.device), 0.0)

    # ------------------------------------------------------------------------------------------- state
    def densities(self) -> dict[str, float]:
        """Return the share in use of each mask, by name."""
        return {name: float(mask.float().mean()) for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the masks and counters for `load_state_dict`; the weights are in the model's own state dict."""
        masks, sums = ({name: value.clone() for name, value in part.items()} for part in (self.masks, self.sums))
        return {"steps": self.steps, "masks": masks, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: the state belongs to another model.
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
    """Return Erdos-Renyi densities: each proportional to (sum of a weight's dimensions) / (their product), at most 1.

    Over all weights together the density is ``density``.
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
