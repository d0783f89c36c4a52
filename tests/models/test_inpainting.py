"""Networks for inpainting: what they are given, guided, distilled and saved like any other."""

from pathlib import Path

import pytest
import torch
from model_helpers import batch, denoiser, tiny
from torch import Tensor

from fewstep.models import GuidedDenoiser, load, save, with_guidance_input
from fewstep.samplers import inpaint

KINDS = pytest.mark.parametrize("kind", ["UNet", "DiT"])
MASK = torch.zeros(3, 1, 8, 8)
MASK[:, :, :, 4:] = 1


def cond(y: Tensor) -> dict[str, Tensor]:
    return {"y": y, "mask": MASK, "masked_image": torch.linspace(-1, 1, 192).reshape(3, 1, 8, 8) * (1 - MASK)}


@KINDS
def test_mask_and_masked_image_are_inputs(kind: str) -> None:
    """An input that never reaches the first layer leaves the model blind to what it is to continue."""
    network = tiny(kind, inpainting=True)
    z, t, y = batch()
    given = cond(y)
    for key in ("mask", "masked_image"):
        given[key] = given[key].clone().requires_grad_()
    network(z, 1000 * t, given).square().sum().backward()
    assert given["masked_image"].grad.abs().amax((1, 2, 3)).min() > 0
    assert given["mask"].grad.abs().amax((1, 2, 3)).min() > 0
    assert (network(z, 1000 * t, given) - network(z, 1000 * t, {**given, "mask": 1 - MASK})).abs().max() > 1e-3


@KINDS
def test_guidance_drops_the_class_and_keeps_the_mask(kind: str) -> None:
    """A null branch without the mask would be pulled away from the picture that is to be continued."""
    teacher = denoiser(kind, inpainting=True)
    z, t, y = batch()
    guided = GuidedDenoiser(teacher, teacher.null_cond)
    assert guided.takes_mask
    free = {**cond(y), "y": torch.full_like(y, teacher.network.num_classes)}
    expected = 3 * teacher(z, t, cond(y)) - 2 * teacher(z, t, free)
    torch.testing.assert_close(guided(z, t, cond(y), 2.0), expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_inpaint_gives_them_and_keeps_known_pixels(kind: str, tmp_path: Path) -> None:
    """From a saved student, through the sampler: its own inputs, and what is known bit for bit."""
    student = with_guidance_input(denoiser(kind, inpainting=True))
    save(student, tmp_path / "model")
    loaded = load(tmp_path / "model")
    z, _, y = batch()
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    made = inpaint(loaded, x, z, 2, 1.0, y, 1.0, mask=MASK)
    assert torch.equal(made[..., :4], x[..., :4])
    first = loaded(z + 0, torch.ones(3), {"y": y, "mask": MASK, "masked_image": x * (1 - MASK)}, 1.0)
    once = inpaint(loaded, x, z, 1, 1.0, y, 1.0, mask=MASK)
    torch.testing.assert_close(once[..., 4:], first[..., 4:], rtol=0, atol=1e-3)  # alpha at t = 1 is 5e-5, not 0


@KINDS
def test_networks_without_it_are_what_they_were(kind: str) -> None:
    """Weights saved before must load; and another model's masks in cond are none of a plain network's business."""
    network = tiny(kind)
    assert not network.takes_mask
    z, t, y = batch()
    assert torch.equal(network(z, t, cond(y)), network(z, t, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"cond\['mask'\] must have shape \(3, 1, 8, 8\), got nothing"),
        ({"mask": MASK[:, :, :4]}, r"cond\['mask'\] .* got \(3, 1, 4, 8\)"),
        ({"masked_image": MASK.expand(3, 2, 8, 8)}, r"cond\['masked_image'\] .* got \(3, 2, 8, 8\)"),
    ],
)
def test_bad_input(change: dict[str, Tensor | None], message: str) -> None:
    """Named, before a convolution complains about channels."""
    z, t, y = batch()
    with pytest.raises(ValueError, match=message):
        tiny("UNet", inpainting=True)(z, t, {**cond(y), **change})
    with pytest.raises(ValueError, match=r"cond\['mask'\]"):
        tiny("UNet", inpainting=True)(z, t, y)
