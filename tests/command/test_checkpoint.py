"""Finding, building and checking a checkpoint folder."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file, save_file
from support import CPU, edit, encoded, main, refused, replace

from teacache.base.errors import ArgumentError, CheckpointError
from teacache.base.quiet import no_progress_bars
from teacache.checkpoint.find import local_checkpoint
from teacache.checkpoint.folder import check_checkpoint
from teacache.checkpoint.pipeline import load_pipeline
from teacache.checkpoint.size import check_num_frames, video_size
from teacache.embedded import build, cached
from teacache.embedded.configuration import VAE
from teacache.inputs.identity import load_face_models

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
DECODER = "vae/diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
FACES = "face_encoder/models/antelopev2/glintr100.onnx"


def command(capsys, folder, *arguments):
    """What the command says of a checkpoint that it refuses."""
    asked = ("--ckpts_path", folder, "--image", "astronaut", "--num_infer_steps", 2)
    return refused(capsys, *asked, "--output_path", folder.parent / "out", *arguments)


def test_tiny_is_built_once_in_the_layout_of_the_real_one(tiny):
    made = (tiny / INDEX).stat().st_mtime_ns
    assert cached.cached_tiny_checkpoint() == tiny
    assert (tiny / INDEX).stat().st_mtime_ns == made
    check_checkpoint(tiny)
    folders = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae", "face_encoder"}
    assert {p.name for p in tiny.iterdir()} == {INDEX, *folders}
    assert [p.name for p in (tiny / "tokenizer").iterdir()] == ["spiece.model"]


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def half(folder):
        folder.mkdir()
        (folder / INDEX).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_checkpoint", half)
    with pytest.raises(KeyboardInterrupt):
        cached.build_tiny_checkpoint(tmp_path / "tiny")
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="cannot write to"):
        cached.build_tiny_checkpoint(Path("/proc/nowhere/tiny"))


def test_of_two_builds_at_once_one_is_made(tmp_path, monkeypatch):
    """The other process waits for it; what a killed build has left is removed."""

    def write(folder):
        folder.mkdir()
        (folder / str(os.getpid())).touch()

    monkeypatch.setattr(build, "write_checkpoint", write)
    (tmp_path / ".tiny.part" / "half").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    builders = [
        context.Process(target=cached.build_tiny_checkpoint, args=(tmp_path / "tiny",))
        for _ in range(4)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0] * 4
    assert len(list((tmp_path / "tiny").iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_or_a_repository(light, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_checkpoint(str(light)) == light
    assert local_checkpoint("BestWishYsh/ConsisID-preview") is None, "it is not here yet"
    for name in ("nowhere", "./a/b", "/nowhere/at/all", "a/b/c", "a b/c"):
        with pytest.raises(CheckpointError, match="no such folder"):
            local_checkpoint(name)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a single file with weights"):
        local_checkpoint(str(tmp_path / "model.safetensors"))


def test_all_that_is_wrong_is_said_at_once(capsys, light):
    """A shard too few, an empty file, one cut short; before anything is imported for it."""
    (light / TRANSFORMER).rename(light / "transformer" / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (light / f"{TRANSFORMER}.index.json").write_text(json.dumps(index))
    replace(light / "face_encoder" / "parsing_bisenet.pth", b"")
    half(light / "face_encoder" / "detection_Resnet50_Final.pth")
    (light / "tokenizer" / "spiece.model").unlink()
    half(light / DECODER)
    assert command(capsys, light) == (
        f"error: {light} is not whole, missing or empty: tokenizer/spiece.model, "
        "face_encoder/parsing_bisenet.pth, transformer/part-2.safetensors; cut short or damaged: "
        "face_encoder/detection_Resnet50_Final.pth, vae/diffusion_pytorch_model.safetensors"
    )


def pointer(path):
    path.unlink(missing_ok=True)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064}\nsize 9\n")


@pytest.mark.parametrize(
    "names",
    [
        [f"{TRANSFORMER}.index.json"],
        [
            *("face_encoder/EVA02_CLIP_L_336_psz14_s6B.pt", FACES, INDEX, SCHEDULER),
            *("text_encoder/model.safetensors", "tokenizer/spiece.model", TRANSFORMER, DECODER),
        ],
    ],
)
def test_pointers_of_git_lfs_are_named_together(capsys, light, names):
    for name in names:
        pointer(light / name)
    for name in ("vae/diffusion_pytorch_model.fp16.safetensors", "README.md", "vae/old.bin"):
        pointer(light / name)  # not read, and left by `git lfs pull --include`
    assert command(capsys, light) == (
        f"error: {light} was cloned without git-lfs: run `git lfs pull` in it. Pointers are in "
        f"place of {', '.join(names)}"
    )


@pytest.fixture
def saved(make_pipe, light, tmp_path):
    """Saves the checkpoint by diffusers, whose tokenizer has no spiece.model."""

    def save(**options):
        with no_progress_bars():
            make_pipe().save_pretrained(tmp_path / "saved", **options)
        (light / "face_encoder").rename(tmp_path / "saved" / "face_encoder")
        return tmp_path / "saved"

    return save


def test_one_that_diffusers_has_saved_makes_the_same_video(capsys, saved, tiny, tmp_path):
    """Also in shards, each with an index; and writes nothing into it."""
    folder = saved(max_shard_size="2MB")
    assert not (folder / "tokenizer" / "spiece.model").exists()
    assert len(list(folder.glob("*/*.index.json"))) > 1
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    asked = ("--image", "astronaut", "--num_frames", 1, "--num_infer_steps", 1, "--output_path")
    for name, checkpoint in (("theirs", folder), ("ours", tiny)):
        assert main(capsys, "--ckpts_path", checkpoint, *asked, tmp_path / name)[0] == 0
    ours, theirs = (encoded(tmp_path / name / "42_0.1_0000.mp4") for name in ("ours", "theirs"))
    assert ours == theirs
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    half(folder / "tokenizer" / "tokenizer.json")
    assert command(capsys, folder).endswith("cut short or damaged: tokenizer/tokenizer.json")


@pytest.mark.parametrize("shards", ["10GB", "9MB"])
def test_only_a_variant_is_there(capsys, saved, shards):
    folder = saved(variant="fp16", max_shard_size=shards)
    error = command(capsys, folder)
    assert f"missing or empty: text_encoder/model.safetensors, {TRANSFORMER}, vae/" in error
    assert "; of a variant, such as fp16, or pickled, and not read: text_encoder/model.fp" in error
    assert error.endswith("a variant is read once its index, or its one file, has the plain name")
    for path in [*folder.glob("*/*.index.fp16.json"), *folder.glob("*/*.fp16.safetensors")]:
        path.rename(path.with_name(path.name.replace(".fp16", "")))
    check_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        (INDEX, {"_class_name": "CogVideoXPipeline"}, "holds a CogVideoXPipeline, not a ConsisID"),
        (INDEX, {"transformer": 3}, "cannot be read: 'int' object is not subscriptable"),
        ("transformer/config.json", {"quantization_config": 3}, "'int' object has no attribute"),
        (INDEX, {"transformer": ["diffusers", "CogVideoX"]}, "CogVideoX as transformer, not Co"),
        (INDEX, {"scheduler": ["diffusers", "DDIM"]}, "DDIM as scheduler, not CogVideoXDPMSch"),
        ("transformer/config.json", {"patch_size_t": 2}, "as of a model on CogVideoX1.5, and"),
        ("transformer/config.json", {"is_train_face": False}, "such a model takes no face"),
        (
            *("text_encoder/config.json", {"quantization_config": {"quant_method": "gptq"}}),
            "quantized with gptq, and the package optimum is not installed",
        ),
    ],
)
def test_models_of_another_kind_are_refused(light, name, changed, told):
    edit(light / name, **changed)
    with pytest.raises(CheckpointError) as raised:
        check_checkpoint(light)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nearest_sizes_are_named(light):
    edit(light / "transformer" / "config.json", use_learned_positional_embeddings=False)
    assert video_size(light, 160, 80, 17) == (160, 80, 17)
    for asked, complaint in (
        ((150, 96, 13), "nearest are 144 and 160"),
        ((144, 8, 13), "nearest are 16 and 32"),
        ((144, 96, 11), "nearest are 9 and 12"),
        ((144, 96, 2), "nearest are 1 and 4"),
    ):
        with pytest.raises(ArgumentError, match=complaint):
            video_size(light, *asked)


def test_frames_that_the_vae_makes_are_those_that_it_is_asked_for():
    """The rule for --num_frames, against what the VAE decodes, at the real compression of 4."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(**{**VAE, "temporal_compression_ratio": 4}).eval()
    for num_frames in range(1, 12):
        latent_frames = (num_frames - 1) // 4 + 1
        with torch.no_grad():
            made = vae.decode(torch.zeros(1, 16, latent_frames, 2, 2)).sample.shape[2]
        if made == num_frames:
            check_num_frames(num_frames, 4)
        else:
            with pytest.raises(ArgumentError):
                check_num_frames(num_frames, 4)


def test_weights_that_are_not_whole(light):
    path = light / DECODER
    content = path.read_bytes()
    for damaged in (
        *(content[:-1], content + b"x", content[:8], bytes(range(256)) * 8),
        (2).to_bytes(8, "little") + b"{}",  # an empty header
    ):
        replace(path, damaged)
        with pytest.raises(CheckpointError, match=r"cut short or damaged: vae/diff\S*$"):
            check_checkpoint(light)


def test_what_is_no_checkpoint_is_named_as_what_it_is(tmp_path, tiny):
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / "models--Own--Repo" / "snapshots").mkdir(parents=True)
    for folder, told in (
        (tmp_path / "models--Own--Repo", "a repository of the hub's cache: name one of its snap"),
        (tmp_path, "a LoRA, which goes with a checkpoint"),
        (tiny / "transformer", "one model, ConsisIDTransformer3DModel, where"),
    ):
        with pytest.raises(CheckpointError, match=f"has no {INDEX}: it holds {told}"):
            check_checkpoint(folder)


class Code:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name",
    ["detection_Resnet50_Final.pth", "parsing_bisenet.pth", "EVA02_CLIP_L_336_psz14_s6B.pt"],
)
def test_code_in_weights_does_not_run(tmp_path, light, name):
    path, trace = light / "face_encoder" / name, tmp_path / "it ran"
    path.unlink()
    torch.save({"weight": Code(trace)}, path)
    torch.load(path, weights_only=False)
    assert trace.exists(), "read without care, it does run"
    trace.unlink()
    with pytest.raises(CheckpointError, match="holds more than weights, and is not read"):
        load_face_models(light, CPU, torch.float32)
    assert not trace.exists()


def tensors(change):
    """Change the tensors of a file, by their names; the first name is passed too."""

    def damage(path):
        read = load_file(path)
        change(read, min(read))
        path.unlink()
        save_file(read, path, metadata={"format": "pt"})

    return damage


without_a_tensor = tensors(dict.pop)
with_a_larger_tensor = tensors(lambda read, name: read.update({name: torch.cat([read[name]] * 2)}))


def half(path):
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


def noise(path):
    replace(path, b"\x80\x02junkjunk" * 100)  # begins as a pickle does


def configured(**changed):
    return lambda path: edit(path, **changed)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (FACES, half, "face_encoder cannot be read"),
        ("face_encoder/EVA02_CLIP_L_336_psz14_s6B.pt", noise, "face_encoder cannot be read"),
        ("text_encoder/model.safetensors", without_a_tensor, "text_encoder lacks 1 of the"),
        ("tokenizer/spiece.model", noise, "cannot be read: "),
        (TRANSFORMER, without_a_tensor, "transformer lacks some of the model's weights"),
        (TRANSFORMER, with_a_larger_tensor, "expected shape"),
        ("vae/config.json", configured(block_out_channels=3), "vae cannot be read: "),
    ],
)
def test_files_that_are_there_and_wrong_are_one_line(light, name, damage, told):
    """Also those that the libraries would fill up with random numbers, and go on."""
    damage(light / name)
    part = name.partition("/")[0].replace("tokenizer", "text_encoder")
    load, parts = load_pipeline, {"parts": (part,)}
    if part == "face_encoder":
        load, parts = load_face_models, {}
    with pytest.raises(CheckpointError) as raised:
        load(light, CPU, torch.float32, **parts)
    assert str(raised.value).startswith(str(light))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
