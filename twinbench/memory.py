"""Peak memory of a piece of work: anonymous bytes of the process (mapped files do not count), or bytes on the GPU."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

INTERVAL = 0.02  # seconds between two looks at the process


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


def _in_use() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss
