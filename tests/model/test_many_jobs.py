"""What a run holds of many videos: no pixels, a window of conditions, each record once."""

import dataclasses
import json
import weakref

import psutil
from many_jobs import write_jobs
from records import record_of_a_video
from support import main

from teacache.inputs.photograph_store import PhotographStore
from teacache.results import finished_videos
from teacache.results.finished_videos import FinishedVideos
from teacache.run import conditions, loop

SHORT = ("--ckpts_path", "tiny", "--num_infer_steps", 2, "--num_frames", 1)
MEBIBYTE = 2**20


def test_no_pixels_are_held(tmp_path):
    """Twenty photographs of 12 MB each. One at a time is decoded, and copied to be digested."""
    lines = write_jobs(tmp_path, 20, megapixels=4).read_text().splitlines()
    paths = [json.loads(line)["image"] for line in lines]
    store, memory = PhotographStore(), psutil.Process().memory_info
    store.look_at(paths[0])
    before = memory().rss
    digests = {store.look_at(path).sha256 for path in paths}
    assert len(digests) == 20
    assert memory().rss - before < 4 * 12 * MEBIBYTE


def test_conditions_are_made_for_a_window(capsys, tmp_path, monkeypatch, no_embeddings):
    """Those of the last window are gone; the videos are those of one large window."""
    jobs = ("--jobs", write_jobs(tmp_path, 5, megapixels=0.3), "--quiet")
    assert main(capsys, *SHORT, *jobs, "--output_path", tmp_path / "one")[0] == 0
    made, make = [], conditions.Conditions.of

    def noted(self, shots):
        assert sum(condition() is not None for condition in made) <= 1, "the last one"
        result = make(self, shots)
        made.extend(weakref.ref(each.prompt_embeds) for each in result)
        return result

    monkeypatch.setattr(conditions.Conditions, "of", noted)
    monkeypatch.setattr(loop, "window_size", lambda: 2)
    code, output, _ = main(capsys, *SHORT, *jobs, "--output_path", tmp_path / "two")
    assert (code, len(made), output.count(".mp4")) == (0, 5, 5)
    for video in (tmp_path / "one").glob("42*.mp4"):
        assert video.read_bytes() == (tmp_path / "two" / video.name).read_bytes()


def test_each_record_is_read_once(tmp_path, monkeypatch):
    read, count = finished_videos.read_record, []
    monkeypatch.setattr(finished_videos, "read_record", lambda path: count.append(1) or read(path))
    for seed in range(30):
        record = dataclasses.replace(record_of_a_video(seed=seed), video_bytes=1)
        record.write(tmp_path / f"{seed}_0.15_0000.json")
        (tmp_path / f"{seed}_0.15_0000.mp4").write_bytes(b"x")
    finished = FinishedVideos(tmp_path, frozenset({"7_0.15_0000.json"}))
    for _ in range(3):
        finished.list_folder()
        for seed in range(30):
            found = finished.find(record_of_a_video(seed=seed).settings)
            assert (found is None) == (seed == 7)
            assert not finished.find(record_of_a_video(seed=seed, prompt="another").settings)
    assert len(count) == 29
    (tmp_path / "3_0.15_0000.mp4").unlink()
    assert finished.find(record_of_a_video(seed=3).settings) is None
