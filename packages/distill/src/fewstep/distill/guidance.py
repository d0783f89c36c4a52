"""Stage one: classifier-free guidance folded into one network that takes w (arXiv 2210.03142, algorithm 1)."""

import torch
from torch import Tensor, nn

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
from fewstep.schedules import Cond, Denoiser, Prediction, Raw, guided_outputs


@torch.no_grad()
def guidance_target(
    teacher: Denoiser, null_cond: Cond, z: Tensor, t: Tensor, cond: Cond, w: Tensor | float
) -> Tensor:
    """x^w = (1 + w) x_cond - w x_uncond by one evaluation of 2 B samples (arXiv 2210.03142, section 3.1).

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: without guidance; its `raw` is used if it offers one.
        null_cond: what guidance drops, leaves (...) or (1, ...); keys of a dict that it lacks are kept from cond.
        z, t: (B, ...) at times (B,).
        cond: leaves (B, ...).
        w: a number or (B,).

    Shape: -> like z, float32 or wider, without gradient.

    Raises:
        ValueError: cond or null_cond is missing, or they do not fit each other.
    """
    predictions: list[Prediction] = []

    def evaluate(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        raw = raw_of(teacher, z, t, cond)
        predictions.append(raw.prediction)
        return raw.cond_output

    outputs = guided_outputs(evaluate, z, t, cond, null_cond)
    return guided_update(Raw(*outputs, predictions[0]), z, t, None, teacher.schedule, w)


class GuidanceDistillation(Regression):
    """Trains `student` to answer with w what the guided teacher does (arXiv 2210.03142, algorithm 1).

    t ~ U[0, 1), w ~ U[w_range] per sample; w_range = (w, w) is the fixed-w baseline.
    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: denoiser without guidance. It is put into eval mode and gets no gradient.
        student: module and denoiser that takes w, with the teacher's schedule; trained where it requires gradients.
        null_cond: what guidance drops, see `guidance_target`.
        w_range: (low, high), 0 <= low <= high.
        weight: name of a loss weight of fewstep.schedules.

    Raises:
        ValueError: w_range or weight is wrong, null_cond is None, the teacher takes w itself or shares weights with
            the student, the student takes no w, their schedules differ, or nothing of the student can be trained.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: nn.Module,
        null_cond: Cond,
        w_range: WRange = (0.0, 4.0),
        weight: str = "truncated_snr",
    ) -> None:
        if null_cond is None:
            raise ValueError("null_cond is None: guidance needs what stands for no condition")
        if getattr(teacher, "takes_guidance", False):
            raise ValueError("teacher takes w itself: stage one starts from a denoiser without guidance")
        if not getattr(student, "takes_guidance", True):
            raise ValueError("student takes no w: give it the input, fewstep.models.with_guidance_input(teacher)")
        self.w_range, self.teacher, self.null_cond = checked_range(w_range), teacher, null_cond
        super().__init__(teacher.schedule, weight, student=student)
        assign_roles(teacher, student)

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """t ~ U[0, 1), w ~ U[w_range] and noise, each from its sample's seed alone."""
        t, u = uniforms(seeds)
        noise = noise_like(x, seeds)
        z = self.schedule.add_noise(x, t, noise)
        return Batch(z, t, cond, weights_in(self.w_range, u), x, noise, seeds)

    def targets(self, batch: Batch) -> Tensor:
        """The guided teacher's x. Shape: -> like batch.z."""
        assert batch.w is not None  # draw gave it
        return guidance_target(self.teacher, self.null_cond, batch.z, batch.t, batch.cond, batch.w)
