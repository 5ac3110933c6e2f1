"""Links from the modules of a reduced model to that model; in copies, pickles and replicas, to their own model."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from laconic.core.backbone import BLOCKS, load_backbones

LINK = "_laconic"  # the attribute of a module of a reduced model that holds its link


class ModelRef:
    """A weak reference to a reduced model, shared by all its parts; in a copy of the model, to the copy."""

    def __init__(self, host: nn.Module | None) -> None:
        self._host = None if host is None else weakref.ref(host)

    def __call__(self) -> Any:
        return None if self._host is None else self._host()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRef:
        copy = memo.get(id(self()))  # None if only a part of the model is copied: the copy still belongs to the same model
        return self if copy is None else ModelRef(copy)

    def __reduce__(self) -> Any:
        return ModelRef, (self(),)


class PartLink:
    """The link of a module whose methods are replaced: the model, and the parameters of its forward."""

    def __init__(self, ref: ModelRef, names: tuple[str, ...]) -> None:
        self.ref, self.names = ref, names


class BlockLink(PartLink):
    """The link of a block: facts that cannot change after the model was reduced.

    ``path`` is the path of the block's class. ``passthrough`` is True if the block has no reducer and needs no positions.
    """

    def __init__(self, ref: ModelRef, names: tuple[str, ...], index: int, path: str, passthrough: bool) -> None:
        super().__init__(ref, names)
        self.index, self.path, self.passthrough = index, path, passthrough
        if path not in BLOCKS:
            load_backbones()  # a pickle is read before anything else has needed them
        self.spec = BLOCKS[path]

    @property
    def name(self) -> str:
        """The name of the block for messages."""
        return f"block {self.index} ({self.path})"

    def __reduce__(self) -> Any:
        return BlockLink, (self.ref, self.names, self.index, self.path, self.passthrough)


def reduction_in(host: Any) -> Any:
    """Return the `TokenReduction` of a reduced model; inside PEFT's wrapper, the one that is active.

    Raises:
        TypeError: it is inside another kind of wrapper.
    """
    found = host._modules["laconic"]
    if getattr(type(found), "reduces_tokens", False):
        return found
    if not hasattr(found, "modules_to_save") or not hasattr(found, "original_module"):
        raise TypeError(f"the laconic module of this model is now a {type(found).__name__}; wrap the whole model instead")
    names = getattr(found, "active_adapters", None) or getattr(found, "active_adapter", None) or ()
    active = [name for name in ([names] if isinstance(names, str) else names) if name in found.modules_to_save]
    if getattr(found, "disable_adapters", False) or not active:
        return found.original_module
    return found.modules_to_save[active[0]]
