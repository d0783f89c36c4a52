"""`fewstep profile kernels` and `fewstep profile model` on the command line."""

from __future__ import annotations

import argparse

from rich.console import Console


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `profile` with its two kinds to the subcommands of `fewstep`."""
    profile = commands.add_parser("profile", help="times of kernels and of whole networks beside PyTorch's own")
    kinds = profile.add_subparsers(metavar="KIND", required=True)
    of_kernels(kinds.add_parser("kernels", help="time, floor and error of every operation by every backend"))
    of_model(kinds.add_parser("model", help="steps of a network, where their time goes, traces for Perfetto"))


def of_kernels(parser: argparse.ArgumentParser) -> None:
    """Options of `fewstep profile kernels`."""
    for name, text in (
        ("op", "operation, e.g. group_norm_silu"), ("shape", "part of a shape's name, e.g. adm64/32x32"),
        ("dtype", "bf16, fp16 or fp32"), ("backend", "triton, cuda, reference, eager, compile, flash, ..."),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", action="append", default=[], help=f"only this {text}; may be repeated")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try it out")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop; the most telling shapes come first")
    parser.add_argument("--from", dest="source", metavar="FILE", help="show this results file and measure nothing")
    parser.add_argument("--out", default="runs/profile/kernels", metavar="DIR", help="for results, tables and figures")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and no tables")
    parser.set_defaults(command=_kernels)


def of_model(parser: argparse.ArgumentParser) -> None:
    """Options of `fewstep profile model`."""
    parser.add_argument("model", metavar="PRESET|PATH", help="UNet/imagenet64, DiT/imagenet64, ... or a saved model")
    parser.add_argument("--backend", default="auto", help="held against PyTorch's operators: auto, triton, cuda, ...")
    parser.add_argument("--batch", type=int, default=8, help="images of a training step and of targets")
    parser.add_argument("--dtype", default=None, help="bf16 or fp32; default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long each figure is timed")
    parser.add_argument("--compile", action="store_true", help="also time both through torch.compile")
    parser.add_argument("--out", default="runs/profile/model", metavar="DIR", help="for traces, tables and figures")
    parser.add_argument("--json", action="store_true", help="print JSON and no tables")
    parser.set_defaults(command=_model)


def _kernels(args: argparse.Namespace, console: Console) -> int:
    from fewstep.lab.profile import kernels

    return kernels.command(args, console)


def _model(args: argparse.Namespace, console: Console) -> int:
    from fewstep.lab.profile import model

    return model.command(args, console)
