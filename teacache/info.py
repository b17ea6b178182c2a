"""What made a video: `python3 -m teacache.info FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from teacache.base import interruption
from teacache.base.errors import ArgumentError
from teacache.base.quiet import allow_any_encoding
from teacache.command.arguments import OneLineParser
from teacache.results.video import read_comment


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit code: 2 for a file that this command has not made."""
    parser = OneLineParser(
        prog="python3 -m teacache.info",
        description="Tell what made a video, from the record beside it or from itself.",
    )
    parser.add_argument("file", type=Path, help="the video, .mp4, or its record, .json")
    args = parser.parse_args(argv)
    allow_any_encoding()

    def work() -> None:
        print("\n".join(lines_about(args.file)))

    return interruption.run_command(work)


def lines_about(path: Path) -> list[str]:
    """What a file tells, a line for each thing.

    Raises:
        ArgumentError: where there is no such file, or it is nothing of ours.
    """
    if not path.is_file():
        raise ArgumentError(f"{path}: there is no such file")
    data = _object_in(path.with_suffix(".json")) or {}
    if "rel_l1_thresh" not in data and path.suffix != ".json":
        data = _as_object(read_comment(path))
    if "rel_l1_thresh" not in data:
        raise ArgumentError(f"{path} does not say that this project has made it")
    return [f"{name:<12}{value}" for name, value in _told(data) if value not in (None, "")]


def _told(data: dict[str, Any]) -> list[tuple[str, Any]]:
    schedule = data.get("schedule") or f"rel_l1_thresh {data['rel_l1_thresh']}"
    steps = f"{data['num_infer_steps']}, {schedule}"
    if "computed_steps" in data:
        computed, reused = len(data["computed_steps"]), len(data["reused_steps"])
        steps = f"{computed} computed, {reused} reused of {computed + reused}, {schedule}"
    seconds = data.get("seconds", {}).get("total")
    versions = data.get("versions", {})
    return [
        ("prompt", data["prompt"]),
        ("without", data["negative_prompt"]),
        ("image", data["image"]),
        ("seed", data["seed"]),
        ("steps", steps),
        ("guidance", data["guidance_scale"]),
        ("size", f"{data['num_frames']} frames of {data['width']}x{data['height']}"),
        ("checkpoint", data["ckpts_path"]),
        ("lora", ", ".join(data.get("lora") or [])),
        ("not exact", ", ".join(data.get("approximations") or [])),
        ("dtype", data["dtype"]),
        ("took", f"{seconds:.1f} s on {data['device_name']}" if seconds else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _object_in(path: Path) -> dict[str, Any]:
    try:
        return _as_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _as_object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
