"""Errors against float64: right code passes, and each kind of wrong code is seen."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.kernels.benchmark import operations
from fewstep.kernels.benchmark.case import BACKWARD, FORWARD, Case, Function
from fewstep.kernels.benchmark.error import compare, worst
from fewstep.kernels.benchmark.operations import all_cases, plain_pytorch
from fewstep.kernels.benchmark.summary import wrong

CPU = torch.device("cpu")
NORM = next(case for case in all_cases("tiny") if case.op == "group_norm_silu")
CASES = [case for case in all_cases("gpu") if not case.timed and case.op != "attention"][::7]
MIXED = [case for case in all_cases("gpu") if not case.timed and case.op == "attention" and case.dtype != "fp16"][::5]


def rows(case: Case, function: Function, poison: bool = True) -> dict[str, dict[str, Any]]:
    found = compare(case, function, CPU, poison=poison)
    return {row["pass"]: row | {"backend": "triton"} for row in found}


@pytest.mark.parametrize("case", CASES + MIXED, ids=lambda case: case.name)
def test_plain_formulas_agree_with_the_reference_in_float64(case: Case) -> None:
    """The oracle of every check on a GPU is the reference in float64: a second derivation must give the same."""
    for row in rows(case, case.eager).values():
        eager_is_right = case.loose == 1.0            # PyTorch's own loses digits where the mean is large
        assert not eager_is_right or row["rel_err"] < 3 * row["limit"]
        assert row["rel_err"] > 0 or case.dtype == "fp32"


def changed(by: Callable[[Tensor], Tensor]) -> Function:
    """The plain formula with its result changed."""
    return lambda *inputs: by(NORM.eager(*inputs))


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one percent": lambda y: 1.01 * y,
    "shifted": lambda y: y.roll(1, 2),
    "tf32": lambda y: y + 3e-4 * y.norm() / y.numel() ** 0.5 * torch.randn_like(y),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_results_are_seen(kind: str) -> None:
    """A check that lets these pass would call any kernel correct."""
    found = rows(NORM, changed(WRONG[kind]))
    assert wrong(found[FORWARD]) is not None


def test_unwritten_memory_is_seen() -> None:
    """A kernel that leaves out the last element gives what lay there, usually the right value of the call before."""
    def forgets(*inputs: Tensor) -> Tensor:
        y = NORM.eager(*inputs)
        assert isinstance(y, Tensor)
        out = torch.empty_like(y)
        out[:, :-1] = y[:, :-1]
        return out + 0 * y

    assert wrong(rows(NORM, forgets)[FORWARD]) is not None
    assert torch.are_deterministic_algorithms_enabled() is False


class HalfGradient(torch.autograd.Function):
    """The identity, whose gradient is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy / 2


def test_a_wrong_gradient_is_seen_and_the_result_still_right() -> None:
    """Backward kernels are separate code: their errors do not show in the forward pass."""
    found = rows(NORM, changed(HalfGradient.apply))
    assert wrong(found[FORWARD]) is None
    assert wrong(found[BACKWARD]) is not None
    assert found[BACKWARD]["rel_err"] == pytest.approx(0.5, rel=1e-3)


def test_results_that_differ_between_runs_are_seen() -> None:
    """Races and atomics change the last bits from run to run."""
    factors = itertools.cycle([1.0, 1 + 1e-6])
    found = rows(NORM, changed(lambda y: y * next(factors)))
    assert found[FORWARD]["rel_err"] <= found[FORWARD]["limit"]
    assert wrong(found[FORWARD]) == "two runs on the same inputs differ"


def test_gradients_of_large_batches_are_compared_per_sample() -> None:
    """Only the first samples are computed in float64; the others' gradients of shared weights must not be mixed in."""
    case = next(case for case in all_cases("gpu") if case.shape.startswith("edge/pixel") and "film" in case.shape)
    assert len(case.inputs(CPU, 0)[0]) == 3                        # more than what is compared
    assert all(wrong(row) is None for row in rows(case, case.ours).values())


def test_not_a_number_is_the_worst() -> None:
    """`max` drops a NaN that does not come first."""
    assert worst([1.0, float("nan"), 2.0]) != worst([1.0, float("nan"), 2.0])
    assert worst([1.0, 3.0, 2.0]) == 3.0


def test_plain_operators_stand_in_for_the_reference_and_go_again() -> None:
    """End-to-end figures are against PyTorch's own operators; if these stayed, all later results would be theirs."""
    x, weight = torch.randn(1, 4, 2, 2, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    call = operations.group_norm_silu.group_norm_silu
    ours = call(x, 2, weight, weight)
    with plain_pytorch():
        theirs = call(x, 2, weight, weight)
    assert torch.equal(theirs, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2, weight, weight)))
    assert torch.equal(call(x, 2, weight, weight), ours)
    with pytest.raises(ZeroDivisionError), plain_pytorch():
        raise ZeroDivisionError
    assert torch.equal(call(x, 2, weight, weight), ours)
