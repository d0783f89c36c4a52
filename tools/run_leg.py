"""One leg of an experiment, on a machine that is lent for minutes: `python3 tools/run_leg.py 1 --out FILES`.

Needs what `tools/gpu_bundle.py` brings, in which it lies, and what MUST_BE_THERE names. A leg goes on from the files
that earlier ones left (`legs/` of the bundle, or --legs), does its stages, stops by the clock, and writes a few files
for the next: see `leg_files.py`. A leg that was cut short is run again with its own files as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.lab.config import Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import leg_files  # noqa: E402 - from beside this file, wherever that is
from leg_files import LegError  # noqa: E402 - as above

# Modules of compiled distributions, which no bundle can bring for any Python.
MUST_BE_THERE = ("torch", "torchvision", "numpy", "scipy", "PIL", "safetensors", "matplotlib", "yaml")
LEGS = {
    1: ("classifier", "teacher", "guide", "sweep"),
    2: ("halve", "grid"),
    3: ("moments", "compare", "report"),
}
CLOSING = 20.0          # seconds of the clock kept for saving, packing and leaving


def main() -> int:
    """Exit status: 0 if the leg is done, 2 for a mistake of the user's, 143 if the clock stopped it, else 1."""
    began, args = time.monotonic(), arguments()
    use_bundle()
    lacking = [name for name in MUST_BE_THERE if importlib.util.find_spec(name) is None]
    if lacking:
        return say(f"this python has no {', '.join(lacking)}", 2)
    data = ROOT / "data" if (ROOT / "data").is_dir() else None
    try:
        config = composed(args.experiment, args.overrides, args.leg, args.data or data)
        legs = args.legs or sorted(path.parent for path in ROOT.glob(f"legs/*/{leg_files.RECORDS}"))
        known = restored(config, args.leg, legs)
    except ValueError as error:
        return say(str(error), 2)
    from fewstep.kernels import use_backend

    use_backend(args.backend)
    code = run(config, began + 60 * args.minutes - CLOSING)
    try:
        made = leg_files.pack(Path(config.out), args.out, known)
    except LegError as error:
        return say(str(error), 1)
    for path in made:
        print(f"run_leg: {path}  {path.stat().st_size / 2**20:.1f} MiB")
    state = "done" if code == 0 else "not done"
    print(f"run_leg: leg {args.leg}: {state}, {time.monotonic() - began:.0f} s", flush=True)
    return code


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("leg", type=int, choices=LEGS)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="default: preset=small")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files for the next leg")
    parser.add_argument("--legs", type=Path, action="append", default=[], help="files of a leg before; may be repeated")
    parser.add_argument("--data", type=Path, help="folder of the images; default: the bundle's, if it has any")
    parser.add_argument("--experiment", type=Path, default=ROOT / "experiments/cifar10")
    backends = ("auto", "reference", "triton", "cuda")
    parser.add_argument("--backend", choices=backends, default="auto", help="of kernels, see make gpu-check")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the clock")
    return parser.parse_intermixed_args()


def use_bundle() -> None:
    """Let this process and its children import what lies beside this file, whatever is installed."""
    sources = [ROOT / "site", ROOT / "kernels/src", *sorted(ROOT.glob("packages/*/src"))]
    found = [str(path) for path in sources if path.is_dir()]
    sys.path[:0] = found
    os.environ["PYTHONPATH"] = os.pathsep.join([*found, *filter(None, [os.environ.get("PYTHONPATH")])])


def composed(experiment: Path, overrides: list[str], leg: int, data: Path | None) -> Config:
    """The experiment on the images in `data`, with the stages of this leg and those that they rest on alone."""
    from fewstep.lab.compose import compose
    from fewstep.lab.record import ancestry

    asked = overrides or ["preset=small"]
    if data is not None:
        asked = [*asked, f"data.files.path={data}"]
    config = compose(experiment, asked)
    unknown = [name for name in LEGS[leg] if name not in config.stages]
    if unknown:
        raise LegError(f"{experiment}: has no stage {', '.join(unknown)}, of which leg {leg} is made")
    names = dict.fromkeys(name for last in LEGS[leg] for name in ancestry(config, last))
    config.stages = {name: config.stages[name] for name in names}
    return config


def refuse_missing(config: Config, leg: int, done: set[str]) -> None:
    """Raise LegError if a stage that the leg rests on, and that is an earlier one's to do, is not done."""
    missing = [name for name in config.stages if name not in LEGS[leg] and name not in done]
    if missing:
        raise LegError(f"leg {leg} needs {', '.join(missing)} of an earlier leg: give its files by --legs")


def restored(config: Config, leg: int, legs: list[Path]) -> set[str]:
    """Put the files of earlier legs in place; returns the names of the models that these have.

    Raises:
        LegError: a stage that the leg needs is not among them.
    """
    run = Path(config.out)
    for files in legs:
        leg_files.restore(files, run)
    refuse_missing(config, leg, {name for name in config.stages if (run / name / "DONE").is_file()})
    return set().union(*(leg_files.recorded(files)[1] for files in legs))


def run(config: Config, deadline: float) -> int:
    """Do the stages that are not done; at the deadline they are asked to stop, as by a cluster."""
    from rich.console import Console

    from fewstep.lab.runner import run_experiment

    over = threading.Event()
    threading.Thread(target=stop_at, args=(deadline, over), daemon=True).start()
    try:
        return run_experiment(config, console=Console(highlight=False))
    except Exception:             # what was finished before is packed all the same
        traceback.print_exc()
        return 1
    finally:
        over.set()


def stop_at(deadline: float, over: threading.Event) -> None:
    """At the deadline, or as soon as this process heeds the signal: ask it to stop, unless it is over by then."""
    while not over.wait(0.1):
        if time.monotonic() >= deadline and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def say(text: str, code: int, name: str = "run_leg") -> int:
    """One line on stderr; returns the code."""
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
