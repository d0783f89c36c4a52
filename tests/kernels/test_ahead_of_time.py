"""Every Triton kernel, compiled for GPUs that are not here: no spills, memory that fits, the instructions wanted."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from ahead_of_time import Usage, compiled

import fewstep.kernels

FULL = os.environ.get("FEWSTEP_KERNELS_FULL") == "1"
ROOT = Path(fewstep.kernels.__file__).parent
MODULES = sorted(
    "fewstep.kernels." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("*/triton_*.py")
)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_every_configuration_compiles_without_spills(module: str) -> None:
    """A spill costs a multiple of the time and a tile beyond the chip's memory the launch: both seen on a GPU only.

    `make test` compiles each variant for one of the architectures in turn, `make test-kernels-full` for all of them.
    """
    usages = compiled(module, rotate=not FULL)
    assert len(usages) == len({(u.name, u.arch) for u in usages}) > 0
    assert not [fault for usage in usages for fault in usage.faults()]


def test_planted_faults_are_seen() -> None:
    """Wide tiles in few warps spill; a kernel of odd integers has no 128-bit loads; more memory than the chip has."""
    usages = {u.name: u for u in compiled("faulty_kernels", (80, 90))}
    assert not usages["good"].faults()
    assert any("spills" in fault for fault in usages["spills"].faults())
    assert any("no 128-bit loads" in fault for fault in usages["narrow"].faults())
    assert any("shared memory" in fault for fault in usages["hoards"].faults())
    assert any("no wgmma" in fault for fault in usages["claims wgmma"].faults())
    assert not Usage.faults(replace(usages["claims wgmma"], hgmma=1))
