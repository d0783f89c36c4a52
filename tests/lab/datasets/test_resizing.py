"""From a picture to a square: each way against sums said in words, on pictures that tell crop from squeeze."""

import numpy as np
import pytest
from PIL import Image

from fewstep.lab.datasets.resizing import METHODS, area, square


@pytest.mark.parametrize(("shape", "size"), [((6, 6), 4), ((9, 14), 6), ((15, 10), 4), ((8, 8), 8), ((3, 3), 7)])
def test_area_is_the_mean_over_what_a_pixel_covers(shape: tuple[int, int], size: int) -> None:
    # Pillow's BOX and torch's "area" take whole pixels alone: other images where the factor is no whole number.
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = shape
    side = min(shape)
    top, left = height // 2 - side // 2, width // 2 - side // 2
    middle = pixels[top : top + side, left : left + side].astype(float)
    fine = middle.repeat(size, 0).repeat(size, 1)  # every old pixel is size x size of these, every new one side x side
    expected = fine.reshape(size, side, size, side, 3).mean((1, 3))
    assert np.abs(area(Image.fromarray(pixels), size) - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("method", "covered"), [("area", 60), ("adm", 60), ("box", 100)])
def test_what_is_cut_off_and_what_is_squeezed(method: str, covered: int) -> None:
    """On a ramp over 100 x 60 pixels: the middle square, or all of it; always around the same centre."""
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8) * 2, (60, 100))
    made = square(Image.fromarray(np.ascontiguousarray(ramp)), 12, 3, method).astype(float)
    assert made.shape == (3, 12, 12)
    inner = made[0, 3:-3, 2:-2]
    assert np.abs(inner - inner[:1]).max() <= 1
    assert np.diff(inner[0]).mean() == pytest.approx(2 * covered / 12, rel=0.02)
    assert made.mean() == pytest.approx(99, abs=1.5)


def test_adm_halves_by_means_while_it_can() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
    found = METHODS["adm"](Image.fromarray(pixels), 16)
    assert np.abs(found - expected).max() <= 2  # rounded four times, along each side at each halving


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_is_white_and_any_mode_is_read(channels: int) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (square(clear, 8, channels, "area") == 255).all()
    for mode in ("L", "P", "CMYK", "1"):
        assert square(Image.new(mode, (20, 10)), 8, channels, "area").shape == (channels, 8, 8)
