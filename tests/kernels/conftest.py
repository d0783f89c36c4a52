"""What tests of fused kernels share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def unset_is_nan() -> Iterator[None]:
    """`torch.empty` is filled with NaN, so that what a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
