"""What holds for every test: one seed and, where there is no GPU, Triton's kernels in its interpreter, made strict."""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):    # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"
    import strict_interpreter

    strict_interpreter.install()


def pytest_runtest_setup() -> None:
    """Every test draws the same numbers whichever ran before it: it passes always or never."""
    torch.manual_seed(0)
