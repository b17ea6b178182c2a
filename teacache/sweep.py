"""Several videos in one run: their order, what was done before, how they compare."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from teacache import quality, tables, video
from teacache.errors import ArgumentError
from teacache.output import claimed_stem, written_whole
from teacache.report import write_record

if TYPE_CHECKING:
    from teacache.identity import Identity
    from teacache.jobs import Job
    from teacache.size import VideoSize

# More than this are too many to look at in one picture, and to keep in memory.
MOST_SIDE_BY_SIDE = 64
# What a record may differ in and still be the record of the same video.
NOT_OF_THE_VIDEO = ("output_path", "keep_loaded", "reuse_conditioning")


class Result(NamedTuple):
    """One finished video.

    own_frames: [frames, height, width, 3], uint8; None where an earlier run sampled it, or where
    a long list of jobs has dropped them.
    """

    job: Job
    path: Path
    record: dict[str, object]
    own_frames: np.ndarray | None

    def frames(self) -> np.ndarray:
        """Its frames; where they are not at hand, those that its mp4 decodes to."""
        if self.own_frames is not None:
            return self.own_frames
        return video.read_video(self.path).frames


def group_of(job: Job) -> tuple:
    """What the videos share that are compared with each other: all but the threshold."""
    return tuple(getattr(job, name) for name in tables.GROUP)


def in_order(jobs: list[Job]) -> list[Job]:
    """The jobs, those together that share face and noise, and of these those of one group.

    In each group threshold 0 comes first: the others compare with it.
    """
    starts: dict[tuple, int] = {}  # each one's first place among the jobs
    groups: dict[tuple, int] = {}
    for place, job in enumerate(jobs):
        starts.setdefault((job.image, job.seed), place)
        groups.setdefault(group_of(job), place)
    return sorted(
        jobs,
        key=lambda job: (
            starts[job.image, job.seed],
            groups[group_of(job)],
            job.rel_l1_thresh != 0,
        ),
    )


def find_finished(folder: Path, job: Job, settings: dict[str, object]) -> Result | None:
    """The video, whole, that an earlier run left in `folder` with the same settings, or None.

    Args:
        settings: what this run would put on record before sampling.
    """
    wanted = json.loads(
        json.dumps({k: v for k, v in settings.items() if k not in NOT_OF_THE_VIDEO})
    )
    for path in sorted(folder.glob(f"{job.seed}_{job.rel_l1_thresh}_*.json")):
        mp4 = path.with_name(path.name.removesuffix(".json") + ".mp4")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not a record of ours
        same = all(k in record and record[k] == v for k, v in wanted.items())
        if same and video.count_frames(mp4) == record["num_frames"]:
            return Result(job, mp4, record, own_frames=None)
    return None


def read_baseline(path: Path, jobs: list[Job], size: VideoSize) -> np.ndarray:
    """The frames of an earlier video, [frames, height, width, 3].

    Raises:
        ArgumentError: where it is no video, not of the size that is sampled, or cannot be the
            baseline of every job.
    """
    if len(set(map(group_of, jobs))) > 1:
        raise ArgumentError(
            f"--baseline {path} is one video, and cannot be compared with those of several faces, "
            "prompts, seeds or numbers of steps: sample --rel_l1_thresh 0 with them instead"
        )
    try:
        frames = video.read_video(path).frames
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"--baseline {path} cannot be read as a video") from error
    found, wanted = frames.shape[:3], (size.num_frames, size.height, size.width)
    if found != wanted:
        raise ArgumentError(
            f"--baseline {path} has {found[0]} frames of {found[2]}x{found[1]}, "
            f"this run samples {wanted[0]} of {wanted[2]}x{wanted[1]}"
        )
    return frames


class Baselines:
    """What each video is compared with: that of threshold 0, else the one that `--baseline` names.

    Args:
        results: those of the run, as they come.
        given: `--baseline`'s frames, [frames, height, width, 3], or None.
    """

    def __init__(self, results: dict[Job, Result], given: np.ndarray | None):
        self.results, self.given = results, given
        self._decoded: dict[Path, np.ndarray] = {}

    def of(self, job: Job) -> tuple[np.ndarray | None, bool]:
        """Frames to compare a job's video with, and whether an mp4 was decoded for them."""
        if job.rel_l1_thresh == 0:
            return None, False
        unaided = self.results.get(dataclasses.replace(job, rel_l1_thresh=0.0))
        if unaided is None:
            return self.given, self.given is not None
        if unaided.own_frames is not None:
            return unaided.own_frames, False
        if unaided.path not in self._decoded:  # once for all that compare with it
            self._decoded = {unaided.path: unaided.frames()}
        return self._decoded[unaided.path], True

    def compare_the_rest(self) -> None:
        """Compare what is not compared yet: videos from earlier runs, or of an interrupted one.

        Their records stay as they are; the sweep's report has the figures.
        """
        for job, result in self.results.items():
            found = result.record.setdefault("quality", {})
            baseline = None if "psnr" in found else self.of(job)[0]
            if baseline is not None:
                found.update(quality.compare(result.frames(), baseline), decoded=True)


def judge(
    frames: np.ndarray,
    baseline: np.ndarray | None,
    decoded: bool,
    identity: Identity,
    analyser: object,
) -> dict[str, object]:
    """The quality figures that go into a video's record.

    Args:
        baseline: the frames without reuse, or None where there are none to compare with.
        decoded: whether the baseline comes from an mp4, whose losses are then in the figures.
        analyser: insightface's, see `teacache.identity.FaceModels`.
    """
    figures: dict[str, object] = {}
    if baseline is not None:
        figures = {**quality.compare(frames, baseline), "decoded": decoded}
    reference = identity.id_cond[0, :512].float().cpu().numpy()  # ArcFace's part
    figures["identity"] = quality.identity_similarity(frames, reference, analyser)
    return figures


def write_sweep(
    folder: Path, results: list[Result], fps: int, in_full: bool
) -> tuple[str, list[Path]]:
    """Write the sweep's .md and .json, and the .png and .mp4 of one that is not too long for them.

    Args:
        results: one or more, in the order in which they were asked for.
        in_full: whether there is time for the .png and .mp4.

    Returns:
        the table for the terminal, and the files.
    """
    records = [result.record for result in results]
    rows = tables.sweep_rows([(result.path.stem, result.record) for result in results])
    files = []
    with claimed_stem(folder, f"sweep_{results[0].job.seed}") as stem:

        @contextlib.contextmanager
        def written(ending: str) -> Iterator[Path]:
            with written_whole(stem, ending) as (path,):
                yield path
            files.append(stem.with_name(stem.name + ending))

        with written(".json") as path:
            write_record({"rows": rows, "videos": records}, path)
        with written(".md") as path:
            path.write_text(tables.sweep_markdown(rows, records[0]), encoding="utf-8")
        if in_full and len(results) <= MOST_SIDE_BY_SIDE:
            from teacache.figure import draw_sweep

            with written(".png") as path:
                draw_sweep(rows, records, path)
            with written(".mp4") as path:
                labels = [tables.label(row) for row in rows]
                video.write_grid([result.frames() for result in results], labels, path, fps)
    return tables.terminal_table(rows), files
