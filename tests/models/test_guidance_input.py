"""with_guidance_input: exactly the conditional branch at first, trainable afterwards, and what networks say to w."""

import copy

import pytest
import torch
from model_helpers import batch, denoiser, perturbed, tiny

from fewstep.models import GuidedDenoiser, Network, NetworkDenoiser, with_guidance_input

KINDS = pytest.mark.parametrize("kind", ["UNet", "DiT"])
FORMS = pytest.mark.parametrize("form", ["normalized", "diffusers"])


def guidance_parameters(network: Network) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if name.startswith("conditioning.guidance.")}


@KINDS
@FORMS
def test_preserves_the_conditional_branch_bitwise(kind: str, form: str) -> None:
    """Distillation must start from the teacher: a copy that is off by rounding, or by w, starts elsewhere."""
    teacher = denoiser(kind)
    student = with_guidance_input(teacher, form, w_range=(0.0, 4.0))
    z, t, y = batch(4)
    expected = teacher(z, t, y)
    assert expected.std() > 0.05
    for w in (0.0, 3, torch.tensor([0.0, 0.3, 4.0, 14.0]), torch.tensor(2.0)):
        assert torch.equal(student(z, t, y, w), expected)
        assert torch.equal(student(z, t, {"y": y}, w), expected)


@KINDS
@FORMS
def test_learns_w(kind: str, form: str) -> None:
    """A zero initialisation that also blocks the gradient would leave w without effect for ever."""
    student = with_guidance_input(denoiser(kind), form)
    z, t, y = batch(4)
    new = guidance_parameters(student.network)
    student(z, t, y, torch.linspace(0, 4, 4)).square().mean().backward()
    assert new["conditioning.guidance.project.weight"].grad.abs().max() > 0
    student.zero_grad()
    perturbed(student.network.conditioning.guidance, std=0.1)
    student(z, t, y, torch.linspace(0, 4, 4)).square().mean().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()] == []
    low, high = student(z, t, y, 0.0), student(z, t, y, 4.0)
    assert (low - high).abs().flatten(1).amax(1).min() > 1e-4
    mixed = student(z, t, y, torch.tensor([0.0, 4.0, 0.0, 4.0]))
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1], low[2], high[3]]))  # each sample has its own w


@KINDS
def test_leaves_the_teacher_alone(kind: str) -> None:
    """Shared parameters would train the teacher along with its student; a frozen teacher must give a trainable copy."""
    teacher = denoiser(kind).requires_grad_(False)
    before, config = copy.deepcopy(teacher.state_dict()), copy.deepcopy(teacher.network.config)
    student = with_guidance_input(teacher)
    assert all(p.requires_grad for p in student.parameters())
    perturbed(student)
    assert config == teacher.network.config
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert student.trained.kind == "guided"
    assert student.trained.w_range == (0.0, 4.0)
    assert student.schedule == teacher.schedule
    assert not student.training


def test_copies_dtype() -> None:
    """New parameters in float32 inside a float64 network would fail at the first product."""
    teacher = denoiser("UNet").double()
    z, t, y = batch(dtype=torch.float64)
    assert torch.equal(with_guidance_input(teacher)(z, t, y, 2.0), teacher(z, t, y))


@KINDS
def test_w_without_guidance_input(kind: str) -> None:
    """A dropped w gives unguided images under the name of guided ones."""
    plain = denoiser(kind)
    z, t, y = batch()
    assert torch.equal(plain(z, t, y, 0), plain(z, t, y))
    assert torch.equal(plain(z, t, y, 0.0), plain(z, t, y, None))
    for w in (1.0, torch.ones(3), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"has no guidance input, so w = .* cannot be applied"):
            plain(z, t, y, w)


@KINDS
@FORMS
def test_guided_student_needs_w(kind: str, form: str) -> None:
    """w=None is no guidance elsewhere; a student would have to guess."""
    student = with_guidance_input(denoiser(kind), form)
    z, t, y = batch()
    with pytest.raises(ValueError, match=r"give w \(w = 0 is no guidance\)"):
        student(z, t, y)
    with pytest.raises(ValueError, match=r"w must have shape \(3,\)"):
        student(z, t, y, torch.ones(3, 1))


@FORMS
def test_w_reaches_through_wrappers(form: str) -> None:
    """Behind DistributedDataParallel and its like w was silently dropped elsewhere, and attributes are not visible."""
    student = with_guidance_input(denoiser("UNet"), form)
    perturbed(student.network.conditioning.guidance, std=0.1)
    wrapped = NetworkDenoiser(torch.nn.DataParallel(student.network), student.schedule, "v")
    z, t, y = batch()
    assert wrapped.takes_guidance
    assert torch.equal(wrapped.null_cond, student.null_cond)
    for w in (3.0, torch.tensor([0.0, 1.0, 4.0])):
        assert torch.equal(wrapped(z, t, y, w), student(z, t, y, w))
    with pytest.raises(ValueError, match="give w"):
        wrapped(z, t, y)


def test_refusals() -> None:
    """Guiding twice would apply w twice; a GuidedDenoiser's copy would hold both branches."""
    student = with_guidance_input(denoiser("UNet"))
    with pytest.raises(ValueError, match="already has a guidance input"):
        with_guidance_input(student)
    with pytest.raises(ValueError, match="already takes w"):
        GuidedDenoiser(student, student.null_cond)
    with pytest.raises(ValueError, match="without GuidedDenoiser"):
        with_guidance_input(GuidedDenoiser(denoiser("UNet"), torch.tensor(10)))
    with pytest.raises(ValueError, match="'smooth' is unknown"):
        with_guidance_input(denoiser("UNet"), "smooth")


@KINDS
def test_built_with_guidance_from_config(kind: str) -> None:
    """The form travels in the config: a network rebuilt from it must have the very parameters that were trained."""
    student = with_guidance_input(denoiser(kind), "diffusers", w_range=(2.0, 14.0)).network
    rebuilt = tiny(kind, guidance=student.config["guidance"])
    assert rebuilt.config == student.config
    rebuilt.load_state_dict(student.state_dict())
