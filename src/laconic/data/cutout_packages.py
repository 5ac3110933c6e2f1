"""Download the Debian packages whose photographs the cutouts are made from, and tell their versions."""

from __future__ import annotations

import gzip
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from laconic.core.files import Refusal, unfinished
from laconic.data.cutout_sources import PACKAGES, THINGS_PACKAGE, cache_folder

LOG = logging.getLogger(__name__)
DOCS = Path("usr/share/doc")
UNPACKED = 2.5  # most that the files of a package take, as a multiple of the package


def absent(roots: Sequence[Path]) -> list[str]:
    """Return the packages that are unpacked or installed in none of the folders."""
    return [name for name in PACKAGES if not any((root / DOCS / name / "copyright").is_file() for root in roots)]


def versions(roots: Sequence[Path]) -> dict[str, str | None]:
    """Return the versions of the packages in the folders; None where the package does not tell it."""
    out = dict[str, str | None]()
    for name in PACKAGES:
        logs = [root / DOCS / name / "changelog.Debian.gz" for root in roots]
        log = next((log for log in logs if log.is_file()), None)
        if log is not None:
            with gzip.open(log, "rt", encoding="utf-8", errors="replace") as file:
                first = re.match(r"\S+ \(([^)]+)\)", file.readline())
            out[name] = first[1] if first else None
        elif name not in absent(roots):
            out[name] = None
    return out


def download(names: Sequence[str]) -> None:
    """Download packages and unpack each into a folder of its own in the cache; a folder is complete or absent.

    Backgrounds that this distribution does not have are left out, with a warning.

    Raises:
        Refusal: there is no apt-get, or it cannot get the things.
        Unwritable: there is no room.
    """
    tools = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    size = sum(PACKAGES[name] for name in names)
    if tools:
        raise Refusal(
            f"the photographs are in Debian packages ({size} MB: {', '.join(names)}), and this machine has no {tools[0]} to "
            "get them; on Debian or Ubuntu run apt-get download, dpkg -x each of them into one folder, bring it here and give "
            "it as --packages; or give photographs of your own with --objects and --backgrounds"
        )
    LOG.info("downloading %d MB of photographs to %s", size, cache_folder())
    for name in names:
        LOG.info("downloading %s (%d MB)", name, PACKAGES[name])
        failure = _download(name, cache_folder() / name)
        if failure and name == THINGS_PACKAGE:
            raise Refusal(
                f"apt-get cannot download {name}: {failure}; run apt-get update if its lists are old, unpack the package "
                "elsewhere and give the folder as --packages, or give things of your own with --objects"
            )
        if failure:
            LOG.warning("left out: apt-get cannot download %s: %s", name, failure)


def _download(name: str, target: Path) -> str:
    """Download and unpack one package; return the reason if that fails, in words, else nothing."""
    with unfinished(target, int(PACKAGES[name] * 1e6 * (1 + UNPACKED))) as place:
        got = _run(["apt-get", "download", name], place)
        file = next(place.glob("*.deb"), None)
        if got or file is None:
            return got or "it wrote no file"
        failed = _run(["dpkg", "-x", str(file), str(place / "unpacked")], place)
        if failed:
            return failed
        if not target.is_dir():  # else another process has just written it
            os.replace(place / "unpacked", target)
    return ""


def _run(words: list[str], folder: Path) -> str:
    """Run a program in a folder; return its last line of error if it fails, else nothing."""
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}, check=False
    )
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[-1].removeprefix("E: ")
