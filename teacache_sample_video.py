#!/usr/bin/env python3
"""Sample an identity-preserving video with ConsisID and TeaCache: from a photograph to an mp4."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys

from teacache import checkpoint as checkpoints
from teacache import identity as faces
from teacache.arguments import parse_arguments
from teacache.errors import TeaCacheError
from teacache.output import claimed_stem, prepare_folder, written_whole
from teacache.quiet import silence_libraries
from teacache.report import Stages, build_record, summary, write_record
from teacache.video import write_video


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0 done, 2 wrong input, 130 interrupted."""
    args = parse_arguments(argv)
    silence_libraries()
    try:
        sample(args, say=(lambda line: None) if args.quiet else print_now)
    except TeaCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def sample(args: argparse.Namespace, say) -> None:
    """One video, stage by stage: what is cheap to check comes before what is slow to load."""
    stages = Stages(say)
    prepare_folder(args.output_path)
    with stages.stage("checkpoint"):
        checkpoint = checkpoints.local_checkpoint(args.ckpts_path)
    with stages.stage("image"):
        image = faces.load_image(args.image)
    with stages.stage("imports"):
        from teacache import sampler
        from teacache.transformer import apply_teacache
    device = sampler.choose_device(
        args.device, full_size=checkpoint is None or checkpoints.is_full_size(checkpoint)
    )
    dtype = sampler.choose_dtype(args.dtype, device)
    if checkpoint is None:
        with stages.stage("download"):
            checkpoint = checkpoints.download_checkpoint(args.ckpts_path)
    checkpoints.check_checkpoint(checkpoint)
    size = checkpoints.video_size(checkpoint, args.width, args.height, args.num_frames)

    with stages.stage("identity"):
        face_models = faces.load_face_models(checkpoint, device, dtype)
        identity = faces.find_identity(image, face_models, device, dtype)
        del face_models
    with stages.stage("loading"):
        pipe = sampler.load_pipeline(checkpoint, device, dtype, args.offload, args.vae_tiling)
    with stages.stage("text"):
        text = sampler.encode_text(pipe, args.prompt, args.negative_prompt, args.guidance_scale)
    with (
        apply_teacache(pipe, args.rel_l1_thresh, coefficients=args.coefficients) as teacache,
        stages.stage("denoising"),
        denoising_bar(args, teacache) as on_step,
    ):
        latents = sampler.denoise(
            pipe,
            identity,
            text,
            size,
            seed=args.seed,
            num_infer_steps=args.num_infer_steps,
            guidance_scale=args.guidance_scale,
            on_step=on_step,
        )
    with stages.stage("decoding"):
        frames = sampler.decode(pipe, latents)

    with claimed_stem(args.output_path, f"{args.seed}_{args.rel_l1_thresh}") as stem:
        with stages.stage("writing"), written_whole(stem, ".mp4") as path:
            write_video(frames, path, args.fps)
        record = build_record(
            settings_of(args, size, device, dtype),
            teacache.policy,
            stages.with_total(),
            sampler.device_name(device),
            sampler.peak_memory_bytes(device),
        )
        with written_whole(stem, ".json") as path:
            write_record(record, path)
    video = f"{stem}.mp4"
    print(video if args.quiet else summary(video, record, teacache.policy.why_nothing_was_reused()))


def settings_of(args: argparse.Namespace, size, device, dtype) -> dict[str, object]:
    """The arguments as the record keeps them, with what was chosen where they left a choice."""
    settings = {name: value for name, value in vars(args).items() if name != "quiet"}
    chosen = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    return {**settings, **size._asdict(), **chosen, "output_path": str(args.output_path)}


@contextlib.contextmanager
def denoising_bar(args: argparse.Namespace, teacache):
    """A progress bar that counts computed and reused steps; nothing where stderr is no terminal."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with (
        tqdm(
            total=args.num_infer_steps, desc="denoising", leave=False, disable=args.quiet or None
        ) as bar,
        logging_redirect_tqdm([logging.getLogger("teacache")]),  # warnings above the bar
    ):

        def on_step() -> None:
            policy = teacache.policy
            counts = {"computed": len(policy.computed_steps), "reused": len(policy.reused_steps)}
            bar.set_postfix(counts, refresh=False)
            bar.update()

        yield on_step


def print_now(line: str) -> None:
    """Print at once, also into a pipe, where a run of minutes would otherwise stay silent."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
