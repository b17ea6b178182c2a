"""The report over all the videos that were asked for."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

from teacache.base.console import Console
from teacache.base.errors import reason
from teacache.base.interruption import stop_requested
from teacache.command.order import Order
from teacache.comparison.comparison import Comparison
from teacache.results.lock import locked

logger = logging.getLogger(__name__)


def write_report(comparison: Comparison, order: Order, videos: int, console: Console) -> None:
    """Write the report of a sweep, as far as it got, and show its table."""
    try:
        # Decoding videos to compare them, drawing and encoding take seconds: not after a signal.
        table, files = comparison.report(order.output_path, in_full=not stop_requested())
    except OSError as error:
        logger.warning("the sweep's report cannot be written: %s", reason(error))
        return
    if files:
        console.say(f"\n{table}\n")
        for file in files:
            console.say(f"sweep       {file}")
        if len(comparison.videos) < videos:
            console.say(f"            {len(comparison.videos)} of {videos} videos: see --resume")


def write_report_of_shards(
    comparison: Comparison, order: Order, missing: int, console: Console
) -> None:
    """Write the report of all shards, once: by the one that finds no video missing."""
    if missing:
        console.say(
            f"shard {order.shard} is done; the last one reports on all: {missing} of "
            f"{len(order.all_jobs)} videos are missing"
        )
        return
    with locked(order.output_path, "report") as alone:
        earlier = _earlier_report(comparison, order.output_path)
        if earlier:
            console.say(f"sweep       {earlier}")
        elif alone:
            write_report(comparison, order, len(order.all_jobs), console)
        else:
            console.say("sweep       another shard is writing the report")


def _earlier_report(comparison: Comparison, folder: Path) -> Path | None:
    """A report on just these videos."""
    names = {finished.path.stem for finished in comparison.videos}
    for path in sorted(folder.glob("sweep_*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            if {row["video"] for row in rows} == names:
                return path
    return None
