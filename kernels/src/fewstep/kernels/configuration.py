"""One compiled variant of a Triton kernel, named before it runs: what launches it and what compiles it ahead of time.

Each `triton_kernel.py` has a function `configurations() -> Iterator[Configuration]` that yields every variant which
its operation can launch (dtypes, layouts, tile sizes, options), from the same code that picks one at run time. Tests
compile all of them for every architecture and look at registers, stack and instructions; nothing else may be launched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.kernels.backend import on_device_of

ARCHITECTURES = (80, 89, 90, 100)


@dataclass(frozen=True)
class Configuration:
    """A Triton kernel with all that its compiler needs, and its launch.

    Fields:
        name: unique within the operation, for messages: "forward one_pass bfloat16 8192".
        kernel: the function decorated by `triton.jit`.
        signature: type of every run-time argument by name, in the order of the kernel's parameters: "*bf16", "*fp16",
            "*fp32", "*i32", "*i64" for pointers, "i32", "i64", "fp32" for numbers. A pointer that this variant does not
            have is left out here and stands in `constants` as None.
        constants: value of every `tl.constexpr` parameter by name, and None for absent pointers.
        num_warps, num_stages, maxnreg: Triton's compile options.
        divisible: names of integer arguments that are divisible by 16 in the shapes this kernel is tuned for; compiled
            ahead as Triton's launcher would for such values. Pointers always count as divisible.
        architectures: for which it may be launched, as 10 major + minor.
        wgmma: on sm_90 the machine code must hold HGMMA instructions.
        vector_loads: the machine code must hold 128-bit global loads or asynchronous copies.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    divisible: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES
    wgmma: bool = False
    vector_loads: bool = True

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        """Run the kernel on a grid of programs, on the device of its first tensor; `args` as in `signature`."""
        options = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        with on_device_of(*args):
            self.kernel[grid](
                **dict(zip(self.signature, args, strict=True)), **self.constants,
                num_warps=self.num_warps, num_stages=self.num_stages, **options,
            )
