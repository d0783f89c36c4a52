"""The teacher's ordinary training, as a method like the others (arXiv 2202.00512, sec. 4; 2207.12598, algorithm 1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.distill.common import Regression, noise_like, uniforms
from fewstep.distill.method import Batch
from fewstep.schedules import Cond, Schedule, with_null


def dropped(cond: Cond, null_cond: Cond, drop: Tensor) -> Cond:
    """`cond` with null_cond in its place where `drop` (B,) says so; keys that null_cond lacks are kept."""
    null = with_null(cond, null_cond, len(drop))
    if isinstance(cond, Tensor) and isinstance(null, Tensor):
        return _where(drop, null, cond)
    assert isinstance(cond, Mapping)  # with_null refuses a tensor beside a dict
    assert isinstance(null, Mapping)
    return {key: _where(drop, null[key], value) for key, value in cond.items()}


def _where(drop: Tensor, null: Tensor, value: Tensor) -> Tensor:
    return torch.where(drop.reshape(-1, *[1] * (value.ndim - 1)), null, value)


class DenoiserTraining(Regression):
    """Trains a denoiser on noisy data, its condition dropped with probability `cond_drop`, so that it can be guided.

    t ~ U[0, 1) per sample.

    Args:
        denoiser: module and denoiser without w; trained where it requires gradients.
        null_cond: what takes the place of a dropped condition, leaves (...) or (1, ...); None for an unconditional one.
        cond_drop: probability in [0, 1].
        weight: name of a loss weight of fewstep.schedules.

    Raises:
        ValueError: cond_drop or weight is wrong, or nothing of the denoiser can be trained.
    """

    def __init__(
        self, denoiser: nn.Module, null_cond: Cond, cond_drop: float = 0.1, weight: str = "snr_plus_one"
    ) -> None:
        if not 0 <= cond_drop <= 1:
            raise ValueError(f"cond_drop = {cond_drop}: must be a probability in [0, 1]")
        schedule: Schedule = denoiser.schedule  # type: ignore[assignment]  # nn.Module types attributes as modules
        super().__init__(schedule, weight, denoiser=denoiser)
        self.null_cond, self.cond_drop = null_cond, cond_drop

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """t ~ U[0, 1), noise and whose condition is dropped, each from its sample's seed alone."""
        t, u = uniforms(seeds)
        noise = noise_like(x, seeds)
        given = cond if cond is None or self.null_cond is None else dropped(cond, self.null_cond, u < self.cond_drop)
        return Batch(self.schedule.add_noise(x, t, noise), t, given, None, x, noise, seeds)

    def targets(self, batch: Batch) -> Tensor:
        """The data."""
        assert batch.x is not None  # draw gave it
        return batch.x
