"""`Embedder`: a batch of encoded pictures in, a batch of rows with vectors out; it can be pickled.

A matrix product may round otherwise in a batch of another size, and an operation that several threads share may round otherwise
at another place of the batch. So every forward has ``forward_size`` pictures (the last one is padded, and padding takes the
place of pictures that cannot be read) and runs in one thread; several forwards run side by side. The vector of a picture then
does not depend on the batches that it comes in.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from laconic.analysis.diagnose import shared_copy
from laconic.analysis.timing import DTYPES, Setting
from laconic.api import reduce_
from laconic.checkpoints.save_load import load_directory
from laconic.core.files import Refusal
from laconic.core.method import Method
from laconic.core.optional_deps import need
from laconic.core.token_reduction import find_reduction
from laconic.data import Unreadable, decode
from laconic.data.preprocessing import config_for, transform_for
from laconic.data.sizes import check_bytes, check_resize
from laconic.embed.features import Kind, check_kind, features_of, without_classifier

FORWARD_SIZE = {"cpu": 8, "cuda": 64}  # pictures in a forward
Output = Literal["float32", "float16"]
Picture = bytes | Mapping[str, Any] | Unreadable | None  # the content of a file, alone or as {"bytes": ...} (`datasets`)


@dataclass(frozen=True)
class Pictures:
    """Pictures after the transform of a model: pixels [N, 3, H, W], width and height [N, 2], and why one cannot be read.

    A picture that cannot be read has pixels of zeros, no width and height, and a reason; that of the others is empty.
    """

    pixels: Tensor
    sizes: NDArray[np.int32]
    errors: tuple[str, ...]


class Preparation:
    """Decode pictures and transform them for a model, in any process; it holds no weights."""

    def __init__(self, model: nn.Module) -> None:
        self.config, self.transform = config_for(model), transform_for(model)

    def __call__(self, pictures: Sequence[Picture], names: Sequence[str]) -> Pictures:
        """Decode and transform pictures; ``names`` are their names in messages."""
        pixels = torch.zeros(len(pictures), *self.config["input_size"])
        sizes, errors = np.zeros((len(pictures), 2), np.int32), [""] * len(pictures)
        for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            try:
                image = decode(_content(picture, name), name)
                check_resize(name, image, self.transform)
                pixels[i] = self.transform(image)
                sizes[i] = image.size
            except Unreadable as error:
                errors[i] = error.reason
        return Pictures(pixels, sizes, tuple(errors))


def _content(picture: Picture, name: str) -> bytes:
    if isinstance(picture, Mapping):
        picture = picture.get("bytes")
    if isinstance(picture, Unreadable):
        raise picture
    if not isinstance(picture, bytes | bytearray | memoryview):
        kind = "nothing" if picture is None else type(picture).__name__
        raise Unreadable(name, f"expected the bytes of an image file, found {kind}")
    check_bytes(name, len(picture))
    return bytes(picture)


class Embedder:
    """Embed encoded pictures: a batch of columns in, a batch of columns out.

    The columns of a batch that are not the pictures stay, and ``width``, ``height``, ``error`` and ``vector`` are added. The
    ``error`` of a picture that cannot be read is the reason, its size 0 and its vector NaN; other errors are empty.

    The model that is given stays as it is; the embedder has a copy that shares its weights. Pickling copies the weights.

    Args:
        model: a supported model, reduced or not; a directory that ``laconic.save``, ``laconic tune`` or transformers wrote; or
            a timm name, with timm's pretrained weights.
        method: reduce the model by this method.
        keep: keep rate of every reducing block.
        features: ``pooled`` (the vector that the model's classifier reads), ``class`` (the class token after the last norm), or
            ``patches`` (one vector for each patch, restored).
        output: dtype of the vectors.
        device: cuda where there is one, else cpu.
        dtype: dtype of weights and images.
        forward_size: pictures in a forward (default: 8, and 64 on CUDA). A method with a count for each image gets one on the
            CPU, since a forward as long as its longest picture may round otherwise.
        column: the column of a batch that has the pictures: the bytes of image files, alone or as ``{"bytes": ...}``.
        options: options of the method, if it is given by name.

    Raises:
        TypeError, LookupError, ValueError: as `laconic.reduce_`; the model does not have such features.
        Refusal: there is no such model.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        method: str | Method | None = None,
        *,
        keep: float | None = None,
        features: Kind = "pooled",
        output: Output = "float32",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        forward_size: int | None = None,
        column: str = "bytes",
        **options: Any,
    ) -> None:
        opened = model if isinstance(model, nn.Module) else open_model(str(model))
        if method is not None:
            opened = reduce_(shared_copy(opened), method, keep=keep, **options)
        check_kind(opened, features)
        if output not in ("float32", "float16"):
            raise ValueError(f"output must be float32 or float16, not {output!r}")
        self.device = Setting(device=device).place
        self.features, self.output, self.dtype, self.column = features, output, dtype, column
        own = without_classifier(opened).eval()
        if any(weight.device != self.device or weight.dtype != DTYPES[dtype] for weight in own.parameters()):
            own = copy.deepcopy(own)  # the weights are shared until here, and moving them would move those of the given model
        self.model = own.to(self.device, DTYPES[dtype])
        self.prepare = Preparation(self.model)
        reduction = find_reduction(self.model)
        self.reduction = None if reduction is None else _described(reduction)
        alone = reduction is not None and reduction.config.info.count == "variable" and self.device.type == "cpu"
        usual = 1 if alone else FORWARD_SIZE[self.device.type]
        self.forward_size = usual if forward_size is None else forward_size
        if self.forward_size < 1:
            raise ValueError(f"forward_size must be at least 1, not {forward_size}")
        self.threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a batch with the vectors of its pictures instead of the pictures.

        Raises:
            LookupError: the batch has no such column.
        """
        if self.column not in batch:
            raise LookupError(f"the batch has no column {self.column!r}, but {', '.join(batch)}; pass column= to Embedder")
        pictures = list(batch[self.column])
        found = self.prepare(pictures, [str(name) for name in batch.get("id", range(len(pictures)))])
        vectors = self.embed(found.pixels)
        vectors[[bool(error) for error in found.errors]] = np.nan
        kept = {name: values for name, values in batch.items() if name != self.column}
        facts = {"width": found.sizes[:, 0], "height": found.sizes[:, 1], "error": np.array(found.errors, dtype=object)}
        return {**kept, **facts, "vector": vectors}

    def embed(self, pixels: Tensor) -> NDArray[Any]:
        """Return the vectors of prepared pictures [N, 3, H, W]: [N, C], or of patches [N, P, C]."""
        parts = [future.result() for future in list(self.submit(pixels))]
        return np.concatenate(parts)[: len(pixels)]

    def submit(self, pixels: Tensor) -> Iterator[Future[NDArray[Any]]]:
        """Begin the forwards of prepared pictures, and yield them; the last one is padded with pictures of zeros."""
        pool = self._begin()
        for part in torch.split(pixels, self.forward_size):
            yield pool.submit(self._forward, part)

    def shape(self) -> tuple[int, ...]:
        """Return the shape of one vector; it takes a forward of one picture."""
        with torch.inference_mode():
            pixels = torch.zeros(1, *self.prepare.config["input_size"], device=self.device, dtype=DTYPES[self.dtype])
            return tuple(features_of(self.model, pixels, self.features).shape[1:])

    def close(self) -> None:
        """End the threads; the next batch begins them again."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _begin(self) -> ThreadPoolExecutor:
        if self._pool is None:
            ready, threads = threading.Barrier(self.threads), torch.get_num_threads()
            self._pool = ThreadPoolExecutor(self.threads, "embed", initializer=_one_thread)
            list(self._pool.map(lambda _: ready.wait(), range(self.threads)))
            torch.set_num_threads(threads)  # of this thread, and of those that begin later
        return self._pool

    def _forward(self, pixels: Tensor) -> NDArray[Any]:
        with torch.inference_mode():
            missing = self.forward_size - len(pixels)
            if missing:
                pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
            out = features_of(self.model, pixels.to(self.device, DTYPES[self.dtype]), self.features)
            return out.to(DTYPES[self.output]).cpu().numpy().copy()  # a class token is a view that holds all tokens


def _one_thread() -> None:
    """Let this thread run operations alone."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes the number of the process at its first operation: now, while it is 1


def open_model(name: str) -> nn.Module:
    """Open a directory that laconic or transformers wrote, or a timm model with its pretrained weights.

    Raises:
        Refusal: there is no such directory and no such model.
        FileNotFoundError, ValueError: the directory does not hold a model.
    """
    if Path(name).is_dir():
        return load_directory(name)
    timm = need("timm", "cli")
    import laconic.models  # noqa: F401 (it registers ours with timm)

    if not timm.is_model(name.partition(".")[0]):
        raise Refusal(f"timm has no model called {name!r}, and there is no directory of that name")
    made: nn.Module = timm.create_model(name, pretrained=True)
    return made


def _described(reduction: Any) -> dict[str, Any]:
    """Return method, options and schedule as plain JSON."""
    how = {"restore": reduction.restore, "compute": reduction.compute}
    return {"method": reduction.config.describe(), "schedule": reduction.schedule.to_json(), **how}
