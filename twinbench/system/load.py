"""How much of the machine other processes use while something is timed."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class Others:
    """What other processes used, as a share of the time of all cores, from 0 to 1."""

    share: float = 0.0


@contextmanager
def others() -> Iterator[Others]:
    """Watch the processor while the context lasts; ``Others.share`` is final when it ends.

    Time that a virtual machine's host gave to others counts as theirs. What runs on a GPU does not count.
    """
    found, (busy, whole, own) = Others(), _spent()
    try:
        yield found
    finally:
        busy, whole, own = (after - before for after, before in zip(_spent(), (busy, whole, own), strict=True))
        found.share = min(max((busy - own) / whole, 0.0), 1.0) if whole > 0 else 0.0


def _spent() -> tuple[float, float, float]:
    """Seconds since the machine's start: of all cores while busy, of all cores, and of this process and its children.

    Linux counts the time of guests twice, as the user's and as the guests'.
    """
    times = psutil.cpu_times()._asdict()
    whole = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
    process = psutil.Process()
    each = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    own = sum(one.user + one.system for one in each) + each[0].children_user + each[0].children_system
    return whole - times["idle"] - times.get("iowait", 0.0), whole, own
