"""Jobs from the command line and from files."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time

import pytest
from records import record_of_a_video

from teacache.base.errors import ArgumentError, without_credentials
from teacache.command.arguments import parse_arguments
from teacache.command.jobs import Job
from teacache.command.order import Order, in_order
from teacache.command.recording import command_of

DIGESTS = {"astronaut": "4a"}
COMMON = ["--ckpts_path", "tiny", "--prompt", "a man"]


def jobs(*arguments: object) -> list[Job]:
    return list(Order.of(parse_arguments([*COMMON, *map(str, arguments)])).jobs)


def test_one_job_by_default():
    assert jobs() == [Job("astronaut", "a man", "", 42, 50, 0.1)]


def test_every_seed_with_every_threshold():
    found = jobs("--seed", 1, 2, "--rel_l1_thresh", 0.2, 0)
    assert [(job.seed, job.rel_l1_thresh) for job in found] == [(1, 0.2), (1, 0), (2, 0.2), (2, 0)]


def test_the_same_video_is_asked_for_once():
    assert len(jobs("--seed", 1, 1, "--rel_l1_thresh", 0.1, 0.10)) == 1


def test_order_of_sampling_puts_threshold_0_first_in_its_group():
    found = in_order(jobs("--seed", 7, 3, "--rel_l1_thresh", 0.2, 0, 0.1), DIGESTS)
    assert [(job.seed, job.rel_l1_thresh) for job in found] == [
        *((7, 0), (7, 0.2), (7, 0.1), (3, 0), (3, 0.2), (3, 0.1))
    ]


def test_a_long_list_is_ordered_at_once():
    """20,000 jobs, well within the 10 s that looking each up in a list takes."""
    found = jobs("--seed", *range(10_000), "--rel_l1_thresh", 0.2, 0)
    before = time.process_time()
    ordered = in_order(found, DIGESTS)
    assert time.process_time() - before < 5
    assert [(job.seed, job.rel_l1_thresh) for job in ordered[-2:]] == [(9999, 0), (9999, 0.2)]


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
    file.write_text('prompt,seed,negative_prompt\n"one, two",7,\nthree,,rain\n')
    assert jobs("--jobs", file) == [
        Job("astronaut", "one, two", "", 7, 50, 0.1),
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


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--computed_steps", 12, 8), ["forecast 12", "forecast 8"]),
        (("--computed_steps", 12, "--reuse", "residual"), ["residual 12"]),
        (("--rel_l1_thresh", 0, 0.2), ["rel_l1_thresh 0.0", "rel_l1_thresh 0.2"]),
        (("--rel_l1_thresh", 0, 0.2, "--reuse", "forecast"), ["rel_l1_thresh 0.0", "0.2 forecast"]),
    ],
)
def test_what_a_schedule_is_called(arguments, names):
    """At threshold 0 nothing is reused: there is one such video, however the others are reused."""
    found = jobs(*arguments)
    assert [job.which for job in found] == names
    assert all(job.reuse == "residual" for job in found if job.rel_l1_thresh == 0)


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
    order = Order.of(parse_arguments([*COMMON, "--device", "cuda:1", *map(str, words)]))
    (job,) = order.jobs
    shown = without_credentials(job.image)
    settings = record_of_a_video(image=shown).settings
    command = command_of(job, order, settings, path)
    program, script, *again = shlex.split(command)
    assert (program, script) == ("python3", "teacache_sample_video.py")
    assert "secret" not in command
    same = dataclasses.replace(job, image=shown)
    assert Order.of(parse_arguments(again)) == dataclasses.replace(
        order, jobs=(same,), all_jobs=(same,)
    )


def test_a_command_of_one_of_many_videos(tmp_path):
    """Fields of the line are in it, the flags for several videos are not; nor are defaults."""
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a girl", "computed_steps": 8}\n{"seed": 3}')
    order = Order.of(
        parse_arguments(["--ckpts_path", "tiny", "--jobs", str(tmp_path / "jobs.jsonl")])
    )
    settings = record_of_a_video(image="astronaut").settings
    first, second = (command_of(job, order, settings, tmp_path) for job in order.jobs)
    begin = "python3 teacache_sample_video.py --ckpts_path tiny"
    assert first == f"{begin} --prompt 'a girl' --computed_steps 8"
    assert second == f"{begin} --seed 3"
    tiled = dataclasses.replace(settings, vae_tiling=True)
    assert command_of(order.jobs[1], order, tiled, tmp_path) == f"{second} --vae_tiling on"


def test_text_comes_through_whole(tmp_path):
    """Line breaks inside a CSV field, and separators that only look like line breaks in JSON."""
    (tmp_path / "a.csv").write_text('prompt,seed\n"one\ntwo",7\n')
    assert jobs("--jobs", tmp_path / "a.csv")[0].prompt == "one\ntwo"
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\u2028two"}\r\n{"seed": 1}', encoding="utf-8")
    assert jobs("--jobs", tmp_path / "a.jsonl")[0].prompt == "one\u2028two"


def test_order_of_sampling_keeps_face_and_noise_together(tmp_path):
    lines = [
        '{"prompt": "a", "seed": 1}',
        '{"prompt": "a", "seed": 2}',
        '{"prompt": "b", "seed": 1}',
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    found = in_order(jobs("--jobs", tmp_path / "jobs.jsonl"), DIGESTS)
    assert [(job.prompt, job.seed) for job in found] == [("a", 1), ("b", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.jsonl", '{"seed": 1}\n{"seed": }', "line 2: no JSON"),
        ("a.jsonl", '{"seed": 1}\n\n[1]', "line 3: not an object"),
        ("a.jsonl", '{"seed": -1}', "line 1: seed: '-1' is not a whole number"),
        ("a.jsonl", '{"seed": true}', "line 1: seed must be text or a number"),
        ("a.jsonl", '{"seed": 1.5}', "line 1: seed: '1.5'"),
        ("a.jsonl", '{"rel_l1_thresh": NaN}', "line 1: rel_l1_thresh: 'nan'"),
        ("a.jsonl", '{"num_infer_steps": 0}', "line 1: num_infer_steps"),
        ("a.jsonl", '{"computed_steps": 0}', "line 1: computed_steps: '0'"),
        ("a.jsonl", '{"image": "nowhere.png"}', "line 1: image: nowhere.png: there is no such"),
        ("a.jsonl", '{"sede": 1}', "line 1: unknown field 'sede'"),
        ("a.jsonl", "", "holds no jobs"),
        ("a.csv", "seed\n1\nx\n", "line 3: seed: 'x'"),
        ("a.csv", "seed\n1,2\n", "line 2: more fields than the header"),
        ("a.csv", "sede\n1\n", "line 2: unknown field 'sede'"),
        ("a.csv", 'prompt\n"open\n', "line 2: unexpected end of data"),
        ("a.csv", 'prompt,seed\na,1\n"op"en,2\n', "line 3: ',' expected after"),
        ("a.csv", "seed\n", "holds no jobs"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(ArgumentError, match=complaint) as error:
        jobs("--jobs", tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ArgumentError, match="cannot be read"):
        jobs("--jobs", tmp_path / "none.csv")
    with pytest.raises(ArgumentError, match="cannot be read"):
        jobs("--jobs", tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ArgumentError, match="not UTF-8"):
        jobs("--jobs", tmp_path / "binary")
