"""Sampling in fixed chunks of consecutive sample indices, noise and class a function of the index alone.

So sample i of a set is the same noise and class whatever the batch, shard or process that makes it; and since chunks
are the unit that shards are made of, the images are bitwise the same however shards are spread.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fewstep.lab.config import ConfigError
from fewstep.lab.shards import Shard, ShardCache
from fewstep.lab.text import encoder_of
from fewstep.samplers import ancestral, ddim, dpmpp_2m, heun, stochastic
from fewstep.schedules import Cond, Denoiser, Trained, sample_seeds, seeded_noise

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim, "stochastic": stochastic, "dpmpp_2m": dpmpp_2m, "heun": heun, "ancestral": ancestral,
}  # fmt: skip
OWN_SAMPLERS = {"stochastic": "stochastic", "moments": "ancestral"}  # of students by their kind; ddim of the others


def own_sampler(trained: Trained | None) -> str:
    """The sampler that a model was distilled for; ddim for those that were not."""
    return "ddim" if trained is None else OWN_SAMPLERS.get(trained.kind, "ddim")


def calls_of(sampler: str, steps: int) -> int:
    """Denoiser calls of a sampler: first-order ones and DPM-Solver++(2M) make one per step, Heun 2 steps - 1."""
    return 2 * steps - 1 if sampler == "heun" else steps


def nfe_of(sampler: str, steps: int, w: float | None, two_branches: bool) -> int:
    """Network evaluations per image.

    two_branches: guidance is applied outside the network, so a call with w > 0 evaluates it twice. w = 0 is no guidance
    (Stable Diffusion's guidance scale is 1 + w) and costs one evaluation.
    """
    return calls_of(sampler, steps) * (2 if two_branches and w else 1)


@dataclass(frozen=True)
class SampleSpec:
    """What, besides the weights, determines samples.

    w: guidance weight >= 0; w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). seed and noises choose
    the noise of sample i; sets that differ in `noises` are independent. classes: sample i gets class
    classes[i % len(classes)], none if empty, and so with prompts of a model that takes text. shape: (C, H, W). chunk:
    images sampled at once. noise_level: of ancestral sampling, in [0, 1].
    """

    sampler: str
    steps: int
    w: float | None
    seed: int
    noises: int
    shape: tuple[int, int, int]
    classes: tuple[int, ...]
    chunk: int
    noise_level: float = 0.0
    prompts: tuple[str, ...] = ()

    def ranges(self, count: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of each chunk of samples 0, ..., count - 1."""
        for start in range(0, count, self.chunk):
            yield start, min(start + self.chunk, count)

    def seeds(self, start: int, stop: int) -> Tensor:
        """Seeds (B,) int64 of these samples."""
        return sample_seeds(self.seed, self.noises, torch.arange(start, stop))

    def labels(self, start: int, stop: int) -> Tensor | None:
        """Classes (B,) int64 of these samples, balanced; None without classes."""
        if not self.classes:
            return None
        return torch.tensor(self.classes)[torch.arange(start, stop) % len(self.classes)]

    def texts(self, start: int, stop: int) -> list[str]:
        """Prompts of these samples; [] without prompts."""
        return in_turn(self.prompts, start, stop)

    def key(self, digest: str, device: torch.device) -> dict[str, Any]:
        """The key of the shards that the model with this digest makes of it on this kind of device."""
        mine = {name: value for name, value in asdict(self).items() if name != "prompts" or value}
        return {"format": 1, "model": digest, "device": device.type, **mine}


def sample_chunk(denoiser: Denoiser, spec: SampleSpec, start: int, stop: int, device: torch.device) -> Tensor:
    """Samples start, ..., stop - 1 as (B, C, H, W) float32 on the CPU, made with clip=None and not clamped."""
    seeds = spec.seeds(start, stop)
    noise = seeded_noise(seeds, spec.shape).to(device)
    louder = {"noise_level": spec.noise_level} if spec.noise_level else {}
    with torch.inference_mode():
        cond = condition(denoiser, spec, start, stop, device)
        x = SAMPLERS[spec.sampler](denoiser, noise, spec.steps, cond, spec.w, seeds=seeds, **louder)
    return x.float().cpu()


def in_turn(prompts: Sequence[str], start: int, stop: int) -> list[str]:
    """What samples start, ..., stop - 1 are to show, if prompts are taken in turn; none if there are none."""
    return [prompts[i % len(prompts)] for i in range(start, stop)] if prompts else []


def condition(denoiser: Denoiser, spec: SampleSpec, start: int, stop: int, device: torch.device) -> Cond:
    """What these samples are to be of."""
    return as_condition(denoiser, spec.labels(start, stop), spec.texts(start, stop), device)


def as_condition(denoiser: Denoiser, labels: Tensor | None, texts: list[str], device: torch.device) -> Cond:
    """What the denoiser's own encoder makes of texts or, where there are none, classes (B,), or None."""
    if texts:
        return {name: tensor.to(device) for name, tensor in encoder_of(denoiser).encode(texts).items()}
    return None if labels is None else labels.to(device)


def sample_shards(
    load: Callable[[], Denoiser],
    spec: SampleSpec,
    count: int,
    device: torch.device,
    cache: ShardCache,
    digest: str,
) -> Iterator[tuple[Shard, bool]]:
    """(shard, whether it was there) of samples 0, ..., count - 1 in order; what is not in `cache` is made and kept.

    load: gives the denoiser, called only when something is to be made. digest: of the model, see `evaluation.zoo`.
    """
    key = spec.key(digest, device)
    for start, stop in spec.ranges(count):
        found = cache.get(key, start, stop)
        shard = found or timed_chunk(load(), spec, start, stop, device)
        if found is None:
            cache.put(key, start, stop, shard)
        yield shard, found is not None


class _Begun(Exception):
    """All that could be wrong was looked at."""


def begin_sampling(denoiser: Denoiser, network: nn.Module, spec: SampleSpec, device: torch.device) -> None:
    """Raise and warn as `sample_chunk` would, without computing; `network` is the one that `denoiser` calls."""

    def enough(*_: object) -> None:
        raise _Begun

    hook = network.register_forward_pre_hook(enough)
    try:
        sample_chunk(denoiser, spec, 0, 1, device)
    except _Begun:
        pass
    finally:
        hook.remove()


def timed_chunk(denoiser: Denoiser, spec: SampleSpec, start: int, stop: int, device: torch.device) -> Shard:
    """`sample_chunk` with its wall-clock time."""
    began = time.perf_counter()
    images = sample_chunk(denoiser, spec, start, stop, device)
    return Shard(images, time.perf_counter() - began)


# How the warnings of fewstep.samplers about a model's training begin; any other warning is none of our business.
MISUSE = r"(denoiser was trained|w = .* lies outside the range)"
CUT = r"prompt .* was cut off"  # of fewstep.models.TextEncoder


@contextmanager
def knowingly() -> Iterator[None]:
    """Within, a model used outside what it was trained for, or a long prompt, is no warning: one was told before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"{MISUSE}|{CUT}", category=UserWarning)
        yield


@contextmanager
def misuse(console: Console, strict: bool) -> Iterator[None]:
    """Within, a sampler's warning that a model is used outside what it was trained for is one line on the console.

    Raises:
        ConfigError: with `strict`, that line instead, before anything is computed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if strict else "default", message=MISUSE, category=UserWarning)
        warnings.showwarning = lambda message, *_, **__: console.print(f"warning: {message}", markup=False)
        try:
            yield
        except UserWarning as warning:
            raise ConfigError(f"{warning} (--strict)") from warning
