"""The attention shapes that the fused kernels promise to serve, and the work in each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One attention of a network: sizes as in `attention`; packed where q, k and v are one projection.

    Args:
        name: network and resolution, e.g. "adm64/32x32".
        batch, heads, queries, keys, dim: B, H, L, M, D of q (B, H, L, D) and k, v (B, H, M, D).
        packed: self-attention from (B, L, 3 H D), as `attention_qkv` takes it.
    """

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    packed: bool = True


SHAPES = (
    # ADM at 64 pixels (arXiv 2105.05233): 384, 576 and 768 channels in heads of 64
    Shape("adm64/32x32", 64, 6, 1024, 1024, 64),
    Shape("adm64/16x16", 64, 9, 256, 256, 64),
    Shape("adm64/8x8", 64, 12, 64, 64, 64),
    Shape("adm64/32x32/batch1", 1, 6, 1024, 1024, 64),
    # Stable Diffusion 2's UNet (arXiv 2112.10752) at 512 pixels: 320, 640 and 1,280 channels in heads of 64, text of 77
    Shape("sd/64x64", 8, 5, 4096, 4096, 64),
    Shape("sd/32x32", 8, 10, 1024, 1024, 64),
    Shape("sd/16x16", 8, 20, 256, 256, 64),
    Shape("sd/64x64/text", 8, 5, 4096, 77, 64, packed=False),
    Shape("sd/32x32/text", 8, 10, 1024, 77, 64, packed=False),
    Shape("sd/16x16/text", 8, 20, 256, 77, 64, packed=False),
    # DiT (arXiv 2212.09748) on latents of 256 and 512 pixels, patch 2: XL has 16 heads of 72, B 12 and S 6 of 64
    Shape("dit-xl/256", 32, 16, 256, 256, 72),
    Shape("dit-xl/512", 8, 16, 1024, 1024, 72),
    Shape("dit-b/256", 64, 12, 256, 256, 64),
    Shape("dit-s/256", 64, 6, 256, 256, 64),
    Shape("dit-b/512", 16, 12, 1024, 1024, 64),
    # wide and narrow heads at 1,024 and 4,096 tokens
    Shape("dim128/1024", 16, 16, 1024, 1024, 128),
    Shape("dim128/4096", 2, 24, 4096, 4096, 128),
    Shape("dim32/1024", 16, 16, 1024, 1024, 32),
)


def flops(shape: Shape, backward: bool = False) -> int:
    """Return the floating-point operations of the matrix products: 2 forward, 5 backward (one recomputed)."""
    products = 5 if backward else 2
    return 2 * products * shape.batch * shape.heads * shape.queries * shape.keys * shape.dim


def bytes_moved(shape: Shape, itemsize: int, backward: bool = False) -> int:
    """Return the least bytes through memory: every input read and every result written once, float32 log-sum-exp too.

    Args:
        shape: which attention.
        itemsize: bytes of an element of q, k, v and the result.
        backward: of the backward pass, which reads q, k, v, result, its gradient and the log-sum-exp, and writes the
            gradients of q, k and v.
    """
    rows, columns = shape.batch * shape.heads * shape.queries, shape.batch * shape.heads * shape.keys
    of_queries, of_keys = (4, 4) if backward else (2, 2)         # q, result (and their gradients); k, v (and theirs)
    return (of_queries * rows + of_keys * columns) * shape.dim * itemsize + 4 * rows
