"""Noise schedules, conversions and loss weights of diffusion models, exact at both ends."""
