"""Training of the autoencoder, as a method for `fewstep.lab.train`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.distill import Batch
from fewstep.lab.one_network import OneNetwork
from fewstep.models import Autoencoder, Posterior
from fewstep.schedules import Cond, seeded_noise

ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


class AutoencoderTraining(OneNetwork):
    """Mean error of a round trip through sampled latents plus `kl` times the mean KL to N(0, I) per latent number.

    arXiv 2112.10752, section 3.1, without its perceptual and adversarial terms: images are small here.
    """

    def __init__(self, autoencoder: Autoencoder, error: str, kl: float):
        super().__init__("autoencoder", autoencoder)
        self._shape, self._error, self._kl = autoencoder.latent_shape, ERRORS[error], kl

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """Images as x and z, and the noise that their latents are sampled with; all times are 0."""
        noise = seeded_noise(seeds, self._shape)
        return Batch(z=x, t=torch.zeros(len(x), device=x.device), cond=cond, x=x, noise=noise, seeds=seeds)

    def loss(self, batch: Batch, step: int, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its two parts as logs. Shape: batch.z (B, C, H, W) -> ()."""
        made, posterior = self.networks["autoencoder"](batch.z, batch.noise)
        error, kl = self._error(made.float(), batch.z), divergence(posterior)
        loss = error + self._kl * kl
        return loss, {"loss": loss.detach(), "error": error.detach(), "kl": kl.detach()}


def divergence(posterior: Posterior) -> Tensor:
    """Mean over latent numbers of KL(N(mean, std^2) || N(0, 1)). Shape: -> ()."""
    mean, std = posterior.mean.float(), posterior.std.float()
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
