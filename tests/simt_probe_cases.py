"""The emulator's probe against PyTorch; also run under sanitizers, where only the kernels' reports count."""

import torch

from fewstep.kernels import build


def errors() -> tuple[float, float]:
    """Largest errors of row moments and of a product, 0 to rounding; NaN where unset memory was read."""
    g = torch.Generator().manual_seed(0)
    probe = build.load("simt_probe")
    x = torch.randn(3, 300, generator=g) + 5
    mean, variance = torch.full((2, 3), torch.nan)
    assert probe.moments(x.data_ptr(), mean.data_ptr(), variance.data_ptr(), 3, 300) == 0
    expected = torch.stack([x.double().mean(1), x.double().var(1, correction=0)])
    a, b = torch.randn(32, 80, generator=g).bfloat16(), torch.randn(80, 16, generator=g).bfloat16()
    c = torch.full((32, 16), torch.nan)
    assert probe.product(a.data_ptr(), b.data_ptr(), c.data_ptr(), 80) == 0
    pairs = (torch.stack([mean, variance]), expected), (c, a.double() @ b.double())
    return tuple(float((got - exact).abs().max()) for got, exact in pairs)
