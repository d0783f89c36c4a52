"""The shapes of GroupNorm that the fused kernels promise to serve, and the least memory traffic of each."""

from dataclasses import dataclass

CTA_BYTES, CLUSTER = 192 * 1024, 8        # what a program keeps on chip with room to work, and programs that share


@dataclass(frozen=True)
class Shape:
    """One normalisation of a network, x (B, C, side, side).

    Args:
        name: network and resolution, e.g. "adm64/64x64".
        batch, channels, groups, side: sizes.
        film: with scale and shift per sample.
        act: with SiLU.
        residual: None, "before" or "after".
    """

    name: str
    batch: int
    channels: int
    groups: int
    side: int
    film: bool = False
    act: bool = True
    residual: str | None = None

    @property
    def elements(self) -> int:
        """Elements of x."""
        return self.batch * self.channels * self.side**2

    @property
    def group(self) -> int:
        """Elements of one group of one sample."""
        return self.channels // self.groups * self.side**2


SHAPES = (
    # ADM at 64 pixels (arXiv 2105.05233), the imagenet64 preset: 192, 384, 576 and 768 channels, FiLM in every block;
    # the decoder's first normalisations see what was concatenated
    Shape("adm64/64x64", 64, 192, 32, 64, film=True),
    Shape("adm64/64x64/joined", 64, 384, 32, 64),
    Shape("adm64/32x32", 64, 384, 32, 32, film=True),
    Shape("adm64/32x32/joined", 64, 960, 32, 32),
    Shape("adm64/32x32/attention", 64, 384, 32, 32, act=False, residual="before"),
    Shape("adm64/16x16", 64, 576, 32, 16, film=True),
    Shape("adm64/16x16/joined", 64, 1344, 32, 16),
    Shape("adm64/8x8", 64, 768, 32, 8, film=True),
    Shape("adm64/8x8/joined", 64, 1536, 32, 8),
    Shape("adm64/64x64/batch1", 1, 192, 32, 64, film=True),
    Shape("adm64/8x8/batch1", 1, 768, 32, 8, film=True),
    # Stable Diffusion's UNet (arXiv 2112.10752) at 512 pixels: 320, 640 and 1,280 channels, no FiLM
    Shape("sd/64x64", 8, 320, 32, 64),
    Shape("sd/64x64/joined", 8, 960, 32, 64),
    Shape("sd/32x32", 8, 640, 32, 32),
    Shape("sd/32x32/joined", 8, 1920, 32, 32),
    Shape("sd/16x16", 8, 1280, 32, 16),
    Shape("sd/16x16/joined", 8, 2560, 32, 16),
    Shape("sd/8x8", 8, 1280, 32, 8),
    Shape("sd/64x64/batch1", 2, 320, 32, 64),
    # the decoder of its autoencoder: 512 channels at 64 pixels to 128 at 512
    Shape("vae/64x64", 8, 512, 32, 64),
    Shape("vae/128x128", 8, 512, 32, 128),
    Shape("vae/256x256", 8, 256, 32, 256),
    Shape("vae/512x512", 4, 128, 32, 512),
    Shape("vae/512x512/batch1", 1, 128, 32, 512),
)


def passes(shape: Shape, itemsize: int, backward: bool = False) -> int:
    """Return how often inputs must be read: once where a group fits a program or a cluster of 8, else twice."""
    held = shape.group * itemsize * (2 if backward or shape.residual == "before" else 1)
    return 1 if held <= CLUSTER * CTA_BYTES else 2


def bytes_moved(shape: Shape, itemsize: int, backward: bool = False) -> int:
    """Return the least bytes of the tier through memory; parameters, statistics and sums are left out.

    Args:
        shape: which normalisation.
        itemsize: bytes of an element of x.
        backward: of the backward pass: reads x and dy, writes dx; with residual="before" also reads the sum's gradient.
    """
    twice = passes(shape, itemsize, backward) - 1
    if backward:
        tensors = 3 + 2 * twice + (shape.residual == "before")
    elif shape.residual == "before":
        tensors = 4 + twice                          # x, residual, their sum (read again by a second pass), y
    else:
        tensors = 2 + twice + (shape.residual == "after")
    return tensors * shape.elements * itemsize


def flops(shape: Shape, backward: bool = False) -> int:
    """Return about how many floating-point operations are done: some 12 per element forward and 25 backward."""
    return (25 if backward else 12) * shape.elements
