"""The tasks of the operations: every case by every backend, first for its correctness, then for its time."""

from __future__ import annotations

import timeit
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from fewstep.kernels import available_backends, backend, use_backend
from fewstep.kernels.benchmark import attention, ceilings, group_norm_silu, guided_update, layer_norm_modulate
from fewstep.kernels.benchmark.case import BACKWARD, FORWARD, Case, Function, Inputs, directions_like, gradients
from fewstep.kernels.benchmark.error import compare
from fewstep.kernels.benchmark.task import CHECK, FIRST, RIVAL, TIME, Settings, Task
from fewstep.kernels.benchmark.timing import Calls, Timing, measure

MODULES = (group_norm_silu, attention, guided_update, layer_norm_modulate)
OURS = ("triton", "cuda", "reference")
PLAIN: dict[str, Function] = {
    group_norm_silu.OP: group_norm_silu.eager,
    attention.OP: attention.eager,
    attention.PACKED: attention.eager_packed,
    layer_norm_modulate.OP: layer_norm_modulate.eager,
}
EAGER, COMPILE, AUTO = "eager", "compile", "auto"
PYTORCHS = (attention.OP, attention.PACKED)      # operations whose reference is PyTorch's own operator
BEYOND_CACHE = 3     # times the last-level cache: what inputs taken in turn amount to
MOST_SETS = 48       # of inputs; small ones stay in the cache then, as they do in a network
CACHE_BYTES = {"cuda": 60 << 20, "cpu": 16 << 20}
COMPILERS = {"tiny": "aot_eager", "cpu": "inductor", "gpu": "inductor"}  # a dry run traces, it has no time to compile
CPU_SECONDS = {"tiny": 0.0, "cpu": 1.0, "gpu": 2.0}  # per pass and backend


def tasks(settings: Settings) -> Iterator[Task]:
    """Ceilings, then a check of every case by every backend, then their times, the most valuable first."""
    device = torch.device(settings.device)
    yield Task("ceilings", FIRST, lambda: ceilings.measured(settings.size, device))
    offered = pairs(settings.size, device)
    wanted = [(case, name) for case, name in offered if settings.wants(case.op, case.shape, case.dtype, name)]
    for case, name in wanted:
        kind = CHECK if name.split("+")[0] in OURS else RIVAL
        yield Task(f"check {case.name} {name}", kind, partial(_check, case, name, settings))
    for case in {case.name: case for case, _ in wanted}.values():
        if case.timed and device.type == "cuda":
            yield Task(f"pick {case.name}", CHECK, partial(_pick, case, device))
    for case, name in wanted:
        if case.timed:
            yield Task(f"time {case.name} {name}", TIME, partial(_time, case, name, settings))


def pairs(size: str, device: torch.device) -> list[tuple[Case, str]]:
    """Every case with everything that computes it here."""
    return [(case, name) for case in all_cases(size) for name in backends_of(case, device)]


def operations() -> list[str]:
    """The names of the operations that are measured."""
    return list(dict.fromkeys(case.op for case in all_cases("tiny")))


def all_cases(size: str) -> list[Case]:
    """Cases of all operations, in turn: a run that is cut short has as large a share of each.

    The first few of each come before the rest of any, and those that are timed before those that are only checked.
    """
    lists = [list({case.name: case for case in module.cases(size)}.values()) for module in MODULES]
    head = [case for found in lists for case in found[:4]]
    timed, checked = ([[c for c in found[4:] if c.timed is wanted] for found in lists] for wanted in (True, False))
    return head + in_turn(timed) + in_turn(checked)


def in_turn(lists: Sequence[Sequence[Case]]) -> list[Case]:
    """All of them, each list in its own order, at every point about as far along in one as in another."""
    placed = [((i + 0.5) / len(found), case) for found in lists for i, case in enumerate(found)]
    return [case for _, case in sorted(placed, key=lambda pair: pair[0])]


def backends_of(case: Case, device: torch.device) -> list[str]:
    """Who computes the case here: our backends that implement it, what PyTorch offers, and our reference where fused
    backends cannot run. cuDNN and its like need a GPU.
    """
    here = [name for name in available_backends() if name in backend._implementations[case.op]]
    ours = [name for name in here if name != "reference" or device.type == "cpu"]
    if backend.INTERPRETED and case.dtype == "bf16":      # which Triton's interpreter takes for integers
        ours = [name for name in ours if name != "triton"]
    on_gpu = device.type == "cuda"
    if case.variants and "cuda" in ours and on_gpu and torch.cuda.get_device_capability(device) == (9, 0):
        ours += case.variants
    rivals = [EAGER, *([COMPILE] if case.compiled and case.timed else []), *(case.rivals if case.timed else ())]
    return [*ours, *(name for name in rivals if device.type == "cuda" or name not in attention.RIVALS)]


def function_of(case: Case, name: str, compiler: str = "inductor") -> Function:
    """What computes the case by that backend; for ours, to be called within `chosen`."""
    if name == COMPILE:
        return torch.compile(case.eager, dynamic=False, fullgraph=True, backend=compiler)
    if name in case.rivals:
        return case.rivals[name]
    return case.eager if name == EAGER else case.ours


def chosen(case: Case, name: str) -> AbstractContextManager[object]:
    """Our backend of that name in use, or a variant of one; nothing for PyTorch's."""
    if name in case.variants:
        return case.variants[name]()
    return use_backend(name) if name in OURS else nullcontext()


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Within, operations run as a user of PyTorch writes them: our reference keeps more digits, at a price."""
    found = {op: backend._implementations[op] for op in PLAIN}
    kept = {op: implementations["reference"] for op, implementations in found.items()}
    for op, implementations in found.items():
        implementations["reference"] = PLAIN[op]
    try:
        with use_backend("reference"):
            yield
    finally:
        for op, implementations in found.items():
            implementations["reference"] = kept[op]


def _check(case: Case, name: str, settings: Settings) -> Iterator[dict[str, Any]]:
    function = function_of(case, name, COMPILERS[settings.size])
    with chosen(case, name), _graphs_walked_again():
        for row in compare(case, function, torch.device(settings.device), poison=name.split("+")[0] in OURS):
            yield _identity(case, name) | row


def _pick(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """Which backend "auto" takes for each pass, why, what deciding costs, and where the tuning table would say so.

    Forward is a call without gradients. A backward pass runs where its forward pass, with gradients, was dispatched to.
    """
    calls: list[tuple[Any, ...]] = []
    explain, inputs = backend.explain, case.inputs(device, 0)

    def listening(operation: str, *args: Any) -> backend.Choice:
        calls.append((operation, *args))
        return explain(operation, *args)

    backend.explain = listening
    try:
        case.ours(*inputs)
    finally:
        backend.explain = explain
    call = calls[-1]
    microseconds = timeit.timeit(lambda: explain(*call), number=200) / 200 * 1e6
    choices: dict[str, backend.Choice] = {}
    names: dict[str, str] = {}
    for key in case.costs:
        with torch.set_grad_enabled(key == BACKWARD):
            choices[key] = explain(*call)
            names |= {key: backend.filed(*call)} if call[0] in backend._sizes else {}
    filed = {"operation": call[0], "filed": names, "arch": backend.arch(device.index or 0)}
    for key, choice in choices.items():
        yield _identity(case, AUTO) | {
            "pass": key, "picked": choice.backend, "why": choice.why, "dispatch_us": microseconds,
            **(filed if key == FORWARD else {}),
        }  # fmt: skip


def _time(case: Case, name: str, settings: Settings) -> Iterator[dict[str, Any]]:
    device = torch.device(settings.device)
    sets = [case.inputs(device, seed) for seed in range(number_of_sets(case, device, settings.size))]
    with chosen(case, name), _graphs_walked_again():
        function = function_of(case, name, COMPILERS[settings.size])
        for key, cost in case.costs.items():
            timing = measure(_calls(function, sets, key), device, CPU_SECONDS[settings.size])
            yield _identity(case, name) | _facts(timing) | {
                "pass": key, "bytes": cost.bytes, "flops": cost.flops, "bound": cost.bound,
            }  # fmt: skip


def _identity(case: Case, name: str) -> dict[str, Any]:
    return {"op": case.op, "shape": case.shape, "dtype": case.dtype, "layout": case.layout, "backend": name}


def _facts(timing: Timing) -> dict[str, Any]:
    return {
        "us": timing.us, "spread": timing.spread, "host_us": timing.host_us, "host_bound": timing.host_bound,
    }  # fmt: skip


def number_of_sets(case: Case, device: torch.device, size: str) -> int:
    """How many sets of inputs, taken in turn, exceed the device's cache."""
    if size == "tiny":
        return 1
    each = max(1, case.costs[FORWARD].bytes)
    return max(2, min(MOST_SETS, -(-BEYOND_CACHE * CACHE_BYTES[device.type] // each)))


def _calls(function: Function, sets: Iterable[Inputs], key: str) -> Calls:
    """A call per set of inputs: forward without a graph, or backward along a graph that is there; all called once."""
    if key == FORWARD:
        quick = torch.no_grad()(function)
        calls = [partial(quick, *inputs) for inputs in sets]
    else:
        calls = [_backward(function, inputs) for inputs in sets]
    for call in calls:
        call()
    return calls


def _backward(function: Function, inputs: Inputs) -> Any:
    outputs = function(*inputs)
    directions = directions_like(outputs, 0)
    return lambda: gradients(outputs, inputs, directions)


@contextmanager
def _graphs_walked_again() -> Iterator[None]:
    """Within, compiled graphs keep their memory after a backward pass: it is called many times here."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield
