"""Shape annotations: jaxtyping's if it is installed (the tests enable its checks), otherwise plain tensors."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, item: Any) -> type:
                return torch.Tensor

        Bool = Float = Int = _Unchecked

__all__ = ["Bool", "Float", "Int"]
