"""A teacher that is there already: read from a checkpoint, and from here on like one that was trained."""

from fewstep.lab.context import StageContext
from fewstep.lab.latents import give_autoencoder
from fewstep.lab.pretrained import read_checkpoint
from fewstep.lab.sources import digests, write_source
from fewstep.models import save
from fewstep.schedules import Trained


def run(ctx: StageContext) -> None:
    """Write `model/`, float32, and `source.json`, the checksums of what it was made from."""
    found = digests(ctx.stage)
    denoiser = read_checkpoint(ctx.stage, ctx.config.data.image_size).float()
    denoiser.trained = Trained("teacher")
    save(denoiser, ctx.out / "model")
    give_autoencoder(ctx.config, ctx.out / "model")
    write_source(ctx.out, ctx.stage, found)
