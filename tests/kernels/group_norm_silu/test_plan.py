"""How calls are cut: the promised shapes reach the fused kernels, in a tier and with programs that suit a GPU."""

from dataclasses import replace

import pytest
import torch

from fewstep.kernels.group_norm_silu import fused, triton_kernel
from fewstep.kernels.group_norm_silu.plan import PROCESSORS, RESIDENT, TILE, groups_together, plan
from fewstep.kernels.group_norm_silu.shapes import SHAPES, Shape, bytes_moved, passes

CUTS = [(shape, last, backward) for shape in SHAPES for last in (False, True) for backward in (False, True)]


def cut(shape: Shape, last: bool, backward: bool, itemsize: int = 2):  # type: ignore[no-untyped-def]  # a Plan
    return plan(shape.batch, shape.channels, shape.groups, shape.side**2, itemsize, last, backward)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_promised_shapes_do_not_fall_back(shape: Shape) -> None:
    """A silent fallback would turn a figure of this library into one of PyTorch's."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape.batch, shape.channels, shape.side, shape.side, dtype=dtype, device="meta")
            x = x.to(memory_format=memory_format)
            residual = x if shape.residual else None
            arguments = (x, shape.groups, None, None, 1e-5, None, None, residual, "silu", shape.residual or "after")
            assert fused.supports(*arguments) is None


@pytest.mark.parametrize(("shape", "last", "backward"), CUTS)
def test_every_channel_and_pixel_has_one_program(shape: Shape, last: bool, backward: bool) -> None:
    p = cut(shape, last, backward)
    size, pixels = shape.channels // shape.groups, shape.side**2
    assert (p.blocks - 1) * p.groups < shape.groups <= p.blocks * p.groups
    assert (p.chunks - 1) * p.chunk < pixels <= p.chunks * p.chunk
    assert p.chunks == 1 or p.chunk % p.pixels == 0
    assert p.channels * p.pixels <= max(RESIDENT[backward], TILE)
    if last or p.tier == "resident":
        assert p.channels >= p.groups * size        # the groups' sums are taken within one tile


@pytest.mark.parametrize(("shape", "last", "backward"), CUTS)
def test_a_large_tensor_never_starves_the_gpu(shape: Shape, last: bool, backward: bool) -> None:
    """One program per sample and group would be 32 at batch 1: 18 times slower than memory allows."""
    p = cut(shape, last, backward)
    per_program = 2 * shape.elements / (shape.batch * p.blocks * p.chunks)
    assert shape.batch * p.blocks * p.chunks >= min(PROCESSORS, 64) or per_program <= 96 << 10


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8, 10, 12, 18, 20, 24, 30, 40, 42, 60, 80])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_channels_last_programs_read_whole_sectors(size: int, itemsize: int) -> None:
    """A program per group would read 12 bytes of a pixel's 384: blocks of groups read 64 or more, aligned."""
    groups = 32
    together = groups_together(size * groups, groups, itemsize)
    span = together * size
    assert span * itemsize >= 64 or together == groups
    assert span * itemsize % 16 == 0 or size * groups * itemsize % 16
    assert span / (1 << (span - 1).bit_length()) > 0.5


def test_bytes_of_the_tier() -> None:
    """64x192x64x64 in bf16 on page E: 2 passes of 100.7 MB forward, 3 backward; the VAE's 512 pixels read twice."""
    adm = replace(SHAPES[0], name="")
    assert bytes_moved(adm, 2) == 2 * 2 * 64 * 192 * 64 * 64
    assert bytes_moved(adm, 2, backward=True) == 3 * 2 * 64 * 192 * 64 * 64
    assert bytes_moved(replace(adm, residual="before"), 2) == 4 * 2 * 64 * 192 * 64 * 64
    vae = next(shape for shape in SHAPES if shape.name == "vae/512x512")
    assert (passes(vae, 2), bytes_moved(vae, 2)) == (2, 3 * 2 * vae.elements)
    assert bytes_moved(vae, 2, backward=True) == 5 * 2 * vae.elements


def test_configurations_are_those_that_are_launched() -> None:
    """Each promised launch is one of the configurations that are compiled ahead, by name."""
    names = {configuration.name for configuration in triton_kernel.configurations()}
    launched = triton_kernel._launches_of(SHAPES[0], torch.bfloat16, torch.channels_last)
    assert len(launched) >= 3
    assert {launch.configuration.name for launch in launched} <= names
