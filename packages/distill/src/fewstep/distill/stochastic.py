"""Targets for the stochastic sampler: jumps of two steps, one of the teacher's each (arXiv 2210.03142, algorithm 3)."""

import torch
from torch import Tensor

from fewstep.distill.halving import before, check_steps, two_step_target
from fewstep.schedules import Cond, Denoiser, Trained


@torch.no_grad()
def stochastic_target(
    teacher: Denoiser,
    z: Tensor,
    t: Tensor,
    steps: int,
    cond: Cond = None,
    w: Tensor | float | None = None,
    *,
    single_jump: bool | None = None,
) -> Tensor:
    """The x with which one DDIM jump of 2 / steps lands where two of 1 / steps do (arXiv 2210.03142, algorithm 3).

    From t the teacher goes to t - 1 / steps and t - 2 / steps: a stochastic student of twice the steps was trained for
    jumps of just that length. At t = 2 / steps they end at 0, where the target is the teacher's second estimate. At
    t = 1 / steps one jump of such a teacher already reaches 0, so the target is its estimate there. A teacher that
    knows every time (stage one's student) takes two jumps of half that length instead.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: a denoiser; its `raw` is used if it offers one. Two evaluations of B samples.
        z, t: (B, ...) at times (B,), multiples of 1 / steps in (0, 1].
        steps: the student's.
        cond: leaves (B, ...).
        w: None, a number or (B,), passed to the teacher.
        single_jump: whether the teacher takes t = 1 / steps in one jump; None: if `teacher.trained` says "stochastic".

    Shape: -> like z, float32 or wider, without gradient.

    Raises:
        ValueError: steps is not a positive integer.
    """
    check_steps(steps)
    if single_jump is None:
        trained: Trained | None = getattr(teacher, "trained", None)
        single_jump = trained is not None and trained.kind == "stochastic"
    end = before(t, 2, steps)
    # At t = 1 / steps a first jump of no length makes the second estimate the teacher's only one.
    last = t if single_jump else t / 2
    middle = torch.where(t < 1.5 / steps, last, (t + end) / 2)
    return two_step_target(teacher, z, t, middle, end, cond, w)
