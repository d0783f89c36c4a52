"""One cluster for all tests of this folder, and one undisturbed run that theirs are held against."""

import os
from collections.abc import Iterator

import pytest
import slurm_cluster
from slurm_cluster import ROOT, TEACHER, Cluster, installed
from torch import Tensor

from fewstep.lab.cli import main


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    must = os.environ.get("CI") == "true"
    if not installed() and not must:
        pytest.skip("no SLURM on this machine: tools/slurm_dev_cluster.sh install (Debian packages, as root)")
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # to each its own ports
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), 16800 + 200 * number)
    if not installed():
        cluster.tool("install")
    cluster.tool("start")
    yield cluster
    cluster.tool("stop", "--purge")


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, without jobs; those that the test leaves are ended."""
    yield _cluster
    _cluster.clear()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The teacher's weights after a run in this process that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["run", str(ROOT / "experiments" / "digits"), *TEACHER, f"out={out}"]) == 0
    return slurm_cluster.weights(out / "teacher")
