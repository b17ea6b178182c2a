"""A signal ends what runs, once, whatever a library makes of it, and lets it clean up."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from support import handlers_given_back

from teacache.base import interruption
from teacache.checkpoint import loading


def signalled(number: int = signal.SIGINT, seconds: float = 0.5) -> None:
    """A signal, as from outside, and time for it to come."""
    os.kill(os.getpid(), number)
    time.sleep(seconds)


@pytest.fixture
def given_back():
    """The signals' handlers, given back after the test."""
    with handlers_given_back() as handlers:
        yield handlers


def test_without_a_signal_nothing_changes(given_back):
    assert interruption.run_command(lambda: None) == 0
    assert {number: signal.getsignal(number) for number in given_back} == given_back


def test_a_terminal_that_is_closed_changes_no_exit_code(given_back, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as nobody_reads:
        code = None
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", nobody_reads)
            code = interruption.run_command(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert code == 130


def test_an_interruption_that_a_library_turns_into_its_own_error(given_back, capsys):
    """As transformers does where one of its modules cannot be imported to the end."""

    def work():
        try:
            signalled(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("failed to import") from error

    def while_loading():
        with loading.reading(Path("checkpoint")):
            work()

    for each in (work, while_loading):
        assert interruption.run_command(each) == 130
        assert capsys.readouterr().err == "interrupted\n"


def test_another_signal_does_not_cut_cleaning_up_short(given_back):
    """An impatient second Ctrl-C, or a SIGTERM for all after one for each."""
    cleaned = []

    def work():
        try:
            signalled()
        finally:
            signalled(signal.SIGINT, 0)
            signalled(signal.SIGTERM, 0.01)
            cleaned.append(1)

    assert interruption.run_command(work) == 130
    assert cleaned


def test_a_later_signal_counts_again(given_back, monkeypatch):
    """Where a library has swallowed the first, and goes on."""
    monkeypatch.setattr(interruption, "CLEANING_SECONDS", 0.05)
    seen = []

    def work():
        with contextlib.suppress(KeyboardInterrupt):
            signalled()
        time.sleep(0.1)
        signalled(signal.SIGINT, 0.01)
        seen.append("not ended")

    assert interruption.run_command(work) == 130
    assert not seen
