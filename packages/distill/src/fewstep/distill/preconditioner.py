"""The diagonal preconditioner of parameter-space moment matching: Adam's, from the teacher's training (B, section 4).

B is arXiv 2406.04103. A preconditioner maps each of the teacher's parameter names to a tensor of its shape.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fewstep.distill.common import Weighting, noise_like, uniforms
from fewstep.distill.moments import LOG_SNR_MAX
from fewstep.distill.parameters import loss_gradient, values
from fewstep.schedules import Cond, Schedule


def adam_preconditioner(
    exp_avg_sq: Mapping[str, Tensor], step: int, beta2: float = 0.999, eps: float = 1e-8
) -> dict[str, Tensor]:
    """1 / (sqrt(v_hat) + eps) from Adam's state, v_hat = v / (1 - beta2^step); 0 where v = 0.

    A parameter that never had a gradient, like the embedding of a class that was not seen, has no scale of its own;
    1 / eps would give it the largest step of all.

    Args:
        exp_avg_sq: parameter name -> Adam's `exp_avg_sq`; names as in `teacher.named_parameters()`.
        step: updates that Adam has made, at least 1.
        beta2: Adam's second decay, in [0, 1).
        eps: Adam's, not negative.

    Raises:
        ValueError: step, beta2 or eps is none of these.
    """
    if step < 1 or not 0 <= beta2 < 1 or eps < 0:
        raise ValueError(f"step = {step}, beta2 = {beta2}, eps = {eps}: need step >= 1, 0 <= beta2 < 1 and eps >= 0")
    correction = 1 - beta2**step
    return {name: _inverse_root(v.detach() / correction, eps) for name, v in exp_avg_sq.items()}


def estimate_preconditioner(
    teacher: nn.Module,
    data: Iterable[tuple[Tensor, Cond, Tensor]],
    *,
    weight: str = "edm_weight",
    weight_shift: float = 0.0,
    eps: float = 1e-8,
) -> dict[str, Tensor]:
    """The same from a few batches: v_hat is the mean square of the gradients of the teacher's own loss.

    That loss is w(t) ||x - g_theta(z_t)||^2, t ~ U[0, 1) in the teacher's schedule; the teacher is left as it is.

    Args:
        teacher: module and denoiser that estimates E[x | z].
        data: (x, cond, seeds) of each batch: x (B, ...), cond leaves (B, ...), seeds (B,) int64.
        weight, weight_shift: those of the distillation; the weight is one of fewstep.schedules, by its name.
        eps: added to the root.

    Raises:
        ValueError: weight is unknown or there is no batch.
    """
    schedule: Schedule = teacher.schedule  # type: ignore[assignment]  # nn.Module types attributes as modules
    weighting, parameters, count = Weighting(weight, LOG_SNR_MAX, weight_shift), values(teacher), 0
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, cond, seeds in data:
        (t, _), count = uniforms(seeds), count + 1
        z = schedule.add_noise(x, t, noise_like(x, seeds))
        gradient = loss_gradient(teacher, parameters, weighting, x, z, t, cond)
        for name, square in squares.items():
            square.add_(gradient[name].square())
    if not count:
        raise ValueError("data has no batch: estimate_preconditioner needs at least one")
    return {name: _inverse_root(square / count, eps) for name, square in squares.items()}


def _inverse_root(v: Tensor, eps: float) -> Tensor:
    return torch.where(v > 0, 1 / (v.sqrt() + eps), 0.0)


def check_preconditioner(preconditioner: Mapping[str, Tensor], teacher: nn.Module) -> None:
    """Raise ValueError unless each of the teacher's parameters has a tensor like it, finite, >= 0, and some not 0."""
    shapes = {name: tuple(p.shape) for name, p in teacher.named_parameters()}
    for name, shape in shapes.items():
        if name not in preconditioner:
            raise ValueError(f"preconditioner lacks {name} {shape}: it must be of the teacher's architecture")
        if tuple(preconditioner[name].shape) != shape:
            raise ValueError(f"preconditioner[{name!r}] has shape {tuple(preconditioner[name].shape)}, must be {shape}")
    for name in preconditioner:
        if name not in shapes:
            raise ValueError(f"preconditioner has {name}, which the teacher lacks: it must be of its architecture")
    for name, value in preconditioner.items():
        if not bool(((value >= 0) & value.isfinite()).all()):
            raise ValueError(f"preconditioner[{name!r}] has values that are negative or not finite: Adam's are not")
    if not any(bool(value.any()) for value in preconditioner.values()):
        raise ValueError("preconditioner is 0 everywhere: no student would move; was Adam's state read?")
