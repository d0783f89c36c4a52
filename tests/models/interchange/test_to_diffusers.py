"""to_diffusers: what diffusers makes of the folder is what `samplers.ddim` makes of the denoiser."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers_models import ddpm, dit, null_text, text, text_unet, unet
from model_helpers import perturbed

from fewstep.models import DiT, NetworkDenoiser, UNet, from_diffusers, load, save, to_diffusers, with_guidance_input
from fewstep.samplers import ddim
from fewstep.schedules import Cosine, Discrete, Karras, RectifiedFlow, Trained

CLOSE = {"rtol": 0, "atol": 1e-4}
UNIFORM = {"channel_mult": (1, 1), "groups": 4, "channels": 16}  # one number of groups, as UNet2DModel has


def ours(schedule: Any = None, prediction: str = "v", **overrides: Any) -> NetworkDenoiser:
    network = UNet.from_preset("debug", **(UNIFORM | overrides))
    perturbed(network)
    return NetworkDenoiser(network, schedule or Cosine(), prediction).eval()


def guided(form: str, denoiser: NetworkDenoiser) -> NetworkDenoiser:
    student = with_guidance_input(denoiser, form, w_range=(0.0, 9.0))
    perturbed(student, seed=3)
    return student


def noise(denoiser: NetworkDenoiser, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *denoiser.network.input_shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def scheduled(folder: Path, z: torch.Tensor, steps: int, **conditions: Any) -> torch.Tensor:
    """The loop of diffusers' pipelines, on the network and the scheduler that lie in the folder."""
    index = json.loads((folder / "model_index.json").read_text())
    part = "unet" if "unet" in index else "transformer"
    model = getattr(diffusers, index[part][1]).from_pretrained(folder / part)
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = model(z, timestep=t.expand(len(z)), **conditions).sample[:, : z.shape[1]]
        z = scheduler.step(output, t, z).prev_sample
    return z


def guidance_embedding(w: float, batch: int) -> torch.Tensor:
    """What StableDiffusionPipeline gives as `timestep_cond` for guidance_scale = 1 + w, time_cond_proj_dim = 256."""
    frequencies = torch.exp(torch.arange(128) * -(torch.log(torch.tensor(10000.0)) / 127))
    angles = torch.full((batch, 1), w) * 1000.0 * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("make", ["epsilon", "v_prediction", "sample", "ours", "ours, eps on indices"])
def test_ddim_pipeline(make: str, steps: int, tmp_path: Path) -> None:
    """diffusers' own pipeline, read from the folder: noise in, images out."""
    if make == "ours":
        denoiser, steps = ours(num_classes=None), 16 if steps == 20 else steps
    elif make == "ours, eps on indices":
        network = ours(num_classes=None).network
        denoiser = NetworkDenoiser(network, Discrete(ddpm().alphas_cumprod), "eps", time_input="index").eval()
    else:
        denoiser = from_diffusers(unet(num_class_embeds=None), ddpm(make))
    to_diffusers(denoiser, tmp_path / "out")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(2), num_inference_steps=steps, output_type="pt").images
    expected = ddim(denoiser, noise(denoiser), steps)
    assert expected.std() > 0.05
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("w", [0.0, 7.5])
def test_text_student_takes_guidance_scale(steps: int, w: float, tmp_path: Path) -> None:
    """w as the pipeline embeds guidance_scale - 1: off by the one, or by an order of sines and cosines, it would be
    another picture."""
    student = guided("diffusers", from_diffusers(text_unet(), ddpm(), null_text=null_text()))
    to_diffusers(student, tmp_path / "out")
    images = scheduled(tmp_path / "out", noise(student), steps, encoder_hidden_states=text(2),
                       timestep_cond=guidance_embedding(w, 2))  # fmt: skip
    expected = ddim(student, noise(student), steps, {"text": text(2)}, w=w)
    torch.testing.assert_close(images, expected, **CLOSE)
    assert (expected - ddim(student, noise(student), steps, {"text": text(2)}, w=w + 1)).abs().max() > 1e-2
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_lcm_scheduled(tmp_path: Path) -> None:
    """One step of LCM's scheduler is one of DDIM's; its first index must be the last that was trained on."""
    student = guided("diffusers", from_diffusers(text_unet(), ddpm("v_prediction")))
    to_diffusers(student, tmp_path / "out", scheduler="lcm")
    images = scheduled(tmp_path / "out", noise(student), 1, encoder_hidden_states=text(2),
                       timestep_cond=guidance_embedding(2.0, 2))  # fmt: skip
    torch.testing.assert_close(images, ddim(student, noise(student), 1, {"text": text(2)}, w=2.0), **CLOSE)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    few = from_diffusers(text_unet(), ddpm(num_train_timesteps=84))
    to_diffusers(few, tmp_path / "few", scheduler="lcm")
    images = scheduled(tmp_path / "few", noise(few), 1, encoder_hidden_states=text(2))
    torch.testing.assert_close(images, ddim(few, noise(few), 1, {"text": text(2)}), **CLOSE)


def test_dit_pipeline(tmp_path: Path) -> None:
    """diffusers' pipeline splits the learned variance off itself; the weights must still hold it."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(latent_channels=3, block_out_channels=(4,), norm_num_groups=2).eval()
    denoiser = from_diffusers(dit(num_embeds_ada_norm=1000), ddpm())
    to_diffusers(denoiser, tmp_path / "out")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([3, 999], 1.0, torch.Generator().manual_seed(2), 4, output_type="pt").images
    latents = ddim(denoiser, noise(denoiser), 4, torch.tensor([3, 999]))
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, **CLOSE)


FIXED: dict[str, Callable[[], NetworkDenoiser]] = {
    "UNet": ours,
    "UNet2DModel": lambda: from_diffusers(unet(), ddpm()),
    "DiTTransformer2DModel": lambda: from_diffusers(dit(), ddpm()),
}


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_w(kind: str, tmp_path: Path) -> None:
    """Where diffusers has no input for w, one w goes into the weights, exactly; the student itself is left alone."""
    student, y = guided("diffusers", FIXED[kind]()), torch.tensor([1, 4])
    before = ddim(student, noise(student), 4, y, w=3.0)
    to_diffusers(student, tmp_path / "out", w=3.0)
    images = scheduled(tmp_path / "out", noise(student), 4, class_labels=y)
    torch.testing.assert_close(images, before, **CLOSE)
    assert torch.equal(ddim(student, noise(student), 4, y, w=3.0), before)
    assert (ddim(student, noise(student), 4, y, w=0.0) - before).abs().max() > 1e-2


def test_there_and_back(tmp_path: Path) -> None:
    """A UNet that was exported and wrapped again is the same denoiser, through save and load too."""
    denoiser = ours(prediction="x")
    to_diffusers(denoiser, tmp_path / "out")
    save(from_diffusers(tmp_path / "out"), tmp_path / "model")
    again, y = load(tmp_path / "model"), torch.tensor([1, 10])
    for steps in (1, 8):
        expected = ddim(denoiser, noise(denoiser), steps, y)
        torch.testing.assert_close(ddim(again, noise(denoiser), steps, y), expected, **CLOSE)
    assert int(again.null_cond) == 10


def student_of(kind: str, steps: int) -> NetworkDenoiser:
    denoiser = ours()
    denoiser.trained = Trained(kind, steps)
    return denoiser


REFUSED: dict[str, Callable[[], NetworkDenoiser]] = {
    r"form 'normalized' cannot be exported": lambda: guided("normalized", ours()),
    r"form 'normalized' cannot be exported:": lambda: guided("normalized", FIXED["UNet2DModel"]()),
    r"form 'normalized' cannot be .*; distil": lambda: guided("normalized", from_diffusers(text_unet(), ddpm())),
    r"has no input for w: give the w": lambda: guided("diffusers", ours()),
    r"UNet2DModel has no input for w": lambda: guided("diffusers", FIXED["UNet2DModel"]()),
    r"UNet with patch=2 cannot be exported": lambda: ours(patch=2, attention=()),
    r"UNet with inpainting=True cannot": lambda: ours(inpainting=True),
    r"one number of groups, not \[4, 8, 12, 16\]": lambda: ours(groups=32, channel_mult=(1, 2)),
    r"DiT cannot be exported: its positions .*; these can: UNet, UNet2DModel":
        lambda: NetworkDenoiser(DiT.from_preset("debug"), Cosine(), "v"),
    r"RectifiedFlow.* is not variance preserving": lambda: ours(RectifiedFlow()),
    r"Karras.* is not variance preserving": lambda: ours(Karras()),
    r"prediction 'flow' cannot be exported: use one of eps, v, x": lambda: ours(prediction="flow"),
    r"student of kind 'stochastic' cannot be exported": lambda: student_of("stochastic", 4),
    r"student of kind 'encoder' cannot be exported": lambda: student_of("encoder", 4),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_diffusers_has_no_place_for_is_refused(message: str, tmp_path: Path) -> None:
    """By name, with nothing written: a folder that loads and paints something else is worse than none."""
    with pytest.raises(ValueError, match=message):
        to_diffusers(REFUSED[message](), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    """A w that is dropped, or a scheduler that no pipeline of this network has."""
    with pytest.raises(ValueError, match=r"w=1.0 cannot be fixed: this network takes none"):
        to_diffusers(ours(), tmp_path / "out", w=1.0)
    with pytest.raises(ValueError, match=r"w=1.0 cannot be fixed: this UNet2DModel takes none"):
        to_diffusers(FIXED["UNet2DModel"](), tmp_path / "out", w=1.0)
    for w in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"w={w:g}: must be finite and >= 0, within the trained \[0, 9\]"):
            to_diffusers(guided("diffusers", ours()), tmp_path / "out", w=w)
    with pytest.warns(UserWarning, match=r"w=12 lies outside the range \[0, 9\] that the student was trained for"):
        to_diffusers(guided("diffusers", ours()), tmp_path / "far", w=12.0)
    with pytest.raises(ValueError, match=r"scheduler 'lcm' of UNet2DModel is unknown: use 'ddim'"):
        to_diffusers(ours(), tmp_path / "out", scheduler="lcm")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        to_diffusers(ours(), tmp_path / "file")


def test_steps_that_do_not_divide_the_indices_warn(tmp_path: Path) -> None:
    """diffusers then rounds the times of a student that knows its own alone."""
    denoiser = from_diffusers(unet(), ddpm())
    denoiser.trained = Trained("deterministic", 16)
    with pytest.warns(UserWarning, match="16 steps do not divide 1000 indices"):
        to_diffusers(denoiser, tmp_path / "out")
