"""Seeded noise: known answers of the generator's authors, statistics, and bits that never depend on the batch."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fewstep.schedules import sample_seeds, seeded_noise, seeded_uniform
from fewstep.schedules.noise import _sqrt, philox

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
GOLDEN = ["3f88a6cb", "bed9c6b5", "c0178cdf", "be6d0d85"]         # 1.0676, -0.4254, -2.3680, -0.2315
CHECKSUM = -99663821463186017     # of the same formulas in numpy, whose roots are IEEE 754's


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_its_authors_answers(counter: str, key: str, answer: str) -> None:
    """A wrong constant, round count or overflow still looks random; only known answers tell."""
    c0, c1, c2, c3 = (torch.tensor([int(w, 16)]) for w in counter.split())
    k0, k1 = (torch.tensor([int(w, 16)]) for w in key.split())
    assert [f"{word.item():08x}" for word in philox((c0, c1, c2, c3), (k0, k1))] == answer.split()


def test_noise_is_normal() -> None:
    """Moments, the whole distribution and the tails; a wrong angle or radius shows in one of them."""
    noise = seeded_noise(sample_seeds(1, 0, torch.arange(4000)), (50,)).double().flatten().numpy()
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.size)
    assert abs(stats.kurtosis(noise)) < 4 * math.sqrt(24 / noise.size)
    assert abs(stats.skew(noise)) < 4 * math.sqrt(6 / noise.size)
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    beyond = (abs(noise) > 3).mean()
    assert abs(beyond / (2 * stats.norm.sf(3)) - 1) < 0.15


def test_uniform_is_uniform_and_never_one() -> None:
    u = seeded_uniform(sample_seeds(2, 0, torch.arange(4000)), (50,))
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.double().flatten().numpy(), "uniform").pvalue > 1e-3


def test_box_muller_equals_numpys_functions() -> None:
    """The logarithm, sine and cosine are polynomials of our own: compare with numpy's in float64, all words alike."""
    seeds = sample_seeds(3, 0, torch.arange(500))
    lanes, block = seeded_noise(seeds, (8,)).double().numpy(), torch.arange(2)[None]
    key = seeds[:, None]
    zero = torch.zeros_like(block)
    words = philox((block, zero, zero + 1, zero), (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))
    first, second = (np.stack([words[i].numpy(), words[i + 2].numpy()], -1).reshape(500, -1) for i in (0, 1))
    radius, angle = np.sqrt(-2 * np.log((first + 0.5) / 2**32)), 2 * np.pi * second / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(500, -1)
    assert abs(lanes - expected).max() < 3e-6


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 8, 8), (3, 5, 7)])
def test_bits_do_not_depend_on_batch_order_or_threads(shape: tuple[int, ...]) -> None:
    """One bit of difference between 1 and 64 processes and 'the same images' is no longer true."""
    seeds = sample_seeds(7, 3, torch.arange(67))
    for draw in (seeded_noise, seeded_uniform):
        together = draw(seeds, shape)
        assert together.shape == (67, *shape)
        assert torch.equal(torch.cat([draw(seeds[i:i + 1], shape) for i in range(67)]), together)
        assert torch.equal(torch.cat([draw(part, shape) for part in seeds.split(13)]), together)
        assert torch.equal(draw(seeds.flip(0), shape).flip(0), together)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        assert torch.equal(draw(seeds.repeat(50), shape)[:67], together)
        torch.set_num_threads(threads)


def test_roots_are_rounded_as_ieee_754_says() -> None:
    """torch.sqrt is not, where it takes MKL's: noise of one seed then depends on the maker of the CPU."""
    x = 40 * torch.rand(200_000)
    assert torch.equal(_sqrt(x), torch.from_numpy(np.sqrt(x.numpy())))


def test_bits_are_these_on_every_machine() -> None:
    """Runs are resumed and compared across machines: the first draws of seed 0, to the bit."""
    noise = seeded_noise(torch.tensor([0]), (4,))
    assert [f"{v & 0xFFFFFFFF:08x}" for v in noise.view(torch.int32)[0].tolist()] == GOLDEN
    many = seeded_noise(sample_seeds(0, 0, torch.arange(1000)), (100,)).view(torch.int32).long()
    assert (many * torch.arange(1, 100001).view(1000, 100)).sum().item() == CHECKSUM


def test_streams_seeds_and_kinds_are_independent() -> None:
    """t, w and noise are drawn from one seed; correlated draws would tie the noise level to the image's noise."""
    seeds = sample_seeds(5, 1, torch.arange(20000))
    radius = seeded_noise(seeds, (2,)).square().sum(1)            # of the first word alone: exp(-radius / 2)
    draws = torch.stack([
        (-radius / 2).exp() - 0.5,
        seeded_noise(seeds, (2,), stream=0)[:, 0], seeded_noise(seeds, (2,), stream=0)[:, 1],
        seeded_noise(seeds, (), stream=1), seeded_noise(seeds, (), stream=2**32 - 1),
        seeded_uniform(seeds) - 0.5, seeded_uniform(seeds, stream=1) - 0.5, seeded_noise(seeds.roll(1), ()),
    ])
    correlation = torch.corrcoef(draws)
    assert (correlation - torch.eye(len(draws))).abs().max() < 4.5 / math.sqrt(20000)


def test_seeds_depend_on_all_three_and_do_not_collide() -> None:
    """Equal seeds for two samples or two updates would repeat noise and times."""
    index = torch.arange(50000)
    every = torch.cat([sample_seeds(run, update, index) for run, update in ((0, 0), (0, 1), (1, 0), (2**40, 2**33))])
    assert len(every.unique()) == len(every)
    assert every.min() >= 0
    assert every.dtype == torch.int64
    assert torch.equal(sample_seeds(0, 1, index[17:20]), sample_seeds(0, 1, index)[17:20])
    assert torch.equal(sample_seeds(-1, 0, index), sample_seeds(-1, 0, index.int()))
    bits = (every[:, None] >> torch.arange(63)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(every))


def test_consecutive_raw_seeds_are_independent() -> None:
    """Users pass 0, 1, 2, ...: the key must be mixed well enough for that."""
    noise = seeded_noise(torch.arange(20000), (1,))[:, 0]
    assert abs(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1]) < 4 / math.sqrt(20000)
    assert stats.kstest(noise.double().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(("seeds", "stream", "message"), [
    (torch.zeros(2, 2, dtype=torch.int64), 0, r"seeds must be \(B,\) int64, got \(2, 2\)"),
    (torch.zeros(2), 0, "got .* torch.float32"),
    (torch.zeros(2, dtype=torch.int64), -1, "stream=-1 must be"),
])
def test_bad_seeds_are_named(seeds: torch.Tensor, stream: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seeded_noise(seeds, (3,), stream=stream)


def test_compiled_code_leaves_the_noise_to_eager_torch() -> None:
    """A compiler may contract a * b + c: compiled training would then draw other noise than a resumed eager one."""
    called: list[str] = []

    def noisy(x: torch.Tensor) -> torch.Tensor:
        seeds = sample_seeds(0, 1, torch.arange(3))
        return x.sin() + seeded_noise(seeds, (2,)) * seeded_uniform(seeds)[:, None]

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    x = torch.linspace(-1, 1, 6).reshape(3, 2)
    compiled = torch.compile(noisy, backend=backend)
    for _ in range(2):
        assert torch.equal(compiled(x), noisy(x))
    assert "sin" in called
    assert not any(word in name for name in called for word in ("floor", "shift", "sqrt", "stack", "xor"))


def test_importing_does_not_load_the_compiler() -> None:
    """It takes as long to import as the rest of torch, and every command would wait for it."""
    code = "import sys, fewstep.schedules; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
