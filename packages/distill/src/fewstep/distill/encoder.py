"""Distilled encoders: reverse DDIM, from image to noise, halved like a sampler (arXiv 2210.03142, algorithm 4)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.distill.common import WRange, raw_of
from fewstep.distill.halving import Halving, check_steps, first_share
from fewstep.distill.method import Batch
from fewstep.kernels import guided_update
from fewstep.samplers import ddim_step
from fewstep.schedules import Cond, Denoiser, expand, from_x


@torch.no_grad()
def encoder_target(
    teacher: Denoiser, z: Tensor, t: Tensor, steps: int, cond: Cond = None, w: Tensor | float | None = None
) -> Tensor:
    """The v with which one reversed DDIM step of 1 / steps lands where two of the teacher's do (2210.03142, alg. 4).

    From t the teacher steps to t' = t + 0.5 / steps and t'' = t + 1 / steps; v = alpha eps - sigma x, so that with a VP
    schedule z'' = cos(d) z - sin(d) v where d = phi_t - phi_t'', phi = atan(sigma / alpha). Not x: at t = 0, where
    sigma is 5e-5, the step multiplies an error of x by sigma'' / sigma, 2e4. v is made from the mean of the teacher's
    two eps, weighted by the growth of sigma / alpha, in float64 (the teacher itself sees the dtype of z).

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: a denoiser; its `raw` is used if it offers one, and keeps more digits. Two evaluations of B samples.
        z, t: (B, ...) at times (B,), multiples of 1 / steps in [0, 1).
        steps: the student's.
        cond: leaves (B, ...).
        w: None, a number or (B,), passed to the teacher.

    Shape: -> like z, float32 or wider, without gradient.

    Raises:
        ValueError: steps is not a positive integer.
    """
    check_steps(steps)
    schedule, dtype = teacher.schedule, torch.promote_types(z.dtype, torch.float32)
    z, t = z.double(), t.double()
    middle, end = t + 0.5 / steps, t + 1 / steps

    def noise_and_image(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = guided_update(raw_of(teacher, z.to(dtype), t.to(dtype), cond, w), z, t, None, schedule, w)
        return from_x(x, z, t, schedule, "eps"), x

    noise1, x1 = noise_and_image(z, t)
    noise2, _ = noise_and_image(ddim_step(x1, z, t, middle, schedule), middle)
    share = first_share(*(-schedule.log_snr(u) / 2 for u in (t, middle, end)))
    noise = noise2 + expand(share, z) * (noise1 - noise2)
    alpha, sigma = (expand(a, z) for a in schedule.alpha_sigma(t))
    return (alpha * noise - sigma * (z - sigma * noise) / alpha).to(dtype)


class EncoderDistillation(Halving):
    """Trains `student` to encode in `steps` reversed DDIM steps what its teacher does in twice as many (algorithm 4).

    t = i / steps with i ~ Cat[0..steps - 1], w ~ U[w_range] per sample. w = 0 is no guidance (Stable Diffusion's
    guidance scale is 1 + w).

    Args:
        teacher: denoiser with guidance inside: stage one's student, or the encoder of twice the steps. It is put into
            eval mode and gets no gradient.
        student: module and denoiser with the teacher's schedule, usually a copy of it; trained where it requires
            gradients.
        steps: the student's.
        w_range: (low, high), 0 <= low <= high, or None for denoisers without w.
        weight: name of a loss weight of fewstep.schedules on the squared error of x, from which that of v follows:
            "snr_plus_one" weighs every v alike (VP), "truncated_snr" by max(alpha^2, sigma^2).

    Raises:
        ValueError: as in `ProgressiveDistillation`.
    """

    first: ClassVar[int] = 0

    def __init__(
        self,
        teacher: Denoiser,
        student: nn.Module,
        steps: int,
        w_range: WRange | None = (0.0, 4.0),
        weight: str = "truncated_snr",
    ) -> None:
        super().__init__(teacher, student, steps, w_range, weight, "encoder")

    def targets(self, batch: Batch) -> Tensor:
        """The v that two of the teacher's reversed steps ask of one. Shape: -> like batch.z."""
        return encoder_target(self.teacher, batch.z, batch.t, self.steps, batch.cond, batch.w)

    def loss(self, batch: Batch, step: int, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted squared error of v, times what makes it one of x; the targets are computed unless given."""
        target = self.targets(batch) if targets is None else targets
        x = self.networks["student"](batch.z, batch.t, batch.cond, batch.w)
        alpha, sigma = (expand(a, batch.z) for a in self.schedule.alpha_sigma(batch.t))
        to_x = sigma / (alpha.square() + sigma.square())
        v = from_x(x, batch.z, batch.t, self.schedule, "v")
        return self.weighting(to_x * v, to_x * target, self.schedule.log_snr(batch.t))
