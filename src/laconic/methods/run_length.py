"""Run-length: a tubelet that repeats the one before it is dropped before the first block (RLT).

Don't Look Twice: Faster Video Transformers with Run-Length Tokenization (Choudhury et al., NeurIPS 2024, arXiv:2411.05222).

A clip is cut into tubelets, patches of several frames. A tubelet is static if it differs from the tubelet before it, at the
same place, by at most ``threshold``: the mean of the absolute differences of their pixels, as the model gets them (normalised;
the paper's threshold is 0.1). A tubelet that is not static and the static ones after it are a run; only the first of a run
enters the model, with its own position, and stands for all of them: its size is the length of the run. Each clip has its own
number of tokens; a clip without static tubelets gets the unreduced model's output, bit for bit.

``compare`` is what is compared of two tubelets: all their pixels (``tubelets``), or as published the first frame of the one
with the last frame of the other (``ends``), which also notices movement inside them.

Departures: the paper adds a learned embedding of the length of a run to its token. It has to be trained with the model, so it
is left out; instead the logarithm of the length is added to the attention logits towards the token, as in ToMe
(``proportional``).

``frames`` is for models of single images that see a video frame by frame: a batch is then clips of that many consecutive
frames, one clip after the other. Only the first patch of a run is computed in the blocks, and the patches after it share its
features; prefix tokens of all frames are computed. A computed token of a frame attends to all patches of its frame: keys and
values of a shared patch are those of the first one of its run. So every patch has features, and holds itself; a clip of equal
frames gets the unreduced model's output for every frame. This use of runs is Laconic's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laconic.core.adaptive import AdaptiveReducer, is_static
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.patch_input import GROUP, PatchInput
from laconic.core.shape_types import Bool, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops import BeforeBlocks, FramesReducer, NoKeepRate, change, hide_groups, require, starts_of, taken


def runs_of(static: Bool[Tensor, "B U S"]) -> Int[Tensor, "B P"]:
    """Return the first tubelet of the run of each tubelet."""
    places = static.shape[2]
    return (starts_of(static)[1] * places + torch.arange(places, device=static.device)).flatten(1)


class RunLengthReducer(AdaptiveReducer):
    """Keep the first tubelet of each run before the first block."""

    def __init__(self, config: RunLength) -> None:
        super().__init__()
        self.config = config

    def embed(self, patches: PatchInput, n: int) -> PatchInput:
        times, rows, columns = patches.clip_grid("run-length")
        frames = patches.images().detach().float()
        tubelets = frames.reshape(-1, times, rows * columns, *frames.shape[2:])
        return patches.grouped(runs_of(change(tubelets, self.config.compare) <= self.config.threshold))

    def before(self, tokens: Tokens, n: int) -> Tokens:
        group = tokens.per_token[GROUP]
        if not is_static() and bool((group == arange_like(group)).all()):
            return taken(tokens)[1]  # nothing repeats: the blocks run unchanged
        tokens = hide_groups(tokens, mean=False)
        return tokens.replace(attn_scale=tokens.size.clamp_min(1)) if self.config.proportional else tokens


@method(
    "run-length",
    title="Run-length: tubelets that repeat are one token",
    paper="2411.05222",
    phase="before",
    score="similarity",
    score_detail="difference from the frames before",
    rest="merged",
    rest_detail="held by the first tubelet of its run",
    trained=False,
    count="variable",
    clips=True,
)
@dataclass(frozen=True)
class RunLength(BeforeBlocks, NoKeepRate):
    """Options of ``run-length``, and those of `AdaptiveMethod`.

    Args:
        threshold: the largest mean absolute difference of normalised pixels at which a tubelet repeats the one before it; 0
            drops equal tubelets only.
        compare: all pixels of two ``tubelets``, or the first frame of one and the last of the other (``ends``).
        proportional: add log(size) to the attention logits towards a token, as ToMe does.
        frames: for models of images: the number of consecutive frames of a clip, 2 or more. A batch is then B * frames images.
            ``compare`` and ``proportional`` have no meaning there. None: the model takes clips.
    """

    threshold: float = 0.1
    compare: Literal["tubelets", "ends"] = "tubelets"
    proportional: bool = True
    frames: int | None = None

    tuning_hint: ClassVar[str] = "a higher threshold drops more tubelets"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("run-length", "threshold", self.threshold, self.threshold >= 0, "must be 0 or more")
        if self.frames is not None:
            require("run-length", "frames", self.frames, self.frames >= 2, "must be 2 or more, or None")
            for option, value, right in (
                ("compare", self.compare, "tubelets"),
                ("proportional", self.proportional, True),
                ("execution", self.execution, self.execution if self.execution != "padded" else "packed"),
            ):
                require("run-length", option, value, value == right, f"must be {right!r} with frames={self.frames}")

    @property
    def batch_multiple(self) -> int:
        return self.frames or 1

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the first block."""
        return (0,)

    def build(self, site: BlockContext) -> Reducer:
        return RunLengthReducer(self) if self.frames is None else FramesReducer(self.threshold, self.frames)

    def trial(self, image: Tensor) -> Tensor:
        """Return the clip with a still second half, so that there are runs; of an image, a clip whose upper half changes."""
        if self.frames is not None and image.dim() == 4:
            clip = image[:1].repeat(self.frames, 1, 1, 1)
            clip[self.frames // 2 :, :, : image.shape[2] // 2] = image[:1, :, : image.shape[2] // 2].flip(3)
            return clip
        if image.dim() != 5:
            return image  # an image: `embed` refuses it
        half = image.shape[1] // 2
        return torch.cat([image[:, :half], image[:, half : half + 1].expand_as(image[:, half:])], 1)
