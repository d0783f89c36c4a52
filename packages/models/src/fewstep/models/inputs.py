"""Checks of what a network is called with: one line that says what would be right, and no wait for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """Embeddings (B, L, D) of a prompt's tokens, and how many of them count (B,); None: all of them."""

    tokens: Tensor
    lengths: Tensor | None

    def mean(self) -> Tensor:
        """The mean of the tokens that count. Shape: (B, D)."""
        if self.lengths is None:
            return self.tokens.mean(1)
        counts = torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]
        return (self.tokens * counts[..., None]).sum(1) / self.lengths[:, None].to(self.tokens.dtype)


def guidance_weight(w: Tensor | float | None, time: Tensor, accepted: bool) -> Tensor | None:
    """The weight as (B,), or None for a network that takes none.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

    Raises:
        ValueError: w given and not accepted (None and the number 0 always are), or accepted and None or misshaped.
    """
    if not accepted:
        if w is None or (not isinstance(w, Tensor) and w == 0):
            return None
        raise ValueError(
            f"this network has no guidance input, so w = {_short(w)} cannot be applied: "
            "wrap it in GuidedDenoiser, or distil it from with_guidance_input"
        )
    if w is None:
        raise ValueError("this network takes the guidance weight as an input: give w (w = 0 is no guidance)")
    if not isinstance(w, Tensor):
        return torch.full_like(time, w)
    return _per_sample(w, time, "w")


def class_labels(cond: object, time: Tensor, num_classes: int | None) -> Tensor | None:
    """The labels as (B,), from a tensor or from the key "y" of a dict; None for an unconditional network.

    Raises:
        ValueError: cond given and not wanted, or wanted and missing, misshaped, not of integers, or (where looking does
            not make a GPU wait) outside [0, num_classes].
    """
    if num_classes is None:
        if cond is None or (isinstance(cond, Mapping) and "y" not in cond):
            return None
        raise ValueError("this network is unconditional (num_classes=None), so cond must be None")
    labels = cond.get("y") if isinstance(cond, Mapping) else cond
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"this network is class-conditional: cond must be labels y (B,) in [0, {num_classes}] or a dict with key "
            f"'y' ({num_classes} is the null class), got {_short(cond)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels y must be integers, got {labels.dtype}")
    labels = _per_sample(labels, time, "y")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high > num_classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"class index {wrong} is out of range: classes are 0 to {num_classes - 1}, null {num_classes}"
            )
    return labels


def refuse_text(cond: object) -> None:
    """Raise ValueError if cond holds a prompt, which this network would not see."""
    if isinstance(cond, Mapping) and "text" in cond:
        raise ValueError("this network takes no text (text_width=None), so cond must not have the key 'text'")


def text_input(cond: object, time: Tensor, width: int) -> Text:
    """The embeddings under the key "text" of cond, with the lengths of "text_mask".

    Raises:
        ValueError: text missing or misshaped, or (where looking does not make a GPU wait) a mask that is not, in each
            row, ones and then zeros.
    """
    text = cond.get("text") if isinstance(cond, Mapping) else None
    if not isinstance(text, Tensor) or text.ndim != 3 or text.shape[0] != len(time) or text.shape[2] != width:
        found = _short(cond if text is None else text)
        raise ValueError(
            f"this network takes text: cond must be a dict with key 'text' of shape ({len(time)}, tokens, {width}), "
            f"as TextEncoder.encode gives it, got {found}"
        )
    assert isinstance(cond, Mapping)  # text came from it
    return Text(text, _lengths(cond.get("text_mask"), text))


def _lengths(mask: object, text: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != text.shape[:2]:
        raise ValueError(f"text_mask must have shape {tuple(text.shape[:2])}, as its text has, got {_short(mask)}")
    mask = mask.bool()
    looked_at = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and (not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any())):
        raise ValueError("text_mask must be, in each row, at least one 1 and then zeros: pad prompts on the right")
    return mask.sum(1)


def _per_sample(value: Tensor, time: Tensor, name: str) -> Tensor:
    if value.ndim == 0:
        return value.expand(time.shape)
    if value.shape != time.shape:
        raise ValueError(f"{name} must have shape ({time.shape[0]},), one per image, got {tuple(value.shape)}")
    return value


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with keys {sorted(map(str, value))}"
    return repr(value)
