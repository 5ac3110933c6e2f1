"""The token set and its operations. Only these change the number of tokens in Laconic.

Shapes, here and everywhere: B images, P patches of the image, L current patch tokens, N = prefix + L current tokens, K kept
tokens, M new tokens, C channels, H heads, D channels of a head. Prefix tokens (class, distillation, register) come first in
``x``; the other fields have no entries for them, because they are never dropped or merged.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.block_gates import Switches
from laconic.core.gather import add_rows, arange_like, gather_rows, in_parts, places, remap
from laconic.core.shape_types import Float, Int

OLD_NAMES = {  # fields and verbs of version 0.1
    "where": "token_of_patch",
    "patch": "origin",
    "place": "origin_index",
    "alive": "keep_mask",
    "there": "keep_mask_or_ones",
    "shown": "visible_prefix",
    "gate": "attn_scale",
    "gates": "attn_scale_or_ones",
    "columns": "per_token",
    "notes": "per_image",
    "aside": "parked",
    "ordinary": "is_plain",
    "highest": "merge_max",
    "fade": "soft_drop",
    "compact": "drop_hidden",
    "note": "set_per_image",
    "note_more": "append_per_image",
}


@dataclass(frozen=True)
class Tokens:
    """An immutable set of tokens with all data that belongs to them; every verb returns a new set.

    ``token_of_patch[b, p]`` is the patch token (counted from 0, without prefix tokens) that holds patch ``p``, or -1 if the
    patch was dropped; ``size`` is the number of patches a token holds, so ``size[j] == (token_of_patch == j).sum()``.
    ``origin`` is the patch whose position a token has; None means that every token still has its own.
    """

    x: Float[Tensor, "B N C"]  # None in the entries of `laconic.core.history`
    size: Float[Tensor, "B L"]
    token_of_patch: Int[Tensor, "B P"]
    prefix: int = 1
    has_cls: bool = True
    origin: Int[Tensor, "B L"] | None = None
    attn_scale: Float[Tensor, "B L"] | None = None  # factor on exp(logit) towards a token (proportional attention: its size)
    keep_mask: Float[Tensor, "B L"] | None = None  # soft keep decision: a token with 0 is hidden from all tokens but itself
    per_token: dict[str, Tensor] = field(default_factory=dict)  # [B, L, ...] a method's data of each token
    complete: bool = True  # True if every patch is held by a token; False if some may have been dropped
    merged: bool = False  # True if a token may hold several patches (pooling then weights tokens by size)
    # the prefix tokens that are visible to the others, as factors (A-ViT may halt them); None: all
    visible_prefix: Float[Tensor, "B R"] | None = None
    attention: Float[Tensor, "B H N N"] | None = None  # weights that replace the softmax of the next attention, once
    switches: Switches | None = None  # factors on the halves and the heads of the next block, once (AdaViT)
    per_image: dict[str, Tensor] = field(default_factory=dict)  # [B, ...] a method's data of each image
    parked: Tokens | None = None  # tokens that skip some blocks and are rejoined later (Evo-ViT)
    positions: Tensor | None = None  # [P, C] the model's absolute position embedding, shared by all images
    # rows and columns of the image's patches (of a clip: tubelets in time, rows, columns); None: not known
    grid: tuple[int, ...] | None = None
    dropped: Tensor | None = None  # [B, P, C] features of dropped patches when they were dropped; None unless tracked
    # [B, P] the token that holds a patch or, for a dropped patch, the most similar token; None unless tracked
    similar: Tensor | None = None
    # a patch token has the features of the token at its place this many images before it in the batch, which is computed for
    # both (0: it is computed itself); None: all are computed
    shared_from: Int[Tensor, "B L"] | None = None

    @classmethod
    def start(
        cls,
        x: Float[Tensor, "B N C"],
        prefix: int,
        has_cls: bool,
        positions: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tokens:
        """Return the tokens at the input of a model's first block: each patch token holds its own patch."""
        batch, patches = x.shape[0], x.shape[1] - prefix
        where = torch.arange(patches, device=x.device).expand(batch, patches)
        size = torch.ones(batch, patches, device=x.device, dtype=torch.float32)
        return cls(x, size, where, prefix, has_cls, positions=positions, grid=grid)

    def __len__(self) -> int:
        return int(self.size.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """The number of images, and of tokens in each, prefix tokens included."""
        return self.size.shape[0], self.prefix + self.size.shape[1]

    def __getattr__(self, name: str) -> Any:  # called only for names that do not exist
        if name not in OLD_NAMES:
            raise AttributeError(f"Tokens has no field {name!r}")
        return getattr(self, _new_name(name))

    def replace(self, **changes: Any) -> Tokens:
        """Return a copy with other values in the named fields."""
        for name in changes:
            if name in OLD_NAMES:
                changes = {_new_name(name): value for name, value in changes.items()}
                break
        copy = object.__new__(type(self))  # called many times a forward: dataclasses.replace takes ten times as long
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    @property
    def is_plain(self) -> bool:
        """True if a block may run unchanged on these tokens: none has a factor, is hidden, parked or shared."""
        return (
            self.attn_scale is None
            and self.keep_mask is None
            and self.visible_prefix is None
            and self.attention is None
            and self.switches is None
            and self.parked is None
            and self.shared_from is None
        )

    def images(self, chosen: slice) -> Tokens:
        """Return the same tokens for some images of the batch.

        Tokens that share the features of one that is not among these images share those of the first image that has them; if
        images are left out in between (a step), no token is shared. All have features, so either is right.
        """

        def some(value: Any) -> Any:
            return None if value is None else value[chosen]

        names = (
            "x",
            "size",
            "token_of_patch",
            "origin",
            "attn_scale",
            "keep_mask",
            "visible_prefix",
            "attention",
            "dropped",
            "similar",
        )
        return self.replace(
            **{name: some(getattr(self, name)) for name in names},
            per_token={name: column[chosen] for name, column in self.per_token.items()},
            per_image={name: note[chosen] for name, note in self.per_image.items()},
            parked=None if self.parked is None else self.parked.images(chosen),
            shared_from=self._shared_in(chosen),
        )

    def _shared_in(self, chosen: slice) -> Tensor | None:
        if self.shared_from is None or chosen.step not in (None, 1):
            return None
        shared = self.shared_from[chosen]
        number = torch.arange(len(shared), device=shared.device).unsqueeze(1)
        return torch.minimum(shared, number) if len(shared) else None

    @property
    def patches(self) -> Float[Tensor, "B L C"]:
        """The features of the patch tokens."""
        return self.x[:, self.prefix :]

    def rows(self, index: Int[Tensor, "B K"]) -> Float[Tensor, "B K C"]:
        """Return the features of the patch tokens ``index``."""
        return gather_rows(self.x, index + self.prefix)

    @property
    def keep_mask_or_ones(self) -> Float[Tensor, "B L"]:
        """``keep_mask``, or 1 for every patch token."""
        return torch.ones_like(self.size) if self.keep_mask is None else self.keep_mask

    @property
    def attn_scale_or_ones(self) -> Float[Tensor, "B L"]:
        """``attn_scale``, or 1 for every patch token."""
        return torch.ones_like(self.size) if self.attn_scale is None else self.attn_scale

    @property
    def origin_index(self) -> Int[Tensor, "B L"]:
        """The patch whose position each token has."""
        return self.origin if self.origin is not None else arange_like(self.size)

    @property
    def source(self) -> Int[Tensor, "B N"]:
        """The token whose features each token has (see ``shared_from``), as a row of the batch's tokens in one row [B N, C]."""
        images, count = self.shape
        own = torch.arange(images * count, device=self.size.device).view(images, count)
        return own if self.shared_from is None else own - F.pad(self.shared_from * count, (self.prefix, 0))

    # ------------------------------------------------------------------------------------------------ verbs
    def keep(self, index: Int[Tensor, "B K"]) -> Tokens:
        """Keep the patch tokens ``index``, in that order, and drop the rest."""
        prefix = torch.arange(self.prefix, device=index.device).expand(index.shape[0], -1)
        x = gather_rows(self.x, torch.cat([prefix, index + self.prefix], 1))
        dst = index.new_full(self.size.shape, -1).scatter(1, index, arange_like(index))
        return self._follow(index, dst, x, gather_rows(self.size, index), False)

    def merge(
        self,
        dst: Int[Tensor, "B L"],
        weight: Float[Tensor, "B L"] | None,
        lead: Int[Tensor, "B M"],
        *,
        complete: bool = False,
    ) -> Tokens:
        """Sum tokens into new ones: ``x'[m] = sum of weight[i] * x[i] over dst[i] == m``; ``dst[i] == -1`` drops token i.

        The caller chooses the weights (and whether they sum to one); None means the mean, weighted by size. ``lead[m]`` is
        the old token whose position and per-token data new token m inherits. ``complete`` promises that no ``dst`` is -1 and
        that ``dst[lead[m]] == m``, which saves the operations that handle other cases.
        """
        count, old, into = lead.shape[1], self.size, dst
        if not complete:
            gone, into = dst < 0, dst.clamp_min(0)
            old = old.masked_fill(gone, 0.0)
        row = lead if complete else None
        size = add_rows(old, into, count, row)
        if weight is None:
            weight = old / size.gather(1, into).clamp_min(torch.finfo(size.dtype).tiny)
        elif not complete:
            weight = weight.masked_fill(gone, 0.0)
        new = add_rows(self.patches * weight.unsqueeze(-1), into, count, row).to(self.x.dtype)
        x = torch.cat([self.x[:, : self.prefix], new], 1)
        return self._follow(lead, dst, x, size, complete, merged=True)

    def merge_max(self, dst: Int[Tensor, "B L"], lead: Int[Tensor, "B M"]) -> Tokens:
        """Merge tokens by the maximum of each channel over ``dst[i] == m``, without weights; otherwise as `merge`."""
        gone, into = dst < 0, dst.clamp_min(0)
        patches, size = self.patches.masked_fill(gone.unsqueeze(-1), -torch.inf), self.size.masked_fill(gone, 0.0)
        new = patches.new_zeros(lead.shape[0], lead.shape[1], patches.shape[2])
        new = new.scatter_reduce(1, into.unsqueeze(-1).expand_as(patches), patches, "amax", include_self=False)
        x = torch.cat([self.x[:, : self.prefix], new], 1)
        return self._follow(lead, dst, x, add_rows(size, into, lead.shape[1]), False, merged=True)

    def mix(self, matrix: Float[Tensor, "B M L"]) -> Tokens:
        """Merge softly, ``x' = matrix @ x``. Each column divides its token's size; a patch goes with its largest share."""
        mass = matrix / matrix.sum(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
        mixed = (matrix @ self.patches.to(matrix.dtype)).to(self.x.dtype)
        size = (mass @ self.size.to(mass.dtype).unsqueeze(-1)).squeeze(-1).to(self.size.dtype)
        x = torch.cat([self.x[:, : self.prefix], mixed], 1)
        return self._follow(matrix.argmax(2), matrix.argmax(1), x, size, True, merged=True)

    def join(self, other: Tokens) -> Tokens:
        """Append the patch tokens of ``other``, which holds patches that this set has dropped."""

        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b], 1)

        return self.replace(
            x=torch.cat([self.x, other.patches], 1),
            size=torch.cat([self.size, other.size], 1),
            token_of_patch=torch.where(other.token_of_patch >= 0, other.token_of_patch + len(self), self.token_of_patch),
            origin=torch.cat([self.origin_index, other.origin_index], 1),
            attn_scale=both(self.attn_scale, other.attn_scale),
            keep_mask=both(self.keep_mask, other.keep_mask),
            per_token={name: torch.cat([c, other.per_token[name]], 1) for name, c in self.per_token.items()},
            merged=self.merged or other.merged,
        )

    def share(self, back: Int[Tensor, "B L"]) -> Tokens:
        """Give each patch token the features of the one at its place ``back`` images before it in the batch (0: its own).

        All tokens are kept, and each still holds its own patch. Blocks need to compute those of 0 only.
        """
        tokens = self.replace(shared_from=back)
        return tokens.replace(x=self.x.flatten(0, 1).index_select(0, tokens.source.flatten()).view(self.x.shape))

    def soft_drop(self, alive: Float[Tensor, "B L"], dst: Int[Tensor, "B L"]) -> Tokens:
        """Drop tokens softly: all stay in the set, and a token with ``alive == 0`` gives its patches to ``dst`` (-1: none)."""
        into = dst.clamp_min(0)
        size = add_rows(self.size.masked_fill(dst < 0, 0.0), into, len(self))
        dropped, similar = self._of_dropped(dst, arange_like(dst), size, False)
        where = remap(self.token_of_patch, dst, complete=self.complete)
        return self.replace(
            keep_mask=alive, size=size, token_of_patch=where, complete=False, merged=True, dropped=dropped, similar=similar
        )

    def switch(self, halves: Float[Tensor, "B S N"], heads: Float[Tensor, "B H"] | None = None) -> Tokens:
        """Set factors on the halves and heads of the next block (see `Switches`); all tokens are kept."""
        return self.replace(switches=Switches(halves, None if heads is None else heads.unsqueeze(2)))

    def set_per_image(self, **notes: Tensor) -> Tokens:
        """Set data of every image, [B, ...], replacing old values of these names."""
        return self.replace(per_image={**self.per_image, **notes})

    def append_per_image(self, **columns: Float[Tensor, "B M"]) -> Tokens:
        """Append columns to the data of every image under these names."""
        old = self.per_image
        return self.set_per_image(**{n: torch.cat([old[n], new], 1) if n in old else new for n, new in columns.items()})

    def append(self, x: Float[Tensor, "B M C"], place: Int[Tensor, "B M"]) -> Tokens:
        """Append new tokens with the positions of these patches. They hold no patch yet (`soft_drop` may give them some)."""
        new = torch.ones_like(x[..., 0], dtype=self.size.dtype)

        def longer(values: Tensor | None, more: Tensor) -> Tensor | None:
            return None if values is None else torch.cat([values, more.to(values.dtype)], 1)

        columns = {n: torch.cat([c, c.new_zeros(x.shape[0], x.shape[1], *c.shape[2:])], 1) for n, c in self.per_token.items()}
        return self.replace(
            x=torch.cat([self.x, x.to(self.x.dtype)], 1),
            size=torch.cat([self.size, torch.zeros_like(new)], 1),
            origin=torch.cat([self.origin_index, place], 1),
            attn_scale=longer(self.attn_scale, new),
            keep_mask=longer(self.keep_mask, new),
            per_token=columns,
        )

    def drop_hidden(self, bucket: int = 1) -> Tokens:
        """Remove hidden tokens, as many as the image with the fewest of them has; the order of tokens is preserved.

        The number of tokens that are left is rounded up to a multiple of ``bucket``, at most to all of them.

        The number of kept tokens depends on the data, so this synchronizes with the device.
        """
        if self.keep_mask is None:
            return self
        seen = (self.keep_mask > 0).sum(1)
        longest, shortest = int(seen.max()), int(seen.min())
        length = max(1, -(-longest // bucket) * bucket)
        out = self.keep(places(self.keep_mask > 0, length))
        return out.replace(keep_mask=None) if out.size.shape[1] == shortest else out

    def dense(self, values: Float[Tensor, "B L C"], fill: float = 0.0) -> Float[Tensor, "B P C"]:
        """Give every patch the value of the token that holds it; dropped patches get ``fill``."""
        out = gather_rows(values, self.token_of_patch.clamp_min(0))
        return out.masked_fill((self.token_of_patch < 0).unsqueeze(-1), fill)

    def _follow(self, lead: Tensor, dst: Tensor, x: Tensor, size: Tensor, complete: bool, *, merged: bool = False) -> Tokens:
        still = self.origin is None and not self.merged  # every token still holds exactly its own patch
        dropped, similar = self._of_dropped(dst, lead, self.size, complete)
        return self.replace(
            x=x,
            dropped=dropped,
            similar=similar,
            size=size,
            token_of_patch=dst if still else remap(self.token_of_patch, dst, complete=self.complete),
            complete=self.complete and complete,
            merged=self.merged or merged,
            origin=lead if self.origin is None else gather_rows(self.origin, lead),
            attn_scale=None if self.attn_scale is None else gather_rows(self.attn_scale, lead),
            keep_mask=None if self.keep_mask is None else gather_rows(self.keep_mask, lead),
            per_token={name: gather_rows(c, lead) for name, c in self.per_token.items()} if self.per_token else {},
        )

    def _of_dropped(self, dst: Tensor, lead: Tensor, size: Tensor, complete: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return ``dropped`` and ``similar`` after each token i is moved to ``dst[i]`` (-1: dropped); None if not tracked.

        ``lead`` are the kept tokens. One that holds no patch by ``size`` [B, L] is never the most similar one. ``complete``
        promises that no ``dst`` is -1, so that no similarities are needed.
        """
        dropped, similar = self.dropped, self.similar
        if complete:
            return dropped, None if similar is None else dst.gather(1, similar)
        if dropped is not None:
            now = ((self.token_of_patch >= 0) & (dst.gather(1, self.token_of_patch.clamp_min(0)) < 0)).unsqueeze(-1)
            dropped = torch.where(now, gather_rows(self.patches, self.token_of_patch.clamp_min(0)).to(dropped.dtype), dropped)
        if similar is not None:
            similar = torch.where(dst < 0, self._most_similar(lead, size), dst).gather(1, similar)
        return dropped, similar

    def _most_similar(self, lead: Int[Tensor, "B M"], size: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """Return for every token the index into ``lead`` of the token with the highest cosine similarity."""
        features = F.normalize(self.patches.detach().float(), dim=2)
        kept, absent = gather_rows(features, lead).transpose(1, 2), (gather_rows(size, lead) <= 0).unsqueeze(1)
        found = [(part @ kept).masked_fill(absent, -2.0).argmax(2) for part in in_parts(features, lead.shape[1])]
        return torch.cat(found, 1)


def _new_name(name: str) -> str:
    if name in OLD_NAMES:
        warnings.warn(f"Tokens.{name} is now Tokens.{OLD_NAMES[name]}", DeprecationWarning, stacklevel=3)
    return OLD_NAMES.get(name, name)
