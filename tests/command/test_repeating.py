"""Making a video again by its record; seeds that are drawn."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support import encoded, main, refused

import teacache
from teacache.results.record import read_record
from teacache.run import loop as run

WHOLE = ("--ckpts_path", "tiny", "--rel_l1_thresh", 0.2, "--num_infer_steps", 6)
SHORT = (*WHOLE, "--num_frames", 1)


def test_a_record_names_the_command_that_makes_the_video_again(capsys, tmp_path):
    """As a shell reads it, whatever is in the prompt."""
    (tmp_path / "own.json").write_text('{"values": [0, 0, 0, 0, 0.05], "source": "own"}')
    prompt = 'A person; turns = left # and\nsmiles \\ é, isn\'t $HOME "here"? שלום 👩‍🚀\t.'
    asked = (*SHORT, "--prompt", prompt, "--max_reuse", 2, "--seed", 2**63 - 1)
    asked += ("--coefficients", tmp_path / "own.json")
    code, output, _ = main(capsys, *asked, "--output_path", tmp_path, "--quiet")
    assert code == 0
    video = Path(output.strip())
    record = read_record(video.with_suffix(".json"))
    assert record.versions["teacache"] == teacache.__version__
    assert record.settings.prompt == prompt
    shown = ["bash", "-c", f"printf '%s\\0' {record.command}"]
    words = subprocess.check_output(shown, text=True).removesuffix("\0").split("\0")
    assert words[:2] == ["python3", "teacache_sample_video.py"]
    code, output, _ = main(capsys, *words[2:], "--quiet")
    assert code == 0
    again = Path(output.strip())
    assert again != video
    assert encoded(again) == encoded(video)
    second = read_record(again.with_suffix(".json"))
    assert second.settings == record.settings
    assert second.computed_steps == record.computed_steps
    assert second.command == record.command.replace(video.stem, again.stem)


def test_a_random_seed_is_said_and_recorded(capsys, tmp_path):
    code, output, _ = main(capsys, *SHORT, "--seed", "random", 5, "--output_path", tmp_path)
    assert code == 0
    seeds = output.splitlines()[0].removeprefix("seed").removesuffix(", drawn").split()
    assert seeds[1] == "5"
    record = read_record(tmp_path / f"{seeds[0]}_0.2_0000.json")
    assert record.settings.seed == int(seeds[0]) < 2**32
    error = refused(capsys, *SHORT, "--seed", "random", "--shard", "0/2")
    assert "--seed: random would be another seed in each --shard" in error


def test_short_prompts_of_the_real_model_get_a_hint(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "is_full_size", lambda folder: True)
    quick = (*SHORT, "--num_infer_steps", 1, "--output_path", tmp_path)
    assert "hint        'a man' is short" in main(capsys, *quick, "--prompt", "a man")[1]
    assert "hint" not in main(capsys, *quick, "--prompt", "a man " * 20)[1]
