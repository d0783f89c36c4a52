"""The autoencoder's training: its loss against torch.distributions, its draws against the batch they are in."""

import argparse

import pytest
import torch
from lab_configs import altered, digits
from model_helpers import perturbed
from torch.distributions import Normal, kl_divergence

from fewstep.lab.autoencoding import AutoencoderTraining, divergence
from fewstep.lab.config import ConfigError, NetworkConfig
from fewstep.lab.editing import check_same_latents
from fewstep.lab.networks import build_denoiser
from fewstep.models import Autoencoder, Posterior


def small() -> Autoencoder:
    torch.manual_seed(0)
    autoencoder = Autoencoder(8, 1, 2, channels=8)
    perturbed(autoencoder)
    return autoencoder


def test_divergence_is_torchs() -> None:
    """A missing half or log would let the latents shrink, or their spread vanish."""
    mean, std = torch.randn(5, 2, 3, 3), torch.rand(5, 2, 3, 3) + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(divergence(Posterior(mean, std)), expected)


@pytest.mark.parametrize(("error", "power"), [("l1", 1), ("l2", 2)])
def test_loss_is_the_error_of_sampled_latents_and_the_divergence(error: str, power: int) -> None:
    """Round trips of the means alone would leave the decoder helpless around them."""
    autoencoder = small()
    method = AutoencoderTraining(autoencoder, error, 0.25)
    x, seeds = torch.rand(4, 1, 8, 8), torch.arange(4)
    batch = method.draw(x, None, seeds, 0)
    loss, logs = method.loss(batch, 0)
    posterior = autoencoder.encode(x)
    made = autoencoder.decode(posterior.mean + posterior.std * batch.noise)
    torch.testing.assert_close(loss, (made - x).abs().pow(power).mean() + 0.25 * divergence(posterior))
    assert set(logs) == {"loss", "error", "kl"}
    alone = method.draw(x[2:3], None, seeds[2:3], 7)  # a function of the sample's seed, not of who stands beside it
    assert torch.equal(alone.noise, batch.noise[2:3])
    assert batch.noise.std() > 0.5


def test_an_encoder_with_another_autoencoder_is_refused() -> None:
    """Its latents would be decoded by a decoder that never met them."""
    args, ours, other = argparse.Namespace(encoder="a", decoder="b"), small(), small()
    check_same_latents(args, ours, other)
    check_same_latents(args, None, None)
    other.scale.mul_(2)
    for theirs in (other, None):
        with pytest.raises(ConfigError, match=r"--encoder a: must be of the autoencoder that b has, by its SHA-256"):
            check_same_latents(args, ours, theirs)


def test_a_students_own_network_predicts_what_its_teacher_does() -> None:
    """After a conversion the experiment's `prediction` is the first teacher's, not the one that is distilled."""
    config = altered(digits(), "prediction", "eps")
    assert build_denoiser(config, NetworkConfig(preset="debug")).prediction == "eps"
    assert build_denoiser(config, NetworkConfig(preset="debug"), "v").prediction == "v"
