"""A process that has imported the libraries, and becomes a command in each child that it forks.

`python forkserver.py SOCKET PARENT` is started by `processes.py`, which says what differs from a
process of its own. Nothing of the package runs in the server but what the command does before it
imports torch, and no thread: a fork copies the calling thread alone.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch

ROOT = Path(__file__).parent.parent
LIBRARIES = """
    torch.distributed.launcher.api diffusers transformers insightface onnxruntime cv2 skimage
    diffusers.pipelines.consisid.pipeline_consisid imageio_ffmpeg matplotlib.figure torchvision
""".split()
PACKAGE = """
    command.main command.plan run.loop comparison.comparison comparison.figure
    embedded.build
""".split()


def serve(requests: socket.socket, parent: int) -> dict:
    """Fork for each request; return it in the child, whose parent is then the process PARENT.

    That one reaps orphans while it asks, and gets the child from a process in between, so that it
    can wait for it as for any child of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the children hear it
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 2**20, 3)
        if not message:
            os._exit(0)
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost"
        if (between := os.fork()) == 0:
            if os.fork():
                os._exit(0)
            break
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)
    while os.getppid() != parent:
        time.sleep(0.001)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    requests.send(str(os.getpid()).encode())
    requests.close()
    return json.loads(message)


def become(request: dict) -> list[str]:
    """Make this process as Python would begin it; return the words of its command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    numpy.random.seed()  # these begin at random
    torch.seed()
    # What Python reads at its start: how it buffers depends on where it writes to.
    sys.stdout = sys.__stdout__ = open(  # noqa: SIM115 - until the process ends
        *(1, "w", 1 if os.isatty(1) else -1, sys.stdout.encoding, sys.stdout.errors),
        closefd=False,
    )
    words = request["words"]
    sys.argv = words[1:] if words[0] == "-m" else words
    sys.path[:2] = [os.getcwd() if words[0] == "-m" else str(Path(words[0]).parent)]
    return words


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))
    from teacache.base.environment import prepare_environment
    from teacache.base.quiet import silence_libraries

    errors = sys.stdout.errors
    silence_libraries()
    sys.stdout.reconfigure(errors=errors)  # a child begins without it
    prepare_environment()
    for name in [*LIBRARIES, *(f"teacache.{module}" for module in PACKAGE)]:
        importlib.import_module(name)
    gc.freeze()  # no collection then writes to what all children share
    words = become(serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
