"""Patches that repeat those of the frame before them, in clips (`laconic.methods.run_length`)."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.core.adaptive import AdaptiveReducer, is_static
from laconic.core.patch_input import PatchInput
from laconic.core.shape_types import Bool, Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops.grouped import taken


def change(tubelets: Float[Tensor, "B T S Z *size"], compare: str) -> Float[Tensor, "B U S"]:
    """Return the mean absolute difference of each tubelet, from the second in time on, and the one before it.

    Tubelets are [B, times, places, channels, frames, height, width].
    """
    before, after = tubelets[:, :-1], tubelets[:, 1:]
    if compare == "ends":
        before, after = before[:, :, :, :, 0], after[:, :, :, :, -1]
    return (after - before).abs().flatten(3).mean(3)


def starts_of(static: Bool[Tensor, "B U S"]) -> tuple[Int[Tensor, "T 1"], Int[Tensor, "B T S"]]:
    """Return all times, and the time at which the run of each tubelet begins; ``static``: it repeats the one before it."""
    begins = torch.cat([torch.ones_like(static[:, :1]), ~static], 1)
    time = torch.arange(begins.shape[1], device=static.device).unsqueeze(1)
    return time, (time * begins).cummax(1).values


class FramesReducer(AdaptiveReducer):
    """Compute the first patch of each run in the frames of a clip before the first block; the others share its features."""

    def __init__(self, threshold: float, frames: int) -> None:
        super().__init__()
        self.threshold, self.frames = threshold, frames

    def embed(self, patches: PatchInput, n: int) -> PatchInput:
        frames, images = self.frames, int(patches.embeddings.shape[0])
        if patches.grid is not None and len(patches.grid) == 3:
            raise ValueError(
                f"run-length with frames={frames} is for models that take single images, and this model takes clips; leave out "
                "frames=: it compares the tubelets inside each clip"
            )
        if images % frames:
            raise ValueError(
                f"run-length with frames={frames} takes clips of {frames} consecutive frames, and this batch has {images} "
                f"images; pass a multiple of {frames}, clip after clip (repeat the last frame to fill a clip), or reduce the "
                "model with another frames="
            )
        pixels = patches.pixels.detach().float()
        clips = pixels.reshape(-1, frames, *pixels.shape[1:])
        time, start = starts_of(change(clips, "tubelets") <= self.threshold)
        return patches.grouped((time - start).flatten(0, 1))

    def before(self, tokens: Tokens, n: int) -> Tokens:
        back, tokens = taken(tokens)
        return tokens.share(back) if is_static() or bool(back.any()) else tokens  # nothing repeats: blocks run unchanged
