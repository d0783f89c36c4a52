"""A results file as a GPU would give it, with made-up times, for tests of tables and figures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

from fewstep.kernels.benchmark.operations import all_cases
from fewstep.kernels.benchmark.results import Results

MADE = {"device": "An Example GPU", "versions": {"torch": "2.99", "triton": "3.99"}, "commit": "0123456789abcdef"}
COPY, PRODUCT = 4e12, 8e14                       # bytes/s, flop/s
SLOWNESS = {"triton": 1.2, "cuda": 1.15, "eager": 3.0, "compile": 1.6, "flash": 1.3, "cudnn": 1.25, "efficient": 1.9}
WAYS = {"eager": 100.0, "auto": 75.0, "compile": 85.0, "auto+compile": 66.0}


def place(op: str, name: str, shape: str, dtype: str, layout: str, backend: str) -> dict[str, Any]:
    return {"op": op, "pass": name, "shape": shape, "dtype": dtype, "layout": layout, "backend": backend}


def ceilings() -> Iterator[dict[str, Any]]:
    timed = {"spread": 0.001, "bytes": 4 << 30, "flops": 0}
    yield place("copy", "forward", "2048 MiB", "fp32", "l", "torch") | timed | {"us": (4 << 30) / COPY * 1e6}
    flops = 2 * 8192**3
    for dtype, rate in (("bf16", PRODUCT), ("fp32", PRODUCT / 16)):
        facts = {"spread": 0.002, "bytes": 1, "flops": flops, "us": flops / rate * 1e6}
        yield place("product", "forward", "8192^3", dtype, "l", "torch") | facts


def rows() -> Iterator[dict[str, Any]]:
    """Times a little above the floor of each case, in the order of a run."""
    yield from ceilings()
    for case in [case for case in all_cases("gpu") if case.timed][::3]:
        for backend, slowness in SLOWNESS.items():
            if backend not in ("triton", "cuda", "eager", "compile" if case.compiled else "", *case.rivals):
                continue
            for name, cost in case.costs.items():
                floor = max(cost.bytes / COPY, cost.flops / PRODUCT) * 1e6
                noise = 1 + crc32(f"{case.name}{backend}{name}".encode()) % 1000 / 2500
                yield place(case.op, name, case.shape, case.dtype, case.layout, backend) | {
                    "us": floor * slowness * noise + 1.5, "spread": 0.01, "bytes": cost.bytes, "flops": cost.flops,
                    "bound": cost.bound, "host_us": 20.0, "host_bound": False, "rel_err": 1.7e-3, "limit": 1e-2,
                    "same_bits": True,
                }  # fmt: skip
    for op in ("unet_train_step", "unet_guided_target", "unet_sample_4_steps", "dit_train_step"):
        for way, ms in WAYS.items():
            yield place(op, "step", "imagenet64 b32", "bf16", "-", way) | {
                "us": 1e3 * ms, "spread": 0.01, "per_second": 32 / ms * 1e3, "peak_bytes": 20 << 30,
            }  # fmt: skip


def results_file(path: Path) -> Path:
    """Written as a run writes it."""
    results = Results(path, MADE)
    results.write = lambda: None  # type: ignore[method-assign]  # once is enough here
    for row in rows():
        results.add(row)
    results.note("time attention x cuda", "its process ended: -11")
    del results.write
    results.write()
    return path
