"""Jobs from the command line and from files, and their parts: shards and tasks."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from teacache.base.errors import ArgumentError, without_credentials
from teacache.core.rule import Limits, schedule
from teacache.preflight.setup import Shot
from teacache.request.arguments import parse_arguments
from teacache.request.job import Job
from teacache.request.readers import Shard
from teacache.request.repeat import command_of
from teacache.request.shards import part_of, tasks, units
from teacache.request.values import Request
from teacache.run.loop import in_order

DIGESTS = {"astronaut": "4a"}
COMMON = ["--ckpts_path", "tiny", "--prompt", "a man"]


def requested(*arguments: object) -> Request:
    return Request.of(parse_arguments([*COMMON, *map(str, arguments)]))


def jobs(*arguments: object) -> list[Job]:
    return list(requested(*arguments).jobs)


def test_every_seed_with_every_threshold():
    assert jobs() == [Job("astronaut", "a man", "", 42, 50, 0.1)]
    found = jobs("--seed", 1, 2, "--rel_l1_thresh", 0.2, 0)
    assert [(job.seed, job.rel_l1_thresh) for job in found] == [(1, 0.2), (1, 0), (2, 0.2), (2, 0)]
    assert len(jobs("--seed", 1, 1, "--rel_l1_thresh", 0.1, 0.10)) == 1, "the same is asked once"


def ordered(*arguments):
    plan = schedule([None, 0.1], 0)
    shots = [Shot(job, DIGESTS[job.image], plan) for job in jobs(*arguments)]
    return [shot.job for shot in in_order(shots)]


def test_order_of_sampling(tmp_path):
    """Face and noise together, of each group threshold 0 first."""
    found = ordered("--seed", 7, 3, "--rel_l1_thresh", 0.2, 0, 0.1)
    assert [(job.seed, job.rel_l1_thresh) for job in found] == [
        *((7, 0), (7, 0.2), (7, 0.1), (3, 0), (3, 0.2), (3, 0.1))
    ]
    (tmp_path / "jobs.csv").write_text("prompt,seed\na,1\na,2\nb,1\n")
    found = ordered("--jobs", tmp_path / "jobs.csv")
    assert [(job.prompt, job.seed) for job in found] == [("a", 1), ("b", 1), ("a", 2)]


def test_json_lines(tmp_path):
    file = tmp_path / "jobs.jsonl"
    file.write_text(
        '{"prompt": "über \\u4eba", "seed": 7}\n\n{"rel_l1_thresh": 0.2, "num_infer_steps": 8}\n',
        encoding="utf-8",
    )
    assert jobs("--jobs", file, "--rel_l1_thresh", 0, 0.1) == [
        Job("astronaut", "über 人", "", 7, 50, 0.0),
        Job("astronaut", "über 人", "", 7, 50, 0.1),
        Job("astronaut", "a man", "", 42, 8, 0.2),
    ]


def test_csv(tmp_path):
    file = tmp_path / "jobs.csv"
    file.write_text('prompt,seed,negative_prompt\n"one,\ntwo",7,\n,, \n\nthree,,rain\n,,\n')
    assert jobs("--jobs", file) == [
        Job("astronaut", "one,\ntwo", "", 7, 50, 0.1),
        Job("astronaut", "three", "rain", 42, 50, 0.1),
    ]


def test_a_line_that_says_what_is_computed_takes_nothing_else(tmp_path):
    """Each of its own choices is a video; the command line's are for the other lines."""
    file = tmp_path / "jobs.jsonl"
    file.write_text(
        '{"seed": 1, "computed_steps": 12}\n{"seed": 2, "rel_l1_thresh": 0.2}\n{"seed": 3}\n'
        '{"seed": 4, "computed_steps": 12, "rel_l1_thresh": 0}\n'
    )
    found = jobs("--jobs", file, "--rel_l1_thresh", 0.1, "--computed_steps", 8)
    assert [(job.seed, job.which, job.reuse) for job in found] == [
        (1, "forecast 12", "forecast"),
        (2, "rel_l1_thresh 0.2", "residual"),
        *((3, "rel_l1_thresh 0.1", "residual"), (3, "forecast 8", "forecast")),
        *((4, "rel_l1_thresh 0.0", "residual"), (4, "forecast 12", "forecast")),
    ]


def test_limits_and_reuse_have_names_where_they_change_something(tmp_path):
    """In a line, else those of the command line."""
    file = tmp_path / "jobs.csv"
    file.write_text(
        "rel_l1_thresh,computed_steps,reuse,retain_first,max_reuse\n0.2,,,,\n0.2,,,1,\n0.2,,,3,2\n"
        "0.2,,forecast,1,2\n,12,,1,\n,12,,3,\n0,,forecast,3,2\n,,,,\n0.2,,residual,3,2\n"
    )
    found = jobs("--jobs", file, "--retain_first", 5)
    assert [job.which for job in found] == [
        "rel_l1_thresh 0.2, retain_first 5",
        "rel_l1_thresh 0.2",
        "rel_l1_thresh 0.2, retain_first 3, max_reuse 2",
        "rel_l1_thresh 0.2 forecast, max_reuse 2",
        *("forecast 12", "forecast 12, retain_first 3", "rel_l1_thresh 0.0"),
    ]
    assert [job.limits.retain_first for job in found] == [5, 1, 3, 1, 1, 3, 1]
    (tmp_path / "list.json").write_text("[1, 2]")
    (listed,) = jobs("--schedule", tmp_path / "list.json", "--retain_last", 3)
    assert (listed.which, listed.limits) == ("listed 4", Limits())


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--seed", "random", "--rel_l1_thresh", 0),
        ('--prompt=-a man\'s "hat"\n$HOME é', "--lora", "a/b:0.5", "--lora", "c", "--compile"),
        ("--rel_l1_thresh", 0.25, "--reuse", "forecast", "--vae_tiling", "--guidance_scale", 1),
        ("--computed_steps", 12, "--height", 96, "--scheduler", "ddim", "--vae_tiling", "off"),
        ("--computed_steps", 12, "--reuse", "residual", "--max_reuse", 3, "--negative_prompt", "x"),
        ("--schedule", "RECORD", "--retain_last", 3, "--quantize", "fp8", "--num_gpus", 2),
        ("--coefficients", "RECORD", "--num_infer_steps", 9, "--dtype", "float16"),
        ("--image", "https://me:secret@host/a.png?key=secret&raw=true", "--output_path", "a b"),
    ],
)
def test_a_command_asks_for_the_same_video(tmp_path, arguments):
    """The record's: parsed again it is the same job, on the same machine, into the same folder."""
    path = tmp_path / "record.json"
    own = {"values": [0.0, 0.0, 0.0, 0.0, 0.01], "source": "own"}
    path.write_text(json.dumps({"computed_steps": [0, 3, 49], "coefficients": own}))
    words = [path if word == "RECORD" else word for word in arguments]
    request = Request.of(parse_arguments([*COMMON, "--device", "cuda:1", *map(str, words)]))
    (job,) = request.jobs
    shown = without_credentials(job.image)
    command = command_of(job, request.options, path, vae_tiling=False)
    program, script, *again = shlex.split(command)
    assert (program, script) == ("python3", "teacache_sample_video.py")
    assert "secret" not in command
    same = dataclasses.replace(job, image=shown)
    assert Request.of(parse_arguments(again)) == dataclasses.replace(
        request, jobs=(same,), all_jobs=(same,)
    )


def test_a_command_of_one_of_many_videos(tmp_path):
    """Fields of the line are in it, the flags for several videos are not; nor are defaults."""
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a girl", "computed_steps": 8}\n{"seed": 3}')
    request = Request.of(
        parse_arguments(["--ckpts_path", "tiny", "--jobs", str(tmp_path / "jobs.jsonl")])
    )
    fixed = request.options, tmp_path
    first, second = (command_of(job, *fixed, vae_tiling=False) for job in request.jobs)
    begin = "python3 teacache_sample_video.py --ckpts_path tiny"
    assert first == f"{begin} --prompt 'a girl' --computed_steps 8"
    assert second == f"{begin} --seed 3"
    tiled = command_of(request.jobs[1], *fixed, vae_tiling=True)
    assert tiled == f"{second} --vae_tiling on"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.jsonl", '{"seed": 1}\n{"seed": }', "line 2: no JSON"),
        ("a.jsonl", '{"seed": 1}\n\n[1]', "line 3: not an object"),
        ("a.jsonl", '[{"seed": 1}, {"seed": 2}]', "line 1: a JSON array: write one object a line"),
        ("a.csv", "seed;prompt\n1;a man\n", "fields are separated by commas"),
        ("a.csv", "seed\nx\n2\ny\n", "line 2: seed: 'x' is not .*; line 4: seed: 'y' is not"),
        ("a.jsonl", "x\n" * 7, "line 5: no JSON.*; and 2 more lines$"),
        ("a.jsonl", '{"rel_l1_thresh": NaN}', "line 1: rel_l1_thresh: 'nan'"),
        ("a.jsonl", '{"image": "nowhere.png"}', "line 1: image: nowhere.png: there is no such"),
        ("a.csv", "seed\n1\nx\n", "line 3: seed: 'x'"),
        ("a.csv", "reuse\nhope\n", "line 2: reuse: 'hope' is not residual or forecast"),
        ("a.jsonl", '{"max_reuse": 0}', "line 1: max_reuse: '0' is not a whole number, 1 or more"),
        ("a.jsonl", '{"image": "", "seed": 1}', "line 1: image: is empty"),
        ("a.jsonl", "{}\n{}\n", "holds no jobs"),
        ("a.csv", "seed\n1,2\n", "line 2: more fields than the header"),
        ("a.csv", "image,prompt\n,\nastronaut, \n", "line 3: prompt is empty"),
        ("a.csv", 'prompt,seed\na,1\n"op"en,2\n', "line 3: ',' expected after"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(ArgumentError, match=complaint) as error:
        jobs("--jobs", tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_images_are_looked_up_beside_the_file_first(tmp_path, monkeypatch):
    """Then from the current folder. A path that is absolute, a URL and `astronaut` stay."""
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("jobs/a.png", "a.png", "b.png"):
        Path(path).touch()
    images = ["a.png", "b.png", str(tmp_path / "a.png"), "https://example.org/a.png", "astronaut"]
    Path("jobs/all.csv").write_text("image\n" + "\n".join(images))
    assert [job.image for job in jobs("--jobs", "jobs/all.csv")] == ["jobs/a.png", *images[1:]]


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ArgumentError, match="cannot be read"):
            jobs("--jobs", path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ArgumentError, match="not UTF-8"):
        jobs("--jobs", tmp_path / "binary")


@pytest.mark.parametrize("count", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("thresholds", [(0.1,), (0, 0.1, 0.2)])
def test_every_video_is_in_one_shard(count, thresholds):
    sweep = ("--seed", *range(6), "--rel_l1_thresh", *thresholds)
    parts = [requested(*sweep, "--shard", f"{i}/{count}") for i in range(count)]
    everything = requested(*sweep).jobs
    sampled = [job for part in parts for job in part.jobs]
    assert sorted(sampled, key=everything.index) == list(everything)
    assert all(part.all_jobs == everything for part in parts)
    sizes = [len(part.jobs) for part in parts]
    assert max(sizes) - min(sizes) <= (len(thresholds) if count <= 6 else 1)


def test_what_is_compared_stays_together():
    """As long as no shard goes empty for it."""
    found = jobs("--seed", 1, 2, 3, "--rel_l1_thresh", 0.2, 0)
    assert [[job.seed for job in unit] for unit in units(found, 3)] == [[1, 1], [2, 2], [3, 3]]
    assert [len(unit) for unit in units(found, 4)] == [1] * 6
    assert [job.seed for job in part_of(found, Shard(1, 2))] == [2, 2]


@pytest.mark.parametrize("thresholds", [(0.1,), (0, 0.1, 0.2)])
@pytest.mark.parametrize("workers", [1, 8, 50])
def test_every_video_is_in_one_task(workers, thresholds):
    """The last are the smallest: a worker waits for the others no longer than for one unit."""
    every = jobs("--seed", *range(40), "--rel_l1_thresh", *thresholds)
    found = tasks(every, workers)
    assert [job for task in found for job in task] == every
    sizes = [len(task) for task in found]
    assert sizes[-1] == (len(thresholds) if workers <= 40 else 1)
    assert max(sizes) < 32 + len(thresholds)
    assert len(found) >= min(2 * workers, 40)


def test_groups_differ_in_more_than_the_schedule():
    one = Job("a.png", "p", "", 1, 50, 0.1)
    assert one.group == Job("a.png", "p", "", 1, 50, None).group
    assert one.group != Job("a.png", "p", "", 1, 49, 0.1).group


@pytest.mark.parametrize("value", ["8/8", "1", "/8", "-1/8", "0/0", "1.0/8"])
def test_a_shard_that_is_none(capsys, value):
    with pytest.raises(SystemExit) as end:
        parse_arguments([f"--shard={value}"])
    assert end.value.code == 2
    assert value in capsys.readouterr().err
