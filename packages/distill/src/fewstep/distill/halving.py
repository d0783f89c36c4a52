"""What the halvings of a sampler's steps share: two of the teacher's steps in one, the student's grid, the checks."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep import kernels
from fewstep.distill.common import (
    Regression,
    WRange,
    assign_roles,
    checked_range,
    noise_like,
    raw_of,
    uniforms,
    weights_in,
)
from fewstep.distill.method import Batch
from fewstep.kernels import guided_update
from fewstep.schedules import Cond, Denoiser, Trained

AT_DATA = 1e-3  # share of a step: nearer to t = 0 than this is t = 0, reached by rounding


def check_steps(steps: int, name: str = "steps") -> None:
    """Raise ValueError, calling it `name`, unless `steps` is a positive integer."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} = {steps!r}: must be the student's number of steps, an integer of at least 1")


def before(t: Tensor, intervals: int, steps: int) -> Tensor:
    """t - intervals / steps, exactly 0 where that is 0 or less. Shape: (B,) -> (B,)."""
    end = t - intervals / steps
    return end.masked_fill(end < AT_DATA / steps, 0.0)


def first_share(start: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """(r' - r) / (r'' - r) for r = e^start, r' = e^middle, r'' = e^end, without cancellation. Shape: (B,) each -> (B,).

    DDIM moves z / sigma by x d(alpha / sigma), so two steps with x1 and x2 land where one does with their mean, x1
    weighted by this share of the growth of r = alpha / sigma = e^(lambda / 2). In the same way it moves z / alpha by
    eps d(sigma / alpha).
    """
    return torch.exp(middle - end) * torch.expm1(start - middle) / torch.expm1(start - end)


def two_step_target(
    teacher: Denoiser, z: Tensor, t: Tensor, middle: Tensor, end: Tensor, cond: Cond, w: Tensor | float | None
) -> Tensor:
    """The x with which one DDIM step from t to `end` lands where two of the teacher's land, by way of `middle`.

    The weighted mean of both estimates that equals the quotient (z'' - (sigma'' / sigma) z) / (alpha'' - (sigma'' /
    sigma) alpha) of arXiv 2202.00512, algorithm 2, without its cancellation. Where end = 0 it is the second estimate.
    Shape: z (B, ...), times (B,) -> like z.
    """
    schedule = teacher.schedule
    share = first_share(*(schedule.log_snr(u) / 2 for u in (t, middle, end))).masked_fill(end == 0, 0.0)
    moved, x1 = guided_update(raw_of(teacher, z, t, cond, w), z, t, middle, schedule, w, return_x=True)
    second = raw_of(teacher, moved, middle, cond, w)
    return kernels.two_step_target(second, moved, middle, schedule, x1, share, w)


def _check_teacher(teacher: Denoiser, kind: str, steps: int, w_range: WRange | None) -> None:
    """A distilled teacher knows one sampler and its grid, that of twice the student's steps, and one range of w."""
    trained: Trained | None = getattr(teacher, "trained", None)
    if trained is None:
        return
    if trained.steps not in (None, 2 * steps):
        raise ValueError(f"teacher was trained for {trained.steps} steps, steps = {steps} needs one of {2 * steps}")
    if trained.steps is not None and trained.kind != kind:
        raise ValueError(
            f"teacher was trained as {trained.kind!r}: kind = {kind!r} needs a teacher of that kind and "
            f"{2 * steps} steps, or stage one's student"
        )
    if trained.w_range and w_range and not trained.w_range[0] <= w_range[0] <= w_range[1] <= trained.w_range[1]:
        raise ValueError(f"w_range = {w_range} must lie within that of the teacher's training, {trained.w_range}")


class Halving(Regression):
    """A student that does in `steps` steps what its teacher does in twice as many; `targets` are the subclass's.

    t = i / steps, i of `steps` integers from `first`, and w ~ U[w_range], per sample.

    Attributes:
        first: least i.
    """

    first: ClassVar[int] = 1

    def __init__(
        self, teacher: Denoiser, student: nn.Module, steps: int, w_range: WRange | None, weight: str, kind: str
    ) -> None:
        check_steps(steps)
        self.w_range = None if w_range is None else checked_range(w_range)
        _check_teacher(teacher, kind, steps, self.w_range)
        self.teacher, self.steps = teacher, steps
        super().__init__(teacher.schedule, weight, student=student)
        assign_roles(teacher, student)

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """t on the student's grid, w ~ U[w_range] and noise, each from its sample's seed alone."""
        u, v = uniforms(seeds)
        t = ((u * self.steps).floor().clamp(max=self.steps - 1) + self.first) / self.steps
        noise = noise_like(x, seeds)
        z = self.schedule.add_noise(x, t, noise)
        w = None if self.w_range is None else weights_in(self.w_range, v)
        return Batch(z, t, cond, w, x, noise, seeds)
