"""Compares finished videos with the one without reuse, and reports on all of them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teacache.base.errors import reason
from teacache.base.files import with_ending, written_whole
from teacache.comparison import quality, tables
from teacache.comparison.figure import draw_sweep
from teacache.comparison.side_by_side import write_grid
from teacache.request.job import Job
from teacache.results.output_folder import claimed_stem
from teacache.results.record import Quality, Record, write_json
from teacache.results.video import read_video

if TYPE_CHECKING:
    from PIL import Image

    from teacache.inputs.identity import Identity

logger = logging.getLogger(__name__)

MOST_SIDE_BY_SIDE = 64  # more videos are too many for one picture, and for memory


@dataclass
class Finished:
    """A finished video.

    frames: [frames, height, width, 3], uint8, as sampled; None for a video of an earlier run, and
        where a long list does not need them any more.
    """

    path: Path
    record: Record
    frames: np.ndarray | None

    def read_frames(self) -> np.ndarray:
        """The frames, decoded from the mp4 where they are not in memory."""
        return read_video(self.path).frames if self.frames is None else self.frames


class Comparison:
    """The finished videos of a request, by their jobs.

    Args:
        jobs: of the request. Of a long list only the frames of one group stay in memory.
        folder: the output folder.
        load_analyser: loads insightface's detector and recogniser, with the first video.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path, load_analyser: Callable[[], Any]):
        self.jobs, self.folder = jobs, folder
        self.videos: dict[Job, Finished] = {}
        self._analyser = functools.cache(load_analyser)
        self._baseline_frames = functools.lru_cache(maxsize=1)(lambda path: read_video(path).frames)

    @property
    def missing(self) -> list[Job]:
        """The jobs without a finished video."""
        return [job for job in self.jobs if job not in self.videos]

    def add(
        self, job: Job, path: Path, record: Record, frames: list[Image.Image], identity: Identity
    ) -> Record:
        """Compare a video of this run, write the figures into its record, and return that."""
        pixels = np.stack([np.array(frame) for frame in frames])
        video = Finished(path, record, pixels)
        figures = self._compare(video)
        reference, analyser = identity.embedding, self._analyser()
        figures["identity"] = quality.identity_similarity(pixels, reference, analyser)
        video.record = dataclasses.replace(record, quality=figures)
        try:
            video.record.replace_at(path.with_suffix(".json"))
        except OSError as error:
            logger.warning(
                "%s: its record stays without the figures of quality: %s", path, reason(error)
            )
        if len(self.jobs) > MOST_SIDE_BY_SIDE:
            for other in self.videos.values():
                if other.record.settings.group != record.settings.group:
                    other.frames = None
        self.videos[job] = video
        return video.record

    def add_earlier(self, job: Job, path: Path, record: Record) -> None:
        """Add a video of an earlier run. Its record does not change."""
        self.videos[job] = Finished(path, record, None)

    def report(self, in_full: bool) -> tuple[str, list[Path]]:
        """Write `sweep_{seed}_{index:04d}` as .md and .json, and of a short sweep as .png and .mp4.

        Args:
            in_full: whether to do what takes seconds: decode, compare, draw and encode.

        Returns:
            the table for the terminal, and the files; nothing without a finished video.
        """
        if not self.videos:
            return "", []
        videos = [self.videos[job] for job in self.jobs if job in self.videos]
        if in_full:
            for video in videos:  # compare those of earlier runs, and those before their baseline
                own = video.record.quality or {}
                if "psnr" not in own:
                    figures: Quality = {**own, **self._compare(video)}
                    video.record = dataclasses.replace(video.record, quality=figures)
        records = [video.record for video in videos]
        rows = tables.sweep_rows([(video.path.stem, video.record) for video in videos])

        def write_videos(path: Path) -> None:
            frames = [video.read_frames() for video in videos]
            best = max(record.settings.mp4_quality for record in records)
            write_grid(frames, [tables.label(row) for row in rows], path, best)

        content = {"rows": rows, "videos": [record.as_json() for record in records]}
        markdown = tables.sweep_markdown(rows)
        writers: dict[str, Callable[[Path], object]] = {
            ".json": lambda path: write_json(content, path),
            ".md": lambda path: path.write_text(markdown, encoding="utf-8"),
        }
        if in_full and len(videos) <= MOST_SIDE_BY_SIDE:
            writers[".png"] = lambda path: draw_sweep(rows, records, path)
            writers[".mp4"] = write_videos
        with claimed_stem(self.folder, f"sweep_{records[0].settings.seed}") as stem:
            for ending, write in writers.items():
                with written_whole(stem, ending) as (path,):
                    write(path)
        return tables.terminal_table(rows), [with_ending(stem, ending) for ending in writers]

    def _compare(self, video: Finished) -> Quality:
        """The likeness to the video of the group with threshold 0; empty without one."""
        settings = video.record.settings
        baselines = (
            other
            for other in self.videos.values()
            if other.record.settings.rel_l1_thresh == 0
            and other.record.settings.group == settings.group
        )
        baseline = next(baselines, None)
        if settings.rel_l1_thresh == 0 or baseline is None:
            return {}
        reference = baseline.frames
        if reference is None:
            reference = self._baseline_frames(baseline.path)
        decoded = video.frames is None or baseline.frames is None
        return {**quality.compare(video.read_frames(), reference), "decoded": decoded}
