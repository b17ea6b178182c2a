"""Rows that are measured by processes of their own.

One that fails, hangs or breaks the GPU's state leaves the others alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from teacache.base import interruption
from teacache.base.environment import prepare_environment
from teacache.base.errors import DeviceError
from teacache.benchmark.table import Row, Table, in_words
from teacache.checkpoint.size import video_size

CARDS = (24, 16, 12, 8)  # GiB
BESIDES_TORCH = 0.8  # GiB of a card that CUDA and the driver take
TIMEOUT = 300  # seconds of a process
COMMAND = "from teacache.command.main import run_and_exit; run_and_exit()"
ON_CARD = f"from teacache.benchmark import processes; processes.limit_memory(); {COMMAND}"


def measure_steps(table: Table, args: argparse.Namespace, backend: str, rows: list[str]) -> None:
    """The rows of this benchmark that one process measures, with an attention backend."""
    words = ["-m", "teacache.benchmark", "--attention", backend, "--rows", *rows]
    for name in ("random_weights", "num_infer_steps", "computed_steps", "device", "dtype"):
        words += [f"--{name}", getattr(args, name)]
    with tempfile.TemporaryDirectory() as out:
        try:
            _run([*words, "--output_path", out])
        except DeviceError as error:
            table.add(Row(notes=f"failed: {error}", figure=f"--attention {backend}", failed=True))
        for path in Path(out).glob("*.json"):  # also of a process that was killed
            table.take(json.loads(path.read_text(encoding="utf-8")))


def measure_command(table: Table, args: argparse.Namespace, scratch: Path) -> None:
    """The command on a checkpoint on disk, and on smaller cards."""
    checkpoint = args.ckpts_path or scratch / "checkpoint"
    if not checkpoint.exists():
        writing: list[object] = ["-m", "teacache.benchmark", "--write", checkpoint]
        writing += ["--random_weights", args.random_weights, "--device", args.device]
        if not table.measure("writing the checkpoint", lambda: Row([_run(writing)])):
            return
    steps = ("--num_infer_steps", args.num_infer_steps, "--computed_steps", args.computed_steps)
    common: tuple[object, ...] = ("--ckpts_path", checkpoint, "--image", "astronaut")
    common += ("--device", args.device, "--dtype", args.dtype)

    def sample(cache: str, *words: object, limit: tuple[object, ...] = (COMMAND,)) -> Row:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            words = ("-c", *limit, *common, *words, "--output_path", out)
            seconds = _run(words, scratch / cache)
            (path,) = Path(out).glob("*.json")
            record = json.loads(path.read_text(encoding="utf-8"))
        table.describe(record["device_name"])
        reserved = record["peak_reserved_bytes"]
        allocated = record["peak_memory_bytes"] if reserved else None  # else the process's
        stages = {"computed step": record["computed_step_seconds"], **record["seconds"]}
        notes = [in_words(stages)]
        if len(limit) > 1:
            notes = ["" if reserved else "no GPU, so no limit", _ledger(checkpoint, record), *notes]
        return Row([seconds], allocated, reserved, "; ".join(filter(None, notes)))

    if "command" in args.rows:
        _forget_files(checkpoint)
        for when in ("first", "second"):
            figure = f"whole command, {args.computed_steps} computed steps, {when} time"
            table.measure(figure, partial(sample, "cache", *steps, "--num_gpus", args.num_gpus))
    for size in CARDS if "memory" in args.rows else ():
        words = (f"card{size}", "--num_infer_steps", 2, "--rel_l1_thresh", 0)
        limit = (ON_CARD, size - BESIDES_TORCH)
        table.measure(f"two computed steps on {size} GB", partial(sample, *words, limit=limit))


def _run(words: Sequence[object], cache: Path | None = None) -> float:
    """Run a Python program to its end, and pass on its errors; return the seconds.

    Args:
        words: of Python's command line.
        cache: the user's cache folder for it.

    Raises:
        DeviceError: if it fails or takes too long, with the last line that it printed.
    """
    environment = {**os.environ, **({"XDG_CACHE_HOME": str(cache)} if cache else {})}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    command, before, last = [sys.executable, *map(str, words)], time.perf_counter(), ""
    with subprocess.Popen(command, env=environment, **pipes) as process:
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.start()
        try:
            for last in process.stderr or ():
                print(last, end="", file=sys.stderr, flush=True)
            code = process.wait()
        finally:
            timer.cancel()
            process.terminate()  # does nothing, unless this process is interrupted
    interruption.check()
    seconds = time.perf_counter() - before
    if code:
        ended = f"not done after {TIMEOUT} s" if seconds > TIMEOUT else f"exit code {code}"
        raise DeviceError(ended if code < 0 else last.strip().removeprefix("error: ") or ended)
    return seconds


def limit_memory() -> None:
    """Let torch have as many GiB of the GPU as the first argument says, which is taken away."""
    prepare_environment()
    import torch

    budget = float(sys.argv.pop(1))
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * 2**30 / total))


def _ledger(checkpoint: Path, record: dict[str, Any]) -> str:
    """What was on the GPU when, and the memory of each stage that the memory plan counts with."""
    prepare_environment()
    import torch

    from teacache.preflight.card import WHERE, needs

    size = video_size(checkpoint, record["width"], record["height"], record["num_frames"])
    needed = needs(checkpoint, size, True, getattr(torch, record["dtype"]))
    tiled = ", decoder in tiles" if record["vae_tiling"] else ""
    counted = ", ".join(f"{name} {n / 2**30:.1f}" for name, n in needed._asdict().items())
    return f"{WHERE[record['offload']]}{tiled}; counted (GiB): {counted}"


def _forget_files(folder: Path) -> None:
    """Let the system forget what it has read of files, so that the next one to read them waits."""
    os.sync()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
