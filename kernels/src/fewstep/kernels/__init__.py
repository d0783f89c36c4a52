"""Fused operations for diffusion networks: attention, GroupNorm, sampler updates."""

from fewstep.kernels.attention.op import attention, attention_qkv
from fewstep.kernels.backend import available_backends, use_backend
from fewstep.kernels.group_norm_silu.op import group_norm_silu
from fewstep.kernels.guided_update.op import guided_update

__all__ = ["attention", "attention_qkv", "available_backends", "group_norm_silu", "guided_update", "use_backend"]
