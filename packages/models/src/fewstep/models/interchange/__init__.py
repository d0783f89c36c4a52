"""Checkpoints from elsewhere and for elsewhere: diffusers' networks as denoisers, denoisers as diffusers' pipelines."""
