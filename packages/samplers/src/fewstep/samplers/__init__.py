"""One function per diffusion sampler, for any denoiser."""
