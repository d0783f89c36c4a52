"""What the training stages share: from a method to trained weights in a folder."""

import time
from pathlib import Path

import torch

from fewstep.distill import Method
from fewstep.lab import distributed, record
from fewstep.lab.config import ConfigError
from fewstep.lab.context import StageContext
from fewstep.lab.data import Order, Split
from fewstep.lab.inpainting import split_for
from fewstep.lab.latents import give_autoencoder
from fewstep.lab.stored import TargetStore, open_store
from fewstep.lab.train import Trainer, mix
from fewstep.models import NetworkDenoiser, load, save


def stage_seed(ctx: StageContext, *more: int) -> int:
    """The stage's own seed: two stages of a run share no noise."""
    return mix(ctx.config.seed, int.from_bytes(ctx.stage.name.encode(), "big"), *more)


def seed_everything(ctx: StageContext, *more: int) -> int:
    """Make what is initialised from now on a function of the stage alone, whatever ran before; returns `stage_seed`."""
    seed = stage_seed(ctx, *more)
    torch.manual_seed(seed)
    return seed


def fit(
    ctx: StageContext,
    method: Method,
    *,
    seed: int,
    out: Path | None = None,
    updates: int | None = None,
    label: str = "",
) -> None:
    """Train what `method` trains, or go on with it; its networks then hold the weights to keep (averages, if any).

    out, updates and label are for a stage of several trainings; by default they are the stage's own.
    """
    if ctx.instead is not None:
        return ctx.instead(method, seed)
    split = split_for(ctx.config, ctx.stage, method)
    trainer = Trainer(
        method,
        split,
        ctx.stage,
        updates=updates or ctx.stage.updates,
        seed=seed,
        out=out or ctx.out,
        device=ctx.device,
        label=label or ctx.stage.name,
        console=ctx.console,
        stopping=ctx.stopping,
        fence=ctx.fence,
        stored=_stored(ctx, method, split, seed),
        bar=ctx.config.progress,
        tensorboard=ctx.config.tensorboard,
    )
    trainer.run()
    trainer.finish()


def _stored(ctx: StageContext, method: Method, split: Split, seed: int) -> TargetStore | None:
    """The targets that `targets=PATH` of the stage holds for this training, if it does."""
    if ctx.stage.targets is None:
        return None
    order = Order(len(split), ctx.stage.batch_size, seed)
    store = open_store(Path(ctx.stage.targets), method, order, split)
    if store is None:
        text = f"{ctx.stage.name}: {ctx.stage.targets} holds no targets for this teacher, data, seed, batch size and w"
        raise ConfigError(f"{text}; make them with `fewstep targets --stage {ctx.stage.name}`")
    return store


def save_model(ctx: StageContext, denoiser: NetworkDenoiser, out: Path | None = None) -> None:
    """Write `out/model` (the stage's own by default), rounded where the config asks for it; by the first process alone,
    since all hold the same weights.
    """
    if ctx.config.weights is not None:
        round_weights(denoiser)
    if distributed.is_main():
        model = (out or ctx.out) / "model"
        save(denoiser.eval(), model)
        give_autoencoder(ctx.config, model)
    distributed.barrier()


@torch.no_grad()
def round_weights(denoiser: NetworkDenoiser) -> None:
    """Round its weights to bfloat16, in place; they stay float32."""
    for weight in denoiser.network.state_dict().values():
        if weight.is_floating_point():
            weight.copy_(weight.bfloat16())


def finish(ctx: StageContext, student: NetworkDenoiser, out: Path, began: float) -> None:
    """Write `out/model` and `out/DONE`: one of a stage's several trainings, begun at `began`, is over."""
    save_model(ctx, student, out)
    if distributed.is_main():
        record.finish(out, time.monotonic() - began)
    distributed.barrier()


def load_model(ctx: StageContext, folder: Path) -> NetworkDenoiser:
    """`folder/model` on the stage's device."""
    return load(folder / "model").to(ctx.device)


def compile_networks(ctx: StageContext, *denoisers: NetworkDenoiser) -> None:
    """Compile the networks in place where the stage asks for it; names of weights stay as they are."""
    for denoiser in denoisers if ctx.stage.compile else ():
        denoiser.network.compile()
