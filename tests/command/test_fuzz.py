"""Arguments, jobs and coefficients of every kind: what is wrong is one line, never a traceback."""

import contextlib
import io
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import main, refused

from teacache.base import errors
from teacache.base.errors import ArgumentError
from teacache.request.arguments import build_parser, parse_arguments
from teacache.request.values import Request
from teacache.run import loop as run

OPTIONS = sorted(
    option
    for action in build_parser()._actions
    for option in action.option_strings
    if option not in ("-h", "--help")
)
VALUES = st.one_of(
    st.text(max_size=20),
    st.text(min_size=250, max_size=300),
    st.integers().map(str),
    st.integers(0, 100).map(str),
    st.sampled_from(["8192", str(2**31), str(2**63), str(10**30), "1" * 5000, "1e308", "1e-308"]),
    st.floats().map(str),
    st.floats(0, 10).map(str),
    st.sampled_from(["", " ", "-1", "1e400", "nan", "0x10", "1_000", "٣", "tiny", "astronaut",
                     "cuda:99", "http://", "http://[", "://", "/", "\x00", "\udcff", "a\nb"]),
)  # fmt: skip


PLAUSIBLE = {
    "--rel_l1_thresh": st.floats(0, 1) | st.floats(0, 1e308),
    "--computed_steps": st.integers(1, 60),
    "--reuse": st.sampled_from(["residual", "forecast"]),
    "--scheduler": st.sampled_from(["dpm", "ddim"]),
    "--seed": st.integers(0, 2**63 - 1),
    "--num_infer_steps": st.integers(1, 1200),
    "--num_frames": st.integers(1, 60) | st.integers(1, 10**12),
    "--width": st.integers(1, 20).map(lambda n: n * 16) | st.just(112),
    "--height": st.integers(1, 20).map(lambda n: n * 16) | st.just(96),
    "--guidance_scale": st.floats(0, 20) | st.floats(0, 1e308),
    "--dtype": st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    "--offload": st.sampled_from(["auto", "none", "blocks", "model", "sequential"]),
    "--attention": st.sampled_from(["native", "cudnn", "flash", "sage", "flex", "xla"]),
    "--output_path": st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=30),
}


def with_values(option):
    """An option with values of any kind, or one of its own kind where it has such."""
    anything = st.lists(VALUES, max_size=3)
    own = PLAUSIBLE.get(option, VALUES).map(lambda value: [str(value)])
    return st.tuples(st.just(option), st.one_of(own, own, anything))


def test_a_whole_command(capsys, tmp_path, monkeypatch, tiny):
    """As far as the loading of models, in which no argument is looked at any more; or the plan."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    orders = []
    monkeypatch.setattr(run, "run", lambda order, *arguments: orders.append(order))

    @given(st.lists(st.sampled_from(OPTIONS).flatmap(with_values), max_size=4), st.booleans())
    @example([("--image", ["http://["])], False)
    @example([("--seed", [str(2**63)])], False)
    @example([("--num_infer_steps", ["1000"])], True)
    @example([("--num_frames", [str(10**30)])], False)
    @example([("--num_frames", [str(10**9 + 1)])], False)
    @example([("--width", [str(2**63)])], True)
    @example([("--rel_l1_thresh", ["1e308"])], True)
    @example([("--computed_steps", ["1"])], True)
    @example([("--computed_steps", ["12"]), ("--num_infer_steps", ["8"])], False)
    @example([("--reuse", ["forecast"]), ("--scheduler", ["ddim"])], True)
    def command(arguments, plan):
        argv = [word for option, values in arguments for word in (option, *values)]
        argv += ["--plan"] * plan
        code, _, error = main(capsys, "--ckpts_path", "tiny", *argv)
        assert code in (0, 2)
        said = [line for line in error.splitlines() if not line.startswith("warning: ")]
        assert len(said) == (code == 2)
        assert not said or said[0].startswith("error: ")
        while orders:
            assert all(0 <= job.seed < 2**63 for job in orders.pop().jobs)

    command()


@given(st.binary(max_size=60), st.sampled_from([".json", ".csv", ".jsonl"]))
@example(b"seed\n\x00", ".csv")
@example(b'{"values": [1e999, 0, 0, 0, 0]}', ".json")
@example(b"[" * 100_000, ".json")
@example(b'{"seed": 1' + b"0" * 5000 + b"}", ".jsonl")
def test_files(tmp_path, content, ending):
    path = tmp_path / f"file{ending}"
    path.write_bytes(content)
    for option in ("--coefficients", "--jobs"):
        error = io.StringIO()
        with contextlib.suppress(ArgumentError), contextlib.redirect_stderr(error):
            try:
                Request.of(parse_arguments([option, str(path)]))
            except SystemExit as end:
                assert (end.code, error.getvalue().count("\n")) == (2, 1)  # noqa: PT017


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (" \t\n ", "is empty: say what the video shows"),
        ("a\x00b", "holds the control character U+0000"),
        ("caf\udce9", "holds bytes that are not UTF-8"),
    ],
)
def test_prompts_that_are_refused(capsys, tmp_path, prompt, complaint):
    tiny = ("--ckpts_path", "tiny")
    error = refused(capsys, *tiny, "--prompt", prompt)
    assert error == f"error: argument --prompt: {complaint} (see --help)"
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": prompt}))
    error = refused(capsys, *tiny, "--jobs", tmp_path / "jobs.jsonl")
    assert error == f"error: --jobs {tmp_path}/jobs.jsonl, line 1: prompt: {complaint}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host/a@b.png", "https://***@host/a@b.png"),
        ("https://me:my secret@host/a.png", "https://***@host/a.png"),
        ("https://me:sec/ret@host/a.png", "https://***@host/a.png"),
        ("https://me:sec?r@et@host/a.png", "https://***@host/a.png"),
        ("https://host:80/a.png is no image", "https://host:80/a.png is no image"),
        ("photo@home.png?x=secret#1", "photo@home.png?x=secret#1"),  # a file's name
        ("https://host/a.png?raw=true#access=secret", "https://host/a.png?raw=true#***"),
        ("http://h/a?w=640&token=s3cr3t#top", "http://h/a?w=640&token=***#***"),
        ("http://h/?X-Amz-Signature=s&Expires=60", "http://h/?X-Amz-Signature=***&Expires=60"),
        ("http://h/?X-Amz-Credential=s%2Fx&Policy=s", "http://h/?X-Amz-Credential=***&Policy=***"),
        ("http://h/?jwt=s3cr3t&tok%65n=s3cr3t&empty=", "http://h/?jwt=***&tok%65n=***&empty="),
        ("http://h/?s3cr3t", "http://h/?***"),
    ],
)
def test_what_lets_a_reader_in_is_left_out(url, shown):
    assert errors.without_credentials(url) == shown
