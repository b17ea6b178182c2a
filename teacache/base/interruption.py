"""How a command ends: Ctrl-C, SIGTERM, a closed terminal, cleaning up on the way; exit codes."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator

from teacache.base.errors import TeaCacheError

# For so long after a signal another one changes nothing: what is cleaned up is not cut short.
CLEANING_SECONDS = 2.0
_asked: float | None = None  # when, by the monotonic clock


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block when a signal to end comes; then ignore all of them.

    Some libraries lose an exception that comes while they are imported, or in a callback of
    theirs; `check` raises it again.
    """
    global _asked
    _asked = None
    try:
        before = {
            number: signal.signal(number, _ask)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            # Behind `nohup` a closed terminal is nothing to be told of.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
    except ValueError:  # not in the main thread, which alone is told of signals
        before = {}
    tell_of_lost = sys.unraisablehook
    sys.unraisablehook = lambda lost: (
        None if isinstance(lost.exc_value, KeyboardInterrupt) else tell_of_lost(lost)
    )
    try:
        yield
        check()
    finally:
        sys.unraisablehook = tell_of_lost
        for number, handler in before.items():
            # A process that is about to end as one that was interrupted is not to be killed yet.
            signal.signal(number, signal.SIG_IGN if stop_requested() else handler)


def check() -> None:
    """Raise KeyboardInterrupt where a signal has come, and its exception was lost."""
    if stop_requested():
        raise KeyboardInterrupt


def stop_requested() -> bool:
    """Whether a signal has asked the run to stop; skip optional slow work then."""
    return _asked is not None


def request_stop() -> None:
    """Have `check` raise KeyboardInterrupt from now on: in a process that another one controls."""
    global _asked
    _asked = time.monotonic()


def _ask(number: int, frame: object) -> None:
    global _asked
    now = time.monotonic()
    if _asked is None or now - _asked > CLEANING_SECONDS:
        _asked = now
        raise KeyboardInterrupt


def run_command(work: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run `work`; return the process's exit code.

    Args:
        interrupted: what to say where it was; nothing where another process says so.

    That is 0 where it is done, 2 for wrong input, 130 where it was interrupted. Anything else keeps
    its traceback, with which Python exits with 1.
    """
    try:
        with interruptible():
            work()
    except (Exception, KeyboardInterrupt) as error:
        if stop_requested() or isinstance(error, KeyboardInterrupt):
            # Some libraries turn an interruption into an error of their own.
            _tell(". ".join(filter(None, [interrupted, *getattr(error, "__notes__", ())])))
            return 130
        if isinstance(error, TeaCacheError):
            _tell(f"error: {error}")
            return 2
        raise
    return 0


def _tell(line: str) -> None:
    if not line:
        return
    with contextlib.suppress(OSError):  # of a terminal that is closed
        print(line, file=sys.stderr, flush=True)
