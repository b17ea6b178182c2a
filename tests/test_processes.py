"""A process that is forked, against one that begins by itself."""

import json
import os
import signal
import subprocess
import sys

from processes import ended

STATE = """
import json, os, signal, sys, tempfile

print(json.dumps({
    "handlers": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
    "threads": len(os.listdir("/proc/self/task")),
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "environment": dict(os.environ),
    "folder": os.getcwd(),
    "arguments": sys.argv,
    "path": sys.path,
    "descriptors": sorted(os.listdir("/proc/self/fd")),
    "parent": os.getppid(),
    "session": os.getsid(0),
    "umask": os.umask(0o22),
    "output": [
        (file.encoding, file.errors, file.line_buffering, file.isatty())
        for file in (sys.stdout, sys.stderr)
    ],
    "temporary": tempfile.gettempdir(),
    "main": sys.modules["__main__"].__file__,
}))
import torch
print(torch.initial_seed())
sys.exit(7)
"""


def test_a_forked_process_begins_as_one_of_its_own(tmp_path):
    """Signals, environment, folder, descriptors, session and output."""
    program = tmp_path / "state.py"
    program.write_text(STATE)
    environment = {"ONE": "1", "PATH": "/none"}
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    forked, again = (
        ended(1, "a b", program=(program,), cwd=tmp_path, env=environment) for _ in range(2)
    )
    # A shell's background job ignores Ctrl-C, and what it starts inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    itself = subprocess.run(
        [sys.executable, program, "1", "a b"], env={**os.environ, **environment}, **options
    )
    assert (forked.returncode, forked.stderr) == (itself.returncode, itself.stderr) == (7, "")
    states, seeds = zip(*(run.stdout.splitlines() for run in (forked, again, itself)), strict=True)
    assert json.loads(states[0]) == json.loads(states[1]) == json.loads(states[2])
    assert len(set(seeds)) == 3, "torch begins at random"
