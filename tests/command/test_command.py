"""The command, as a user runs it."""

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import start
from support import PROMPT, ROOT, encoded, main, refused

from teacache.inputs import photograph as pictures
from teacache.request.arguments import parse_arguments
from teacache.results.video import read_video, write_video

OF_FILES = ("--ckpts_path", "--output_path", "--image", "--coefficients", "--jobs")
QUICK = ("--ckpts_path", "tiny", "--num_frames", 1)
SCRIPT = ROOT / "teacache_sample_video.py"


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "photograph.png"
    pictures.load_image("astronaut").save(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, photograph):
    """One run from a cold start, standard error on a terminal: (folder, output, what it showed)."""
    folder = tmp_path_factory.mktemp("out")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    asked = ("--ckpts_path", tiny, "--rel_l1_thresh", "0.15", "--image", photograph)
    asked += ("--prompt", PROMPT, "--output_path", folder)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, SCRIPT, *asked], stdout=said, stderr=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # of Linux, where the other end has closed
            while data := os.read(ours, 65536):
                shown += data
        os.close(ours)
        assert process.wait(60) == 0, shown.decode()
        said.seek(0)
        return folder, said.read(), shown.decode()


def test_photograph_to_mp4(run):
    folder, _, _ = run
    assert sorted(p.name for p in folder.iterdir()) == ["42_0.15_0000.json", "42_0.15_0000.mp4"]
    video = read_video(folder / "42_0.15_0000.mp4")
    assert video.frames.shape == (13, 96, 112, 3)
    assert video.fps == 8
    assert video.frames.std() > 10, "not a flat picture"
    assert np.abs(video.frames[0].astype(int) - video.frames[-1]).mean() > 1, "something moves"


def test_the_record_of_a_run(run, tiny, photograph):
    folder, output, _ = run
    record = json.loads((folder / "42_0.15_0000.json").read_text())
    assert (record["num_frames"], record["height"], record["width"]) == (13, 96, 112)
    settings = {
        "rel_l1_thresh": 0.15, "seed": 42, "num_infer_steps": 50, "guidance_scale": 6.0,
        "ckpts_path": str(tiny), "image": str(photograph), "output_path": str(folder),
        "prompt": PROMPT, "negative_prompt": "", "device": "cpu", "dtype": "float32",
        "offload": "none", "vae_tiling": False, "device_name": "cpu",
    }  # fmt: skip
    assert {name: record[name] for name in settings} == settings
    assert sorted(record["computed_steps"] + record["reused_steps"]) == list(range(50))
    assert 5 < len(record["computed_steps"]) < 45
    assert len(record["distances"]) == len(record["rescaled"]) == 50
    assert record["distances"][0] is None
    assert all(0.00746 < x < 0.32997 for x in record["distances"][1:])
    polynomial = np.poly1d(record["coefficients"]["values"])
    assert record["rescaled"][1:] == polynomial(record["distances"][1:]).tolist()
    assert set(record["versions"]) == {"teacache", "torch", "diffusers", "transformers"}
    assert record["peak_memory_bytes"] > 2**28, "torch alone takes a quarter of a GiB"
    *stages, total = record["seconds"].values()
    assert sum(stages) <= total
    assert f"{len(record['computed_steps'])} computed" in output


def test_says_a_line_for_each_stage_and_a_summary(run):
    folder, output, _ = run
    lines = output.splitlines()
    stages = [line.split()[0] for line in lines if line.endswith(" s")]
    assert stages == [
        *("checkpoint", "torch", "image", "schedule", "diffusers", "identity", "text", "loading"),
        *("encoding", "denoising", "decoding", "writing"),
    ]
    assert lines[-5].split() == ["video", str(folder / "42_0.15_0000.mp4")]
    assert lines[-4].startswith("steps ")
    assert lines[-3] == "not exact   reuse residual"
    assert lines[-2].startswith("seconds ")
    assert lines[-1].startswith("peak memory ")


def test_bar_counts_computed_and_reused_steps_and_nothing_else_is_shown(run):
    _, _, shown = run
    assert "denoising: " in shown
    assert "computed=" in shown
    assert "reused=" in shown
    redraws = [line for line in shown.replace("\n", "\r").split("\r") if line.strip("\x1b[A ")]
    assert all("denoising: " in line for line in redraws), redraws


def test_two_runs_at_once_in_one_folder(tmp_path, tiny):
    """Same seed and threshold: two names, two whole videos, the same frames."""
    arguments = ("--ckpts_path", "tiny", "--num_infer_steps", 8, "--output_path", tmp_path)
    processes = [start(*arguments) for _ in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert error == "", "where standard error is no terminal it stays silent"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("42_0.1_0000.json", "42_0.1_0000.mp4", "42_0.1_0001.json", "42_0.1_0001.mp4")
    ]
    first, second = (read_video(tmp_path / f"42_0.1_000{n}.mp4").frames for n in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ((SCRIPT,), ("--rel_l1_thresh=-1",)),
        ((SCRIPT,), ("--output_path", SCRIPT)),
        (("-I", SCRIPT), ("--help",)),  # which leaves the script's folder out of the path
        *((("-m", f"teacache.{room}"), ("--help",)) for room in ("benchmark", "fit", "cluster")),
    ],
)
def test_what_is_said_at_once_imports_nothing_heavy(tmp_path, program, arguments):
    """From a cold start, of each program."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *program, *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    assert (done.returncode, len(said)) == ((0, 0) if "--help" in arguments else (2, 1))
    assert done.stdout.startswith("usage: ") == ("--help" in arguments)
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "diffusers", "transformers", "PIL", "skimage", "ray"}


def test_published_arguments_keep_names_and_defaults():
    defaults = vars(parse_arguments([]))
    published = {"rel_l1_thresh": [0.1], "seed": [42], "num_infer_steps": 50}
    published |= {"ckpts_path": "BestWishYsh/ConsisID-preview"}
    published |= {"output_path": Path("./teacache_results")}
    assert {name: defaults[name] for name in published} == published
    assert defaults["image"].startswith("https://github.com/PKU-YuanGroup/ConsisID/")
    assert defaults["image"].endswith("2.png?raw=true")
    assert defaults["prompt"].startswith("The video captures a boy walking along a city street")


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--rel_l1_thresh", wrong) for wrong in ("-0.1", "nan", "inf", "much")),
        *(("--num_infer_steps", "2.5"), ("--seed", "-1"), ("--height", "0"), ("--device", "gpu")),
        *(("--vae_tiling", "maybe"), ("--guidance_scale", "nan"), ("--dtype", "int8")),
        *(("--offload", "disk"), ("--coefficients", "/nowhere.json"), ("--rel_l1", "0.1")),
    ],
)
def test_wrong_arguments_get_one_line_and_2(capsys, arguments):
    assert arguments[0] in refused(capsys, *arguments)


def test_wrong_input_gets_one_line_and_2(capsys, tmp_path, tiny):
    (tmp_path / "file").touch()
    (tmp_path / "jobs.jsonl").write_text('{"seed": 1}\n{"seed"}\n')
    defaults = ("--ckpts_path", "tiny", "--output_path", tmp_path / "out")
    for arguments, complaint in (
        *(((option, ""), f"argument {option}: is empty (see --help)") for option in OF_FILES),
        (("--image", "a" * 300), "there is no such file"),
        (("--ckpts_path", "a" * 300), "File name too long"),
        (("--output_path", "caf\udce9"), "holds bytes that are not UTF-8"),
        (("--device", "cuda:٣"), "is not auto, cpu, cuda or cuda:N"),
        (("--num_frames", 10**8 + 1), "of 112x96 take 12016 GiB of memory, and this"),
        (("--ckpts_path", tmp_path / "none"), "no such folder"),
        (("--output_path", tmp_path / "file"), "is a file"),
        (("--output_path", tmp_path / "video.MP4"), "is the name of a video: name its folder"),
        (("--prompt", tmp_path / "file"), 'is a file: use its text, "$(cat '),
        (("--negative_prompt", "README.md"), "is a file: use its text"),
        (("--num_frames", 11), "nearest are 9 and 12"),
        (("--width", 160), "112x96 only"),
        (("--num_infer_steps", 2000), "the scheduler knows 1000 timesteps"),
        (("--device", "cuda:7"), "0 CUDA GPUs"),
        (("--offload", "model"), "this is a CPU"),
        (("--jobs", tmp_path / "jobs.jsonl"), "line 2: no JSON"),
    ):
        assert complaint in refused(capsys, *defaults, *arguments), arguments
    assert not (tmp_path / "out").exists()


def test_full_size_without_a_gpu_says_what_there_is_instead(capsys, tmp_path, monkeypatch, light):
    monkeypatch.chdir(tmp_path)
    with (light / "transformer" / "more.safetensors").open("wb") as file:
        file.truncate(5 * 2**30)  # sparse: takes no room
    for checkpoint in ("checkpoint", "BestWishYsh/ConsisID-preview"):
        error = refused(capsys, "--ckpts_path", checkpoint)
        for words in ("CUDA GPU", "--ckpts_path tiny", "--device cpu"):
            assert words in error
    assert not (tmp_path / "BestWishYsh").exists(), "nothing is downloaded first"


def test_threshold_0_writes_the_plain_pipelines_video(capsys, tmp_path, pipe, sample):
    """Byte for byte what is encoded from the plain pipeline's frames."""
    write_video(sample(pipe, steps=6, output_type="pil")[0], tmp_path / "plain.mp4")
    asked = ("--ckpts_path", "tiny", "--rel_l1_thresh", 0, "--num_infer_steps", 6)
    assert main(capsys, *asked, "--prompt", PROMPT, "--output_path", tmp_path)[0] == 0
    assert encoded(tmp_path / "42_0.0_0000.mp4") == encoded(tmp_path / "plain.mp4")


def test_every_other_argument_has_its_effect(capsys, tmp_path, photograph):
    """Each one alone gives another video than without it, and is not taken for it by --resume.

    So does another picture of the same name.
    """
    image = tmp_path / "image.png"
    image.write_bytes(photograph.read_bytes())
    common = (*QUICK, "--num_infer_steps", 2, "--output_path", tmp_path, "--image", image)

    def sampled(*arguments: object) -> Path:
        code, output, _ = main(capsys, *common, "--resume", "--quiet", *arguments)
        assert code == 0
        return Path(output.strip())

    plain = sampled()
    assert sampled() == plain
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    for arguments in (
        (),
        ("--negative_prompt", "rain"),
        ("--prompt", "a man"),
        ("--guidance_scale", 1),
        ("--seed", 7),
        ("--dtype", "bfloat16"),
        ("--vae_tiling",),
        ("--quality", 0),
    ):
        other = sampled(*arguments)
        assert not np.array_equal(read_video(other).frames, read_video(plain).frames), arguments
        plain = plain if arguments else other
    assert len(list(tmp_path.glob("*.mp4"))) == 9


def test_coefficients_limits_and_record(capsys, tmp_path, monkeypatch):
    """In plan, run and record, and with the home directory for a `~` that bash leaves."""
    monkeypatch.setenv("HOME", str(tmp_path))
    # p(x) = 0.01 whatever x is: a threshold of 0.035 reuses three steps for each computed one.
    (tmp_path / "flat.json").write_text('{"values": [0, 0, 0, 0, 0.01], "source": "flat"}')
    asked = (*QUICK, "--rel_l1_thresh", 0.035, "--num_infer_steps", 10, "--width", 112)
    asked += ("--coefficients=~/flat.json", "--output_path=~/videos", "--height", 96)
    assert "■□□□■□□□■■" in main(capsys, *asked, "--plan")[1]
    asked += ("--retain_first", 2, "--retain_last", 3, "--max_reuse", 2)
    assert "■■□□■□□■■■" in main(capsys, *asked, "--plan")[1]
    code, output, _ = main(capsys, *asked)
    assert code == 0
    assert "6 computed, 4 reused" in output
    (path,) = (tmp_path / "videos").glob("42_0.035_*_0000.json")
    record = json.loads(path.read_text())
    assert record["computed_steps"] == [0, 1, 4, 7, 8, 9]
    assert 0 < record["reused_step_seconds"] < record["computed_step_seconds"]
    values = {"values": [0, 0, 0, 0, 0.01], "fitted_range": None, "source": "flat"}
    assert record["coefficients"] == values
    assert (record["retain_first"], record["retain_last"], record["max_reuse"]) == (2, 3, 2)


def test_says_why_nothing_was_reused(capsys, tmp_path):
    code, output, error = main(capsys, *QUICK, "--num_infer_steps", 3, "--output_path", tmp_path)
    assert code == 0
    assert "nothing was reused: the coefficients cover" in output
    assert error.count("do not cover") == 1
