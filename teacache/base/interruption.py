"""Signals (Ctrl-C, SIGTERM, a closed terminal) and the exit codes of a command."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator

from teacache.base.errors import TeaCacheError

# A second signal within this time is ignored, so that it does not interrupt the clean-up.
CLEANING_SECONDS = 2.0
_signal_time: float | None = None  # of the monotonic clock; None before any signal


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on SIGINT, SIGTERM or SIGHUP; ignore them afterwards.

    Some libraries swallow an exception during their import or in a callback. `check` raises it
    again.
    """
    global _signal_time
    _signal_time = None
    try:
        before = {
            number: signal.signal(number, _on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            # `nohup` ignores SIGHUP, and that stays.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
    except ValueError:  # not the main thread, which alone receives signals
        before = {}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: (
        None if isinstance(lost.exc_value, KeyboardInterrupt) else hook(lost)
    )
    try:
        yield
        check()
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            # An interrupted process is about to end with exit code 130: nothing may kill it first.
            signal.signal(number, signal.SIG_IGN if stop_requested() else handler)


def check() -> None:
    """Raise KeyboardInterrupt if a signal has arrived."""
    if stop_requested():
        raise KeyboardInterrupt


def stop_requested() -> bool:
    """Whether a signal has arrived. Optional slow work is skipped then."""
    return _signal_time is not None


def request_stop() -> None:
    """Let `check` raise KeyboardInterrupt from now on, as after a signal."""
    global _signal_time
    _signal_time = time.monotonic()


def _on_signal(number: int, frame: object) -> None:
    global _signal_time
    now = time.monotonic()
    if _signal_time is None or now - _signal_time > CLEANING_SECONDS:
        _signal_time = now
        raise KeyboardInterrupt


def run_command(work: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run `work`, and print its error or interruption in one line.

    Args:
        interrupted: the line to print after an interruption; empty if another process prints it.

    Returns:
        the exit code: 0 if done, 2 for a TeaCacheError or a missing package, 130 after an
        interruption. Any other error keeps its traceback, and Python exits with 1.
    """
    try:
        with interruptible():
            work()
    except (Exception, KeyboardInterrupt) as error:
        if stop_requested() or isinstance(error, KeyboardInterrupt):
            # Some libraries turn an interruption into an error of their own.
            _print_error(". ".join(filter(None, [interrupted, *getattr(error, "__notes__", ())])))
            return 130
        if isinstance(error, TeaCacheError):
            _print_error(f"error: {error}")
            return 2
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("teacache"):
            _print_error(f"error: {error}: pip install -r requirements.txt")
            return 2
        raise
    return 0


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed
        if line:
            print(line, file=sys.stderr, flush=True)
