"""Embed a collection on this machine: worker processes decode, threads run the model, and shards are written in order.

At most a few batches wait at every step, so the memory does not depend on the number of pictures.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

import laconic
from laconic.checkpoints.saved_files import digest
from laconic.core.backbone import find_host, path_of, plain_type
from laconic.core.files import Refusal
from laconic.data.workers import batches, begin, check_shared_memory
from laconic.embed.collection import Collection
from laconic.embed.embedder import Embedder, Pictures, Preparation
from laconic.embed.vectors import VectorFolder, shard_pictures

AHEAD = 2  # forwards that wait for each thread
PACKAGES = {"torch": "torch", "timm": "timm", "numpy": "numpy", "PIL": "pillow", "pyarrow": "pyarrow"}  # by module
OTHERS = {"transformers": "transformers", "open_clip": "open_clip_torch", "torchvision": "torchvision"}  # of models
Tick = Callable[[int], Any]  # gets the number of pictures that are done


def question(embedder: Embedder, collection: Collection, shard_size: int | None = None) -> dict[str, Any]:
    """Return everything that the bytes of the vectors depend on, as plain JSON."""
    shape, itemsize = embedder.shape(), np.dtype(embedder.output).itemsize
    return {
        "laconic_embed": 1,
        "model": path_of(plain_type(find_host(embedder.model)[0])),
        "weights": digest(embedder.model),
        "reduction": embedder.reduction,
        "preprocessing": {name: _plain(value) for name, value in sorted(embedder.prepare.config.items())},
        "features": embedder.features,
        "shape": list(shape),
        "vectors": embedder.output,
        "dtype": embedder.dtype,
        "device": embedder.device.type,
        "forward_size": embedder.forward_size,
        "shard_pictures": shard_pictures(shape, itemsize, embedder.forward_size, shard_size),
        "data": {"pictures": len(collection), "names": collection.digest()},
        "versions": versions(embedder),
    }


def versions(embedder: Embedder) -> dict[str, str]:
    """Return the versions of Python, laconic and the libraries that decode, transform, run and write."""
    library = type(find_host(embedder.model)[0]).__module__.partition(".")[0]
    names = PACKAGES | ({library: OTHERS[library]} if library in OTHERS else {})
    found = {name: importlib.metadata.version(package) for name, package in names.items()}
    return {"python": platform.python_version(), "laconic": laconic.__version__, **found}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------ reading
class Batches(Dataset[Pictures]):
    """Batches of pictures of a collection by their numbers, decoded and transformed."""

    def __init__(self, collection: Collection, prepare: Preparation, spans: Sequence[range]) -> None:
        self.collection, self.prepare, self.spans = collection, prepare, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> Pictures:
        numbers = self.spans[i]
        return self.prepare([self.collection.content(n) for n in numbers], [self.collection.ids[n] for n in numbers])


def loader_of(embedder: Embedder, collection: Collection, spans: Sequence[range], workers: int) -> DataLoader[Any]:
    """Return a loader of batches, in order.

    Raises:
        Refusal: the workers need more shared memory than there is.
    """
    check_shared_memory(workers, 4 * max(map(len, spans), default=0) * int(np.prod(embedder.prepare.config["input_size"])))
    own = torch.Generator()
    settings: dict[str, Any] = {"num_workers": workers, "generator": own, "worker_init_fn": begin}
    return DataLoader(Batches(collection, embedder.prepare, spans), batch_size=None, **settings)


# ------------------------------------------------------------------------------------------------ running
class Shard:
    """The pictures of a shard that have been embedded so far."""

    def __init__(self, folder: VectorFolder, collection: Collection, number: int) -> None:
        self.folder, self.collection, self.number = folder, collection, number
        self.sizes, self.errors = list[NDArray[np.int32]](), list[str]()
        self.vectors = list[NDArray[Any]]()

    def write(self) -> None:
        """Write the shard, which is complete."""
        numbers, sizes = self.folder.span(self.number), np.concatenate(self.sizes)
        rows: dict[str, Sequence[Any]] = {
            "id": [self.collection.ids[n] for n in numbers],
            "source": [self.collection.source(n) for n in numbers],
        }
        rows |= {"width": sizes[:, 0].tolist(), "height": sizes[:, 1].tolist(), "error": self.errors}
        self.folder.write(self.number, rows, np.concatenate(self.vectors)[: len(numbers)])


def run(
    embedder: Embedder,
    collection: Collection,
    folder: VectorFolder,
    shards: Sequence[int],
    *,
    batch_size: int = 64,
    workers: int = 0,
    tick: Tick = lambda count: None,
) -> None:
    """Embed the pictures of some shards and write them.

    Args:
        embedder: the model.
        collection: the pictures.
        folder: where the vectors go.
        shards: the numbers of the shards.
        batch_size: pictures that a worker prepares at once, rounded up to whole forwards.
        workers: processes that decode pictures; 0: this one.
        tick: gets the number of pictures after each shard and batch.

    Raises:
        Refusal: the place of the pictures is gone, or a file cannot be written.
    """
    size = -(-batch_size // embedder.forward_size) * embedder.forward_size
    spans = [(shard, part) for shard in shards for part in _split(folder.span(shard), size)]
    loader = loader_of(embedder, collection, [part for _, part in spans], workers)
    waiting = deque[tuple[Shard, Future[NDArray[Any]], int, bool]]()

    def take() -> None:
        shard, future, count, last = waiting.popleft()
        shard.vectors.append(future.result())
        if last:
            shard.write()
        tick(count)

    shard: Shard | None = None
    embedder.close()  # the workers are forked before its threads begin
    try:
        for (number, part), pictures in zip(spans, batches(loader), strict=True):
            if any(pictures.errors) and not collection.place.exists():
                raise Refusal(
                    f"{collection.place} is gone; the shards that are written stay: repeat the command when it is back"
                )
            shard = Shard(folder, collection, number) if shard is None or shard.number != number else shard
            shard.sizes.append(pictures.sizes)
            shard.errors += pictures.errors
            forwards = list(_sizes(len(part), embedder.forward_size))
            ends = part.stop == folder.span(number).stop
            for i, (future, count) in enumerate(zip(embedder.submit(pictures.pixels), forwards, strict=True)):
                waiting.append((shard, future, count, ends and i == len(forwards) - 1))
                while len(waiting) > AHEAD * embedder.threads:
                    take()
        while waiting:
            take()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise Refusal(
            f"a process that decodes pictures ended ({error}); repeat the command: it goes on where it was"
        ) from error
    finally:
        embedder.close()


def _split(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _sizes(count: int, size: int) -> Iterator[int]:
    return (min(size, count - start) for start in range(0, count, size))
