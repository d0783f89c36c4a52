"""Seconds per batch of students and of the many-step guided teacher: medians of interleaved runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.config import EvaluateConfig
from fewstep.lab.evaluation.plan import Plan
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.latents import decode
from fewstep.lab.sampling import SAMPLERS
from fewstep.schedules import Denoiser

OVERHEAD_REPEATS = 20


def interleaved_medians(
    jobs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each job over `repeats` rounds; a round runs every job once, so that drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            _wait(device)
            began = time.perf_counter()
            job()
            _wait(device)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def decoding_speed(samples: Samples, repeats: int = 5) -> float | None:
    """Images per second that latents are decoded at, in chunks and threads as they were sampled; None for images."""
    if samples.autoencoder is None:
        return None
    threads, latents = torch.get_num_threads(), torch.zeros(samples.chunk, *samples.autoencoder.latent_shape)
    torch.set_num_threads(1 if samples.workers > 1 else threads)
    try:
        jobs = {"decoding": partial(decode, samples.autoencoder, latents)}
        return samples.chunk / interleaved_medians(jobs, repeats, samples.device)["decoding"]
    finally:
        torch.set_num_threads(threads)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(samples: Samples, plan: Plan) -> list[dict[str, Any]]:
    """For each batch size, seconds of every student and of the guided teacher, with speed-ups and what they could be.

    The teacher's time is that of `timing.teacher_steps` steps, scaled to all of its steps; the row says so.
    """
    return [_of_batch(samples, plan, batch) for batch in plan.options.timing.batches]


def _of_batch(samples: Samples, plan: Plan, batch: int) -> dict[str, Any]:
    options, w = plan.options, max(plan.options.weights)
    noise = torch.randn(batch, *samples.shape, generator=torch.Generator().manual_seed(0)).to(samples.device)
    cond = samples.labels(batch).to(samples.device)

    def run(sampler: str, denoiser: Denoiser, steps: int, w: float = w) -> Callable[[], Tensor]:
        return lambda: SAMPLERS[sampler](denoiser, noise, steps, cond, w)

    teacher = samples.models[plan.teacher]
    timed = min(options.timing.teacher_steps, options.truth.steps)
    jobs = {"teacher": run(options.truth.sampler, teacher.denoiser, timed)}
    for steps in options.steps:
        student = samples.models[plan.students.models[steps]]
        jobs[str(steps)] = run(plan.students.sampler, student.denoiser, steps)
    beside = {other.name: other for other in plan.others if options.headline in other.models}
    for name, other in beside.items():
        denoiser = samples.models[other.models[options.headline]].denoiser
        jobs[name] = run(other.sampler, denoiser, options.headline, plan.some_w(other))
    if samples.autoencoder is not None:
        jobs["decoding"] = partial(decode, samples.autoencoder, noise)
    with torch.inference_mode():
        seconds = interleaved_medians(jobs, options.timing.repeats, samples.device)
    decoding = seconds.pop("decoding", 0.0)
    whole = seconds["teacher"] * options.truth.steps / timed
    evaluations = samples.nfe(plan.truth(w))
    return {
        "batch": batch,
        "w": w,
        "repeats": options.timing.repeats,
        "teacher": {
            "sampler": options.truth.sampler, "steps": options.truth.steps, "nfe": evaluations, "seconds": whole,
            "timed_steps": timed,
        },
        "students": [_speed_up(options, steps, seconds[str(steps)], whole, evaluations) for steps in options.steps],
        "others": [{"stage": name, "steps": options.headline, "seconds": seconds[name]} for name in beside],
        "decoding": decoding,  # of latents, in none of the other seconds
        "overhead": _overhead(samples, plan, noise, cond, w),
    }  # fmt: skip


def _speed_up(options: EvaluateConfig, steps: int, seconds: float, teacher: float, evaluations: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "nfe": steps,
        "seconds": seconds,
        "speed_up": teacher / seconds,
        "ideal_by_calls": options.truth.steps / steps,
        "ideal_by_nfe": evaluations / steps,
    }


def _overhead(samples: Samples, plan: Plan, noise: Tensor, cond: Tensor, w: float) -> dict[str, Any]:
    """What ddim adds to the denoiser calls that it makes."""
    steps = plan.options.headline
    denoiser = samples.models[plan.students.models[steps]].denoiser
    t = torch.ones(len(noise), device=noise.device)

    def calls() -> None:
        for _ in range(steps):
            denoiser(noise, t, cond, w)

    jobs: dict[str, Callable[[], object]] = {
        "ddim": lambda: SAMPLERS["ddim"](denoiser, noise, steps, cond, w),
        "calls": calls,
    }
    with torch.inference_mode():
        seconds = interleaved_medians(jobs, OVERHEAD_REPEATS, samples.device)
    return {"steps": steps, "repeats": OVERHEAD_REPEATS, **seconds, "ratio": seconds["ddim"] / seconds["calls"]}
