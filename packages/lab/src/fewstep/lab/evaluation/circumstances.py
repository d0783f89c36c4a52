"""On what, with what and in what time: so that a table of figures can be made again."""

from __future__ import annotations

import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch

from fewstep.kernels.benchmark.results import cpu_name
from fewstep.lab import record
from fewstep.lab.context import StageContext


def circumstances(seed: int, device: torch.device) -> dict[str, Any]:
    """Commit, seed, versions and hardware of this process, and the most memory that it, or one child, held."""
    return {
        "commit": record.commit(),
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": _peak(resource.RUSAGE_SELF),
        "peak_memory_worker_bytes": _peak(resource.RUSAGE_CHILDREN),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _peak(whose: int) -> int:
    return resource.getrusage(whose).ru_maxrss * 1024  # Linux counts in KiB


def stage_seconds(ctx: StageContext) -> dict[str, float]:
    """Seconds of every stage that this one rests on, over all calls; a call that was killed is not known of."""
    *before, _ = record.ancestry(ctx.config, ctx.stage.name)
    return {name: _seconds(ctx.out.parent / name) for name in before}


def _seconds(folder: Path) -> float:
    *before, _ = record.read_calls(folder)
    last = float(json.loads((folder / "DONE").read_text())["seconds"])
    return last + sum(float(call.get("seconds", 0.0)) for call in before)
