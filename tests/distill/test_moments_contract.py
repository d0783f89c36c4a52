"""Moment matching as a method: draws, who learns when, what each network is told, weights, processes, bad input."""

import copy
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import distill_processes
import pytest
import torch
from distill_processes import SCHEDULE, Net, build, data
from oracles import Mixture, Unconverted
from torch import nn

from fewstep.distill import (
    Batch,
    InstantMomentMatching,
    MomentMatching,
    adam_preconditioner,
    estimate_preconditioner,
    guidance_target,
)
from fewstep.distill.moments import step_to
from fewstep.distill.parameters import directional
from fewstep.samplers import ddim_step
from fewstep.schedules import Cosine, Karras, Trained, edm_weight, guide, sample_seeds, seeded_noise

NULL = torch.tensor(3)
FORMS = ("alternating", "instant")
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _same_weights_every_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def ones(teacher):
    return {name: torch.ones_like(p) for name, p in teacher.named_parameters()}


def drawn(method, count=32, run=0):
    x, cond, seeds = data(count, run)
    return method.draw(x, cond, seeds, 0)


def of_form(form, student=None, k=4, **options):
    """A method with networks that share nothing."""
    student = student or Net()
    if form == "alternating":
        auxiliary = Net()
        auxiliary.takes_guidance = student.takes_guidance
        return MomentMatching(Net(), student, auxiliary, k, **options)
    teacher = Net()
    return InstantMomentMatching(teacher, student, k, ones(teacher), **options)


def taking_w():
    net = Net()
    net.takes_guidance = True
    return net


@forms
def test_draws_are_a_function_of_each_seed_alone(form):
    # 1 or 64 processes, any batch and any step must draw the same; the global generator must not be touched
    method = of_form(form, taking_w(), null_cond=NULL, w_range=(0.0, 4.0))
    x, cond, seeds = data(60)
    state = torch.random.get_rng_state()
    whole = method.draw(x, cond, seeds, 0)
    parts = [method.draw(x[i:j], cond[i:j], seeds[i:j], 5) for i, j in ((0, 7), (7, 60))]
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("z", "t", "s", "w", "noise", "step_noise", "cond"):
        joined = torch.cat([getattr(p, name) for p in parts])
        torch.testing.assert_close(getattr(whole, name), joined, rtol=0, atol=1e-6)
    assert not torch.equal(whole.s, drawn(method, 60, run=1).s)
    torch.testing.assert_close(whole.z, SCHEDULE.add_noise(x, whole.t, whole.noise))


@pytest.mark.parametrize("k", [1, 4])
def test_times_and_noises_have_their_distribution(k):
    # s of all of the time's range, the step up to t of at most 1 / k, both noises N(0, I), nothing tells about another
    count = 20_000
    batch = drawn(of_form("alternating", taking_w(), k, null_cond=NULL, w_range=(1.0, 3.0)), count)
    uniform = torch.arange(count) / count
    gap = batch.t - batch.s
    inside = batch.s < 1 - 1 / k if k > 1 else torch.zeros(count, dtype=torch.bool)
    for values in (batch.s, (gap * k)[inside], (batch.w - 1) / 2):
        grid = torch.linspace(0, 1, len(values)) if len(values) else values
        assert len(values) == 0 or (values.sort().values - grid).abs().max() < 2 / len(values) ** 0.5
    assert (batch.t >= batch.s).all()
    assert (batch.t <= 1).all()
    assert (batch.t == 1).float().mean() == pytest.approx(1 / (2 * k), abs=5 * (0.25 / count) ** 0.5)
    columns = [uniform, batch.s, batch.w, *batch.noise.T, *batch.step_noise.T]
    correlation = torch.corrcoef(torch.stack(columns))
    assert (correlation - torch.eye(len(columns))).abs().max() < 5 / count**0.5
    assert batch.step_noise.std() == pytest.approx(1, abs=0.02)


@forms
def test_only_the_network_whose_turn_it_is_gets_gradients(form):
    # a teacher that drifts, or an auxiliary network that follows the student's loss, is no reference any more
    method = of_form(form)
    for step, name in enumerate(("auxiliary", "student", "auxiliary") if form == "alternating" else ("student",) * 2):
        assert method.active(step) == name
        before = copy.deepcopy(method.teacher.state_dict())
        method.loss(drawn(method), step)[0].backward()
        for other, network in method.networks.items():
            touched = [p.grad is not None and bool(p.grad.any()) for p in network.parameters()]
            assert all(touched) if other == name else not any(touched)
            network.zero_grad(set_to_none=True)
        assert not any(p.requires_grad or p.grad is not None for p in method.teacher.parameters())
        assert all(torch.equal(p, before[n]) for n, p in method.teacher.state_dict().items())
    groups = method.param_groups()
    assert {n: [id(p) for g in groups[n] for p in g["params"]] for n in groups} == {
        n: [id(p) for p in network.parameters()] for n, network in method.networks.items()
    }
    assert list(groups) == (["student", "auxiliary"] if form == "alternating" else ["student"])


def test_teacher_teaches_without_dropout():
    # features that the teacher drops are noise on the moments that the student is to match
    teacher = Net().train()
    MomentMatching(teacher, Net(), Net(), 2)
    assert not teacher.training


def test_alternating_losses_are_the_papers():
    # gradients by a formula in which z_s and the direction are constants: none may pass through z_s
    method = of_form("alternating")
    student, auxiliary, teacher = (*method.networks.values(), method.teacher)
    b = drawn(method)
    x = student(b.z, b.t, b.cond)
    mean, std = SCHEDULE.posterior(b.z, x.detach(), b.t, b.s)
    z = mean + std * b.step_noise
    w = edm_weight(SCHEDULE.log_snr(b.s))[:, None]
    with torch.no_grad():
        target, estimate = teacher(z, b.s, b.cond), auxiliary(z, b.s, b.cond)
    expected = torch.autograd.grad((w * x * (estimate - target)).mean(), student.parameters())
    loss, logs = method.loss(b, 1)
    for a, e in zip(torch.autograd.grad(loss, student.parameters()), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))
    torch.testing.assert_close(logs["moment_gap"], (estimate - target).square().mean())

    g = auxiliary(z, b.s, b.cond)
    both = (w * ((x.detach() - g).square() + (target - g).square())).mean()
    torch.testing.assert_close(method.loss(b, 0)[0], both, rtol=1e-4, atol=0)


@forms
def test_shifted_weights_on_the_shifted_schedule_are_those_of_smaller_images(form, monkeypatch):
    # B shifts all log-SNRs with the resolution, w(s) too: else at 512x512 high noise weighs 64 times as much beside low
    def weights(schedule, shift):
        monkeypatch.setattr(Net, "schedule", schedule)
        method, one = of_form(form, weight_shift=shift), torch.ones(1, 2)
        return torch.stack([method.student_loss(one, one, one, s[None]) for s in torch.linspace(0, 1, 9)])

    large = Karras(sigma_min=8 * 0.002, sigma_max=8 * 80.0)
    torch.testing.assert_close(weights(large, -2 * math.log(8)), weights(Karras(), 0.0), rtol=1e-4, atol=0)


def test_the_preconditioner_is_of_the_shifted_weight():
    # Lambda rescales what the distillation's own weight makes of gradients: of another weight it is another step
    teacher, batches = Net(), [data(16)]
    plain, shifted = (estimate_preconditioner(teacher, batches, weight="snr", weight_shift=c, eps=0) for c in (0, 1))
    for name, value in plain.items():
        torch.testing.assert_close(shifted[name], math.e * value, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("s", "sigma"), [(0.0, 0.002), (0.001, 0.002), (0.3, None)])
def test_weights_grow_no_further_than_to_edms_least_noise(s, sigma):
    # the paper draws s where sigma >= 0.002; cosine's s = 0 would weigh e^20, 2,000 times as much, and rule every batch
    method = of_form("alternating")
    student, auxiliary, teacher = (*method.networks.values(), method.teacher)
    b = replace(drawn(method), s=torch.full((32,), s), t=torch.full((32,), s + 0.2))
    w = 1 / sigma**2 + 4 if sigma else float(edm_weight(SCHEDULE.log_snr(torch.tensor(s))))
    with torch.no_grad():
        x = student(b.z, b.t, b.cond)
        z = step_to(x, b.z, b.t, b.s, b.step_noise, SCHEDULE)
        target, estimate = teacher(z, b.s, b.cond), auxiliary(z, b.s, b.cond)
        losses = method.loss(b, 1)[0], method.loss(b, 0)[0]
    torch.testing.assert_close(losses[0], w * (x * (estimate - target)).mean(), rtol=1e-4, atol=0)
    both = (x - estimate).square() + (target - estimate).square()
    torch.testing.assert_close(losses[1], w * both.mean(), rtol=1e-4, atol=0)


def test_instant_loss_is_the_papers_with_the_sign_of_equation_7():
    # Jacobians written out for every sample; guidance and clipping change the teacher's answer, not its Jacobian
    teacher, student = Net(), taking_w()
    Lambda = {name: torch.rand_like(p) for name, p in teacher.named_parameters()}
    method = InstantMomentMatching(
        teacher, student, 4, Lambda, null_cond=NULL, w_range=(0.5, 3.0), clip=(-0.3, 0.3)
    )
    whole = drawn(method, 8)
    first, second = whole[0::2], whole[1::2]

    def pieces(b):
        x = student(b.z, b.t, b.cond, b.w)
        mean, std = SCHEDULE.posterior(b.z, x.detach(), b.t, b.s)
        z, parameters = mean + std * b.step_noise, dict(teacher.named_parameters())
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(teacher, p, (z, b.s, b.cond)))(parameters)
        answer = guide(teacher(z, b.s, b.cond), teacher(z, b.s, NULL.expand_as(b.cond)), b.w)
        assert (answer.abs() > 0.3).any()
        return x, {n: j.flatten(2) for n, j in jacobian.items()}, answer.clamp(-0.3, 0.3)

    def w(b):
        return edm_weight(SCHEDULE.log_snr(b.s))[:, None]

    other_x, other_jacobian, other_answer = pieces(second)
    residual = w(second) * (other_answer - other_x.detach()) / other_x.numel()
    nu = {n: Lambda[n].flatten() * 2 * torch.einsum("bd,bdp->p", residual, j) for n, j in other_jacobian.items()}
    x, jacobian, answer = pieces(first)
    change = sum(torch.einsum("bdp,p->bd", j, nu[n]) for n, j in jacobian.items())
    loss, logs = method.loss(whole, 0)
    expected = -(w(first) * x * change).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    objective = -(w(first) * (x - answer) * change).mean().detach()
    torch.testing.assert_close(logs["objective"], objective, rtol=1e-3, atol=0)
    ours, theirs = (torch.autograd.grad(value, student.parameters()) for value in (loss, expected))
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()))


def test_a_teacher_that_drops_tangents_is_refused():
    # a custom operator without a forward-mode rule gives none, silently: the student would never move
    @torch.library.custom_op("fewstep_tests::copied", mutates_args=())
    def copied(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    torch.library.register_autograd("fewstep_tests::copied", lambda ctx, dy: dy)

    class Dropping(Net):
        def forward(self, *inputs):
            return copied(super().forward(*inputs))

    teacher = Dropping()
    method = InstantMomentMatching(teacher, Net(), 4, ones(teacher))
    with pytest.raises(RuntimeError, match="Dropping has no derivative in forward mode"):
        method.loss(drawn(method, 8), 0)


def test_adaptive_weight_of_the_instant_form():
    # DMD's weight is of x~ against the teacher alone; eq. 9's estimate keeps the flat weight of the loss that gave nu
    teacher, student = Net(), Net()
    method = InstantMomentMatching(teacher, student, 1, ones(teacher), weight="adaptive")
    whole = drawn(method, 8)
    first, second = whole[0::2], whole[1::2]
    nu = method._nu(second)
    x, z, s = method.advance(first)
    parameters = dict(teacher.named_parameters())
    answer, change = torch.func.jvp(
        lambda p: torch.func.functional_call(teacher, p, (z, s, first.cond)), (parameters,), (nu,)
    )
    correction = (x - answer).abs().mean(1, keepdim=True)
    loss, logs = method.loss(whole, 0)
    torch.testing.assert_close(loss, -(x * change / correction).mean())
    torch.testing.assert_close(logs["objective"], -((x - answer) * change).mean().detach())


def test_derivative_along_parameters_is_that_of_torch_func():
    teacher = Net()
    parameters = {name: p.detach() for name, p in teacher.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    z, t, cond = torch.randn(5, 2), torch.rand(5), torch.arange(5) % 3
    expected = torch.func.jvp(
        lambda p: torch.func.functional_call(teacher, p, (z, t, cond)), (parameters,), (direction,)
    )
    for found, value in zip(directional(teacher, parameters, direction, z, t, cond), expected, strict=True):
        assert torch.equal(found, value)
        assert not found.requires_grad


def test_adaptive_weight_divides_by_the_teachers_correction():
    # at one or two steps the EDM weight is all on the smallest noise; DMD's must not reach the auxiliary regression,
    # where a weight that depends on x~ would move E[x~ | z_s] itself
    method = of_form("alternating", k=1, weight="adaptive")
    b = drawn(method)
    x, z, s = method.advance(b)
    target, estimate = method.teacher(z, s, b.cond), method.networks["auxiliary"](z, s, b.cond)
    correction = (x - target).abs().mean(1, keepdim=True)
    torch.testing.assert_close(method.loss(b, 1)[0], (x * (estimate - target) / correction).mean())
    flat = ((x - estimate).square() + (target - estimate).square()).mean()
    torch.testing.assert_close(method.loss(b, 0)[0], flat)


class Told(nn.Module):
    """Remembers what it was called with; answers z plus a parameter."""

    schedule = SCHEDULE

    def __init__(self, takes_guidance):
        super().__init__()
        self.takes_guidance, self.shift, self.calls = takes_guidance, nn.Parameter(torch.zeros(2)), []

    def forward(self, z, t, cond=None, w=None):
        self.calls.append((z, t, cond, w))
        return z + self.shift


@forms
@pytest.mark.parametrize("takes", [False, True])
def test_guidance_reaches_the_teacher_and_only_those_that_take_w(form, takes):
    # a w dropped between the networks trains one w for all; one for the unguided student would be refused or ignored
    student, auxiliary = Told(takes), Told(takes)
    teacher, w_range = Net(), (0.0, 4.0) if takes else (2.0, 2.0)
    options = {"null_cond": NULL, "w_range": w_range, "weight": "flat"}
    if form == "alternating":
        method = MomentMatching(teacher, student, auxiliary, 4, **options)
    else:
        method = InstantMomentMatching(teacher, student, 4, ones(teacher), **options)
    b = drawn(method)
    assert (b.w == 2).all() if not takes else b.w.unique().numel() > 20
    for step in range(2):
        method.loss(b, step)
    for network in method.networks.values():
        assert network.calls
        for z, _, _, w in network.calls:
            assert not z.requires_grad
            assert w is None if not takes else len(w) == len(z)
    if form == "alternating":
        z, s, _, w = auxiliary.calls[0]
        assert w is None or torch.equal(w, b.w)
        target = guidance_target(teacher, NULL, z, s, b.cond, b.w)
        both = (z + auxiliary.shift - target).square() + (z - student(b.z, b.t)).square()
        torch.testing.assert_close(method.loss(b, 0)[0], both.mean())


@pytest.mark.parametrize("kind", ["posterior", "unconditional", "ddim"])
@pytest.mark.parametrize("schedule", [Cosine(), Karras()])
def test_step_to_lands_on_the_marginal(kind, schedule):
    # of a Gaussian whose posterior the student samples, every way to z_s keeps the mean and, but for ddim, the variance
    t, s = torch.full((200_000,), 0.7), torch.full((200_000,), 0.5)
    seeds = torch.arange(200_000)
    x = 0.3 + 0.6 * seeded_noise(seeds, (1,))
    noise = seeded_noise(seeds, (1,), stream=1)
    z = schedule.add_noise(x, t, noise)
    # the true x is a sample of q(x | z_t)
    reached = step_to(x, z, t, s, seeded_noise(seeds, (1,), stream=2), schedule, kind)
    alpha, sigma = schedule.alpha_sigma(s[:1])
    assert reached.mean().item() == pytest.approx(0.3 * alpha.item(), abs=5 * sigma.item() / 400)
    assert reached.var().item() == pytest.approx((alpha**2 * 0.36 + sigma**2).item(), rel=0.02)
    if kind == "ddim":
        torch.testing.assert_close(reached, ddim_step(x, z, t, s, schedule), rtol=1e-4, atol=1e-4)
    follows = torch.corrcoef(torch.stack([reached.flatten() - alpha * x.flatten(), noise.flatten()]))[0, 1]
    assert (follows < 0.02) if kind == "unconditional" else (follows > 0.2)


@pytest.mark.parametrize("schedule", [Cosine(), Karras()])
def test_shortest_steps_are_exact_and_finite(schedule):
    # times that float32 can hardly tell apart: NaN from one in a million samples would stop a long run
    s = torch.cat([torch.linspace(0, 1, 2001), torch.tensor([1.0, 0.0])])
    for t in (s, (s + 2**-24).clamp(max=1), torch.nextafter(s, torch.ones_like(s))):
        z = torch.zeros(len(s), 1)
        step = step_to(z, z, t, s, z + 1, schedule)
        exact = schedule.posterior(z.double(), z.double(), t.double(), s.double())[1]
        torch.testing.assert_close(step.double(), exact, rtol=1e-5, atol=0)
        assert torch.isfinite(step_to(z + 1, z + 1, t, s, z + 1, schedule)).all()


def test_teacher_of_another_prediction_is_converted():
    # a network that predicts eps is a denoiser like any other
    mixture = Mixture.random(SCHEDULE, dtype=torch.float32)
    student, auxiliary = Net(), Net()
    methods = [MomentMatching(teacher, student, auxiliary, 4) for teacher in (mixture, Unconverted(mixture, "eps"))]
    for step in range(2):
        one, two = (method.loss(drawn(method), step)[0] for method in methods)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@forms
def test_losses_are_float32_under_autocast(form):
    # a difference of two estimates in bf16 has two digits, weighted by up to e^20
    method = of_form(form, weight="flat")
    b = drawn(method)
    for step in range(2):
        expected, _ = method.loss(b, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = method.loss(b, step)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0.2, atol=0.02)


@forms
def test_wrapped_networks_are_the_ones_that_are_called(form):
    # DDP or torch.compile put beside the student and then bypassed would never synchronise gradients
    method = of_form(form)

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.count = module, 0

        def forward(self, *arguments):
            self.count += 1
            return self.module(*arguments)

    for name in method.networks:
        method.networks[name] = Wrapped(method.networks[name])
    method.loss(drawn(method), 1)
    counts = {name: network.count for name, network in method.networks.items()}
    assert counts == ({"student": 1, "auxiliary": 1} if form == "alternating" else {"student": 2})


def test_adam_preconditioner_is_what_adam_divides_by():
    # Adam without momentum moves by lr Lambda grad: torch's own optimiser says what Lambda is
    weights = {name: nn.Parameter(torch.randn(shape)) for name, shape in (("a", (3, 2)), ("b", (4,)))}
    optimizer = torch.optim.Adam(weights.values(), lr=0.1, betas=(0.0, 0.99), eps=1e-3)
    for _ in range(5):
        for p in weights.values():
            p.grad = torch.randn_like(p)
            p.grad.view(-1)[0] = 0.0  # never a gradient: no scale either
        before = {name: p.detach().clone() for name, p in weights.items()}
        optimizer.step()
    squares = {name: optimizer.state[p]["exp_avg_sq"] for name, p in weights.items()}
    Lambda = adam_preconditioner(squares, 5, beta2=0.99, eps=1e-3)
    for name, p in weights.items():
        torch.testing.assert_close(before[name] - p.data, 0.1 * Lambda[name] * p.grad, rtol=1e-4, atol=1e-6)
        assert Lambda[name].view(-1)[0] == 0
    assert squares["a"] is optimizer.state[weights["a"]]["exp_avg_sq"]


def test_estimated_preconditioner_is_that_of_the_teachers_own_loss():
    # from few batches: mean squares of the denoising gradient, at a teacher that stays what it is
    teacher = Net().eval().requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    batches = [data(16, update) for update in range(3)]
    found = estimate_preconditioner(teacher, batches, weight="flat", eps=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    free = copy.deepcopy(teacher).requires_grad_(True)
    method = of_form("alternating")
    squares = {name: torch.zeros_like(p) for name, p in free.named_parameters()}
    for x, cond, seeds in batches:
        s = method.draw(x, cond, seeds, 0).s  # the first uniform number of a seed
        z = SCHEDULE.add_noise(x, s, method.draw(x, cond, seeds, 0).noise)
        free.zero_grad()
        (free(z, s, cond) - x).square().mean().backward()
        for name, p in free.named_parameters():
            squares[name] += p.grad.square() / 3
    for name, value in found.items():
        expected = torch.where(squares[name] > 0, 1 / (squares[name].sqrt() + 1e-6), 0)  # no w here: nothing to learn
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    # DDP's hooks do not fire for the teacher's gradient: without its own mean each process would go another way
    alone = {form: distill_processes.train(form) for form in FORMS}
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(distill_processes.__file__)), str(tmp_path)]
    ranks = [subprocess.Popen(command, env={**common, "RANK": str(rank), "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    assert [process.wait(timeout=600) for process in ranks] == [0, 0]
    for rank in range(2):
        for form in FORMS:
            start = build(form).networks["student"].state_dict()
            for name, weight in torch.load(tmp_path / f"{form}{rank}.pt").items():
                torch.testing.assert_close(weight, alone[form][name], rtol=1e-4, atol=1e-6)
                assert not torch.equal(weight, start[name])


def distilled(**record):
    teacher = Net()
    teacher.trained = Trained(**record)
    return teacher


def other_schedule():
    net = Net()
    net.schedule = Karras()
    return net


class Sharded(Net):
    """As fully_shard leaves a module: parameters on a mesh of devices."""

    def __init__(self):
        super().__init__()
        self.out.weight.device_mesh = "mesh"


def moments(teacher=None, student=None, auxiliary=None, k=4, **options):
    return MomentMatching(teacher or Net(), student or Net(), auxiliary or Net(), k, **options)


def shared_auxiliary():
    student = Net()
    return moments(student=student, auxiliary=student)


def shared_student():
    teacher = Net()
    return moments(teacher=teacher, student=teacher)


def with_preconditioner(change, **options):
    teacher = Net()
    Lambda = ones(teacher)
    change(Lambda)
    return InstantMomentMatching(teacher, Net(), 4, Lambda, **options)


BAD = [
    (lambda: moments(k=0), "k = 0"),
    (lambda: moments(k=2.0), r"k = 2\.0"),
    (lambda: moments(weight="adaptve"), "adaptve.*edm_weight"),
    (lambda: moments(renoise="forward"), "renoise = 'forward'.*posterior, unconditional, ddim"),
    (lambda: moments(w_range=(3.0, 1.0)), r"w_range = \(3.0, 1.0\)"),
    (lambda: moments(w_range=(0.0, 3.0), null_cond=NULL), r"w_range = \(0.0, 3.0\): a student without w"),
    (lambda: moments(w_range=(3.0, 3.0)), "null_cond is None"),
    (lambda: moments(student=taking_w()), "takes_guidance.*both"),
    (lambda: moments(student=taking_w(), auxiliary=taking_w()), "w_range is None"),
    (lambda: moments(teacher=taking_w()), "teacher takes w itself"),
    (lambda: moments(teacher=distilled(kind="deterministic", steps=8)), "teacher was trained as 'deterministic'"),
    (lambda: moments(student=other_schedule()), "student Karras.*reschedule"),
    (lambda: moments(auxiliary=other_schedule()), "auxiliary Karras.*reschedule"),
    (lambda: moments(auxiliary=Net().requires_grad_(False)), r"auxiliary has no .*auxiliary.requires_grad_"),
    (shared_auxiliary, "auxiliary shares weights with its student"),
    (shared_student, "student shares weights with its teacher"),
    (lambda: with_preconditioner(lambda p: p.pop("out.bias")), r"preconditioner lacks out.bias \(2,\)"),
    (lambda: with_preconditioner(lambda p: p.update({"head": NULL})), "preconditioner has head"),
    (lambda: with_preconditioner(lambda p: p.update({"out.bias": torch.ones(3)})), r"out.bias.*\(3,\), must be \(2,\)"),
    (lambda: with_preconditioner(lambda p: [v.zero_() for v in p.values()]), "preconditioner is 0 everywhere"),
    (lambda: with_preconditioner(lambda p: p["out.bias"].fill_(float("nan"))), "out.bias.*not finite"),
    (lambda: with_preconditioner(lambda p: p["out.bias"].neg_()), "out.bias.*negative"),
    (lambda: with_preconditioner(lambda p: None, clip=(1.0, -1.0)), r"clip = \(1.0, -1.0\)"),
    (lambda: InstantMomentMatching(Sharded(), Net(), 4, {}), "teacher.out.weight is sharded"),
    (lambda: InstantMomentMatching(Net(), Sharded(), 4, {}), "student.out.weight is sharded"),
    (lambda: adam_preconditioner({}, 0), "step = 0"),
    (lambda: estimate_preconditioner(Net(), []), "data has no batch"),
    (lambda: of_form("instant").loss(drawn(of_form("instant"), 7), 0), "batch has 7 samples"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_one_line_before_compute(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_distilled_student_is_a_good_start():
    # the paper starts from the teacher; a progressively distilled student may be refined as well
    student = distilled(kind="deterministic", steps=8)
    assert moments(teacher=distilled(kind="teacher"), student=student).networks["student"] is student


def test_batches_cut_the_step_with_everything_else():
    # gradient accumulation with another sample's s or noise would compare the wrong moments
    b = drawn(of_form("alternating"), 8)
    parts = b.chunk(2)
    assert isinstance(parts[0], Batch)
    assert torch.equal(torch.cat([p.s for p in parts]), b.s)
    assert torch.equal(torch.cat([p.step_noise for p in parts]), b.step_noise)
    assert torch.equal(sample_seeds(0, 0, torch.arange(8)), b.seeds)
