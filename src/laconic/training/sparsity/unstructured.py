"""SViTE: sparsity of single weights, dropped by magnitude and grown by gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.values import choice
from laconic.training.sparsity.topology import Topology, erk


class UnstructuredSparsity(Topology):
    """Unstructured sparsity: the share ``density`` of all weights in a model's linear layers is in use.

    Args:
        model: any module; the weights of its Linear layers are masked, except those in ``skip``.
        density: share of weights in use (published: 0.4 to 0.6).
        every, until, death: see `Topology` (published: 15000 steps, 7000 for DeiT-B; the whole training; 0.5).
        distribution: density of each layer: ``erk`` (small weights are denser, see `erk`) or ``uniform``.
        start: weights in use at first: ``random`` ones, as published, or those with the largest ``magnitude``, for a model
            that is trained already.
        skip: names of modules that remain dense, with all their submodules.
        optimizer: an optimizer whose state is reset for grown weights.
        seed: seed of the random start.

    Raises:
        ValueError: there is no Linear layer outside ``skip``, or ``density`` is not in (0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        until: int,
        density: float = 0.5,
        every: int = 15000,
        death: float = 0.5,
        distribution: Literal["erk", "uniform"] = "erk",
        start: Literal["random", "magnitude"] = "random",
        skip: Sequence[str] = ("head", "head_dist", "laconic"),
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(every, until, death, optimizer)
        choice("sparsity", "distribution", distribution, ("erk", "uniform"))
        choice("sparsity", "start", start, ("random", "magnitude"))
        if not 0 < density <= 1:
            raise ValueError(f"sparsity: density must be in (0, 1], not {density!r}")
        self.layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and not any(f".{s}." in f".{name}." for s in skip)
        }
        if not self.layers:
            raise ValueError(f"sparsity: there is no Linear layer outside {list(skip)} in this {type(model).__name__}")
        shapes = {name: tuple(layer.weight.shape) for name, layer in self.layers.items()}
        shares = erk(shapes, density) if distribution == "erk" else dict.fromkeys(shapes, density)
        generator = torch.Generator().manual_seed(seed)
        for name, share in shares.items():
            weight = self.weight(name).detach()
            rank = weight.abs() if start == "magnitude" else torch.rand(weight.shape, generator=generator)
            mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            mask[rank.flatten().argsort(descending=True, stable=True)[: round(share * weight.numel())].to(weight.device)] = True
            self.masks[name] = mask.view_as(weight)
        self.apply()

    def weight(self, name: str) -> Tensor:
        return self.layers[name].weight

    def spread(self, name: str, mask: Tensor) -> Tensor:
        return mask

    def merit(self, name: str) -> Tensor:
        return self.weight(name).abs()

    def promise(self, name: str) -> Tensor:
        return self.gradient(name).abs()

    @property
    def density(self) -> float:
        """Share of all masked weights that is in use."""
        used = sum(int(mask.sum()) for mask in self.masks.values())
        return used / sum(mask.numel() for mask in self.masks.values())
