"""Targets of the stochastic sampler: algorithm 3 term by term, its edge cases, chains of perfect students."""

import copy
from dataclasses import dataclass

import pytest
import torch
from oracles import Gaussian, Guided, Mixture, Unconverted, full, states
from torch import nn

from fewstep.distill import ProgressiveDistillation, progressive_target, stochastic_target
from fewstep.samplers import ddim_step, stochastic
from fewstep.schedules import Cosine, Karras, LinearBeta, RectifiedFlow, Trained, expand, sample_seeds, seeded_noise

SCHEDULES = [Cosine(), Cosine(shift=-2.0), LinearBeta(), RectifiedFlow(), Karras()]
named = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
Y = torch.tensor([0, 1, 2, 1, 0])
W = torch.tensor([0.0, 0.5, 1.0, 4.0, 2.0], dtype=torch.float64)


def two_jumps(teacher, z, i, steps, halves, cond=None, w=None):
    """Algorithm 3 for one sample at t = i / steps as the issue states it: (time of the landing, target)."""

    def at(value):
        return torch.tensor([value], dtype=z.dtype)

    def alpha_sigma(u):
        return (float(a) for a in teacher.schedule.alpha_sigma(at(u).double()))

    if i == 1 and not halves:
        return teacher(z, at(1 / steps), cond, w)
    t, middle, end = (1 / steps, 0.5 / steps, 0.0) if i == 1 else (i / steps, (i - 1) / steps, (i - 2) / steps)
    (a0, s0), (a1, s1), (a2, s2) = map(alpha_sigma, (t, middle, end))
    x1 = teacher(z, at(t), cond, w)
    z1 = a1 * x1 + s1 / s0 * (z - a0 * x1)
    x2 = teacher(z1, at(middle), cond, w)
    if end == 0:
        return x2
    z2 = a2 * x2 + s2 / s1 * (z1 - a1 * x2)
    return (z2 - s2 / s0 * z) / (a2 - s2 / s0 * a0)


@named
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_algorithm_3_with_its_edge_cases(schedule, steps, halves):
    # every time of the grid in one batch: 2 / N takes the second estimate, 1 / N one jump or two halves
    teacher = Mixture.random(schedule)
    t = torch.arange(1, steps + 1).double() / steps
    z = states(schedule, t)
    target = stochastic_target(teacher, z, t, steps, single_jump=not halves)
    expected = torch.cat([two_jumps(teacher, z[i - 1 : i], i, steps, halves) for i in range(1, steps + 1)])
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-8)


@named
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_one_jump_with_the_target_lands_on_two_of_the_teacher(schedule, dtype, tolerance):
    # what the sampler does with a perfect student, at 512 steps too, where a quotient in float32 would be noise
    teacher, steps = Mixture.random(schedule), 512
    t = torch.arange(3, steps + 1, dtype=dtype) / steps
    z = states(schedule, t, dtype)
    middle, end = t.double() - 1 / steps, t.double() - 2 / steps
    state = ddim_step(teacher(z.double(), t.double()), z.double(), t.double(), middle, schedule)
    landing = ddim_step(teacher(state, middle), state, middle, end, schedule)
    landed = ddim_step(stochastic_target(teacher, z, t, steps), z, t, end.to(dtype), schedule).double()
    scale = torch.hypot(*schedule.alpha_sigma(end))[:, None]
    assert stochastic_target(teacher, z, t, steps).dtype == dtype
    torch.testing.assert_close(landed / scale, landing / scale, rtol=0, atol=tolerance)


def test_a_stochastic_teacher_sees_its_own_grid_alone():
    # it knows multiples of 1 / (2 N) by jumps of 1 / N: half a step of the student's is nothing that it was taught
    seen = []

    def teacher(z, t, cond=None, w=None):
        seen.append(t)
        return 0.5 * z

    teacher.schedule = Cosine()
    for record, at_first in ((Trained("stochastic", 16), 1 / 8), (Trained("guided"), 1 / 16), (None, 1 / 16)):
        teacher.trained = record
        seen.clear()
        i = torch.arange(1, 9)
        stochastic_target(teacher, torch.ones(8, 1), i / 8, 8)
        torch.testing.assert_close(seen[0], i / 8, rtol=0, atol=0)
        torch.testing.assert_close(seen[1], torch.cat([torch.tensor([at_first]), (i[1:] - 1) / 8]))


@pytest.mark.parametrize("prediction", ["x", "eps", "v", "flow"])
def test_raw_teachers_and_w_per_sample(prediction):
    # w and class are each sample's own and present in both evaluations
    mixture = Mixture.random(Cosine(log_snr_min=-10.0))
    i = torch.tensor([1, 2, 3, 4, 2])
    z = states(mixture.schedule, i / 4)
    expected = torch.cat(
        [two_jumps(Guided(mixture), z[[n]], int(i[n]), 4, True, Y[[n]], W[[n]]) for n in range(5)]
    )
    for teacher in (Guided(mixture), Unconverted(mixture, prediction)):
        target = stochastic_target(teacher, z, i.double() / 4, 4, Y, W)
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-8)


@dataclass(frozen=True)
class Perfect:
    """The student that any number of updates at best becomes: it answers with its target."""

    teacher: object
    steps: int

    @property
    def schedule(self):
        return self.teacher.schedule

    @property
    def trained(self):
        return Trained("stochastic", self.steps)

    def __call__(self, z, t, cond=None, w=None):
        return stochastic_target(self.teacher, z, t, self.steps, cond, w)


def chain(teacher, *steps):
    for n in steps:
        teacher = Perfect(teacher, n)
    return teacher


def test_a_chain_of_halvings_follows_the_ode_and_keeps_the_data():
    # errors of a single edge case add up over a chain: its last jump, or all of them, would leave the ODE
    gaussian = Gaussian(Cosine(), mean=0.4, std=0.5)
    student = chain(gaussian, 64, 32, 16, 8, 4)
    for i in (1, 2, 3, 4):
        t, end = i / 4, max(0.0, (i - 2) / 4)
        z = gaussian.marginal(torch.zeros(5, 1), full(t, torch.zeros(5, 1)))[1] * torch.linspace(-2, 2, 5)[:, None]
        z = z.double() + 0.4 * Cosine().alpha_sigma(full(t, z))[0][:, None]
        landed = ddim_step(student(z, full(t, z)), z, full(t, z), full(end, z), Cosine())
        torch.testing.assert_close(landed, gaussian.flow(z, full(t, z), full(end, z)), rtol=0, atol=0.03)
    seeds = torch.arange(4000)
    x = stochastic(student, seeded_noise(seeds, (1,)).double(), 4, seeds=seeds)
    assert x.mean().item() == pytest.approx(0.4, abs=0.04)
    assert x.std().item() == pytest.approx(0.5, abs=0.04)


class Network(nn.Module):
    """A small denoiser that may carry a record of its training."""

    schedule = Cosine()

    def __init__(self, trained):
        super().__init__()
        self.body, self.trained = nn.Linear(4, 2), trained

    def forward(self, z, t, cond=None, w=None):
        alpha, sigma = (expand(a, z) for a in self.schedule.alpha_sigma(t))
        return alpha * z - sigma * self.body(torch.cat([z, t[:, None], w[:, None]], dim=1)).tanh()


def method_of(trained, steps, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Network(trained)
    return ProgressiveDistillation(teacher, copy.deepcopy(teacher), steps, kind=kind)


def loss_of(method):
    seeds = sample_seeds(0, 0, torch.arange(64))
    return method.loss(method.draw(seeded_noise(seeds, (2,), stream=9), None, seeds, 0), 0)[0].item()


def test_the_stochastic_student_of_one_step_is_that_of_two():
    # its jump from t = 1 reaches 0 already: nothing is left to learn, and training it would be waste
    assert loss_of(method_of(Trained("stochastic", 2), 1, "stochastic")) == 0.0
    assert loss_of(method_of(Trained("stochastic", 4), 2, "stochastic")) > 1e-5  # any other halving has something
    assert loss_of(method_of(Trained("deterministic", 2), 1, "deterministic")) > 1e-5


def test_the_switch_chooses_the_target():
    # a stochastic run that trained on deterministic targets would give the deterministic student again
    for kind, target in (("deterministic", progressive_target), ("stochastic", stochastic_target)):
        method = method_of(Trained("guided"), 4, kind)
        seeds = sample_seeds(0, 0, torch.arange(64))
        batch = method.draw(seeded_noise(seeds, (2,), stream=9), None, seeds, 0)
        expected = target(method.teacher, batch.z, batch.t, 4, None, batch.w)
        torch.testing.assert_close(method.targets(batch), expected, rtol=0, atol=0)
    other = progressive_target(method.teacher, batch.z, batch.t, 4, None, batch.w)
    far = batch.t > 0.25
    assert (method.targets(batch) - other)[far].abs().max() > 1e-3
    torch.testing.assert_close(method.targets(batch)[~far], other[~far])  # two half-jumps from 1 / N either way


@pytest.mark.parametrize("steps", [0, 2.0, True])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match=f"steps = {steps!r}"):
        stochastic_target(Gaussian(Cosine()), torch.zeros(1, 1), torch.ones(1), steps)


def test_targets_carry_no_gradient():
    # a graph through the teacher triples memory
    scale = torch.tensor(0.5, requires_grad=True)

    def teacher(z, t, cond=None, w=None):
        return scale * z

    teacher.schedule = Cosine()
    assert not stochastic_target(teacher, torch.ones(2, 2), torch.tensor([0.5, 1.0]), 2).requires_grad
