"""The report on all videos of a request."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

from teacache.base.console import Console
from teacache.base.errors import reason
from teacache.base.interruption import stop_requested
from teacache.comparison.comparison import Comparison
from teacache.request.values import Order
from teacache.results.output_folder import locked_name

logger = logging.getLogger(__name__)


def write_report(comparison: Comparison, order: Order, console: Console) -> None:
    """Write the report on the finished videos of a sweep, and print its table."""
    count = len(order.all_jobs)
    try:
        # Figure and side-by-side video take seconds: not after a signal.
        table, files = comparison.report(order.output_path, in_full=not stop_requested())
    except OSError as error:
        logger.warning("the sweep's report cannot be written: %s", reason(error))
        return
    if files:
        console.say(f"\n{table}\n")
        for file in files:
            console.say(f"sweep       {file}")
        if len(comparison.videos) < count:
            console.say(f"            {len(comparison.videos)} of {count} videos: see --resume")


def write_report_of_shards(
    comparison: Comparison, order: Order, missing: int, console: Console
) -> None:
    """Write one report on all shards, if no video is missing."""
    if missing:
        console.say(
            f"shard {order.shard} is done; the last shard writes the report: {missing} of "
            f"{len(order.all_jobs)} videos are missing"
        )
        return
    with locked_name(order.output_path, "report") as held:
        earlier = _earlier_report(comparison, order.output_path)
        if earlier:
            console.say(f"sweep       {earlier}")
        elif held:
            write_report(comparison, order, console)
        else:
            console.say("sweep       another shard is writing the report")


def _earlier_report(comparison: Comparison, folder: Path) -> Path | None:
    """The file of a report on exactly these videos; None if there is none."""
    names = {finished.path.stem for finished in comparison.videos}
    for path in sorted(folder.glob("sweep_*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            if {row["video"] for row in rows} == names:
                return path
    return None
