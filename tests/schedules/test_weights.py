"""Loss weights on the x-error: each equals the plain squared error of the quantity that it is named after."""

import pytest
import torch

from fewstep.schedules import Cosine, Karras, edm_weight, flat, from_x, loss_weight, snr, snr_plus_one, truncated_snr
from fewstep.schedules.prediction import Prediction

T = torch.tensor([0.1, 0.4, 0.5, 0.8], dtype=torch.float64)


def errors(prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors of `prediction` and of x between two estimates at the same z, per sample."""
    schedule = Cosine()
    generator = torch.Generator().manual_seed(0)
    z, one, two = (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    difference = from_x(one, z, T, schedule, prediction) - from_x(two, z, T, schedule, prediction)
    return difference.square().mean(1), (one - two).square().mean(1)


def test_snr_is_the_error_of_eps_and_snr_plus_one_that_of_v() -> None:
    log_snr = Cosine().log_snr(T)
    for weight, prediction in ((snr, "eps"), (snr_plus_one, "v")):
        wanted, x_error = errors(prediction)  # type: ignore[arg-type]  # literals through a tuple
        torch.testing.assert_close(weight(log_snr) * x_error, wanted, rtol=1e-10, atol=0)


def test_truncated_snr_is_the_larger_of_two_errors() -> None:
    """The papers' code takes max(x error, eps error) per sample."""
    eps_error, x_error = errors("eps")
    torch.testing.assert_close(
        truncated_snr(Cosine().log_snr(T)) * x_error, torch.maximum(eps_error, x_error), rtol=1e-10, atol=0
    )


def test_edm_weight_is_edms() -> None:
    """lambda(sigma) = (sigma^2 + 0.25) / (0.5 sigma)^2 of arXiv 2206.00364, also where sigma is 0.002 or 80."""
    schedule = Karras()
    t = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)
    _, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(
        edm_weight(schedule.log_snr(t)), (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-12, atol=0
    )


def test_weights_never_compute_in_half_precision() -> None:
    """exp(12) overflows float16: the loss would be infinite at the clean end."""
    for name in ("snr", "truncated_snr", "snr_plus_one", "edm_weight", "flat"):
        weight = loss_weight(name)(torch.tensor([12.0, -3.0], dtype=torch.float16))
        assert weight.dtype == torch.float32
        assert weight.isfinite().all()
    assert (flat(torch.tensor([12.0, -3.0])) == 1).all()


def test_unknown_weight_is_named() -> None:
    with pytest.raises(ValueError, match="weight='snrtrunc' is unknown; known: snr, truncated_snr"):
        loss_weight("snrtrunc")
