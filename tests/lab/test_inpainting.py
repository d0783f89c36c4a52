"""Inpainting in the lab: masks to train with, what a model sees of an image, in training and when it is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lab_configs import EXPERIMENTS
from model_helpers import small_dit
from torch import Tensor

from fewstep.distill import DenoiserTraining, GuidanceDistillation
from fewstep.lab import inpainting
from fewstep.lab.captioned import shapes_split
from fewstep.lab.compose import compose
from fewstep.lab.config import TeacherConfig
from fewstep.lab.data import Order, Split
from fewstep.lab.inpainting import (
    MaskedSplit,
    as_generator,
    masked_latents,
    random_masks,
    remake,
    split_for,
    takes_mask,
    with_masks,
)
from fewstep.lab.shapes import World
from fewstep.lab.stored import compute
from fewstep.lab.text import Prompted, conditioned, new_encoder
from fewstep.lab.train import Trainer
from fewstep.models import Autoencoder, NetworkDenoiser, with_guidance_input
from fewstep.samplers import ddim, with_mask
from fewstep.schedules import Cosine, sample_seeds, seeded_noise

SEEDS = sample_seeds(0, 0, torch.arange(400))
SPLIT = shapes_split(World(), 0, 0, 12)
CONFIG = compose(EXPERIMENTS / "shapes_text", ["preset=debug", "space=null"])
PIXELS, LATENTS = (3, 32, 32), (2, 8, 8)
FIVE = torch.tensor([3, 1, 4, 11, 5])


def sized(channels: int, side: int) -> dict[str, Any]:
    return {"in_channels": channels, "image_size": side, "num_classes": None, "text_width": 16, "patch": side // 4}


def denoiser(shape: tuple[int, int, int], inpainting: bool = True) -> NetworkDenoiser:
    """Random weights everywhere, with a text encoder of random weights."""
    torch.manual_seed(0)
    assert CONFIG.text is not None
    assert SPLIT.captions is not None
    encoder = new_encoder(CONFIG.text, SPLIT.captions)
    network = small_dit(inpainting=inpainting, **sized(*shape[:2]))
    return NetworkDenoiser(network, Cosine(), "v", text_encoder=encoder).eval()


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    """8x8 latents of 32x32 pictures; random weights."""
    torch.manual_seed(1)
    made = Autoencoder(32, 3, 2, channels=4, channel_mult=(1, 1, 1))
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made.eval().requires_grad_(False)


@pytest.fixture
def latent(autoencoder: Autoencoder) -> MaskedSplit:
    """The split as a latent run trains an inpainting model on it."""
    latents = autoencoder.encode(SPLIT.images).mean
    inner = conditioned(Split(latents, SPLIT.labels, SPLIT.captions), denoiser(LATENTS))
    return MaskedSplit(
        images=inner.images, labels=inner.labels, inner=inner, pictures=SPLIT.images, autoencoder=autoencoder
    )


@pytest.fixture
def pixels() -> MaskedSplit:
    """The same on pictures."""
    network = denoiser(PIXELS)
    found = with_masks(conditioned(SPLIT, network), CONFIG, network)
    assert isinstance(found, MaskedSplit)
    return found


def test_masks_are_rectangles_anywhere_or_everything() -> None:
    """Of an object's size: one that is too small hides none, one that is always in the middle teaches no border."""
    masks = random_masks(SEEDS, 32)
    whole, places = 0, torch.zeros(32, 32)
    for mask in masks[:, 0]:
        rows, columns = (torch.nonzero(mask.any(axis))[:, 0] for axis in (1, 0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # nothing outside: any() found it all
        height, width = len(rows), len(columns)
        assert int(mask.sum()) == height * width
        if height == width == 32:
            whole += 1
        else:
            assert 4 <= height <= 24
            assert 4 <= width <= 24
            places += mask
    assert 75 <= whole <= 130  # 1/4 of 400
    assert places.min() > 0  # every corner is hidden by some


def test_masks_are_functions_of_seeds_alone(pixels: MaskedSplit) -> None:
    """However the batch is cut; and another visit of the same image hides another part of it."""
    together = random_masks(SEEDS, 16)
    assert torch.equal(together[7:9], random_masks(SEEDS[7:9], 16))
    one, again, other = (pixels.take(FIVE, seeds)[1]["mask"] for seeds in (SEEDS[:5], SEEDS[:5], SEEDS[5:10]))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_in_pixel_space_what_is_hidden_is_grey(pixels: MaskedSplit) -> None:
    """The image that is to be learned stays whole, its caption too."""
    x, cond = pixels.take(FIVE, SEEDS[:5])
    hidden = random_masks(SEEDS[:5], 32)
    assert torch.equal(x, SPLIT.images[FIVE])
    assert torch.equal(cond["mask"], hidden.float())
    assert torch.equal(cond["masked_image"], torch.where(hidden, torch.zeros(()), x))
    assert {"text", "text_mask"} < cond.keys()


def test_in_latent_space_nothing_tells_what_is_hidden(latent: MaskedSplit, autoencoder: Autoencoder) -> None:
    """The network would read it there and not from the prompt, and paint what stood under the mask again."""
    x, cond = latent.take(FIVE, SEEDS[:5])
    hidden = random_masks(SEEDS[:5], 32)
    assert torch.equal(x, latent.inner.images[FIVE])
    for i, j, k in ((i, j, k) for i in range(5) for j in range(8) for k in range(8)):
        cell = hidden[i, 0, 4 * j : 4 * j + 4, 4 * k : 4 * k + 4]
        assert bool(cond["mask"][i, 0, j, k]) == bool(cell.any())
    noisy = torch.where(hidden, torch.randn(PIXELS), SPLIT.images[FIVE])
    torch.testing.assert_close(masked_latents(autoencoder, noisy, hidden), cond["masked_image"])
    own = autoencoder.encode(noisy).mean - x
    beside = (cond["mask"] == 0).expand_as(own)
    assert own[beside].abs().max() > 1e-3  # the picture's own latents do tell
    assert not cond["masked_image"].requires_grad


class Recorder:
    """Takes masks, keeps what it is given."""

    takes_mask, schedule = True, Cosine()

    def __init__(self) -> None:
        self.given: list[Any] = []

    def __call__(self, z: Tensor, t: Tensor, cond: Any, w: Any = None) -> Tensor:
        self.given.append(cond)
        return torch.zeros_like(z)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_a_model_is_given_in_use_what_it_was_given_in_training(
    space: str, pixels: MaskedSplit, latent: MaskedSplit, autoencoder: Autoencoder
) -> None:
    """Other grey, another grid for the mask, or latents that are masked only after encoding would be news to it."""
    split, shape, there = (pixels, PIXELS, None) if space == "pixel" else (latent, LATENTS, autoencoder)
    _, cond = split.take(FIVE, SEEDS[:5])
    recorder, images = Recorder(), SPLIT.images[FIVE]
    mask, noise = random_masks(SEEDS[:5], 32), seeded_noise(SEEDS[:5], shape)
    made = remake(recorder, images, noise, 2, 1.0, None, None, mask=mask.float(), autoencoder=there)
    assert torch.equal(made[~mask.expand_as(made)], images[~mask.expand_as(images)])  # bit for bit
    assert not torch.equal(made, images)
    for given in recorder.given:
        for key in ("mask", "masked_image"):
            torch.testing.assert_close(given[key], cond[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_a_generator_sees_nothing(space: str, autoencoder: Autoencoder) -> None:
    """What it sees of an image that is all hidden is the same as in training, or it would be sampled as untrained."""
    shape, there = (PIXELS, None) if space == "pixel" else (LATENTS, autoencoder)
    network, everything = denoiser(shape), torch.ones(5, 1, 32, 32)
    assert network.text_encoder is not None
    text = network.text_encoder.encode(["a red circle"] * 5)
    seen = torch.zeros(5, *shape) if there is None else masked_latents(there, SPLIT.images[FIVE], everything)
    noise = seeded_noise(SEEDS[:5], shape)
    expected = ddim(network, noise, 2, with_mask(text, noise, torch.ones(1, 1, *shape[1:]), seen))
    found = ddim(as_generator(network, there), noise, 2, text)
    torch.testing.assert_close(found, expected)
    assert not takes_mask(as_generator(network, there))
    plain = denoiser(shape, inpainting=False)
    assert as_generator(plain, there) is plain
    torch.testing.assert_close(  # and so it edits
        remake(network, SPLIT.images[FIVE], noise, 4, 0.5, text, None, autoencoder=there),
        remake(as_generator(network, there), SPLIT.images[FIVE], noise, 4, 0.5, text, None, autoencoder=there),
    )


def test_guidance_drops_the_prompt_and_keeps_the_mask(pixels: MaskedSplit) -> None:
    """In the teacher's training and in stage one: else a guided student would paint over what is known."""
    network = denoiser(PIXELS)
    assert network.text_encoder is not None
    prompted = Prompted(network, network.text_encoder.requires_grad_(True))
    split = with_masks(conditioned(SPLIT, prompted), CONFIG, prompted)
    x, cond = split.take(FIVE, SEEDS[:5])
    method = DenoiserTraining(prompted, prompted.null_cond, cond_drop=1.0)
    batch = method.draw(x, cond, SEEDS[:5], 0)
    assert (batch.cond["tokens"] == prompted.null_cond["tokens"]).all()
    for key in ("mask", "masked_image"):
        assert torch.equal(batch.cond[key], cond[key])
    moved = {**batch.cond, "mask": 1 - batch.cond["mask"]}
    assert not torch.equal(prompted(batch.z, batch.t, batch.cond), prompted(batch.z, batch.t, moved))
    null = network.null_cond
    assert isinstance(null, dict)
    assert null.keys() == {"text", "text_mask"}
    student = with_guidance_input(network)
    stage_one = GuidanceDistillation(network, student, null)
    x, cond = pixels.take(FIVE, SEEDS[:5])
    batch = stage_one.draw(x, cond, SEEDS[:5], 0)
    with torch.no_grad():
        both = [
            network(batch.z, batch.t, c) for c in (cond, {**cond, **{k: v.expand_as(cond[k]) for k, v in null.items()}})
        ]
    assert batch.w is not None
    w = batch.w[:, None, None, None]
    torch.testing.assert_close(stage_one.targets(batch), (1 + w) * both[0] - w * both[1], rtol=1e-3, atol=1e-3)


def test_every_training_hides_the_same_of_the_same_place_in_the_stream(
    pixels: MaskedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run, another process or stored targets that met another mask would learn from a mixture of pictures."""
    network = denoiser(PIXELS)
    student = with_guidance_input(network)
    method = GuidanceDistillation(network, student, network.null_cond)
    monkeypatch.setattr(inpainting, "training_split", lambda *_: SPLIT)
    options = TeacherConfig(updates=3, batch_size=4)
    split = split_for(CONFIG, options, method)
    order = Order(len(split), 4, seed=5)

    def trainer(folder: str) -> Trainer:
        return Trainer(method, split, options, updates=3, seed=5, out=tmp_path / folder, device=torch.device("cpu"))

    batches = [trainer("a").draw(n) for n in (1, 2)]
    again = trainer("b").draw(2)
    assert torch.equal(batches[1].cond["mask"], again.cond["mask"])
    assert not torch.equal(batches[0].cond["mask"], batches[1].cond["mask"])
    positions = order.positions(2, rank=1, world=2)
    share = split.take(order.indices(positions), order.seeds(positions))[1]
    assert torch.equal(share["mask"], again.cond["mask"][2:])
    stored = compute(method, split, order, order.positions(2))
    torch.testing.assert_close(stored, method.targets(again))
