"""What a newcomer and a hostile user tried, and what they get now: a video, or one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from support import ROOT, main

from teacache.base import files
from teacache.base.errors import CheckpointError, ImageError
from teacache.checkpoint import configuration
from teacache.checkpoint.folder import check_checkpoint
from teacache.checkpoint.pipeline import load_pipeline
from teacache.command import readers
from teacache.inputs import identity as faces
from teacache.inputs import photograph as pictures
from teacache.inputs.embedding_cache import EmbeddingCache
from teacache.results import video


def noise_frames(count: int, width: int = 64, height: int = 48) -> list[Image.Image]:
    numbers = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return [Image.fromarray(frame) for frame in numbers]


@pytest.mark.parametrize("folder", ["2026-11-24T10:33", "file:x", "./a:b", "imageio:x", "~", "-y"])
def test_folders_that_ffmpeg_or_imageio_could_take_for_something_else(
    tmp_path, monkeypatch, folder
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path.joinpath(folder).relative_to(tmp_path) / "video.mp4"
    path.parent.mkdir()
    video.write_video(noise_frames(5), path, fps=8)
    assert video.count_frames(path) == 5
    assert video.read_video(path).frames.shape == (5, 48, 64, 3)
    assert [p.name for p in tmp_path.iterdir()] == [path.parent.name]


def test_the_command_takes_a_time_stamp_for_a_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--ckpts_path", "tiny", "--num_infer_steps", 1, "--num_frames", 1, "--quiet")
    asked = (*arguments, "--output_path", "2026-11-24T10:33", "--rel_l1_thresh", 0, 0.1)
    assert main(capsys, *asked)[0] == 0
    code, *_ = main(capsys, *asked, "--resume")
    assert code == 0
    assert {path.suffix for path in (tmp_path / "2026-11-24T10:33").iterdir()} == {
        *(".mp4", ".json", ".md", ".png")
    }
    assert len(list((tmp_path / "2026-11-24T10:33").glob("42_*.mp4"))) == 2, "found again"


@pytest.mark.parametrize("read", [readers.path, readers.file, readers.image, readers.name])
def test_the_home_directory_is_put_in_once_for_every_path(tmp_path, monkeypatch, read):
    """bash does it for `--output_path ~/x`, and not for `--output_path=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x y").write_text("")
    assert str(read("~/x y")) == str(tmp_path / "x y")
    monkeypatch.chdir(tmp_path)
    Path("~nobodyhere").mkdir()
    (tmp_path / "~nobodyhere" / "x").write_text("")
    assert str(read("~nobodyhere/x")) == "~nobodyhere/x", "as bash leaves it"


def test_the_home_directory_of_a_user_of_an_address_and_of_the_command(
    capsys, tmp_path, monkeypatch
):
    me = pwd.getpwuid(os.getuid())
    assert readers.path(f"~{me.pw_name}/videos") == Path(me.pw_dir) / "videos"
    assert readers.path("a~/b") == Path("a~/b")
    assert readers.image("https://host/~me/face.png") == "https://host/~me/face.png"
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    content = {"values": [0, 0, 0, 1, 0], "fitted_range": [0, 1], "source": "here"}
    (tmp_path / "home" / "c.json").write_text(json.dumps(content))
    asked = ("--coefficients=~/c.json", "--output_path=~/results", "--num_infer_steps", 1)
    code, output, _ = main(capsys, "--ckpts_path", "tiny", *asked, "--num_frames", 1, "--quiet")
    assert (code, output) == (0, f"{tmp_path}/home/results/42_0.1_0000.mp4\n")
    assert not (tmp_path / "~").exists()


NAMES = ("embeds", "lost")


@pytest.mark.parametrize(
    "body",
    [
        save({"other": torch.zeros(3)}),
        save({name: torch.zeros(3) for name in (*NAMES, "more")}),
        (2**62).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"{}" * 4,
        b"",
    ],
    ids=["other names", "too many", "header too large", "no JSON", "nothing"],
)
def test_an_entry_of_something_else_is_made_anew(tmp_path, caplog, body):
    """One with the right digest of its content."""
    kept, key = EmbeddingCache(tmp_path / "cache"), {"text": "one"}
    kept.put(key, {name: torch.zeros(3) for name in NAMES})
    (entry,) = kept.folder.iterdir()
    entry.write_bytes(hashlib.sha256(body).digest() + body)
    assert kept.get(key, NAMES) is None
    assert caplog.text.count("is damaged, and is made anew") == 1
    assert not entry.exists()
    kept.put(key, {name: torch.ones(3) for name in NAMES})
    assert set(kept.get(key, NAMES)) == set(NAMES)


def test_the_names_of_a_face_are_those_that_are_kept(identity, tmp_path):
    kept = EmbeddingCache(tmp_path)
    kept.put({"face": "one"}, faces.as_tensors(identity))
    found = faces.from_tensors(kept.get({"face": "one"}, faces.TENSORS), torch.device("cpu"))
    assert torch.equal(found.id_cond, identity.id_cond)


def test_a_user_without_a_home_directory(tmp_path, monkeypatch, caplog):
    """As in containers that run under some number for which /etc/passwd has no line: the cache is
    in the temporary folder, where nobody else may have put it."""

    def unknown(uid):
        raise KeyError(uid)

    def cache() -> Path:
        files.folder_without_home.cache_clear()
        return files.cache_folder()

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"teacache-consisid-{os.getuid()}"
    assert cache() == files.cache_folder() == own
    assert len(caplog.records) == 1
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    another = cache()
    own.rmdir()
    own.symlink_to(another)
    assert len({own, another, cache()}) == 3
    monkeypatch.undo()
    files.folder_without_home.cache_clear()


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "face.png")
    return tmp_path / "face.png"


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    noise_frames(1, width, height)[0].save(file, "PNG")
    return file.getvalue()


def test_a_fifo_that_nobody_writes_to(capsys, fifo, monkeypatch):
    assert pictures.READ_SECONDS == 30
    monkeypatch.setattr(pictures, "READ_SECONDS", 0.5)
    arguments = ("--ckpts_path", "tiny", "--image", fifo, "--output_path", fifo.parent)
    code, _, error = main(capsys, *arguments)
    assert (code, error) == (2, f"error: --image {fifo}: nothing to read from it for 0.5 s\n")
    held_open = os.open(fifo, os.O_RDWR)  # also by somebody who opens it and says nothing
    with pytest.raises(ImageError, match=r"nothing to read from it for 0\.5 s"):
        pictures.load_image(str(fifo))
    os.close(held_open)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (png(150, 150), None),
        (b"", "is empty"),
        (b"no picture", "is no image"),
        (b"x" * 200_000, "is larger than 0 MB"),
    ],
)
def test_a_fifo_with_a_picture_and_without(fifo, monkeypatch, content, complaint):
    """It comes in pieces, one each 0.2 s: only silence is limited."""
    monkeypatch.setattr(pictures, "READ_SECONDS", 0.3)
    monkeypatch.setattr(pictures, "MOST_BYTES", 100_000)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), fifo.open("wb") as file:
            for begin in range(0, len(content), 30_000):
                time.sleep(0.2)
                file.write(content[begin : begin + 30_000])
                file.flush()

    threading.Thread(target=write, daemon=True).start()
    if complaint is None:
        assert len(content) > 2 * 30_000
        found = pictures.load_image(str(fifo))
        assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(content))))
    else:
        with pytest.raises(ImageError, match=complaint):
            pictures.load_image(str(fifo))


def test_process_substitution(tmp_path):
    """As `--image <(cat face.png)` of bash: a pipe by the name of a descriptor."""
    (tmp_path / "face.png").write_bytes(png(200, 150))
    script = (
        "import sys; from teacache.inputs.photograph import load_image; "
        "print(load_image(sys.argv[1]).size)"
    )
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{script}" <(cat "{tmp_path}/face.png")'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("(200, 150)\n", "")


def test_a_device_without_end(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BYTES", 10**6)
    with pytest.raises(ImageError, match="is larger than 1 MB"):
        pictures.load_image("/dev/zero")


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """Copies the checkpoint, with another file of this name: its text, or entries of its JSON."""

    def changed(name: str, change: str | dict) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny, folder, copy_function=os.link)
        path = folder / name
        if isinstance(change, dict):
            change = json.dumps({**json.loads(path.read_text()), **change})
        path.unlink()  # it is a link
        path.write_text(change)
        return folder

    return changed


EVA, TRANSFORMER = "face_encoder/EVA02-CLIP-L-14-336.json", "transformer/config.json"
VAE, SCHEDULER = "vae/config.json", "scheduler/scheduler_config.json"
INDEX, MODELOPT = "model_index.json", {"quantization_config": {"quant_method": "modelopt"}}


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (EVA, '{\n  "embed_dim": 768,\n  "vision', f"{EVA} is no JSON: "),
        (EVA, "[]", f"{EVA} holds no JSON object"),
        (EVA, "{}", f"{EVA} describes no EVA-CLIP: it lacks vision_cfg or text_cfg"),
        (EVA, {"embed_dim": "x"}, f"{EVA}: embed_dim is 'x', no whole number"),
        (TRANSFORMER, {"num_layers": 2}, "num_layers is 2, which makes 2 layers, and the we"),
        (TRANSFORMER, {"num_layers": 1}, "cross_attn_interval is 2, which does not divide 1 "),
        (TRANSFORMER, {"num_layers": "two"}, "num_layers is 'two', no whole number from 1 on"),
        (TRANSFORMER, {"cross_attn_interval": 0}, "cross_attn_interval is 0, no whole number"),
        (TRANSFORMER, {"LFE_depth": 10**9}, "LFE_depth is 1000000000, which makes 1000000000"),
        (TRANSFORMER, {"is_train_face": False}, "is_train_face is not true: such a model takes"),
        (TRANSFORMER, MODELOPT, f"{TRANSFORMER}: quantized with modelopt, whose package is not"),
        (TRANSFORMER, {"local_face_scale": "x"}, "local_face_scale is 'x', no number above 0"),
        (VAE, {"scaling_factor": 0}, f"{VAE}: scaling_factor is 0, no number above 0"),
        (VAE, {"scaling_factor": float("nan")}, "scaling_factor is nan, no number above 0"),
        (VAE, {"layers_per_block": 2}, "layers_per_block is 2, which makes 2 layers, and the"),
        (SCHEDULER, {"timestep_spacing": "foo"}, "timestep_spacing is 'foo', none of leading, "),
        (SCHEDULER, {"beta_schedule": ["linear"]}, "beta_schedule is ['linear'], none of lin"),
        (SCHEDULER, {"trained_betas": [0.1]}, "trained_betas is no list of 1000 numbers"),
        (INDEX, {"transformer": ["diffusers", "Other"]}, "'Other' as transformer, not ConsisID"),
        (INDEX, {"scheduler": ["diffusers", "DDIM"]}, "'DDIM' as scheduler, not CogVideoXDPM"),
        (INDEX, {"vae": []}, "names [] as vae"),
    ],
)
def test_wrong_configurations_are_one_line(capsys, tmp_path, checkpoint, name, change, complaint):
    folder = checkpoint(name, change)
    code, output, error = main(
        capsys, "--ckpts_path", folder, "--image", "astronaut", "--output_path", tmp_path / "out"
    )
    assert (code, output) == (2, ""), "before anything is imported for it"
    assert error.startswith(f"error: {folder}/")
    assert complaint in error
    assert error.count("\n") == 1


def test_what_configurations_may_say(checkpoint):
    folder = checkpoint(INDEX, {"scheduler": ["diffusers", "CogVideoXDDIMScheduler"]})
    (folder / EVA).unlink()
    check_checkpoint(folder)


def test_the_choices_of_a_scheduler_are_those_of_diffusers():
    """Tried out: what is listed works in both, and each says of another that it does not."""

    def step_once(scheduler) -> None:
        scheduler.set_timesteps(2)
        zeros = torch.zeros(1, 1, 1, 2, 2)
        t = scheduler.timesteps[0]
        before = (None, t, None, zeros)
        dpm = isinstance(scheduler, diffusers.CogVideoXDPMScheduler)
        scheduler.step(zeros, *(before if dpm else (t, zeros)))

    for name in configuration.CLASSES["scheduler"]:
        kind = getattr(diffusers, name)
        for key, known in configuration.SCHEDULER_CHOICES.items():
            for choice in known:
                step_once(kind(**{key: choice}))
            with pytest.raises((ValueError, NotImplementedError)):
                step_once(kind(**{key: "foo"}))


def test_quantized_weights_that_are_loaded_without_their_package(checkpoint):
    """Said when they are loaded, where the library finds that it is missing."""
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    folder = checkpoint("text_encoder/config.json", quantized)
    with pytest.raises(CheckpointError, match=r"text_encoder is quantized, and cannot be read: "):
        load_pipeline(folder, torch.device("cpu"), torch.float32, parts=("text_encoder",))
