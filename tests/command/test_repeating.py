"""What made a video, on record and in the mp4, and making it again; seeds drawn, GIFs, LoRAs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from records import record_of_a_video
from safetensors.torch import load_file, save_file
from support import ROOT, main

from teacache.command import run
from teacache.results.record import read_record
from teacache.results.video import read_comment, read_video

SHORT = ("--ckpts_path", "tiny", "--rel_l1_thresh", 0.2, "--num_infer_steps", 6)


def info(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "teacache.info", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one video, sampled by the command."""
    folder = tmp_path_factory.mktemp("made")
    subprocess.run(
        [
            *(sys.executable, "teacache_sample_video.py", *map(str, SHORT), "--gif"),
            *("--prompt", "A person; turns = left # and\nsmiles \\ é", "--max_reuse", "2"),
            *("--output_path", folder),
        ],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_a_record_repeats_its_run(capsys, made, tmp_path):
    record = made / "42_0.2_0000.json"
    code, _, error = main(capsys, "--from_record", record, "--output_path", tmp_path)
    assert (code, error) == (0, "")
    again = tmp_path / "42_0.2_0000.mp4"
    assert again.read_bytes() == (made / "42_0.2_0000.mp4").read_bytes()
    first, second = (read_record(each) for each in (record, again.with_suffix(".json")))
    assert first.settings == second.settings
    assert not list(tmp_path.glob("*.gif")), "what is made beside it is no setting of the video"


def test_a_gif_of_a_video_that_is_there_already(capsys, made, tmp_path):
    for path in made.glob("42_0.2_0000.*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "42_0.2_0000.gif").unlink()
    asked = ("--from_record", made / "42_0.2_0000.json", "--output_path", tmp_path, "--resume")
    code, output, error = main(capsys, *asked, "--gif")
    assert (code, error) == (0, "")
    assert "done before" in output
    gif = tmp_path / "42_0.2_0000.gif"
    assert gif.read_bytes() == (made / gif.name).read_bytes()


def test_other_arguments_overrule_the_record(capsys, made, tmp_path):
    record = made / "42_0.2_0000.json"
    (tmp_path / "list.json").write_text("[0, 3]")
    code, *_ = main(
        capsys, "--from_record", record, "--output_path", tmp_path, "--seed", 7,
        "--schedule", tmp_path / "list.json",
    )  # fmt: skip
    assert code == 0
    settings = read_record(tmp_path / "7_listed3_0000.json").settings
    before = read_record(record).settings
    assert (settings.seed, settings.schedule) == (7, "listed 3")
    assert (settings.prompt, settings.max_reuse) == (before.prompt, 2)


def test_a_record_of_chosen_steps_is_repeated_with_these(capsys, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "list.json").write_text("[0, 2, 3]")
    code, *_ = main(
        capsys, *SHORT[:2], *SHORT[4:], "--schedule", tmp_path / "list.json",
        "--output_path", one,
    )  # fmt: skip
    assert code == 0
    code, *_ = main(capsys, "--from_record", one / "42_listed4_0000.json", "--output_path", two)
    assert code == 0
    videos = [read_video(next(folder.glob("*.mp4"))).frames for folder in (one, two)]
    assert (videos[0] == videos[1]).all()


def changed(record, tmp_path, **keys):
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**json.loads(record.read_text()), **keys}))
    return path


def test_another_image_or_checkpoint_is_refused(capsys, made, tmp_path):
    record = made / "42_0.2_0000.json"
    for keys, told in (
        ({"image_sha256": "0"}, "astronaut is another picture than on record"),
        ({"checkpoint_sha256": "0"}, "the checkpoint tiny is another than on record"),
    ):
        path = changed(record, tmp_path, **keys)
        code, output, error = main(capsys, "--from_record", path, "--output_path", tmp_path / "o")
        assert code == 2
        assert error.startswith("error: --from_record: ")
        assert told in error
        assert "loading" not in output
    picture = tmp_path / "me.png"
    Image.new("RGB", (8, 8)).save(picture)
    path = changed(record, tmp_path, image_sha256="0")
    code, _, error = main(capsys, "--from_record", path, "--image", picture)
    assert "another picture" not in error, "another was asked for"
    assert code == 2, "it has no face"
    no_record = tmp_path / "none.json"
    no_record.write_text("{}")
    code, _, error = main(capsys, "--from_record", no_record)
    assert code == 2
    assert "none.json is no record of a video" in error


def test_a_video_tells_what_made_it(made, tmp_path):
    record = read_record(made / "42_0.2_0000.json")
    told = json.loads(read_comment(made / "42_0.2_0000.mp4"))
    assert told["prompt"] == record.settings.prompt, "whatever is in it"
    assert told["seed"] == 42
    alone = tmp_path / "renamed.mp4"
    shutil.copy(made / "42_0.2_0000.mp4", alone)
    for path in (made / "42_0.2_0000.mp4", made / "42_0.2_0000.json", alone):
        done = info(path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "seed        42\n" in done.stdout
        assert "rel_l1_thresh 0.2" in done.stdout
        assert ("computed" in done.stdout) == (path != alone)
    done = info(ROOT / "README.md")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert info(tmp_path / "nothing.mp4").returncode == 2


def test_the_comment_of_a_video_names_no_folder():
    settings = record_of_a_video(image="/home/me/face.png", ckpts_path="/data/ConsisID").settings
    comment = json.dumps(settings.as_comment())
    assert "/home/me" not in comment
    assert "/data" not in comment
    assert "face.png" in comment
    url = "https://example.org/a.png"
    assert dataclasses.replace(settings, image=url).as_comment()["image"] == url


def test_a_gif_shows_every_frame(made):
    frames = len(read_video(made / "42_0.2_0000.mp4").frames)
    with Image.open(made / "42_0.2_0000.gif") as gif:
        assert (gif.n_frames, gif.size) == (frames, (112, 96))
        assert gif.info["duration"] == pytest.approx(1000 / 8, abs=10)  # in hundredths of a second


def test_a_random_seed_is_said_and_recorded(capsys, tmp_path):
    code, output, _ = main(
        capsys, *SHORT, "--seed", "random", 5, "--num_frames", 1, "--output_path", tmp_path
    )
    assert code == 0
    seeds = output.splitlines()[0].removeprefix("seed").removesuffix(", drawn").split()
    assert seeds[1] == "5"
    record = read_record(tmp_path / f"{seeds[0]}_0.2_0000.json")
    assert record.settings.seed == int(seeds[0]) < 2**32
    code, _, error = main(capsys, *SHORT, "--seed", "random", "--shard", "0/2")
    assert code == 2
    assert "--seed: random would be another seed in each --shard" in error


@pytest.fixture(scope="module")
def weights(tiny):
    """A small LoRA of the embedded checkpoint, random, as diffusers saves one."""
    layers = load_file(tiny / "transformer" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, weight in layers.items():
        if name.startswith("transformer_blocks.") and name.endswith(("to_q.weight", "to_v.weight")):
            layer = "transformer." + name.removesuffix(".weight")
            rows, columns = weight.shape
            factors[f"{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            factors[f"{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.03
    return factors


def test_a_lora_changes_the_video(capsys, weights, tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(weights, path)
    videos = []
    for number, scale in enumerate(("", ":1", ":0", None)):
        lora = () if scale is None else ("--lora", f"{path}{scale}")
        folder = tmp_path / str(number)
        assert main(capsys, *SHORT, *lora, "--output_path", folder)[0] == 0
        videos.append(read_video(folder / "42_0.2_0000.mp4").frames)
    assert (videos[0] == videos[1]).all()
    assert (videos[0] != videos[3]).any()
    assert (videos[2] == videos[3]).all(), "nothing of it is nothing"
    record = read_record(tmp_path / "0" / "42_0.2_0000.json")
    assert record.settings.lora == [f"{path}:1"]
    code, output, _ = main(
        capsys, *SHORT, "--lora", f"{path}:0.5", "--resume", "--output_path", tmp_path / "0"
    )
    assert code == 0
    assert "42_0.2_0001.mp4" in output, "with another scale it is another video"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: {}, "holds no weights"),
        (lambda w: {**w, "unet.down.lora_up.weight": torch.ones(1)}, "holds unet.down.lora_up"),
        (
            lambda w: {n.replace("blocks.0", "blocks.99"): t for n, t in w.items()},
            "is of another model: it holds transformer.transformer_blocks.99.attn1",
        ),
        (lambda w: {n: torch.ones(3, 3) for n in w}, "is of another model: it holds transformer."),
    ],
)
def test_a_lora_of_something_else_is_refused(capsys, weights, tmp_path, change, told):
    path = tmp_path / "style.safetensors"
    save_file(change(weights), path)
    code, output, error = main(capsys, *SHORT, "--lora", path, "--output_path", tmp_path / "o")
    assert code == 2
    assert error.startswith(f"error: --lora {path}")
    assert told in error
    assert error.count("\n") == 1
    assert "loading" not in output


def test_a_lora_that_is_not_there_is_refused(capsys, tmp_path):
    for source in (tmp_path / "none.safetensors", tmp_path, ROOT / "README.md"):
        code, _, error = main(capsys, *SHORT, "--lora", source, "--output_path", tmp_path / "o")
        assert code == 2
        assert error.startswith(f"error: --lora {source}")


def test_short_prompts_of_the_real_model_get_a_hint(capsys, tmp_path, monkeypatch):
    quick = (*SHORT, "--num_frames", 1, "--output_path", tmp_path)
    assert "hint" not in main(capsys, *quick)[1]
    monkeypatch.setattr(run, "is_full_size", lambda folder: True)
    assert "hint        'a man' is short" in main(capsys, *quick, "--prompt", "a man")[1]
    assert "hint" not in main(capsys, *quick, "--prompt", "a man " * 20)[1]
