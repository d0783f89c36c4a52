"""Noise that is a function of each sample's seed alone: Philox4x32-10 (Salmon et al., SC 2011) in integer tensor ops.

Batch size, sharding and the order of calls never change a bit. Floating point uses only +, -, *, / and a square root
rounded as IEEE 754 says: library logarithms and cosines may differ in the last bit between the vector body and the tail
of a loop, and between devices. For the same reason torch.compile, which may contract a * b + c, leaves these alone.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_F = TypeVar("_F", bound=Callable[..., Tensor])
_UNIFORM, _NORMAL = 0, 1                                          # last counter word: which distribution is drawn


def _eager(function: _F) -> _F:
    """`torch.compiler.disable`, but not before there is a compiler: importing it takes as long as the rest of torch."""
    disabled: list[Callable[..., Tensor]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Tensor:
        if not disabled and "torch._dynamo" in sys.modules:       # nothing can be tracing without it
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]  # torch has no types here
        return (disabled[0] if disabled else function)(*arguments, **options)

    return cast(_F, call)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four output words of Philox4x32-10. All tensors int64 holding unsigned 32-bit words, broadcastable."""
    c0, c1, c2, c3, k0, k1 = torch.broadcast_tensors(*counter, *key)  # type: ignore[no-untyped-call]  # torch's
    even, odd, keys = torch.stack([c0, c2]), torch.stack([c1, c3]), torch.stack([k0, k1])
    multiplier, weyl = (even.new_tensor(pair).reshape(2, *[1] * c0.ndim) for pair in (_MULTIPLIERS, _WEYL))
    for i in range(10):
        product = (even * multiplier).flip(0)                     # modulo 2^64: overflow wraps, bits are right
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(keys + i * weyl).bitwise_and_(_MASK)
        odd = product                                             # its upper half is masked away with even's
    odd = odd & _MASK
    return even[0], odd[0], even[1], odd[1]


def _words(seeds: Tensor, count: int, stream: int, distribution: int) -> Tensor:
    """Return (B, count rounded up to 4) random 32-bit words, int64."""
    if seeds.ndim != 1 or seeds.is_floating_point():
        raise ValueError(f"seeds must be (B,) int64, got {tuple(seeds.shape)} {seeds.dtype}")
    if not 0 <= stream <= _MASK:
        raise ValueError(f"stream={stream} must be an integer in [0, 2^32)")
    seeds = seeds.long()[:, None]
    block = torch.arange(-(-count // 4), device=seeds.device)[None]
    words = philox(
        (block, torch.full_like(block, stream), torch.full_like(block, distribution), torch.zeros_like(block)),
        (seeds & _MASK, (seeds >> 32) & _MASK),
    )
    return torch.stack(words, dim=-1).flatten(1)


def _polynomial(x: Tensor, *coefficients: float) -> Tensor:
    """Horner's rule, constant first."""
    y = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = y * x + c
    return y


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive, normal float32 to about 2 ulp: x = 2^k m, log m = 2 atanh((m - 1) / (m + 1))."""
    bits = x.view(torch.int32) - 0x3F3504F3                       # the bits of sqrt(1/2): m in [sqrt(1/2), sqrt(2))
    k = (bits >> 23).float()
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
    s = (m - 1) / (m + 1)
    return k * math.log(2) + 2 * s * _polynomial(s * s, 1, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11)


def _sqrt(x: Tensor) -> Tensor:
    """Square root of float32 as IEEE 754 rounds it: MKL's, which torch takes on some CPUs, is off by one bit at times.

    Rounded once more from float64 it is right whatever the last bits there: no root of 24 bits comes so near a tie.
    """
    return x.double().sqrt().float()


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi word / 2^32: quadrant exactly, then Taylor within +-pi / 4."""
    quadrant = ((word + 2**29) >> 30) & 3
    angle = (((word + 2**29) & (2**30 - 1)) - 2**29).float() * (math.pi / 2**31)
    square = angle * angle
    cos = _polynomial(square, *[(-1) ** n / math.factorial(2 * n) for n in range(6)])
    sin = angle * _polynomial(square, *[(-1) ** n / math.factorial(2 * n + 1) for n in range(6)])
    sign = 1 - (quadrant & 2).float()
    odd = (quadrant & 1).bool()
    return sign * torch.where(odd, -sin, cos), sign * torch.where(odd, cos, sin)


@_eager
def seeded_noise(seeds: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Draw N(0, 1) by Box and Muller, for each sample from its own seed.

    Shape: seeds (B,) int64 -> (B, *shape) float32, on seeds' device, within about +-6.8.

    Args:
        seeds: one per sample, see `sample_seeds`.
        shape: of one sample.
        stream: draws with different streams are independent; so are noise and uniform of one stream.

    Raises:
        ValueError: if seeds are not a row of integers or stream is not in [0, 2^32).
    """
    count = math.prod(shape)
    words = _words(seeds, count, stream, _NORMAL)
    first, second = words[:, 0::2], words[:, 1::2]
    radius = _sqrt(-2 * _log((first.float() + 0.5) * 2.0**-32))
    cos, sin = _cos_sin(second)
    return torch.stack([radius * cos, radius * sin], dim=-1).flatten(1)[:, :count].reshape(len(seeds), *shape)


@_eager
def seeded_uniform(seeds: Tensor, shape: Sequence[int] = (), *, stream: int = 0) -> Tensor:
    """Draw from U[0, 1), multiples of 2^-24, for each sample from its own seed.

    Shape: seeds (B,) int64 -> (B, *shape) float32, on seeds' device. Arguments and errors as `seeded_noise`.
    """
    count = math.prod(shape)
    words = _words(seeds, count, stream, _UNIFORM)
    return ((words >> 8).float() * 2.0**-24)[:, :count].reshape(len(seeds), *shape)


@_eager
def sample_seeds(run_seed: int, update: int, indices: Tensor) -> Tensor:
    """Return each sample's seed, a hash of (run seed, update, global sample index): the same from 1 or 64 processes.

    Shape: indices (B,) integers -> (B,) int64, not negative.
    """
    indices = indices.long()
    low, high = indices & _MASK, (indices >> 32) & _MASK
    words = [torch.full_like(indices, value >> shift & _MASK) for value in (update, run_seed) for shift in (0, 32)]
    first, second, _, _ = philox((low, high, words[0], words[1]), (words[2], words[3]))
    return first | (second & 0x7FFFFFFF) << 32
