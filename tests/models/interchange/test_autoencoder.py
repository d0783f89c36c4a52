"""AutoencoderKL as the autoencoder of a run: latents and images are those of diffusers' own, scaled as pipelines do."""

import json
from pathlib import Path

import pytest
import torch
from diffusers_models import vae

from fewstep.models import Autoencoder, DiffusersAutoencoder, load_autoencoder

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_and_images_are_those_of_a_pipeline(shift: float | None, tmp_path: Path) -> None:
    """Unscaled latents are a teacher's noise at another level: nothing that it was trained on."""
    model = vae(shift_factor=shift)
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    autoencoder = DiffusersAutoencoder.read(tmp_path / "pipeline", 16)
    with torch.no_grad():
        found, theirs = autoencoder.encode(IMAGES), model.encode(IMAGES).latent_dist
        latents = (theirs.mean - (shift or 0.0)) * model.config.scaling_factor
        torch.testing.assert_close(found.mean, latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.std, theirs.std * model.config.scaling_factor, rtol=1e-4, atol=1e-6)
        images = model.decode(latents / model.config.scaling_factor + (shift or 0.0)).sample
        torch.testing.assert_close(autoencoder.decode(latents), images, rtol=1e-4, atol=1e-5)
    assert (autoencoder.image_shape, autoencoder.latent_shape, autoencoder.factor) == ((3, 16, 16), (4, 8, 8), 2)


def test_saved_and_loaded(tmp_path: Path) -> None:
    """By the same digest, which is what latents on disk are known by; other weights have another."""
    vae().save_pretrained(tmp_path / "vae")
    autoencoder = DiffusersAutoencoder.read(tmp_path / "vae", 16)
    autoencoder.save(tmp_path / "model")
    again = load_autoencoder(tmp_path / "model")
    assert isinstance(again, DiffusersAutoencoder)
    assert again.digest == autoencoder.digest
    with torch.no_grad():
        assert torch.equal(again.encode(IMAGES).mean, autoencoder.encode(IMAGES).mean)
        next(autoencoder.parameters()).add_(1e-3)
    assert autoencoder.digest != again.digest
    Autoencoder(16, 3, channels=8).save(tmp_path / "ours")
    assert type(load_autoencoder(tmp_path / "ours")) is Autoencoder


def test_mistakes(tmp_path: Path) -> None:
    """By the settings alone, without weights."""
    with pytest.raises(FileNotFoundError, match=r"has no vae/config.json, nor config.json of an autoencoder"):
        DiffusersAutoencoder.read(tmp_path, 16)
    vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert DiffusersAutoencoder.read(tmp_path, 16, weights=False).latent_shape == (4, 8, 8)
    with pytest.raises(ValueError, match="image_size=15 is no multiple of 2"):
        DiffusersAutoencoder.read(tmp_path, 15, weights=False)
    settings = tmp_path / "vae" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="autoencoder class 'VQModel' is unknown: use AutoencoderKL"):
        DiffusersAutoencoder.read(tmp_path, 16, weights=False)
    settings.write_text("[")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        DiffusersAutoencoder.read(tmp_path, 16, weights=False)
    with pytest.raises(FileNotFoundError):
        load_autoencoder(tmp_path / "nowhere")
