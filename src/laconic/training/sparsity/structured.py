"""S2ViTE: sparsity of whole heads and neurons, which can be removed from the model after training."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from laconic.core.backbone import find_host, path_of
from laconic.core.token_reduction import find_reduction
from laconic.core.values import choice
from laconic.training.sparsity.topology import Topology


class StructuredSparsity(Topology):
    """Structured sparsity: every block of a vision transformer uses the same number of heads and of MLP neurons.

    A head is masked in its columns of the attention's output projection, a neuron in its column of the second MLP layer. The
    weights that compute them are not masked: they get no gradient, and are still there if the unit is grown again.
    S2ViTE-Tiny (4.2 M parameters, 0.9 G) is DeiT-T with heads=0.7, neurons=0.74.

    Args:
        model: a supported vision transformer (see `laconic.hosts`) whose blocks have ``attn.proj`` and ``mlp.fc2``.
        heads, neurons: shares in use (published: 0.7, and 0.6 to 0.7), rounded to whole numbers, at least one each; at
            first the units with the largest l1 norm.
        every, until, death: see `Topology`.
        criterion: units that are dropped: ``gradient``, those with the smallest |sum of gradient * weight|, which is gradient
            times activation summed over the batch, accumulated between two changes (the published code takes absolute values
            before it sums over tokens); or ``l1``, those with the smallest l1 norm.
        optimizer: an optimizer whose state is reset for grown weights.

    Raises:
        ValueError: a block has no such linear layers, or a share is not in (0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        until: int,
        heads: float = 0.7,
        neurons: float = 0.7,
        every: int = 15000,
        death: float = 0.5,
        criterion: Literal["gradient", "l1"] = "gradient",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__(every, until, death, optimizer)
        choice("sparsity", "criterion", criterion, ("gradient", "l1"))
        self.model, self.criterion = model, criterion
        host, entry = find_host(model)
        self.blocks: list[Any] = entry.blocks(host)
        self.layers: dict[str, nn.Linear] = {}
        for i, block in enumerate(self.blocks):
            attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
            read = {"attn.proj": getattr(attention, "proj", None), "mlp.fc2": getattr(mlp, "fc2", None)}
            missing = [name for name, layer in read.items() if not isinstance(layer, nn.Linear)]
            if missing:
                raise ValueError(f"sparsity: block {i} ({path_of(type(block))}) has no linear layer {' and no '.join(missing)}")
            for (name, layer), share in zip(read.items(), (heads, neurons), strict=True):
                units = attention.num_heads if name == "attn.proj" else layer.in_features  # type: ignore[union-attr]
                self._add(f"blocks.{i}.{name}", layer, units, share)
        self.apply()

    def _add(self, name: str, layer: Any, units: int, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"sparsity: heads and neurons must be shares in (0, 1], not {share!r}")
        self.layers[name] = layer
        norms = layer.weight.detach().abs().sum(0).view(units, -1).sum(1)
        mask = torch.zeros(units, dtype=torch.bool, device=norms.device)
        mask[norms.argsort(descending=True, stable=True)[: max(1, round(share * units))]] = True
        self.masks[name], self.sums[name] = mask, torch.zeros_like(norms, dtype=torch.float32)

    def weight(self, name: str) -> Tensor:
        return self.layers[name].weight

    def spread(self, name: str, mask: Tensor) -> Tensor:
        return mask.repeat_interleave(self.weight(name).shape[1] // len(mask))

    def merit(self, name: str) -> Tensor:
        if self.criterion == "l1":
            return self._by_unit(name, self.weight(name).abs())
        total = self.sums[name].clone()
        self.sums[name].zero_()
        return total

    def promise(self, name: str) -> Tensor:
        return self._by_unit(name, self.gradient(name).abs())

    def _by_unit(self, name: str, values: Tensor) -> Tensor:
        return values.float().sum(0).view(len(self.masks[name]), -1).sum(1)

    def note(self) -> None:
        if self.criterion == "gradient":
            for name, total in self.sums.items():
                if self.weight(name).grad is not None:
                    total += self._by_unit(name, self.weight(name) * self.gradient(name)).abs()

    # ------------------------------------------------------------------------------------------- after training
    def remove_(self) -> nn.Module:
        """Remove the masked heads and neurons from the model, in place, and return it; its outputs do not change.

        The model has fewer parameters and multiply-adds afterwards. Create a new optimizer, and do not use this manager any
        more. Since timm cannot build such a model, `laconic.save` needs ``model_args="omit"``.

        Raises:
            ValueError: the model's tokens are reduced (remove heads first), or its attention or MLP does not support it.
        """
        if find_reduction(self.model) is not None:
            raise ValueError("this model's tokens are reduced; call laconic.restore_, then remove_, and reduce it again")
        for i, block in enumerate(self.blocks):
            reason = _unsupported_reason(block)
            if reason:
                raise ValueError(f"heads and neurons of block {i} ({path_of(type(block))}) cannot be removed: {reason}")
        for i, block in enumerate(self.blocks):
            _cut_heads(block.attn, self.masks[f"blocks.{i}.attn.proj"])
            kept = self.masks[f"blocks.{i}.mlp.fc2"].nonzero().flatten()
            block.mlp.fc1, block.mlp.fc2 = _part(block.mlp.fc1, 0, kept), _part(block.mlp.fc2, 1, kept)
        self.masks, self.layers, self.sums = {}, {}, {}
        return self.model


def _unsupported_reason(block: Any) -> str | None:
    attention, mlp = block.attn, block.mlp
    if not isinstance(getattr(attention, "qkv", None), nn.Linear) or getattr(attention, "q_bias", None) is not None:
        return f"{path_of(type(attention))} has no single projection to q, k and v"
    if not hasattr(attention, "attn_dim"):
        return f"{path_of(type(attention))} assumes that all heads together are as wide as its input; install a newer timm"
    if getattr(attention, "gate", None) is not None or not isinstance(getattr(attention, "norm", None), nn.Identity):
        return "its attention has a gate or a norm over all heads"
    if not isinstance(getattr(mlp, "fc1", None), nn.Linear) or mlp.fc1.out_features != mlp.fc2.in_features:
        return f"{path_of(type(mlp))} is not fc1, activation, fc2"
    return None if isinstance(getattr(mlp, "norm", None), nn.Identity) else "its MLP has a norm over all neurons"


def _cut_heads(attention: Any, mask: Tensor) -> None:
    kept = mask.repeat_interleave(attention.head_dim).nonzero().flatten()
    width = attention.num_heads * attention.head_dim
    attention.qkv = _part(attention.qkv, 0, torch.cat([kept, kept + width, kept + 2 * width]))
    attention.proj = _part(attention.proj, 1, kept)
    attention.num_heads, attention.attn_dim = int(mask.sum()), len(kept)


def _part(layer: nn.Linear, dim: int, kept: Tensor) -> nn.Linear:
    """Return a linear layer with only the ``kept`` rows (dim 0) or columns (dim 1) of ``layer``."""
    weight = layer.weight.detach().index_select(dim, kept)
    out = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, weight.device, weight.dtype)
    with torch.no_grad():
        out.weight.copy_(weight)
        if layer.bias is not None:
            out.bias.copy_(layer.bias.index_select(0, kept) if dim == 0 else layer.bias)
    return out.requires_grad_(layer.weight.requires_grad)
