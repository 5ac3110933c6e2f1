"""Peak memory of a forward: on CUDA from the allocator, on the CPU from the storages that operations allocate and free."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the memory of tensors created while active; ``peak`` is its maximum in bytes, sampled after each operation.

    Temporary memory inside an operation is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak, self.known = 0, 0, dict[int, int]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        mine = {storage_of(t) for t in tensors_in((args, kwargs))}  # storages of the arguments are not new
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            key = storage_of(tensor)
            if key not in mine and key not in self.known:
                self._add(key, tensor)
        self.peak = max(self.peak, self.live)
        return out

    def _add(self, key: int, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        self.known[key] = size
        self.live += size
        # a storage lives until its last tensor is freed: views share it, so finalize the storage, not its first tensor
        weakref.finalize(tensor.untyped_storage(), self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


def storage_of(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage among the live ones."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the peak memory of the tensors that one run creates, in bytes."""
    gc.collect()
    with torch.no_grad(), LiveBytes() as mode:
        kept = run()
    del kept
    return mode.peak


def peak_of(model: Any, images: Tensor) -> int:
    """Return the peak memory of one uncompiled forward in addition to weights and images, in bytes."""
    if images.device.type != "cuda":
        return peak_bytes(lambda: model(images))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(images)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
