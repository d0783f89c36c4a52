"""The autoencoder of `space: latent`, and the latents of the data set."""

import json
from pathlib import Path

import torch

from fewstep.lab import distributed
from fewstep.lab.autoencoding import AutoencoderTraining
from fewstep.lab.checkpoint import write_text
from fewstep.lab.config import AutoencoderConfig, Config
from fewstep.lab.context import StageContext
from fewstep.lab.data import Split, load_data
from fewstep.lab.latents import FOLDER, decode, means, write_latents
from fewstep.lab.stages.fit import fit, seed_everything
from fewstep.models import Autoencoder


def run(ctx: StageContext) -> None:
    """Train it; writes `model/`, scaled to latents of unit variance, `latents/`, and `reconstruction.json` (RMSE)."""
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
    autoencoder.normalise(torch.cat(list(means(autoencoder, data.train.images, chunk))).to(ctx.device))
    autoencoder.save(ctx.out / "model")
    splits = {"train": data.train, "heldout": data.heldout}
    for name, split in splits.items():
        write_latents(ctx.out / FOLDER / name, autoencoder, split.images, chunk)
    found = {name: _error(autoencoder, split, chunk) for name, split in splits.items()}
    _say(ctx.out, found)
    text = f"{ctx.stage.name}  round trip of held-out images: RMSE {found['heldout']:.4f} of pixels in [-1, 1]"
    ctx.console.print(text, highlight=False)


def _error(autoencoder: Autoencoder, split: Split, chunk: int) -> float:
    """Root of the mean squared pixel error of a round trip through the means."""
    made = torch.cat([decode(autoencoder, latents) for latents in means(autoencoder, split.images, chunk)])
    return float((made.clamp(-1, 1) - split.images).square().mean().sqrt())


def _say(out: Path, found: dict[str, float]) -> None:
    write_text(out / "reconstruction.json", json.dumps({"rmse": found}) + "\n")
