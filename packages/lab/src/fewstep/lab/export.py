"""`fewstep export`: a saved model as a folder that diffusers' pipelines read."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fewstep export`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="e.g. runs/digits/halve/steps_4/model")
    parser.add_argument("--out", required=True, metavar="DIR", help="the pipeline's folder, replaced if it is there")
    parser.add_argument("--scheduler", default="ddim", help="ddim, or lcm for text-to-image models of one step")
    weight = "guidance weight to fix (scale is 1 + w), where diffusers' network has no input for it"
    parser.add_argument("--w", type=float, help=weight)


def command(args: argparse.Namespace, console: Console) -> int:
    """Export as the arguments say.

    Raises:
        ConfigError: diffusers is not installed.
        ValueError, FileNotFoundError: a model that is damaged or missing, or that diffusers has no place for.
    """
    import torch

    from fewstep.lab.config import ConfigError
    from fewstep.lab.latents import autoencoder_of
    from fewstep.models import load, to_diffusers

    try:
        denoiser, autoencoder = load(args.model), autoencoder_of(Path(args.model), torch.device("cpu"))
        to_diffusers(denoiser, args.out, scheduler=args.scheduler, w=args.w, autoencoder=autoencoder)
    except ImportError as error:
        raise ConfigError(str(error)) from error
    console.print(args.out, highlight=False)
    return 0
