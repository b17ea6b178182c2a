"""The command in a process of its own, without the five seconds of CPU that its imports take.

`start` is `subprocess.Popen` and `ended` is `subprocess.run`, for Python programs of this project:
real pipes, process, signals, exit code, folder and environment. The process is forked from one that
has imported torch and diffusers (`forkserver.py`). Other than in a process that begins by itself:

- what is imported takes no time, and a signal does not come while torch is imported;
- what libraries read of the environment as they are imported (`READ_AT_START`) has been read: where
  a test changes that, or asks for options of Python, the process begins by itself;
- `ps` shows the server's command line, and a traceback begins with the server's frames;
- warnings and the libraries' loggers are silent before the program has silenced them;
- the highest memory of the process begins with the server's.
"""

import atexit
import ctypes
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import ROOT

SAMPLE = ("teacache_sample_video.py",)
READ_AT_START = ("PYTHON", "HF_", "XDG_", "LD_", "LC_", "LANG", "TZ", "OMP_", "MKL_", "CUDA_")
READ_AT_START += ("ONEDNN_", "TORCH", "DIFFUSERS_", "TRANSFORMERS_", "HOME")
SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h


@functools.cache
def _server() -> tuple[socket.socket, dict[str, str]]:
    """Where to ask, and the environment that the libraries were imported in."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [
                *(sys.executable, ROOT / "tests" / "forkserver.py"),
                *map(str, (theirs.fileno(), os.getpid())),
            ],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
        )
    # At the end it is waited for, so that its CPU time is this process's.
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours, dict(os.environ)


class Forked(subprocess.Popen):
    """A process that the server forks, and this one is the parent of."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session, process_group,
    ):  # fmt: skip
        request = {"words": args, "cwd": str(cwd), "env": env, "new_session": start_new_session}
        ends = (p2cread, c2pwrite, errwrite)
        prctl, (server, _) = ctypes.CDLL(None).prctl, _server()
        prctl(SET_CHILD_SUBREAPER, 1)
        try:
            descriptors = [number if end == -1 else end for number, end in enumerate(ends)]
            socket.send_fds(server, [json.dumps(request).encode()], descriptors)
            self.pid = int(server.recv(100))
        finally:
            prctl(SET_CHILD_SUBREAPER, 0)
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self._child_created = True


def start(
    *arguments: object,
    program: tuple[object, ...] = SAMPLE,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen:
    """Start a program; standard output and error are pipes of text.

    Args:
        program: Python's own words: a script's path, or `-m` and a module.
        env: variables to change; None removes one.
        options: of `subprocess.Popen`.
    """
    changed = {
        name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None
    }
    words = [str(word) for word in (*program, *arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    _, at_start = _server()
    read = {
        name
        for name in changed.keys() | at_start.keys()
        if changed.get(name) != at_start.get(name) and name.startswith(READ_AT_START)
    }
    by_itself = read or (words[0].startswith("-") and words[0] != "-m") or "preexec_fn" in options
    if by_itself:
        return subprocess.Popen([sys.executable, *words], cwd=cwd, env=changed, **options)
    if words[0] != "-m":
        words[0] = str(Path(cwd, words[0]))
    return Forked(words, cwd=cwd, env=changed, **options)


def ended(*arguments: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
    """Run a program to its end. Arguments as of `start`."""
    with start(*arguments, **options) as process:
        try:
            output, error = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)
