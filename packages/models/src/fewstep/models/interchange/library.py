"""diffusers where it is installed, and what of it is known here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType

from torch import nn

from fewstep.schedules import Prediction

UNET, TEXT_UNET, DIT = CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}

# from files here, none of them a pickle; what low_cpu_mem_usage does needs another library
LOCAL = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}


def diffusers(what: str) -> ModuleType:
    """The library. what: who asks for it.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        import diffusers
    except ImportError:
        raise ImportError(f"{what} needs diffusers: pip install 'fewstep-models[diffusers]'") from None
    module: ModuleType = diffusers
    return module


def known_class(name: str) -> str:
    """The name of a class of network, if it is known.

    Raises:
        ValueError: it is not; the message lists those that are.
    """
    if name not in CLASSES:
        raise ValueError(f"diffusers class {name!r} is unknown: use one of {', '.join(CLASSES)}")
    return name


def class_in(settings: Mapping[str, object]) -> str:
    """The class that a network's config.json names, if it is known.

    DiT's published checkpoints still name the class that held many kinds of transformers; diffusers reads them as this.

    Raises:
        ValueError: it is not known; the message lists those that are.
    """
    name = str(settings.get("_class_name"))
    return DIT if name == "Transformer2DModel" and settings.get("norm_type") == "ada_norm_zero" else known_class(name)


def known_prediction(name: object) -> Prediction:
    """The prediction, by diffusers' `prediction_type`.

    Raises:
        ValueError: it is none of those known; the message lists them.
    """
    if name not in PREDICTIONS:
        raise ValueError(f"prediction_type {name!r} is unknown: use one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[str(name)]


def settings_of(model: nn.Module) -> dict[str, object]:
    """What the class of a diffusers model takes to build one of the same shape, JSON-able.

    Of old checkpoints `config` holds more: what the class once took.
    """
    config = dict(model.config)  # type: ignore[arg-type]  # diffusers' models carry a dict
    taken = inspect.signature(type(model)).parameters
    return {key: value for key, value in config.items() if key in taken}
