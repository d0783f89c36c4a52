"""Multistep distillation by moment matching in parameter space, no auxiliary network (arXiv 2406.04103, algorithm 3).

The algorithm is printed with the wrong sign: by eq. 7 phi = theta - lambda Lambda grad, so g_phi - g_theta is MINUS the
Jacobian times nu, and that minus is lost from the Taylor step on. Descending the printed loss raises eq. 9.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.distill.common import WRange
from fewstep.distill.method import Batch
from fewstep.distill.moments import Moments, weighted_product
from fewstep.distill.parameters import directional, loss_gradient, mean_over_processes, refuse_sharded, values
from fewstep.distill.preconditioner import check_preconditioner
from fewstep.samplers.checks import clip as check_clip
from fewstep.schedules import Cond, guide, with_null


class InstantMomentMatching(Moments):
    """Trains `student` so that the teacher's own loss has no gradient on its samples (arXiv 2406.04103, eq. 9).

    The batch is two independent halves, its odd and its even places. One gives nu = Lambda grad_theta L_theta, the
    preconditioned gradient of the teacher's loss on the student's samples, the other descends -w(s) <x~, J_theta(z_s)
    nu>. The log "objective" estimates eq. 9 without bias, so it may be negative, and should fall to 0. Draws are those
    of `MomentMatching`. Where torch.distributed runs (DDP), the gradient is averaged over its processes.
    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: module and denoiser without guidance that estimates E[x | z], its parameters whole on every process.
            It is put into eval mode and gets no gradient.
        student: module and denoiser with the teacher's schedule, started from the teacher or a distilled student.
        k: sampling steps of the student.
        preconditioner: Lambda, see `adam_preconditioner` and `estimate_preconditioner`; frozen.
        null_cond, w_range, weight, weight_shift: as in `MomentMatching`. Guidance changes the teacher's answer, not its
            Jacobian. With weight "adaptive" the loss that gives nu, and with it the logged objective, is flat.
        clip: None or (low, high) for the teacher's x, its Jacobian unchanged likewise.

    Raises:
        ValueError: as `MomentMatching`; the preconditioner lacks a parameter, or has one too many or of another shape;
            clip is wrong; parameters are sharded (FSDP2).
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        k: int,
        preconditioner: Mapping[str, Tensor],
        *,
        null_cond: Cond = None,
        w_range: WRange | None = None,
        weight: str = "edm_weight",
        clip: tuple[float, float] | None = None,
        weight_shift: float = 0.0,
    ) -> None:
        check_clip(clip)
        for name, network in (("teacher", teacher), ("student", student)):
            refuse_sharded(name, network)
        check_preconditioner(preconditioner, teacher)
        super().__init__(
            teacher, k, null_cond, w_range, weight,  # type: ignore[arg-type]  # a denoiser
            weight_shift=weight_shift, student=student,
        )
        self.network, self.clip = teacher, clip
        self.preconditioner = {name: value.detach() for name, value in preconditioner.items()}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """- w(s) <x~, sg[J_theta(z_s) nu]>, and eq. 9's estimate. Raises ValueError for an odd number of samples."""
        if len(batch) % 2:
            raise ValueError(f"batch has {len(batch)} samples: two halves need an even number in every part of it")
        batch, other = batch[0::2], batch[1::2]
        nu = self._nu(other)
        x, z, s = self.advance(batch)
        estimate, change = directional(self.network, values(self.network), nu, z, s, batch.cond)
        teacher_x = self._modified(estimate, z, s, batch)
        loss = self.student_loss(x, -change, teacher_x, s)
        objective = -weighted_product(self.weighting.weight(self.schedule.log_snr(s)), x.detach() - teacher_x, change)
        return loss, {"loss": loss.detach(), "objective": objective}

    def _nu(self, batch: Batch) -> dict[str, Tensor]:
        """Lambda grad_theta w(s) ||x~ - g_theta(z_s)||^2, mean over the processes."""
        with torch.no_grad():
            x, z, s = self.advance(batch)

        def modify(estimate: Tensor) -> Tensor:
            return self._modified(estimate, z, s, batch)

        gradient = loss_gradient(self.network, values(self.network), self.weighting, x, z, s, batch.cond, modify)
        return {name: self.preconditioner[name] * g for name, g in mean_over_processes(gradient).items()}

    @torch.no_grad()
    def _modified(self, x: Tensor, z: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """The teacher's x, guided and clipped if asked for. Shape: x, z (B, ...), s (B,) -> (B, ...)."""
        if batch.w is not None:
            x = guide(x, self.network(z, s, with_null(batch.cond, self.null_cond, len(z))), batch.w)
        return x if self.clip is None else x.clamp(*self.clip)
