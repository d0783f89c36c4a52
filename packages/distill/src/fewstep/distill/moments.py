"""What both forms of moment matching share: draws, the student's sample, its step to z_s, the teacher's answer there.

B is arXiv 2406.04103. There g_eta is the student, g_theta the teacher, g_phi the auxiliary denoiser.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fewstep.distill.common import (
    STEP_NOISE_STREAM,
    Training,
    Weighting,
    WRange,
    assign_roles,
    checked_range,
    estimate,
    noise_like,
    uniforms,
    weights_in,
)
from fewstep.distill.guidance import guidance_target
from fewstep.distill.halving import check_steps
from fewstep.distill.method import Batch
from fewstep.samplers import ddim_step
from fewstep.schedules import Cond, Denoiser, Schedule, Trained

Renoise = Literal["posterior", "unconditional", "ddim"]
ADAPTIVE = "adaptive"  # DMD's weight (arXiv 2311.18828, eq. 8): one over the size of the teacher's correction
# w(s), shifted or not, stays as it is there: EDM's test-time schedule, which the paper draws s from, ends at sigma =
# 0.002. On schedules that go on to log-SNR 20, weights that grow as e^lambda would grow by a further factor of 2,000.
LOG_SNR_MAX = -2 * math.log(0.002)
SMALLEST = 1e-5  # of that size: where s = 0 there may be nothing to correct


def step_to(
    x: Tensor, z: Tensor, t: Tensor, s: Tensor, noise: Tensor, schedule: Schedule, kind: Renoise = "posterior"
) -> Tensor:
    """z_s as the sampler reaches it from z_t with the student's x, without gradient (B, algorithm 2).

    kind "posterior" is q(z_s | z_t, x); "ddim" its deterministic counterpart; "unconditional" is q(z_s | x), which
    forgets z_t and costs diversity (B, figure 3).

    Shape: x, z, noise (B, ...), t, s (B,), s <= t -> (B, ...).
    """
    x, t, s = x.detach(), t.double(), s.double()  # of times that are close float32 would keep no difference
    if kind == "ddim":
        return ddim_step(x, z, t, s, schedule)
    if kind == "unconditional":
        return schedule.add_noise(x, s, noise)
    mean, std = schedule.posterior(z, x, t, s)
    return mean + std * noise


class Moments(Training):
    """Base of both forms; arguments as theirs. Networks go by name, "student" among them."""

    def __init__(
        self,
        teacher: Denoiser,
        k: int,
        null_cond: Cond,
        w_range: WRange | None,
        weight: str,
        renoise: Renoise = "posterior",
        weight_shift: float = 0.0,
        **networks: nn.Module,
    ) -> None:
        check_steps(k, "k")
        if renoise not in get_args(Renoise):
            raise ValueError(f"renoise = {renoise!r}: must be one of {', '.join(get_args(Renoise))}")
        self.w_range = None if w_range is None else checked_range(w_range)
        self.takes_w = _takes_w(networks, self.w_range)
        _check_teacher(teacher, null_cond, self.w_range)
        self.weight = weight
        self.weighting = Weighting("flat" if weight == ADAPTIVE else weight, LOG_SNR_MAX, weight_shift)
        super().__init__(**networks)
        for name, network in networks.items():
            assign_roles(teacher, network, name)
        self.teacher, self.k, self.null_cond, self.renoise = teacher, k, null_cond, renoise
        self.schedule = teacher.schedule

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """s ~ U[0, 1), t = min(s + U[0, 1/k), 1), w ~ U[w_range] and both noises, each from its sample's seed alone."""
        s, delta, u = uniforms(seeds, 3)
        t = (s + delta / self.k).clamp(max=1.0)
        noise = noise_like(x, seeds)
        w = None if self.w_range is None else weights_in(self.w_range, u)
        step_noise = noise_like(x, seeds, STEP_NOISE_STREAM)
        return Batch(self.schedule.add_noise(x, t, noise), t, cond, w, x, noise, seeds, s, step_noise)

    def answer(self, name: str, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """A trained network's x, given the batch's condition and, if it takes one, its w.

        Shape: z (B, ...), t (B,) -> like z, float32 or wider.
        """
        x: Tensor = self.networks[name](z, t, batch.cond, batch.w if self.takes_w else None)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def advance(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(x~, z_s, s): the student's x~ = g_eta(z_t), and where it leads, without gradient.

        Shape: -> (B, ...), (B, ...), (B,).
        """
        assert batch.s is not None  # draw gave them
        assert batch.step_noise is not None
        x = self.answer("student", batch.z, batch.t, batch)
        z = step_to(x, batch.z, batch.t, batch.s, batch.step_noise, self.schedule, self.renoise)
        return x, z, batch.s

    @torch.no_grad()
    def teacher_x(self, z: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """g_theta(z_s), guided if w_range says so, without gradient. Shape: z (B, ...), s (B,) -> (B, ...)."""
        if batch.w is None:
            return estimate(self.teacher, z, s, batch.cond, None)
        return guidance_target(self.teacher, self.null_cond, z, s, batch.cond, batch.w)

    def student_loss(self, x: Tensor, direction: Tensor, teacher_x: Tensor, s: Tensor) -> Tensor:
        """Mean of w(s) <x~, direction>: descending it moves x~ against the direction (B, eq. 6).

        Shape: x, direction, teacher_x (B, ...), s (B,) -> ().
        """
        return weighted_product(self._weight_of(x.detach(), teacher_x, s), x, direction.detach())

    def _weight_of(self, x: Tensor, teacher_x: Tensor, s: Tensor) -> Tensor:
        """w(s). Shape: x, teacher_x (B, ...), s (B,) -> (B,)."""
        if self.weight == ADAPTIVE:
            return 1 / (x - teacher_x).abs().flatten(1).mean(1).clamp(min=SMALLEST)
        return self.weighting.weight(self.schedule.log_snr(s))


def weighted_product(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Mean of w <a, b> over pixels and batch. Shape: weight (B,), a, b (B, ...) -> ()."""
    product = (a * b).flatten(1).mean(1)
    return (weight.to(product.dtype) * product).mean()


def _takes_w(networks: dict[str, nn.Module], w_range: WRange | None) -> bool:
    """Whether the networks are given w: all of them or none."""
    takes = {name: bool(getattr(network, "takes_guidance", False)) for name, network in networks.items()}
    if len(set(takes.values())) > 1:
        raise ValueError(f"takes_guidance is {takes}: student and auxiliary must both take w, or neither")
    if takes["student"] and w_range is None:
        raise ValueError("w_range is None: a student that takes w needs the range to draw it from")
    if not takes["student"] and w_range is not None and w_range[0] != w_range[1]:
        raise ValueError(f"w_range = {w_range}: a student without w learns one weight, give (w, w)")
    return takes["student"]


def _check_teacher(teacher: Denoiser, null_cond: Cond, w_range: WRange | None) -> None:
    if getattr(teacher, "takes_guidance", False):
        raise ValueError("teacher takes w itself: moment matching guides a denoiser without guidance by null_cond")
    trained: Trained | None = getattr(teacher, "trained", None)
    if trained is not None and trained.kind != "teacher":
        raise ValueError(f"teacher was trained as {trained.kind!r}: it must estimate E[x | z], start a student from it")
    if w_range is not None and null_cond is None:
        raise ValueError(f"null_cond is None: a teacher guided with w in {w_range} needs what stands for no condition")
