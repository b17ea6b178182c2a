"""Measures all that the README's table asks for: `python3 -m teacache.benchmark.everything`.

Each part is a process of its own, so that one that fails, hangs or breaks the GPU's state leaves
the others alone: the steps with each attention backend; a checkpoint of random weights, written to
disk; the command on it, twice; the command with the memory of smaller cards.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
from teacache.base.quiet import silence_libraries
from teacache.benchmark.__main__ import add_rows
from teacache.benchmark.table import Row, Table, in_words
from teacache.checkpoint.size import video_size
from teacache.command.arguments import OneLineParser
from teacache.command.flags import FLAGS
from teacache.results.output_folder import claimed_stem, prepare_folder

PARTS = ("steps", "command", "memory")
# The attention backends that are measured beside torch's own, by a module of their package.
BACKENDS = {"flash3": "flash_attn_interface", "flash4": "flash_attn.cute", "sage": "sageattention"}
CARDS = (24, 16, 12, 8)  # GiB
BESIDES_TORCH = 0.8  # GiB of a card that CUDA and the driver take
TIMEOUT = 300  # seconds of a process; the longest takes about half of that on an H100
COMMAND = "from teacache.command.main import run_and_exit; run_and_exit()"
ON_CARD = "from teacache.benchmark.everything import run_on_card; run_on_card()"


def main(argv: list[str] | None = None) -> int:
    """Measure everything. Returns the exit code, as the sampler's command does."""
    parser = OneLineParser(
        prog="python3 -m teacache.benchmark.everything",
        description="Measure the steps with each attention backend, the whole command on a "
        "checkpoint of random weights on disk, and the memory of smaller cards.",
        allow_abbrev=False,
    )
    add_rows(parser)
    parts = "what to measure (default: all)"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help=parts)
    parser.add_argument(
        "--ckpts_path",
        type=Path,
        metavar="PATH",
        help="the checkpoint for the command; where there is none, one of random weights is "
        "written and stays (default: a temporary one, at full size of 22 GB)",
    )
    backends = [name for name, module in BACKENDS.items() if _is_installed(module)]
    parser.add_argument(
        "--attention",
        nargs="*",
        metavar="BACKEND",
        default=backends,
        help=f"backends to measure beside native (default: {', '.join(BACKENDS)}, if installed)",
    )
    FLAGS["device"].add_to(parser)
    args = parser.parse_args(argv)
    silence_libraries()
    return interruption.run_command(lambda: _measure(args))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _measure(args: argparse.Namespace) -> None:
    prepare_folder(args.output_path)
    with (
        claimed_stem(args.output_path, "everything") as stem,
        tempfile.TemporaryDirectory() as scratch,
    ):
        table = Table(stem, {})
        if "steps" in args.parts:
            for backend in ("native", *args.attention):
                _steps(table, args, backend, Path(scratch))
        if {"command", "memory"} & {*args.parts}:
            _commands(table, args, Path(scratch))
        table.write()
    print(table.markdown())
    print(f"{stem}.md\n{stem}.json", file=sys.stderr)


def _steps(table: Table, args: argparse.Namespace, backend: str, scratch: Path) -> None:
    """The rows of `teacache.benchmark` with an attention backend."""
    out = scratch / backend
    words = ["-m", "teacache.benchmark", "--attention", backend, "--output_path", out]
    for name in ("random_weights", "num_infer_steps", "computed_steps", "device"):
        words += [f"--{name}", getattr(args, name)]
    rows = args.rows
    if backend == "native":
        words.append("--profile")
    else:
        rows = [row for row in args.rows if row in ("attention", "exact", "compile", "fp8")]
    try:
        _run([*words, "--rows", *rows])
    except DeviceError as error:
        table.add(Row(figure=f"steps --attention {backend}", notes=f"failed: {error}", failed=True))
    for path in out.glob("*.json"):  # also of a process that was killed
        table.take(json.loads(path.read_text(encoding="utf-8")))


def _commands(table: Table, args: argparse.Namespace, scratch: Path) -> None:
    """The command on a checkpoint on disk."""
    checkpoint = args.ckpts_path or scratch / "checkpoint"
    if not checkpoint.exists():
        writing = ["-m", "teacache.benchmark.random_weights", checkpoint]
        writing += ["--size", args.random_weights]
        if not table.measure("writing the checkpoint", lambda: Row([_run(writing)])):
            return
    steps = ("--num_infer_steps", args.num_infer_steps, "--computed_steps", args.computed_steps)
    common = ("--ckpts_path", checkpoint, "--image", "astronaut", "--device", args.device)

    def sample(program: Sequence[object], cache: str, *words: object) -> tuple[Row, dict[str, Any]]:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            whole = _run(["-c", *program, *common, *words, "--output_path", out], scratch / cache)
            (path,) = Path(out).glob("*.json")
            record = json.loads(path.read_text(encoding="utf-8"))
        table.describe(record["device_name"])
        reserved = record["peak_reserved_bytes"]
        allocated = record["peak_memory_bytes"] if reserved else None  # else the process's
        return Row([whole], allocated, reserved, in_words(record["seconds"])), record

    def on_card(size: int) -> Row:
        budget = size - BESIDES_TORCH
        row, record = sample(
            (ON_CARD, budget), f"card{size}", "--num_infer_steps", 2, "--rel_l1_thresh", 0
        )
        without = "" if row.reserved else "no GPU, so no limit; "
        row.notes = f"{without}{_ledger(checkpoint, record)}; {row.notes}"
        return row

    if "command" in args.parts:
        _forget_files(checkpoint)
        for when in ("first", "second"):
            figure = f"whole command, {args.computed_steps} computed steps, {when} time"
            table.measure(figure, lambda: sample((COMMAND,), "cache", *steps)[0])
    if "memory" in args.parts:
        for size in CARDS:
            table.measure(f"two computed steps on {size} GB", partial(on_card, size))


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
    before, last = time.perf_counter(), ""
    command = [sys.executable, *map(str, words)]
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
    seconds = time.perf_counter() - before
    if code:
        late = f"not done after {TIMEOUT} s" if seconds > TIMEOUT else f"exit code {code}"
        raise DeviceError(late if code < 0 else last.strip().removeprefix("error: ") or late)
    return seconds


def run_on_card() -> None:
    """The command with less of the GPU's memory: the first argument, in GiB. Without one, all."""
    prepare_environment()
    import torch

    budget = float(sys.argv.pop(1))
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * 2**30 / total))
    from teacache.command.main import run_and_exit

    run_and_exit()


def _ledger(checkpoint: Path, record: dict[str, Any]) -> str:
    """What was on the GPU when, and the memory of each stage that the memory plan counts with."""
    prepare_environment()
    import torch

    from teacache.command.card import WHERE, needs

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


if __name__ == "__main__":
    sys.exit(main())
