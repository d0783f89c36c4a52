"""Embeddings of time and guidance weight: against diffusers' own functions, and how fast they vary."""

import ast
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from model_helpers import perturbed

from fewstep.models import GuidanceEmbedding
from fewstep.models.embedding import Conditioning, sinusoidal


@pytest.mark.parametrize("features", [32, 256])
def test_time_features(features: int) -> None:
    """Other frequencies than diffusers' would make exported and imported weights useless."""
    time = torch.linspace(0, 1000, 41)
    theirs = get_timestep_embedding(time, features, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(sinusoidal(time, features), theirs, rtol=0, atol=1e-4)
    exact = torch.exp(-torch.arange(features // 2).double() / (features // 2 - 1) * math.log(10000.0)) * time[:, None]
    torch.testing.assert_close(sinusoidal(time.double(), features), torch.cat([exact.sin(), exact.cos()], 1))


def installed_function(path: str, name: str) -> Callable[..., torch.Tensor]:
    """A function of the installed diffusers, taken from its file: importing a pipeline would need transformers."""
    source = (Path(diffusers.__file__).parent / path).read_text()
    found = next(
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == name
    )
    scope: dict[str, Any] = {"torch": torch}
    exec(textwrap.dedent(ast.get_source_segment(source, found)), scope)
    return scope[name]


@pytest.mark.parametrize(
    "pipeline",
    [
        "stable_diffusion/pipeline_stable_diffusion.py",
        "latent_consistency_models/pipeline_latent_consistency_text2img.py",
    ],
)
def test_diffusers_guidance_features(pipeline: str) -> None:
    """The pipelines compute these features themselves: a student trained on others would get a wrong weight."""
    function = installed_function(f"pipelines/{pipeline}", "get_guidance_scale_embedding")
    w = torch.tensor([0.0, 0.3, 1.0, 4.0, 7.5, 14.0])
    assert torch.equal(GuidanceEmbedding("diffusers", 32, 64).features(w), function(None, w, embedding_dim=256))


def test_diffusers_guidance_goes_into_the_time_mlp() -> None:
    """diffusers adds the projected features before linear_1 of its time embedding; anywhere else cannot be exported."""
    ours = Conditioning(32, 48, num_classes=None)
    ours.add_guidance("diffusers", (0.0, 4.0))
    perturbed(ours, std=0.3)
    theirs = TimestepEmbedding(32, 48, cond_proj_dim=256)
    theirs.load_state_dict(
        {f"linear_{i}.{kind}": getattr(layer, kind)
         for i, layer in ((1, ours.time_in), (2, ours.time_out)) for kind in ("weight", "bias")}
        | {"cond_proj.weight": ours.guidance.project.weight}
    )  # fmt: skip
    time, w = torch.tensor([3.0, 500.0, 999.0]), torch.tensor([0.0, 1.5, 4.0])
    emb = theirs(sinusoidal(time, 32), ours.guidance.features(w))
    torch.testing.assert_close(ours(time, w=w), torch.nn.functional.silu(emb))


def test_normalized_features_are_smooth() -> None:
    """Waves as fast as those of 1000 w make neighbouring weights look unrelated, and the student interpolate badly."""
    w = torch.linspace(2.0, 14.0, 1001, dtype=torch.float64)
    features = GuidanceEmbedding("normalized", 32, 64, w_range=(2.0, 14.0)).features(w)
    assert features.abs().max() <= 1
    assert features[0, 0] == 0
    assert features[-1, 0] == 1
    assert features.diff(dim=0).abs().max() < 0.013  # pi 8 / 2 per unit, in steps of a thousandth
    assert torch.cdist(features[::100], features[::100]).add(torch.eye(11)).min() > 0.5  # and yet they differ


def test_single_weight_range() -> None:
    """The fixed-w baseline has w_range (w, w): no division by zero."""
    assert torch.isfinite(
        GuidanceEmbedding("normalized", 32, 64, w_range=(3.0, 3.0)).features(torch.tensor([3.0]))
    ).all()


@pytest.mark.parametrize(
    ("form", "w_range", "message"),
    [
        ("fourier", (0.0, 4.0), "'fourier' is unknown: use one of normalized, diffusers"),
        ("normalized", (4.0, 0.0), r"w_range \(4.0, 0.0\)"),
        ("diffusers", (-1.0, 4.0), "0 <= low <= high"),
        ("diffusers", (0.0, math.inf), "0 <= low <= high"),
    ],
)
def test_wrong_guidance(form: str, w_range: tuple[float, float], message: str) -> None:
    """A misspelt form must not silently become another."""
    with pytest.raises(ValueError, match=message):
        GuidanceEmbedding(form, 32, 64, w_range)
