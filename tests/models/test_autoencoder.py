"""Autoencoder: distributions and scales against formulas, storage, and that it can learn."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_helpers import perturbed
from torch.nn import functional as F

from fewstep.models import Autoencoder, Posterior
from fewstep.models.autoencoder import ConvBlock
from fewstep.models.unet import Groups


def small(**overrides: object) -> Autoencoder:
    torch.manual_seed(0)
    autoencoder = Autoencoder(**({"image_size": 8, "in_channels": 1, "latent_channels": 2, "channels": 8} | overrides))
    perturbed(autoencoder)
    return autoencoder.eval()


def images(count: int = 64) -> torch.Tensor:
    """Smooth 8x8 images: two numbers each."""
    a, b = torch.rand(2, count, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ramp = torch.linspace(-1, 1, 8)
    return a * ramp[:, None] * 0.5 + b * ramp[None] * 0.5


def test_block_formula() -> None:
    """Norm, SiLU and convolution twice, and what goes past them; at first nothing but that."""
    block = ConvBlock(8, 16, Groups(32, 4)).double()
    x = torch.randn(2, 8, 4, 4).double()
    past = F.conv2d(x, block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x), past)
    perturbed(block, std=0.3)
    h = F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias, block.norm1.eps))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    h = F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, block.norm2.eps))
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(block(x), F.conv2d(x, block.skip.weight, block.skip.bias) + h)


@torch.no_grad()
def test_normalised_latents_have_unit_variance_and_decode_to_the_same() -> None:
    """A diffusion model's schedule is made for unit variance; the decoder must undo the scale exactly."""
    autoencoder, x = small(), images()
    before, noise = autoencoder.encode(x), torch.randn(64, 2, 2, 2)
    decoded = autoencoder.decode(before.sample(noise))
    assert (before.mean.std() - 1).abs() > 0.1
    for _ in range(2):  # a second time changes nothing
        autoencoder.normalise(autoencoder.encode(x).mean)
        after = autoencoder.encode(x)
        values = after.mean.transpose(0, 1).flatten(1)
        torch.testing.assert_close(values.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(values.std(1), torch.ones(2), rtol=1e-4, atol=0)
        torch.testing.assert_close(autoencoder.decode(after.sample(noise)), decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.std / before.std, (1 / autoencoder.scale).expand_as(after.std))


def test_posterior_sample() -> None:
    """The reparameterisation: mean and spread as stated, gradients through both."""
    mean, std = (torch.full((20_000, 1), value, requires_grad=True) for value in (2.0, 0.5))
    z = Posterior(mean, std).sample(torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)))
    assert abs(float(z.detach().mean()) - 2.0) < 0.02
    assert abs(float(z.detach().std()) - 0.5) < 0.02
    z.sum().backward()
    assert mean.grad.abs().sum() > 0
    assert std.grad.abs().sum() > 0


def test_learns_a_round_trip() -> None:
    """Images of two numbers through latents of two channels: the error must fall to a fraction, gradients reach all."""
    torch.manual_seed(0)
    autoencoder, x = Autoencoder(8, 1, 2, channels=8), images()
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=5e-3)
    for _ in range(60):
        made, posterior = autoencoder(x, torch.randn(64, 2, 2, 2))
        kl = 0.5 * (posterior.mean**2 + posterior.std**2 - 1 - 2 * posterior.std.log()).mean()
        loss = F.l1_loss(made, x) + 1e-3 * kl
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        error = (autoencoder.decode(autoencoder.encode(x).mean) - x).square().mean().sqrt()
    assert error < 0.35 * x.std()


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Bit for bit, the scale included: latents of one and the decoder of another would be a picture of noise."""
    autoencoder, x = small(), images(4)
    autoencoder.normalise(autoencoder.encode(images()).mean.detach())
    autoencoder.save(tmp_path / "model")
    again = Autoencoder.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again.encode(x).mean, autoencoder.encode(x).mean)
        assert torch.equal(again.decode(torch.ones(1, 2, 2, 2)), autoencoder.decode(torch.ones(1, 2, 2, 2)))
    assert (again.config, again.digest) == (autoencoder.config, autoencoder.digest)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    again.scale.mul_(1.5)
    assert again.digest != autoencoder.digest


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """One wrong bit in a decoder spoils every image that is made with it."""
    small().save(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged or is not the file .* \(SHA-256 differs\)"):
        Autoencoder.load(tmp_path / "model")
    weights.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        Autoencoder.load(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    small().save(tmp_path / "model")
    config.write_text(config.read_text().replace('"channels": 8', '"channels": 16'))
    with pytest.raises(ValueError, match=r"does not describe an autoencoder: .*size mismatch"):
        Autoencoder.load(tmp_path / "model")
    config.write_text(config.read_text().replace("fewstep-autoencoder", "fewstep-denoiser"))
    with pytest.raises(ValueError, match="holds no fewstep-autoencoder of this version: 'fewstep-denoiser' 1"):
        Autoencoder.load(tmp_path / "model")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        Autoencoder.load(tmp_path / "model")


def test_sizes_that_do_not_fit() -> None:
    """Before any compute, with the size that is right."""
    with pytest.raises(ValueError, match="image_size=10 does not halve 2 times"):
        small(image_size=10)
    with pytest.raises(ValueError, match=r"takes images of \(channels, height, width\) = \(1, 8, 8\), got"):
        small().encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"takes latents of \(channels, height, width\) = \(2, 2, 2\), got"):
        small().decode(torch.zeros(1, 2, 4, 4))
