"""`python3 -m teacache`: the same command as `teacache_sample_video.py`."""

from teacache.command.main import run_and_exit

if __name__ == "__main__":
    run_and_exit()
