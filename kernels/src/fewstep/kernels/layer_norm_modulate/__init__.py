"""Modulated LayerNorm: `op` is the public function, `reference` plain PyTorch."""
