"""What UNet and DiT share: a JSON-able config, presets, input checks, and the guidance input added later."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fewstep.models.embedding import Conditioning
from fewstep.models.inputs import Text, refuse_text, text_input
from fewstep.models.presets import PRESETS


class Network(nn.Module):
    """A network called as ``network(z, time, cond=None, w=None)``; rebuilt from `.config` by `build_network`.

    Attributes:
        config: type and every argument, JSON-able.
        conditioning: embeds time, class and guidance weight.
    """

    TYPES: ClassVar[dict[str, type[Network]]] = {}
    conditioning: Conditioning

    def __init__(self, config: dict[str, Any], input_shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.config = {"type": type(self).__name__} | config
        self.input_shape = input_shape or (config["in_channels"], config["image_size"], config["image_size"])

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.TYPES[cls.__name__] = cls

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A network of a named size, e.g. ``UNet.from_preset("digits", channels=48)``.

        Raises:
            ValueError: the preset or an override is unknown; the message names the known ones.
        """
        presets = PRESETS[cls.__name__]
        if name not in presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}: use one of {', '.join(presets)}")
        network = build_network({"type": cls.__name__} | presets[name] | overrides)
        assert isinstance(network, cls)  # build_network looks the type up by this very name
        return network

    @property
    def num_classes(self) -> int | None:
        """Number of classes K (index K is the null class), or None if unconditional."""
        return self.conditioning.num_classes

    @property
    def takes_mask(self) -> bool:
        """Whether it was made for inpainting: "mask" and "masked_image" of cond are inputs beside z."""
        return bool(self.config["inpainting"])

    @property
    def guidance_form(self) -> str:
        """The form of guidance embedding that suits it."""
        return "normalized"

    @property
    def takes_text(self) -> bool:
        """Whether "text" of cond, embeddings of a prompt, is an input."""
        return self.config.get("text_width") is not None

    @property
    def takes_guidance(self) -> bool:
        """Whether w is an input."""
        return self.conditioning.guidance is not None

    def add_guidance(self, form: str, w_range: tuple[float, float]) -> None:
        """Accept w from now on; the output stays exactly what it was, at every w, until the new parameters are trained.

        Raises:
            ValueError: it already does, or form or w_range is wrong.
        """
        if self.takes_guidance:
            raise ValueError(f"this {type(self).__name__} already has a guidance input: {self.config['guidance']}")
        self.conditioning.add_guidance(form, w_range)
        self.config["guidance"] = {"form": form, "w_range": [float(end) for end in w_range]}

    def _guidance_from_config(self, guidance: Mapping[str, Any] | None) -> None:
        self.config["guidance"] = None
        if guidance is not None:
            self.add_guidance(guidance["form"], tuple(guidance["w_range"]))

    def _input(self, z: Tensor, cond: object) -> Tensor:
        """z or, for inpainting, z with mask and masked image as further channels. Shape: (B, C, H, W) -> (B, C', H, W).

        Raises:
            ValueError: it is for inpainting, and cond lacks one of them or has it in another size.
        """
        if not self.takes_mask:
            return z
        given = cond if isinstance(cond, Mapping) else {}
        parts = [z]
        for key, channels in (("mask", 1), ("masked_image", z.shape[1])):
            value, shape = given.get(key), (len(z), channels, *z.shape[2:])
            if not isinstance(value, Tensor) or value.shape != shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
                raise ValueError(f"this network is for inpainting: cond[{key!r}] must have shape {shape}, got {found}")
            parts.append(value.to(z.dtype))
        return torch.cat(parts, dim=1)

    def _embedding(self, time: Tensor, cond: object, w: Tensor | float | None) -> tuple[Tensor, Text | None]:
        """What every block is conditioned on, and the text that those with cross-attention look at."""
        text = text_input(cond, time, self.config["text_width"]) if self.takes_text else None
        emb = self.conditioning(time, cond, w, None if text is None else text.mean())
        if not self.takes_text:
            refuse_text(cond)
        return emb, text

    def _check(self, z: Tensor, time: Tensor) -> None:
        if z.shape[1:] != self.input_shape:
            raise ValueError(
                f"this {type(self).__name__} takes images of (channels, height, width) = {self.input_shape}, "
                f"got z of shape {tuple(z.shape)}"
            )
        if time.shape != z.shape[:1]:
            raise ValueError(f"time must have shape ({z.shape[0]},), one per image, got {tuple(time.shape)}")


def build_network(config: Mapping[str, Any]) -> Network:
    """A freshly initialised network from its config: ``{"type": "UNet", "image_size": 8, ...}``.

    Raises:
        ValueError: type or a key is unknown, or a required one is missing; the message names the known ones.
    """
    arguments = dict(config)
    kind = arguments.pop("type", None)
    if kind not in Network.TYPES:
        raise ValueError(f"network type {kind!r} is unknown: use one of {', '.join(sorted(Network.TYPES))}")
    known = inspect.signature(Network.TYPES[kind]).parameters
    missing = [name for name, p in known.items() if p.default is p.empty and name not in arguments]
    for what, keys in (("unknown", sorted(arguments.keys() - known)), ("missing", missing)):
        if keys:
            raise ValueError(f"{kind} config: {what} keys {keys}; its keys are {', '.join(known)}")
    return Network.TYPES[kind](**arguments)


def input_channels(channels: int, inpainting: bool) -> int:
    """Channels of what the first layer sees: z and, for inpainting, mask and masked image."""
    return 2 * channels + 1 if inpainting else channels


def init_from(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy every parameter of the teacher that the student has under the same name and shape; leave the rest fresh.

    Returns:
        The names that were copied, in the student's order.

    Raises:
        ValueError: none matches.
    """
    theirs = dict(teacher.named_parameters())
    copied = []
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in theirs and theirs[name].shape == parameter.shape:
                parameter.copy_(theirs[name])
                copied.append(name)
    if not copied:
        raise ValueError("no parameter of the student has the name and shape of one of the teacher's")
    return copied
