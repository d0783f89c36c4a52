"""Checks of what a network is called with: one line that says what would be right, and no wait for a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


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
