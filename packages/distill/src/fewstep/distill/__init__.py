"""Distillation of guided diffusion models into samplers of a few steps: pure targets, one file per method.

Works on the `Denoiser` protocol of fewstep.schedules.
w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).
"""

from fewstep.distill.denoiser import DenoiserTraining
from fewstep.distill.guidance import GuidanceDistillation, guidance_target
from fewstep.distill.method import Batch, Method
from fewstep.distill.progressive import ProgressiveDistillation, progressive_target

__all__ = [
    "Batch",
    "DenoiserTraining",
    "GuidanceDistillation",
    "Method",
    "ProgressiveDistillation",
    "guidance_target",
    "progressive_target",
]
