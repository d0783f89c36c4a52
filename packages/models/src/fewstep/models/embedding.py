"""What a network is told besides the image: time, class and guidance weight, as one embedding."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.models.inputs import class_labels, guidance_weight

M = TypeVar("M", bound=nn.Module)

GUIDANCE_FORMS = ("normalized", "diffusers")
DIFFUSERS_FEATURES = 256  # UNet2DConditionModel(time_cond_proj_dim=256), what pipelines embed w with
HARMONICS = 8  # of the normalized form: up to two full waves over w_range


def zeroed(module: M) -> M:
    """The same module with every parameter set to zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def sinusoidal(position: Tensor, features: int) -> Tensor:
    """[sin | cos](position f_j), f_j = exp(-j ln(10000) / (features/2 - 1)), as papers.md A.2 and C.1 have it.

    Shape: position (B,) -> (B, features), features even and at least 4. Computed in float32, in float64 if position is.
    """
    half = features // 2
    dtype = torch.promote_types(position.dtype, torch.float32)
    steps = torch.arange(half, dtype=dtype, device=position.device)
    angles = position.to(dtype)[:, None] * torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def harmonics(position: Tensor, count: int = HARMONICS) -> Tensor:
    """[u | sin(pi k u / 2) | cos(pi k u / 2)], k = 1..count: slow waves, smooth in u over [0, 1].

    Shape: position (B,) -> (B, 1 + 2 count).
    """
    waves = torch.arange(1, count + 1, dtype=position.dtype, device=position.device) * (math.pi / 2)
    angles = position[:, None] * waves
    return torch.cat([position[:, None], angles.sin(), angles.cos()], dim=1)


class GuidanceEmbedding(nn.Module):
    """Adds the guidance weight to what the network is conditioned on; adds exactly zero until it is trained.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    - ``"diffusers"``: 256 features [sin | cos](1000 w f_j), a bias-free projection, added to the sinusoidal time
      features before the time MLP (papers.md A.2): what diffusers' pipelines compute for ``time_cond_proj_dim=256``.
    - ``"normalized"``: w scaled from w_range to [0, 1], slow waves of it, and one hidden layer which also sees time and
      class, since what guidance changes depends on both; added to the embedding after the time MLP.

    Args:
        form: "normalized" or "diffusers".
        time_features: width of the sinusoidal time features.
        emb_channels: width of the embedding.
        w_range: (low, high), 0 <= low <= high, the weights it is meant for.

    Raises:
        ValueError: form or w_range is none of these.
    """

    def __init__(
        self, form: str, time_features: int, emb_channels: int, w_range: tuple[float, float] = (0.0, 4.0)
    ) -> None:
        super().__init__()
        if form not in GUIDANCE_FORMS:
            raise ValueError(f"guidance form {form!r} is unknown: use one of {', '.join(GUIDANCE_FORMS)}")
        if len(w_range) != 2 or not 0 <= w_range[0] <= w_range[1] < math.inf:
            raise ValueError(f"w_range {w_range!r} must be (low, high) with 0 <= low <= high")
        self.form = form
        self.low, self.width = float(w_range[0]), float(w_range[1] - w_range[0]) or 1.0
        if form == "diffusers":
            self.project = zeroed(nn.Linear(DIFFUSERS_FEATURES, time_features, bias=False))
        else:
            self.weight = nn.Linear(1 + 2 * HARMONICS, emb_channels)
            self.context = nn.Linear(emb_channels, emb_channels, bias=False)
            self.project = zeroed(nn.Linear(emb_channels, emb_channels))

    def features(self, w: Tensor) -> Tensor:
        """What is computed of w before any parameter. Shape: (B,) -> (B, 256) or (B, 17).

        w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
        """
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        if self.form == "diffusers":
            return sinusoidal(1000.0 * w, DIFFUSERS_FEATURES)
        return harmonics((w - self.low) / self.width)

    def added(self, context: Tensor, w: Tensor) -> Tensor:
        """What w adds, given what else the network is conditioned on.

        w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). Shape: context (B, E), w (B,) -> (B, E).
        """
        features = self.features(w).to(self.project.weight.dtype)
        if self.form == "normalized":
            features = F.silu(self.weight(features) + self.context(context))
        added: Tensor = self.project(features)
        return added

    def forward(self, target: Tensor, w: Tensor) -> Tensor:
        """Target plus what w adds: target is the time features ("diffusers") or the embedding ("normalized").

        w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). Shape: target (B, E), w (B,) -> (B, E).
        """
        return target + self.added(target, w)


class Conditioning(nn.Module):
    """Time, class, text and guidance weight as one embedding, SiLU applied: blocks need only a linear layer of it.

    Class embeddings are added to the time embedding; row num_classes is the null class (papers.md C.1). They start with
    variance 1 / num_classes, as a dense layer on one-hot labels would.
    """

    def __init__(
        self, time_features: int, emb_channels: int, num_classes: int | None, text_width: int | None = None
    ) -> None:
        super().__init__()
        self.time_features, self.emb_channels, self.num_classes = time_features, emb_channels, num_classes
        self.time_in = nn.Linear(time_features, emb_channels)
        self.time_out = nn.Linear(emb_channels, emb_channels)
        self.classes: nn.Embedding | None = None
        self.guidance: GuidanceEmbedding | None = None
        if num_classes is not None:
            self.classes = nn.Embedding(num_classes + 1, emb_channels)
            nn.init.normal_(self.classes.weight, std=num_classes**-0.5)
        self.text = None if text_width is None else zeroed(nn.Linear(text_width, emb_channels))

    def add_guidance(self, form: str, w_range: tuple[float, float]) -> None:
        """Take w from now on, with the dtype and device of the other parameters."""
        embedding = GuidanceEmbedding(form, self.time_features, self.emb_channels, w_range)
        self.guidance = embedding.to(self.time_in.weight)

    def forward(
        self, time: Tensor, cond: object = None, w: Tensor | float | None = None, text: Tensor | None = None
    ) -> Tensor:
        """silu(time MLP + class + text + guidance). Shape: time (B,) in [0, 1000], text (B, D) -> (B, emb_channels).

        text: the mean of a prompt's embeddings; its part starts at zero.
        w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Raises:
            ValueError: cond or w missing, of the wrong kind or shape, or given to a network without that input.
        """
        weight = guidance_weight(w, time, self.guidance is not None)
        labels = class_labels(cond, time, self.num_classes)
        features = sinusoidal(time, self.time_features).to(self.time_in.weight.dtype)
        if self.guidance is not None and self.guidance.form == "diffusers":
            features = self.guidance(features, weight)
        emb = self.time_out(F.silu(self.time_in(features)))
        if self.classes is not None:
            emb = emb + self.classes(labels)
        if self.text is not None and text is not None:
            emb = emb + self.text(text.to(emb.dtype))
        if self.guidance is not None and self.guidance.form == "normalized":
            emb = self.guidance(emb, weight)
        return F.silu(emb)
