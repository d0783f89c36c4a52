"""diffusers' models as denoisers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.interchange.library import diffusers, known_class, known_prediction, settings_of
from fewstep.models.interchange.network import DiffusersNetwork
from fewstep.schedules import Discrete, Trained

PARTS = ("unet", "transformer")  # what pipelines call the network


def from_diffusers(
    model: nn.Module | str | os.PathLike[str],
    scheduler: Any = None,
    *,
    null_text: Tensor | Mapping[str, Tensor] | None = None,
    image_size: int | None = None,
    w_range: tuple[float, float] = (0.0, 14.0),
) -> NetworkDenoiser:
    """A UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel as a denoiser, so that it can be distilled.

    The network receives index t T - 1 of its own T. Where it takes classes, the last index is the null class. The model
    is taken over, not copied.

    Args:
        model: the model; a pipeline that has one; or the local folder of a pipeline (safetensors; nothing is
            downloaded).
        scheduler: any of diffusers' that has `alphas_cumprod` and a `prediction_type`; default: the pipeline's.
        null_text: what stands for no text, for `null_cond`: an embedding (L, D), or a dict of it and its "text_mask".
        image_size: side of its images (or latents) in pixels, where its config does not say.
        w_range: weights that a model with `time_cond_proj_dim` was trained for (w = 0 is no guidance; Stable
            Diffusion's guidance scale is 1 + w).

    Raises:
        ValueError: a class, prediction type or scheduler that is not known; the message lists those that are.
        FileNotFoundError: no such folder, or no network in it.
        ImportError: diffusers is not installed.
    """
    library = diffusers("from_diffusers")
    if isinstance(model, str | os.PathLike):
        model, scheduler = _read(Path(model), scheduler, library)
    for part in PARTS:
        scheduler = scheduler if scheduler is not None else getattr(model, "scheduler", None)
        model = getattr(model, part, None) or model
    name = known_class(type(model).__name__)
    assert isinstance(model, nn.Module)
    schedule, prediction = _schedule(scheduler), known_prediction(scheduler.config.get("prediction_type"))
    settings = settings_of(model) | ({} if image_size is None else {"sample_size": image_size})
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


def _read(folder: Path, scheduler: Any, library: Any) -> tuple[nn.Module, Any]:
    """The network of a pipeline's folder, and its scheduler unless one is given."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: from_diffusers reads local ones and downloads nothing")
    parts = [folder / part for part in PARTS if (folder / part / "config.json").is_file()]
    if not parts:
        raise FileNotFoundError(f"{folder} has no {' or '.join(f'{part}/config.json' for part in PARTS)}")
    loaded = {"local_files_only": True}
    kind = known_class(json.loads((parts[0] / "config.json").read_text()).get("_class_name", ""))
    model: nn.Module = getattr(library, kind).from_pretrained(parts[0], use_safetensors=True, **loaded)
    if scheduler is None:
        config = folder / "scheduler" / "scheduler_config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{config} is missing: give a scheduler")
        settings = json.loads(config.read_text())
        scheduler = getattr(library, _scheduler_name(settings, library)).from_config(settings)
    return model, scheduler


def _scheduler_name(settings: Mapping[str, Any], library: Any) -> str:
    name = str(settings.get("_class_name"))
    if not name.endswith("Scheduler") or not hasattr(library, name):
        raise ValueError(f"scheduler {name!r} is none of diffusers {library.__version__}")
    return name
