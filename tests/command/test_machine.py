"""What the machine, and the files on it, may lack: told in one line, or done without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, main

from teacache.base.errors import DeviceError
from teacache.sampling import acceleration

PREPARE = "from teacache.base.environment import prepare_environment; prepare_environment()"


def after_preparing(**variables: str) -> str:
    """What the check raises in a process of its own: the last line; "" where all is well."""
    ended = subprocess.run(
        [sys.executable, "-c", PREPARE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
    )
    assert (ended.returncode == 0) == (not ended.stderr)
    return (ended.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None backend:native"),
    ],
)
def test_the_allocator_is_chosen_where_the_user_has_not(chosen, expected):
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    shown = f"{PREPARE}; import os; print(*map(os.environ.get, {names}))"
    variables = {name: value for name, value in os.environ.items() if name not in names}
    said = subprocess.check_output(
        [sys.executable, "-c", shown], text=True, cwd=ROOT, env={**variables, **chosen}
    )
    assert said.strip() == expected


def test_this_machine_has_what_is_needed():
    assert after_preparing() == ""


@pytest.mark.parametrize("library", ["libGL.so.1", "libgthread-2.0.so.0"])
def test_a_server_without_a_screen_is_told_what_to_install(tmp_path, library):
    said = f"{library}: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text(f"raise ImportError({said!r})")
    assert after_preparing(PYTHONPATH=str(tmp_path)) == (
        f"teacache.base.errors.DeviceError: opencv does not find {library}: "
        "apt-get install libgl1 libglib2.0-0"
    )


def test_an_opencv_that_is_missing_or_broken_otherwise(tmp_path):
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text("raise ImportError('no\\nABI')")
    assert after_preparing(PYTHONPATH=str(tmp_path)) == (
        "teacache.base.errors.DeviceError: opencv cannot be imported: no\\nABI"
    )


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "it ends with code 1 and does not say why"),
        ("echo first >&2; echo 'cannot execute cc1plus' >&2; exit 1", "cannot execute cc1plus"),
        ("echo on standard output; exit 1", "on standard output"),
        ("exit 0", "it makes no file"),
        ("exec sleep 60", "it takes more than 1 s for an empty file"),
    ],
)
@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_compiler_that_fails(tmp_path, monkeypatch, script, said, device, variable):
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
    no_program = tmp_path / "no program"
    no_program.write_text("#!/nowhere/sh\n")
    no_program.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{no_program}'")
    with pytest.raises(DeviceError, match="does not work: No such file or directory"):
        acceleration.check_compiler(torch.device("cpu"))


def test_the_command_with_a_compiler_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/bin/false")
    code, output, error = main(
        capsys, "--ckpts_path", "tiny", "--compile", "--output_path", tmp_path / "videos"
    )
    assert code == 2
    assert error.startswith("error: --compile: the compiler /bin/false does not work: ")
    assert error.count("\n") == 1
    assert "identity" not in output
