"""Finding, building and checking a checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import main

from teacache.base.errors import ArgumentError, CheckpointError
from teacache.checkpoint.folder import (
    check_checkpoint,
    is_full_size,
    is_whole_safetensors,
    local_checkpoint,
)
from teacache.checkpoint.size import video_size
from teacache.embedded import build as tiny_module
from teacache.embedded.build import cached_tiny_checkpoint


@pytest.fixture
def light(tiny, tmp_path):
    """A copy of the checkpoint whose large files are links, to damage one at a time."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder, copy_function=os.link)
    return folder


def edit(path, **changed):
    data = {**json.loads(path.read_text()), **changed}
    path.unlink()  # it is a link
    path.write_text(json.dumps(data))


def test_tiny_is_built_once(tiny):
    made = (tiny / "model_index.json").stat().st_mtime_ns
    assert cached_tiny_checkpoint() == tiny
    assert (tiny / "model_index.json").stat().st_mtime_ns == made
    check_checkpoint(tiny)
    assert not is_full_size(tiny)
    built = [p for p in tiny.parent.iterdir() if "tiny" in p.name]
    assert built == [tiny], "nothing half-made beside it"


def test_tiny_has_the_layout_of_the_real_one(tiny):
    folders = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae", "face_encoder"}
    assert {p.name for p in tiny.iterdir()} == {"model_index.json", *folders}
    assert [p.name for p in (tiny / "tokenizer").iterdir()] == ["spiece.model"]


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def half(folder):
        (folder / "model_index.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_module, "write_checkpoint", half)
    with pytest.raises(KeyboardInterrupt):
        tiny_module.build_tiny_checkpoint(tmp_path / "tiny")
    assert not list(tmp_path.iterdir())


def test_of_two_builds_at_once_one_is_kept(tmp_path, monkeypatch):
    """The other one finished while this one was writing."""

    def write(folder):
        (folder / "model_index.json").write_text("second")
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "model_index.json").write_text("first")

    monkeypatch.setattr(tiny_module, "write_checkpoint", write)
    tiny_module.build_tiny_checkpoint(tmp_path / "tiny")
    assert (tmp_path / "tiny" / "model_index.json").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_module_command_builds_one_where_wanted(tmp_path, tiny):
    command = [sys.executable, "-m", "teacache.embedded", str(tmp_path / "here")]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert built.stdout == f"built {tmp_path / 'here'}\n"
    assert built.stderr == ""
    check_checkpoint(tmp_path / "here")
    for name in ("transformer", "vae", "text_encoder"):  # the same one, wherever it is built
        for file in (tmp_path / "here" / name).glob("*.safetensors"):
            assert file.read_bytes() == (tiny / name / file.name).read_bytes()
    (tmp_path / "empty").mkdir()
    here = subprocess.run(
        [*command[:-1], "."],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=False,
        timeout=300,
    )
    assert here.returncode in (0, 2), "built, or said to be impossible"
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")


def test_a_folder_is_itself(light):
    assert local_checkpoint(str(light)) == light


def test_a_repository_is_not_here_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_checkpoint("BestWishYsh/ConsisID-preview") is None


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/nowhere/at/all", "a/b/c", "", "a b/c"])
def test_neither_folder_nor_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":
        with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
            check_checkpoint(local_checkpoint(name))  # the empty path is the current folder
    else:
        with pytest.raises(CheckpointError, match="no such folder"):
            local_checkpoint(name)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a single file with weights"):
        local_checkpoint(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "face_encoder/parsing_parsenet.pth",
        "face_encoder/models/antelopev2/glintr100.onnx",
        "tokenizer/spiece.model",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_missing_and_empty_files_are_named(light, name, empty):
    check_checkpoint(light)
    (light / name).unlink()
    if empty:
        (light / name).touch()
    with pytest.raises(CheckpointError, match=name):
        check_checkpoint(light)


def test_all_that_is_wrong_is_said_at_once(capsys, light, tmp_path):
    """A shard too few, an empty file, one cut short; before anything is imported for it."""
    folder = light / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (light / "face_encoder" / "parsing_bisenet.pth").unlink()
    (light / "face_encoder" / "parsing_bisenet.pth").touch()
    path = light / "vae" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])
    arguments = ("--ckpts_path", light, "--image", "astronaut", "--output_path", tmp_path / "o")
    code, output, error = main(capsys, *arguments)
    assert (code, output) == (2, "")
    assert error == (
        f"error: {light} is not whole, missing or empty: face_encoder/parsing_bisenet.pth, "
        "transformer/part-2.safetensors; "
        "cut short or damaged: vae/diffusion_pytorch_model.safetensors\n"
    )
    edit(light / "model_index.json", _class_name="CogVideoXImageToVideoPipeline")
    code, output, error = main(capsys, *arguments)
    assert (code, output) == (2, "")
    assert error == (
        f"error: {light} holds a CogVideoXImageToVideoPipeline, not a ConsisIDPipeline\n"
    )


def test_missing_shards_are_named(light):
    folder = light / "transformer"
    single = folder / "diffusion_pytorch_model.safetensors"
    single.rename(folder / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing or empty: transformer/part-2.safetensors$"):
        check_checkpoint(light)


def test_other_pipelines_are_named(light):
    edit(light / "model_index.json", _class_name="CogVideoXPipeline")
    with pytest.raises(CheckpointError, match="CogVideoXPipeline"):
        check_checkpoint(light)


def test_full_size_is_told_by_the_weights(light):
    with (light / "transformer" / "more.safetensors").open("wb") as file:
        file.truncate(5 * 2**30)  # sparse: takes no room
    assert is_full_size(light)


def test_size_is_the_transformers_own(tiny):
    assert video_size(tiny, None, None, None) == (112, 96, 13)
    assert video_size(tiny, 112, 96, 9) == (112, 96, 9)


def test_another_number_of_frames_than_trained_is_told(tiny, caplog):
    video_size(tiny, None, None, 13)
    assert not caplog.records
    video_size(tiny, None, None, 9)
    assert "learned positional embeddings for 13 frames" in caplog.text


def test_learned_positional_embeddings_allow_no_other_size(tiny):
    with pytest.raises(ArgumentError, match="112x96 only"):
        video_size(tiny, 160, 96, None)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ((150, 96, 13), "nearest are 144 and 160"),
        ((144, 8, 13), "nearest are 16 and 32"),
        ((144, 96, 11), "nearest are 9 and 12"),
        ((144, 96, 2), "nearest are 1 and 4"),
    ],
)
def test_nearest_sizes_are_named(light, asked, complaint):
    edit(light / "transformer" / "config.json", use_learned_positional_embeddings=False)
    assert video_size(light, 160, 80, 17) == (160, 80, 17)
    with pytest.raises(ArgumentError, match=complaint):
        video_size(light, *asked)


def test_frames_that_the_vae_makes_are_those_that_it_is_asked_for():
    """The rule for --num_frames, against what the VAE decodes, at the real compression of 4."""
    import torch
    from diffusers import AutoencoderKLCogVideoX

    from teacache.checkpoint.size import check_num_frames

    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(**{**tiny_module.VAE, "temporal_compression_ratio": 4}).eval()
    for num_frames in range(1, 26):
        latent_frames = (num_frames - 1) // 4 + 1
        with torch.no_grad():
            made = vae.decode(torch.zeros(1, 16, latent_frames, 2, 2)).sample.shape[2]
        if made == num_frames:
            check_num_frames(num_frames, 4)
        else:
            with pytest.raises(ArgumentError):
                check_num_frames(num_frames, 4)


@pytest.mark.parametrize("damage", ["short", "long", "no header", "noise", "empty header"])
def test_weights_that_are_cut_short_are_named_with_whatever_else_is_missing(light, damage):
    path = light / "vae" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.unlink()  # it may be a link to the one that other tests read
    path.write_bytes(
        {
            "short": content[:-1],
            "long": content + b"x",
            "no header": content[:8],
            "noise": bytes(range(256)) * 8,
            "empty header": (2).to_bytes(8, "little") + b"{}",
        }[damage]
    )
    (light / "tokenizer" / "spiece.model").unlink()
    with pytest.raises(CheckpointError) as raised:
        check_checkpoint(light)
    assert str(raised.value) == (
        f"{light} is not whole, missing or empty: tokenizer/spiece.model; "
        "cut short or damaged: vae/diffusion_pytorch_model.safetensors"
    )


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200), length=st.integers(0, 200))
def test_no_bytes_make_the_header_check_fail(tmp_path, content, length):
    path = tmp_path / "weights.safetensors"
    for data in (content, length.to_bytes(8, "little") + content):
        path.write_bytes(data)
        assert is_whole_safetensors(path) in (True, False)


def test_what_is_no_checkpoint_is_named_as_what_it_is(capsys, tmp_path, tiny):
    for folder, files, told in (
        ("lora", ["pytorch_lora_weights.safetensors"], "a LoRA"),
        ("peft", ["adapter_config.json", "adapter_model.safetensors"], "a LoRA"),
        ("single", ["consisid.safetensors"], "single files such as consisid.safetensors"),
        ("bare", ["notes.txt"], "nothing of a checkpoint"),
        ("none", [], "nothing"),
    ):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("{}")
        code, _, error = main(capsys, "--ckpts_path", tmp_path / folder, "--device", "cpu")
        assert code == 2
        assert error == f"error: {tmp_path / folder} has no model_index.json: it holds {told}" + (
            ", which goes with a checkpoint\n"
            if told == "a LoRA"
            else ", where a checkpoint has a folder for each model\n"
            if "single" in told
            else "\n"
        )
    code, _, error = main(capsys, "--ckpts_path", tiny / "transformer", "--device", "cpu")
    assert code == 2
    assert "it holds one model, ConsisIDTransformer3DModel, where" in error
    (tmp_path / "whole.safetensors").touch()
    code, _, error = main(capsys, "--ckpts_path", tmp_path / "whole.safetensors")
    assert code == 2
    assert "is a single file with weights" in error


def test_a_run_writes_nothing_into_the_checkpoint(capsys, tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no embeddings of other tests
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, *_ = main(
        capsys,
        *("--ckpts_path", folder, "--image", "astronaut", "--num_frames", 1),
        *("--num_infer_steps", 2, "--output_path", tmp_path / "out"),
    )
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


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
def test_code_in_weights_does_not_run(capsys, tmp_path, tiny, name):
    folder, trace = tmp_path / "mine", tmp_path / "it ran"
    shutil.copytree(tiny, folder)
    torch.save({"weight": Code(trace)}, folder / "face_encoder" / name)
    torch.load(folder / "face_encoder" / name, weights_only=False)
    assert trace.exists(), "read without care, it does run"
    trace.unlink()
    code, _, error = main(
        capsys,
        *("--ckpts_path", folder, "--image", "astronaut"),
        *("--num_infer_steps", 2, "--output_path", tmp_path / "out"),
    )
    assert code == 2
    assert "holds more than weights, and is not read" in error
    assert error.count("\n") == 1
    assert not trace.exists()


def without_a_tensor(path):
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path, metadata={"format": "pt"})


def with_a_larger_tensor(path):
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, path, metadata={"format": "pt"})


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path):
    path.write_bytes(b"\x80\x02junkjunk" * 100)  # begins as a pickle does


def configured(**changed):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("face_encoder/models/antelopev2/glintr100.onnx", half, "face_encoder cannot be read"),
        ("face_encoder/models/antelopev2/scrfd_10g_bnkps.onnx", noise, "face_encoder cannot be"),
        ("face_encoder/parsing_bisenet.pth", noise, "face_encoder cannot be read"),
        ("face_encoder/EVA02_CLIP_L_336_psz14_s6B.pt", noise, "face_encoder cannot be read"),
        ("text_encoder/model.safetensors", without_a_tensor, "text_encoder lacks 1 of the"),
        ("text_encoder/model.safetensors", with_a_larger_tensor, "text_encoder cannot be read"),
        ("tokenizer/spiece.model", noise, "cannot be read: "),
        ("transformer/diffusion_pytorch_model.safetensors", without_a_tensor, "r lacks some of"),
        ("transformer/diffusion_pytorch_model.safetensors", with_a_larger_tensor, "expected shape"),
        ("vae/diffusion_pytorch_model.safetensors", without_a_tensor, "vae lacks some of the"),
        ("vae/config.json", configured(block_out_channels=None), "block_out_channels is None"),
        ("transformer/config.json", configured(sample_width=None), "sample_width is None, no"),
        ("transformer/config.json", configured(num_layers="two"), "num_layers is 'two', no"),
        ("transformer/config.json", configured(num_attention_heads=1), "does not describe"),
        ("transformer/config.json", configured(patch_size_t=2), "of a model on CogVideoX1.5"),
        ("scheduler/scheduler_config.json", configured(num_train_timesteps=1.5), "is 1.5, no"),
        ("model_index.json", configured(scheduler=["diffusers", "Foo"]), "as scheduler, not"),
    ],
)
def test_files_that_are_there_and_wrong_are_one_line(
    capsys, tmp_path, monkeypatch, tiny, name, damage, told
):
    """Also those that the libraries would fill up with random numbers, and go on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no embeddings of other tests
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    damage(folder / name)
    code, _, error = main(
        capsys,
        *("--ckpts_path", folder, "--image", "astronaut", "--num_infer_steps", 2),
        *("--rel_l1_thresh", 0, "--output_path", tmp_path / "out"),
    )
    assert code == 2, error
    assert error.startswith(f"error: {folder}")
    assert told in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("arguments", [(), ("--plan",)])
def test_a_folder_in_a_files_place(capsys, light, tmp_path, arguments):
    """As any other that the system does not let be read."""
    (light / "transformer" / "config.json").unlink()
    (light / "transformer" / "config.json").mkdir()
    code, _, error = main(
        capsys,
        *("--ckpts_path", light, "--image", "astronaut", "--output_path", tmp_path, *arguments),
    )
    assert code == 2
    assert "transformer/config.json" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("--plan",)])
def test_a_file_that_may_not_be_read(capsys, tmp_path, light, monkeypatch, arguments):
    opens = Path.open

    def refuses(path, *args, **kwargs):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuses)
    code, _, error = main(
        capsys,
        *("--ckpts_path", light, "--image", "astronaut", "--output_path", tmp_path, *arguments),
    )
    assert code == 2
    assert error.startswith(f"error: {light}/")
    assert error.endswith("model.safetensors cannot be read: Permission denied\n")


def test_what_lies_about_in_a_checkpoint_does_no_harm(capsys, light, tmp_path):
    (light / "old.safetensors").symlink_to(tmp_path / "gone")
    code, output, _ = main(capsys, "--ckpts_path", light, "--plan")
    assert code == 0
    assert "computed" in output


@pytest.mark.parametrize("shard", ["/etc/passwd", "../vae/config.json", ""])
def test_shards_elsewhere_are_refused(light, shard):
    index = light / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="does not name shards beside it"):
        check_checkpoint(light)


def test_a_model_of_a_strange_kind_is_still_named(tmp_path):
    for kind, told in ((5, "5"), (["T5Model"], "T5Model"), ([], "unknown")):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": kind}))
        with pytest.raises(CheckpointError, match=f"it holds one model, {told}, where"):
            check_checkpoint(tmp_path)


def test_a_plan_of_weights_that_are_cut_short(capsys, light):
    path = light / "transformer" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])
    code, _, error = main(capsys, "--ckpts_path", light, "--plan")
    assert (code, error) == (2, f"error: {path} is cut short or damaged\n")
    path.write_bytes(content)
    edit(light / "transformer" / "config.json", num_attention_heads=1)
    code, _, error = main(capsys, "--ckpts_path", light, "--plan")
    assert code == 2
    assert error == (
        f"error: {light}/transformer/config.json does not describe the weights beside it\n"
    )


def test_a_face_file_that_is_cut_off_is_named(light):
    name = "face_encoder/detection_Resnet50_Final.pth"
    content = (light / name).read_bytes()
    (light / name).unlink()  # it is a link
    (light / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"cut short or damaged: {name}$"):
        check_checkpoint(light)
