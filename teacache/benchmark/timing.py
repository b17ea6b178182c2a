"""What is measured within one process, on random weights: steps, decoding, a whole video, kernels.

One transformer and one decoder become faster row by row: as diffusers has them, then as the command
uses them, then compiled, then with float8 layers. None of that is undone.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from teacache.base import device as devices
from teacache.base.console import Console, Stages
from teacache.benchmark.random_weights import random_material
from teacache.benchmark.table import Row, in_words
from teacache.core.forward import apply_teacache
from teacache.results.video import write_video
from teacache.sampling import acceleration, attention, sampler
from teacache.sampling.decoder_memory import DecoderMemory

GUIDANCE_SCALE = 6.0
SEED = 42
# The steps of a measurement; those between the third and the last are reused, by the forecast.
WARM_UP, COMPUTED = 2, (0, 1, 2, 6)
REPEATS = 5
KERNELS = 25  # in the list of a profile


class Bench:
    """The models of one process, and the rows that are measured on them.

    Args:
        name: size of the random weights, see `random_weights.CONFIGS`.
        backend: a value of `--attention`.

    Raises:
        ArgumentError: if the backend does not work here.
    """

    def __init__(self, name: str, backend: str, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.backend = device, dtype, backend
        self.pipe, self.identity, self.text, self.size = random_material(name, device, dtype)
        self.transformer = self.pipe.transformer
        config, (width, height, num_frames) = self.transformer.config, self.size
        self.heads, self.head_dim = config.num_attention_heads, config.attention_head_dim
        frames = (num_frames - 1) // config.temporal_compression_ratio + 1
        area = (config.sample_height // 2) * (config.sample_width // 2)
        self.tokens = config.max_text_seq_length + frames * area
        attention.choose_backend(backend, device, dtype, self.tokens, self.head_dim)
        self.about = {
            "weights": f"random, {name}, {devices.dtype_name(dtype)}",
            "video": f"{num_frames} frames of {width}x{height}, {self.tokens} tokens",
        }

    def accelerate(self, quantize: str | None) -> Row:
        """A computed step with `--compile`, and with `--quantize fp8` if it is `fp8`."""
        acceleration.prepare_acceleration(True, quantize, "none", self.device, self.dtype)
        if quantize:
            acceleration.quantize_fp8(self.transformer)
        acceleration.compile_transformer(self.transformer)
        return self.exact()

    def plain(self) -> Row:
        """A step of the transformer as diffusers has it."""
        row, _ = self._loop(3)
        row.seconds = row.seconds[1:]  # without the one that warms up
        return row

    def exact(self) -> Row:
        """A computed step, after two steps to warm up. `forecast` is the forecast step's row."""
        with apply_teacache(self.pipe, reuse="forecast") as handle:
            handle.follow(range(WARM_UP))
            first, _ = self._loop(WARM_UP)
            handle.follow(COMPUTED)
            computed, self.forecast = self._loop(COMPUTED[-1] + 1)
        computed.notes = f"the first two steps {sum(first.seconds):.1f} s"
        return computed

    def _loop(self, num_steps: int) -> tuple[Row, Row]:
        """Rows of the steps in `COMPUTED`, and of the others."""
        start = sampler.prepare(self.pipe, self.identity, self.size, SEED)
        loop = sampler.Loop(self.pipe, start, self.text, self.size, num_steps, GUIDANCE_SCALE)
        marks, peaks, above = [devices.mark(self.device)], [], []
        for _ in range(num_steps):
            before = self.forget_peak()
            loop.advance(loop.predict())
            marks.append(devices.mark(self.device))
            peaks.append(self.peak())
            above.append((peaks[-1][0] or 0) - before)
        seconds = devices.seconds_between(marks)
        computed = [n for n in range(num_steps) if n in COMPUTED]
        reused = [n for n in range(num_steps) if n not in COMPUTED]
        result = Row([seconds[n] for n in computed], *peaks[computed[-1]])
        forecast = Row([seconds[n] for n in reused])
        if reused and self.device.type == "cuda":
            more, latents = max(above[n] for n in reused), loop.latents.nbytes
            forecast.notes = f"{more / 2**20:.1f} MiB above; latents have {latents / 2**20:.1f}"
        return result, forecast

    def video(self, num_infer_steps: int, computed_steps: int) -> Row:
        """From the loaded model to the mp4, by the forecast."""
        stages, pipe = Stages(Console(quiet=True)), self.pipe
        self.forget_peak()
        with (
            apply_teacache(pipe, computed_steps=computed_steps),
            tempfile.TemporaryDirectory() as folder,
        ):
            with stages.stage("encoding"):
                start = sampler.prepare(pipe, self.identity, self.size, SEED)
            with stages.stage("denoising"):
                latents, _ = sampler.denoise(
                    pipe, start, self.text, self.size, num_infer_steps=num_infer_steps,
                    guidance_scale=GUIDANCE_SCALE,
                )  # fmt: skip
            room = DecoderMemory(pipe, self.size, "none").to_decode(last=False)
            with room, stages.stage("decoding"):
                frames = sampler.decode(pipe, latents)
            with stages.stage("writing"):
                write_video(frames, Path(folder) / "video.mp4")
        seconds = stages.with_total()
        return Row([seconds.pop("total")], *self.peak(), in_words(seconds))

    def ceilings(self) -> Row:
        """A large matrix product and a large copy, which no kernel can pass."""
        side = 8192 if self.device.type == "cuda" else 256
        one, other = (
            torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2)
        )
        seconds = self._repeated(lambda: one @ other)
        source = torch.ones(16 * side**2, device=self.device, dtype=self.dtype)
        target = torch.empty_like(source)
        copy = statistics.median(self._repeated(lambda: target.copy_(source)))
        rate = 2 * source.nbytes / copy / 1e12
        return Row(seconds, notes=f"{_rate(2 * side**3, seconds)}; a copy {rate:.2f} TB/s")

    def attention(self) -> Row:
        """The attention of one layer by itself."""
        shape = (2, self.tokens, self.heads, self.head_dim)
        inputs = [torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(3)]
        name = attention.BACKENDS.get(self.backend, self.backend)
        attention.exchange_kernel(self.backend)
        seconds = self._repeated(lambda: dispatch_attention_fn(*inputs, backend=name))
        checked = (self.device, self.dtype, self.tokens, self.head_dim)
        away = attention.deviation(self.backend, *checked)
        rate = _rate(8 * self.heads * self.head_dim * self.tokens**2, seconds)
        return Row(seconds, notes=f"{rate}, {away:.2g} from native")

    def profile(self, texts: list[str]) -> Row:
        """The kernels of a computed step together; the longest are listed in `texts`."""
        with apply_teacache(self.pipe, 0.0):
            start = sampler.prepare(self.pipe, self.identity, self.size, SEED)
            loop = sampler.Loop(self.pipe, start, self.text, self.size, 2, GUIDANCE_SCALE)
            loop.advance(loop.predict())
            with torch.profiler.profile() as profiler:
                loop.advance(loop.predict())
                loop.latents.cpu()  # waits
        # On a GPU the entries of the CPU's operators count their kernels again.
        own = "device" if self.device.type == "cuda" else "cpu"
        kernels = [
            (getattr(event, f"self_{own}_time_total") / 1e3, event.count, event.key[:80])
            for event in profiler.key_averages()
            if event.device_type.name.lower() == self.device.type
        ]
        kernels.sort(reverse=True)
        lines = [f"{ms:9.2f} ms {count:6} x  {name}" for ms, count, name in kernels[:KERNELS]]
        texts.append("\n".join(["The longest kernels:", "", "```", *lines, "```"]))
        return Row([sum(ms for ms, _, _ in kernels) / 1e3])

    def decodings(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Rows of the decoder: as it is, then with one change each, which is taken back."""
        vae, plain = self.pipe.vae, []
        latents = sampler.prepare(self.pipe, self.identity, self.size, SEED).noise

        def measure(change: Callable[[], object], back: Callable[[], object]) -> Row:
            moments = []
            self.forget_peak()
            change()
            try:
                with DecoderMemory(self.pipe, self.size, "none").to_decode(last=False):
                    for _ in range(3):  # the first one warms up
                        frames = sampler.decode(self.pipe, latents)
                        moments.append(time.perf_counter())
            finally:
                back()
            seconds = [after - before for before, after in itertools.pairwise(moments)]
            plain.append(np.stack([np.asarray(frame, int) for frame in frames]))
            away = np.abs(plain[-1] - plain[0]).max()
            notes = f"up to {away} of 255 away" if away else "the same frames"
            return Row(seconds, *self.peak(), notes if len(plain) > 1 else "")

        def arrange(layout: torch.memory_format) -> None:
            for layer in vae.modules():
                if isinstance(layer, torch.nn.Conv3d):
                    layer.weight.data = layer.weight.data.contiguous(memory_format=layout)

        fastest = partial(setattr, torch.backends.cudnn, "benchmark")
        frames = partial(setattr, vae, "num_latent_frames_batch_size")
        last, first = torch.channels_last_3d, torch.contiguous_format
        for figure, change, back in (
            ("decoding", int, int),
            ("decoding, cuDNN's fastest", partial(fastest, True), partial(fastest, False)),
            ("decoding, channels last", partial(arrange, last), partial(arrange, first)),
            ("decoding, four latent frames at a time", partial(frames, 4), partial(frames, 2)),
            ("decoding, compiled", partial(acceleration.compile_decoder, vae), self._uncompile),
        ):
            yield figure, partial(measure, change, back)

    def _uncompile(self) -> None:
        for module in self.pipe.vae.modules():
            module._compiled_call_impl = None

    def _repeated(self, work: Callable[[], object]) -> list[float]:
        """The seconds of each of several runs, after one to warm up."""
        marks = []
        with torch.no_grad():
            for _ in range(REPEATS + 2):
                marks.append(devices.mark(self.device))
                work()
        return devices.seconds_between(marks)[1:]

    def forget_peak(self) -> int:
        """Begin to measure peak memory; return the bytes that are allocated."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> tuple[int | None, int | None]:
        """Peak of allocated and of reserved bytes; None on a CPU."""
        if self.device.type != "cuda":
            return None, None
        return devices.peak_memory_bytes(self.device), devices.peak_reserved_bytes(self.device)


def _rate(operations: int, seconds: list[float]) -> str:
    return f"{operations / statistics.median(seconds) / 1e12:.3g} TFLOP/s"
