"""Which cases there are, what they cost at least, and who computes them."""

import math
from collections import Counter

import pytest
import torch

from fewstep.kernels import use_backend
from fewstep.kernels.attention.shapes import SHAPES as ATTENTION
from fewstep.kernels.backend import Choice
from fewstep.kernels.benchmark import operations
from fewstep.kernels.benchmark.case import BACKWARD, FORWARD, SIZES, Case
from fewstep.kernels.benchmark.operations import all_cases, backends_of, chosen, number_of_sets, tasks
from fewstep.kernels.benchmark.task import Settings
from fewstep.kernels.group_norm_silu.shapes import SHAPES as NORMS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def find(op: str, shape: str, size: str = "gpu", dtype: str = "bf16") -> Case:
    return next(c for c in all_cases(size) if (c.op, c.dtype) == (op, dtype) and c.shape.startswith(shape) and c.timed)


def test_costs_by_hand() -> None:
    """A byte too many in the floor makes every kernel look better than it is."""
    x = 64 * 192 * 64 * 64 * 2                                  # bytes of a bf16 tensor
    norm = find("group_norm_silu", "adm64/64x64 ")
    assert norm.costs[FORWARD].bytes == 2 * x                   # read x, write y
    assert norm.costs[BACKWARD].bytes == 3 * x                  # read x, dy, write dx
    attention = find("attention", "adm64/32x32 ")
    heads, tokens, width = 64 * 6, 1024, 64
    assert attention.costs[FORWARD].flops == 4 * heads * tokens**2 * width
    assert attention.costs[BACKWARD].flops == 10 * heads * tokens**2 * width
    assert attention.costs[FORWARD].bytes == 4 * heads * tokens * width * 2 + 4 * heads * tokens
    step = find("guided_update", "256x3x64x64 v ddim")
    assert step.costs[FORWARD].bytes == 256 * 3 * 64 * 64 * (2 + 2 + 4 + 4)         # both outputs, z, result
    blend = find("guided_update", "256x3x64x64 v two-step")
    assert blend.costs[FORWARD].bytes == 256 * 3 * 64 * 64 * (2 + 4 + 4 + 4)        # output, z, first, result


@pytest.mark.parametrize("case", all_cases("tiny"), ids=lambda case: case.name)
def test_bytes_are_at_least_those_of_inputs_and_results(case: Case) -> None:
    """Against the tensors themselves: per-image inputs and results are each moved once, small ones may be left out."""
    inputs = case.inputs(CPU, 0)
    outputs = case.ours(*inputs)
    large = [x for x in (*inputs, *([outputs] if isinstance(outputs, torch.Tensor) else outputs)) if x.ndim > 2]
    assert case.costs[FORWARD].bytes >= sum(x.nbytes for x in large)


def test_every_promised_shape_is_measured_in_bf16() -> None:
    """A promise that no run looks at is worth nothing."""
    cases = [case for case in all_cases("gpu") if case.timed and case.dtype == "bf16"]
    named = {op: {c.shape.split()[0] for c in cases if c.op == op} for op in operations.operations()}
    assert {shape.name for shape in ATTENTION} <= named["attention"]
    assert {shape.name for shape in ATTENTION if shape.packed} <= named["attention_qkv"]
    assert {shape.name for shape in NORMS} <= named["group_norm_silu"]
    layouts = {c.layout for c in cases if c.op == "group_norm_silu"}
    assert layouts == {"channels_last", "contiguous"}


@pytest.mark.parametrize("size", SIZES)
def test_names_are_unique_and_the_first_cases_are_of_all_operations(size: str) -> None:
    """Results are kept by name; and a run whose time is up early must have something of everything."""
    cases = all_cases(size)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.op for case in cases[:16]} == set(operations.operations())
    dtypes = {"tiny": {"fp32", "bf16"}, "cpu": {"fp32", "bf16", "fp16"}, "gpu": {"fp32", "bf16", "fp16"}}
    assert {case.dtype for case in cases} == dtypes[size]


def test_a_run_cut_short_has_as_much_of_each_operation() -> None:
    """All of one operation before the next would leave the last ones without a figure, as a first run has no more."""
    cases = all_cases("gpu")
    timed = [case for case in cases if case.timed]
    assert all(case.timed for case in cases[: len(timed)])
    totals = Counter(case.op for case in timed)
    for share in (0.25, 0.5, 0.75):
        so_far = Counter(case.op for case in timed[: int(share * len(timed))])
        assert all(so_far[op] >= share * total - 4 for op, total in totals.items())


def test_who_computes_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN has no float32, a processor none of the GPU's kernels, and not every backend has every operation."""
    monkeypatch.setattr(operations, "available_backends", lambda: ("triton", "cuda", "reference"))
    implementations = {"group_norm_silu": {"triton": 0, "reference": 0}, "attention": {"cuda": 0, "reference": 0}}
    monkeypatch.setattr(operations.backend, "_implementations", implementations)
    monkeypatch.setattr(operations.backend, "INTERPRETED", False)
    attention = find("attention", "adm64/16x16")
    assert backends_of(attention, CUDA) == ["cuda", "eager", "flash", "cudnn", "efficient"]
    assert backends_of(attention, CPU) == ["cuda", "reference", "eager"]
    norm = find("group_norm_silu", "adm64/16x16 ")
    assert backends_of(norm, CUDA) == ["triton", "eager", "compile"]
    large = find("group_norm_silu", "vae/128x128")             # a group of 512 KB: no program holds it, a cluster does
    implementations["group_norm_silu"] = {"triton": 0, "cuda": 0, "reference": 0}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert backends_of(large, CUDA) == ["triton", "cuda", "cuda+cluster", "eager", "compile"]
    assert backends_of(norm, CUDA) == ["triton", "cuda", "eager", "compile"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "cuda+cluster" not in backends_of(large, CUDA)
    single = find("attention", "adm64/16x16", "cpu", "fp32")
    assert backends_of(single, CUDA) == ["cuda", "eager", "efficient"]


def test_filters_leave_what_was_asked_for() -> None:
    """A person who asks for one shape must not wait for the others."""
    settings = Settings("cpu", "tiny", ops=("attention",), shapes=("tiny/text",), backends=("reference",))
    assert [task.name.split()[0] for task in tasks(settings)] == ["ceilings", "check", "time"]
    none = Settings("cpu", "tiny", dtypes=("fp16",))
    assert [task.name for task in tasks(none)] == ["ceilings"]


def test_inputs_taken_in_turn_exceed_the_cache_and_end_somewhere() -> None:
    """Inputs that fit the cache measure the cache; a thousand sets of small ones would take the whole memory."""
    large, small = find("group_norm_silu", "vae/256x256"), find("group_norm_silu", "adm64/8x8/batch1")
    assert number_of_sets(large, CUDA, "gpu") == 2
    assert number_of_sets(small, CUDA, "gpu") == operations.MOST_SETS
    middle = find("group_norm_silu", "sd/64x64/batch1")
    sets = number_of_sets(middle, CUDA, "gpu")
    assert sets == math.ceil(3 * (60 << 20) / (2 * 2 * 320 * 64 * 64 * 2))


def test_inputs_are_functions_of_the_seed() -> None:
    """Backends are compared on the same inputs, drawn by different processes."""
    case = find("guided_update", "1x3x64x64", "cpu", "fp32")
    first, again, other = (case.inputs(CPU, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_chosen_backend_is_in_use_and_not_after() -> None:
    """Times under a name must be those of that backend."""
    from fewstep.kernels import backend

    with use_backend("auto"):
        case = all_cases("tiny")[0]
        with chosen(case, "reference"):
            assert backend._selected == "reference"
        with chosen(case, "eager"):
            assert backend._selected == "auto"
        assert backend._selected == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_cluster_tier_is_measured_as_if_the_table_named_it() -> None:
    """It never runs otherwise, so nobody would ever learn whether it is right and fast."""
    from fewstep.kernels.group_norm_silu import cuda_kernel

    before = vars(cuda_kernel)["tuned"]
    large = find("group_norm_silu", "vae/128x128")
    with pytest.raises(RuntimeError, match="not available"), chosen(large, "cuda+cluster"):    # no GPU here
        pass
    assert vars(cuda_kernel)["tuned"] is before


def test_what_auto_picks_is_asked_for_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is dispatched by whether it is trained: the pick of one would be reported as that of the other."""
    case = find("attention", "adm64/8x8", "cpu", "fp32")

    def explain(operation: str, q: torch.Tensor, *rest: object) -> Choice:
        return Choice("reference" if torch.is_grad_enabled() and q.requires_grad else "triton", "preferred")

    monkeypatch.setattr(operations.backend, "explain", explain)
    monkeypatch.setattr(operations.backend, "arch", lambda index: "sm_90")
    with use_backend("reference"):
        forward, backward = operations._pick(case, CPU)
    assert (forward["picked"], backward["picked"]) == ("triton", "reference")
    assert (forward["pass"], backward["pass"]) == (FORWARD, BACKWARD)
    assert {key: name.rsplit("x", 1)[-1] for key, name in forward["filed"].items()} == {
        FORWARD: "inference", BACKWARD: "training",
    }  # fmt: skip
    assert "arch" not in backward                               # one row tells where the case is filed
