"""Peak memory of a piece of work: anonymous bytes of the process (mapped files do not count), or bytes on the GPU."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

INTERVAL = 0.02  # seconds between two looks at the process
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGEST = 32 << 20  # bytes; glibc takes no larger threshold


class Peak:
    """The largest number of bytes seen so far."""

    bytes: int = 0


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Watch memory while the context lasts; ``Peak.bytes`` is final when it ends.

    On a CUDA device it is what torch allocated there. Elsewhere it is sampled from the process: anonymous memory where
    the system tells it (Linux), the resident set otherwise.
    """
    peak = Peak()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()

    def watch() -> None:
        while True:
            peak.bytes = max(peak.bytes, _in_use())
            if done.wait(INTERVAL):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def budget(asked: int | None) -> int:
    """Bytes that may be remembered: those asked for, or a quarter of the machine's memory."""
    return psutil.virtual_memory().total // 4 if asked is None else asked


def keep_freed() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, where it can be told to (glibc).

    By default it hands every activation back to the system and asks for it anew, page by page: on small models a
    quarter of the time of a forward pass on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 8 * LARGEST)


def give_back() -> None:
    """Hand freed memory back to the system, also that between pieces in use, where the C library can (glibc).

    Runs of a sweep make and free merges of many sizes; what lies between the pieces that stay would never go back.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def _in_use() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss
