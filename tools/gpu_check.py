"""Run what needs a GPU, the tests in tests/gpu and the kernel benchmarks, or say in one line that there is none."""

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """pytest on tests/gpu, then every benchmark that exists: one per kernel operation that has a fused backend."""
    benchmarks = sorted((ROOT / "kernels/benchmarks").glob("[!_]*.py"))
    return [[sys.executable, "-m", "pytest", "tests/gpu"], *([sys.executable, str(path)] for path in benchmarks)]


def main() -> int:
    """Exit status: 0 if everything passed or nothing could run, 1 otherwise."""
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device on this machine, so nothing was checked")
        return 0
    print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    failed = [command for command in commands() if subprocess.run(command, cwd=ROOT).returncode]
    for command in failed:
        print(f"gpu-check: failed: {' '.join(command)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
