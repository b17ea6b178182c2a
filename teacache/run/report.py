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
from teacache.request.job import Job
from teacache.request.values import Request
from teacache.results.finished_videos import FinishedVideos
from teacache.results.output_folder import locked_name
from teacache.run.recording import settings_of

logger = logging.getLogger(__name__)


def add_others(
    comparison: Comparison, jobs: Sequence[Job], shots: Sequence[Shot], setup: Setup
) -> int:
    """Add the videos of other processes to a comparison; return how many videos are missing.

    jobs: of all shards, in the order of the request. shots: of this process.
    """
    added = {video.place for video in comparison.videos}
    places = [place for place in range(len(jobs)) if place not in added]
    if not places:
        return 0
    # A shard has read only its own images. The digests of the others are empty.
    digests = {shot.job.image: shot.image_sha256 for shot in shots}
    others = [jobs[place] for place in places]
    schedules = plan(others, setup.options, setup.checkpoint, setup.device, setup.dtype)
    finished = FinishedVideos(setup.options.output_path)
    for place, job, schedule in zip(places, others, schedules, strict=True):
        shot = Shot(job, digests.get(job.image, ""), schedule)
        if video := finished.find(settings_of(shot, setup)):
            comparison.add_earlier(place, *video)
    return len(jobs) - len(comparison.videos)


def write_report(comparison: Comparison, folder: Path, count: int, console: Console) -> None:
    """Write the report on the finished videos of a sweep of `count`, and print its table."""
    try:
        # Figure and side-by-side video take seconds: not after a signal.
        table, files = comparison.report(folder, in_full=not stop_requested())
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
    comparison: Comparison, request: Request, missing: int, console: Console
) -> None:
    """Write one report on all shards, if no video is missing."""
    folder, count = request.options.output_path, len(request.all_jobs)
    if missing:
        console.say(
            f"shard {request.shard} is done; the last shard writes the report: {missing} of "
            f"{count} videos are missing"
        )
        return
    with locked_name(folder, "report") as held:
        earlier = _earlier_report(comparison, folder)
        if earlier:
            console.say(f"sweep       {earlier}")
        elif held:
            write_report(comparison, folder, count, console)
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
