"""Multistep distillation by moment matching with an auxiliary denoiser (arXiv 2406.04103, algorithm 2)."""

import torch
from torch import Tensor, nn

from fewstep.distill.common import WRange, refuse_shared
from fewstep.distill.method import Batch
from fewstep.distill.moments import Moments, Renoise
from fewstep.schedules import Cond, Denoiser


class MomentMatching(Moments):
    """Trains `student` to sample x~ with E[x~ | z_s] = E[x | z_s], an auxiliary denoiser estimating the left side.

    s ~ U[0, 1) in the schedule's time and t = min(s + U[0, 1/k), 1) per sample; even updates train the auxiliary
    network, odd ones the student. Sample with `samplers.ancestral` in k steps. The distribution of noise levels is the
    schedule's: to change it give teacher, student and auxiliary another one (`schedules.reschedule`). The paper trains
    both with Adam(0, 0.99), a rate that falls to 0, without dropout or average.
    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Args:
        teacher: denoiser without guidance that estimates E[x | z]. It is put into eval mode and gets no gradient.
        student: module and denoiser with the teacher's schedule, started from the teacher or a distilled student.
        auxiliary: the same, started from the teacher.
        k: sampling steps of the student.
        null_cond: what guidance drops; needed with w_range.
        w_range: None for a teacher without guidance. (low, high): the teacher is guided with w ~ U[low, high], which
            student and auxiliary are given if they take it (`takes_guidance`); if they do not, low = high.
        weight: w(s), the name of a loss weight of fewstep.schedules (below EDM's least noise, sigma = 0.002, it stays
            as it is there), or "adaptive" (DMD's, meant for k <= 2: x~'s gradient divided by the mean
            |x~ - g_theta(z_s)| of its sample; the auxiliary loss is flat).
        renoise: how z_s is reached, see `step_to`; other than "posterior" for ablations.
        weight_shift: taken from the log-SNR before w(s): -2 log(resolution / 64), where the schedule is shifted by as
            much for larger images (B, section 4).

    Raises:
        ValueError: k, w_range, weight or renoise is wrong, the teacher takes w or was distilled, student and auxiliary
            do not take w alike, two networks share weights, their schedules differ, or one cannot be trained.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: nn.Module,
        auxiliary: nn.Module,
        k: int,
        *,
        null_cond: Cond = None,
        w_range: WRange | None = None,
        weight: str = "edm_weight",
        renoise: Renoise = "posterior",
        weight_shift: float = 0.0,
    ) -> None:
        refuse_shared("auxiliary", auxiliary, "student", student)
        networks = {"student": student, "auxiliary": auxiliary}
        super().__init__(teacher, k, null_cond, w_range, weight, renoise, weight_shift, **networks)

    def active(self, step: int) -> str:
        """Even updates are the auxiliary network's, odd ones the student's."""
        return "student" if step % 2 else "auxiliary"

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the network whose turn it is."""
        return self._student(batch) if self.active(step) == "student" else self._auxiliary(batch)

    def _auxiliary(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """w(s) (||x~ - g_phi(z_s)||^2 + ||g_theta(z_s) - g_phi(z_s)||^2): g_phi becomes the mean of both."""
        with torch.no_grad():
            x, z, s = self.advance(batch)
        teacher_x = self.teacher_x(z, s, batch)
        estimate, log_snr = self.answer("auxiliary", z, s, batch), self.schedule.log_snr(s)
        to_student, logs = self.weighting(estimate, x, log_snr)
        to_teacher, _ = self.weighting(estimate, teacher_x, log_snr)
        loss = to_student + to_teacher
        return loss, {"loss": loss.detach(), "auxiliary_loss": loss.detach(), "auxiliary_mse": logs["x_mse"]}

    def _student(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """w(s) <x~, sg[g_phi(z_s) - g_theta(z_s)]>; logs the size of that gap, half the moments' own."""
        x, z, s = self.advance(batch)
        teacher_x = self.teacher_x(z, s, batch)
        with torch.no_grad():
            gap = self.answer("auxiliary", z, s, batch) - teacher_x
        loss = self.student_loss(x, gap, teacher_x, s)
        return loss, {"loss": loss.detach(), "student_loss": loss.detach(), "moment_gap": gap.square().mean()}
