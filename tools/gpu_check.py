"""Measure and check every kernel on this machine's GPU: `make gpu-check`, or `python3 tools/gpu_check.py`.

The latter needs no installation, only a python3 with torch (Triton, ninja and pybind11 for our kernels, safetensors for
whole networks, pytest for tests/gpu). It takes 6 minutes or less by its own clock, the most valuable figures first, and
writes kernels/results/<device>.json after every row; `fewstep profile kernels --from FILE` draws it. `--dry-run` does
the same on a CPU with tiny shapes, Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
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
ONE_BY_ONE, BY_FOUR = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}, {"TORCHINDUCTOR_COMPILE_THREADS": "4"}


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
    from fewstep.kernels.benchmark.task import CHECK, FIRST, KINDS, RIVAL, TIME

    build = start_build(run)
    run.walk(Stage(OPERATIONS, (FIRST,), 1, 60.0))
    if build is not None:
        finish_build(run, build)
    checks, workers = CHECKS * seconds, max(4, os.cpu_count() or 1)
    # The tests that repeat the checks are left out.
    tests = Process(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not float64", "tests/gpu"])
    end = min(run.deadline, time.monotonic() + checks)
    run.walk(
        Stage(OPERATIONS, (CHECK,), workers // 2, checks, ONE_BY_ONE),
        Stage(OPERATIONS, (RIVAL,), workers // 4, checks, ONE_BY_ONE),
        *(Stage(module, (CHECK, RIVAL), max(1, workers // 5), checks, BY_FOUR) for module in modules[1:]),
    )
    failed = tests_failed(tests, max(1.0, end - time.monotonic()))
    run.walk(Stage(OPERATIONS, (TIME,), 1, FIRST_TIMES * seconds, BY_FOUR))
    for module in modules[1:]:
        run.walk(Stage(module, (TIME,), 1, NETWORK_TIMES * seconds, BY_FOUR))
    for module in modules:
        run.walk(Stage(module, (TIME,), 1, seconds, BY_FOUR))
    for module in modules:
        run.walk(Stage(module, KINDS, 1, seconds, BY_FOUR))    # what there was no time or no memory for
    return failed


def start_build(run: Run) -> Process | None:
    """Begin to compile the CUDA kernels for this GPU; None, and why, if that cannot be done here."""
    from fewstep.kernels import build

    if (reason := build.absence()) is None:
        return Process(["-m", "fewstep.kernels.build"])
    print(f"gpu-check: CUDA kernels are left out: {reason}", flush=True)
    return None


def finish_build(run: Run, build: Process) -> None:
    """Wait for the compilers; if they fail, print their words and leave CUDA out, so that not every worker tries."""
    code = build.wait(BUILDING)
    if code == 0:
        return
    print(build.words(), flush=True)
    run.fail("build cuda", f"{BUILDING:.0f} s were not enough" if code is None else "the CUDA kernels do not compile")
    run.settings = replace(run.settings, without=("cuda",))


def tests_failed(tests: Process, seconds: float) -> bool:
    """Wait for tests/gpu and print how they ended, or how far they came."""
    if importlib.util.find_spec("pytest") is None:
        print("gpu-check: tests/gpu is left out: no pytest here")
        return False
    code = tests.wait(seconds)
    print(tests.words(), flush=True)
    if code is None:
        print("gpu-check: tests/gpu did not finish in time")
    return code not in (0, None)


class Process:
    """A Python process of its own, in the root of the checkout, whose output is kept."""

    def __init__(self, arguments: list[str]) -> None:
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=self.output, stderr=subprocess.STDOUT, process_group=0
        )

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None if it had to be ended, with all that it started."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None

    def words(self) -> str:
        """The last lines that it wrote."""
        self.output.seek(0)
        return "".join(self.output.readlines()[-25:])


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

    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in lines(results.rows.values()):
        if (speed_up := line.speed_up()) is not None:
            found.setdefault(line.place[:2], []).append((speed_up, line.own_speed_up() or 0.0))
    said = []
    for (op, name), pairs in found.items():
        picked, own = zip(*pairs, strict=True)
        said.append(
            f"{op} {name}: {geometric_mean(picked):.2f} x the best of PyTorch's, slowest {min(picked):.2f} x, "
            f"{len(picked)} shapes, own kernels won {sum(s >= 1 for s in own)}"
        )
    return "\n".join(said)


if __name__ == "__main__":
    sys.exit(main())
