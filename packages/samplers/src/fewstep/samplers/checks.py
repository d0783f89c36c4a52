"""Bad input to a sampler: a one-line ValueError before compute, or a warning where a denoiser was trained otherwise."""

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.schedules import Cond, Denoiser, Schedule, Trained

ON_GRID = 1e-4  # share of a step by which a time may miss a student's grid: rounding, not another grid
UP, DOWN = "increase strictly, from data (0) to noise (1)", "decrease strictly, from noise (1) to data (0)"
SLACK = 1e-6  # relative: float32(0.3) is not outside a range that ends at 0.3


def time_grid(steps: int, times: Sequence[float] | Tensor | None, *, rising: bool = False) -> tuple[float, ...]:
    """steps + 1 decreasing values within [0, 1]; uniform from 1 to 0 unless given. `rising`: from 0 to 1 instead."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}: must be an integer of at least 1")
    if times is None:
        return tuple((i if rising else steps - i) / steps for i in range(steps + 1))
    grid = tuple(float(t) for t in (times.tolist() if isinstance(times, Tensor) else times))
    if len(grid) != steps + 1:
        raise ValueError(f"times has {len(grid)} values: {steps} steps need {steps + 1}")
    if not all(0.0 <= t <= 1.0 for t in grid):
        raise ValueError(f"times = {_short(grid)}: each must lie in [0, 1] (0 = data, 1 = noise)")
    if not all((s > t) if rising else (t > s) for t, s in pairwise(grid)):
        raise ValueError(f"times = {_short(grid)}: must {UP if rising else DOWN}")
    return grid


def start(name: str, z: Tensor | None) -> Tensor:
    """The tensor that a run starts from: (B, ...) of float32 or float64, all finite."""
    if z is None:
        raise ValueError("noise is None: give noise of shape (B, ...), or the state z at times[0]")
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} has dtype {z.dtype}: must be float32 or float64 (autocast the network instead)")
    if z.ndim < 2 or len(z) == 0:
        raise ValueError(f"{name} has shape {tuple(z.shape)}: must be (B, ...) with B of at least 1")
    if not bool(torch.isfinite(z).all()):
        raise ValueError(f"{name} holds NaN or infinite values: must be finite")
    return z


def leading(name: str, cond: Cond, batch: int) -> None:
    """Every tensor of `cond` has the batch as its leading dimension."""
    if cond is None:
        return
    for key, value in cond.items() if isinstance(cond, Mapping) else ((None, cond),):
        label = name if key is None else f"{name}[{key!r}]"
        if not isinstance(value, Tensor):
            raise ValueError(f"{label} is a {type(value).__name__}: must be a tensor with leading dimension {batch}")
        if value.ndim == 0 or len(value) != batch:
            raise ValueError(f"{label} has shape {tuple(value.shape)}: its first dimension must be the batch, {batch}")


def guidance(w: float | Tensor | None, batch: int, *, needed: bool = False) -> None:
    """A guidance weight: None (unless the denoiser takes it as an input), a number >= 0, or (B,) of them."""
    if w is None and needed:
        raise ValueError("w is None: this denoiser takes the guidance weight as an input (w = 0 is no guidance)")
    if isinstance(w, Tensor) and w.shape != (batch,):
        raise ValueError(f"w has shape {tuple(w.shape)}: must be a number or have shape ({batch},)")
    low, high = _extent(w)
    if not 0.0 <= low <= high < math.inf:
        raise ValueError(f"w = {low if low < 0 else high:g}: must be finite and >= 0 (scale is 1 + w)")


def schedules(first: str, a: Schedule, second: str, b: Schedule) -> None:
    """Two denoisers of one run have one schedule."""
    if a != b:
        raise ValueError(f"{first} has schedule {a}, {second} {b}: use fewstep.schedules.reschedule")


def pair(x: Tensor, noise: Tensor) -> None:
    """Images and the noise for them: both as `start` wants them, and of one shape."""
    start("x", x)
    start("noise", noise)
    if noise.shape != x.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}: must be that of x, {tuple(x.shape)}")


def part(steps: int, strength: float) -> int:
    """How many of `steps` a strength in [0, 1] leaves, rounded down; at least one."""
    time_grid(steps, None)
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength = {strength}: must lie in [0, 1] (1 starts from pure noise)")
    left = math.floor(strength * steps + ON_GRID)
    if left < 1:
        raise ValueError(f"strength = {strength:g} of {steps} steps leaves no whole step: must be at least 1/{steps}")
    return left


def mask(values: Tensor, x: Tensor) -> Tensor:
    """A binary mask that covers x, as booleans; its batch and channels may be 1."""
    sizes, want = tuple(values.shape), tuple(x.shape)
    fits = len(sizes) == len(want) and all(a in (1, b) for a, b in zip(sizes[:2], want[:2], strict=False))
    if not fits or sizes[2:] != want[2:]:
        raise ValueError(f"mask has shape {sizes}: must be (B or 1, C or 1, ...) for x of shape {want}")
    chosen = values.to(torch.bool)
    if not bool((chosen == values).all()):
        raise ValueError("mask is not binary: must be 1 where x is painted anew and 0 where it is kept")
    return chosen


def clip(bounds: tuple[float, float] | None) -> None:
    """Clipping bounds for x: None or (low, high)."""
    if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
        raise ValueError(f"clip = {bounds!r}: must be None or (low, high) with low < high")


def seeds(values: Tensor | None, batch: int) -> None:
    """One int64 seed per sample."""
    if values is not None and (values.shape != (batch,) or values.dtype != torch.int64):
        raise ValueError(f"seeds has shape {tuple(values.shape)}, {values.dtype}: must be ({batch},) of torch.int64")


def trained(denoiser: Denoiser, times: Sequence[float], w: float | Tensor | None, student: str | None) -> None:
    """Warn where steps, sampler or w are not what `denoiser.trained` says the denoiser was trained for."""
    record: Trained | None = getattr(denoiser, "trained", None)
    if record is None:
        return
    if record.kind not in ("teacher", "guided", student):
        _warn(f"denoiser was trained as {record.kind!r}: this sampler is for {student or 'undistilled'!r} ones")
    if record.steps is not None and not _walks_grid(times, record.steps):
        _warn(
            f"denoiser was trained for {record.steps} steps (times i/{record.steps}, intervals of 1/{record.steps}): "
            f"this run takes {len(times) - 1} steps through {_short(times)}"
        )
    if record.w_range is not None and w is not None:
        (low, high), (least, most) = record.w_range, _extent(w)
        slack = SLACK * max(1.0, abs(high))
        if least < low - slack or most > high + slack:
            asked = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            _warn(f"w = {asked} lies outside the range [{low:g}, {high:g}] that the denoiser was trained for")


def _walks_grid(times: Sequence[float], steps: int) -> bool:
    """Whether each interval, run either way, is one of the grid i / steps (an edit may start at any of its times)."""
    places = [t * steps for t in times]
    return all(
        abs(a - round(a)) < ON_GRID and abs(abs(a - b) - 1) < ON_GRID for a, b in pairwise(places)
    )


def _extent(w: float | Tensor | None) -> tuple[float, float]:
    """Least and greatest w (one transfer for a tensor); NaN comes out as NaN."""
    if w is None:
        return 0.0, 0.0
    if isinstance(w, Tensor):
        least, most = torch.stack(torch.aminmax(w.detach().float())).tolist()
        return least, most
    return float(w), float(w)


def _short(times: Sequence[float]) -> str:
    """A grid in a line: all of it, or its ends."""
    shown = [f"{t:.4g}" for t in times]
    return "[" + ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]]) + "]"


def _warn(message: str) -> None:
    """A warning at the line that called the package, however many of its functions and torch's wrappers lie between."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("fewstep.samplers", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
