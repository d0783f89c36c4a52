"""`fewstep profile`: what kernels and whole networks cost here, beside what PyTorch alone would.

`end_to_end` and what it imports need torch and the other fewstep packages only: it also runs on machines without hydra.
"""
