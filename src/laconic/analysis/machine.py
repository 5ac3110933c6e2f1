"""The environment of a measurement: hardware, versions and settings; and the setup of the process for it."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from laconic.analysis.timing import Setting


@contextmanager
def prepared(setting: Setting) -> Iterator[None]:
    """Set up the process for measurements inside the context; the number of threads is restored afterwards."""
    keep_pages()
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_pages() -> bool:
    """Make glibc keep freed memory for the rest of the process; otherwise every forward causes thousands of page faults.

    Return False if the C library is not glibc or rejects the setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    large = any(mallopt(mmap_threshold, size) for size in (1 << 30, 1 << 25))  # older versions accept at most 32 MiB
    return bool(mallopt(trim_threshold, (1 << 31) - 1)) and large


def environment(setting: Setting) -> dict[str, Any]:
    """Return the hardware, versions and settings that a measurement depends on."""
    import timm

    import laconic

    place = setting.place
    return {
        "laconic": laconic.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if place.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": setting.dtype,
        "compiled": setting.compile,
        "rounds": setting.rounds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
