"""Targets and samples as job arrays of 1, 2 and 4 tasks of one thread each: what more tasks bring, what starting costs.

    tools/slurm_dev_cluster.sh start && eval "$(tools/slurm_dev_cluster.sh env)"
    python packages/lab/benchmarks/sharded_work.py [--draws 96] [--num 12000] [--preset full]

Rates are sums over tasks of what each says in its log of its work alone, for tasks that work at the same time; starting
is what is left of the time from submission to the last task's end: scheduling, imports, models, files. On a machine of
two cores, exits with 1 if 2 tasks do less than 1.8 times what one does, or 4 less than 0.95 times what 2 do. Needs the
cores for itself, and a cluster whose jobs run at once.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from fewstep.lab.cli import main as fewstep
from fewstep.lab.cluster.monitor import DONE, ENDED, look

EXPERIMENT = Path(__file__).parents[3] / "experiments" / "digits"
SITE = ["cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_node=1", "cluster.time=30"]
TASKS = (1, 2, 4)
LEAST = {2: 1.8, 4: 0.95}  # over half as many tasks
RATE = re.compile(r"([\d,]+) (?:targets|images)/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=96, help="noises per image")
    parser.add_argument("--num", type=int, default=12000, help="samples")
    parser.add_argument("--preset", default="quickstart", help="of experiments/digits: its teacher's size")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("SLURM_DEV_ROOT")))
    short = ["stages.teacher.updates=2", "stages.teacher.warmup=1"]
    common = [str(EXPERIMENT), f"preset={args.preset}", *short, f"out={folder / 'run'}"]
    quiet = ["progress=false", "tensorboard=false"]
    assert fewstep(["run", *common, *quiet, "--until", "teacher"]) == 0
    model = str(folder / "run" / "teacher" / "model")
    work = {
        "targets": ["targets", *common, "--stage", "guide", "--draws", str(args.draws), "--chunk", "1024"],
        "samples": ["sample", "--model", model, "--steps", "8", "--num", str(args.num), "--chunk", "100"],
    }
    reached = [measure(name, command, folder) for name, command in work.items()]
    return int(not all(reached))


def measure(name: str, command: list[str], folder: Path) -> bool:
    """Print a row for each number of tasks; says whether they bring what they should."""
    rates: dict[int, float] = {}
    for tasks in TASKS:
        out, began = folder / f"{name}{tasks}", time.perf_counter()
        assert fewstep([*command, *SITE, "--shards", str(tasks), "--out", str(out)]) == 0
        wait(out)
        seconds = time.perf_counter() - began
        told = [RATE.search(log.read_text()) for log in sorted(out.glob(".cluster/*/jobs/*.out"))]
        found = [float(match.group(1).replace(",", "")) for match in told if match]
        assert len(found) == tasks, out
        rates[tasks] = sum(found)
        count = sum(size(path) for path in out.rglob("*-*.safetensors"))
        over = f"  x {rates[tasks] / rates[tasks // 2]:.2f}" if tasks > 1 else ""
        print(f"{name}  {tasks} tasks  {rates[tasks]:8,.0f} /s{over}  starting {seconds - count / rates[tasks]:.1f} s")
    return all(rates[tasks] / rates[tasks // 2] >= least for tasks, least in LEAST.items())


def wait(out: Path) -> None:
    while any(part.state not in (DONE, *ENDED) for part in look(out)):
        time.sleep(0.2)
    assert all(part.state == DONE for part in look(out)), look(out)


def size(path: Path) -> int:
    """Pieces in a file, by its name: start-stop."""
    start, stop = path.stem.split("-")
    return int(stop) - int(start)


if __name__ == "__main__":
    sys.exit(main())
