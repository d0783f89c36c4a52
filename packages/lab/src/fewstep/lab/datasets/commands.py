"""`fewstep data check` and `fewstep data fetch` on the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

FAILED = 1


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` with its two verbs to the subcommands of `fewstep`."""
    data = commands.add_parser("data", help="look at data, or bring a published set")
    verbs = data.add_subparsers(metavar="VERB", required=True)
    check = verbs.add_parser("check", help="count, sizes, classes, unreadable files by name (then it exits with 1)")
    check.add_argument("path", metavar="PATH", help="MNIST, CIFAR-10, folders of images, or WebDataset shards")
    check.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: cores")
    check.set_defaults(command=_check)
    fetch = verbs.add_parser("fetch", help="bring a published set over the network, its checksum tested")
    fetch.add_argument("name", metavar="NAME", help="cifar10 or mnist")
    fetch.add_argument("path", metavar="PATH", help="folder to bring it to")
    fetch.set_defaults(command=_fetch)


def _check(args: argparse.Namespace, console: Console) -> int:
    from fewstep.lab.datasets.inspect import inspect

    with console.status("") as status:
        found = inspect(Path(args.path), args.workers, lambda done, count: status.update(f"{done} of {count} images"))
    for line in found.lines():
        console.print(line, markup=False, soft_wrap=True)
    return FAILED if found.unreadable else 0


def _fetch(args: argparse.Namespace, console: Console) -> int:
    from fewstep.lab.datasets.fetch import fetch

    brought = fetch(args.name, Path(args.path))
    console.print(", ".join(map(str, brought)) or f"{args.path} has it already", markup=False, soft_wrap=True)
    return 0
