"""Methods: draws from seeds alone, who learns and who does not, losses, and students that reach the optimum."""

import copy

import pytest
import torch
from oracles import Gaussian, Guided, Mixture
from torch import nn

from fewstep.distill import (
    Batch,
    DenoiserTraining,
    EncoderDistillation,
    GuidanceDistillation,
    ProgressiveDistillation,
)
from fewstep.schedules import Cosine, Trained, expand, loss_weight, sample_seeds, seeded_noise

SCHEDULE = Cosine()
COUNT = 20_000


@pytest.fixture(autouse=True)
def _same_weights_every_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Student(nn.Module):
    """A small denoiser of x, class and w, with dropout."""

    schedule = SCHEDULE

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(5, 8), nn.Linear(8, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, z, t, cond=None, w=None):
        w = torch.zeros_like(t) if w is None else w
        features = torch.cat([z, torch.stack([t, w, cond.to(z.dtype)], dim=1)], dim=1)
        return self.out(self.dropout(self.body(features)).tanh()).float()


def methods(**weight):
    """One of each, with a teacher (None for the teacher's own training) and a student that share nothing."""
    teachers = [Student() for _ in range(4)]
    students = [Student() for _ in range(5)]
    return [
        (None, students[0], DenoiserTraining(students[0], torch.tensor(3), **weight)),
        (teachers[0], students[1], GuidanceDistillation(teachers[0], students[1], torch.tensor(3), **weight)),
        (teachers[1], students[2], ProgressiveDistillation(teachers[1], students[2], 4, **weight)),
        (teachers[2], students[3], ProgressiveDistillation(teachers[2], students[3], 4, kind="stochastic", **weight)),
        (teachers[3], students[4], EncoderDistillation(teachers[3], students[4], 4, **weight)),
    ]


def drawn(method, count=COUNT, run=0):
    seeds = sample_seeds(run, 0, torch.arange(count))
    x = seeded_noise(seeds, (2,), stream=9)
    return method.draw(x, torch.arange(count) % 3, seeds, 0)


NAMES = ["teacher", "guidance", "progressive", "stochastic", "encoder"]
each = pytest.mark.parametrize("index", range(5), ids=NAMES)
of_x = pytest.mark.parametrize("index", range(4), ids=NAMES[:4])  # an encoder's loss is of v: test_encoder.py


@each
def test_draws_are_a_function_of_each_seed_alone(index):
    # 1 or 64 processes, any batch and any step must draw the same; the global generator must not be touched
    *_, method = methods()[index]
    state = torch.random.get_rng_state()
    whole = drawn(method, 60)
    parts = [method.draw(whole.x[i:j], torch.arange(60)[i:j] % 3, whole.seeds[i:j], 5) for i, j in ((0, 7), (7, 60))]
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("t", "noise", "cond", "w"):
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    torch.testing.assert_close(whole.z, SCHEDULE.add_noise(whole.x, whole.t, whole.noise))
    assert not torch.equal(whole.t, drawn(method, 60, run=1).t)


@each
def test_times_and_noise_have_their_distribution(index):
    # all of the time's range, N(0, I), and neither tells about the other or about x
    *_, method = methods()[index]
    batch = drawn(method)
    if index >= 2:
        grid, counts = batch.t.unique(return_counts=True)
        first = 0 if NAMES[index] == "encoder" else 1
        assert torch.equal(grid, torch.arange(first, first + 4) / 4)  # exactly: the sampler's own times
        assert (counts / COUNT - 0.25).abs().max() < 5 * (0.1875 / COUNT) ** 0.5
    else:
        uniform = torch.arange(COUNT) / COUNT
        assert (batch.t.sort().values - uniform).abs().max() < 2 / COUNT**0.5  # Kolmogorov-Smirnov
    columns = [batch.t, *batch.noise.T, *batch.x.T, *([] if batch.w is None else [batch.w])]
    correlation = torch.corrcoef(torch.stack(columns))
    assert (correlation - torch.eye(len(columns))).abs().max() < 5 / COUNT**0.5
    assert batch.noise.std() == pytest.approx(1, abs=0.02)


def test_progressive_grid_is_exact_for_any_number_of_steps():
    # a time that misses i / N by rounding is not one that the sampler will use
    for steps in (1, 3, 7, 49, 512):
        batch = drawn(ProgressiveDistillation(Student(), Student(), steps), 4000)
        assert torch.isin(batch.t, torch.arange(1, steps + 1) / steps).all()
        assert batch.t.max() == 1.0


@pytest.mark.parametrize("method", [GuidanceDistillation, ProgressiveDistillation])
@pytest.mark.parametrize("w_range", [(0.0, 4.0), (2.0, 14.0), (0.1, 0.3), (1.5, 1.5), (0, 0)])
def test_w_fills_its_range(method, w_range):
    # per sample, ends included up to rounding, and the fixed-w baseline when both ends are one
    third = torch.tensor(3) if method is GuidanceDistillation else 4
    w = drawn(method(Student(), Student(), third, w_range=w_range)).w
    low, high = torch.tensor(w_range, dtype=torch.float32)
    assert w.shape == (COUNT,)
    assert (w >= low).all()
    assert (w <= high).all()
    uniform = low + (high - low) * torch.arange(COUNT) / COUNT
    assert (w.sort().values - uniform).abs().max() <= (high - low) * 2 / COUNT**0.5


def test_dropping_hits_the_asked_share_and_only_null_keys():
    # never dropped: guidance has no unconditional branch; mask dropped too: inpainting has no mask
    method = DenoiserTraining(Student(), {"y": torch.tensor(3)}, cond_drop=0.2)
    seeds = sample_seeds(0, 0, torch.arange(COUNT))
    cond = {"y": torch.arange(COUNT) % 3, "mask": torch.rand(COUNT, 4)}
    batch = method.draw(torch.zeros(COUNT, 2), cond, seeds, 0)
    gone = batch.cond["y"] == 3
    assert gone.float().mean() == pytest.approx(0.2, abs=5 * (0.16 / COUNT) ** 0.5)
    assert torch.equal(batch.cond["y"][~gone], cond["y"][~gone])
    assert batch.cond["mask"] is cond["mask"] or torch.equal(batch.cond["mask"], cond["mask"])
    assert abs(torch.corrcoef(torch.stack([gone.float(), batch.t]))[0, 1]) < 5 / COUNT**0.5
    assert DenoiserTraining(Student(), None).draw(torch.zeros(COUNT, 2), cond, seeds, 0).cond is cond


@each
def test_only_the_student_learns(index):
    # a teacher that drifts, or that drops features while it teaches, spoils every target
    teacher, student, method = methods()[index]
    for network in method.networks.values():
        network.train()
    loss, _ = method.loss(drawn(method, 64), 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    (name,) = method.networks
    assert [id(p) for g in method.param_groups()[name] for p in g["params"]] == [id(p) for p in student.parameters()]
    assert method.active(0) == name
    if teacher is not None:
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert torch.equal(method.targets(drawn(method, 8)), method.targets(drawn(method, 8)))


@of_x
@pytest.mark.parametrize("weight", ["snr", "truncated_snr", "snr_plus_one", "edm_weight", "flat", None])
def test_loss_is_the_weighted_error_of_x(index, weight):
    # mean over pixels, then over the batch, each sample at its own log-SNR
    _, student, method = methods(**({} if weight is None else {"weight": weight}))[index]
    name = weight or ("snr_plus_one" if index == 0 else "truncated_snr")
    assert method.weighting.name == name
    student.eval()
    batch = drawn(method, 64)
    targets = method.targets(batch)
    error = (student(batch.z, batch.t, batch.cond, batch.w) - targets).square().mean(1)
    loss, logs = method.loss(batch, 0)
    torch.testing.assert_close(loss, (loss_weight(name)(SCHEDULE.log_snr(batch.t)) * error).mean())
    torch.testing.assert_close(logs["x_mse"], error.mean().detach())
    assert not logs["loss"].requires_grad
    torch.testing.assert_close(method.loss(batch, 0, targets)[0], loss, rtol=0, atol=0)
    other = method.loss(batch, 0, targets + 1)[0]
    assert other != loss  # stored targets are used


@of_x
def test_loss_is_float32_under_autocast(index):
    # bf16 has 8 bits: an error of 1 % of x squared and weighted by the SNR would be noise
    _, student, method = methods(weight="flat")[index]
    student.eval()
    batch = drawn(method, 64)
    targets = method.targets(batch)
    with torch.autocast("cpu", torch.bfloat16):
        x = student(batch.z, batch.t, batch.cond, batch.w)
        loss, _ = method.loss(batch, 0, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (x.float() - targets).square().mean(), rtol=1e-6, atol=0)


@each
def test_a_wrapped_network_is_the_one_that_is_called(index):
    # DDP or torch.compile put beside the student and then bypassed would never synchronise gradients
    _, student, method = methods()[index]
    calls = []

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *arguments):
            calls.append(arguments)
            return self.module(*arguments)

    (name,) = method.networks
    method.networks[name] = Wrapped(student)
    method.loss(drawn(method, 4), 0)
    assert len(calls) == 1


def test_batch_cuts_all_of_its_tensors_alike():
    # a chunk with another sample's w or class trains towards the wrong target
    n = torch.arange(7)
    batch = Batch(n[:, None], n, {"y": n, "mask": n[:, None]}, n, None, n[:, None], n)
    parts = batch.chunk(3)
    assert [len(p) for p in parts] == [3, 3, 1]
    for part in [*parts, batch[torch.tensor([5, 2])], batch.to("cpu")]:
        leaves = [part.z[:, 0], part.w, part.cond["y"], part.cond["mask"][:, 0], part.noise[:, 0], part.seeds]
        assert all(torch.equal(leaf, part.t) for leaf in leaves)
        assert part.x is None
    assert torch.equal(torch.cat([p.t for p in parts]), n)


class GridStudent(nn.Module):
    """x = a_i z + b_i at time i / N: holds any linear denoiser on the grid."""

    schedule = SCHEDULE

    def __init__(self, steps):
        super().__init__()
        self.steps, self.a, self.b = steps, nn.Parameter(torch.zeros(steps)), nn.Parameter(torch.zeros(steps))

    def forward(self, z, t, cond=None, w=None):
        i = (t * self.steps).round().long() - 1
        return expand(self.a[i], z) * z + expand(self.b[i], z)


def fit(method, x, updates, lr):
    """Adam on fresh draws, the learning rate annealed to 0."""
    (groups,) = method.param_groups().values()
    optimizer = torch.optim.Adam(groups)
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / updates)
        seeds = sample_seeds(0, step, torch.arange(len(x)))
        loss, _ = method.loss(method.draw(x, None, seeds, step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_progressive_distillation_reaches_the_optimum():
    # the two-step map of a Gaussian teacher is linear: its coefficients, worked out here from the papers' formulas
    teacher, steps = Gaussian(SCHEDULE, mean=0.5, std=0.7), 4
    student = GridStudent(steps)
    fit(ProgressiveDistillation(teacher, student, steps, w_range=None), torch.linspace(-1, 2, 64)[:, None], 500, 0.05)

    def two_steps(z, i):
        times = [torch.tensor([t / (2 * steps)]).double() for t in (2 * i, 2 * i - 1, 2 * i - 2)]
        (a0, s0), (a1, s1), (a2, s2) = (SCHEDULE.alpha_sigma(t) for t in times)
        x1 = teacher(z, times[0])
        z1 = a1 * x1 + s1 / s0 * (z - a0 * x1)
        x2 = teacher(z1, times[1])
        if i == 1:
            return x2
        return (a2 * x2 + s2 / s1 * (z1 - a1 * x2) - s2 / s0 * z) / (a2 - s2 / s0 * a0)

    zero, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    offset = torch.cat([two_steps(zero, i)[0] for i in range(1, steps + 1)]).float()
    slope = torch.cat([two_steps(one, i)[0] for i in range(1, steps + 1)]).float() - offset
    torch.testing.assert_close(student.a.data, slope, rtol=0, atol=2e-3)
    torch.testing.assert_close(student.b.data, offset, rtol=0, atol=2e-3)


class LearnedGaussian(nn.Module):
    """The closed-form denoiser of N(mean, e^(2 log_std)) with both to be learned."""

    schedule = SCHEDULE

    def __init__(self):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(-0.5)), nn.Parameter(torch.tensor(0.0))

    def forward(self, z, t, cond=None, w=None):
        alpha, sigma = (expand(a, z) for a in SCHEDULE.alpha_sigma(t))
        variance = (2 * self.log_std).exp()
        return self.mean + alpha * variance / (alpha.square() * variance + sigma.square()) * (z - alpha * self.mean)


def test_teacher_training_finds_the_data():
    # regression on x at any positive weight has the posterior mean as its optimum
    x = 0.4 + 0.3 * seeded_noise(torch.arange(2048), (1,))
    denoiser = LearnedGaussian()
    fit(DenoiserTraining(denoiser, None), x, 300, 0.03)
    assert denoiser.mean.item() == pytest.approx(0.4, abs=0.03)
    assert denoiser.log_std.exp().item() == pytest.approx(0.3, abs=0.03)


class ScaledGuidance(nn.Module):
    """The perfect guided student but for a factor on w and a shift, which stage one must find to be 1 and 0."""

    schedule = SCHEDULE

    def __init__(self, mixture):
        super().__init__()
        self.guided = Guided(mixture)
        self.factor, self.shift = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.2))

    def forward(self, z, t, cond=None, w=None):
        return self.guided(z, t, cond, self.factor * w) + self.shift


def test_guidance_distillation_finds_the_guided_teacher():
    # w dropped between teacher and student, or the scale 1 + w in place of w, would settle elsewhere
    mixture = Mixture.random(SCHEDULE, dtype=torch.float32)
    student = ScaledGuidance(mixture)
    method = GuidanceDistillation(mixture, student, mixture.null_cond, weight="flat")
    cond = torch.arange(64) % 3
    x = mixture.means[cond, 0]
    optimizer = torch.optim.Adam(student.parameters())
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        loss, _ = method.loss(method.draw(x, cond, sample_seeds(0, step, torch.arange(64)), step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert student.factor.item() == pytest.approx(1, abs=1e-3)
    assert student.shift.item() == pytest.approx(0, abs=1e-3)


def distilled(**record):
    teacher = Student()
    teacher.trained = Trained(**record)
    return teacher


def shared():
    teacher = Student()
    student = copy.deepcopy(teacher)
    student.out = teacher.out
    return teacher, student


def other_schedule():
    student = Student()
    student.schedule = Cosine(shift=1.0)
    return student


def taking(w):
    student = Student()
    student.takes_guidance = w
    return student


NULL = torch.tensor(3)
BAD = [
    (lambda: GuidanceDistillation(Student(), Student(), None), "null_cond is None"),
    (lambda: GuidanceDistillation(Student(), Student(), NULL, w_range=(4.0, 0.0)), r"w_range = \(4.0, 0.0\)"),
    (lambda: GuidanceDistillation(Student(), Student(), NULL, w_range=(-1.0, 0.0)), r"w_range = \(-1.0, 0.0\)"),
    (lambda: GuidanceDistillation(Student(), Student(), NULL, weight="snr2"), "snr2.*truncated_snr"),
    (lambda: GuidanceDistillation(taking(True), Student(), NULL), "teacher takes w itself"),
    (lambda: GuidanceDistillation(Student(), taking(False), NULL), "student takes no w"),
    (lambda: GuidanceDistillation(*shared(), NULL), "shares weights"),
    (lambda: ProgressiveDistillation(*shared(), 4), "shares weights"),
    (lambda: ProgressiveDistillation(Student(), other_schedule(), 4), "schedule .*reschedule"),
    (lambda: ProgressiveDistillation(Student(), Student().requires_grad_(False), 4), "requires_grad_"),
    (lambda: ProgressiveDistillation(Student(), Student(), 0), "steps = 0"),
    (lambda: ProgressiveDistillation(distilled(kind="deterministic", steps=8), Student(), 8), "8 steps.* one of 16"),
    (lambda: ProgressiveDistillation(distilled(kind="guided", w_range=(0, 4)), Student(), 8, (0, 6)), "w_range = .*6"),
    (lambda: ProgressiveDistillation(Student(), Student(), 4, kind="encoder"), "kind = 'encoder'.*stochastic"),
    (lambda: ProgressiveDistillation(distilled(kind="stochastic", steps=8), Student(), 4), "trained as 'stochastic'"),
    (
        lambda: ProgressiveDistillation(distilled(kind="deterministic", steps=8), Student(), 4, kind="stochastic"),
        "trained as 'deterministic': kind = 'stochastic' needs .* 8 steps",
    ),
    (lambda: EncoderDistillation(distilled(kind="deterministic", steps=8), Student(), 4), "kind = 'encoder' needs"),
    (lambda: EncoderDistillation(Student(), Student(), 0), "steps = 0"),
    (lambda: DenoiserTraining(Student(), NULL, cond_drop=1.5), "cond_drop = 1.5"),
    (lambda: DenoiserTraining(Student(), NULL, weight="x"), "weight='x'"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_one_line_before_compute(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_teacher_of_twice_the_steps_is_accepted():
    # the rule must not refuse the chain that it is there for
    ProgressiveDistillation(distilled(kind="deterministic", steps=8, w_range=(0, 4)), Student(), 4, w_range=(0, 4))
    ProgressiveDistillation(distilled(kind="guided", w_range=(0, 4)), Student(), 16, w_range=(1, 1))
    ProgressiveDistillation(distilled(kind="stochastic", steps=8), Student(), 4, kind="stochastic")
    EncoderDistillation(distilled(kind="encoder", steps=8, w_range=(0, 4)), Student(), 4)
