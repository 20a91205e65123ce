"""Claims: "this process makes this thing", so that two processes never do the same work at once.

A claim is a file that its holder keeps locked. The kernel releases the lock when the holder ends, however it ends, so
the claim of a killed process is free at once, for every machine that shares the disk. The file says who holds it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from twinbench.system import processes
from twinbench.system.files import CLAIM, HOST, remove_abandoned

MOMENT = 0.3  # seconds; whoever looks for abandoned claims holds each of them for less
POLL = 0.05  # seconds


@contextmanager
def claimed(thing: Path, wait: bool) -> Iterator[str | None]:
    """Hold the claim on a file or folder while the context lasts; ``.THING.claim`` beside it says so.

    Args:
        wait: wait for another holder, which one line on stderr names.

    Yields:
        None where this process holds the claim; without ``wait`` otherwise its holder, such as "process 17 on HOST".

    Raises:
        OSError: the claim cannot be written.
    """
    from filelock import FileLock, Timeout  # a tenth of a second, which a plan need not pay

    thing.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(thing.parent)
    path = thing.parent / f".{thing.name}{CLAIM}"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=MOMENT, poll_interval=POLL)
    except Timeout:
        if not wait:
            yield _holder(path)
            return
        print(f"{thing}: waiting for {_holder(path)}, which makes it", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=POLL)
    try:
        path.write_text(f"{os.getpid()}\n{HOST}\n", encoding="utf-8")
        yield None
    finally:
        path.unlink(missing_ok=True)  # first: who waits for the lock then sees that its file has no name any more
        lock.release()


@contextmanager
def claimed_by_first(thing: Path, wait: bool) -> Iterator[str | None]:
    """Hold a claim as `claimed` does; of several processes of one run the first claims for all of them."""
    with ExitStack() as stack:
        other = stack.enter_context(claimed(thing, wait)) if processes.rank() == 0 else None
        yield processes.of_first(other)


def _holder(path: Path) -> str:
    try:
        process, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # it has just begun, or just ended
        return "another process"
    return f"process {process} on {host}"
