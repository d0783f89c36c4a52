"""GroupNorm with FiLM, SiLU and residual: `op` is the public function, `reference` plain PyTorch."""
