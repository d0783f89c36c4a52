"""Stage two: halving the steps, one student step for two of the teacher's (arXiv 2202.00512 and 2210.03142, alg. 2)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fewstep.distill.common import WRange
from fewstep.distill.halving import Halving, before, check_steps, two_step_target
from fewstep.distill.method import Batch
from fewstep.distill.stochastic import stochastic_target
from fewstep.schedules import Cond, Denoiser

Kind = Literal["deterministic", "stochastic"]


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
    check_steps(steps)
    end = before(t, 1, steps)
    return two_step_target(teacher, z, t, (t + end) / 2, end, cond, w)


class ProgressiveDistillation(Halving):
    """Trains `student` to do in `steps` steps what its teacher does in twice as many (arXiv 2210.03142, alg. 2 and 3).

    t = i / steps with i ~ Cat[1..steps], w ~ U[w_range] per sample; w_range = (w, w) is the fixed-w baseline, None for
    denoisers without w. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: denoiser with guidance inside (stage one's student, or the student of twice the steps and of the same
            kind). It is put into eval mode and gets no gradient.
        student: module and denoiser with the teacher's schedule, usually a copy of it; trained where it requires
            gradients. Optimiser and learning rate start anew at every halving.
        steps: the student's.
        w_range: (low, high), 0 <= low <= high, or None.
        weight: name of a loss weight of fewstep.schedules.
        kind: "deterministic" for `samplers.ddim`, or "stochastic" for `samplers.stochastic`: another target, so another
            student. The stochastic student of 1 step is that of 2 steps: from a copy of it the loss is 0.

    Raises:
        ValueError: steps, w_range, weight or kind is wrong, the teacher was distilled to other than twice the steps or
            for another kind, knows less of w or shares weights with the student, their schedules differ, or nothing of
            the student can be trained.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: nn.Module,
        steps: int,
        w_range: WRange | None = (0.0, 4.0),
        weight: str = "truncated_snr",
        kind: Kind = "deterministic",
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind = {kind!r}: must be one of {', '.join(get_args(Kind))}")
        super().__init__(teacher, student, steps, w_range, weight, kind)
        self.kind = kind

    def targets(self, batch: Batch) -> Tensor:
        """What two of the teacher's steps ask of one. Shape: -> like batch.z."""
        target = stochastic_target if self.kind == "stochastic" else progressive_target
        return target(self.teacher, batch.z, batch.t, self.steps, batch.cond, batch.w)
