"""DiffRate's search (arXiv:2305.17997): learn how many tokens each block prunes and merges; the model is not trained.

Every count is the mean of candidates under a softmax of learned logits, rounded up. The search removes no token: those beyond
the count are hidden, with the probability of being kept as their straight-through gradient. The loss is the cross-entropy
plus weight * (GMACs - target)^2. Published: AdamW at 1e-2 on the logits alone, weight 5, a candidate every 4 tokens, 3 epochs.

    found = search(model, batches, gmacs=2.9)          # batches of (images, labels)
    laconic.reduce_(model, found)

In ``laconic train`` use the step ``rate-search`` (`laconic.training.rate_search_step`). As in the published code a merged token
weighs at least one patch in the search; afterwards it may weigh less. The initial logits are not published; here they are
higher for candidates that keep more tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.analysis import layer_macs as work
from laconic.analysis.macs import summary
from laconic.api import reduce_, restore_
from laconic.core.attention import AttentionView
from laconic.core.backbone import find_host
from laconic.core.gather import add_rows, arange_like
from laconic.core.method import Reducer
from laconic.core.shape_types import Float
from laconic.core.token_reduction import reduction_of
from laconic.core.tokens import Tokens
from laconic.methods import DiffRate
from laconic.methods.ops import SCORES, Score, ScoreName, cosine, topk_split

SLOPE = 10.0  # initial difference between the logit of keeping all tokens and that of keeping none


class Count(nn.Module):
    """A learned number of tokens, from 1 to ``patches``."""

    candidates: Tensor

    def __init__(self, patches: int, every: int) -> None:
        super().__init__()
        self.patches = patches
        self.register_buffer("candidates", torch.arange(patches, 0, -every).flip(0).float(), persistent=False)
        self.logits = nn.Parameter(SLOPE * self.candidates / patches)

    def forward(self) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
        """Return the count, and for every rank 1 if it is within the count, else 0; both with straight-through gradients."""
        probability = self.logits.softmax(0)
        mean = (probability * self.candidates).sum()
        count = mean + ((mean - 1e-3).ceil().clamp(1, self.patches) - mean).detach()
        rank = torch.arange(self.patches, device=mean.device)
        keep = (probability * (rank.unsqueeze(1) < self.candidates)).sum(1)
        return count, (rank < count.detach().round()) + keep - keep.detach()


class SearchReducer(Reducer):
    """`DiffRateReducer` with learned counts; it hides tokens instead of removing them."""

    def __init__(self, score: Score, patches: int, every: int) -> None:
        super().__init__()
        self.score, self.prune, self.merge = score, Count(patches, every), Count(patches, every)

    def active(self, before: int, n: int) -> bool:
        return True

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        keep_mask = tokens.keep_mask_or_ones
        # hidden tokens rank last
        order, _ = topk_split(self.score(tokens, seen) + 2 * keep_mask.detach(), len(tokens))
        rank = torch.empty_like(order).scatter(1, order, arange_like(order))
        kept = keep_mask * self.prune()[1][rank]
        within = self.merge()[1][rank]
        head, tail = kept * within, kept * (1 - within)
        others = torch.eye(len(tokens), dtype=torch.bool, device=head.device) | (head == 0).unsqueeze(1)
        best, host = cosine(tokens.patches, tokens.patches).masked_fill(others, -2.0).max(2)
        best = best.masked_fill(best < -1.5, 0.0)  # no other head
        gate = tokens.attn_scale_or_ones
        whole = 1 + add_rows(tail, host, len(tokens)).unsqueeze(2)
        patches = tokens.patches + add_rows(tokens.patches * tail.unsqueeze(2), host, len(tokens))
        grown = gate + add_rows(gate * best * tail, host, len(tokens))
        tokens = tokens.soft_drop(head, torch.where(head > 0, arange_like(head), torch.where(tail > 0, host, -1)))
        return tokens.replace(
            x=torch.cat([tokens.x[:, : tokens.prefix], patches / whole], 1).to(tokens.x.dtype), attn_scale=grown.clamp_min(1.0)
        )


class DiffRateSearch:
    """A search of the counts for one model; `finish` restores the model and returns the method with the counts found.

    Args:
        model: an unreduced, supported model with trained weights; it is put into evaluation mode, its parameters are frozen.
        gmacs: target cost of the reduced model in billions of multiply-adds (matrix products, without the matching).
        weight: weight of the squared distance to ``gmacs`` in the loss.
        every: number of tokens between two candidates of a count.
        score: the score that tokens are sorted by.

    Raises:
        ValueError: ``weight`` or ``every`` is too small, or ``gmacs`` is not below the cost of the unreduced model.
    """

    def __init__(
        self, model: nn.Module, gmacs: float, *, weight: float = 5.0, every: int = 4, score: ScoreName = "class"
    ) -> None:
        if weight <= 0 or every < 1:
            raise ValueError(f"weight must be positive and every at least 1; got weight={weight}, every={every}")
        whole = summary(model).macs / 1e9
        if not 0 < gmacs < whole:
            raise ValueError(f"gmacs must be above 0 and below the {whole:.4g} of the unreduced model; got {gmacs}")
        self.model, self.gmacs, self.weight, self.score = model, gmacs, weight, score
        self.frozen = [p for p in model.parameters() if p.requires_grad]
        host, entry = find_host(model)
        self.blocks = entry.blocks(host)
        reduce_(model, DiffRate(score=score), keep=1.0)
        reduction = reduction_of(model.eval())
        self.prefix, self.patches = reduction.prefix, math.prod(reduction.grid)
        tokens, device = self.prefix + self.patches, next(model.parameters()).device
        self.rest = whole - sum(work.block(block, tokens, tokens)["matmul"] for block in self.blocks) / 1e9
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        for block in reduction.reducers:
            reduction.reducers[block] = SearchReducer(SCORES[score], self.patches, every).to(device)
        self.reducers: dict[int, Any] = {int(block): reducer for block, reducer in reduction.reducers.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Return the learned parameters: the logits of all counts."""
        return [p for reducer in self.reducers.values() for p in reducer.parameters()]

    def cost(self) -> Float[Tensor, ""]:
        """Return the GMACs of the model with the current counts, with gradients."""
        kept, total = (self.parameters()[0].new_tensor(value) for value in (float(self.patches), self.rest))
        for index, block in enumerate(self.blocks):
            at_attention = kept + self.prefix
            if index in self.reducers:
                kept = torch.minimum(kept, torch.minimum(self.reducers[index].prune()[0], self.reducers[index].merge()[0]))
            total = total + _block_macs(block, at_attention, kept + self.prefix) / 1e9
        return total

    def loss(self, images: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """Return the cross-entropy plus the weighted squared distance of the cost to the target."""
        return F.cross_entropy(self.model(images).float(), labels) + self.weight * (self.cost() - self.gmacs).square()

    def found(self) -> DiffRate:
        """Return the method with the current counts."""
        return found_in(self.model, self.score)

    def finish(self) -> DiffRate:
        """Restore the model, unreduced and trainable, and return the method with the counts found."""
        found = self.found()
        restore_(self.model)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        return found


@torch.no_grad()
def found_in(model: nn.Module, score: ScoreName) -> DiffRate:
    """Return DiffRate with the current counts of a model in a search, or of a copy of it."""
    reduction = reduction_of(model)
    reducers: Any = reduction.reducers
    prune_kept, merge_kept, kept = list[int](), list[int](), math.prod(reduction.grid)
    for block in range(reduction.depth):
        after_pruning = kept
        if str(block) in reducers:
            after_pruning = min(kept, round(float(reducers[str(block)].prune()[0])))
            kept = min(after_pruning, round(float(reducers[str(block)].merge()[0])))
        prune_kept.append(after_pruning + 1)  # DiffRate's counts include the class token
        merge_kept.append(kept + 1)
    return DiffRate(prune_kept=tuple(prune_kept), merge_kept=tuple(merge_kept), score=score)


def search(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], gmacs: float, lr: float = 1e-2, **options: Any
) -> DiffRate:
    """Learn the counts with one step for each batch (images, labels); ``options`` are those of `DiffRateSearch`.

    Return the method with the counts found; the model is restored.
    """
    run = DiffRateSearch(model, gmacs, **options)
    optimizer = torch.optim.AdamW(run.parameters(), lr=lr, weight_decay=0.0)
    for images, labels in batches:
        optimizer.zero_grad()
        torch.autograd.backward(run.loss(images, labels))
        optimizer.step()
    return run.finish()


def _block_macs(block: nn.Module, at_attention: Tensor, at_mlp: Tensor) -> Tensor:
    """Compute `work.block` for counts with gradients: quadratic in the tokens at attention, linear in those at the MLP."""
    one, two, mlp = (work.block(block, *counts)["matmul"] for counts in ((1, 0), (2, 0), (0, 1)))
    square = (two - 2 * one) / 2
    return square * at_attention.square() + (one - square) * at_attention + mlp * at_mlp
