"""Conversions between x, eps, v and flow against their definitions and diffusers' own conversion."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fewstep.schedules import Cosine, Discrete, Karras, LinearBeta, RectifiedFlow, Schedule, from_x, to_x
from fewstep.schedules.prediction import PREDICTIONS, Prediction

SCHEDULES = [
    pytest.param(s, id=type(s).__name__)
    for s in (Cosine(), LinearBeta(), Discrete(torch.linspace(0.999, 0.005, 200)), Karras(), RectifiedFlow())
]


def noised(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, eps and z_t, (B, 2, 3, 3) float64."""
    generator = torch.Generator().manual_seed(3)
    x, eps = (torch.randn(len(t), 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, eps, schedule.add_noise(x, t, eps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_true_output_of_each_kind_gives_back_x(schedule: Schedule) -> None:
    """From the definitions v = alpha eps - sigma x and flow = eps - x, for schedules of every kind."""
    t = torch.tensor([0.02, 0.3, 0.77, 0.98], dtype=torch.float64)
    x, eps, z = noised(schedule, t)
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in schedule.alpha_sigma(t))
    outputs: dict[Prediction, Tensor] = {"x": x, "eps": eps, "v": alpha * eps - sigma * x, "flow": eps - x}
    for prediction, output in outputs.items():
        torch.testing.assert_close(to_x(output, z, t, schedule, prediction), x, rtol=0, atol=1e-9)
        torch.testing.assert_close(from_x(x, z, t, schedule, prediction), output, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_round_trips_for_an_arbitrary_estimate(schedule: Schedule, prediction: Prediction) -> None:
    """Distillation targets are estimates that fit no eps; converting there and back must still be the identity."""
    t = torch.tensor([0.05, 0.3, 0.77, 0.95], dtype=torch.float64)
    _, estimate, z = noised(schedule, t)
    output = from_x(estimate, z, t, schedule, prediction)
    torch.testing.assert_close(to_x(output, z, t, schedule, prediction), estimate, rtol=0, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["x", "v", "flow"])
def test_stable_predictions_stay_exact_in_float32_at_both_ends(schedule: Schedule, prediction: Prediction) -> None:
    """x, v and flow must not divide by a vanishing alpha or sigma on the way to x (papers.md C.1: eps does)."""
    t = torch.tensor([0.0, 1e-4, 0.5, 1 - 1e-4, 1.0])
    x, eps, z = noised(schedule, t.double())
    alpha, sigma = (a.double().reshape(-1, 1, 1, 1) for a in schedule.alpha_sigma(t))
    output = {"x": x, "v": alpha * eps - sigma * x, "flow": eps - x}[prediction]
    z = alpha * x + sigma * eps
    got = to_x(output.float(), z.float(), t, schedule, prediction)
    assert (got.double() - x).abs().max() < 2e-5


@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("v", "v_prediction"), ("x", "sample")])
def test_agrees_with_diffusers(prediction: Prediction, name: str) -> None:
    """diffusers' DDIM computes x from the same outputs by its own code; models come from there."""
    ddim = DDIMScheduler(prediction_type=name, clip_sample=False)
    ddim.set_timesteps(10)
    schedule = Discrete(ddim.alphas_cumprod)
    generator = torch.Generator().manual_seed(4)
    z, output = (torch.randn(1, 3, 4, 4, generator=generator) for _ in range(2))
    for index in (1, 401, 901):
        theirs = ddim.step(output, index, z).pred_original_sample
        t = torch.full((1,), (index + 1) / 1000)
        torch.testing.assert_close(to_x(output, z, t, schedule, prediction), theirs, rtol=1e-4, atol=1e-4)


def test_half_precision_outputs_are_converted_in_float32() -> None:
    """Under autocast networks answer in bf16; alpha z - sigma v in bf16 would lose x at 3 digits."""
    schedule, t = Cosine(), torch.tensor([0.9])
    z, v = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = to_x(v, z, t, schedule, "v")
    assert got.dtype == torch.float32
    assert torch.equal(got, to_x(v.float(), z, t, schedule, "v"))


def test_unknown_prediction_is_named() -> None:
    z, t = torch.zeros(1, 1), torch.zeros(1)
    for convert in (to_x, from_x):
        with pytest.raises(ValueError, match="prediction='epsilon' is unknown; known: x, eps, v, flow"):
            convert(z, z, t, Cosine(), "epsilon")  # type: ignore[arg-type]  # the point of the test
