"""The names that the design fixes, for other people's code and notebooks."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = {
    "schedules": """Schedule Cosine LinearBeta Discrete Karras RectifiedFlow reschedule to_x from_x
        snr truncated_snr snr_plus_one edm_weight flat seeded_noise Denoiser""",
    "models": """NetworkDenoiser GuidedDenoiser UNet DiT TextEncoder Autoencoder GuidanceEmbedding with_guidance_input
        load save from_diffusers to_diffusers""",
    "samplers": "ddim stochastic ancestral heun dpmpp_2m ddim_step encode edit inpaint transfer",
    "distill": """guidance_target progressive_target stochastic_target encoder_target GuidanceDistillation
        ProgressiveDistillation EncoderDistillation MomentMatching InstantMomentMatching adam_preconditioner
        estimate_preconditioner""",
    "kernels": "group_norm_silu attention attention_qkv guided_update available_backends use_backend",
}
SAMPLER = ["denoiser", "noise", "steps", "cond", "w", "times", "z", "clip", "seeds", "callback"]
PARAMETERS = {  # beginnings of signatures that callers use by position or by name
    "samplers.ddim": SAMPLER,
    "samplers.stochastic": SAMPLER,
    "samplers.ancestral": SAMPLER,
    "samplers.heun": SAMPLER,
    "samplers.dpmpp_2m": SAMPLER,
    "samplers.ddim_step": ["x", "z", "t", "s", "schedule"],
    "samplers.encode": ["denoiser", "x", "steps", "cond", "w", "times"],
    "samplers.edit": ["denoiser", "x", "noise", "steps", "strength", "cond", "w", "sampler"],
    "samplers.inpaint": ["denoiser", "x", "noise", "steps", "strength", "cond", "w", "mask", "masked_image", "sampler"],
    "samplers.transfer": ["encoder", "decoder", "x", "steps", "cond_from", "cond_to", "w"],
    "schedules.Cosine": ["log_snr_min", "log_snr_max", "shift"],
    "schedules.Discrete": ["alphas_cumprod"],
    "schedules.reschedule": ["denoiser", "schedule"],
    "schedules.to_x": ["output", "z", "t", "schedule", "prediction"],
    "schedules.from_x": ["x", "z", "t", "schedule", "prediction"],
    "schedules.seeded_noise": ["seeds", "shape"],
    "models.NetworkDenoiser": ["network", "schedule", "prediction"],
    "models.GuidedDenoiser": ["denoiser", "null_cond"],
    "models.GuidanceEmbedding": ["form"],
    "models.with_guidance_input": ["denoiser"],
    "distill.guidance_target": ["teacher", "null_cond", "z", "t", "cond", "w"],
    "distill.progressive_target": ["teacher", "z", "t", "steps", "cond", "w"],
    "distill.stochastic_target": ["teacher", "z", "t", "steps", "cond", "w"],
    "distill.encoder_target": ["teacher", "z", "t", "steps", "cond", "w"],
    "distill.MomentMatching": [
        "teacher", "student", "auxiliary", "k", "null_cond", "w_range", "weight", "renoise",
    ],
    "distill.InstantMomentMatching": [
        "teacher", "student", "k", "preconditioner", "null_cond", "w_range", "weight", "clip",
    ],
    "kernels.group_norm_silu": [
        "x", "groups", "weight", "bias", "eps", "scale", "shift", "residual", "act", "residual_at",
    ],
    "kernels.attention": ["q", "k", "v", "scale", "key_lengths", "return_lse"],
    "kernels.attention_qkv": ["qkv", "heads"],
    "kernels.guided_update": ["raw", "z", "t", "s", "schedule", "w", "kind", "noise", "clip"],
}


@pytest.mark.parametrize("package", NAMES)
def test_public_names_are_exported(package: str) -> None:
    """A renamed or unexported name breaks whoever followed the documentation."""
    module = importlib.import_module(f"fewstep.{package}")
    assert set(NAMES[package].split()) - set(module.__all__) == set()
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_signatures(name: str) -> None:
    """A renamed or moved parameter breaks calls by name or by position."""
    package, _, attribute = name.partition(".")
    parameters = list(inspect.signature(getattr(importlib.import_module(f"fewstep.{package}"), attribute)).parameters)
    assert parameters[: len(PARAMETERS[name])] == PARAMETERS[name]


def functions(package: str) -> Iterator[tuple[str, Any, str]]:
    """Public functions and public methods of public classes, as (name, function, what its documentation says)."""
    module = importlib.import_module(f"fewstep.{package}")
    for name in module.__all__:
        member = getattr(module, name)
        if inspect.isfunction(member):
            yield name, member, inspect.getdoc(member) or ""
        elif inspect.isclass(member) and member.__module__.startswith("fewstep"):
            for attribute, method in vars(member).items():
                if inspect.isfunction(method) and (attribute == "__call__" or not attribute.startswith("_")):
                    yield f"{name}.{attribute}", method, f"{inspect.getdoc(member)} {inspect.getdoc(method)}"


@pytest.mark.parametrize("package", NAMES)
def test_what_takes_w_says_what_it_means(package: str) -> None:
    """Three conventions for the guidance weight are in use elsewhere; whoever reads one function must learn ours."""
    takes_w = [(name, text) for name, function, text in functions(package) if takes(function, "w")]
    assert [name for name, text in takes_w if "w = 0 is no guidance" not in " ".join(text.split())] == []


def takes(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters
