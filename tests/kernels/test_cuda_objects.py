"""Every CUDA kernel, compiled by nvcc for GPUs that are not here: no spills, and memory moved 16 bytes at a time."""

from pathlib import Path

import pytest
from cuda_objects import architectures, compiled

from fewstep.kernels import build

SOURCES = [path for operation in build.operations() for path in sorted((build.ROOT / operation).glob("*.cu"))]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kernels_compile_without_spills(source: Path) -> None:
    """A spill costs a multiple of a kernel's time, on a GPU only; so do loads of single elements."""
    for arch in architectures(source):
        kernels, sass = compiled(source, arch)
        assert kernels, "nvcc's words are not understood any more"
        assert not [kernel for kernel in kernels if kernel.stack or kernel.spilled]
        assert ".128" in sass


SPILLING = """
extern "C" __global__ void sorted_by_all(const float* x, float* y) {
    float kept[64];
    for (int i = 0; i < 64; ++i) kept[i] = x[threadIdx.x + 64 * i];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 64; ++i) sum = sum * kept[i] + kept[63 - i];
    y[threadIdx.x] = sum;
}
"""


@pytest.mark.slow
def test_spills_are_seen(tmp_path: Path) -> None:
    """Sixty-four values that are all needed to the end do not fit into twenty-four registers."""
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    kernels, _ = compiled(source, "sm_90", "-maxrregcount=24")
    assert any(kernel.spilled for kernel in kernels)
    kernels, _ = compiled(source, "sm_90")
    assert not any(kernel.spilled for kernel in kernels)
