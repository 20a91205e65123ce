"""How a command ends: 0, or one line and 1 (a mistake), 130 (Ctrl-C) or 143 (SIGTERM).

It imports little, so that it is there while a command imports the rest.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from twinbench.system import processes


class Terminated(KeyboardInterrupt):
    """SIGTERM came. What cleans up after Ctrl-C cleans up after it."""


@contextmanager
def interrupt_first() -> Iterator[None]:
    """Let an interrupt end what it interrupts: libraries raise errors of their own while they clean up after it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        if cause is None:
            raise
        raise cause from None


def importing() -> None:
    """Let Ctrl-C and SIGTERM end a command that still imports, which takes seconds, in one line."""
    _on_signals(_exit, _exit)


def ended_well(main: Callable[[], object], kept: str) -> None:
    """Run a Hydra command; what the user can mend, or has stopped, exits after one line.

    HYDRA_FULL_ERROR=1 shows the traceback of a mistake.

    Args:
        kept: what is said to be there after Ctrl-C or SIGTERM, unless the interrupt says it itself.
    """
    from twinbench.system.errors import MISTAKES, one_line

    shown = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors itself, over many lines
    # Under a launcher a process may wait for another one, and then only the default action ends it.
    _on_signals(signal.default_int_handler, _terminate if processes.count() == 1 else signal.SIG_DFL)
    try:
        with interrupt_first():
            main()
    except MISTAKES as error:
        if shown:
            raise
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt as stop:
        print(f"stopped: {str(stop) or kept}", file=sys.stderr, flush=True)
        sys.exit(143 if isinstance(stop, Terminated) else 130)


def _on_signals(interrupted, terminated) -> None:
    for number, handler in ((signal.SIGINT, interrupted), (signal.SIGTERM, terminated)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background, whose Ctrl-C is not meant for it
            signal.signal(number, handler)


def _exit(number: int, _) -> None:
    print("stopped: nothing had begun", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def _terminate(number: int, _) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one does not wait for the cleaning up
    raise Terminated
