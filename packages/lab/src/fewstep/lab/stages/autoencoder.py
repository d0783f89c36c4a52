"""The autoencoder of `space: latent`, and the latents of the data set."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.lab import distributed
from fewstep.lab.autoencoding import AutoencoderTraining
from fewstep.lab.checkpoint import write_text
from fewstep.lab.config import AutoencoderConfig, Config
from fewstep.lab.context import StageContext
from fewstep.lab.data import Split, load_data
from fewstep.lab.evaluation.alignment import scores, shares
from fewstep.lab.latents import FOLDER, decode, means, read_latents, write_latents
from fewstep.lab.stages.fit import fit, seed_everything
from fewstep.models import Autoencoder

Found = dict[str, Any]


def run(ctx: StageContext) -> None:
    """Train it; writes `model/`, scaled to latents of unit variance, `latents/`, and `reconstruction.json`.

    That holds the RMSE of round trips and, of captioned shapes, the share of captions that still hold after one.
    """
    stage, seed = ctx.stage, seed_everything(ctx)
    autoencoder = build(ctx.config, stage).to(ctx.device)
    fit(ctx, AutoencoderTraining(autoencoder, stage.error, stage.kl), seed=seed)
    if distributed.is_main():
        _finish(ctx, autoencoder.eval())
    distributed.barrier()


def build(config: Config, stage: AutoencoderConfig) -> Autoencoder:
    """A freshly initialised one for the experiment's images."""
    return Autoencoder(
        config.data.image_size, config.data.channels, stage.latent_channels, stage.channels, stage.channel_mult,
        stage.blocks,
    )  # fmt: skip


def _finish(ctx: StageContext, autoencoder: Autoencoder) -> None:
    data, chunk = load_data(ctx.config.data), ctx.stage.chunk
    autoencoder.normalise(torch.cat(list(means(autoencoder, data.train.batches(chunk)))).to(ctx.device))
    autoencoder.save(ctx.out / "model")
    splits = {"train": data.train, "heldout": data.heldout}
    for name, split in splits.items():
        write_latents(ctx.out / FOLDER / name, autoencoder, split, chunk)
    trips = {name: _round_trips(ctx.out / FOLDER / name, autoencoder, split, chunk) for name, split in splits.items()}
    found: Found = {"rmse": {name: error(trips[name], split, chunk) for name, split in splits.items()}}
    if ctx.config.data.name == "captioned_shapes" and data.heldout.captions is not None:
        found["alignment"] = shares(scores(data.heldout.captions, trips["heldout"]))
    say(ctx, found)


def say(ctx: StageContext, found: Found) -> None:
    """Write `reconstruction.json`, and a line of it on the console."""
    text = f"{ctx.stage.name}  round trip of held-out images: RMSE {found['rmse']['heldout']:.4f} of pixels in [-1, 1]"
    if "alignment" in found:
        text += f", captions hold of {found['alignment']['all']['share']:.1%}"
    write_text(ctx.out / "reconstruction.json", json.dumps(found) + "\n")
    ctx.console.print(text, highlight=False)


def _round_trips(folder: Path, autoencoder: Autoencoder, split: Split, chunk: int) -> Tensor:
    """What becomes of the images through the latents of them that are kept in `folder`, in [-1, 1]."""
    kept = read_latents(folder, split, autoencoder.digest)
    return torch.cat([decode(autoencoder, latents) for latents in kept.batches(chunk)]).clamp(-1, 1)


def error(made: Tensor, split: Split, chunk: int) -> float:
    """Root of the mean squared pixel error."""
    parts = zip(made.split(chunk), split.batches(chunk), strict=True)
    return math.sqrt(sum(float((one - other).double().square().sum()) for one, other in parts) / made.numel())
