"""Sweeps through the command: shared work, same videos, interruption, resumption, reports."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import main

from teacache.comparison import comparison, quality
from teacache.inputs import conditioning, photograph_store
from teacache.inputs import identity as faces
from teacache.inputs import photograph as pictures
from teacache.results.video import read_video
from teacache.run import session
from teacache.sampling import sampler

COMMON = ("--ckpts_path", "tiny", "--num_infer_steps", 20, "--num_frames", 1)
SHORT = (*COMMON, "--num_infer_steps", 2)


@pytest.fixture
def calls(monkeypatch):
    """Counts what a run does, by calling through to it."""
    counted = Counter()
    for module, name in (
        *((photograph_store, "load_image"), (conditioning, "load_pipeline")),
        *((faces, "load_face_models"), (faces, "find_identity"), (conditioning, "embed_text")),
        *((session, "open_models"), (sampler, "prepare"), (sampler, "denoise")),
        (sampler, "decode"),
    ):
        real = getattr(module, name)

        def counting(*args, real=real, name=name, **kwargs):
            counted[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)
    return counted


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_record(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_sweep(capsys, tmp_path, calls, no_embeddings):
    arguments = (*COMMON, "--rel_l1_thresh", 0.2, 0, 0.1, "--output_path", tmp_path / "sweep")
    code, output, error = main(capsys, *arguments)
    assert code == 0
    assert "learned positional embeddings" in error  # one frame is not the checkpoint's own

    # What does not depend on the threshold happens once.
    assert calls == Counter(
        load_image=1, load_face_models=1, find_identity=1, load_pipeline=1, open_models=1,
        embed_text=2, prepare=1, denoise=3, decode=3,
    )  # fmt: skip
    assert names(tmp_path / "sweep") == [
        *("42_0.0_0000.json", "42_0.0_0000.mp4", "42_0.1_0000.json", "42_0.1_0000.mp4"),
        *("42_0.2_0000.json", "42_0.2_0000.mp4"),
        *(f"sweep_42_0000.{ending}" for ending in ("json", "md", "mp4", "png")),
    ]

    # Each video is the one that its own run gives, to the byte.
    own = (*COMMON, "--rel_l1_thresh", 0.2, "--output_path", tmp_path / "own")
    assert main(capsys, *own)[0] == 0
    one, other = (tmp_path / folder / "42_0.2_0000.mp4" for folder in ("sweep", "own"))
    assert one.read_bytes() == other.read_bytes()
    one, other = (json.loads(path.with_suffix(".json").read_text()) for path in (one, other))
    assert one["computed_steps"] == other["computed_steps"]
    assert one["distances"] == other["distances"]
    assert one["seconds"].keys() == other["seconds"].keys()

    # The table, in the terminal and as Markdown, in the order asked for.
    lines = output.splitlines()
    table = lines[next(n for n, line in enumerate(lines) if "rel_l1_thresh  " in line) :]
    assert [line.split()[0] for line in table[1:4]] == ["0.2", "0", "0.1"]
    assert "No LPIPS" in output
    markdown = (tmp_path / "sweep" / "sweep_42_0000.md").read_text()
    assert "| 0.2 |" in markdown
    assert "Seconds are those of denoising and decoding" in markdown

    # Everything, as JSON.
    report = read_record(tmp_path / "sweep", "sweep_42_0000.json")
    assert [row["rel_l1_thresh"] for row in report["rows"]] == [0.2, 0.0, 0.1]
    for row, record in zip(report["rows"], report["videos"], strict=True):
        assert row["computed"] == len(record["computed_steps"])
        seconds = record["seconds"]["denoising"] + record["seconds"]["decoding"]
        assert row["latency"] == pytest.approx(seconds, abs=0.001)  # rounded to milliseconds
    far, plain, near = (row["quality"] for row in report["rows"])
    assert report["rows"][1]["speedup"] == 1.0
    assert plain.keys() == {"identity"}
    assert near["psnr"]["mean"] > far["psnr"]["mean"]
    assert not near["decoded"]
    assert len(near["identity"]["per_frame"]) == 1
    assert read_video(tmp_path / "sweep" / "sweep_42_0000.mp4").fps == 8


def test_interrupted_at_the_third_then_resumed(capsys, tmp_path, monkeypatch, calls):
    arguments = (*COMMON, "--rel_l1_thresh", 0, 0.1, 0.2, 0.3, "--output_path", tmp_path)
    counting = sampler.denoise

    def interrupted(*args, **kwargs):
        if calls["denoise"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return counting(*args, **kwargs)

    monkeypatch.setattr(sampler, "denoise", interrupted)
    code, output, error = main(capsys, *arguments)
    assert code == 130
    assert error.endswith("interrupted\n")
    assert "2 of 4 videos: see --resume" in output
    assert names(tmp_path) == [
        *("42_0.0_0000.json", "42_0.0_0000.mp4", "42_0.1_0000.json", "42_0.1_0000.mp4"),
        *("sweep_42_0000.json", "sweep_42_0000.md"),  # and nothing that takes seconds to draw
    ]
    monkeypatch.setattr(sampler, "denoise", counting)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    calls.clear()
    code, output, _ = main(capsys, *arguments, "--resume")
    assert code == 0
    assert calls["denoise"] == 2
    assert output.count("done before") == 2
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    rows = read_record(tmp_path, "sweep_42_0001.json")["rows"]
    assert [row["video"] for row in rows] == [
        *("42_0.0_0000", "42_0.1_0000", "42_0.2_0000", "42_0.3_0000")
    ]
    # Threshold 0 came from its mp4: the figures say so.
    assert [row["quality"].get("decoded") for row in rows] == [None, False, True, True]
    assert "decoded from an earlier mp4" in output

    calls.clear()
    backwards = (*COMMON, "--rel_l1_thresh", 0.3, 0.2, 0.1, 0, "--output_path", tmp_path)
    code, output, _ = main(capsys, *backwards, "--resume", "--quiet")
    paths = [f"{tmp_path}/42_{threshold}_0000.mp4" for threshold in (0.3, 0.2, 0.1, 0.0)]
    assert (code, output.split()) == (0, paths), "in the order asked for"
    assert not calls["open_models"]
    assert (tmp_path / "sweep_42_0002.md").is_file()


def test_compared_with_earlier_videos(capsys, tmp_path, monkeypatch, calls):
    """Sampled before threshold 0 was thought of; then with the frames of threshold 0's mp4."""
    common = (*COMMON, "--output_path", tmp_path)
    main(capsys, *common, "--rel_l1_thresh", 0.2)
    assert main(capsys, *common, "--rel_l1_thresh", 0.2, 0, "--resume")[0] == 0
    assert calls["denoise"] == 2
    row, _ = read_record(tmp_path, "sweep_42_0000.json")["rows"]
    assert row["speedup"]
    assert row["quality"]["psnr"]["mean"] > 10
    assert row["quality"]["decoded"]

    decode, frames = sampler.decode, []
    monkeypatch.setattr(sampler, "decode", lambda *a: frames.append(decode(*a)) or frames[-1])
    code, output, _ = main(capsys, *common, "--rel_l1_thresh", 0, 0.3, "--resume")
    assert code == 0
    assert "decoded from an earlier mp4" in output
    (sampled,) = frames
    earlier = read_video(tmp_path / "42_0.0_0000.mp4").frames
    expected = quality.compare(np.stack([np.array(picture) for picture in sampled]), earlier)
    found = read_record(tmp_path, "42_0.3_0000.json")["quality"]
    assert {name: found[name] for name in expected} == expected
    assert found["decoded"]


def test_resume_does_not_redo_what_cannot_differ(capsys, tmp_path, calls, tiny):
    """The same pixels and files under other names; settings of reuse where nothing is reused."""
    pictures.load_image("astronaut").save(tmp_path / "face.png")
    (tmp_path / "own.json").write_text('{"values": [0, 0, 0, 0, 1]}')
    first = (*SHORT, "--rel_l1_thresh", 0, "--resume", "--output_path", tmp_path)
    for more in (
        (),
        ("--image", tmp_path / "face.png"),
        ("--ckpts_path", tiny),
        ("--coefficients", tmp_path / "own.json", "--reuse", "forecast"),
        ("--retain_first", 3, "--retain_last", 2, "--max_reuse", 1),
    ):
        assert main(capsys, *first, "--image", "astronaut", "--prompt", "a man", *more)[0] == 0
        assert calls["denoise"] == 1, more


def test_a_video_that_is_no_more_whole_is_sampled_again(capsys, tmp_path, calls):
    sweep = (*SHORT, "--rel_l1_thresh", 0, 0.1, "--resume", "--output_path", tmp_path)
    main(capsys, *sweep)
    whole = (tmp_path / "42_0.0_0000.mp4").read_bytes()
    (tmp_path / "42_0.0_0000.mp4").write_bytes(whole[:100])
    assert main(capsys, *sweep)[0] == 0
    assert calls["denoise"] == 3
    assert (tmp_path / "42_0.0_0001.mp4").read_bytes() == whole


def test_jobs_share_faces_and_prompts(capsys, tmp_path, calls, no_embeddings):
    """Their prompts are told apart."""
    astronaut = pictures.load_image("astronaut")
    astronaut.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.png")
    lines = [
        {"prompt": "a man"},
        {"prompt": "a girl in the rain", "image": str(tmp_path / "other.png")},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    calls.clear()
    jobs = ("--jobs", tmp_path / "jobs.jsonl", "--rel_l1_thresh", 0, 0.1)
    code, output, _ = main(capsys, *SHORT, *jobs, "--output_path", tmp_path)
    assert code == 0
    assert calls == Counter(
        load_image=3, load_face_models=1, find_identity=2, load_pipeline=1, open_models=1,
        embed_text=3, prepare=2, denoise=4, decode=4,
    )  # fmt: skip
    assert "42_0.1_0001" in output
    report = (tmp_path / "sweep_42_0000.md").read_text()
    for name in ('astronaut, "a man"', 'other.png, "a girl in the rain"'):
        assert output.count(name) == 2
        assert report.count(f"| {name} |") == 2
    rows = read_record(tmp_path, "sweep_42_0000.json")["rows"]
    assert [row["group"] for row in rows] == [0, 0, 1, 1]


def test_a_long_list_keeps_no_frames_but_those_it_compares(capsys, tmp_path, monkeypatch):
    """Past the limit, here set to two: table and records as ever, no figure, no grid."""
    monkeypatch.setattr(comparison, "MOST_SIDE_BY_SIDE", 2)
    kept, add = [], comparison.Comparison.add

    def counting(self, *args, **kwargs):
        judged = add(self, *args, **kwargs)
        kept.append(sum(finished.frames is not None for finished in self.videos.values()))
        return judged

    monkeypatch.setattr(comparison.Comparison, "add", counting)
    sweep = (*COMMON, "--num_infer_steps", 12, "--seed", 1, 2, "--rel_l1_thresh", 0.3, 0)
    assert main(capsys, *sweep, "--output_path", tmp_path)[0] == 0
    assert kept == [1, 2, 1, 2]
    reports = [name for name in names(tmp_path) if name.startswith("sweep")]
    assert reports == ["sweep_1_0000.json", "sweep_1_0000.md"]
    for row in read_record(tmp_path, reports[0])["rows"]:
        assert row["speedup"]
        if row["rel_l1_thresh"]:
            assert not row["quality"]["decoded"]
