"""The `fewstep` command; subcommands import what they need when they run, so that `--help` is quick."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fewstep.lab import editing, export, targets
from fewstep.lab.cluster.commands import add_commands
from fewstep.lab.datasets.commands import add_commands as add_data
from fewstep.lab.measuring.commands import add_commands as add_measuring
from fewstep.lab.profile.commands import add_commands as add_profile

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes; USAGE is every mistake of the user's

KINDS = {
    "evaluate": "measure the models of an experiment, first making those that are missing",
    "report": "write an experiment's report, first doing what it needs",
}

ALIKE = {"evaluate": "compare"}  # kind -> one that the same command stands for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. A mistake of the user's is one line on stderr; FEWSTEP_TRACEBACK=1 shows where it was found."""
    args = _arguments(_parser(), arguments)
    try:
        return int(args.command(args, Console(highlight=False)))
    except (ValueError, FileNotFoundError) as error:  # what the packages raise for wrong input
        return _say(error, USAGE)
    except (RuntimeError, OSError) as error:
        if type(error).__module__.startswith("fewstep") or isinstance(error, OSError):
            return _say(error, FAILED)
        raise
    except KeyboardInterrupt:
        return INTERRUPTED


def _arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments; `key=value` may stand before and after options, which argparse alone does not allow."""
    args, rest = parser.parse_known_args(arguments)
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if rest and (stray or not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(stray or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    args.words = list(sys.argv[1:] if arguments is None else arguments)
    return args


def _say(error: Exception, code: int) -> int:
    if os.environ.get("FEWSTEP_TRACEBACK"):
        raise error
    print(f"fewstep: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fewstep", description="Diffusion models in 1 to 8 network evaluations.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="walk an experiment's stages: skip the finished, go on with the half done")
    _experiment_arguments(run)
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run.set_defaults(command=_run)
    for kind, text in KINDS.items():
        command = commands.add_parser(kind, help=text)
        _experiment_arguments(command)
        command.set_defaults(command=_run_kind, kind=kind, grid=False)
        if kind == "evaluate":
            command.add_argument("--grid", action="store_true", help="measure a grid of w x steps instead")
            text = "jobs that share the sets of a grid, with cluster=slurm; the stages before it must be done"
            command.add_argument("--shards", type=int, default=1, help=text)
        else:
            text = "folder of a page that compares runs, given in place of an experiment: fewstep report RUN [RUN ...]"
            command.add_argument("--out", default="comparison", metavar="DIR", help=text)
            command.set_defaults(command=_report)
    add_commands(commands)
    add_profile(commands)
    add_data(commands)
    add_measuring(commands)
    targets_parser = commands.add_parser("targets", help="compute a stage's teacher targets once, to train on them")
    targets.add_arguments(targets_parser)
    targets_parser.set_defaults(command=targets.command)
    _sample_parser(commands.add_parser("sample", help="sample from a saved model"))
    editing.add_commands(commands)
    exporting = commands.add_parser("export", help="write a saved model as a folder of diffusers")
    export.add_arguments(exporting)
    exporting.set_defaults(command=export.command)
    return parser


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="folder with config.yaml, e.g. experiments/digits")
    # The default is what makes argparse call them optional.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="any key of the config, or group=choice"
    )
    parser.add_argument("--strict", action="store_true", help="take warnings for errors")


def _sample_parser(parser: argparse.ArgumentParser) -> None:
    from fewstep.lab import sample

    sample.add_arguments(parser)
    parser.set_defaults(command=sample.command)


def _run(args: argparse.Namespace, console: Console) -> int:
    from fewstep.lab.cluster.monitor import refuse_submitted
    from fewstep.lab.compose import compose
    from fewstep.lab.runner import run_experiment

    config = compose(args.experiment, args.overrides)
    refuse_submitted(Path(config.out))
    return run_experiment(config, until=args.until, strict=args.strict, console=console)


def _report(args: argparse.Namespace, console: Console) -> int:
    """The page of an experiment or, of folders of runs and measurements, one page that compares them."""
    runs = [args.experiment, *(word for word in args.overrides if "=" not in word)]
    if len(runs) == 1 and (Path(args.experiment) / "config.yaml").is_file():
        return _run_kind(args, console)
    from fewstep.lab.config import ConfigError
    from fewstep.lab.report import read_runs, write_runs

    if len(runs) <= len(args.overrides):
        raise ConfigError(f"{args.overrides[-1]}: must be left out: runs are compared as they are")
    console.print(str(write_runs(read_runs([Path(run) for run in runs]), Path(args.out))), markup=False)
    return 0


def _run_kind(args: argparse.Namespace, console: Console) -> int:
    """Run up to the last stage of the kind that the command is named after, or of one like it."""
    from fewstep.lab.cluster.monitor import refuse_submitted
    from fewstep.lab.compose import compose, compose_grid
    from fewstep.lab.config import ConfigError
    from fewstep.lab.grid_array import submit_grid
    from fewstep.lab.record import ancestry, is_done
    from fewstep.lab.runner import run_experiment
    from fewstep.lab.sample import check_shards, require
    from fewstep.lab.validate import stage_order

    config = (compose_grid if args.grid else compose)(args.experiment, args.overrides)
    shards = getattr(args, "shards", 1)
    check_shards(shards, config.cluster)
    require(shards == 1 or args.grid, "--shards", shards, "1 without --grid")
    kinds = ("grid",) if args.grid else (args.kind, ALIKE.get(args.kind))
    found = [name for name in stage_order(config) if config.stages[name].kind in kinds]
    if not found:
        raise ConfigError(f"stages: {args.experiment} has no stage of kind {args.kind}")
    if shards > 1:
        return submit_grid(config, found[-1], shards, console, args.words)
    first = [name for name in ancestry(config, found[-1])[:-1] if not is_done(Path(config.out) / name)]
    if first:
        console.print(f"{found[-1]} needs first: {', '.join(first)} (not done in {config.out})")
    refuse_submitted(Path(config.out))
    return run_experiment(config, until=found[-1], strict=args.strict, console=console)
