"""Encoders against reverse DDIM, on Gaussians whose bridges are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lab_gaussians import VARIANCE, Student, Teacher, exact, judge, mean_of
from torch import Tensor

from fewstep.lab.config import InvertConfig
from fewstep.lab.context import Interrupted
from fewstep.lab.evaluation.inversion import DDIM, DISTILLED, Bridge, cross, measure, other_classes, verdicts
from fewstep.schedules import Cosine, seeded_noise

LABELS = torch.arange(12) % 3
NOISE = seeded_noise(torch.arange(12), (1, 2, 2))
OPTIONS = InvertConfig(images=12, weights=[0.0, 1.0], steps=[1], truth_steps=256, headline=1, at_most=0.5, chunk=5)


class Encoder:
    """Exact in one reversed step, but for `bias` in the latent."""

    def __init__(self, bias: float) -> None:
        self.schedule, self.bias = Cosine(), bias

    def __call__(self, z: Tensor, t: Tensor, cond: Tensor, w: float) -> Tensor:
        latent = (z.double() - mean_of(cond, w)) / VARIANCE**0.5 + self.bias
        alpha, sigma = (a[:, None, None, None] for a in self.schedule.alpha_sigma(torch.zeros(len(z)).double()))
        alpha_1, sigma_1 = (a[:, None, None, None] for a in self.schedule.alpha_sigma(torch.ones(len(z)).double()))
        noise = (latent - alpha_1 / alpha * z) / (sigma_1 - alpha_1 / alpha * sigma)
        return (z - sigma * noise) / alpha  # the x whose reversed step from 0 lands on the latent


TRUTH = Bridge(DDIM, 256, Teacher(), Teacher(), two_branches=True)
PERFECT = Bridge(DISTILLED, 1, Encoder(0.05), Student(0.02), two_branches=False)


def rows(*bridges: Bridge) -> list[dict[str, Any]]:
    x = exact(NOISE, LABELS, 0.0)
    found = measure([*bridges], TRUTH, x, LABELS, 3, lambda images: judge(images)[1], OPTIONS, lambda: False)
    return [row for row, _ in found]


def test_the_truth_is_the_known_bridge() -> None:
    """Encoded to the noise that the image is made of, decoded to the other class: else every error is the ruler's."""
    x, targets = exact(NOISE, LABELS, 1.0), other_classes(LABELS, 3)
    made = cross(TRUTH, x, LABELS, targets, 1.0, chunk=5)
    torch.testing.assert_close(made.latents, NOISE, rtol=0, atol=0.08)
    torch.testing.assert_close(made.back, x, rtol=0, atol=0.03)
    torch.testing.assert_close(made.moved, exact(NOISE, targets, 1.0), rtol=0, atol=0.03)


def test_errors_are_the_known_biases() -> None:
    """Latent, round trip and transfer each against its own reference; the student adds its bias to the encoder's."""
    found = rows(PERFECT)
    assert [(row["method"], row["w"], row["nfe"]) for row in found] == [
        (DDIM, 0.0, 512), (DISTILLED, 0.0, 2), (DDIM, 1.0, 1024), (DISTILLED, 1.0, 2)
    ]  # fmt: skip
    for row in (row for row in found if row["method"] == DISTILLED):
        assert row["latent_rmse"] == pytest.approx(0.05, abs=0.02)
        both = 0.02 + VARIANCE**0.5 * 0.05
        assert row["round_trip_rmse"] == pytest.approx(both, abs=1e-3)
        assert row["transfer_rmse"] == pytest.approx(both, abs=5e-3)
    assert all(row["latent_rmse"] == row["transfer_rmse"] == 0 for row in found if row["method"] == DDIM)


def test_accuracy_is_of_the_class_asked_for() -> None:
    """Judged for the class that the image came from, a transfer that changed nothing would look perfect."""
    still = Bridge(DDIM, 1, Encoder(0.0), _Still(), two_branches=False)
    done, unmoved = (next(r for r in rows(bridge) if r["steps"] == 1 and r["w"] == 0) for bridge in (PERFECT, still))
    assert done["transfer_accuracy"] > 0.6  # classes are 0.1 apart, pixels deviate by 0.125
    assert unmoved["transfer_accuracy"] < 0.4


class _Still(Student):
    """Decodes to class 0 whatever is asked for."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def __call__(self, z: Tensor, t: Tensor, cond: Tensor, w: float) -> Tensor:
        return super().__call__(z, t, torch.zeros_like(cond), w)


def test_other_classes_are_never_ones_own_and_all_differences_occur() -> None:
    """A transfer to the image's own class is a round trip and would lower every error."""
    labels = torch.arange(30) % 10
    other = other_classes(labels, 10)
    assert (other != labels).all()
    assert ((other >= 0) & (other < 10)).all()
    assert set(((other - labels) % 10).tolist()) == set(range(1, 10))


def test_verdicts_are_ratios_to_ddim_at_equal_steps() -> None:
    """Against 512 steps of DDIM nothing would pass, against fewer steps everything."""
    coarse = Bridge(DDIM, 1, Teacher(), Teacher(), two_branches=True)
    found = rows(PERFECT, coarse)
    targets = list(verdicts(found, OPTIONS))
    assert len(targets) == 4
    at = {(row["method"], row["steps"], row["w"]): row for row in found}
    expected = at[DISTILLED, 1, 1.0]["latent_rmse"] / at[DDIM, 1, 1.0]["latent_rmse"]
    (target,) = (t for t in targets if t.name == "latent RMSE of the encoder over DDIM inversion's, 1 steps, w = 1")
    assert target.value == pytest.approx(expected)
    assert target.reached is (expected <= 0.5)
    assert list(verdicts(found, InvertConfig(at_most=None))) == []


def test_measuring_stops_when_asked_to() -> None:
    """512 steps of a large teacher take minutes: a cluster that asks to stop would kill it."""
    x = exact(NOISE, LABELS, 0.0)
    with pytest.raises(Interrupted):
        list(measure([PERFECT], TRUTH, x, LABELS, 3, lambda images: judge(images)[1], OPTIONS, lambda: True))
