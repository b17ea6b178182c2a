"""What happens when a run is interrupted, runs out of something, or goes wrong: nothing is lost."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import imageio
import imageio_ffmpeg
import psutil
import pytest
import torch
from PIL import Image
from processes import SAMPLE, start
from safetensors.torch import load_file
from support import CPU, PROMPT, ROOT, SIZE, handlers_given_back, main, refused

from teacache.base.errors import OutputError, SamplingError
from teacache.checkpoint.pipeline import load_pipeline
from teacache.command.main import main as command
from teacache.comparison import quality
from teacache.comparison.comparison import Comparison
from teacache.inputs import conditioning
from teacache.inputs.text import Text, embed_text
from teacache.results import video
from teacache.results.output_folder import check_space
from teacache.results.record import Record
from teacache.run import session
from teacache.sampling import sampler

TINY = ("--ckpts_path", "tiny", "--rel_l1_thresh", 0, "--num_infer_steps", 2)
SWEEP = (*TINY, "--rel_l1_thresh", 0, 0.2, "--num_frames", 1)
NAME = "42_0.0_0000"
STREAMED = "--offload blocks, --offload sequential"
ASKED = "(asked for 2.50 GiB). Try, in this order:"


def kept_in(path: Path) -> str:
    """What is said of latents that are not a video yet."""
    return f"The latents are kept in {path}, try again with --resume"


def fails(error: BaseException):
    """A function that raises one like it, without its notes."""

    def fail(*args, **kwargs):
        raise type(error)(*error.args)

    return fail


ON_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
ON_THE_HOST = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
NO_SPACE = OSError(28, "No space left on device")


def wait_for(process: subprocess.Popen, stage: str) -> None:
    """Until a stage has ended."""
    for line in process.stdout:
        if line.startswith(stage):
            return


@pytest.mark.parametrize(
    ("after", "number"), [("checkpoint", signal.SIGINT), ("encoding", signal.SIGHUP)]
)
def test_interrupted(tmp_path, tiny, after, number):
    """The signal comes within the stage that follows `after`."""
    cold = {"program": ("-u", *SAMPLE)} if after == "checkpoint" else {}  # then torch is imported
    process = start(*TINY, "--num_infer_steps", 1000, "--output_path", tmp_path, **cold)
    wait_for(process, after)
    time.sleep(0.2)
    process.send_signal(number)
    sent = time.monotonic()
    _, error = process.communicate(timeout=60)
    # Alone it takes 0.6 s, nearly all of it Python's; other tests may run beside it.
    assert time.monotonic() - sent < 10
    assert (process.returncode, error, list(tmp_path.iterdir())) == (130, "interrupted\n", [])


@pytest.mark.parametrize("to", ["the process", "the terminal"])
def test_interrupted_while_the_encoder_runs(capsys, tmp_path, monkeypatch, to):
    """The real encoder on its way, and no part of a file or process left of it.

    A Ctrl-C of the terminal ends ffmpeg as well: a library sees its broken pipe alone.
    """
    write_frames, seen = imageio_ffmpeg.write_frames, []

    def encoders():
        children = psutil.Process().children(recursive=True)
        return [child for child in children if "ffmpeg" in child.name()]

    class Stopping:
        """The encoder's generator; the signal comes with the fifth frame."""

        def __init__(self, *args, **kwargs):
            self.encoder, self.sent = write_frames(*args, **kwargs), 0
            self.close = self.encoder.close

        def send(self, frame):
            self.sent += 1
            if self.sent == 5:
                seen.extend(encoders())
                with contextlib.suppress(KeyboardInterrupt if to == "the terminal" else ()):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(1)
                for encoder in encoders():
                    encoder.kill()
                    encoder.wait()
            return self.encoder.send(frame)

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", Stopping)
    code, _, error = main(capsys, *TINY, "--output_path", tmp_path)
    (kept,) = tmp_path.iterdir()
    assert (code, error.splitlines()[-1]) == (130, f"interrupted. {kept_in(kept)}")
    assert seen, "it was running"
    assert not encoders()


def test_a_second_signal_on_the_way_out(tmp_path, tiny):
    """0.1 s later, while Python ends."""
    process = start(*TINY, "--output_path", tmp_path)
    wait_for(process, "diffusers")
    process.terminate()
    assert process.stderr.readline() == "interrupted\n"
    process.terminate()
    assert process.wait(60) == 130
    assert process.stderr.read() == ""


def test_an_interruption_that_gets_lost_is_found_again(capsys, tmp_path, monkeypatch):
    """As in a destructor, whose exceptions Python drops."""
    prepare, denoised = sampler.prepare, []

    def loses_it(*args, **kwargs):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(sampler, "prepare", loses_it)
    monkeypatch.setattr(sampler, "denoise", lambda *a, **k: denoised.append(1))
    code, _, error = main(capsys, *TINY, "--output_path", tmp_path)
    assert (code, error) == (130, "interrupted\n")
    assert not denoised


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ((conditioning, "embed_text"), ON_A_GPU, f"text {ASKED} --offload sequential"),
        ((session, "open_models"), ON_A_GPU, f"loading {ASKED} {STREAMED}"),
        ((sampler, "prepare"), ON_THE_HOST, "encoding. Try, in this order: --vae_tiling"),
        ((sampler, "denoise"), MemoryError(), "denoising. No further flag takes less"),
    ],
)
def test_out_of_memory(capsys, tmp_path, monkeypatch, where, error, said):
    """As torch says it of a GPU, to which the flags would apply, and of the host."""
    prompt = ("--prompt", f"none that is kept from other tests {where[1]}".replace("_", " "))
    monkeypatch.setattr(*where, fails(error))
    code, _, told = main(capsys, *TINY, *prompt, "--output_path", tmp_path)
    assert (code, told) == (2, f"error: out of memory while {said}\n")
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_while_a_video_is_compared(capsys, tmp_path, monkeypatch):
    """In one line, too; the video is written, and the sweep has its report."""
    monkeypatch.setattr(quality, "identity_similarity", fails(MemoryError()))
    code, _, told = main(capsys, *SWEEP, "--output_path", tmp_path)
    assert (code, told.splitlines()[-1]) == (
        *(2, "error: out of memory while quality. No further flag takes less"),
    )
    assert (tmp_path / f"{NAME}.mp4").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """The video of `TINY` as a run makes it that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    with handlers_given_back():
        assert command([*map(str, TINY), "--output_path", str(folder)]) == 0
    return folder / f"{NAME}.mp4"


def test_out_of_memory_while_decoding_keeps_the_latents(capsys, tmp_path, monkeypatch, tiny, whole):
    """And what is advised makes the video of them, without denoising: here in tiles."""
    out = tmp_path / "out"
    asked = (*TINY, "--output_path", out)
    kept = out / f"{NAME}.latents.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "decode", fails(ON_A_GPU))
        for more in ((), ("--resume",)):
            code, output, error = main(capsys, *asked, *more)
            assert code == 2
            assert error == (
                f"error: out of memory while decoding {ASKED} --vae_tiling. {kept_in(kept)}\n"
            )
            assert [path for path in out.iterdir() if path.name[0] != "."] == [kept]
            assert (f"latents     {kept}" in output.splitlines()) == bool(more)
    pipe = load_pipeline(tiny, CPU, torch.float32, vae_tiling=True, parts=("vae",))
    video.write_video(sampler.decode(pipe, load_file(kept)["latents"]), tmp_path / "tiled.mp4", 7)
    monkeypatch.setattr(sampler, "denoise", fails(ON_A_GPU))
    code, output, error = main(capsys, *asked, "--vae_tiling", "--quality", 7, "--resume")
    assert (code, error) == (0, "")
    (made,) = out.glob("*.mp4")
    assert made.read_bytes() == (tmp_path / "tiled.mp4").read_bytes() != whole.read_bytes()
    assert not kept.exists(), "a video that is done needs none"
    first, second = (json.loads(path.with_suffix(".json").read_text()) for path in (whole, made))
    same = ("seed", "rel_l1_thresh", "prompt", "computed_steps", "distances", "image_sha256")
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert (second["vae_tiling"], second["mp4_quality"]) == (True, 7)
    assert second["seconds"].keys() == first["seconds"].keys(), "with what the first try took"


def test_killed_while_decoding(capsys, tmp_path, monkeypatch, whole):
    """By SIGKILL, as the out-of-memory killer does it: the latents are there, and become the video
    that the run would have made. Those of other videos stay."""
    kept = tmp_path / f"{NAME}.latents.safetensors"
    process = start(*TINY, "--output_path", tmp_path)
    while not kept.exists():
        assert process.poll() is None, "it ended before there were latents"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not [path for ending in ("mp4", "json") for path in tmp_path.glob(f"[!.]*.{ending}")]
    asked = (*TINY, "--output_path", tmp_path, "--resume", "--quiet")
    assert main(capsys, *asked, "--num_frames", 1, "--guidance_scale", 1)[0] == 0
    assert kept.exists(), "of other settings"
    monkeypatch.setattr(sampler, "denoise", fails(ON_A_GPU))
    code, output, _ = main(capsys, *asked)
    assert (code, output) == (0, f"{tmp_path}/{NAME}.mp4\n"), "the name that its latents had"
    assert Path(output.strip()).read_bytes() == whole.read_bytes()
    assert not kept.exists()
    assert not list(tmp_path.glob(".*")), "nothing is left of the killed process"


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("", "No ffmpeg exe could be found"),
        ("/none", "No such file or directory"),
        (__file__, "Permission denied"),
        ("/bin/bash", "it is no ffmpeg"),
        ("/bin/false", "non-zero exit status 1"),
    ],
)
def test_an_encoder_of_ones_own_that_does_not_run(capsys, tmp_path, monkeypatch, program, why):
    """Nor the package's own, where there is none."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
    monkeypatch.setattr(imageio_ffmpeg._utils, "_get_ffmpeg_exe", lambda: None)
    error = refused(capsys, *TINY, "--output_path", tmp_path / "out")
    which = f"IMAGEIO_FFMPEG_EXE={program}" if program else "the ffmpeg that imageio-ffmpeg brings"
    assert error.startswith(f"error: {which} does not run here (")
    assert why in error


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


def test_a_folder_that_is_not_to_be_written_to(capsys, mounted):
    """Read-only, since permissions do not stop root, as whom this may run."""
    folder = mounted("ro")
    for path, complaint in (
        (folder, "cannot be written to"),
        (folder / "below", "cannot be made: Read-only file system"),
    ):
        error = refused(capsys, *TINY, "--output_path", path)
        assert error == f"error: --output_path {path} {complaint}"


def test_a_disk_that_fills_up(capsys, mounted, tmp_path, monkeypatch, whole):
    """4 kB hold neither the video, of 7 kB, nor the latents, of 75. Once there is room, the latents
    in the system's temporary folder are found."""
    disk, denoise = mounted("size=4m"), sampler.denoise
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fills_the_disk(*args, **kwargs):
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - 4096))
        return denoise(*args, **kwargs)

    monkeypatch.setattr(sampler, "denoise", fills_the_disk)
    code, _, error = main(capsys, *TINY, "--output_path", disk)
    assert code == 2
    (kept,) = tmp_path.glob("42_0.0_*.latents.safetensors")
    assert error.startswith(f"error: the video cannot be written to {disk}: the encoder wrote ")
    assert error.endswith(f"of 13 frames: No space left on device. {kept_in(kept)}\n")
    assert error.count("\n") == 1
    assert [path.name for path in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    monkeypatch.setattr(sampler, "denoise", fails(ON_A_GPU))
    code, output, _ = main(capsys, *TINY, "--output_path", disk, "--resume", "--quiet")
    assert code == 0
    assert Path(output.strip()).read_bytes() == whole.read_bytes()
    assert not kept.exists()


def test_an_encoder_that_leaves_half_a_video_is_noticed(tmp_path, monkeypatch):
    """It ends as if all were well: only the file tells."""
    get_writer = imageio.get_writer

    def of_three_frames(*args, **kwargs):
        writer = get_writer(*args, **kwargs)
        append, numbers = writer.append_data, itertools.count()
        writer.append_data = lambda frame: append(frame) if next(numbers) < 3 else None
        return writer

    monkeypatch.setattr(imageio, "get_writer", of_three_frames)
    with pytest.raises(OSError, match="wrote 3 of 5 frames"):
        video.write_video([Image.new("RGB", (64, 48))] * 5, tmp_path / "video.mp4")


def test_no_room_is_found_before_loading(capsys, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    error = refused(capsys, *TINY, "--output_path", tmp_path)
    assert error == f"error: --output_path {tmp_path} has 1 MiB free, and the run may write 2 MiB"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    check_space(tmp_path, SIZE, videos=100)
    with pytest.raises(OutputError, match="has 1024 MiB free"):
        check_space(tmp_path, (720, 480, 49), videos=40, quality=9)


@pytest.mark.parametrize("step", [0, 3])
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


def test_a_fault_of_ours_keeps_its_traceback_and_the_latents(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampler, "decode", fails(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError) as raised:
        main(capsys, *TINY, "--num_frames", 1, "--output_path", tmp_path)
    (kept,) = tmp_path.iterdir()
    assert raised.value.__notes__ == [kept_in(kept)]


def test_nothing_made_names_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(capsys, *SWEEP, "--output_path", "made", "--prompt", PROMPT)[0] == 0
    own = [str(tmp_path), str(ROOT), str(Path.home()) + "/", os.environ["XDG_CACHE_HOME"]]
    for path in (tmp_path / "made").iterdir():
        content = path.read_bytes()
        assert not [name for name in own if name.encode() in content], path.name


def test_a_video_whose_record_cannot_be_written_has_no_name_yet(capsys, tmp_path, monkeypatch):
    """Its latents stay until there is the video after all."""
    arguments = (*TINY, "--num_frames", 1, "--output_path", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", fails(NO_SPACE))
        code, _, error = main(capsys, *arguments)
        assert code == 2
        assert f"the video cannot be written to {tmp_path}: No space left on device. The" in error
        assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.latents.safetensors"]
        assert main(capsys, *arguments, "--num_infer_steps", 3)[0] == 2
    assert main(capsys, *arguments)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "42_0.0_0001.latents.safetensors",  # of other settings
        *("42_0.0_0002.json", "42_0.0_0002.mp4"),
    ]


def test_a_report_that_finds_no_room_hides_nothing(capsys, tmp_path, monkeypatch):
    """Nor do the figures of quality: the record stays as it was."""
    monkeypatch.setattr(Record, "replace_at", fails(NO_SPACE))
    monkeypatch.setattr(Comparison, "report", fails(NO_SPACE))
    code, _, error = main(capsys, *SWEEP, "--output_path", tmp_path)
    assert code == 0
    assert "42_0.2_0000.mp4: its record stays without the figures of quality: No space" in error
    assert "the sweep's report cannot be written: No space left on device" in error
    records = sorted(tmp_path.glob("42_*.json"))
    assert len(records) == len(list(tmp_path.glob("*.mp4"))) == 2
    assert not ["quality" for path in records if "quality" in json.loads(path.read_text())]
