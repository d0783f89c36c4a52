"""`fewstep sample`: images from a saved model, as a PNG grid and as tensors."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console

from fewstep.lab.config import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fewstep.lab.cluster.config import ClusterConfig
    from fewstep.lab.sampling import SampleSpec
    from fewstep.models import Autoencoder, NetworkDenoiser
    from fewstep.schedules import Denoiser

MOST_COLUMNS = 20  # of a grid with a column per class
MODEL = "e.g. runs/digits/halve/steps_4/model"  # what --model is, in a few words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fewstep sample`."""
    parser.add_argument("--model", required=True, metavar="DIR", help=MODEL)
    add_drawing(parser, num=100)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for grid.png and samples.safetensors")
    parser.add_argument("--png", action="store_true", help="also write every image as its own PNG")
    add_cluster(parser)
    parser.add_argument("--strict", action="store_true", help="refuse a w or sampler that it was not trained for")


def add_drawing(parser: argparse.ArgumentParser, num: int) -> None:
    """What is drawn from the model, by default `num` images; read by `spec_of`."""
    parser.add_argument("--steps", type=int, help="sampling steps; a student of a few steps takes its own alone")
    weight = "guidance weight; 0 is none (scale is 1 + w); default: 1, or 0 for a student distilled without w"
    parser.add_argument("--w", type=float, help=weight)
    number = "number of images; torchrun takes --num for its own, so there it is --number"
    parser.add_argument("--num", "--number", type=int, default=num, help=number)
    parser.add_argument("--classes", default="", metavar="LIST", help="e.g. 0-9 or 3,5,7, taken in turn; default: all")
    add_prompts(parser)
    parser.add_argument("--sampler", help="ddim, stochastic, dpmpp_2m, heun, ancestral; default: what the model is for")
    parser.add_argument("--seed", type=int, default=0, help="sample i is a function of the seed and i alone")
    parser.add_argument("--chunk", type=int, default=250, help="images sampled at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Options of work that falls into shards."""
    parser.add_argument("--shards", type=int, default=1, help="jobs that share the work, with cluster=slurm")
    parser.add_argument("overrides", nargs="*", default=[], metavar="cluster=...", help="where to: see docs/slurm.md")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Options of every command that makes images of models with text."""
    said = "what the image is to show, of a model that takes text; repeat it for several, taken in turn"
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=said)
    parser.add_argument("--prompts", metavar="FILE", help="more of them, one per line")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="refused: guidance leads away from the empty prompt")


def command(args: argparse.Namespace, console: Console) -> int:
    """Sample as the arguments say.

    Raises:
        ConfigError: an argument that cannot be, such as steps that a student was not trained for; with --strict also a
            w outside its range or a sampler that it was not trained for.
        ValueError, FileNotFoundError: a model folder that is damaged or missing.
    """
    import torch

    from fewstep.lab.cluster.choice import chosen
    from fewstep.lab.distributed import pick_device
    from fewstep.lab.evaluation.zoo import with_guidance
    from fewstep.lab.inpainting import as_generator
    from fewstep.lab.latents import autoencoder_of
    from fewstep.lab.sampling import begin_sampling, misuse
    from fewstep.models import load

    for name in ("num", "chunk"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "1 or more")
    device = pick_device(args.device)
    network = load(args.model, device)
    spec = spec_of(args, network)
    cluster = chosen(args.overrides)
    check_shards(args.shards, cluster)
    autoencoder = autoencoder_of(Path(args.model), device)
    denoiser = as_generator(with_guidance(network, spec.w), autoencoder)
    if cluster.kind == "slurm":
        with misuse(console, args.strict):
            begin_sampling(denoiser, network, spec, device)
        return _send(args, spec, cluster, console)
    with misuse(console, args.strict):
        made = list(sample(denoiser, spec, args.num, device, console))
    images = torch.cat(decoded(autoencoder, made, console)).clamp(-1, 1)
    write(Path(args.out), images, spec, args.model, every_image=args.png)
    console.print(f"{Path(args.out) / 'grid.png'}  {Path(args.out) / 'samples.safetensors'}")
    return 0


def _send(args: argparse.Namespace, spec: SampleSpec, cluster: ClusterConfig, console: Console) -> int:
    """Have a job array make them."""
    from fewstep.lab.cluster.arrays import submit_shards
    from fewstep.lab.sample_shards import Collecting, Samples, Sampling

    out = Path(args.out).absolute()
    samples = Samples(str(Path(args.model).absolute()), spec, args.num, str(out), args.device)
    then = Collecting(samples, args.png)
    return submit_shards(cluster, out, args.shards, Sampling(samples), console, command=args.words, then=then)


def spec_of(args: argparse.Namespace, network: NetworkDenoiser) -> SampleSpec:
    """What is to be sampled, every argument checked against the model."""
    from fewstep.lab.sampling import SAMPLERS, SampleSpec, own_sampler
    from fewstep.models import Network

    sampler = args.sampler or own_sampler(network.trained)
    require(sampler in SAMPLERS, "--sampler", sampler, f"one of {', '.join(SAMPLERS)}")
    w, steps = weight_for(args.w, network), steps_for(args.steps, args.model, network)
    shape = cast(Network, network.network).input_shape
    classes = parse_classes(args.classes, cast(Network, network.network).num_classes)
    prompts = prompts_for(args, network)
    return SampleSpec(sampler, steps, w, args.seed, 0, shape, classes, args.chunk, prompts=prompts)


def prompts_for(args: argparse.Namespace, network: NetworkDenoiser) -> tuple[str, ...]:
    """Those of --prompt, then those of --prompts; none for a model without text.

    Raises:
        ConfigError: a model without text is given one, one with text none or a negative one, or the file cannot be read
            or is empty.
    """
    found = list(args.prompt)
    away = "left out: guidance leads away from the empty prompt, and students have learned no other way"
    require(args.negative_prompt is None, "--negative-prompt", args.negative_prompt, away)
    if args.prompts is not None:
        try:
            lines = Path(args.prompts).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {args.prompts}: must be a file of one prompt per line ({error})") from error
        require(bool(lines), "--prompts", args.prompts, "a file with at least one line")
        found += lines
    check_prompts(found, network, "--prompt", "given, or --prompts FILE", "--model", args.model)
    return tuple(found)


def check_prompts(
    found: list[str], network: NetworkDenoiser, option: str, right: str, model: str, folder: str
) -> None:
    """Raise ConfigError for prompts without a model that takes text, or such a model without prompts or encoder.

    option gives the prompts, `right` says what it must be; model is the option that gives `folder`, the network's.
    """
    if not network.takes_text:
        return require(not found, option, "", "left out: this model takes no text")
    require(bool(found), option, "", f"{right}: this model takes text ('' is no text)")
    require(network.text_encoder is not None, model, folder, "one that was saved with its text encoder")


def weight_for(asked: float | None, network: NetworkDenoiser) -> float:
    """The weight asked for; else 1, or 0 for a student that was distilled for no other.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    without = network.trained is not None and network.trained.kind == "moments" and not network.takes_guidance
    w = asked if asked is not None else (0.0 if without else 1.0)
    require(w >= 0 and math.isfinite(w), "--w", w, "0 (no guidance) or more")
    return w


def steps_for(asked: int | None, folder: str, network: NetworkDenoiser) -> int:
    """Those asked for: any number of a teacher or a stage-one model, a student's own of a student."""
    trained = network.trained and network.trained.steps
    if asked is None and trained is None:
        raise ConfigError(f"--steps: {folder} needs it; only a student of a few steps knows its number")
    if asked is not None:
        require(asked >= 1, "--steps", asked, "1 or more")
        right = f"{trained} or left out: {folder} was trained for {trained} steps"
        require(trained in (None, asked), "--steps", asked, right)
    return asked or cast(int, trained)


def parse_classes(text: str, num_classes: int | None, option: str = "--classes") -> tuple[int, ...]:
    """ "0-3,7" as (0, 1, 2, 3, 7); "" as every class, or as none for an unconditional model.

    Raises:
        ConfigError: no such list, or a class that the model does not know.
    """
    if num_classes is None:
        require(not text, option, text, "left out: this model is unconditional")
        return ()
    found: list[int] = []
    for part in text.split(",") if text else [f"0-{num_classes - 1}"]:
        low, _, high = part.strip().partition("-")
        fits = low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low)
        require(fits, option, text, "a list such as 0-9 or 3,5,7")
        found += range(int(low), int(high or low) + 1)
    for index in found:
        require(index < num_classes, option, text, f"within 0-{num_classes - 1}: this model has no class {index}")
    return tuple(found)


def sample(denoiser: Denoiser, spec: SampleSpec, num: int, device: torch.device, console: Console) -> Iterator[Tensor]:
    """Samples 0, ..., num - 1 in chunks (B, C, H, W), with progress."""
    from fewstep.lab.progress import SamplingProgress
    from fewstep.lab.sampling import timed_chunk

    with SamplingProgress(console, num) as progress:
        for start, stop in spec.ranges(num):
            shard = timed_chunk(denoiser, spec, start, stop, device)
            progress.advance(f"{spec.sampler} {spec.steps} w={spec.w:g}", stop - start, 1, shard.seconds)
            yield shard.images
        console.print(f"{num} images, {num / max(progress.seconds, 1e-9):,.0f} images/s")


def decoded(autoencoder: Autoencoder | None, made: list[Tensor], console: Console) -> list[Tensor]:
    """The chunks as images (B, C, H, W), not clamped; what decoding cost is said beside what sampling did."""
    from fewstep.lab.latents import decode

    if autoencoder is None:
        return made
    began = time.perf_counter()
    images = [decode(autoencoder, latents) for latents in made]
    seconds = max(time.perf_counter() - began, 1e-9)
    console.print(f"decoded at {sum(map(len, images)) / seconds:,.0f} images/s, which the speed above leaves out")
    return images


def write(out: Path, images: Tensor, spec: SampleSpec, model: str, *, every_image: bool) -> None:
    """Write grid.png, a column per class or prompt, samples.safetensors, and if asked to `images/00000.png` etc."""
    from fewstep.lab.checkpoint import write_tensors
    from fewstep.lab.pictures import enlarged, tile, to_bytes, write_png

    out.mkdir(parents=True, exist_ok=True)
    pixels = to_bytes(images)
    turns = len(spec.prompts or spec.classes)
    columns = turns if 1 < turns <= MOST_COLUMNS else math.ceil(math.sqrt(len(images)))
    write_png(out / "grid.png", tile(enlarged(pixels), min(columns, len(images))))
    tensors = {"images": images, "seeds": spec.seeds(0, len(images))}
    labels = spec.labels(0, len(images))
    if labels is not None:
        tensors["classes"] = labels
    write_tensors(out / "samples.safetensors", tensors, {"sample": json.dumps({"model": model, **asdict(spec)})})
    if every_image:
        (out / "images").mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            write_png(out / "images" / f"{i:05d}.png", image)


def require(holds: bool, option: str, value: object, right: str) -> None:
    """Raise ConfigError, naming option and value, unless it holds; `right`: what the value must be."""
    if not holds:
        raise ConfigError(f"{option}{f' {value}' if value != '' else ''}: must be {right}")


def check_shards(shards: int, cluster: ClusterConfig) -> None:
    """Raise ConfigError for shards that would mean nothing: less than 1, or more than 1 without a cluster."""
    require(shards >= 1, "--shards", shards, "1 or more")
    right = f"1 with cluster={cluster.kind}, where one process does all; add cluster=slurm for an array"
    require(shards == 1 or cluster.kind == "slurm", "--shards", shards, right)
