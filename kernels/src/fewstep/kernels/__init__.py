"""Fused operations for diffusion networks: attention, GroupNorm, sampler updates."""
