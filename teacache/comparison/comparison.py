"""Finished videos beside each other: their likeness to the one without reuse, and the report.

It is handed videos that are written already, and adds what it finds to their records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teacache.base.errors import reason
from teacache.base.files import with_ending, written_whole
from teacache.comparison import quality, tables
from teacache.comparison.figure import draw_sweep
from teacache.comparison.side_by_side import write_grid
from teacache.results import video
from teacache.results.output_folder import claimed_stem
from teacache.results.record import Quality, Record, write_json

if TYPE_CHECKING:
    from PIL import Image

    from teacache.inputs.identity import Identity

logger = logging.getLogger(__name__)

# More than this are too many to look at in one picture, and to keep in memory.
MOST_SIDE_BY_SIDE = 64


@dataclass
class Finished:
    """One finished video.

    place: among the videos that were asked for. frames: [frames, height, width, 3], uint8, as
    sampled; None where an earlier run sampled it, or where a long list has dropped them.
    """

    place: int
    path: Path
    record: Record
    frames: np.ndarray | None

    def frames_or_decoded(self) -> np.ndarray:
        """Its frames; where they are not at hand, those that its mp4 decodes to."""
        return video.read_video(self.path).frames if self.frames is None else self.frames


class Comparison:
    """The finished videos of a run, as they come.

    Args:
        videos: how many are expected; of a long list only the frames that are still needed stay in
            memory.
        load_analyser: loads insightface's detector and recogniser, when the first video comes.
    """

    def __init__(self, videos: int, load_analyser: Callable[[], Any]):
        self.videos: list[Finished] = []
        self._expected = videos
        self._analyser = functools.cache(load_analyser)
        self._decoded: tuple[Path, np.ndarray] | None = None

    def add(
        self,
        place: int,
        path: Path,
        record: Record,
        frames: list[Image.Image],
        identity: Identity,
    ) -> Record:
        """A video that has just been written: compare it, and put the figures into its record.

        Returns:
            the record with `quality` in it.
        """
        pixels = np.stack([np.array(frame) for frame in frames])
        found: Quality = {}
        baseline, decoded = self._baseline_of(record)
        if baseline is not None:
            found = {**quality.compare(pixels, baseline), "decoded": decoded}
        reference = identity.id_cond[0, :512].float().cpu().numpy()  # ArcFace's part
        found["identity"] = quality.identity_similarity(pixels, reference, self._analyser())
        judged = dataclasses.replace(record, quality=found)
        try:
            judged.replace_at(path.with_suffix(".json"))
        except OSError as error:
            logger.warning(
                "%s: its record stays without the figures of quality: %s", path, reason(error)
            )
        if self._expected > MOST_SIDE_BY_SIDE:
            for other in self.videos:
                if other.record.settings.group != record.settings.group:
                    other.frames = None
        self.videos.append(Finished(place, path, judged, pixels))
        return judged

    def add_earlier(self, place: int, path: Path, record: Record) -> None:
        """A video that an earlier run has made. Its record stays as it is."""
        self.videos.append(Finished(place, path, record, None))

    def report(self, folder: Path, in_full: bool) -> tuple[str, list[Path]]:
        """Write the sweep's .md and .json, and the .png and .mp4 of one not too long for them.

        Args:
            in_full: with what takes seconds: decoding videos to compare them, drawing, encoding.

        Returns:
            the table for the terminal, and the files; nothing where no video has been finished.
        """
        if not self.videos:
            return "", []
        videos = sorted(self.videos, key=lambda finished: finished.place)
        if in_full:
            for finished in videos:
                self._compare_late(finished)
        records = [finished.record for finished in videos]
        rows = tables.sweep_rows([(finished.path.stem, finished.record) for finished in videos])
        files = []
        seed = records[0].settings.seed
        with claimed_stem(folder, f"sweep_{seed}") as stem:

            @contextlib.contextmanager
            def written(ending: str) -> Iterator[Path]:
                with written_whole(stem, ending) as (path,):
                    yield path
                files.append(with_ending(stem, ending))

            with written(".json") as path:
                write_json({"rows": rows, "videos": [r.as_json() for r in records]}, path)
            with written(".md") as path:
                path.write_text(tables.sweep_markdown(rows, records[0]), encoding="utf-8")
            if in_full and len(videos) <= MOST_SIDE_BY_SIDE:
                with written(".png") as path:
                    draw_sweep(rows, records, path)
                with written(".mp4") as path:
                    frames = [finished.frames_or_decoded() for finished in videos]
                    write_grid(frames, [tables.label(row) for row in rows], path)
        return tables.terminal_table(rows), files

    def _baseline_of(self, record: Record) -> tuple[np.ndarray | None, bool]:
        """Frames of threshold 0 in a video's group, and whether an mp4 was decoded for them."""
        if record.settings.rel_l1_thresh == 0:
            return None, False
        for other in self.videos:
            own = other.record.settings
            if own.rel_l1_thresh == 0 and own.group == record.settings.group:
                if other.frames is not None:
                    return other.frames, False
                if self._decoded is None or self._decoded[0] != other.path:
                    self._decoded = other.path, other.frames_or_decoded()
                return self._decoded[1], True
        return None, False

    def _compare_late(self, finished: Finished) -> None:
        """Compare what is not compared yet: a video from an earlier run, or of an interrupted one.

        Its own record stays as it is; the report has the figures.
        """
        found: Quality = finished.record.quality or {}
        baseline = None if "psnr" in found else self._baseline_of(finished.record)[0]
        if baseline is not None:
            figures = quality.compare(finished.frames_or_decoded(), baseline)
            found = {**found, **figures, "decoded": True}
        finished.record = dataclasses.replace(finished.record, quality=found)
