"""Cases of group_norm_silu that fused backends are held to: inputs, float64 results and how far off one may be."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.kernels import group_norm_silu
from fewstep.kernels.group_norm_silu import cuda_kernel, plan, reference, triton_kernel

NAMES = ("x", "weight", "bias", "scale", "shift", "residual")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
UNITS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALL_TILES = {"RESIDENT": {False: 32, True: 32}, "TILE": 128}
TIERS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": SMALL_TILES | {"ALONE": 1 << 40},
    "two_phase": SMALL_TILES | {"ALONE": 0, "STREAMED": 1 << 12, "CHUNK": 128, "PROCESSORS": 1 << 20, "PROGRAMS": 12},
}


@dataclass(frozen=True)
class Case:
    """A call, `mean` standard deviations from zero."""

    shape: tuple[int, ...] = (2, 10, 7, 5)
    groups: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    film: bool = True
    residual: str | None = None
    act: str | None = "silu"
    mean: float = 0.5


@contextmanager
def tier(name: str) -> Iterator[None]:
    """Have the planner choose a tier for tensors of a few hundred elements."""
    kept = {key: getattr(plan, key) for key in TIERS[name]}
    try:
        vars(plan).update(TIERS[name])
        triton_kernel._planned.cache_clear()
        yield
    finally:
        vars(plan).update(kept)
        triton_kernel._planned.cache_clear()


def inputs(case: Case, seed: int = 1) -> dict[str, Tensor | None]:
    """Random leaves in the case's dtype and layout, None where the case has none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (case.shape, case.shape[1:2], case.shape[1:2], case.shape[:2], case.shape[:2], case.shape)
    values = dict(zip(NAMES, (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes), strict=True))
    values["x"] = 2 * (values["x"] + case.mean)
    absent = ("scale", "shift") * (not case.film) + ("residual",) * (case.residual is None)
    return {
        name: None if name in absent else laid(v.to(case.dtype), case.layout).requires_grad_()
        for name, v in values.items()
    }


def laid(value: Tensor, layout: str) -> Tensor:
    return value.contiguous(memory_format=LAYOUTS[layout]) if value.ndim == 4 else value


def results(function: Any, case: Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """y, x + residual if returned, and the gradient of every input, for random gradients of both results."""
    x, weight, bias, scale, shift, residual = (given[name] for name in NAMES)
    out = function(
        x, case.groups, weight, bias, 1e-5, scale, shift, residual, case.act, case.residual or "after"
    )
    found = dict(zip(("y", "total"), out if isinstance(out, tuple) else (out,), strict=False))
    generator = torch.Generator().manual_seed(99)
    pulled = [torch.randn(case.shape, generator=generator, dtype=torch.float64).to(case.dtype) for _ in found]
    wanted = {name: v for name, v in given.items() if v is not None}
    pulled = [laid(g, case.layout).to(v) for g, v in zip(pulled, found.values(), strict=True)]
    gradients = torch.autograd.grad(tuple(found.values()), tuple(wanted.values()), pulled)
    return found | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def error(value: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact values."""
    return float((value.detach().double() - exact.detach()).norm() / exact.detach().norm())


def excesses(function: Any, case: Case) -> list[str]:
    """What of a fused backend's results lies beyond its bounds against float64; empty if all is well.

    The bounds: a rounding of the dtype and 12 of the arithmetic's (float32), however large the mean, unless the exact
    result is a difference of nearly equal numbers, so that PyTorch's own operators do not reach that either; and 1.5
    times PyTorch's error in the same dtype, plus a rounding of the dtype and 4 of the arithmetic's.
    """
    given = inputs(case)
    exact = results(reference.group_norm_silu, case, {k: _double(v) for k, v in given.items()})
    contiguous = replace(case, layout="contiguous")              # where the reference is PyTorch's operator as it is
    plain = results(reference.group_norm_silu, contiguous, {k: _leaf(v) for k, v in given.items()})
    fused = results(function, case, given)
    unit, found = UNITS[case.dtype], []
    arithmetic = min(unit, UNITS[torch.float32])
    for name, value in fused.items():
        assert value.dtype == plain[name].dtype
        ours, theirs = error(value, exact[name]), error(plain[name], exact[name])
        bound = unit + 12 * arithmetic if case.mean > 1 else max(unit + 12 * arithmetic, theirs)
        bound = min(bound, 1.5 * theirs + unit + 4 * arithmetic)
        if not ours <= bound:
            found.append(f"{name}: {ours:.2e}, PyTorch {theirs:.2e}, bound {bound:.2e}")
        if value.ndim == 4 and not value.is_contiguous(memory_format=LAYOUTS[case.layout]):
            found.append(f"{name}: strides {value.stride()} are not {case.layout}")
    return found


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double().contiguous().requires_grad_()


def _leaf(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().contiguous().clone().requires_grad_()


@contextmanager
def cuda_tier(name: str) -> Iterator[None]:
    """Have the CUDA kernels take one program per group ("one"), or several that hold a kilobyte each ("two_phase")."""
    wanted = {"PROCESSORS": 0} if name == "one" else {"HELD": 1024}
    kept = {key: getattr(cuda_kernel, key) for key in wanted}
    try:
        vars(cuda_kernel).update(wanted)
        cuda_kernel.cut.cache_clear()
        yield
    finally:
        vars(cuda_kernel).update(kept)
        cuda_kernel.cut.cache_clear()


def run() -> list[Tensor]:
    """Every kernel once, on the chosen backend: both tiers and layouts, vectors and single elements, all inputs."""

    def call(x: Tensor, *args: Any) -> Any:
        *rest, act, residual_at = args
        return group_norm_silu(x, *rest, act=act, residual_at=residual_at)

    found: list[Tensor] = []
    for name in ("one", "two_phase"):
        with cuda_tier(name):
            for layout in LAYOUTS:
                for case in (Case(layout=layout), Case((1, 16, 8, 4), 2, torch.bfloat16, layout, residual="before")):
                    found += results(call, case, inputs(case)).values()
    return found
