"""Distillation of diffusion models into samplers of a few steps; one file per method."""
