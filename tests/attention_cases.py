"""Attention on chosen sizes: its inputs, what float64 says, how far a kernel and PyTorch's own operator are from it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.kernels import attention
from fewstep.kernels.attention import reference

Attention = Callable[..., tuple[Tensor, Tensor]]
NAMES = ("result", "log-sum-exp", "gradient of q", "gradient of k", "gradient of v")


@dataclass(frozen=True)
class Case:
    """One call: sizes as in `attention`; scores are of `magnitude` around `offset` sqrt(dim); key lengths by sample."""

    batch: int = 1
    heads: int = 2
    queries: int = 33
    keys: int = 77
    dim: int = 64
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    offset: float = 0.0
    lengths: tuple[int, ...] | None = None

    @property
    def key_lengths(self) -> Tensor | None:
        return None if self.lengths is None else torch.tensor(self.lengths)


@dataclass(frozen=True)
class Inputs:
    """q, k, v (B, H, L, D) as projections leave them, (B, L, H, D) in memory, and gradients of both results."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_result: Tensor
    d_lse: Tensor

    def exact(self) -> "Inputs":
        return Inputs(*(x.detach().double().requires_grad_(x.requires_grad) for x in vars(self).values()))


def inputs(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(7 * case.queries + case.keys + case.dim)
    shapes = [(case.batch, n, case.heads, case.dim) for n in (case.queries, case.keys, case.keys, case.queries)]
    q, k, v, d_result = (torch.randn(s, generator=g, dtype=torch.float64).transpose(1, 2) for s in shapes)
    d_lse = torch.randn(q.shape[:3], generator=g)
    q = q * case.magnitude + case.offset
    k = k + (case.offset != 0)
    return Inputs(*(x.to(case.dtype).requires_grad_() for x in (q, k, v)), d_result.to(case.dtype), d_lse)


def results(function: Attention, case: Case, given: Inputs, with_lse: bool = True) -> tuple[Tensor, ...]:
    """Result, log-sum-exp, and gradients of q, k and v, of both results' directions or of the result's alone."""
    result, lse = function(given.q, given.k, given.v, case.dim**-0.5, case.key_lengths)
    outputs, directions = ((result, lse), (given.d_result, given.d_lse)) if with_lse else ((result,), (given.d_result,))
    return result, lse, *torch.autograd.grad(outputs, (given.q, given.k, given.v), directions)


def pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """PyTorch's own operator in the same dtype; it has no log-sum-exp."""
    mask = None if key_lengths is None else reference._key_mask(key_lengths, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale), q.new_zeros(q.shape[:3])


def distance(x: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of the exact values, or over a thousandth each where these vanish."""
    x, exact = x.detach().double(), exact.detach()
    return float((x - exact).norm() / max(float(exact.norm()), 1e-3 * exact.numel() ** 0.5))


def excesses(function: Attention, case: Case) -> list[str]:
    """What of a kernel's results lies beyond its bounds against float64, NaN included; empty if all is well.

    The bounds: 1.5 roundings of a half-precision dtype; in float32, 10 times the largest scores' magnitude, which the
    exponential makes of their roundings; or PyTorch's own error where that is larger (a softmax that picks one key
    leaves differences of nearly equal numbers). And never more than 1.5 times PyTorch's error (at least half a rounding
    of half precision, five of float32).
    """
    given, plain = inputs(case), reference.plain
    found, exact = results(function, case, given), results(plain, case, given.exact())
    theirs = results(pytorch, case, given, with_lse=False)
    their_exact = results(plain, case, given.exact(), with_lse=False)
    faults = []
    for i, name in enumerate(NAMES):
        dtype = torch.float32 if name == "log-sum-exp" else case.dtype
        unit = torch.finfo(dtype).eps / 2
        ours, other = distance(found[i], exact[i]) / unit, distance(theirs[i], their_exact[i]) / unit
        bound = 10 * (1 + case.magnitude) if dtype == torch.float32 else 1.5
        least = 5.0 if dtype == torch.float32 else 0.5
        if not ours <= max(bound, other) or not ours <= 1.5 * max(other, least):
            faults.append(f"{name}: {ours:.2f} roundings off, PyTorch {other:.2f}, bound {bound:.2f}")
    return faults


FAR_BELOW_ZERO = Case(heads=1, queries=17, keys=21, dim=72, dtype=torch.bfloat16, offset=-30.0)


def run() -> list[Tensor]:
    """Results and gradients by the backend in use, over three tiles and a rest on both sides; for sanitizers too."""
    case = Case(batch=2, heads=1, queries=70, keys=210, dim=32, dtype=torch.bfloat16, lengths=(210, 5))
    given = inputs(case)
    result, lse = attention(given.q, given.k, given.v, key_lengths=case.key_lengths, return_lse=True)
    gradients = torch.autograd.grad((result, lse), (given.q, given.k, given.v), (given.d_result, given.d_lse))
    return [result.detach(), lse.detach(), *gradients]
