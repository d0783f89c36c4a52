"""Distillation of guided diffusion models into samplers of a few steps: pure targets, one file per method.

Works on the `Denoiser` protocol of fewstep.schedules.
w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
"""

from fewstep.distill.denoiser import DenoiserTraining
from fewstep.distill.encoder import EncoderDistillation, encoder_target
from fewstep.distill.guidance import GuidanceDistillation, guidance_target
from fewstep.distill.instant import InstantMomentMatching
from fewstep.distill.method import Batch, Method, TargetMethod
from fewstep.distill.moment_matching import MomentMatching
from fewstep.distill.preconditioner import adam_preconditioner, estimate_preconditioner
from fewstep.distill.progressive import ProgressiveDistillation, progressive_target
from fewstep.distill.stochastic import stochastic_target

__all__ = [
    "Batch",
    "DenoiserTraining",
    "EncoderDistillation",
    "GuidanceDistillation",
    "InstantMomentMatching",
    "Method",
    "MomentMatching",
    "ProgressiveDistillation",
    "TargetMethod",
    "adam_preconditioner",
    "encoder_target",
    "estimate_preconditioner",
    "guidance_target",
    "progressive_target",
    "stochastic_target",
]
