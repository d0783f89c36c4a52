"""Encoders against reverse DDIM on the guided teacher: latents, round trips and style transfer of held-out images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.config import InvertConfig
from fewstep.lab.context import Interrupted
from fewstep.lab.metrics import Target, class_accuracy
from fewstep.samplers import ddim, encode
from fewstep.schedules import Denoiser

Row = dict[str, Any]
DISTILLED, DDIM = "distilled", "ddim"


@dataclass(frozen=True)
class Bridge:
    """A way there and back: `steps` of reverse DDIM on `encoder`, `steps` of DDIM on `decoder`.

    nfe: network evaluations of both ways together, per image, by w.
    """

    method: str
    steps: int
    encoder: Denoiser
    decoder: Denoiser
    two_branches: bool

    def nfe(self, w: float) -> int:
        """Network evaluations per image, both ways together; w = 0 is no guidance (guidance scale is 1 + w)."""
        return 2 * self.steps * (2 if self.two_branches and w else 1)


@dataclass(frozen=True)
class Crossed:
    """What a bridge makes of images: latents, images back under their own class and under another (N, C, H, W)."""

    latents: Tensor
    back: Tensor
    moved: Tensor


def other_classes(labels: Tensor, num_classes: int) -> Tensor:
    """For each image a class that is not its own, all differences in turn. Shape: (N,) -> (N,)."""
    return (labels + 1 + torch.arange(len(labels), device=labels.device) % (num_classes - 1)) % num_classes


@torch.inference_mode()
def cross(bridge: Bridge, x: Tensor, labels: Tensor, targets: Tensor, w: float, chunk: int) -> Crossed:
    """Take images over the bridge, `chunk` at once, with clip=None; latents in units of N(0, I).

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
    """
    scale = bridge.encoder.schedule.init_noise_scale
    parts = []
    for images, own, other in zip(*(torch.split(whole, chunk) for whole in (x, labels, targets)), strict=True):
        z = encode(bridge.encoder, images, bridge.steps, own, w)
        back, moved = (ddim(bridge.decoder, None, bridge.steps, y, w, z=z) for y in (own, other))
        parts.append((z / scale, back, moved))
    return Crossed(*(torch.cat(pieces).cpu() for pieces in zip(*parts, strict=True)))


def rmse(a: Tensor, b: Tensor) -> float:
    """Root mean square difference over all images and pixels."""
    return float((a.double() - b.double()).square().mean().sqrt())


def measure(
    bridges: list[Bridge],
    truth: Bridge,
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    judge: Callable[[Tensor], Tensor],
    options: InvertConfig,
    stopping: Callable[[], bool],
) -> Iterator[tuple[Row, Crossed]]:
    """A row for the truth and for each bridge at every w, with what it made.

    latent_rmse: to the truth's latents. round_trip_rmse: to the images themselves. transfer_rmse: to the truth's images
    of the other class; transfer_accuracy: share that the judge (logits of images) takes for that class.

    Raises:
        Interrupted: `stopping` said so.
    """
    targets = other_classes(labels, num_classes)
    for w in options.weights:
        exact = cross(truth, x, labels, targets, w, options.chunk)
        for bridge in (truth, *bridges):
            if stopping():
                raise Interrupted("invert: stopped between two measurements; they are made again")
            made = exact if bridge is truth else cross(bridge, x, labels, targets, w, options.chunk)
            yield {
                "method": bridge.method,
                "steps": bridge.steps,
                "w": w,
                "nfe": bridge.nfe(w),
                "latent_rmse": rmse(made.latents, exact.latents),
                "round_trip_rmse": rmse(made.back, x.cpu()),
                "transfer_rmse": rmse(made.moved, exact.moved),
                "transfer_accuracy": class_accuracy(judge(made.moved.clamp(-1, 1)), targets),
            }, made


def verdicts(rows: list[Row], options: InvertConfig) -> Iterator[Target]:
    """The encoder's latent and round-trip error over those of DDIM on the teacher, at the headline's steps."""
    if options.at_most is None:
        return
    for w in options.weights:
        pair = [
            next(row for row in rows if row["w"] == w and row["method"] == method and row["steps"] == options.headline)
            for method in (DISTILLED, DDIM)
        ]
        for key, name in (("latent_rmse", "latent RMSE"), ("round_trip_rmse", "round-trip RMSE")):
            what = f"{name} of the encoder over DDIM inversion's, {options.headline} steps, w = {w:g}"
            yield Target(what, pair[0][key] / pair[1][key], options.at_most)
