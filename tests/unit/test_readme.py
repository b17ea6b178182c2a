"""What the README and the head of the script say, held to what is true."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from support import ROOT

import teacache
from teacache.cluster.__main__ import RAY
from teacache.core.rule import Limits
from teacache.request.arguments import build_parser
from teacache.request.flags import FLAGS, GROUPS

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "teacache").glob("*/README.md")}
# What another commit printed or needs is not of this one.
COMMANDS = README + "".join(
    text for path, text in ROOMS.items() if path.parent.name not in ("benchmark", "embedded")
)


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables() -> str:
    lines = []
    for title, group in GROUPS.items():
        lines += [f"{title[0].upper()}{title[1:]}:", ""]
        lines += ["| argument | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `--{flag.spelling}` | {flag.shown} | {flag.meaning} |" for flag in group]
        lines.append("")
    return "\n".join(lines)


def test_the_tables_are_those_of_the_flags():
    arguments = section(ROOMS[ROOT / "teacache/command/README.md"], "Arguments")
    assert arguments.strip() == tables().strip()
    options = {option for action in build_parser()._actions for option in action.option_strings}
    assert options == {f"--{name}" for name in FLAGS} | {"-h", "--help"}


def test_the_rooms_are_those_of_the_package():
    layout = section(README, "Layout").split("tests/")[0]
    named = set(re.findall(r"([a-z]+)/", layout)) - {"teacache"}
    rooms = {path.parent.name for path in (ROOT / "teacache").glob("*/__init__.py")}
    assert named == rooms


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert README.count("\n") <= 250
    for path, text in {ROOT / "README.md": README, **ROOMS}.items():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert "://" in target or (path.parent / target).exists(), (path, target)


def test_the_script_names_the_packages_of_requirements():
    """So that `uv run teacache_sample_video.py` installs what pip does."""
    script = (ROOT / "teacache_sample_video.py").read_text(encoding="utf-8")
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", script)
    assert block, "the block of PEP 723"
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert metadata["dependencies"] == required
    assert metadata["requires-python"] == ">=3.11"


def test_optional_packages_are_those_that_are_tested():
    tested = (ROOT / "tests" / "requirements.txt").read_text(encoding="utf-8").split()
    named = set(re.findall(r"pip install ([a-z-]+==[\d.]+)", COMMANDS))
    packages = {package.partition("==")[0] for package in named}
    assert packages == {"peft", "pillow-heif", "ray", "torchao"}
    assert named <= set(tested)
    assert RAY in named


def test_the_names_of_the_package():
    """Each is there; importing the package imports none of their modules."""
    assert all(hasattr(teacache, name) for name in teacache.__all__)
    assert teacache.Limits(max_reuse=2) == Limits(1, 1, 2)
    code = "import teacache, sys; assert not [name for name in sys.modules if 'teacache.' in name]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


PROGRAM = r"python3 (-m teacache[.\w]*|teacache_sample_video\.py)((?:\\\n|[^\n`;&])*)"


@pytest.mark.parametrize(("program", "words"), re.findall(PROGRAM, COMMANDS))
def test_every_command_is_understood(capsys, tmp_path, monkeypatch, program, words):
    """Each value by its reader, and each flag: with --help at its end nothing is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me.jpg").touch()
    words = re.sub(r'"?\$\w+/(4|8|"\$\w+"|\$\w+"?)', "0/8", words.replace("\\\n", " "))
    arguments = [word for word in shlex.split(words, comments=True) if word != "..."]
    module = program.removeprefix("-m ").replace(
        "teacache_sample_video.py", "teacache.command.main"
    )
    package = importlib.util.find_spec(module).submodule_search_locations
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    output, error = capsys.readouterr()
    assert ended.value.code == 0, error
    assert [word for word in arguments if word.startswith("--") and word not in output] == []


@pytest.mark.parametrize("block", re.findall(r"```bash\n(.*?)```", COMMANDS, re.DOTALL))
def test_a_shell_reads_what_is_to_be_typed(block):
    run = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
    assert (run.returncode, run.stderr) == (0, "")
