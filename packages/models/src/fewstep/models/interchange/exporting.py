"""Denoisers as folders that diffusers' pipelines read."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.autoencoder import Autoencoder
from fewstep.models.clip_encoder import ClipTextEncoder
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.dit import DiT
from fewstep.models.embedding import GuidanceEmbedding, sinusoidal
from fewstep.models.interchange.autoencoder import DiffusersAutoencoder
from fewstep.models.interchange.library import CLASSES, DIT, PREDICTIONS, TEXT_UNET, UNET, diffusers, settings_of
from fewstep.models.interchange.network import DiffusersNetwork
from fewstep.models.interchange.twin import unet_settings, unet_weights
from fewstep.models.storage import new_folder
from fewstep.models.unet import UNet
from fewstep.schedules import Discrete

INDICES = 1024  # of a continuous schedule: 1, 2, 4, ... steps divide it
SCHEDULERS = {"ddim": "DDIMScheduler", "lcm": "LCMScheduler"}
LCM_GRID = 50  # most of LCM's own grid points
# (network, scheduler) -> the pipeline that runs them, and the parts of it that its user brings
PIPELINES = {
    (UNET, "ddim"): ("DDIMPipeline", ()),
    (DIT, "ddim"): ("DiTPipeline", ("vae",)),
    (TEXT_UNET, "ddim"): ("StableDiffusionPipeline", ("vae", "text_encoder", "tokenizer")),
    (TEXT_UNET, "lcm"): ("LatentConsistencyModelPipeline", ("vae", "text_encoder", "tokenizer")),
}
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


def to_diffusers(
    denoiser: NetworkDenoiser,
    path: str | os.PathLike[str],
    *,
    scheduler: str = "ddim",
    w: float | None = None,
    autoencoder: Autoencoder | None = None,
) -> None:
    """Write a pipeline's folder: network and scheduler, whose output is that of `samplers.ddim` on a uniform grid.

    "ddim" at any steps that divide the scheduler's indices, "lcm" at one step (at more, LCM adds fresh noise between
    them). A UNet2DConditionModel runs in StableDiffusionPipeline or, with "lcm", LatentConsistencyModelPipeline, and
    takes w as their guidance_scale = 1 + w; which of vae, text encoder and tokenizer is not written here is given to
    `from_pretrained`. Our UNet becomes a UNet2DModel with a learned table of time features, DDIMPipeline's (which gives
    no classes: with classes, load `unet` and `scheduler` by themselves). Written beside `path` and then renamed.

    Args:
        denoiser: around a wrapped diffusers model or a UNet, under a variance preserving schedule.
        path: the folder to write.
        scheduler: "ddim" or "lcm".
        w: the weight to fix where diffusers' network has no input for it; only for guidance of form "diffusers".
            w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
        autoencoder: of its latents; a `DiffusersAutoencoder` is written as vae/, as the denoiser's `ClipTextEncoder` is
            as text_encoder/ and tokenizer/.

    Raises:
        ValueError: a network, schedule, prediction, guidance form or kind of student that diffusers has no place for.
        ImportError: diffusers is not installed.
    """
    library = diffusers("to_diffusers")
    model = _as_theirs(denoiser, library, w)
    kind = type(model).__name__
    if (kind, scheduler) not in PIPELINES:
        known = " or ".join(repr(name) for of, name in PIPELINES if of == kind)
        raise ValueError(f"scheduler {scheduler!r} of {kind} is unknown: use {known}")
    noise = getattr(library, SCHEDULERS[scheduler])(**_scheduler_settings(denoiser, scheduler))
    with new_folder(Path(path)) as folder:
        part = "transformer" if kind == DIT else "unet"
        model.save_pretrained(folder / part)
        noise.save_pretrained(folder / "scheduler")
        index = _index(kind, scheduler, part, library.__version__) | _write_parts(folder, denoiser, autoencoder)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_parts(folder: Path, denoiser: NetworkDenoiser, autoencoder: Autoencoder | None) -> dict[str, list[str]]:
    """The rest of the pipeline, as far as it is of diffusers' kind; what the index says of it."""
    found: dict[str, list[str]] = {}
    if isinstance(autoencoder, DiffusersAutoencoder):
        autoencoder.model.save_pretrained(folder / "vae")
        found["vae"] = ["diffusers", "AutoencoderKL"]
    if isinstance(denoiser.text_encoder, ClipTextEncoder):
        denoiser.text_encoder.write(folder)
        found |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    return found


def _as_theirs(denoiser: NetworkDenoiser, library: Any, w: float | None) -> Any:
    """The network as a diffusers model, which is not typed."""
    network = denoiser.network
    if isinstance(network, DiffusersNetwork):
        return _wrapped(network, w)
    if isinstance(network, UNet):
        return _twin(denoiser, library, w)
    reason = ": its positions are not those of DiTTransformer2DModel" if isinstance(network, DiT) else ""
    known = ", ".join((UNet.__name__, *CLASSES))
    raise ValueError(f"{type(network).__name__} cannot be exported{reason}; these can: {known}")


def _index(kind: str, scheduler: str, part: str, version: str) -> dict[str, Any]:
    pipeline, others = PIPELINES[kind, scheduler]
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": version}
    index |= {part: ["diffusers", kind], "scheduler": ["diffusers", SCHEDULERS[scheduler]]}
    if kind == TEXT_UNET:
        others = (*others, *OPTIONAL)
        index["requires_safety_checker"] = False
    return index | {name: [None, None] for name in others}


def _scheduler_settings(denoiser: NetworkDenoiser, scheduler: str) -> dict[str, Any]:
    """Betas whose cumulative product is the schedule's alpha^2, and conventions under which DDIM is `samplers.ddim`."""
    schedule, names = denoiser.schedule, {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if schedule.kind != "vp":
        raise ValueError(f"{schedule} is not variance preserving: diffusers' DDIM and LCM schedulers are")
    if denoiser.prediction not in names:
        raise ValueError(f"prediction {denoiser.prediction!r} cannot be exported: use one of {', '.join(names)}")
    alphas = schedule.alpha_sigma(index_times(denoiser))[0].square()
    betas = 1 - alphas / torch.cat([torch.ones(1).double(), alphas[:-1]])
    _check_student(denoiser, len(alphas))
    settings = {
        "num_train_timesteps": len(alphas), "trained_betas": betas.tolist(), "clip_sample": False,
        "set_alpha_to_one": True, "steps_offset": 1, "prediction_type": names[denoiser.prediction],
        "timestep_spacing": "trailing",
    }  # fmt: skip
    if scheduler == "lcm":  # its grid must end at the last index, so its points must divide the indices
        points = max(n for n in range(1, LCM_GRID + 1) if len(alphas) % n == 0)
        settings["original_inference_steps"] = points
    return settings


def _check_student(denoiser: NetworkDenoiser, indices: int) -> None:
    trained = denoiser.trained
    if trained is None:
        return
    if trained.kind in ("stochastic", "encoder", "moments") and trained.steps != 1:
        raise ValueError(f"a student of kind {trained.kind!r} cannot be exported: no scheduler of diffusers steps so")
    if trained.steps is not None and indices % trained.steps:
        text = f"{trained.steps} steps do not divide {indices} indices: diffusers rounds times that the student has not"
        warnings.warn(text, stacklevel=3)


def index_times(denoiser: NetworkDenoiser) -> Tensor:
    """Times (i + 1) / T of the indices that a scheduler has, float64. Shape: (T,)."""
    schedule = denoiser.schedule
    count = len(schedule.alphas_cumprod) if isinstance(schedule, Discrete) else INDICES
    return torch.arange(1, count + 1, dtype=torch.float64) / count


def _twin(denoiser: NetworkDenoiser, library: Any, w: float | None) -> Any:
    """The UNet as a UNet2DModel that reads its time features from a table, whatever times the network was made for."""
    unet: Any = denoiser.network
    guidance = unet.conditioning.guidance
    added = _fixed(guidance, unet.config["guidance"], UNET, w)
    times = denoiser.network_time(index_times(denoiser))
    features = sinusoidal(times, unet.config["channels"]).float()
    settings = unet_settings(unet) | {"time_embedding_type": "learned", "num_train_timesteps": len(times)}
    model = library.UNet2DModel(**settings)
    weights = unet_weights(unet)
    model.load_state_dict(weights | {"time_proj.weight": (features + added).to(weights["conv_in.weight"])})
    return model.to(weights["conv_in.weight"].dtype)


@torch.no_grad()
def _wrapped(network: DiffusersNetwork, w: float | None) -> Any:
    """The wrapped model; with w fixed in the bias of its time embedding where it has no input for w."""
    model: Any = network.model
    settings, kind = network.config["guidance"], network.config["model_class"]
    if settings is None or (kind == TEXT_UNET and settings["form"] == "diffusers"):
        if w is not None:
            raise ValueError(f"w={w} cannot be fixed: this {kind} {'takes none' if settings is None else 'takes it'}")
        return model
    added = _fixed(network.guidance, settings, kind, w)
    model = getattr(diffusers("to_diffusers"), kind)(**settings_of(model)).to(model.dtype)
    model.load_state_dict(network.model.state_dict())
    for module in model.modules():
        if type(module).__name__ == "TimestepEmbedding":
            module.linear_1.bias += (module.linear_1.weight @ added).to(module.linear_1.bias)
    return model


@torch.no_grad()
def _fixed(guidance: GuidanceEmbedding | None, settings: Any, kind: str, w: float | None) -> Tensor:
    """What this w adds to the time features, or 0 where there is no guidance. Shape: (time features,) or ().

    Raises:
        ValueError: w is missing, superfluous or negative, or of a form that depends on more than w.
    """
    if guidance is None:
        if w is not None:
            raise ValueError(f"w={w} cannot be fixed: this network takes none")
        return torch.zeros(())
    if settings["form"] != "diffusers":
        raise ValueError(
            f"guidance of form {settings['form']!r} cannot be exported: diffusers has no such embedding; "
            "distil a student with form 'diffusers'"
        )
    if w is None:
        raise ValueError(f"diffusers' {kind} has no input for w: give the w that is to be fixed")
    low, high = settings["w_range"]
    if not 0 <= w < math.inf:
        raise ValueError(f"w={w:g}: must be finite and >= 0, within the trained [{low:g}, {high:g}] (scale is 1 + w)")
    if not low <= w <= high:
        text = f"w={w:g} lies outside the range [{low:g}, {high:g}] that the student was trained for"
        warnings.warn(text, stacklevel=5)
    weight = torch.tensor([float(w)], device=guidance.project.weight.device)
    return guidance.added(weight, weight)[0]
