"""`--plan`: the computed steps of each setting, without sampling."""

from teacache.base.console import print_now
from teacache.base.errors import CheckpointError
from teacache.checkpoint.folder import is_full_size
from teacache.checkpoint.size import video_size
from teacache.comparison.tables import aligned
from teacache.core.ranks import ALONE
from teacache.core.rule import Schedule
from teacache.preflight.checks import find_checkpoint, plan, ranks_of
from teacache.preflight.machine import choose_device, choose_dtype
from teacache.request.values import Request


def show(request: Request) -> None:
    """Print the computed steps of each setting.

    Raises:
        CheckpointError: if the checkpoint is not downloaded.
    """
    options = request.options
    checkpoint = find_checkpoint(options.ckpts_path, complete=False)
    if checkpoint is None:
        raise CheckpointError(
            f"--plan reads a checkpoint folder, and {options.ckpts_path} is not here yet: a first "
            "video downloads it. To plan the small checkpoint: --ckpts_path tiny"
        )
    machine, form = options.machine, options.format
    device = choose_device(machine.device)
    # A full-size checkpoint is planned for sampling on a GPU, even on a machine without one.
    for_gpu = machine.dtype == "auto" and is_full_size(checkpoint)
    dtype = choose_dtype("bfloat16" if for_gpu else machine.dtype, device)
    size = video_size(checkpoint, form.width, form.height, form.num_frames)
    ranks = ranks_of(options, checkpoint, size)
    names = [job.schedule or f"{job.rel_l1_thresh:g}" for job in request.all_jobs]
    schedules = plan(request.all_jobs, options, checkpoint, device, dtype)
    print_now(describe(list(dict.fromkeys(zip(names, schedules, strict=True)))))
    if ranks != ALONE:
        print_now(f"on {ranks}")


def describe(schedules: list[tuple[str, Schedule]]) -> str:
    """A table of named schedules, one line each, with a filled cell for each computed step."""
    only_thresholds = all(schedule.rel_l1_thresh is not None for _, schedule in schedules)
    lines = [["rel_l1_thresh" if only_thresholds else "", "computed", "speed-up", "schedule"]]
    for name, schedule in schedules:
        computed, steps = set(schedule.computed_steps), schedule.num_steps
        lines.append(
            [
                name if only_thresholds or schedule.rel_l1_thresh is None else f"threshold {name}",
                f"{len(computed)} of {steps}",
                f"{schedule.speedup:.2f}x",
                "".join("■" if step in computed else "□" for step in range(steps)),
            ]
        )
    remarks = ["speed-up: denoising, relative to threshold 0, if a reused step takes no time"]
    if any(plan.steps_outside_fitted_range and plan.rel_l1_thresh for _, plan in schedules):
        remarks.append("some distances are outside the range of the coefficients: computed")
    return "\n".join([aligned(lines), "", *remarks])
