"""What one leg of an experiment needs on a machine that has torch and no registry: one folder of at most 56 MiB.

    python tools/gpu_bundle.py 1 --data ../shared/data/cifar10
    python tools/gpu_bundle.py 2 --data ../shared/data/cifar10 --legs FILES_OF_LEG_1

Then, there: `python3 build/gpu_bundle/tools/run_leg.py 1 --out FILES`. The folder holds this repository's packages,
the distributions of WANTED and what these need, of Python alone, as they are installed here (antlr4 was built here:
there is no wheel of it), the images, and of earlier legs the records and the weights that this one needs.
`run_leg.MUST_BE_THERE` names what the machine is to have. 64 MiB travel in all, with the repository beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import re
import shutil
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import leg_files  # noqa: E402 - from beside this file
import run_leg  # noqa: E402 - its folder was put on the path above
from leg_files import LegError  # noqa: E402 - its folder was put on the path above

WANTED = ("hydra-core", "omegaconf", "submitit", "torch-fidelity", "rich")
TOOLS = ("run_leg.py", "leg_files.py")
IMAGES = ("cifar10_jpegq75_train.npz", "cifar10_jpegq75_test.npz")
MOST_BYTES = 56 * 2**20
UNUSED = shutil.ignore_patterns("__pycache__", "*.pyc", "results", "fewstep.commit")


def main() -> int:
    """Exit status: 0, or 2 for a mistake of the user's."""
    args = arguments()
    try:
        size = make(args)
    except (ValueError, OSError) as error:
        return run_leg.say(str(error), 2, "gpu_bundle")
    print(f"gpu_bundle: {args.out}  {size / 2**20:.1f} MiB")
    return 0


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("leg", type=int, choices=run_leg.LEGS)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as run_leg.py will be given")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 (JPEG)")
    parser.add_argument("--legs", type=Path, action="append", default=[], help="files of a leg before; may be repeated")
    parser.add_argument("--experiment", type=Path, default=ROOT / "experiments/cifar10")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu_bundle", help="made anew if it is there")
    return parser.parse_intermixed_args()


def make(args: argparse.Namespace) -> int:
    """Write the bundle; returns its bytes.

    Raises:
        LegError: images or files of an earlier leg are missing, or it is too large.
    """
    shutil.rmtree(args.out, ignore_errors=True)
    copy_code(args.experiment, args.out)
    carried = copy_libraries(args.out / "site")
    if args.data is not None:
        copy_images(args.data, args.out / "data")
    copy_legs(args, args.out / "legs")
    about = {"leg": args.leg, "carried": carried, "must_be_there": run_leg.MUST_BE_THERE}
    (args.out / "bundle.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        heavy = sorted(args.out.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)[-1]
        raise LegError(f"{args.out}: {size / 2**20:.1f} MiB, at most {MOST_BYTES / 2**20:g} travel; most is {heavy}")
    return size


def copy_code(experiment: Path, out: Path) -> None:
    """Sources of all packages, the experiment, and the tools, where the repository has them; with the commit."""
    from fewstep.lab.record import COMMIT, commit

    for source in (ROOT / "kernels/src", *sorted(ROOT.glob("packages/*/src"))):
        shutil.copytree(source, out / source.relative_to(ROOT), ignore=UNUSED)
    (out / "packages/lab/src" / COMMIT).write_text(commit() + "\n")
    shutil.copytree(experiment, out / "experiments" / experiment.name, ignore=UNUSED)
    (out / "tools").mkdir()
    for name in TOOLS:
        shutil.copy(ROOT / "tools" / name, out / "tools" / name)


def copy_libraries(site: Path) -> dict[str, str]:
    """Copy what WANTED leads to, but for what torch needs itself and what is compiled; returns names and versions."""
    there = closure(["torch"])
    found = {name: metadata.distribution(name) for name in sorted(closure(WANTED) - there)}
    pure = {name: each for name, each in found.items() if not any(f.suffix == ".so" for f in each.files or ())}
    for each in pure.values():
        for file in each.files or ():
            if file.parts[0] not in ("..", "tests") and file.suffix != ".pyc":    # antlr4 installs its own as `tests`
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), site / file)
    return {name: each.version for name, each in pure.items()}


def closure(names: tuple[str, ...] | list[str]) -> set[str]:
    """Installed distributions that these lead to by their requirements, themselves included."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            needed = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            continue              # for another system than this one
        found.add(name)
        waiting += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def copy_images(data: Path, out: Path) -> None:
    """The two files of CIFAR-10 (JPEG)."""
    missing = [name for name in IMAGES if not (data / name).is_file()]
    if missing:
        raise LegError(f"--data {data}: has no {', '.join(missing)}")
    out.mkdir()
    for name in IMAGES:
        shutil.copy(data / name, out / name)


def copy_legs(args: argparse.Namespace, out: Path) -> None:
    """Of each leg's files the records, and those weights that the stages still to be done need."""
    done, models = set(), set()
    for files in args.legs:
        more, named = leg_files.recorded(files)
        done, models = done | more, models | named
    needed = needed_stages(args, done)
    weights = {name for name in models if re.split(r"\.steps_\d+$", name)[0] in needed}
    for number, files in enumerate(args.legs):
        (out / str(number)).mkdir(parents=True)
        shutil.copy(files / leg_files.RECORDS, out / str(number))
        for name in sorted(weights):
            if (files / f"{name}.safetensors").is_file():
                shutil.copy(files / f"{name}.safetensors", out / str(number))
                weights.remove(name)
    if weights:
        raise LegError(f"--legs: none has {', '.join(f'{name}.safetensors' for name in sorted(weights))}")


def needed_stages(args: argparse.Namespace, done: set[str]) -> set[str]:
    """Stages whose models the leg reads, or goes on with.

    Raises:
        LegError: an earlier leg's stage is not done.
    """
    config = run_leg.composed(args.experiment, args.overrides, args.leg, args.data)
    run_leg.refuse_missing(config, args.leg, done)
    todo = [name for name in config.stages if name not in done]
    return {need for name in todo for need in (name, *config.stages[name].needs)}


if __name__ == "__main__":
    sys.exit(main())
