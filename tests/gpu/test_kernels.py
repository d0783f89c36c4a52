"""Our kernels on a GPU against float64: what no interpreter and no emulator can show."""

import pytest
import torch

from fewstep.kernels.benchmark.case import Case
from fewstep.kernels.benchmark.error import compare
from fewstep.kernels.benchmark.operations import chosen, pairs
from fewstep.kernels.benchmark.summary import is_ours, wrong

HERE = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="no CUDA device")]
CUDA = torch.device("cuda")
# A sample of the edge cases, since each compiles kernels of its own; `make gpu-check` does all, by many processes.
EDGES = [(c, name) for c, name in pairs("gpu", CUDA) if not c.timed and is_ours(name)][::9] if HERE else []


@pytest.mark.parametrize(("case", "backend"), EDGES, ids=lambda value: getattr(value, "name", value))
def test_results_and_gradients_are_those_of_float64(case: Case, backend: str) -> None:
    """tf32, fast exponentials, races between blocks and unwritten memory show on a GPU alone."""
    with chosen(case, backend):
        for row in compare(case, case.ours, CUDA, poison=True):
            assert wrong(row | {"backend": backend}) is None, row


@pytest.mark.parametrize(("case", "backend"), EDGES[::5], ids=lambda value: getattr(value, "name", value))
def test_a_captured_graph_gives_the_same_bits(case: Case, backend: str) -> None:
    """Sampling replays CUDA graphs: an operator that waits for the device or allocates behind its back breaks them."""
    inputs = case.inputs(CUDA, 0)
    with chosen(case, backend), torch.no_grad():
        expected = case.ours(*inputs)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = case.ours(*inputs)
        graph.replay()
        torch.cuda.synchronize()
    pairs_of = zip(*([x] if isinstance(x, torch.Tensor) else x for x in (expected, found)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs_of)


@pytest.mark.parametrize(("case", "backend"), EDGES[::7], ids=lambda value: getattr(value, "name", value))
def test_compiled_it_is_as_exact(case: Case, backend: str) -> None:
    """torch.compile must not change what our operators get or give: layouts, dtypes, the gradient."""
    with chosen(case, backend):
        compiled = torch.compile(case.ours, dynamic=False, fullgraph=True)
        for row in compare(case, compiled, CUDA, poison=False):
            assert wrong(row | {"backend": backend}) is None, row
