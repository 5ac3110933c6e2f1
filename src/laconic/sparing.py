"""Work that the answer does not need, left out; what comes out is equal but for rounding.

* Where the host's answer comes of its prefix tokens alone, the last block works them out and no others: keys and values are of
  all tokens, queries, projection and MLP of the prefix tokens. A method that decides by keys or the class query goes on.
* Where the steps of a block's attention are known, they are taken one by one: nobody has to listen to every operation for the
  one that a method looks at, or adds a bias to.
* Where a method does nothing but keep some tokens, by the attention of the class token or by less, those that it drops are
  neither queries nor projected: keys and values first, then the choice, then the rest for the tokens that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from laconic.attention import Seen, Watch
from laconic.hosts import Halves, Parts
from laconic.tokens import Tokens

Choose = Callable[[Tokens, Seen], Tokens]
Spared = Literal["prefix", "dropped", "listening"]  # rows of all but the prefix tokens, of what is dropped; or only listening


@dataclass(frozen=True)
class Sparing:
    """One block of which not every row is needed: its two halves, and the steps of its attention if they are known.

    ``bias`` is what is added to its logits towards each token.
    """

    attention: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    parts: Parts | None
    bias: Tensor | None

    @classmethod
    def of(cls, block: Any, halves: Halves, tokens: Tokens, kwargs: dict[str, Any], bias: Tensor | None) -> Sparing | None:
        """None where a block cannot be asked for some of its rows, or something is done to single ones of these tokens."""
        if halves.attention is None or halves.mlp is None or not tokens.replace(gate=None).ordinary:
            return None
        if halves.grid is not None or halves.relative:
            return None
        bare = all(value is None or value is False for value in kwargs.values())
        attention, mlp = partial(halves.attention, block, **kwargs), partial(halves.mlp, block)
        return cls(attention, mlp, halves.parts(block) if bare else None, bias)

    def prefix_alone(self, tokens: Tokens, between: Choose) -> Tokens:
        """The block for the prefix tokens: the features are theirs alone. Of the patch tokens it is known what becomes of them.

        Where the attention has no known steps it is run whole, and the MLP is spared; then there must be nothing ``between``.
        """
        first = tokens.x[:, : tokens.prefix]
        if self.parts is not None:
            h = self.parts.norm(tokens.x)
            q, (k, v) = self.parts.queries(h[:, : tokens.prefix]), self.parts.keys_values(h)
            mask = None if self.bias is None else self.bias.to(k.dtype)
            added = attend(self.parts, q, k, v, mask)
            call = {"query": q, "key": k, "value": v, "attn_mask": mask}
            tokens = between(tokens, Seen.of([call], tokens, "a block"))  # features that nobody reads: those before the block
            return self._finish(tokens, first + added)
        with Watch([], self.bias):
            return self._finish(tokens, first + self.attention(tokens.x)[:, : tokens.prefix])

    def choice_first(self, parts: Parts, tokens: Tokens, choose: Choose) -> Tokens:
        """The block for the tokens that ``choose`` keeps (as they are) once it has seen the class token's attention."""
        h = parts.norm(tokens.x)
        k, v = parts.keys_values(h)
        call = {"query": parts.queries(h[:, :1]), "key": k, "value": v, "attn_mask": self.bias}
        kept = choose(tokens, Seen.of([call], tokens, "a block"))
        return self._finish(kept, kept.x + attend(parts, parts.queries(parts.norm(kept.x)), k, v, self.bias))

    def step_by_step(self, parts: Parts, tokens: Tokens, between: Choose) -> Tokens:
        """The whole block, with a look at its attention in between."""
        q, k, v = parts.project(parts.norm(tokens.x))
        mask = None if self.bias is None else self.bias.to(k.dtype)
        tokens = tokens.replace(x=tokens.x + attend(parts, q, k, v, mask))
        call = {"query": q, "key": k, "value": v, "attn_mask": mask}
        tokens = between(tokens, Seen.of([call], tokens, "a block"))
        return self._finish(tokens, tokens.x)

    def _finish(self, tokens: Tokens, x: Tensor) -> Tokens:
        return tokens.replace(x=x + self.mlp(x))


def attend(parts: Parts, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What attention adds to the rows that the queries were made of."""
    mask = None if bias is None else bias.to(k.dtype)
    return parts.added(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def heard(module: Any) -> bool:
    """Whether somebody listens to a module (if there is one) or to what is in it, and may want all rows."""
    if module is None:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return any(map(heard, module._modules.values()))
