"""Fused operations for diffusion networks: attention, GroupNorm, sampler updates."""

from fewstep.kernels.attention.op import attention, attention_qkv
from fewstep.kernels.backend import available_backends, use_backend
from fewstep.kernels.group_norm_silu.op import group_norm_silu
from fewstep.kernels.guided_update.op import guided_update, two_step_target
from fewstep.kernels.layer_norm_modulate.op import layer_norm_modulate

__all__ = [
    "attention", "attention_qkv", "available_backends", "group_norm_silu", "guided_update", "layer_norm_modulate",
    "two_step_target", "use_backend",
]
