"""What the device can do at best, measured first, and the time that a pass cannot beat on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fewstep.kernels.benchmark.case import DTYPES, FORWARD, SIZES
from fewstep.kernels.benchmark.timing import measure

COPY, PRODUCT = "copy", "product"
COPY_BYTES = dict(zip(SIZES, (1 << 20, 1 << 26, 1 << 31), strict=True))  # of the tensor copied: far beyond any cache
PRODUCT_SIDE = dict(zip(SIZES, (64, 768, 8192), strict=True))


def measured(size: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for the copy bandwidth (bytes read plus bytes written) and one per dtype for square matrix products."""
    source = torch.randn(COPY_BYTES[size] // 4, device=device)
    sink = torch.empty_like(source)
    shape = f"{COPY_BYTES[size] >> 20} MiB"
    yield _row(COPY, shape, "fp32", partial(sink.copy_, source), 2 * COPY_BYTES[size], 0, device)
    side = PRODUCT_SIDE[size]
    for dtype in ("bf16", "fp32") if device.type == "cuda" else ("fp32",):
        a, b, out = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(3))
        yield _row(PRODUCT, f"{side}^3", dtype, partial(torch.mm, a, b, out=out), 3 * a.nbytes, 2 * side**3, device)


def _row(
    op: str, shape: str, dtype: str, call: Callable[[], object], moved: int, flops: int, device: torch.device
) -> dict[str, Any]:
    call()
    timing = measure([call], device)
    return {
        "op": op, "pass": FORWARD, "shape": shape, "dtype": dtype, "layout": "contiguous", "backend": "torch",
        "us": timing.us, "spread": timing.spread, "bytes": moved, "flops": flops,
    }  # fmt: skip


def rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes/s under "copy" and flop/s under each dtype, from the rows of `measured`; fp16 has the rate of bf16."""
    found = {}
    for row in rows:
        if row["op"] == COPY:
            found[COPY] = row["bytes"] / row["us"] * 1e6
        if row["op"] == PRODUCT:
            found[row["dtype"]] = row["flops"] / row["us"] * 1e6
    if "bf16" in found:
        found["fp16"] = found["bf16"]
    return found


def floor_us(moved: int, flops: int, dtype: str, rates: Mapping[str, float]) -> float | None:
    """The larger of the times that the bytes and the products take at the measured rates; None if one is not known.

    On a device whose rate for the dtype was not measured, products are taken at the fastest rate that was.
    """
    if COPY not in rates or (flops and len(rates) < 2):
        return None
    fastest = rates.get(dtype) or max((rate for name, rate in rates.items() if name != COPY), default=0.0)
    return 1e6 * max(moved / rates[COPY], flops / fastest if flops else 0.0)
