"""`fewstep edit`, `inpaint` and `transfer`: what saved models make of given images, as a PNG grid and as tensors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from rich.console import Console

from fewstep.lab.config import ConfigError
from fewstep.lab.sample import add_prompts, check_prompts, parse_classes, require, spec_of, steps_for, weight_for

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.models import Autoencoder, NetworkDenoiser

MOST_COLUMNS = 20  # of the grid: image above, result below
WEIGHT = "guidance weight; 0 is none (scale is 1 + w); default: 1, or 0 for a student distilled without w"


class Given(NamedTuple):
    """images (N, C, H, W) float32 in [-1, 1]; classes (N,) int64 if the file holds them."""

    images: Tensor
    classes: Tensor | None


def add_commands(commands: Any) -> None:
    """The three commands."""
    edit = commands.add_parser("edit", help="noise images part of the way, sample from there as something else")
    _model_arguments(edit)
    edit.add_argument("--strength", type=float, required=True, help="share of the steps to go back, in [0, 1]")
    edit.set_defaults(command=edit_command)
    inpaint = commands.add_parser("inpaint", help="paint images anew where a mask is white; the rest stays bit for bit")
    _model_arguments(inpaint)
    inpaint.add_argument("--mask", required=True, metavar="PNG", help="black and white, of the images' size")
    inpaint.add_argument("--strength", type=float, default=1.0, help="as in edit; 1 forgets what the mask hides")
    inpaint.set_defaults(command=inpaint_command)
    transfer = commands.add_parser("transfer", help="encode images as one class or text, decode them as another")
    transfer.add_argument("--encoder", required=True, metavar="DIR", help="an encoder's folder, or a teacher's")
    transfer.add_argument("--decoder", required=True, metavar="DIR", help="student of as many steps")
    own = "classes of the images, e.g. 3 or 0-9, taken in turn; default: those in --input"
    transfer.add_argument("--from", dest="source", default="", metavar="LIST", help=own)
    transfer.add_argument("--to", default="", metavar="LIST", help="classes to become, taken in turn; default: all")
    for option, said in (("--from-prompt", "what the images show"), ("--to-prompt", "what they are to show")):
        more = f"{said}, of models that take text; repeat it for several, taken in turn"
        transfer.add_argument(option, action="append", default=[], metavar="TEXT", help=more)
    _common_arguments(transfer)
    transfer.set_defaults(command=transfer_command)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="e.g. runs/digits/halve/steps_4/model")
    parser.add_argument("--classes", default="", metavar="LIST", help="what to become, e.g. 8 or 0-9, taken in turn")
    add_prompts(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i's noise is a function of seed and i alone")
    parser.set_defaults(sampler=None, chunk=1)  # what the model is for, and all images at once
    _common_arguments(parser)


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    images = "a PNG, a folder of them, or samples.safetensors as `fewstep sample` writes it; of the model's size"
    parser.add_argument("--input", required=True, metavar="PATH", help=images)
    parser.add_argument("--steps", type=int, help="of the whole way; a student of a few steps takes its own alone")
    parser.add_argument("--w", type=float, help=WEIGHT)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for grid.png and samples.safetensors")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--strict", action="store_true", help="refuse a w or model that it was not trained for")


def edit_command(args: argparse.Namespace, console: Console) -> int:
    """Edit as the arguments say.

    Raises:
        ConfigError, ValueError, FileNotFoundError: an argument, image or model that cannot be; nothing is written.
    """
    return _sampled(args, console, None)


def inpaint_command(args: argparse.Namespace, console: Console) -> int:
    """Inpaint as the arguments say.

    Raises:
        ConfigError, ValueError, FileNotFoundError: an argument, image or model that cannot be; nothing is written.
    """
    return _sampled(args, console, read_mask(Path(args.mask)))


def _sampled(args: argparse.Namespace, console: Console, mask: Tensor | None) -> int:
    """What `edit` and `inpaint` have in common."""
    import torch

    from fewstep.lab.distributed import pick_device
    from fewstep.lab.evaluation.zoo import with_guidance
    from fewstep.lab.inpainting import remake
    from fewstep.lab.latents import autoencoder_of
    from fewstep.lab.sampling import SAMPLERS, condition, misuse
    from fewstep.models import load
    from fewstep.schedules import seeded_noise

    device = pick_device(args.device)
    network, autoencoder = load(args.model, device), autoencoder_of(Path(args.model), device)
    given = read_images(Path(args.input), shape_of(network, autoencoder))
    spec, count = spec_of(args, network), len(given.images)
    seeds = spec.seeds(0, count)
    with misuse(console, args.strict), torch.inference_mode():
        made = remake(
            with_guidance(network, spec.w), given.images, seeded_noise(seeds, spec.shape).to(device), spec.steps,
            args.strength, condition(network, spec, 0, count, device), spec.w, mask=mask, autoencoder=autoencoder,
            sampler=SAMPLERS[spec.sampler], seeds=seeds,
        )  # fmt: skip
    return _write(args, console, given, made, spec.labels(0, count))


def transfer_command(args: argparse.Namespace, console: Console) -> int:
    """Transfer as the arguments say.

    Raises:
        ConfigError, ValueError, FileNotFoundError: an argument, image or model that cannot be, such as classes or texts
            without an encoder for them; nothing is written.
    """
    import torch

    from fewstep.lab.distributed import pick_device
    from fewstep.lab.evaluation.zoo import with_guidance
    from fewstep.lab.inpainting import as_generator
    from fewstep.lab.latents import autoencoder_of, decode, encode
    from fewstep.lab.sampling import as_condition, in_turn, misuse
    from fewstep.models import load
    from fewstep.samplers import transfer

    device = pick_device(args.device)
    encoder, decoder = load(args.encoder, device), load(args.decoder, device)
    check_encoder(args.encoder, encoder)
    autoencoder = autoencoder_of(Path(args.decoder), device)
    given = read_images(Path(args.input), shape_of(decoder, autoencoder))
    check_same_latents(args, autoencoder, autoencoder_of(Path(args.encoder), device))
    alike = shape_of(encoder) == shape_of(decoder)
    require(alike, "--encoder", args.encoder, f"for images as {args.decoder} makes them")
    w, steps = weight_for(args.w, decoder), steps_for(args.steps, args.decoder, decoder)
    check_steps(steps, args.encoder, encoder)
    count = len(given.images)
    check_prompts(args.from_prompt, encoder, "--from-prompt", "given", "--encoder", args.encoder)
    check_prompts(args.to_prompt, decoder, "--to-prompt", "given", "--decoder", args.decoder)
    source, target = source_of(args, given, encoder), classes_for(args.to, decoder, count, "--to")
    with misuse(console, args.strict), torch.inference_mode():
        own = as_condition(encoder, source, in_turn(args.from_prompt, 0, count), device)
        other = as_condition(decoder, target, in_turn(args.to_prompt, 0, count), device)
        back, forth = (as_generator(with_guidance(each, w), autoencoder) for each in (encoder, decoder))
        made = transfer(back, forth, encode(autoencoder, given.images).to(device), steps, own, other, w)
    return _write(args, console, given, decode(autoencoder, made.float().cpu()), target)


def check_same_latents(args: argparse.Namespace, ours: Autoencoder | None, theirs: Autoencoder | None) -> None:
    """Refuse an encoder whose latents, or pixels, the decoder does not know."""
    alike = (ours and ours.digest) == (theirs and theirs.digest)
    require(alike, "--encoder", args.encoder, f"of the autoencoder that {args.decoder} has, by its SHA-256")


def check_encoder(folder: str, network: NetworkDenoiser) -> None:
    """Refuse a student that was distilled for anything but encoding."""
    trained = network.trained
    fits = trained is None or trained.steps is None or trained.kind == "encoder"
    require(fits, "--encoder", folder, f"an encoder, a stage-one model or a teacher, not {trained and trained.kind!r}")


def check_steps(steps: int, folder: str, network: NetworkDenoiser) -> None:
    """Refuse an encoder that was distilled to other steps than are taken."""
    trained = network.trained and network.trained.steps
    require(trained in (None, steps), "--encoder", folder, f"of {steps} steps, as many as are taken, not {trained}")


def source_of(args: argparse.Namespace, given: Given, encoder: NetworkDenoiser) -> Tensor | None:
    """The classes (N,) that the images are encoded as."""
    known = num_classes(encoder)
    if args.source or known is None:
        return classes_for(args.source, encoder, len(given.images), "--from")
    if given.classes is None:
        raise ConfigError(f"--from: needed, {args.input} does not say of which classes its images are")
    most = int(given.classes.max())
    require(most < known, "--input", args.input, f"of classes 0-{known - 1}: {args.encoder} has no class {most}")
    return given.classes


def shape_of(network: NetworkDenoiser, autoencoder: Autoencoder | None = None) -> tuple[int, int, int]:
    """(C, H, W) of what a model works on or, given its autoencoder, of its images."""
    from fewstep.models import Network

    if autoencoder is not None:
        return autoencoder.image_shape
    return cast(Network, network.network).input_shape


def num_classes(network: NetworkDenoiser) -> int | None:
    """Number of classes that a model knows; None for an unconditional one."""
    from fewstep.models import Network

    return cast(Network, network.network).num_classes


def classes_for(text: str, network: NetworkDenoiser, count: int, option: str) -> Tensor | None:
    """Classes (count,) int64 of a list in turn; None for an unconditional model."""
    import torch

    found = parse_classes(text, num_classes(network), option)
    return torch.tensor(found)[torch.arange(count) % len(found)] if found else None


def read_images(path: Path, shape: tuple[int, int, int]) -> Given:
    """Images of a PNG, of a folder of them in the order of their names, or of `samples.safetensors`.

    Raises:
        ConfigError: nothing there, or images of another size than `shape` (C, H, W).
    """
    import torch

    if path.suffix == ".safetensors":
        given = _read_samples(path)
    else:
        files = sorted(path.glob("*.png")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"--input {path}: must be a PNG, a folder with some, or a .safetensors file")
        given = Given(torch.stack([read_png(file, shape[0]) for file in files]), None)
    found = tuple(given.images.shape[1:])
    require(found == shape, "--input", path, f"images of (channels, height, width) = {shape}, not {found}")
    return given


def _read_samples(path: Path) -> Given:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        return Given(tensors["images"].float(), tensors.get("classes"))
    except (SafetensorError, KeyError) as error:
        raise ConfigError(f"--input {path}: holds no images as `fewstep sample` writes them ({error})") from error


def read_png(path: Path, channels: int) -> Tensor:
    """A picture as (channels, H, W) float32 in [-1, 1]: grey for 1 channel, else RGB.

    Raises:
        ConfigError: no picture.
    """
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{path}: no picture that can be read ({error})") from error
    levels = torch.from_numpy(pixels.copy()).div_(127.5).sub_(1)
    return levels[None] if channels == 1 else levels.permute(2, 0, 1).contiguous()


def read_mask(path: Path) -> Tensor:
    """A black and white picture as (1, 1, H, W): 1 where it is white. Any grey is left for `inpaint` to refuse."""
    return ((read_png(path, 1) + 1) / 2)[None]


def _write(args: argparse.Namespace, console: Console, given: Given, made: Tensor, classes: Tensor | None) -> int:
    """Write grid.png (the first images, results below them) and samples.safetensors (all)."""
    import torch

    from fewstep.lab.checkpoint import write_tensors
    from fewstep.lab.pictures import enlarged, tile, to_bytes, write_png

    out, images = Path(args.out), made.float().cpu().clamp(-1, 1)
    out.mkdir(parents=True, exist_ok=True)
    columns = min(MOST_COLUMNS, len(images))
    pairs = torch.cat([given.images[:columns], images[:columns]])
    write_png(out / "grid.png", tile(enlarged(to_bytes(pairs)), columns))
    tensors = {"images": images, "inputs": given.images}
    if classes is not None:
        tensors["classes"] = classes
    settings = {name: value for name, value in vars(args).items() if name != "command"}
    write_tensors(out / "samples.safetensors", tensors, {"made_by": json.dumps(settings)})
    console.print(f"{out / 'grid.png'}  {out / 'samples.safetensors'}")
    return 0
