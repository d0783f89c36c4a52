"""Compile CUDA kernels for GPUs that are not here; read registers, stack and spills of each, and the machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from fewstep.kernels import build

ENTRY = re.compile(
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+ptxas info\s+: Used (?P<registers>\d+) registers"
)


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one architecture; `spilled` in bytes."""

    name: str
    arch: str
    registers: int
    stack: int
    spilled: int


def architectures(source: Path) -> tuple[str, ...]:
    """Return those that build.py compiles a file for."""
    return ("sm_90a",) if source.stem.endswith("_sm90a") else ("sm_80", "sm_89", "sm_90", "sm_100")


def compiled(source: Path, arch: str, *flags: str) -> tuple[list[Kernel], str]:
    """Return the kernels of a `.cu` and their machine code."""
    compiler = build.nvcc()
    assert compiler is not None, "nvcc comes with the dev group"
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernel.cubin"))
        include = f"-I{build.ROOT / 'cuda'}"
        command = [str(compiler), *build.FLAGS, include, "-Xptxas=-v", f"-arch={arch}", "-cubin", str(source), *flags]
        done = subprocess.run([*command, "-o", cubin], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        sass = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = [
        Kernel(m["name"], arch, int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in ENTRY.finditer(done.stderr)
    ]
    return found, sass
