"""Peak memory and time to the first video of many jobs: `python tests/many_jobs.py 10 100 1000`.

Each job has a photograph of 12 megapixels and a prompt of its own, and two steps of one frame on
the embedded checkpoint. Each run is a new process with an empty cache. `--resume` is measured with
as many records in the folder.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

COMMAND = Path(__file__).parent.parent / "teacache_sample_video.py"
FLAGS = ("--ckpts_path", "tiny", "--num_infer_steps", "2", "--num_frames", "1", "--resume")
MEGAPIXELS = 12


def write_jobs(folder: Path, count: int, megapixels: float = MEGAPIXELS) -> Path:
    """Write photographs of different pixels, and a jobs file that lists them."""
    import skimage.data

    side = round((megapixels * 10**6) ** 0.5)
    photograph = Image.fromarray(skimage.data.astronaut()).resize((side, side))
    lines = []
    for job in range(count):
        row, column = divmod(job * 16, side - side % 16)
        photograph.paste("white", (column, row * 16, column + 16, row * 16 + 16))
        path = folder / f"{job}.jpg"
        photograph.save(path, quality=80)
        lines.append(json.dumps({"image": str(path), "prompt": f"an astronaut, number {job}"}))
    (folder / "jobs.jsonl").write_text("\n".join(lines))
    return folder / "jobs.jsonl"


def measure(jobs: Path, output: Path) -> tuple[int, float, float]:
    """Run the command in a new process with a cache of its own.

    Returns its peak memory in bytes; seconds until the first video, and until the end.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(output.parent / "cache")}
    words = [sys.executable, COMMAND, *FLAGS, "--jobs", jobs, "--output_path", output, "--quiet"]
    start = time.perf_counter()
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        first = time.perf_counter() - start
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024, first, time.perf_counter() - start


def main(counts: list[int]) -> None:
    """Print a row for each number of jobs, and one for its `--resume`."""
    print("| jobs | peak memory (MiB) | first video (s) | all (s) |\n| --- | --- | --- | --- |")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            jobs = write_jobs(Path(folder), count)
            for name in (f"{count}", f"{count}, all finished before"):
                peak, first, whole = measure(jobs, Path(folder) / "output")
                print(f"| {name} | {peak / 2**20:.0f} | {first:.1f} | {whole:.1f} |", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [10, 100, 1000])
