"""Kernels run on the device of their tensors, on a machine of several GPUs too; the present device may be another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_cuda import emulated
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from fewstep.kernels import attention, backend, build, group_norm_silu, guided_update, layer_norm_modulate, use_backend
from fewstep.schedules import Cosine, Raw

HALF = torch.tensor([0.5])
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: attention(x, x, x),
    "group_norm_silu": lambda x: group_norm_silu(x, 1, torch.ones(1, requires_grad=True), None),
    "guided_update": lambda x: guided_update(Raw(x, None, "v"), x, HALF, HALF / 2, Cosine(), clip=(-1, 1)),
    "layer_norm_modulate": lambda x: layer_norm_modulate(x, torch.ones(1, 16), torch.ones(1, 16)),
}
FUSED = [(op, name) for op in CALLS for name in backend._implementations[op] if name != "reference"]


@pytest.fixture
def launches() -> Iterator[list[bool]]:
    """For every launch, and every use of a CUDA module, whether the device of the tensors was the present one."""
    here, found = [False], []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        here[0] = True
        yield
        here[0] = False

    class Watched:
        def __init__(self, module: ModuleType) -> None:
            self.module = module

        def __getattr__(self, name: str) -> Any:
            found.append(here[0])
            return getattr(self.module, name)

    with emulated(), pytest.MonkeyPatch.context() as patch:
        run, load = GridExecutor.__call__, build.load
        patch.setattr(GridExecutor, "__call__", lambda *a, **k: (found.append(here[0]), run(*a, **k)))
        patch.setattr(build, "load", lambda operation: Watched(load(operation)))
        patch.setattr(torch.cuda, "device_of", device_of)
        yield found


@pytest.mark.parametrize(("operation", "name"), FUSED)
def test_launches_are_on_the_device_of_the_tensors(operation: str, name: str, launches: list[bool]) -> None:
    """Elsewhere a launch would fault, or read memory of the wrong GPU."""
    x = torch.randn(1, 1, 4, 16).bfloat16().requires_grad_()
    with use_backend(name):
        CALLS[operation](x).sum().backward()
    assert len(launches) >= 2
    assert all(launches)
