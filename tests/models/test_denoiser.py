"""NetworkDenoiser and GuidedDenoiser: conversions, what the network is given, one batched evaluation, bad input."""

import importlib
import math

import pytest
import torch
from emulated_cuda import emulated
from model_helpers import batch, denoiser, perturbed
from oracles import Gaussian
from torch import Tensor, nn

from fewstep.kernels import guided_update, use_backend
from fewstep.models import GuidedDenoiser, NetworkDenoiser, UNet, with_guidance_input
from fewstep.schedules import Cosine, Discrete, Karras, RectifiedFlow, expand, from_x

KINDS = pytest.mark.parametrize("kind", ["UNet", "DiT"])
PREDICTIONS = ["x", "eps", "v", "flow"]


class Recorder(nn.Module):
    """A network that answers with a given function and remembers what it was called with."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, z: Tensor, time: Tensor, cond=None, w=None) -> Tensor:
        self.calls.append((z, time, cond, w))
        return self.answer(z)


@pytest.mark.parametrize("schedule", [Cosine(), Cosine(shift=-2.0), RectifiedFlow()], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_network_gives_the_posterior_mean(schedule, prediction: str) -> None:
    """A wrong conversion, or one at other times than the schedule's, would turn a perfect network into a wrong x."""
    truth, t = Gaussian(schedule), torch.linspace(0.02, 0.98, 9).double()
    z = torch.randn(9, 1, 4, 4).double()
    network = Recorder(lambda z: from_x(truth(z, t), z, t, schedule, prediction))
    estimate = NetworkDenoiser(network, schedule, prediction)(z, t)
    torch.testing.assert_close(estimate, truth(z, t), rtol=1e-7, atol=1e-7)


def test_variance_exploding_at_unit_scale() -> None:
    """Under Karras z grows to 80: the network must see unit variance and may predict v at unit scale.

    For data N(0, 1) the best v is zero, so the estimate must be the posterior mean z / (1 + sigma^2) at every t.
    """
    schedule, t = Karras(), torch.linspace(0, 1, 9).double()
    sigma = schedule.alpha_sigma(t)[1][:, None, None, None]
    noise = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    z = torch.sqrt(1 + sigma**2) * noise
    network = Recorder(torch.zeros_like)
    torch.testing.assert_close(NetworkDenoiser(network, schedule, "v")(z, t), z / (1 + sigma**2))
    torch.testing.assert_close(network.calls[0][0], noise)
    one = NetworkDenoiser(Recorder(torch.ones_like), schedule, "v")
    expected = (z - sigma * torch.sqrt(1 + sigma**2)) / (1 + sigma**2)  # v = 1 at unit scale
    torch.testing.assert_close(one(z, t), expected)
    torch.testing.assert_close(guided_update(one.raw(z, t), z, t, None, schedule), expected)
    eps = NetworkDenoiser(Recorder(torch.ones_like), schedule, "eps")
    torch.testing.assert_close(eps(z, t), z - sigma)


def test_time_inputs() -> None:
    """A network trained with one time input answers nonsense to another."""
    t = torch.linspace(0, 1, 11)
    angle = NetworkDenoiser(Recorder(torch.zeros_like), Cosine(), "v").network_time(t)
    torch.testing.assert_close(angle, 1000 * t, rtol=0, atol=0.06)  # the angle of cos(pi t / 2) but for the bounds
    shifted = NetworkDenoiser(Recorder(torch.zeros_like), Cosine(shift=-1.4), "v")
    alpha, sigma = shifted.schedule.alpha_sigma(t.double())
    torch.testing.assert_close(torch.tan(shifted.network_time(t.double()) * math.pi / 2000), sigma / alpha)
    discrete = Discrete(torch.linspace(0.999, 0.01, 50).double())
    index = NetworkDenoiser(Recorder(torch.zeros_like), discrete, "eps", time_input="index")
    torch.testing.assert_close(index.network_time(torch.arange(1, 51) / 50), torch.arange(50.0))


@KINDS
@pytest.mark.parametrize("w", [None, 0.0, 2.5, torch.tensor([0.0, 1.0, 4.0])], ids=str)
def test_raw_says_the_same_as_the_call(kind: str, w) -> None:
    """Samplers use raw where it is offered: another result there would mean two different denoisers."""
    plain = denoiser(kind)
    guided = GuidedDenoiser(plain, plain.null_cond)
    z, t, y = batch()
    via_raw = guided_update(guided.raw(z, t, y, w), z, t, None, plain.schedule, w)
    torch.testing.assert_close(via_raw, guided(z, t, y, w), rtol=1e-5, atol=1e-5)


@KINDS
def test_guided_is_two_evaluations_in_one_call(kind: str) -> None:
    """Guidance as x_w = (1 + w) x_cond - w x_uncond, with one call of 2 B; one of B where w is None or 0."""
    plain = denoiser(kind)
    guided = GuidedDenoiser(plain, plain.null_cond)
    z, t, y = batch()
    cond_x, uncond_x = plain(z, t, y), plain(z, t, torch.full_like(y, 10))
    assert (cond_x - uncond_x).abs().max() > 1e-3
    sizes: list[int] = []
    plain.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    w = torch.tensor([0.0, 1.0, 4.0])
    per_sample = guided(z, t, y, w)
    torch.testing.assert_close(per_sample, cond_x + expand(w, z) * (cond_x - uncond_x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided(z, t, y, 4.0)[2], per_sample[2])
    assert sizes == [6, 6]
    assert torch.equal(guided(z, t, y), cond_x)
    assert torch.equal(guided(z, t, y, 0), cond_x)
    assert sizes == [6, 6, 3, 3]


def test_null_cond_dict_keeps_other_keys() -> None:
    """An inpainting mask is no condition to be dropped: the unconditional branch must see it too."""

    class Masked:
        schedule = Cosine()

        def __call__(self, z, t, cond=None, w=None):
            return cond["mask"] * (1.0 + expand(cond["y"], z)) + 0 * z

    guided = GuidedDenoiser(Masked(), {"y": torch.tensor(9)})
    mask = torch.rand(2, 1, 4, 4)
    x = guided(torch.randn(2, 1, 4, 4), torch.rand(2), {"y": torch.tensor([1, 3]), "mask": mask}, 2.0)
    expected = mask * (1 + torch.tensor([1 + 2.0 * (1 - 9), 3 + 2.0 * (3 - 9)]))[:, None, None, None]
    torch.testing.assert_close(x, expected)
    assert guided.raw(x, torch.rand(2), {"y": torch.tensor([1, 3]), "mask": mask}, 2.0).prediction == "x"


def test_null_cond_travels() -> None:
    """What stands for no condition must go where the network goes, and must not be saved with its weights."""
    plain = denoiser("UNet")
    guided = GuidedDenoiser(plain, {"y": plain.null_cond})
    assert guided.null_cond["y"].item() == 10
    assert guided.to("meta").null_cond["y"].device.type == "meta"
    assert not [name for name in guided.state_dict() if "null" in name]
    assert denoiser("UNet", num_classes=None).null_cond is None


@KINDS
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_autocast_leaves_x_in_float32(kind: str, prediction: str) -> None:
    """Conversions in bfloat16 would add noise of one part in 256 to every image."""
    plain = denoiser(kind)
    model = NetworkDenoiser(plain.network, Cosine(), prediction)
    z, t, y = batch()
    exact = model(z, t, y).detach()
    with torch.autocast("cpu", torch.bfloat16):
        output, x = model.raw(z, t, y).cond_output, model(z, t, y)
        guided = GuidedDenoiser(model, model.null_cond)(z, t, y, 2.0)
    assert output.dtype == torch.bfloat16 or prediction != "x"
    assert x.dtype == guided.dtype == torch.float32
    torch.testing.assert_close(x, exact, rtol=0.1, atol=0.05 * exact.abs().max().item())


@KINDS
def test_half_precision_weights(kind: str) -> None:
    """A network stored in bfloat16 takes float32 images and gives float32 x, without autocast."""
    model = denoiser(kind).bfloat16()
    z, t, y = batch()
    x = model(z, t, y)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, denoiser(kind)(z, t, y), rtol=0.1, atol=0.2)


@KINDS
def test_float64(kind: str) -> None:
    """float64 is how everything else is checked: a float32 step hidden inside would show as 1e-7."""
    z, t, y = batch(dtype=torch.float64)
    model = denoiser(kind).double()
    exact = model(z, t, y)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(denoiser(kind)(z.float(), t.float(), y), exact.float(), rtol=1e-3, atol=1e-4)
    coarse = model(z, t, y) - NetworkDenoiser(model.network, Cosine(), "v")(z, t.float().double(), y)
    assert 0 < coarse.abs().max() < 1e-4  # t rounded to float32 is seen: nothing rounds t (or w) before


def jvp_and_differences(kind: str, guided: bool, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The whole denoiser's derivative along random directions of z, t, w and every parameter: by jvp, and numerically.

    float64, fourth order: the two agree to 1e-6 of it. `backend` is that of the jvp.
    """
    model = denoiser(kind).double()
    if guided:
        model = with_guidance_input(model)
        perturbed(model.network.conditioning.guidance)
    z, t, y = batch(2, torch.float64)
    generator = torch.Generator().manual_seed(3)
    w = torch.tensor([0.5, 3.0], dtype=torch.float64) if guided else None
    inputs = (dict(model.named_parameters()), z, t, *(() if w is None else (w,)))
    tangents = torch.utils._pytree.tree_map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), inputs)
    tangents[2].mul_(1e-3)  # the fastest wave turns by 1570 rad per unit of t

    def estimate(p: dict[str, Tensor], z: Tensor, t: Tensor, w: Tensor | None = None) -> Tensor:
        return torch.func.functional_call(model, p, (z, t, y, w))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            return estimate(*torch.utils._pytree.tree_map(lambda a, b: a + step * b, inputs, tangents))

    with emulated(), use_backend(backend):
        _, derivative = torch.func.jvp(estimate, inputs, tangents)
    h = 1e-5
    return derivative, (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)


@KINDS
@pytest.mark.parametrize(("guided", "backend"), [(False, "auto"), (True, "auto"), (True, "triton"), (True, "cuda")])
def test_jvp_of_the_whole_network(kind: str, guided: bool, backend: str) -> None:
    """Moment matching differentiates forwards through the network: in z, t, w and in every parameter at once."""
    derivative, numeric = jvp_and_differences(kind, guided, backend)
    assert derivative.abs().max() > 0.1
    torch.testing.assert_close(derivative, numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("UNet", "fewstep.models.unet.group_norm_silu"),
        ("UNet", "fewstep.models.unet.attention_qkv"),
        ("DiT", "fewstep.models.dit.attention_qkv"),
    ],
)
def test_jvp_check_sees_an_operation_that_drops_the_tangent(
    kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused operator without a forward rule returns zero tangents and says nothing: the check above must see one."""
    module, _, name = place.rpartition(".")
    operation = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(place, lambda x, *rest, **options: operation(x.detach(), *rest, **options))
    derivative, numeric = jvp_and_differences(kind, guided=False)
    assert (derivative - numeric).abs().max() > 1e-3


@KINDS
def test_jvp_check_sees_a_dispatch_that_forgets_forward_mode(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the question a fused operator is reached, which refuses float64 or drops the tangent."""
    for name in ("forward_mode_is_on", "functional_transform_is_on"):
        monkeypatch.setattr(f"fewstep.kernels.backend.{name}", lambda: False)
    try:
        derivative, numeric = jvp_and_differences(kind, False, "triton")
    except (RuntimeError, ValueError):
        return
    assert (derivative - numeric).abs().max() > 1e-3


@KINDS
def test_gradients_reach_every_parameter(kind: str) -> None:
    """A layer that is left out of the forward pass trains nothing and nobody notices."""
    model = denoiser(kind)
    z, t, y = batch(11)
    model(z, t, y).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    rows = model.network.conditioning.classes.weight.grad.abs().amax(1)
    assert (rows > 0).all()  # the null class among them


@pytest.mark.slow
@KINDS
def test_compiles_without_graph_breaks(kind: str) -> None:
    """A check that looks into a tensor would cut the compiled network into pieces."""
    model = with_guidance_input(denoiser(kind))
    perturbed(model.network.conditioning.guidance)
    z, t, y = batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, t, y, t), model(z, t, y, t))


@KINDS
def test_samples_do_not_see_each_other(kind: str) -> None:
    """Statistics over the batch would make an image depend on its neighbours."""
    model = denoiser(kind)
    z, t, y = batch(4)
    torch.testing.assert_close(model(z, t, y)[1:3], model(z[1:3], t[1:3], y[1:3]), rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(3, 1, 16, 16)}, r"takes images of .* = \(1, 8, 8\), got z of shape \(3, 1, 16, 16\)"),
        ({"z": torch.zeros(3, 3, 8, 8)}, r"\(1, 8, 8\), got z of shape \(3, 3, 8, 8\)"),
        ({"t": torch.rand(2)}, r"time must have shape \(3,\).*got \(2,\)"),
        ({"y": None}, r"class-conditional.*\(10 is the null class\), got None"),
        ({"y": {"text": torch.zeros(3)}}, r"or a dict with key 'y'.*got a dict with keys \['text'\]"),
        ({"y": torch.tensor([0, 11, 3])}, r"class index 11 is out of range: classes are 0 to 9, null 10"),
        ({"y": torch.tensor([0, -1, 3])}, r"class index -1 is out of range"),
        ({"y": torch.tensor([0.0, 1.0, 2.0])}, r"labels y must be integers, got torch.float32"),
        ({"y": torch.tensor([0, 1])}, r"y must have shape \(3,\).*got \(2,\)"),
    ],
)
def test_wrong_calls(kind: str, change: dict, message: str) -> None:
    """Each is a one-line error that says what would be right, before any layer has run."""
    z, t, y = batch()
    call = {"z": z, "t": t, "y": y} | change
    model = denoiser(kind)
    for layer in model.network.children():
        layer.register_forward_pre_hook(lambda module, _: pytest.fail("a layer ran")) if isinstance(
            layer, nn.Conv2d | nn.Linear
        ) else None
    with pytest.raises(ValueError, match=message) as error:
        model(call["z"], call["t"], call["y"])
    assert "\n" not in str(error.value)


@KINDS
def test_unconditional_network(kind: str) -> None:
    """A class given to a network that cannot see it would be ignored."""
    model = denoiser(kind, num_classes=None)
    z, t, y = batch()
    assert torch.equal(model(z, t), model(z, t, {"mask": y}))
    with pytest.raises(ValueError, match="unconditional"):
        model(z, t, y)


def test_wrong_settings() -> None:
    """Misspelt settings would otherwise be found only when the first image is wrong."""
    network = UNet.from_preset("debug")
    with pytest.raises(ValueError, match="'epsilon' is unknown: use one of x, eps, v, flow"):
        NetworkDenoiser(network, Cosine(), "epsilon")
    with pytest.raises(ValueError, match="'time' is unknown: use one of angle, index"):
        NetworkDenoiser(network, Cosine(), "v", time_input="time")
    with pytest.raises(ValueError, match="needs a Discrete schedule, not Cosine"):
        NetworkDenoiser(network, Cosine(), "v", time_input="index")
    with pytest.raises(ValueError, match="needs null_cond"):
        GuidedDenoiser(NetworkDenoiser(network, Cosine(), "v"), None)
