"""The files of an embedded collection: ``manifest.json``, and parquet files (shards) of consecutive pictures.

The columns are id, source, width, height, error (empty where the picture was read) and vector: a list of fixed size, or a
tensor of fixed shape [P, C] for patches; null where there is an error. A shard is written in one step, so one that is there is
complete. The manifest says everything that the bytes of the shards depend on.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laconic.core.files import PART, Refusal, write_atomically
from laconic.core.locks import FOLDER_LOCK
from laconic.core.optional_deps import need

MANIFEST = "manifest.json"
SHARD_BYTES, SHARD_PICTURES = 2**25, 4096  # of the vectors of a shard, and pictures in it, at most
SHOWN = 5  # failures listed in a report


@dataclass(frozen=True)
class Result:
    """Pictures of some shards, and those that could not be read: reasons with their counts, and some by name."""

    pictures: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: tuple[tuple[str, str], ...] = ()  # id, reason

    def __add__(self, other: Result) -> Result:
        both = (self.examples + other.examples)[:SHOWN]
        return Result(self.pictures + other.pictures, self.failed + other.failed, self.reasons + other.reasons, both)


class VectorFolder:
    """A folder of vectors: its manifest and its shards.

    Args:
        path: the folder.
        question: the facts that all vectors depend on, as plain JSON with the entries ``data.pictures`` and ``shard_pictures``.

    Raises:
        Refusal: the folder has the vectors of another question, or other files.
    """

    def __init__(self, path: Path, question: Mapping[str, Any]) -> None:
        self.path, self.question = path, question
        self.pictures, self.shard_pictures = question["data"]["pictures"], question["shard_pictures"]
        if (path / MANIFEST).exists():
            self._compare()
        elif others := [one.name for one in path.iterdir() if one.name != FOLDER_LOCK and not one.name.endswith(PART)]:
            raise Refusal(
                f"--output {path} has files and no {MANIFEST} ({', '.join(sorted(others)[:3])}); choose a new or empty folder"
            )

    def _compare(self) -> None:
        file = self.path / MANIFEST
        try:
            theirs = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise Refusal(
                f"{file} is not the manifest of vectors ({error}); choose another --output, or move it away"
            ) from error
        old, new = _flat(theirs), _flat(json.loads(json.dumps(self.question)))
        unlike = [name for name in [*new, *(name for name in old if name not in new)] if old.get(name) != new.get(name)]
        if unlike:
            differs = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in unlike)
            raise Refusal(f"{self.path} holds other vectors ({differs}); choose another --output, or move it away")

    def begin(self) -> None:
        """Write the manifest.

        Raises:
            Unwritable: it cannot be written.
        """
        write_atomically(self.path / MANIFEST, json.dumps(self.question, indent=2) + "\n", sync=True)

    def __len__(self) -> int:
        return -(-self.pictures // self.shard_pictures)

    def span(self, shard: int) -> range:
        """Return the numbers of the pictures of a shard."""
        return range(shard * self.shard_pictures, min(self.pictures, (shard + 1) * self.shard_pictures))

    def file(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.path / f"vectors-{shard:06d}.parquet"

    def missing(self) -> list[int]:
        """Return the shards that are not there, or that are damaged."""
        return [shard for shard in range(len(self)) if not self._complete(shard)]

    def _complete(self, shard: int) -> bool:
        pq, arrow = need("pyarrow.parquet", "embed"), need("pyarrow", "embed")
        try:
            return bool(pq.read_metadata(self.file(shard)).num_rows == len(self.span(shard)))
        except (OSError, arrow.ArrowException):
            return False

    def write(self, shard: int, rows: Mapping[str, Sequence[Any]], vectors: NDArray[Any]) -> None:
        """Write a shard in one step.

        Args:
            shard: its number.
            rows: id, source, width, height and error of its pictures.
            vectors: [N, C], or of patches [N, P, C]; rows of pictures with an error do not matter.

        Raises:
            Unwritable: it cannot be written.
        """
        arrow, pq = need("pyarrow", "embed"), need("pyarrow.parquet", "embed")
        failed = np.array([bool(error) for error in rows["error"]])
        flat = np.where(failed.reshape(-1, *[1] * (vectors.ndim - 1)), np.zeros((), vectors.dtype), vectors)
        size = int(np.prod(vectors.shape[1:]))
        lists = arrow.FixedSizeListArray.from_arrays(arrow.array(flat.reshape(-1)), size, mask=arrow.array(failed))
        if vectors.ndim > 2:
            kind = arrow.fixed_shape_tensor(arrow.from_numpy_dtype(vectors.dtype), vectors.shape[1:])
            lists = arrow.ExtensionArray.from_storage(kind, lists)
        text = {name: arrow.array([_utf8(value) for value in rows[name]], arrow.string()) for name in ("id", "source", "error")}
        sides = {name: arrow.array(rows[name], arrow.int32()) for name in ("width", "height")}
        columns = {"id": text["id"], "source": text["source"], **sides, "error": text["error"], "vector": lists}
        out = io.BytesIO()
        pq.write_table(arrow.table(columns), out, compression="none", use_dictionary=False, write_statistics=False)
        write_atomically(self.file(shard), out.getbuffer(), sync=True)

    def result(self) -> Result:
        """Count the pictures of all shards that are there; only the columns id and error are read."""
        pq, total = need("pyarrow.parquet", "embed"), Result()
        for shard in range(len(self)):
            if self.file(shard).exists():
                table = pq.read_table(self.file(shard), columns=["id", "error"])
                failed = [(name, why) for name, why in zip(*table.to_pydict().values(), strict=True) if why]
                total += Result(len(table), len(failed), Counter(why for _, why in failed), tuple(failed[:SHOWN]))
        return total


def shard_pictures(shape: Sequence[int], itemsize: int, forward_size: int, wanted: int | None = None) -> int:
    """Return the pictures of a shard, a multiple of those of a forward, for vectors of this shape and bytes per number."""
    fitting = min(SHARD_PICTURES, SHARD_BYTES // (int(np.prod(shape)) * itemsize)) if wanted is None else wanted
    return max(1, fitting // forward_size) * forward_size


def read_vectors(path: Path | str) -> Iterator[tuple[list[str], NDArray[Any]]]:
    """Yield ids and vectors of each shard of a folder of `laconic embed`, [N, C] or [N, P, C], without failed pictures.

    Raises:
        FileNotFoundError: this is no folder of vectors.
        ImportError: pyarrow is not installed.
    """
    pq = need("pyarrow.parquet", "embed")
    if not Path(path, MANIFEST).is_file():
        raise FileNotFoundError(f"{path} is no folder that laconic embed wrote: it has no {MANIFEST}")
    for file in sorted(Path(path).glob("vectors-*.parquet")):
        table = pq.read_table(file, columns=["id", "vector"])
        table = table.filter(table["vector"].is_valid()).combine_chunks()
        kind, column = table.schema.field("vector").type, table["vector"]
        for chunk in column.chunks or ():
            shape = kind.shape if hasattr(kind, "shape") else (kind.list_size,)
            storage = chunk.storage if hasattr(kind, "shape") else chunk
            yield table["id"].to_pylist(), np.array(storage.flatten()).reshape(-1, *shape)


def _utf8(text: str) -> str:
    """Return a name that parquet takes: bytes of file names that are not UTF-8 become escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested tables as one, with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: found for part, inner in value.items() for key, found in _flat(inner, f"{name}.{part}".lstrip(".")).items()}
