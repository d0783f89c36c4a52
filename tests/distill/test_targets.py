"""Targets against closed forms: exact guided mixtures, and the identity that defines the two-step target."""

import pytest
import torch
from oracles import Gaussian, Guided, Mixture, Unconverted, states

from fewstep.distill import guidance_target, progressive_target
from fewstep.samplers import ddim_step
from fewstep.schedules import Cosine, Discrete, Karras, LinearBeta, RectifiedFlow, expand

DISCRETE = Discrete(torch.linspace(0.99, 0.02, 64))
SCHEDULES = [Cosine(), Cosine(shift=-2.0), LinearBeta(), RectifiedFlow(), Karras(), DISCRETE]
named = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
Y = torch.tensor([0, 1, 2, 1, 0])
W = torch.tensor([0.0, 0.5, 1.0, 4.0, 2.0], dtype=torch.float64)


@named
@pytest.mark.parametrize("prediction", [None, "eps", "v"])
def test_guidance_target_is_exact_on_a_mixture(schedule, prediction):
    # scale = w instead of 1 + w, branches swapped, or one w for all samples: each misses the closed form
    mixture = Mixture.random(schedule)
    t = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.05], dtype=torch.float64)
    z = states(schedule, t)
    teacher = mixture if prediction is None else Unconverted(mixture, prediction)
    for w in (W, 3.0):
        target = guidance_target(teacher, mixture.null_cond, z, t, Y, w)
        torch.testing.assert_close(target, Guided(mixture)(z, t, Y, w), rtol=0, atol=1e-8)


def test_guidance_target_takes_one_evaluation_and_keeps_what_is_not_dropped():
    # two calls cost a fifth more; a mask that is dropped with the text breaks inpainting
    calls = []

    def evaluate(z, t, cond=None, w=None):
        calls.append((z, t, cond, w))
        return z + cond["mask"][:, None] + 10 * cond["y"][:, None]

    evaluate.schedule = Cosine()
    z, t, mask = torch.zeros(3, 2), torch.rand(3), torch.tensor([0.1, 0.2, 0.3])
    target = guidance_target(evaluate, {"y": torch.tensor(7.0)}, z, t, {"y": torch.ones(3), "mask": mask}, 2.0)
    ((_, seen_t, cond, w),) = calls
    assert w is None
    assert torch.equal(seen_t, torch.cat([t, t]))
    assert torch.equal(cond["mask"], torch.cat([mask, mask]))
    expected = 3 * (mask + 10) - 2 * (mask + 70)
    torch.testing.assert_close(target, expected[:, None].expand(3, 2))


def two_steps(teacher, z, t, steps, cond=None, w=None):
    """The teacher's two DDIM steps of algorithm 2, term by term, and its two estimates."""

    def alpha_sigma(u):
        return (expand(a, z) for a in teacher.schedule.alpha_sigma(u))

    middle, end = t - 0.5 / steps, (t - 1 / steps).clamp(min=0)
    (a0, s0), (a1, s1), (a2, s2) = map(alpha_sigma, (t, middle, end))
    x1 = teacher(z, t, cond, w)
    z1 = a1 * x1 + s1 / s0 * (z - a0 * x1)
    x2 = teacher(z1, middle, cond, w)
    z2 = a2 * x2 + s2 / s1 * (z1 - a1 * x2)
    return end, z2, x2, (z2 - s2 / s0 * z) / (a2 - s2 / s0 * a0)


@named
@pytest.mark.parametrize("steps", [1, 2, 8, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_one_step_with_the_target_lands_on_two_of_the_teacher(schedule, steps, dtype, tolerance):
    # the definition of halving, at every time of the grid in one batch: t' and t'' swapped, or a ratio of the wrong
    # times, fails; in float32 at 512 steps a quotient of small differences would, too
    teacher = Mixture.random(schedule)
    t = torch.arange(1, steps + 1, dtype=dtype) / steps
    z = states(schedule, t, dtype)
    target = progressive_target(teacher, z, t, steps)
    end, landing, x2, _ = two_steps(teacher, z.double(), t.double(), steps)
    assert target.dtype == dtype
    assert torch.isfinite(target).all()
    landed = ddim_step(target, z, t, end.to(dtype), schedule)
    scale = torch.hypot(*schedule.alpha_sigma(end))[:, None]  # of z_t'', 80 at the noisy end of VE
    torch.testing.assert_close((landed.double() / scale)[1:], (landing / scale)[1:], rtol=0, atol=tolerance)
    torch.testing.assert_close(target[:1].double(), x2[:1], rtol=0, atol=tolerance)  # t'' = 0: the second estimate


@named
def test_target_is_the_papers_quotient(schedule):
    # the weighted mean of both estimates must be algorithm 2's formula wherever that one is well conditioned
    teacher, steps = Mixture.random(schedule), 6
    t = torch.arange(2, steps + 1).double() / steps
    z = states(schedule, t)
    _, _, _, quotient = two_steps(teacher, z, t, steps)
    torch.testing.assert_close(progressive_target(teacher, z, t, steps), quotient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", [Cosine(), LinearBeta()], ids=lambda s: type(s).__name__)
def test_target_is_the_angle_form(schedule):
    # v~ = (cos d z - z'') / sin d, d = phi_t - phi_t'': the same x by another road
    teacher, steps = Mixture.random(schedule), 16
    t = torch.arange(2, steps + 1).double() / steps
    z = states(schedule, t)
    end, landing, *_ = two_steps(teacher, z, t, steps)
    (alpha, sigma), (alpha_end, sigma_end) = schedule.alpha_sigma(t), schedule.alpha_sigma(end)
    d = (torch.atan2(sigma, alpha) - torch.atan2(sigma_end, alpha_end))[:, None]
    v = (d.cos() * z - landing) / d.sin()
    torch.testing.assert_close(progressive_target(teacher, z, t, steps), alpha[:, None] * z - sigma[:, None] * v)


def test_times_are_the_teachers_grid():
    # the teacher of 2 N steps knows multiples of 0.5 / N and nothing else, t = 0.5 / N for the edge case included
    seen = []

    def teacher(z, t, cond=None, w=None):
        seen.append(t)
        return 0.5 * z

    teacher.schedule = Cosine()
    for steps in (3, 8, 512):
        seen.clear()
        i = torch.arange(1, steps + 1)
        progressive_target(teacher, torch.ones(steps, 1), i / steps, steps)
        torch.testing.assert_close(seen[0], i / steps, rtol=0, atol=0)
        torch.testing.assert_close(seen[1], (2 * i - 1) / (2 * steps), rtol=1e-6, atol=1e-7)


def test_edge_case_is_per_sample():
    # one sample at t'' = 0 must not change the others: the target of a batch is that of its samples
    teacher, steps = Gaussian(Cosine()), 4
    t = torch.tensor([0.25, 1.0, 0.5, 0.25, 0.75]).double()
    z = states(Cosine(), t)
    whole = progressive_target(teacher, z, t, steps)
    alone = [progressive_target(teacher, z[i : i + 1], t[i : i + 1], steps) for i in range(5)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", ["x", "eps", "v", "flow"])
def test_raw_teachers_and_w_per_sample(prediction):
    # w and class are each sample's own and present in both evaluations, whether the teacher gives x or raw outputs
    mixture = Mixture.random(Cosine(log_snr_min=-10.0))
    t = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.5]).double()
    z = states(mixture.schedule, t)
    *_, x2, quotient = two_steps(Guided(mixture), z, t, 4, Y, W)
    expected = torch.where(t[:, None] == 0.25, x2, quotient)
    for teacher in (Guided(mixture), Unconverted(mixture, prediction)):
        torch.testing.assert_close(progressive_target(teacher, z, t, 4, Y, W), expected, rtol=0, atol=1e-8)


def test_targets_carry_no_gradient():
    # a graph through the teacher triples memory, and a student that is its own teacher would learn from its target
    scale = torch.tensor(0.5, requires_grad=True)

    def teacher(z, t, cond=None, w=None):
        return scale * z

    teacher.schedule = Cosine()
    z, t = torch.ones(2, 2, requires_grad=True), torch.tensor([0.5, 1.0])
    assert not progressive_target(teacher, z, t, 2).requires_grad
    assert not guidance_target(teacher, torch.tensor(3), z, t, torch.tensor([0, 1]), 1.0).requires_grad


@pytest.mark.parametrize("steps", [0, -4, 2.0, True])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match=f"steps = {steps!r}"):
        progressive_target(Gaussian(Cosine()), torch.zeros(1, 1), torch.ones(1), steps)


def test_guidance_needs_both_conditions():
    for cond, null in ((None, torch.tensor(3)), (Y, None)):
        with pytest.raises(ValueError, match="cond is None"):
            guidance_target(Mixture.random(Cosine()), null, torch.zeros(5, 2), torch.ones(5), cond, 1.0)
