"""What reads all tokens at the end of a host, as its stand-ins see it: with every token counted as often as it has patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.compression import Compression
from laconic.grid import GridMap
from laconic.masking import SOFT_FLOOR
from laconic.pooling import pool_by_size
from laconic.tokens import Tokens


@dataclass(frozen=True)
class Reading:
    """A reduced host, for what stands in for its methods (see `laconic.hosts.Host.stand_ins`)."""

    compression: Compression

    @property
    def host(self) -> Any:
        """The model."""
        return self.compression.model

    def tokens(self, x: Tensor) -> Tokens | None:
        """The tokens that ``x`` [B, N, C] are after the last block, or None where each of them counts the same."""
        compression = self.compression
        tokens = compression.ledger[compression.depth]
        if tokens is not None and compression.restore and x.shape[1] == compression.prefix + tokens.where.shape[1]:
            held = (tokens.where >= 0).to(tokens.size.dtype)  # a patch that was dropped counts nothing
            tokens = Tokens.start(x, tokens.prefix, tokens.has_cls).replace(size=held, merged=True)
        if tokens is None or not tokens.merged or x.shape[1] != compression.prefix + len(tokens):
            return None
        return tokens

    def pool(self, pool: Callable[[Tensor, str | None], Tensor], x: Tensor, kind: str | None = None) -> Tensor:
        """``pool(x, kind)``, the host's own, over patches instead of tokens; without a kind it is that of the host.

        Raises:
            ValueError: a pooling that cannot be weighted.
        """
        tokens = self.tokens(x)
        usual, prefix_too = self.compression.pooling
        if tokens is None or (kind or usual) in ("token", "none"):
            return pool(x, kind)
        return pool_by_size(pool, x, tokens, kind or usual, prefix_too)

    def whole(self, x: Tensor) -> Tensor:
        """``x`` [B, N, C], the last tokens, with all patches: a patch has those of the token it went to. So means are right.

        Models around the host average its last tokens, each alike. Dropped patches get the mean of the others: then a mean over
        all patches is the mean over those that are held, each token by its size. Where no token stands for several patches
        ``x`` stays as short as it is: that mean is right already. (Soft mixtures have no one token for a patch: it gets the one
        that most of it went to.)
        """
        tokens, prefix = self.compression.ledger[self.compression.depth], self.compression.prefix
        full = None if tokens is None or not (tokens.merged or self.compression.restore) else GridMap.of(tokens)
        if tokens is None or full is None:
            return x
        held = full.fill(torch.ones_like(tokens.size).unsqueeze(-1)).to(x.dtype)  # [B, P, 1]: 0 for a dropped patch
        patches = x[:, prefix:]
        patches = patches * held if self.compression.restore else full.fill(patches)
        mean = patches.sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp_min(1e-6)
        return torch.cat([x[:, :prefix], patches + (1 - held) * mean], 1)

    def key_bias(self, x: Tensor) -> Tensor | None:
        """What an attention over all tokens ``x`` [B, N, C] adds to its logits, [B, N]: log of sizes; None for nothing."""
        tokens = self.tokens(x)
        if tokens is None:
            return None
        size = tokens.size if tokens.alive is None else tokens.size * tokens.alive
        return F.pad(size, (tokens.prefix, 0), value=1.0).clamp_min(SOFT_FLOOR).log().to(x.dtype)
