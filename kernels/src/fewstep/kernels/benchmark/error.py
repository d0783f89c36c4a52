"""How far a backend is from float64 on one case, whether it writes all of its result, and the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fewstep.kernels import use_backend
from fewstep.kernels.benchmark.case import (
    BACKWARD,
    FORWARD,
    Case,
    Function,
    Inputs,
    as_tuple,
    differentiable,
    directions_like,
    gradients,
)

SEED = 20_221_003
SAMPLES = 2  # of a batch, compared in float64: the others are computed alike, and float64 is slow and large
LARGE = 10**11  # operations of a sample whose float64 scores alone fill gigabytes: one is compared
# Bounds on the relative error, above what one rounding of every result gives and below what a wrong formula or a
# product in too few digits (tf32: 3e-4) does.
LIMITS = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 2e-5}


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, memory that is handed out uninitialised holds NaN, so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)   # with this, torch.empty fills (its default)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| over all elements; NaN if any of `found` is."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-300))


def compare(case: Case, function: Function, device: torch.device, *, poison: bool) -> Iterator[dict[str, Any]]:
    """One row per pass: `rel_err` against float64 (the worst result), its `limit`, whether two runs gave the same bits.

    Forward: results for the first samples. Backward: gradients of what belongs to those samples, and all gradients
    where the batch is no larger.
    """
    inputs = case.inputs(device, SEED)
    with poisoned() if poison else nullcontext():
        found, directions = _results(case, function, inputs)
        again, _ = _results(case, function, inputs)
    exact = _exact(case, inputs, directions)
    for name in case.costs:
        errors = [relative(a[: len(b)], b) for a, b in zip(found[name], exact[name], strict=False)]
        yield {
            "pass": name,
            "rel_err": worst(errors),
            "limit": LIMITS[case.dtype] * (case.loose if case.dtype == "fp32" else 1.0),
            "same_bits": all(torch.equal(a, b) for a, b in zip(found[name], again[name], strict=True)),
        }


def worst(errors: list[float]) -> float:
    """The largest; NaN if any is (which `max` may drop)."""
    return next((e for e in errors if e != e), max(errors))


def _results(case: Case, function: Function, inputs: Inputs) -> tuple[dict[str, tuple[Tensor, ...]], list[Tensor]]:
    """What each pass gives, and the directions along which the backward pass went: functions of the seed alone."""
    outputs = function(*inputs)
    found = {FORWARD: tuple(y.detach() for y in as_tuple(outputs))}
    if BACKWARD not in case.costs:
        return found, []
    directions = directions_like(outputs, SEED)
    return found | {BACKWARD: gradients(outputs, inputs, directions)}, directions


def samples(case: Case, inputs: Inputs) -> int:
    """How many samples of a batch are compared."""
    return 1 if case.costs[FORWARD].flops > LARGE * len(inputs[0]) else SAMPLES


def _exact(case: Case, inputs: Inputs, directions: list[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """The same in float64 by the reference, for the first samples.

    Gradients of what all samples share come last; they are left out where there are more samples than that.
    """
    count = samples(case, inputs)
    few = [x[:count] if i < case.samples else x for i, x in enumerate(inputs)]
    wide = tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in few
    )
    with use_backend("reference"):
        outputs = case.ours(*wide)
    found = {FORWARD: tuple(y.detach() for y in as_tuple(outputs))}
    if BACKWARD not in case.costs:
        return found
    grads = gradients(outputs, wide, [d[:count].double() for d in directions])
    shared = len(differentiable(inputs[case.samples :])) if len(inputs[0]) > count else 0
    return found | {BACKWARD: grads[: len(grads) - shared]}
