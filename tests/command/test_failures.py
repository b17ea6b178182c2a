"""What happens when a run is interrupted, runs out of something, or goes wrong: nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from records import record_of_a_video
from safetensors import safe_open
from safetensors.torch import save_file
from support import PROMPT, ROOT, SIZE, handlers_given_back, main

from teacache.base import device, interruption
from teacache.base.errors import SamplingError
from teacache.checkpoint import loading
from teacache.command import run
from teacache.command.arguments import parse_arguments
from teacache.command.memory import out_of_memory
from teacache.command.order import Order
from teacache.comparison.comparison import Comparison
from teacache.inputs import conditioning
from teacache.inputs import identity as faces
from teacache.inputs.text import Text, embed_text
from teacache.results import slot, video
from teacache.results.output_folder import check_space
from teacache.results.record import Record
from teacache.results.video import read_video
from teacache.sampling import sampler

SWEEP = (
    *("--ckpts_path", "tiny", "--rel_l1_thresh", 0, 0.2, "--num_infer_steps", 4),
    *("--num_frames", 1),
)
TINY = ("--ckpts_path", "tiny", "--rel_l1_thresh", 0, "--num_infer_steps", 4)


def processes_of_session(session: int) -> list[str]:
    """The command lines of the processes of a session that still run, as Linux lists them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(its_session) == session and state != "Z":
                found.append((folder / "cmdline").read_bytes().decode())
    return [command for command in found if command]  # one that is about to end has none


@pytest.mark.parametrize(
    ("after", "steps", "number"),
    [
        ("checkpoint", 4, signal.SIGINT),
        ("torch", 4, signal.SIGTERM),
        ("diffusers", 4, signal.SIGTERM),
        ("text", 4, signal.SIGINT),
        ("encoding", 400, signal.SIGINT),
        ("encoding", 400, signal.SIGTERM),
        ("denoising", 4, signal.SIGHUP),
    ],
)
def test_interrupted(tmp_path, tiny, after, steps, number):
    """`after` is the stage whose end is waited for: the signal comes within the next one."""
    process = subprocess.Popen(
        [
            *(sys.executable, "teacache_sample_video.py", "--ckpts_path", "tiny"),
            *("--rel_l1_thresh", "0", "--num_infer_steps", str(steps)),
            *("--output_path", str(tmp_path)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith(after):
            break
    time.sleep(0.2)
    process.send_signal(number)
    sent = time.monotonic()
    _, error = process.communicate(timeout=60)
    # Two, and one for what else this machine does; alone it takes 0.6 s, nearly all of it Python's.
    assert time.monotonic() - sent < 3
    assert process.returncode == 130
    made = list(tmp_path.iterdir())
    if after == "denoising":  # which is what has been made
        (kept,) = made
        assert error == f"interrupted. The latents are kept, try again with --latents {kept}\n"
    else:
        assert (error, made) == ("interrupted\n", [])
    assert not processes_of_session(process.pid)


def test_interrupted_while_the_encoder_runs(capsys, tmp_path, monkeypatch):
    """The real encoder on its way, and no part of a file or process left of it."""
    import imageio_ffmpeg

    send = imageio_ffmpeg.write_frames
    seen = {}

    def encoders():
        return [
            c for c in processes_of_session(os.getsid(0)) if "ffmpeg" in c and str(tmp_path) in c
        ]

    def stop_in_the_middle(*args, **kwargs):
        generator = send(*args, **kwargs)
        sent = 0

        def forward():
            nonlocal sent
            try:
                value = next(generator)
                while True:
                    frame = yield value
                    sent += 1
                    if sent == 5:
                        seen["encoders"] = encoders()
                        os.kill(os.getpid(), signal.SIGTERM)
                        time.sleep(1)
                    value = generator.send(frame)
            finally:
                generator.close()

        return forward()

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", stop_in_the_middle)
    code, _, error = main(capsys, *TINY, "--output_path", tmp_path)
    kept = tmp_path / "42_0.0_0000.latents.safetensors"
    assert code == 130
    assert error == f"interrupted. The latents are kept, try again with --latents {kept}\n"
    assert seen["encoders"], "it was running"
    assert not encoders()
    assert list(tmp_path.iterdir()) == [kept]


@pytest.fixture
def given_back():
    """The signals' handlers, given back after the test."""
    with handlers_given_back() as handlers:
        yield handlers


def test_without_a_signal_nothing_changes(given_back):
    assert interruption.run_command(lambda: None) == 0
    assert {number: signal.getsignal(number) for number in given_back} == given_back


def test_a_terminal_that_is_closed_changes_no_exit_code(given_back, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as nobody_reads:
        code = None
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", nobody_reads)
            code = interruption.run_command(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert code == 130


def test_an_interruption_that_a_library_turns_into_its_own_error(given_back, capsys):
    """As transformers does where one of its modules cannot be imported to the end."""

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt as error:
            raise RuntimeError("failed to import") from error

    with_loading = lambda: run_within(loading.reading(Path("checkpoint")), work)  # noqa: E731
    for each in (work, with_loading):
        assert interruption.run_command(each) == 130
        assert capsys.readouterr().err == "interrupted\n"


def run_within(context, work):
    with context:
        work()


def test_an_interruption_that_the_encoder_hears_too(capsys, tmp_path, monkeypatch):
    """The terminal's Ctrl-C ends ffmpeg as well, whose broken pipe is then what is seen."""

    def broken_pipe(*args):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(slot, "write_video", broken_pipe)
    code, _, error = main(capsys, *TINY, "--num_frames", 1, "--output_path", tmp_path)
    assert code == 130
    assert error.splitlines()[-1] == (
        "interrupted. The latents are kept, try again with --latents "
        f"{tmp_path}/42_0.0_0000.latents.safetensors"
    )


def test_a_second_signal_on_the_way_out(tmp_path, tiny):
    """0.1 s later, while Python ends."""
    process = subprocess.Popen(
        [
            *(sys.executable, "teacache_sample_video.py", *map(str, TINY)),
            *("--output_path", str(tmp_path)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("diffusers"):
            break
    process.terminate()
    assert process.stderr.readline() == "interrupted\n"
    process.terminate()
    assert process.wait(60) == 130
    assert process.stderr.read() == ""


def test_another_signal_does_not_cut_cleaning_up_short(given_back):
    """An impatient second Ctrl-C, or a SIGTERM for all after one for each."""
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append(1)

    assert interruption.run_command(work) == 130
    assert cleaned


def test_a_later_signal_counts_again(given_back, monkeypatch):
    """Where a library has swallowed the first, and goes on."""
    monkeypatch.setattr(interruption, "CLEANING_SECONDS", 0.05)
    seen = []

    def work():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        seen.append("not ended")

    assert interruption.run_command(work) == 130
    assert not seen


def test_an_interruption_that_gets_lost_is_found_again(capsys, tmp_path, monkeypatch):
    """As in a destructor, whose exceptions Python drops."""

    class Lossy:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    prepare, denoised = sampler.prepare, []

    def loses_it(*args, **kwargs):
        Lossy()
        return prepare(*args, **kwargs)

    monkeypatch.setattr(sampler, "prepare", loses_it)
    monkeypatch.setattr(sampler, "denoise", lambda *a, **k: denoised.append(1))
    code, _, error = main(capsys, *TINY, "--output_path", tmp_path)
    assert (code, error) == (130, "interrupted\n")
    assert not denoised


def test_finished_videos_of_a_sweep_stay(capsys, tmp_path, monkeypatch):
    denoise, count = sampler.denoise, []

    def second_one_is_interrupted(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return denoise(*args, **kwargs)

    monkeypatch.setattr(sampler, "denoise", second_one_is_interrupted)
    code, output, error = main(capsys, *SWEEP, "--output_path", tmp_path)
    assert code == 130
    assert error.endswith("interrupted\n")
    assert "1 of 2 videos: see --resume" in output
    assert {path.name for path in tmp_path.iterdir()} == {
        *("42_0.0_0000.mp4", "42_0.0_0000.json"),
        *("sweep_42_0000.json", "sweep_42_0000.md"),  # and nothing that takes seconds to draw
    }


def no_memory(*args, **kwargs):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.6 GiB"
    )


@pytest.mark.parametrize(
    ("where", "stage", "advice"),
    [
        ((faces, "load_face_models"), "identity", "No further flag takes less"),
        ((conditioning, "embed_text"), "text", "--offload sequential"),
        ((run, "load"), "loading", "--offload blocks, --offload sequential"),
        (
            (sampler, "prepare"),
            "encoding",
            "--vae_tiling, --offload blocks, --offload sequential",
        ),
        ((sampler, "denoise"), "denoising", "--offload blocks, --offload sequential"),
    ],
)
def test_out_of_memory(capsys, tmp_path, monkeypatch, where, stage, advice):
    """As torch says it of a GPU: there is none here, to which the flags would apply."""
    monkeypatch.setattr(*where, no_memory)
    code, _, error = main(capsys, *TINY, "--output_path", tmp_path, "--no_reuse_conditioning")
    assert code == 2
    order = "Try, in this order: " if "--" in advice else ""
    assert error == f"error: out of memory while {stage} (asked for 2.50 GiB). {order}{advice}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "flags"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--vae_tiling"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "--vae_tiling"),
        (RuntimeError("CUDA error: out of memory"), "--vae_tiling"),
        (OSError(12, "Cannot allocate memory"), "--vae_tiling"),
    ],
)
def test_what_takes_less_memory(error, flags):
    machine = Order.of(parse_arguments(["--compile"])).machine
    assert device.is_out_of_memory(error)
    told = out_of_memory(error, "decoding", machine)
    assert told == f"out of memory while decoding. Try, in this order: {flags}"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_the_hosts_memory(capsys, tmp_path, monkeypatch, error):
    """Where nothing can be offloaded to."""

    def no_host_memory(*args, **kwargs):
        raise error

    monkeypatch.setattr(sampler, "denoise", no_host_memory)
    code, _, told = main(capsys, *TINY, "--output_path", tmp_path)
    assert (code, told) == (
        2,
        "error: out of memory while denoising. No further flag takes less\n",
    )
    monkeypatch.setattr(sampler, "prepare", no_host_memory)
    code, _, told = main(capsys, *TINY, "--output_path", tmp_path)
    assert (code, told) == (
        2,
        "error: out of memory while encoding. Try, in this order: --vae_tiling\n",
    )


def test_out_of_memory_while_decoding_keeps_the_latents(capsys, tmp_path, monkeypatch):
    expected = tmp_path / "expected"
    tiled = (*TINY, "--vae_tiling", "--fps", 12)
    assert main(capsys, *tiled, "--output_path", expected)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "decode", no_memory)
        code, _, error = main(capsys, *tiled, "--output_path", tmp_path)
    assert code == 2
    kept = tmp_path / "42_0.0_0000.latents.safetensors"
    assert error == (
        "error: out of memory while decoding (asked for 2.50 GiB). No further "
        f"flag takes less. The latents are kept, try again with "
        f"--latents {kept}\n"
    )
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [kept]

    code, output, error = main(
        capsys, "--vae_tiling", "--latents", kept, "--output_path", tmp_path / "later"
    )
    assert (code, error) == (0, "")
    assert "denoising" not in output
    assert "identity" not in output
    name = "42_0.0_0000"
    later = tmp_path / "later"
    assert (later / f"{name}.mp4").read_bytes() == (expected / f"{name}.mp4").read_bytes()
    first, second = (json.loads((d / f"{name}.json").read_text()) for d in (expected, later))
    same = ("seed", "rel_l1_thresh", "prompt", "computed_steps", "distances", "image_sha256")
    same += ("ckpts_path", "fps")
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert second["output_path"] == str(later)
    assert second["seconds"]["decoding"] > 0


def test_killed_while_decoding(tmp_path, tiny):
    """By SIGKILL, as the out-of-memory killer does it: the latents are there, and become the video
    that the run would have made."""
    arguments = ("--ckpts_path", "tiny", "--rel_l1_thresh", "0", "--num_infer_steps", "4")
    command = [sys.executable, "teacache_sample_video.py"]
    kept = tmp_path / "42_0.0_0000.latents.safetensors"
    process = subprocess.Popen(
        [*command, *arguments, "--output_path", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while not kept.exists():
        assert process.poll() is None, "it ended before there were latents"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("[!.]*.mp4")), "it was decoding"
    assert not list(tmp_path.glob("[!.]*.json"))

    for more in (("--latents", str(kept)), arguments):
        done = subprocess.run(
            [*command, *more, "--output_path", str(tmp_path / more[0]), "--quiet"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == f"{tmp_path / more[0]}/42_0.0_0000.mp4\n"
    later, whole = (tmp_path / name / "42_0.0_0000.mp4" for name in ("--latents", "--ckpts_path"))
    assert later.read_bytes() == whole.read_bytes()
    assert not list(whole.parent.glob("*.latents*")), "a video that is done needs none"

    other = ("--seed", "7", "--output_path", str(tmp_path))
    again = ("--resume", "--output_path", str(tmp_path))
    for more, there in ((other, True), (again, False)):
        subprocess.run([*command, *arguments, *more], cwd=ROOT, capture_output=True, check=True)
        assert kept.exists() == there, "the same video, sampled again, needs none either"


def test_latents_of_something_else(capsys, tmp_path):
    other = tmp_path / "other.safetensors"

    def complaint():
        code, _, error = main(
            capsys, "--ckpts_path", "tiny", "--latents", other, "--output_path", tmp_path
        )
        assert code == 2
        assert error.startswith(f"error: --latents {other} ")
        assert error.endswith("\n")
        return error.removeprefix(f"error: --latents {other} ").strip()

    none = "holds no latents of this command's"
    other.write_bytes(b"no")
    assert complaint() == none
    save_file({"latents": torch.zeros(1, 3, 16, 12, 14)}, other)
    assert complaint() == none
    save_file({"latents": torch.zeros(1, 3, 16, 12, 14)}, other, metadata={"record": "[]"})
    assert complaint() == f"{none}: its record is no object"
    save_file({"latents": torch.zeros(1, 3, 16, 12, 14)}, other, metadata={"record": "{}"})
    assert complaint().startswith(f"{none}: its record lacks ")
    whole = json.dumps(record_of_a_video().as_json())
    save_file({"latents": torch.zeros(1, 3, 16)}, other, metadata={"record": whole})
    assert complaint() == f"{none}: of shape [1, 3, 16]"
    save_file({"latents": torch.zeros(1, 3, 4, 12, 14)}, other, metadata={"record": whole})
    assert complaint().startswith("have 4 channels, and the VAE of ")


@pytest.mark.parametrize("other", [("--plan",), ("--resume",), ("--rel_l1_thresh", 0.2)])
def test_latents_are_sampled_already(capsys, tmp_path, other):
    (tmp_path / "kept.safetensors").touch()
    code, _, error = main(capsys, "--latents", tmp_path / "kept.safetensors", *other)
    assert code == 2
    assert error.startswith(f"error: argument {other[0]}: not allowed with argument --latents")


def test_latents_that_have_nowhere_to_go_are_refused_before_torch_is_imported(tmp_path):
    for name in ("file", "kept"):
        (tmp_path / name).touch()
    check = (
        "import sys\n"
        "from teacache.command.main import main\n"
        "code = main(['--latents', sys.argv[1], '--output_path', sys.argv[2]])\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, tmp_path / "kept", tmp_path / "file"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: --output_path {tmp_path}/file is a file, not a folder\n"


def test_a_missing_encoder_is_found_before_loading(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    code, output, error = main(capsys, *TINY, "--output_path", tmp_path / "out")
    assert (code, output) == (2, "")
    assert error.startswith("error: ffmpeg, which imageio-ffmpeg brings, does not run here: ")
    assert error.count("\n") == 1


def test_latents_need_room_for_their_video_too(capsys, tmp_path, monkeypatch):
    kept = tmp_path / "kept.safetensors"
    record = record_of_a_video(ckpts_path="tiny").as_json()
    save_file({"latents": torch.zeros(1, 3, 16, 12, 14)}, kept, {"record": json.dumps(record)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    code, output, error = main(capsys, "--latents", kept, "--output_path", tmp_path)
    assert code == 2
    assert error == f"error: --output_path {tmp_path} has 1 MiB free, and the run may write 2 MiB\n"
    assert "decoding" not in output


@pytest.fixture
def mounted(tmp_path):
    """Mounts a file system in memory: a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(mounted):
    """A file system of 4 MB."""
    return mounted("size=4m")


def test_a_folder_that_is_not_to_be_written_to(capsys, mounted):
    """Read-only, since permissions do not stop root, as whom this may run."""
    folder = mounted("ro")
    code, output, error = main(capsys, *TINY, "--output_path", folder)
    assert (code, output) == (2, "")
    assert error == f"error: --output_path {folder} cannot be written to\n"
    code, output, error = main(capsys, *TINY, "--output_path", folder / "below")
    assert (code, output) == (2, "")
    assert error == f"error: --output_path {folder}/below cannot be made: Read-only file system\n"


def test_a_disk_that_fills_up(small_disk, tmp_path, tiny):
    """4 kB hold neither the video, of 7 kB, nor the latents, of 75."""
    process = subprocess.Popen(
        [
            *(sys.executable, "teacache_sample_video.py", "--ckpts_path", "tiny"),
            *("--rel_l1_thresh", "0", "--num_infer_steps", "4"),
            *("--output_path", str(small_disk)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    for line in process.stdout:
        if line.startswith("loading"):
            break
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * (free - 4096))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith(
        f"error: the video cannot be written to {small_disk}: the encoder wrote "
    )
    assert "of 13 frames: " in error
    assert "No space left on device. The latents are kept" in error
    assert error.count("\n") == 1
    kept = Path(re.search(r"--latents (\S+)$", error)[1])
    assert kept.parent == tmp_path, "there is no room beside the video"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    with safe_open(kept, framework="pt") as file:
        assert file.get_tensor("latents").shape[0] == 1
    done = subprocess.run(
        [
            *(sys.executable, "teacache_sample_video.py", "--ckpts_path", "tiny", "--quiet"),
            *("--latents", str(kept), "--output_path", str(tmp_path / "later")),
        ],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(read_video(Path(done.stdout.strip())).frames) == 13


def test_an_encoder_that_leaves_half_a_video_is_noticed(tmp_path, monkeypatch):
    """It ends as if all were well: only the file tells."""
    import diffusers.utils

    export = diffusers.utils.export_to_video
    monkeypatch.setattr(
        diffusers.utils, "export_to_video", lambda frames, *a, **k: export(frames[:3], *a, **k)
    )
    frames = [Image.fromarray(np.zeros((96, 144, 3), np.uint8))] * 5
    with pytest.raises(OSError, match="wrote 3 of 5 frames"):
        video.write_video(frames, tmp_path / "video.mp4", fps=8)


def test_no_room_is_found_before_loading(capsys, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    code, output, error = main(capsys, *TINY, "--output_path", tmp_path)
    assert code == 2
    assert error == f"error: --output_path {tmp_path} has 1 MiB free, and the run may write 2 MiB\n"
    assert "diffusers" not in output
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    check_space(tmp_path, SIZE.width * SIZE.height, SIZE.num_frames, videos=100)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_latents_that_are_not_finite_end_the_run(pipe, identity, step):
    """By the first step that they are not finite after."""
    forwards = []

    def goes_wrong(module, args, output):
        forwards.append(output[0])
        if len(forwards) == step + 1:
            output[0][0, 0, 0, 0, 0] = float("nan")

    pipe.transformer.register_forward_hook(goes_wrong)
    start = sampler.prepare(pipe, identity, SIZE, seed=1)
    prompt = Text(embed_text(pipe, PROMPT).embeds, None)
    with pytest.raises(SamplingError, match=f"infinite numbers after step {step}, counted from 0"):
        sampler.denoise(pipe, start, prompt, SIZE, num_infer_steps=4, guidance_scale=1.0)


def test_a_guidance_beyond_all_floats(capsys, tmp_path):
    code, _, error = main(capsys, *TINY, "--guidance_scale", 3e38, "--output_path", tmp_path)
    assert code == 2
    assert "hold NaN or infinite numbers after step" in error
    assert error.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_keeps_its_traceback_and_the_latents(tmp_path, capsys, monkeypatch):
    def fault(*args):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(sampler, "decode", fault)
    with pytest.raises(ZeroDivisionError) as raised:
        main(capsys, *TINY, "--output_path", tmp_path)
    (note,) = raised.value.__notes__
    latents, record = slot.read_latents(Path(note.split("--latents ")[1]))
    assert latents.shape[0] == 1
    assert record.settings.num_infer_steps == 4


def test_nothing_made_names_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, *_ = main(
        capsys, *SWEEP, "--output_path", "made",
        "--prompt", PROMPT,
    )  # fmt: skip
    assert code == 0
    own = [str(tmp_path), str(ROOT), str(Path.home()) + "/", os.environ["XDG_CACHE_HOME"]]
    for path in (tmp_path / "made").iterdir():
        content = path.read_bytes()
        assert not [name for name in own if name.encode() in content], path.name


def test_a_video_whose_record_cannot_be_written_has_no_name_yet(capsys, tmp_path, monkeypatch):
    """Its latents stay until there is the video after all."""

    def no_space(record, path):
        raise OSError(28, "No space left on device")

    arguments = (*TINY, "--num_frames", 1, "--output_path", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", no_space)
        code, _, error = main(capsys, *arguments)
        assert code == 2
        assert f"the video cannot be written to {tmp_path}: No space left on device. The" in error
        assert [path.name for path in tmp_path.iterdir()] == ["42_0.0_0000.latents.safetensors"]
        assert main(capsys, *arguments, "--num_infer_steps", 3)[0] == 2
    assert main(capsys, *arguments)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "42_0.0_0001.latents.safetensors",  # of other settings
        "42_0.0_0002.json",
        "42_0.0_0002.mp4",
    ]


def test_figures_of_quality_that_find_no_room_leave_the_record(capsys, tmp_path, monkeypatch):
    def no_space(record, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Record, "replace_at", no_space)
    code, _, error = main(capsys, *SWEEP, "--output_path", tmp_path)
    assert code == 0
    assert "42_0.2_0000.mp4: its record stays without the figures of quality: No space" in error
    records = sorted(tmp_path.glob("42_*.json"))
    assert len(records) == 2
    assert not ["quality" for path in records if "quality" in json.loads(path.read_text())]


def test_a_report_that_cannot_be_written_hides_nothing(capsys, tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Comparison, "report", no_space)
    code, _, error = main(capsys, *SWEEP, "--output_path", tmp_path)
    assert code == 0
    assert "the sweep's report cannot be written: No space left on device" in error
    assert len(list(tmp_path.glob("*.mp4"))) == 2
