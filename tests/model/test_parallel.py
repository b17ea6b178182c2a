"""One video on several processes: real gloo groups, against one process."""

import functools
import subprocess
import sys

import pytest
import torch
from ranks import FORECAST, STEPS, TEXT, THRESHOLDS, VIDEO, WIDE, free_port, sample, work
from support import ROOT

from teacache.base.errors import ArgumentError
from teacache.core.ranks import ALONE, Ranks
from teacache.parallel.division import divide

F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    2: [
        *((1, 2, F32, 6.0, ""), (1, 2, BF16, 6.0, ""), (1, 2, F32, 1.0, ""), (2, 1, F32, 6.0, "")),
        *((1, 2, F32, 1.0, "compile"), (1, 2, BF16, 1.0, "fp8")),
    ],
    4: [(1, 4, F32, 6.0, ""), (1, 4, BF16, 6.0, ""), (2, 2, F32, 6.0, "")],
}

IMPORTED = ["torch.distributed", "diffusers.pipelines.consisid.pipeline_consisid"]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """By case: of each rank the latents, the computed steps and the bytes of each exchange."""
    # One process imports for all of them what takes seconds.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    found = {}
    for world, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        torch.multiprocessing.start_processes(
            work,
            (world, free_port(), cases, str(folder)),
            nprocs=world,
            start_method="forkserver",
        )
        ranks = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
        found |= {case: [results[case] for results in ranks] for case in cases}
    return found


alone = functools.cache(sample)


def bytes_sent(halves: int, parts: int, batch: int, layers: int, tokens: int, width: int) -> int:
    """What each rank sends in a computed step, in half precision, by the room's README.

    Of its own share of query, key, value and output of each layer it keeps one in `parts`.
    """
    own = batch // halves * (tokens // parts) * width
    return 4 * layers * (own - own // parts) * 2


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases])
def test_ranks_agree_with_each_other_and_with_one_process(on_ranks, case):
    """And what is sent is what the formula says."""
    halves, parts, dtype, guidance_scale, how = case
    expected, schedules = alone(dtype, guidance_scale, "fp8" if how == "fp8" else "")
    assert len(schedules) == len(THRESHOLDS) + 1
    assert len(schedules[0]) == STEPS > len(schedules[-2]), "some steps are reused"
    assert len(schedules[-1]) == FORECAST
    computed, layers = sum(map(len, schedules)), WIDE["num_layers"]
    width = WIDE["num_attention_heads"] * WIDE["attention_head_dim"]
    batch = 2 if guidance_scale > 1 else 1
    each = bytes_sent(halves, parts, batch, layers, TEXT + VIDEO, width) * dtype.itemsize // 2
    for latents, steps, exchanged in on_ranks[case]:
        assert steps == schedules
        assert torch.equal(latents, on_ranks[case][0][0])
        if how == "compile":
            # Inductor's kernels sum up in another order than eager ones.
            assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()
            continue
        if halves == 1:
            assert torch.equal(latents, expected), "tokens that are shared change no bit"
        else:
            # A linear layer of one row rounds otherwise than one of two: the modulations'. After
            # ten steps that is 1.2e-6 of the largest latent; float32 rounds at 6e-8.
            assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()
        # Query, key, value and output of each layer, and nothing to tell sizes by.
        assert len(exchanged) == (4 * layers * computed if parts > 1 else 0)
        # A rank keeps one in `parts` of what it exchanges.
        assert sum(exchanged) * (parts - 1) // parts == each * computed


def test_published_and_embedded_size_divide():
    real = {"heads": 48, "text": 226, "video": 17550}
    shares = ((1, 1), (2, 1), (2, 2), (2, 4))
    assert [divide(n, True, **real) for n in (1, 2, 4, 8)] == [Ranks(*each) for each in shares]
    assert [divide(n, False, **real) for n in (1, 2, 4, 8)] == [Ranks(1, n) for n in (1, 2, 4, 8)]
    with pytest.raises(ArgumentError, match=r"--num_gpus 3: 17776 tokens .* use 2 or 4$"):
        divide(3, True, **real)
    with pytest.raises(ArgumentError, match=r"--num_gpus 64: .* use 32$"):
        divide(64, True, **real)
    assert str(divide(4, True, **real)) == "4 ranks: guidance x2, tokens x2"
    assert str(divide(2, True, **real)) == "2 ranks: guidance x2"
    # 17,776 x 3072 numbers of 2 bytes, 4 in each of 42 layers; a half of its half is sent.
    assert bytes_sent(2, 2, 2, 42, 17776, 3072) == pytest.approx(4.59e9, rel=1e-3)
    embedded = {"heads": 6, "text": 226, "video": 294}
    assert divide(4, True, **embedded) == Ranks(2, 2)
    with pytest.raises(ArgumentError, match=r"--num_gpus 8: .* use 4$"):
        divide(8, True, **embedded)  # some part would have no video tokens


@pytest.mark.parametrize(("halves", "parts"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_shares_are_everything_once(halves, parts):
    seen = torch.zeros(2, 10 + 30, dtype=torch.int)
    for rank in range(halves * parts):
        share = Ranks(halves, parts, rank).share(2, 10, 30)
        seen[share.batch, :10][:, share.text] += 1
        seen[share.batch, 10:][:, share.video] += 1
    assert bool((seen == 1).all())
    assert ALONE.share(2, 10, 30) == (slice(0, 2), slice(0, 10), slice(0, 30))


def test_a_rank_ends_in_peace_while_a_thread_waits_in_torch():
    """Python's finalisation would end the thread as it leaves C++ code: terminate, exit code -6."""
    program = """
import datetime, sys, threading, time
import torch.distributed as dist
from teacache.parallel.launch import run_as_rank

class Slow:  # finalisation takes longer than the thread waits
    def __del__(self, sleep=time.sleep):
        sleep(1)

sys.slow = Slow()
store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
wait = lambda: store.wait(["never"], datetime.timedelta(seconds=0.5))

def work():
    threading.Thread(target=wait, daemon=True).start()
    time.sleep(0.2)
    print("done")

sys.exit(run_as_rank(work, helping=True))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr
