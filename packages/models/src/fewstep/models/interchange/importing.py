"""diffusers' models as denoisers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.interchange.library import LOCAL, class_in, diffusers, known_class, known_prediction, settings_of
from fewstep.models.interchange.network import DiffusersNetwork
from fewstep.schedules import Discrete, Trained

PARTS = ("unet", "transformer")  # what pipelines call the network
SCHEDULER = "scheduler_config.json"


def from_diffusers(
    model: nn.Module | str | os.PathLike[str],
    scheduler: Any = None,
    *,
    null_text: Tensor | Mapping[str, Tensor] | None = None,
    image_size: int | None = None,
    w_range: tuple[float, float] = (0.0, 14.0),
    weights: bool = True,
) -> NetworkDenoiser:
    """A UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel as a denoiser, so that it can be distilled.

    The network receives index t T - 1 of its own T. Where it takes classes, the last index is the null class. The model
    is taken over, not copied.

    Args:
        model: the model; a pipeline that has one; or the local folder of a model or pipeline (safetensors; nothing is
            downloaded).
        scheduler: any of diffusers' that has `alphas_cumprod` and a `prediction_type`, or the folder of one; default:
            the pipeline's.
        null_text: what stands for no text, for `null_cond`: an embedding (L, D), or a dict of it and its "text_mask".
        image_size: side of its images (or latents) in pixels, where its config does not say.
        w_range: weights that a model with `time_cond_proj_dim` was trained for (w = 0 is no guidance; Stable
            Diffusion's guidance scale is 1 + w).
        weights: False reads a folder's settings alone and gives a denoiser on the meta device: what it is, in no time.

    Raises:
        ValueError: a class, prediction type or scheduler that is not known; the message lists those that are.
        FileNotFoundError: no such folder, or no network in it.
        ImportError: diffusers is not installed.
    """
    library = diffusers("from_diffusers")
    if isinstance(model, str | os.PathLike):
        model, scheduler = _read(Path(model), scheduler, library, weights)
    elif isinstance(scheduler, str | os.PathLike):
        scheduler = _read_scheduler(Path(scheduler), library)
    for part in PARTS:
        scheduler = scheduler if scheduler is not None else getattr(model, "scheduler", None)
        model = getattr(model, part, None) or model
    name = known_class(type(model).__name__)
    assert isinstance(model, nn.Module)
    schedule, prediction = _schedule(scheduler), known_prediction(scheduler.config.get("prediction_type"))
    settings = settings_of(model)
    if image_size is not None and not isinstance(settings.get("sample_size"), int):
        settings["sample_size"] = image_size
    null = {"text": null_text} if isinstance(null_text, Tensor) else dict(null_text or {})
    guided = settings.get("time_cond_proj_dim") is not None
    network = DiffusersNetwork(
        name,
        settings,
        null={key: list(value.shape) for key, value in null.items()},
        guidance={"form": "diffusers", "w_range": w_range} if guided else None,
        model=model,
    )
    for key, value in null.items():
        network.register_buffer(f"null_{key}", value.detach().clone())
    trained = Trained("guided", w_range=w_range) if guided else Trained("teacher")
    return NetworkDenoiser(network, schedule, prediction, time_input="index", trained=trained).eval()


def _schedule(scheduler: Any) -> Discrete:
    if scheduler is None:
        raise ValueError("from_diffusers needs a scheduler: one of diffusers', or the folder of a whole pipeline")
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has no alphas_cumprod: give one of discrete indices, such as "
            "DDPMScheduler, DDIMScheduler or LCMScheduler"
        )
    return Discrete(alphas)


def _read(folder: Path, scheduler: Any, library: Any, weights: bool) -> tuple[nn.Module, Any]:
    """The network of a model's or pipeline's folder, and its scheduler unless one is given."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: from_diffusers reads local ones and downloads nothing")
    places = [place for place in (*(folder / part for part in PARTS), folder) if (place / "config.json").is_file()]
    if not places:
        known = " or ".join(f"{part}/config.json" for part in PARTS)
        raise FileNotFoundError(f"{folder} has no {known}, nor config.json of a model")
    if scheduler is None or isinstance(scheduler, str | os.PathLike):
        scheduler = _read_scheduler(folder if scheduler is None else Path(scheduler), library)
    settings = _read_settings(places[0] / "config.json")
    kind = getattr(library, class_in(settings))
    if weights:
        model: nn.Module = kind.from_pretrained(places[0], **LOCAL)
        return model, scheduler
    with torch.device("meta"):
        return kind.from_config(settings), scheduler


def _read_scheduler(folder: Path, library: Any) -> Any:
    """The scheduler of a pipeline's folder, or the one that lies in the folder itself."""
    places = [folder / "scheduler" / SCHEDULER, folder / SCHEDULER]
    found = [place for place in places if place.is_file()]
    if not found:
        raise FileNotFoundError(f"{places[0]} is missing: give a scheduler")
    settings = _read_settings(found[0])
    return getattr(library, _scheduler_name(settings, library)).from_config(settings)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: it must be a JSON object")
    return settings


def _scheduler_name(settings: Mapping[str, Any], library: Any) -> str:
    name = str(settings.get("_class_name"))
    if not name.endswith("Scheduler") or not hasattr(library, name):
        raise ValueError(f"scheduler {name!r} is none of diffusers {library.__version__}")
    return name
