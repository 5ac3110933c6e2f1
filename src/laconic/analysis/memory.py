"""Peak memory of a forward: from the allocator on CUDA; on the CPU from the storages that operations allocate and free."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, ``peak`` is the most bytes that tensors made since then held at one time, after any operation.

    What an operation needs inside itself (and gives back before it ends) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak, self.known = 0, 0, dict[int, int]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        mine = {storage_of(t) for t in tensors_in((args, kwargs))}  # those of the arguments are not new
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            key = storage_of(tensor)
            if key not in mine and key not in self.known:
                self._enter(key, tensor)
        self.peak = max(self.peak, self.live)
        return out

    def _enter(self, key: int, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        self.known[key] = size
        self.live += size
        # the storage goes with its last tensor: views hold their base, so the first tensor of a storage is not the last
        weakref.finalize(tensor.untyped_storage(), self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


def storage_of(tensor: Tensor) -> int:
    """What tells a storage from others that are there at the same time."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that one run held at a time of what it made itself, in bytes."""
    gc.collect()
    with torch.no_grad(), LiveBytes() as mode:
        kept = run()
    del kept
    return mode.peak


def peak_of(model: Any, images: Tensor) -> int:
    """The most that one forward of a model holds at a time beside its weights and the images, in bytes; not compiled."""
    if images.device.type != "cuda":
        return peak_bytes(lambda: model(images))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(images)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
