"""One operation on one shape: how its inputs are drawn, what computes it, the least that it must move and multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD, BACKWARD = "forward", "backward"
SIZES = ("tiny", "cpu", "gpu")  # of the lists of cases: a dry run, a processor, a GPU

Inputs = tuple[Tensor, ...]
Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class Cost:
    """What a pass cannot do without: bytes to and from memory, floating-point operations of matrix products, and which
    bound the bytes are, in a word ("one read", "two reads").
    """

    bytes: int
    flops: int = 0
    bound: str = "one read"


@dataclass(frozen=True)
class Case:
    """One operation on one shape, dtype and layout.

    Attributes:
        op, shape, dtype, layout: in words, as rows of results carry them.
        draw: fresh random inputs from a generator, on its device; the first `samples` of them have leading dimension B.
            All of floating point are differentiated in the backward pass.
        ours: the public function on such inputs.
        eager: what a user of PyTorch would write.
        costs: of "forward", and of "backward" where it is measured.
        rivals: other operators of PyTorch by name.
        compiled: whether `torch.compile` of `eager` is a rival.
        timed: else it is there for its correctness alone.
        variants: settings of our backends that "auto" does not take by itself, by name: contexts to run `ours` in. On a
            GPU of compute capability 9.0 alone.
        loose: how many times the usual rounding error it may have (inputs whose mean is far from 0).
    """

    op: str
    shape: str
    dtype: str
    layout: str
    draw: Callable[[torch.Generator], Inputs]
    samples: int
    ours: Function
    eager: Function
    costs: Mapping[str, Cost]
    rivals: Mapping[str, Function] = field(default_factory=dict)
    variants: Mapping[str, Callable[[], AbstractContextManager[object]]] = field(default_factory=dict)
    compiled: bool = True
    timed: bool = True
    loose: float = 1.0

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.op} {self.shape} {self.dtype} {self.layout}"

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        """Inputs of that seed, float ones with requires_grad where the backward pass is measured."""
        generator = torch.Generator(device).manual_seed(seed)
        differentiate = BACKWARD in self.costs
        return tuple(x.requires_grad_(differentiate and x.is_floating_point()) for x in self.draw(generator))


def normal(generator: torch.Generator, *shape: int, dtype: str = "fp32", mean: float = 0.0, std: float = 1.0) -> Tensor:
    """N(mean, std^2) on the generator's device."""
    x = torch.randn(shape, generator=generator, device=generator.device)
    return x.mul_(std).add_(mean).to(DTYPES[dtype])


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One output or several, as several."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def differentiable(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Those that require a gradient."""
    return [x for x in tensors if x.requires_grad]


def gradients(outputs: Outputs, inputs: Inputs, directions: list[Tensor]) -> tuple[Tensor, ...]:
    """Derivatives of sum(direction * output) by every differentiable input; the graph is kept, to be walked again."""
    return torch.autograd.grad(
        differentiable(as_tuple(outputs)), differentiable(inputs), directions, retain_graph=True
    )


def directions_like(outputs: Outputs, seed: int) -> list[Tensor]:
    """A random direction N(0, 1) for every differentiable output, laid out like it."""
    found = []
    for i, y in enumerate(differentiable(as_tuple(outputs))):
        generator = torch.Generator(y.device).manual_seed(seed + i)
        found.append(torch.empty_like(y, requires_grad=False).copy_(
            torch.randn(y.shape, generator=generator, device=y.device)
        ))
    return found
