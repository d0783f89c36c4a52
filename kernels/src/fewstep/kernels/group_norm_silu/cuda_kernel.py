"""The CUDA kernels of group_norm_silu, kernel.cu, on tensors."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.kernels import build
from fewstep.kernels.backend import layout, on_device_of, tuned
from fewstep.kernels.build import address, checked, stream
from fewstep.kernels.group_norm_silu.plan import ALONE, CHUNK, PROCESSORS, PROGRAMS, groups_together

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HELD, HELD_BY_LARGE = 64 << 10, 136 << 10      # bytes that a program holds; where a chip has 160 KB of shared memory
LARGE = 160 << 10
MOST_CLUSTERED = 8


@dataclass(frozen=True)
class Cut:
    """How a call is cut: groups per program, programs per sample, programs per group and pixels of each, loads."""

    together: int
    blocks: int
    chunks: int
    chunk: int
    wide: bool


@lru_cache(maxsize=4096)
def cut(
    batch: int, channels: int, groups: int, pixels: int, itemsize: int, last: bool, tensors: int, held: int,
    aligned: bool,
) -> Cut:
    """Cut a call: chunks of pixels that a program can hold `tensors` of in `held` bytes, more of them if few programs.

    Loads are 16 bytes wide if tensors start on such bounds (`aligned`) and the sizes keep to them.
    """
    together, size = groups_together(channels, groups, itemsize) if last else 1, channels // groups
    blocks, width = -(-groups // together), 16 // itemsize
    wide = aligned and (channels if last else pixels) % width == 0 and (not last or together * size % width == 0)
    per_pixel = together * size * tensors * (itemsize if wide else 4)
    chunks = -(-pixels * per_pixel // held)
    if batch * blocks < PROCESSORS and pixels * per_pixel > ALONE:
        chunks = max(chunks, min(-(-PROGRAMS // (batch * blocks)), pixels * per_pixel // CHUNK))
    step = width if wide and not last else 1
    chunk = min(pixels, -(-pixels // (chunks * step)) * step)
    return Cut(together, blocks, -(-pixels // chunk), chunk, wide)


def _held(x: Tensor) -> int:
    if not x.is_cuda:
        return HELD
    shared: int = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return HELD_BY_LARGE if shared >= LARGE else HELD


def _cut(x: Tensor, groups: int, tensors: int, *others: Tensor | None) -> Cut:
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (x, *others))
    sizes = len(x), x.shape[1], groups, x[0, 0].numel(), x.element_size()
    return cut(*sizes, layout(x) == "channels_last", tensors, _held(x), aligned)


def _numbers(
    x: Tensor, groups: int, c: Cut, affine: tuple[Tensor | None, ...], act: bool, before: bool
) -> list[int]:
    rows = [0 if p is None else p.stride(0) for p in affine[2:]]
    codes = [DTYPES[x.dtype], *(0 if p is None else DTYPES[p.dtype] for p in affine)]
    sizes = [len(x), x.shape[1], groups, x[0, 0].numel(), *rows, c.together, c.blocks, c.chunks, c.chunk]
    return [*sizes, *codes, c.wide, act, before, layout(x) == "channels_last"]


def _clustered(x: Tensor, groups: int, c: Cut) -> bool:
    """Whether the tuning table names the cluster tier for this call: it has not run before it was measured."""
    return 1 < c.chunks <= MOST_CLUSTERED and bool(tuned("group_norm_silu", x, groups).get("cluster"))


def forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, act: bool, before: bool, y: Tensor, total: Tensor | None,
    mean: Tensor, rstd: Tensor,
) -> None:
    """Write y, mean and rstd (and total = x + residual if `before`), all allocated by the caller."""
    c, affine = _cut(x, groups, 1, residual, y, total), (weight, bias, scale, shift)
    parts = _parts(x, groups, c)
    pointers = (x, residual, *affine, None, None, y, total, None, mean, rstd, None, None, *parts)
    numbers, clustered = _numbers(x, groups, c, affine, act, before), _clustered(x, groups, c)
    with on_device_of(x):
        module = build.load("group_norm_silu")
        code = module.forward([address(t) for t in pointers], numbers, eps, stream(x), clustered)
        checked(code, "group_norm_silu")


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor, act: bool, dx: Tensor,
    parameters: tuple[Tensor | None, ...],
) -> None:
    """Write dx and the gradients of weight, bias, scale and shift, all allocated by the caller."""
    c, affine = _cut(x, groups, 2, dy, dtotal, dx), (weight, bias, scale, shift)
    parts = _parts(x, groups, c)
    a, b = torch.empty((2, len(x), c.chunks, x.shape[1]), dtype=torch.float32, device=x.device)
    pointers = (x, None, *affine, dy, dtotal, None, None, dx, mean, rstd, a, b, *parts)
    numbers, clustered = _numbers(x, groups, c, affine, act, False), _clustered(x, groups, c)
    with on_device_of(x):
        module = build.load("group_norm_silu")
        code = module.backward([address(t) for t in pointers], numbers, 0.0, stream(x), clustered)
        checked(code, "group_norm_silu backward")
        if all(gradient is None for gradient in parameters):
            return
        codes = [0 if p is None else DTYPES[p.dtype] for p in affine]
        sizes = [len(x), x.shape[1], 0 if scale is None else scale.stride(0), c.chunks]
        pointers = (a, b, weight, bias, scale, *parameters)
        code = module.parameters([address(t) for t in pointers], [*sizes, *codes], stream(x))
        checked(code, "group_norm_silu parameter gradients")


def _parts(x: Tensor, groups: int, c: Cut) -> tuple[Tensor | None, Tensor | None]:
    """Where programs of one group leave their statistics for each other, if there are several."""
    if c.chunks == 1:
        return None, None
    one, two = torch.empty((2, len(x), c.chunks, groups), dtype=torch.float32, device=x.device)
    return one, two
