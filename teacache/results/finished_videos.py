"""The complete videos of an output folder, found by their settings."""

import dataclasses
from collections import defaultdict
from pathlib import Path

from teacache.results.record import Record, Settings, read_record
from teacache.results.video import count_frames


class FinishedVideos:
    """The videos of a folder that have a record, whose file name is none of `ignored`.

    Each record is read once, when it is needed, of those that were there at `list_folder`.
    """

    def __init__(self, folder: Path, ignored: frozenset[str] = frozenset()):
        self._folder, self._known = folder, set(ignored)
        self._files: dict[str, list[Path]] = {}  # records that were not read, by their prefix
        self._records: dict[str, list[tuple[Path, Record]]] = defaultdict(list)  # by `_key`

    def list_folder(self) -> None:
        """List the records, at first and again: other processes write to the folder, too."""
        for path in sorted(self._folder.glob("*_*.json")):
            if path.name not in self._known:
                self._known.add(path.name)
                self._files.setdefault(path.stem.rpartition("_")[0], []).append(path)

    def find(self, settings: Settings) -> tuple[Path, Record] | None:
        """A complete video with these settings and its record, or None.

        An empty `image_sha256` means that the image was not read. Then its source is compared, and
        the newest video is returned.
        """
        for path in self._files.pop(settings.prefix, []):
            if record := read_record(path):
                self._records[_key(record.settings)].append((path.with_suffix(".mp4"), record))
        videos = self._records.get(_key(settings), [])
        if settings.image_sha256:
            videos = [each for each in videos if each[1].settings == settings]
        else:
            videos = [each for each in videos[::-1] if each[1].settings.image == settings.image]
        return next((each for each in videos if _is_complete(*each)), None)


def _key(settings: Settings) -> str:
    """A text that settings share if they are equal but for the digest of the image."""
    return dataclasses.replace(settings, image_sha256="").name


def _is_complete(video: Path, record: Record) -> bool:
    """Whether a video has all its frames. To count them takes half a second, its size does not."""
    try:
        unchanged = video.stat().st_size == record.video_bytes
    except OSError:
        return False
    return unchanged or count_frames(video) == record.settings.num_frames
