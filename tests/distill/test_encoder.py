"""Encoder targets: the landing that defines them, the angle form, numerics at t = 0, and what a student learns."""

import math
from dataclasses import dataclass

import pytest
import torch
from oracles import Gaussian, Guided, Mixture, Narrow, Unconverted, full, states
from torch import nn

from fewstep.distill import EncoderDistillation, encoder_target
from fewstep.samplers import ddim_step, encode
from fewstep.schedules import Cosine, Karras, LinearBeta, RectifiedFlow, Trained, expand, sample_seeds, to_x

SCHEDULES = [Cosine(), Cosine(shift=-2.0), LinearBeta(), RectifiedFlow(), Karras()]
named = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def two_steps(teacher, z, t, steps, cond=None, w=None):
    """Where two reversed DDIM steps of the teacher land, term by term."""

    def alpha_sigma(u):
        return (expand(a, z) for a in teacher.schedule.alpha_sigma(u))

    middle, end = t + 0.5 / steps, t + 1 / steps
    (a0, s0), (a1, s1), (a2, s2) = map(alpha_sigma, (t, middle, end))
    x1 = teacher(z, t, cond, w)
    z1 = a1 * x1 + s1 * (z - a0 * x1) / s0
    x2 = teacher(z1, middle, cond, w)
    return end, a2 * x2 + s2 * (z1 - a1 * x2) / s1


@named
@pytest.mark.parametrize("steps", [1, 2, 8, 256])
def test_one_reversed_step_with_the_target_lands_on_two_of_the_teacher(schedule, steps):
    # the definition, at every time of the grid, t = 0 included: steps of the wrong way, or x-form weights, miss it
    teacher = Mixture.random(schedule)
    t = torch.arange(steps).double() / steps
    z = states(schedule, t)
    v = encoder_target(teacher, z, t, steps)
    end, landing = two_steps(teacher, z, t, steps)
    landed = ddim_step(to_x(v, z, t, schedule, "v"), z, t, end, schedule)
    scale = torch.hypot(*schedule.alpha_sigma(end))[:, None]
    torch.testing.assert_close(landed / scale, landing / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [Cosine(), LinearBeta()], ids=lambda s: type(s).__name__)
def test_target_is_the_angle_form(schedule):
    # z'' = cos(d) z - sin(d) v with d = phi_t - phi_t'' < 0: the same v by another road
    teacher, steps = Mixture.random(schedule), 16
    t = torch.arange(steps).double() / steps
    z = states(schedule, t)
    end, landing = two_steps(teacher, z, t, steps)
    (alpha, sigma), (alpha_end, sigma_end) = schedule.alpha_sigma(t), schedule.alpha_sigma(end)
    d = (torch.atan2(sigma, alpha) - torch.atan2(sigma_end, alpha_end))[:, None]
    torch.testing.assert_close(encoder_target(teacher, z, t, steps), (d.cos() * z - landing) / d.sin())


@pytest.mark.parametrize("prediction", ["v", "eps"])
@pytest.mark.parametrize("steps", [8, 512])
def test_float32_networks_give_targets_of_float32(prediction, steps):
    # at t = 0 the rounding of x in float32 alone is 1e-3 of v, and a quotient of two such landings is noise
    exact = Unconverted(Gaussian(Cosine()), prediction)
    t = torch.arange(steps).double()[: steps - 1] / steps
    z = states(Cosine(), t).float()
    wide = encoder_target(exact, z.double(), t, steps)
    narrow = encoder_target(Narrow(exact), z, t.float(), steps)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double()[:4], wide[:4], rtol=0, atol=2e-5)
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=5e-4)


def test_times_classes_and_weights_of_both_evaluations():
    # the teacher of 2 N steps knows multiples of 0.5 / N from 0 on; class and w are each sample's own in both
    mixture, seen = Mixture.random(Cosine()), []

    def teacher(z, t, cond=None, w=None):
        seen.append((t, cond, w))
        return Guided(mixture)(z, t, cond, w)

    teacher.schedule = Cosine()
    t, y = torch.arange(4).double() / 4, torch.tensor([0, 1, 2, 1])
    w, z = torch.tensor([0.0, 1.0, 3.0, 0.5]).double(), states(Cosine(), torch.arange(4).double() / 4)
    v = encoder_target(teacher, z, t, 4, y, w)
    assert [given[0].tolist() for given in seen] == [[0, 0.25, 0.5, 0.75], [0.125, 0.375, 0.625, 0.875]]
    assert all(cond is y and given is w for _, cond, given in seen)
    alone = [encoder_target(Guided(mixture), z[[i]], t[[i]], 4, y[[i]], w[[i]]) for i in range(4)]
    torch.testing.assert_close(v, torch.cat(alone))


@dataclass(frozen=True)
class Perfect:
    """The student that any number of updates at best becomes."""

    teacher: object
    steps: int

    @property
    def schedule(self):
        return self.teacher.schedule

    def __call__(self, z, t, cond=None, w=None):
        return to_x(encoder_target(self.teacher, z, t, self.steps, cond, w), z, t, self.schedule, "v")


def test_a_chain_of_halvings_encodes_to_the_exact_latent():
    # four steps of a chain are as near to the ODE as the 128 steps that it stands for
    gaussian = Gaussian(Cosine(), mean=0.4, std=0.5)
    student = gaussian
    for steps in (64, 32, 16, 8, 4):
        student = Perfect(student, steps)
    x = torch.linspace(-1, 1.5, 7, dtype=torch.float64)[:, None]
    truth = gaussian.flow(x, full(0.0, x), full(1.0, x))
    error = (encode(student, x, 4) - truth).abs().max().item()
    assert error == pytest.approx((encode(gaussian, x, 128) - truth).abs().max().item(), rel=1e-3)
    assert error < 0.2 * (encode(gaussian, x, 4) - truth).abs().max().item()


class GridStudent(nn.Module):
    """v = a_i z + b_i at time i / N: holds any linear denoiser on the grid, in float32."""

    schedule = Cosine()

    def __init__(self, steps):
        super().__init__()
        self.steps, self.a, self.b = steps, nn.Parameter(torch.zeros(steps)), nn.Parameter(torch.zeros(steps))

    def forward(self, z, t, cond=None, w=None):
        i = (t * self.steps).round().long()
        return to_x(expand(self.a[i], z) * z + expand(self.b[i], z), z, t, self.schedule, "v")


def test_training_finds_the_encoder_at_every_time_in_float32():
    # at t = 0 a loss of x would be blind to v (sigma = 4.5e-5), or all noise if weighted for it
    teacher, steps = Gaussian(Cosine(), mean=0.5, std=0.7), 4
    student = GridStudent(steps)
    method = EncoderDistillation(teacher, student, steps, w_range=None)
    x = torch.linspace(-1, 2, 64)[:, None]
    optimiser = torch.optim.Adam(student.parameters())
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        seeds = sample_seeds(0, step, torch.arange(64))
        loss, _ = method.loss(method.draw(x, None, seeds, step), step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    t = torch.arange(steps).double() / steps
    offset = encoder_target(teacher, torch.zeros(steps, 1).double(), t, steps)[:, 0].float()
    slope = encoder_target(teacher, torch.ones(steps, 1).double(), t, steps)[:, 0].float() - offset
    torch.testing.assert_close(student.a.data, slope, rtol=0, atol=3e-3)
    torch.testing.assert_close(student.b.data, offset, rtol=0, atol=3e-3)


@pytest.mark.parametrize(("weight", "factor"), [("snr_plus_one", lambda a, s: 1.0), ("truncated_snr", max)])
def test_loss_is_the_weighted_error_of_v(weight, factor):
    # SNR + 1 on x is 1 on v (VP); truncated SNR is max(alpha^2, sigma^2): no time is lost, t = 0 included
    teacher, student = Gaussian(Cosine()), GridStudent(8)
    method = EncoderDistillation(teacher, student, 8, w_range=None, weight=weight)
    seeds = sample_seeds(0, 0, torch.arange(64))
    for i in range(8):
        batch = method.draw(torch.linspace(-1, 1, 64)[:, None], None, seeds, 0)
        batch = batch[batch.t == i / 8]
        target = method.targets(batch)
        alpha, sigma = (float(a[0]) ** 2 for a in Cosine().alpha_sigma(batch.t))
        expected = factor(alpha, sigma) * float(target.square().mean())  # the student's v is 0
        for given in (None, target):
            loss, logs = method.loss(batch, 0, given)
            assert loss.item() == pytest.approx(expected, rel=2e-3)
        assert logs["x_mse"].item() == pytest.approx(sigma * float(target.square().mean()), rel=2e-3)
        assert math.isfinite(loss.item())


def test_encoders_are_checked_as_other_students_are():
    teacher = GridStudent(8)
    teacher.trained = Trained("encoder", 4)
    with pytest.raises(ValueError, match="trained for 4 steps, steps = 4 needs one of 8"):
        EncoderDistillation(teacher, GridStudent(4), 4)
    for steps in (0, 2.0):
        with pytest.raises(ValueError, match=f"steps = {steps!r}"):
            encoder_target(Gaussian(Cosine()), torch.zeros(1, 1), torch.zeros(1), steps)
