"""Measure and check every kernel on this machine's GPU: `make gpu-check`, or `python3 tools/gpu_check.py`.

The latter needs no installation, only a python3 with torch (Triton, ninja and pybind11 for our kernels, safetensors for
whole networks, pytest for tests/gpu). It takes 6 minutes or less by its own clock, the most valuable figures first, and
writes kernels/results/<device>.json after every row; `fewstep profile kernels --from FILE` draws it. `--dry-run` does
the same on a CPU with tiny shapes, Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.kernels.benchmark.results import Results
    from fewstep.kernels.benchmark.runner import Run

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS, NETWORKS = "fewstep.kernels.benchmark.operations", "fewstep.lab.profile.end_to_end"
BUILDING = 90.0          # seconds that nvcc may take before everything else, so that not every worker has to
CLOSING = 8.0            # seconds of the clock kept for what comes after the last measurement
LONGEST = 120.0          # seconds for one task: compiling a whole network takes most
# Shares of the clock. Checks also fill the compilers' caches, by many processes at once, so that timing need not wait.
CHECKS, FIRST_TIMES, NETWORK_TIMES = 0.34, 0.22, 0.30
COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}, {"TORCHINDUCTOR_COMPILE_THREADS": "4"}


def main() -> int:
    """Exit status: 0 if all that ran is right or nothing could run, 1 otherwise, 2 for a wrong argument."""
    began, args = time.monotonic(), arguments()
    use_checkout(args.dry_run)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("gpu-check: no CUDA device on this machine, so nothing was checked (--dry-run goes through the motions)")
        return 0
    run, modules = prepare(args, began + 60 * args.minutes - CLOSING)
    if run is None:
        return 2
    tests = dry(run, modules) if args.dry_run else measure(run, modules, 60 * args.minutes)
    run.finish(*modules)
    print(report(run.results), flush=True)
    print(f"gpu-check: {time.monotonic() - began:.0f} s; rows in {run.results.path}")
    wrong = complaints(run)
    for line in wrong:
        print(f"gpu-check: wrong: {line}")
    return int(bool(wrong) or tests)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="of the clock")
    parser.add_argument("--op", action="append", default=[], help="only this operation; may be given several times")
    parser.add_argument("--results", type=Path, help="folder of <device>.json; default kernels/results")
    parser.add_argument("--commit", help="of the code, where it is no clone")
    return parser.parse_args()


def use_checkout(dry_run: bool) -> None:
    """Let this process and its children import the packages of this checkout, whatever is installed."""
    sources = [str(path) for path in (ROOT / "kernels/src", *sorted(ROOT.glob("packages/*/src")))]
    sys.path[:0] = sources
    os.environ["PYTHONPATH"] = os.pathsep.join([*sources, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TRITON_INTERPRET"] = "1" if dry_run else "0"       # before Triton is imported


def prepare(args: argparse.Namespace, deadline: float) -> tuple[Run | None, list[str]]:
    """The run and the modules that have its tasks; without a run if an argument is wrong, which is then said."""
    import torch

    from fewstep.kernels.benchmark import results, runner
    from fewstep.kernels.benchmark.task import Settings

    device = torch.device("cpu" if args.dry_run else "cuda")
    settings = Settings(device.type, "tiny" if args.dry_run else "gpu", ops=tuple(args.op))
    modules = [module for module in (OPERATIONS, NETWORKS) if importable(module)]
    known = sorted({op for module in modules for op in importlib.import_module(module).operations()})
    unknown = [op for op in args.op if op not in known]
    if unknown:
        print(f"gpu-check: --op {unknown[0]} is unknown; known: {', '.join(known)}", file=sys.stderr)
        return None, modules
    made = results.circumstances(device, args.commit)
    folder = args.results or (Path(tempfile.mkdtemp(prefix="gpu-check-")) if args.dry_run else ROOT / "kernels/results")
    name = "dry_run" if args.dry_run else results.file_name(made["device"])
    print(f"gpu-check: {made['device']}, {made['versions']}, commit {made['commit']}", flush=True)
    kept = results.Results(folder / f"{name}.json", made)
    return runner.Run(settings, kept, deadline, LONGEST, lambda text: print(text, flush=True)), modules


def importable(module: str) -> bool:
    """Whether what the module needs is here; says so if not."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"gpu-check: {module} is left out: {error}")
        return False
    return True


def dry(run: Run, modules: list[str]) -> bool:
    """Everything by one process per module."""
    from fewstep.kernels.benchmark.runner import Stage
    from fewstep.kernels.benchmark.task import KINDS

    run.walk(*(Stage(module, KINDS, 1, 600.0) for module in modules))
    return False


def measure(run: Run, modules: list[str], seconds: float) -> bool:
    """Ceilings; checks by many processes, tests/gpu beside them; times, one by one. Returns whether tests failed."""
    from fewstep.kernels.benchmark.runner import Stage
    from fewstep.kernels.benchmark.task import CHECK, FIRST, TIME

    workers = max(1, (os.cpu_count() or 1) // 2)
    build = subprocess.Popen([sys.executable, "-m", "fewstep.kernels.build"], stderr=subprocess.DEVNULL)
    run.walk(Stage(OPERATIONS, (FIRST,), 1, 60.0))
    with contextlib.suppress(subprocess.TimeoutExpired):       # without nvcc it ends at once, and CUDA is left out
        build.wait(BUILDING)
    build.kill()
    tests = Tests(min(run.deadline, time.monotonic() + CHECKS * seconds))
    share = (workers, max(1, workers // 2))
    run.walk(*(
        Stage(module, (CHECK,), count, CHECKS * seconds, environment)
        for module, count, environment in zip(modules, share, COMPILERS, strict=False)
    ))
    failed = tests.failed()
    run.walk(Stage(OPERATIONS, (TIME,), 1, FIRST_TIMES * seconds, COMPILERS[1]))
    for module in modules[1:]:
        run.walk(Stage(module, (TIME,), 1, NETWORK_TIMES * seconds, COMPILERS[1]))
    for module in modules:
        run.walk(Stage(module, (TIME,), 1, seconds, COMPILERS[1]))
    return failed


class Tests:
    """tests/gpu in a process of its own, where pytest is there."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
        there = importlib.util.find_spec("pytest") is not None
        self.process = None if not there else subprocess.Popen(
            command, cwd=ROOT, stdout=self.output, stderr=subprocess.STDOUT
        )

    def failed(self) -> bool:
        """Wait for them and print how they ended."""
        if self.process is None:
            print("gpu-check: tests/gpu is left out: no pytest here")
            return False
        try:
            code = self.process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            print("gpu-check: tests/gpu did not finish in time")
            return False
        self.output.seek(0)
        print("".join(self.output.readlines()[-15:]), flush=True)
        return code != 0


def complaints(run: Run) -> list[str]:
    """What is wrong with our own results of this run, a line each; PyTorch's operators may fail where they like."""
    from fewstep.kernels.benchmark.summary import is_ours, wrong

    made = run.results.made
    rows = [row for row in run.results.rows.values() if all(row[name] == value for name, value in made.items())]
    found = [f"{row['op']} {row['pass']} {row['shape']} {row['dtype']} {row['layout']} {row['backend']}: {text}"
             for row in rows if (text := wrong(row)) is not None]
    return found + [f"{name}: {run.results.notes[name]}" for name in run.failed if is_ours(name.split()[-1])]


def report(results: Results) -> str:
    """How many times as fast ours is as the best of PyTorch's: geometric means over shapes, per operation and pass."""
    from fewstep.kernels.benchmark.summary import geometric_mean, lines

    found: dict[tuple[str, str], list[float]] = {}
    for line in lines(results.rows.values()):
        if (speed_up := line.speed_up()) is not None:
            found.setdefault(line.place[:2], []).append(speed_up)
    return "\n".join(
        f"{op} {name}: {geometric_mean(values):.2f} x the best of PyTorch's, slowest {min(values):.2f} x, "
        f"{len(values)} shapes" for (op, name), values in found.items()
    )


if __name__ == "__main__":
    sys.exit(main())
