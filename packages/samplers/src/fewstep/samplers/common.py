"""What every sampler shares: inputs checked before compute, the start, the time grid, one evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.kernels import guided_update
from fewstep.samplers import checks
from fewstep.schedules import Cond, Denoiser, Schedule, seeded_noise

Weight = float | Tensor | None
Kind = Literal["ddim", "renoise", "posterior"]
Clip = tuple[float, float] | None
Callback = Callable[[int, float, Tensor], None]
Weights = Callable[..., tuple[Tensor, ...]]

# Stream of seeded_noise used by update 0; update i uses this + i, far from the streams of starts and training draws.
UPDATE_STREAM = 1 << 16


class Table:
    """A schedule's values on a run's grid, computed once (float64) and handed out as tensors (B,).

    kernels.guided_update asks for them five times per update, which would cost as much as all of its own arithmetic. It
    asks with the run's own `rows`, so those are recognised by identity; any other time goes to the schedule.
    """

    def __init__(self, schedule: Schedule, times: Sequence[float], rows: Sequence[Tensor]) -> None:
        t = torch.tensor(times, dtype=torch.float64)
        columns = [rows_like(v, rows[0]) for v in (schedule.log_snr(t), *schedule.alpha_sigma(t))]
        self._schedule, self._values = schedule, dict(zip(map(id, rows), zip(*columns, strict=True), strict=True))

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t. Shape: (B,) -> (B,)."""
        known = self._values.get(id(t))
        return self._schedule.log_snr(t) if known is None else known[0]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t. Shape: (B,) -> (B,), (B,)."""
        known = self._values.get(id(t))
        return self._schedule.alpha_sigma(t) if known is None else (known[1], known[2])


def rows_like(column: Sequence[float] | Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Each value of a column (steps + 1,) as a row like `like` (B, ...): (B,), its device and dtype."""
    values = torch.as_tensor(column, dtype=torch.float64).to(like.dtype).to(like.device)
    return values[:, None].repeat(1, len(like)).unbind()


@dataclass(frozen=True)
class Run:
    """One call of a sampler, checked: start `z` (B, ...), `times` (steps + 1 floats) and the same as rows (B,)."""

    denoiser: Denoiser
    cond: Cond
    w: Weight
    clip: Clip
    seeds: Tensor | None
    callback: Callback | None
    times: tuple[float, ...]
    rows: tuple[Tensor, ...]
    table: Table
    z: Tensor

    def grid(self, weights: Weights, reach: int = 1) -> list[tuple[float, ...]]:
        """What `weights(t, s, ..., schedule)` gives on each interval of the grid: float64 on the CPU, once per run.

        It gets each time with the `reach` times after it, where the grid has so many.
        """
        t = torch.tensor(self.times, dtype=torch.float64)
        columns = weights(*(t[i : len(t) - reach + i] for i in range(reach + 1)), self.denoiser.schedule)
        return list(zip(*(w.tolist() for w in columns), strict=True))

    def x(self, z: Tensor, i: int) -> Tensor:
        """The (guided, clipped) estimate of the clean x from `z` at times[i]."""
        raw = getattr(self.denoiser, "raw", None)
        if raw is None:
            x = self.denoiser(z, self.rows[i], self.cond, self.w)
            return x if self.clip is None else x.clamp(*self.clip)
        output = raw(z, self.rows[i], self.cond, self.w)
        return guided_update(output, z, self.rows[i], None, self.table, self.w, clip=self.clip)

    def update(self, z: Tensor, i: int, kind: Kind, on: tuple[float, ...], noise: Tensor | None = None) -> Tensor:
        """The state at times[i + 1]: a network's raw output goes unopened to kernels.guided_update, which knows `kind`.

        Without one it is on[0] z + on[1] x + on[2] noise, the same to rounding. "renoise" goes by way of times[i + 2].
        """
        raw = getattr(self.denoiser, "raw", None)
        if raw is None:
            moved = torch.add(on[0] * z, self.x(z, i), alpha=on[1])
            return moved if noise is None else moved.add_(noise, alpha=on[2])
        t, s = self.rows[i], self.rows[i + 1]
        jump = self.rows[i + 2] if kind == "renoise" else None
        output = raw(z, t, self.cond, self.w)
        return guided_update(output, z, t, s, self.table, self.w, kind=kind, noise=noise, clip=self.clip, jump=jump)

    def noise(self, i: int) -> Tensor:
        """N(0, I) for update i, shaped like z: from each sample's seed alone, else the global generator."""
        if self.seeds is None:
            return torch.randn_like(self.z)
        return seeded_noise(self.seeds.to(self.z.device), self.z.shape[1:], stream=UPDATE_STREAM + i).to(self.z.dtype)

    def report(self, i: int, z: Tensor) -> Tensor:
        """Tell the callback of update i; returns z."""
        if self.callback is not None:
            self.callback(i, self.times[i + 1], z)
        return z


def prepare(
    denoiser: Denoiser,
    noise: Tensor | None,
    steps: int,
    cond: Cond,
    w: Weight,
    times: Sequence[float] | Tensor | None,
    z: Tensor | None,
    clip: Clip,
    seeds: Tensor | None,
    callback: Callback | None,
    *,
    student: str | None,
) -> Run:
    """Check a sampler's arguments and lay out its grid.

    `student` is the kind of distilled denoiser that the sampler is meant for (None: none).
    Raises ValueError in one line for what cannot work; warns where `denoiser.trained` says otherwise.
    """
    grid = checks.time_grid(steps, times)
    start = checks.start("z", z) if z is not None else checks.start("noise", noise)
    checks.leading("cond", cond, len(start))
    checks.guidance(w, len(start), needed=bool(getattr(denoiser, "takes_guidance", False)))
    checks.clip(clip)
    checks.seeds(seeds, len(start))
    checks.trained(denoiser, grid, w, student)
    if z is None:
        start = start * denoiser.schedule.init_noise_scale
    rows = rows_like(grid, start)
    table = Table(denoiser.schedule, grid, rows)
    return Run(denoiser, cond, w, clip, seeds, callback, grid, rows, table, start)
