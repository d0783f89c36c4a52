"""Attention: `op` is the public function, `reference` plain PyTorch."""
