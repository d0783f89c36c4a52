"""The autoencoder of `space: latent` that is there already, and the latents of the training images."""

from fewstep.lab.context import StageContext
from fewstep.lab.data import load_data
from fewstep.lab.latents import FOLDER, decode, encode, read_autoencoder, write_latents
from fewstep.lab.sources import digests, write_source
from fewstep.lab.stages.autoencoder import error, say

TRIED = 500  # held-out images that go there and back, at most


def run(ctx: StageContext) -> None:
    """Write `model/`, float32, `latents/`, `reconstruction.json`, and `source.json`, the checksums of what was read."""
    found, data = digests(ctx.stage), load_data(ctx.config.data)
    autoencoder = read_autoencoder(ctx.stage, ctx.config.data.image_size).to(ctx.device)
    autoencoder.save(ctx.out / "model")
    write_latents(ctx.out / FOLDER / "train", autoencoder, data.train, ctx.stage.chunk, ctx.stopping)
    tried = data.heldout.first(TRIED)
    images = next(tried.batches(TRIED))
    say(ctx, {"rmse": {"heldout": error(decode(autoencoder, encode(autoencoder, images)).clamp(-1, 1), tried, TRIED)}})
    write_source(ctx.out, ctx.stage, found)
