"""Noise schedules, conversions and loss weights of diffusion models, exact at both ends."""

from fewstep.schedules.config import schedule_from_config
from fewstep.schedules.denoiser import Cond, Denoiser, Raw, Trained
from fewstep.schedules.discrete import Discrete
from fewstep.schedules.families import Cosine, Karras, LinearBeta, RectifiedFlow
from fewstep.schedules.guidance import guide, guided_outputs, with_null
from fewstep.schedules.noise import sample_seeds, seeded_noise, seeded_uniform
from fewstep.schedules.prediction import Prediction, from_x, to_x
from fewstep.schedules.reschedule import reschedule
from fewstep.schedules.schedule import Schedule, expand
from fewstep.schedules.weights import edm_weight, flat, loss_weight, snr, snr_plus_one, truncated_snr

__all__ = [
    "Cond",
    "Cosine",
    "Denoiser",
    "Discrete",
    "Karras",
    "LinearBeta",
    "Prediction",
    "Raw",
    "RectifiedFlow",
    "Schedule",
    "Trained",
    "edm_weight",
    "expand",
    "flat",
    "from_x",
    "guide",
    "guided_outputs",
    "loss_weight",
    "reschedule",
    "sample_seeds",
    "schedule_from_config",
    "seeded_noise",
    "seeded_uniform",
    "snr",
    "snr_plus_one",
    "to_x",
    "truncated_snr",
    "with_null",
]
