"""The CUDA kernels of guided_update, kernel.cu, on tensors."""

from typing import Any

import torch
from torch import Tensor

from fewstep.kernels import build
from fewstep.kernels.backend import on_device_of
from fewstep.kernels.build import address, checked, stream
from fewstep.kernels.guided_update.arguments import Arguments

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def forward(arguments: Arguments, out: Tensor, out_x: Tensor | None) -> None:
    """Write the update, float32, into `out` and, where asked for, the clipped estimate into `out_x`."""
    a = arguments
    with on_device_of(a.z):
        module = build.load("guided_update")
        call = _call(module, a, [a.cond, a.uncond, a.z], a.cond.dtype)
        checked(module.forward(call, address(out), address(out_x)), "guided_update")


def backward(
    arguments: Arguments, grad: Tensor, grad_cond: Tensor, grad_uncond: Tensor | None, grad_z: Tensor | None
) -> None:
    """Write the gradients of the update's product with `grad`, float32, into the given tensors."""
    a = arguments
    with on_device_of(a.z):
        module = build.load("guided_update")
        call = _call(module, a, [a.cond, a.uncond, a.z] if a.clips else [None, None, None], grad_cond.dtype)
        code = module.backward(call, address(grad_cond), address(grad_uncond), address(grad_z))
        checked(code, "guided_update backward")


def _call(module: Any, a: Arguments, read: list[Tensor | None], dtype: torch.dtype) -> Any:
    pointers = [address(x) for x in (*read, a.other, a.weight)]
    return module.Call(
        *pointers, [address(x) for x in a.levels], a.w, a.low, a.high, len(a.z), a.z[0].numel(), DTYPES[dtype],
        a.prediction, a.kind, stream(a.z),
    )  # fmt: skip
