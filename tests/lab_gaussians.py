"""Models whose samples are known in closed form, and the evaluation plan of tests that use them.

Class c is N(c / 10, 1/64) in every pixel and no class at all N(0, 1/64), so guidance with w makes
N((1 + w) c / 10, 1/64): x_w = (1 + w) x_c - w x_0 is again the exact denoiser of a Gaussian, whose probability flow
is a straight scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewstep.lab.config import EvaluateConfig, ReferenceConfig, TimingConfig
from fewstep.lab.evaluation.plan import Plan, Students
from fewstep.lab.evaluation.samples import Samples
from fewstep.lab.evaluation.zoo import Model
from fewstep.lab.metrics import register_judge
from fewstep.lab.shards import ShardCache
from fewstep.schedules import Cosine, seeded_noise

VARIANCE = 1 / 64
SHAPE = (1, 2, 2)
CLASSES = (0, 1, 2)


def mean_of(labels: Tensor, w: float) -> Tensor:
    return ((1 + w) * labels / 10)[:, None, None, None]


def exact(noise: Tensor, labels: Tensor, w: float) -> Tensor:
    """Where the probability flow takes noise at t = 1 (alpha is 0 there to 5e-5)."""
    return mean_of(labels, w) + VARIANCE**0.5 * noise


class Teacher:
    """The exact guided denoiser."""

    def __init__(self) -> None:
        self.schedule = Cosine()

    def __call__(self, z: Tensor, t: Tensor, cond: Tensor, w: float = 0.0) -> Tensor:
        alpha, sigma = (a[:, None, None, None] for a in self.schedule.alpha_sigma(t))
        mean = mean_of(cond, w)
        return mean + VARIANCE * alpha / (VARIANCE * alpha**2 + sigma**2) * (z - alpha * mean)


class Student:
    """Exact in one step, but for `bias` in every pixel; listens to `hears` times w."""

    def __init__(self, bias: float, hears: float = 1.0) -> None:
        self.schedule, self.bias, self.hears = Cosine(), bias, hears

    def __call__(self, z: Tensor, t: Tensor, cond: Tensor, w: float) -> Tensor:
        alpha, sigma = (a[:, None, None, None] for a in self.schedule.alpha_sigma(t))
        mean = mean_of(cond, self.hears * w)
        return mean + (VARIANCE / (VARIANCE * alpha**2 + sigma**2)) ** 0.5 * (z - alpha * mean) + self.bias


@dataclass(frozen=True)
class FakeModel:
    """Stands in for `evaluation.zoo.Model`."""

    digest: str
    denoiser: Any
    two_branches: bool = False


def judge(images: Tensor) -> tuple[Tensor, Tensor]:
    pixels = images.flatten(1)
    return pixels, -200 * (pixels.mean(1, keepdim=True) - torch.tensor(CLASSES) / 10).square()


def options(**changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "num_samples": 60, "paired_noises": 30, "weights": [0.0, 1.0], "steps": [4, 1], "headline": 4, "chunk": 25,
        "reference": ReferenceConfig("dpmpp_2m", 40), "truth": ReferenceConfig("ddim", 200), "check_noises": 10,
        "guide_steps": 40, "curve_weights": [0.0, 1.0], "curve_reference": ReferenceConfig("dpmpp_2m", 40),
        "kid_subsets": 3, "timing": TimingConfig([1, 2], 1, 2),
    }  # fmt: skip
    return EvaluateConfig(**{**settings, **changes})


def plan(chosen: EvaluateConfig | None = None, others: tuple[Students, ...] = ()) -> Plan:
    students = Students("halve", {4: "halve/steps_4", 1: "halve/steps_1"}, (0.0, 2.0))
    return Plan(chosen or options(), "teacher", "guide", students, others, training_images=70)


def samples(root: Path, chosen: Plan, **students: Student) -> Samples:
    models = {
        "teacher": FakeModel("teacher", Teacher(), two_branches=True),
        "guide": FakeModel("guide", Teacher()),
        "halve/steps_4": FakeModel("4", students.get("four", Student(0.02))),
        "halve/steps_1": FakeModel("1", students.get("one", Student(0.1))),
        "small/steps_1": FakeModel("small", Student(0.05)),
    }
    return Samples(
        chosen.requests(), cast(dict[str, Model], models), ShardCache(root), register_judge("gaussians", judge),
        SHAPE, CLASSES, seed=3, chunk=chosen.options.chunk, device=torch.device("cpu"),
    )  # fmt: skip


def noise_and_labels(made: Samples, count: int, noises: int = 0) -> tuple[Tensor, Tensor]:
    spec = made.spec(plan().reference(0.0, noises))
    return seeded_noise(spec.seeds(0, count), SHAPE), cast(Tensor, spec.labels(0, count))
