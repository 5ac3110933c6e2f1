"""The parts that PVT and CvT share: a convolutional patch embedding, the loop over blocks, and a head with timm's interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from timm.layers import to_2tuple  # type: ignore[attr-defined]
from timm.models import checkpoint_seq
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from laconic.analysis.layer_macs import Work, layers
from laconic.core.grid import cells_of
from laconic.core.shape_types import Float

Size = tuple[int, int]


class PatchEmbed(nn.Module):
    """A convolution and a LayerNorm that turn an image into tokens."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int, padding: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, image: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B P D"], Size]:
        """Return the tokens in raster order, and the rows and columns of their grid."""
        patches = self.proj(image)
        return self.norm(cells_of(patches)), (patches.shape[2], patches.shape[3])


class Pyramid(nn.Module):
    """Base class of models with several stages, the last of which has a class token: final norm and head.

    Args:
        img_size: pixels of a side, or (height, width).
        width: channels of the last stage.
        num_classes: classes, or 0 for no head.
        global_pool: ``token`` reads the class token, ``avg`` the mean of the patches of the last stage, ``""`` nothing.
        eps: of the final LayerNorm.
    """

    def __init__(self, img_size: int | Sequence[int], width: int, num_classes: int, global_pool: str, eps: float) -> None:
        super().__init__()
        self.img_size: Size = to_2tuple(img_size)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = width
        self.num_prefix_tokens, self.grad_checkpointing = 1, False
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Return the tokens of the last stage after the final norm, the class token first."""
        raise NotImplementedError

    def embeddings(self) -> list[tuple[PatchEmbed, Size]]:
        """Return the patch embedding of each stage, and its grid for an image of the model's own size."""
        raise NotImplementedError

    def work_of_ends(self, before: int, after: int, grids: Sequence[Size] | None = None) -> Work:
        """Return the work outside the blocks for one image (see `laconic.analysis.layer_macs`).

        ``before`` and ``after``: tokens that enter the first block and that the last block returns, prefix tokens included.
        ``grids``: the grid of each stage; None: those for the model's own size.
        """
        ends = layers(self.norm, after) + layers(self.head, 1 if self.global_pool else after)
        own = self.embeddings()
        sizes = [grid for _, grid in own] if grids is None else grids
        return sum((layers(embed, prod(grid)) for (embed, _), grid in zip(own, sizes, strict=True)), ends)

    def run(self, calls: Sequence[Callable[[Tensor], Tensor]], x: Float[Tensor, "B N C"]) -> Float[Tensor, "B M C"]:
        """Run the blocks of a stage in sequence; a block may change the number of tokens."""
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(calls, x)
        for call in calls:
            x = call(x)
        return x

    def pool(self, x: Float[Tensor, "B N D"], pool_type: str | None = None) -> Tensor:
        """Pool the tokens for the head, as ``pool_type`` (default: the model's ``global_pool``) says."""
        return global_pool_nlc(x, self.global_pool if pool_type is None else pool_type, self.num_prefix_tokens)

    def forward_head(self, x: Float[Tensor, "B N D"], pre_logits: bool = False) -> Tensor:
        """Map the tokens of `forward_features` to logits, or to the input of the head."""
        x = self.pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Map images to logits."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with torch's default initialization."""
        self.num_classes, self.global_pool = num_classes, self.global_pool if global_pool is None else global_pool
        new = nn.Linear(self.embed_dim, num_classes).to(self.norm.weight) if num_classes else nn.Identity()
        self.head = new.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable
