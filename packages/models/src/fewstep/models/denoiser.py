"""From a network to a denoiser: times, scales and conversions; and classifier-free guidance on top."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Self, cast, get_args

import torch
from torch import Tensor, nn

from fewstep.models.network import Network
from fewstep.models.text_encoder import TextEncoder
from fewstep.schedules import (
    Cond,
    Denoiser,
    Discrete,
    Prediction,
    Raw,
    Schedule,
    Trained,
    expand,
    guide,
    guided_outputs,
    to_x,
)

TIME_INPUTS = ("angle", "index")


def _unwrapped(network: nn.Module) -> nn.Module:
    """What DistributedDataParallel and its like hold as `.module`, or the network itself."""
    while isinstance(inner := getattr(network, "module", None), nn.Module):
        network = inner
    return network


class NetworkDenoiser(nn.Module):
    """A network as an estimate of the clean image x under a schedule.

    The network receives z at unit scale (z / sqrt(1 + sigma^2) where the schedule is variance exploding; a v that it
    predicts there is at unit scale too) and the time in [0, 1000]: "angle" is 1000 (2 / pi) atan(exp(-log_snr / 2))
    (papers.md C.1, inv_cos), "index" is t T - 1 of a `Discrete` schedule.

    Args:
        network: called as network(z, time, cond, w); `UNet`, `DiT` or any module of that signature.
        schedule: what z and t refer to.
        prediction: what the network puts out: "x", "eps", "v" or "flow".
        time_input: "angle" or "index".
        trained: what it was trained for; saved with it.
        text_encoder: what makes its text of prompts. Frozen, it goes wherever the denoiser goes (devices, copies,
            files), but its weights are none of the denoiser's parameters.

    Raises:
        ValueError: prediction or time_input is unknown, or "index" asked of a schedule without indices.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: Prediction,
        *,
        time_input: str = "angle",
        trained: Trained | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction {prediction!r} is unknown: use one of {', '.join(get_args(Prediction))}")
        if time_input not in TIME_INPUTS:
            raise ValueError(f"time_input {time_input!r} is unknown: use one of {', '.join(TIME_INPUTS)}")
        if time_input == "index" and not isinstance(schedule, Discrete):
            raise ValueError(f"time_input 'index' needs a Discrete schedule, not {type(schedule).__name__}")
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.time_input, self.trained = time_input, trained
        self.use_text_encoder(text_encoder)

    @property
    def text_encoder(self) -> TextEncoder | None:
        """What makes its text of prompts, in eval mode; see the class."""
        return self._text_encoder[0]

    def use_text_encoder(self, encoder: TextEncoder | None) -> Self:
        """Take this encoder, frozen, from now on; returns itself."""
        # in a tuple: it must not become a part of the module
        self._text_encoder = (None if encoder is None else encoder.eval().requires_grad_(False),)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to(device), .double() and their like call."""
        if self.text_encoder is not None:
            self.text_encoder._apply(fn)  # type: ignore[no-untyped-call]  # torch has no types here
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nor here
        return self

    @property
    def takes_text(self) -> bool:
        """Whether "text" of cond, embeddings of a prompt, is an input."""
        return bool(getattr(_unwrapped(self.network), "takes_text", False))

    @property
    def takes_guidance(self) -> bool:
        """Whether w is an input of the network."""
        return bool(getattr(_unwrapped(self.network), "takes_guidance", False))

    @property
    def takes_mask(self) -> bool:
        """Whether the network is for inpainting, so that `samplers.inpaint` gives it mask and masked image."""
        return bool(getattr(_unwrapped(self.network), "takes_mask", False))

    @property
    def null_cond(self) -> Tensor | dict[str, Tensor] | None:
        """The null class as a tensor without dimensions, or None for an unconditional network.

        For inpainting {"y": null class}: guidance drops the class and keeps mask and masked image. A network from
        elsewhere may say itself what stands for no condition.
        """
        network: Any = _unwrapped(self.network)
        if hasattr(network, "null_cond"):
            own: Tensor | dict[str, Tensor] | None = network.null_cond
            return own
        classes = getattr(network, "num_classes", None)
        if classes is None:
            return self._null_text()
        null = torch.tensor(classes, device=next(self.network.parameters()).device)
        text = self._null_text() or {}
        return {"y": null, **text} if self.takes_mask or text else null

    def _null_text(self) -> dict[str, Tensor] | None:
        """The empty prompt, without the dimension of the batch; None for a network without text."""
        if not self.takes_text:
            return None
        if self.text_encoder is None:
            text = "this network takes text and has no text_encoder: give null_cond, what your encoder makes of ''"
            raise ValueError(f"{text}, as {{'text': (L, D), 'text_mask': (L,)}}")
        return self.text_encoder.null_cond

    def network_time(self, t: Tensor) -> Tensor:
        """The network's time input, float32 or wider. Shape: t (B,) in [0, 1] -> (B,)."""
        if self.time_input == "index":
            t = t.to(torch.promote_types(t.dtype, torch.float32))
            return t * len(cast(Discrete, self.schedule).alphas_cumprod) - 1
        return torch.atan(torch.exp(-0.5 * self.schedule.log_snr(t))) * (2000.0 / math.pi)

    def raw(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Raw:
        """The network's output before conversion. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Shape: z (B, C, H, W), t (B,), cond leaves (B, ...), w None, float or (B,) -> cond_output (B, C, H, W).

        Raises:
            ValueError: w other than None or 0 for a network without guidance input, or None for one with it.
        """
        if self.schedule.kind != "ve":
            return Raw(self.network(z, self.network_time(t), cond, w), None, self.prediction)
        scale = expand(torch.hypot(*self.schedule.alpha_sigma(t)), z)
        output = self.network(z / scale, self.network_time(t), cond, w)
        return Raw(output * scale if self.prediction == "v" else output, None, self.prediction)

    def forward(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Tensor:
        """The estimate of x, float32 or wider. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Shape: z (B, C, H, W), t (B,), cond leaves (B, ...), w None, float or (B,) -> (B, C, H, W).

        Raises:
            ValueError: w other than None or 0 for a network without guidance input, or None for one with it.
        """
        return to_x(self.raw(z, t, cond, w).cond_output, z, t, self.schedule, self.prediction)


class GuidedDenoiser(nn.Module):
    """Classifier-free guidance by one batched evaluation: x_w = (1 + w) x_cond - w x_uncond (arXiv 2210.03142, sec. 2).

    Args:
        denoiser: an unguided denoiser; its `raw` is used if it offers one.
        null_cond: what guidance replaces in cond, e.g. `denoiser.null_cond`; keys that it lacks are kept from cond.

    Raises:
        ValueError: null_cond is None, or the denoiser already takes w.
    """

    def __init__(self, denoiser: Denoiser, null_cond: Cond) -> None:
        super().__init__()
        if null_cond is None:
            raise ValueError("GuidedDenoiser needs null_cond, what stands for no condition; None is for no guidance")
        if getattr(denoiser, "takes_guidance", False):
            raise ValueError("this denoiser already takes w as an input: call it with w instead of guiding it again")
        self.denoiser: Any = denoiser
        self.schedule: Schedule = denoiser.schedule
        self._null_keys = sorted(null_cond) if isinstance(null_cond, Mapping) else None
        for key, value in null_cond.items() if isinstance(null_cond, Mapping) else [("", null_cond)]:
            self.register_buffer(f"null_{key}", value, persistent=False)  # so that .to(device) takes them along

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser inside is for inpainting."""
        return bool(getattr(self.denoiser, "takes_mask", False))

    @property
    def text_encoder(self) -> TextEncoder | None:
        """What makes text of prompts for the denoiser inside."""
        encoder: TextEncoder | None = getattr(self.denoiser, "text_encoder", None)
        return encoder

    @property
    def trained(self) -> Trained | None:
        """What the denoiser inside was trained for."""
        trained: Trained | None = getattr(self.denoiser, "trained", None)
        return trained

    @property
    def null_cond(self) -> Tensor | dict[str, Tensor]:
        """What stands for no condition."""
        if self._null_keys is None:
            return self.get_buffer("null_")
        return {key: self.get_buffer(f"null_{key}") for key in self._null_keys}

    def _evaluate(self, z: Tensor, t: Tensor, cond: Cond) -> Raw:
        if hasattr(self.denoiser, "raw"):
            raw: Raw = self.denoiser.raw(z, t, cond)
            return raw
        return Raw(self.denoiser(z, t, cond), None, "x")

    def raw(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Raw:
        """Both branches' outputs, from one evaluation of 2 B images; of B where w is None or the number 0.

        w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Shape: z (B, ...), t (B,), cond leaves (B, ...), w None, float or (B,) -> outputs (B, ...).
        """
        if w is None or (not isinstance(w, Tensor) and w == 0):
            return self._evaluate(z, t, cond)
        kind: list[Prediction] = []

        def evaluate(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
            both = self._evaluate(z, t, cond)
            kind.append(both.prediction)
            return both.cond_output

        return Raw(*guided_outputs(evaluate, z, t, cond, self.null_cond), kind[0])

    def forward(self, z: Tensor, t: Tensor, cond: Cond = None, w: Tensor | float | None = None) -> Tensor:
        """The guided estimate of x, float32 or wider.

        w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Shape: z (B, ...), t (B,), cond leaves (B, ...), w None, float or (B,) -> (B, ...).
        """
        raw = self.raw(z, t, cond, w)
        output = raw.cond_output
        if raw.uncond_output is not None and w is not None:
            output = guide(output, raw.uncond_output, w)
        return to_x(output, z, t, self.schedule, raw.prediction)


def with_guidance_input(
    denoiser: NetworkDenoiser, form: str | None = None, w_range: tuple[float, float] = (0.0, 4.0)
) -> NetworkDenoiser:
    """A trainable copy that takes w and computes, at every w, exactly what the conditional branch did.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). The w path starts at zero, the copy's parameters
    require gradients whatever the original's do, and the form travels with the weights.

    Args:
        denoiser: conditional, without guidance input.
        form: "normalized", or "diffusers" if its pipelines are to read the student; see `GuidanceEmbedding`. None is
            the latter for a UNet2DConditionModel, the former for any other network.
        w_range: (low, high) of the weights it is meant for.

    Raises:
        ValueError: it already takes w, its network cannot, or form or w_range is wrong.
    """
    if not isinstance(denoiser, NetworkDenoiser) or not isinstance(denoiser.network, Network):
        raise ValueError("with_guidance_input needs a NetworkDenoiser around a UNet or DiT, without GuidedDenoiser")
    student = copy.deepcopy(denoiser)
    network = cast(Network, student.network)
    network.add_guidance(form or network.guidance_form, w_range)
    student.trained = Trained("guided", w_range=w_range)
    return student.requires_grad_(True)
