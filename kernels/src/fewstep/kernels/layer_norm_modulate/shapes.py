"""The shapes of modulated LayerNorm that the fused kernels promise to serve, and the least memory traffic of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One normalisation of a diffusion transformer, x (B, tokens, channels).

    Args:
        name: network and image size, e.g. "dit-xl/256".
        batch, tokens, channels: sizes.
    """

    name: str
    batch: int
    tokens: int
    channels: int

    @property
    def elements(self) -> int:
        """Elements of x."""
        return self.batch * self.tokens * self.channels


SHAPES = (
    # DiT (arXiv 2212.09748) on latents of 256 and 512 pixels, patch 2
    Shape("dit-xl/256", 32, 256, 1152),
    Shape("dit-xl/512", 8, 1024, 1152),
    Shape("dit-l/256", 32, 256, 1024),
    Shape("dit-b/256", 64, 256, 768),
    Shape("dit-b/256/batch1", 1, 256, 768),
    Shape("dit-s/256", 64, 256, 384),
)


def bytes_moved(shape: Shape, itemsize: int, backward: bool = False) -> int:
    """Return the least bytes through memory: x read and y written; backward x and dy read and dx written."""
    return (3 if backward else 2) * shape.elements * itemsize


def flops(shape: Shape, backward: bool = False) -> int:
    """Return about how many floating-point operations are done: some 7 per element forward and 14 backward."""
    return (14 if backward else 7) * shape.elements
