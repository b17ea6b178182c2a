"""What the machine, and the files on it, may lack: told in one line, or done without."""

import os
import pwd
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import ended

from teacache.base.environment import prepare_environment
from teacache.base.errors import DeviceError
from teacache.base.files import cache_folder
from teacache.sampling import acceleration


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, ("expandable_segments:True", None)),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, ("backend:native", None)),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, (None, "backend:native")),
    ],
)
def test_the_allocator_is_chosen_where_the_user_has_not(monkeypatch, chosen, expected):
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    for name in names:
        monkeypatch.setenv(name, chosen.get(name, ""))  # to be given back
        if name not in chosen:
            monkeypatch.delenv(name)
    prepare_environment()
    assert tuple(map(os.environ.get, names)) == expected


def test_onnxruntime_leaves_nothing_in_a_home(tmp_path):
    """It would leave the number of a device, and send what it measures."""
    program = "from teacache.base.environment import prepare_environment; prepare_environment(); "
    variables = {"HOME": str(tmp_path), "XDG_CACHE_HOME": None, "ORT_DISABLE_TELEMETRY": None}
    run = ended(program=("-c", program + "import onnxruntime"), env=variables)
    assert (run.returncode, list(tmp_path.iterdir())) == (0, []), run.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "libGL.so.1: cannot open shared object file: No such file or directory",
            "opencv does not find libGL.so.1: apt-get install libgl1 libglib2.0-0",
        ),
        ("no ABI", "opencv cannot be imported: no ABI"),
    ],
)
def test_an_opencv_that_does_not_work_here(tmp_path, monkeypatch, error, said):
    """As on a server without a screen."""
    (tmp_path / "cv2.py").write_text(f"raise ImportError({error!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    with pytest.raises(DeviceError) as raised:
        prepare_environment()
    assert str(raised.value) == said


@pytest.mark.parametrize(
    "words",
    [
        ("teacache_sample_video.py", "--num_gpus", 2),
        ("teacache_sample_video.py", "--plan"),
        ("-m", "teacache.fit", "--output", "a.json"),
    ],
)
def test_a_missing_package_is_one_line(words):
    """Python without its packages."""
    run = ended(*words[1:], "--ckpts_path", "tiny", program=("-S", words[0]))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.endswith("': pip install -r requirements.txt\n")


def test_a_user_without_a_home_directory_is_told(monkeypatch):
    """As in containers that run under some number for which /etc/passwd has no line."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(DeviceError, match="no home directory: set XDG_CACHE_HOME"):
        cache_folder()


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("device", "variable", "script", "said"),
    [
        ("cpu", "CXX", "echo first >&2; echo 'no cc1plus' >&2; exit 1", "no cc1plus"),
        ("cuda", "CC", "exit 1", "it ends with code 1 and does not say why"),
        ("cpu", "CXX", "exit 0", "it makes no file"),
        ("cpu", "CXX", "exec sleep 60", "it takes more than 1 s for an empty file"),
    ],
)
def test_a_compiler_that_fails(tmp_path, monkeypatch, device, variable, script, said):
    compiler = program(tmp_path / "c++", script)
    monkeypatch.setenv(variable, f"{compiler} -pipe")
    monkeypatch.setattr(acceleration, "COMPILER_SECONDS", 1)
    with pytest.raises(DeviceError) as refusal:
        acceleration.check_compiler(torch.device(device))
    assert str(refusal.value) == f"--compile: the compiler {compiler} does not work: {said}"


def test_the_compilers_that_are_here_work(tmp_path, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("no compiler here")
    monkeypatch.delenv("CXX", raising=False)
    acceleration.check_compiler(torch.device("cpu"))
    passed_on = program(tmp_path / "cache", f'echo "$@" >> {tmp_path}/called; exec "$@"')
    monkeypatch.setenv("CXX", f"{passed_on} g++ -O1")
    acceleration.check_compiler(torch.device("cpu"))
    assert (tmp_path / "called").read_text().startswith("g++ -O1 ")
