"""Stage two: halving the steps, one student step for two of the teacher's (arXiv 2202.00512 and 2210.03142, alg. 2)."""

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.common import (
    Weighting,
    WRange,
    assign_roles,
    checked_range,
    estimate,
    noise_like,
    trainable,
    uniforms,
    weights_in,
)
from fewstep.distill.method import Batch
from fewstep.samplers import ddim_step
from fewstep.schedules import Cond, Denoiser, Schedule, Trained, expand

AT_DATA = 1e-3  # share of a step: nearer to t = 0 than this is t = 0, reached by rounding


def first_share(t: Tensor, middle: Tensor, end: Tensor, schedule: Schedule) -> Tensor:
    """Weight of the first of two estimates of x in the one that a single step needs. Shape: (B,) each -> (B,).

    DDIM moves z / sigma by x d(alpha / sigma), so two steps with x1 and x2 land where one does with their mean,
    weighted by the growth of alpha / sigma: share = (r' - r) / (r'' - r), r = e^(lambda / 2). This equals the quotient
    (z'' - (sigma'' / sigma) z) / (alpha'' - (sigma'' / sigma) alpha) of algorithm 2 without its cancellation.
    """
    start, half, last = (schedule.log_snr(u) / 2 for u in (t, middle, end))
    return torch.exp(half - last) * torch.expm1(start - half) / torch.expm1(start - last)


@torch.no_grad()
def progressive_target(
    teacher: Denoiser, z: Tensor, t: Tensor, steps: int, cond: Cond = None, w: Tensor | float | None = None
) -> Tensor:
    """The x with which one DDIM step of 1 / steps lands where two of the teacher's do (arXiv 2210.03142, algorithm 2).

    From t the teacher steps to t' = t - 0.5 / steps and t'' = t - 1 / steps. Where t'' = 0 the target is the teacher's
    second estimate. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: a denoiser; its `raw` is used if it offers one. Two evaluations of B samples.
        z, t: (B, ...) at times (B,) in (0, 1]; nearer to 0 than a step, what is left is cut in two.
        steps: the student's.
        cond: leaves (B, ...).
        w: None, a number or (B,), passed to the teacher.

    Shape: -> like z, float32 or wider, without gradient.

    Raises:
        ValueError: steps is not a positive integer.
    """
    _check_steps(steps)
    end = t - 1 / steps
    at_data = end < AT_DATA / steps
    end = end.masked_fill(at_data, 0.0)
    middle = (t + end) / 2
    x1 = estimate(teacher, z, t, cond, w)
    x2 = estimate(teacher, ddim_step(x1, z, t, middle, teacher.schedule), middle, cond, w)
    share = first_share(t, middle, end, teacher.schedule).masked_fill(at_data, 0.0)
    return x2 + expand(share, z) * (x1 - x2)


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}: must be the student's number of steps, an integer of at least 1")


def _check_teacher(teacher: Denoiser, steps: int, w_range: WRange | None) -> None:
    """A distilled teacher knows one grid, that of twice the student's steps, and one range of w."""
    trained: Trained | None = getattr(teacher, "trained", None)
    if trained is None:
        return
    if trained.steps not in (None, 2 * steps):
        raise ValueError(f"teacher was trained for {trained.steps} steps, steps = {steps} needs one of {2 * steps}")
    if trained.w_range and w_range and not trained.w_range[0] <= w_range[0] <= w_range[1] <= trained.w_range[1]:
        raise ValueError(f"w_range = {w_range} must lie within that of the teacher's training, {trained.w_range}")


class ProgressiveDistillation:
    """Trains `student` to do in `steps` DDIM steps what its teacher does in twice as many (arXiv 2210.03142, alg. 2).

    t = i / steps with i ~ Cat[1..steps], w ~ U[w_range] per sample; w_range = (w, w) is the fixed-w baseline, None for
    denoisers without w. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: denoiser with guidance inside (stage one's student, or the student of twice the steps). It is put into
            eval mode and gets no gradient.
        student: module and denoiser with the teacher's schedule, usually a copy of it; trained where it requires
            gradients. Optimiser and learning rate start anew at every halving.
        steps: the student's.
        w_range: (low, high), 0 <= low <= high, or None.
        weight: name of a loss weight of fewstep.schedules.

    Raises:
        ValueError: steps, w_range or weight is wrong, the teacher was distilled to other than twice the steps,
            knows less of w or shares weights with the student, their schedules differ, or nothing of the student can
            be trained.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: nn.Module,
        steps: int,
        w_range: WRange | None = (0.0, 4.0),
        weight: str = "truncated_snr",
    ) -> None:
        _check_steps(steps)
        self.w_range = None if w_range is None else checked_range(w_range)
        _check_teacher(teacher, steps, self.w_range)
        self.weighting = Weighting(weight)
        assign_roles(teacher, student)
        self.teacher, self.steps, self.schedule = teacher, steps, teacher.schedule
        self.networks: dict[str, nn.Module] = {"student": student}

    def param_groups(self) -> dict[str, list[dict[str, Any]]]:
        """One optimiser, "student"."""
        return {"student": trainable(self.networks["student"])}

    def active(self, step: int) -> str:
        """The only optimiser."""
        return "student"

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """t on the student's grid, w ~ U[w_range] and noise, each from its sample's seed alone."""
        u, v = uniforms(seeds)
        t = ((u * self.steps).floor().clamp(max=self.steps - 1) + 1) / self.steps
        noise = noise_like(x, seeds)
        z = self.schedule.add_noise(x, t, noise)
        w = None if self.w_range is None else weights_in(self.w_range, v)
        return Batch(z, t, cond, w, x, noise, seeds)

    def targets(self, batch: Batch) -> Tensor:
        """What two of the teacher's steps ask of one. Shape: -> like batch.z."""
        return progressive_target(self.teacher, batch.z, batch.t, self.steps, batch.cond, batch.w)

    def loss(self, batch: Batch, step: int, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted squared error of the student's x."""
        target = self.targets(batch) if targets is None else targets
        x = self.networks["student"](batch.z, batch.t, batch.cond, batch.w)
        return self.weighting(x, target, self.schedule.log_snr(batch.t))
