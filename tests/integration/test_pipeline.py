"""The library packages together, without the lab: from a guided teacher in closed form to a few-step student."""

import copy
import functools

import pytest
import torch
from oracles import Guided, Mixture
from torch import nn

from fewstep.distill import GuidanceDistillation, ProgressiveDistillation
from fewstep.samplers import ddim
from fewstep.schedules import Cosine, expand, sample_seeds, seeded_noise

pytestmark = pytest.mark.slow
SCHEDULE, BATCH = Cosine(), 192
CLASSES = torch.arange(BATCH) % 3


class Student(nn.Module):
    """Anyone's network: an MLP that predicts v and takes class and w. It knows nothing of fewstep.models."""

    schedule = SCHEDULE

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(9, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)
        )

    def forward(self, z, t, cond=None, w=None):
        alpha, sigma = (expand(a, z) for a in SCHEDULE.alpha_sigma(t))
        level = expand(SCHEDULE.log_snr(t), z) / 10
        kind = nn.functional.one_hot(cond, 3).to(z.dtype)
        w = torch.as_tensor(w, dtype=z.dtype).expand(len(z))[:, None] / 4
        return alpha * z - sigma * self.net(torch.cat([z, alpha, sigma, level, kind, w], dim=1))


def train(method, updates: int, run: int, lr: float) -> None:
    """A training loop as the README shows it, its learning rate annealed to 0."""
    optimiser = torch.optim.Adam(method.param_groups()["student"], lr=lr)
    anneal = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=updates)
    for step in range(updates):
        seeds = sample_seeds(run, step, torch.arange(BATCH))
        x = data(seeds)
        loss, _ = method.loss(method.draw(x, CLASSES, seeds, step), step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        anneal.step()


MIXTURE = Mixture.random(SCHEDULE, dtype=torch.float32)


def data(seeds):
    """Samples (B, 2) of the mixture, class CLASSES."""
    modes = MIXTURE.means[CLASSES, seeds % 2]
    return modes + MIXTURE.std * seeded_noise(seeds, (2,), stream=77)


@pytest.fixture(scope="module")
def students() -> dict[int, Student]:
    """Stage one, then stage two down to 2 steps; the key is the number of steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guided = Student()
    train(GuidanceDistillation(MIXTURE, guided, MIXTURE.null_cond, w_range=(0.0, 4.0)), updates=2000, run=1, lr=3e-3)
    made = {16: guided}
    for steps in (8, 4, 2):
        student = copy.deepcopy(made[2 * steps]).requires_grad_(True)
        train(ProgressiveDistillation(made[2 * steps], student, steps), updates=400, run=steps, lr=1e-3)
        made[steps] = student
    return made


NOISE = seeded_noise(torch.arange(BATCH), (2,))


@functools.cache
def truth(w: float) -> torch.Tensor:
    """Where many guided steps end."""
    return ddim(Guided(MIXTURE), NOISE, 256, CLASSES, w)


def paired_error(denoiser, steps: int, w: float) -> float:
    """RMSE to many guided steps from the same noise."""
    return (ddim(denoiser, NOISE, steps, CLASSES, w) - truth(w)).square().mean().sqrt().item()


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 2])
def test_students_beat_the_exact_teacher_at_equal_steps(students, steps: int, w: float) -> None:
    """The one claim of all this: in few steps a student lands closer to the many-step result than the teacher itself,
    even if the teacher is exact and each of its guided steps costs two evaluations. Any broken link, from draws through
    targets, conversions and w to the sampler, shows here.
    """
    ratio = paired_error(students[steps], steps, w) / paired_error(Guided(MIXTURE), steps, w)
    assert ratio < 0.8


def test_the_student_follows_w(students) -> None:
    """A student that ignored w would pass at one w and fail its users at all others."""
    moved = ddim(students[4], NOISE, 4, CLASSES, 3.0) - ddim(students[4], NOISE, 4, CLASSES, 0.0)
    should = truth(3.0) - truth(0.0)
    torch.testing.assert_close(moved.norm(dim=1).mean(), should.norm(dim=1).mean(), rtol=0.15, atol=0)
