"""Guidance, conversion and sampler update: `op` is the public function, `reference` plain PyTorch."""
