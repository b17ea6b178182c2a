"""The report on all videos of a request."""

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from teacache.base.console import Console
from teacache.base.errors import reason
from teacache.base.interruption import stop_requested
from teacache.comparison.comparison import Comparison
from teacache.preflight.checks import plan
from teacache.preflight.setup import Setup, Shot
from teacache.request.readers import Shard
from teacache.results.finished_videos import FinishedVideos
from teacache.results.output_folder import locked_name
from teacache.run.recording import settings_of

logger = logging.getLogger(__name__)


def add_others(comparison: Comparison, shots: Sequence[Shot], setup: Setup) -> None:
    """Add the videos of other processes to a comparison. shots: of this process."""
    # A shard has read only its own images. The digests of the others are empty.
    digests = {shot.job.image: shot.image_sha256 for shot in shots}
    if not (others := comparison.missing):
        return
    finished = FinishedVideos(setup.options.output_path)
    finished.list_folder()
    schedules = plan(others, setup.options, setup.checkpoint, setup.device, setup.dtype)
    for job, schedule in zip(others, schedules, strict=True):
        shot = Shot(job, digests.get(job.image, ""), schedule)
        if video := finished.find(settings_of(shot, setup)):
            comparison.add_earlier(job, *video)


def write_report(comparison: Comparison, console: Console) -> None:
    """Write the report on the finished videos of a sweep, and print its table."""
    try:
        # Figure and side-by-side video take seconds: not after a signal.
        table, files = comparison.report(in_full=not stop_requested())
    except OSError as error:
        logger.warning("the sweep's report cannot be written: %s", reason(error))
        return
    if files:
        console.say(f"\n{table}\n")
        for file in files:
            console.say(f"sweep       {file}")
        if comparison.missing:
            count = f"{len(comparison.videos)} of {len(comparison.jobs)}"
            console.say(f"            {count} videos: see --resume")


def write_report_of_shards(comparison: Comparison, shard: Shard, console: Console) -> None:
    """Write one report on all shards, if no video is missing."""
    if missing := len(comparison.missing):
        console.say(
            f"shard {shard} is done; the last shard writes the report: {missing} of "
            f"{len(comparison.jobs)} videos are missing"
        )
        return
    with locked_name(comparison.folder, "report") as held:
        if earlier := _earlier_report(comparison):
            console.say(f"sweep       {earlier}")
        elif held:
            write_report(comparison, console)
        else:
            console.say("sweep       another shard is writing the report")


def _earlier_report(comparison: Comparison) -> Path | None:
    """The file of a report on exactly these videos; None if there is none."""
    names = {finished.path.stem for finished in comparison.videos.values()}
    for path in sorted(comparison.folder.glob("sweep_*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            if {row["video"] for row in rows} == names:
                return path
    return None
