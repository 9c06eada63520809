"""Grey levels to bytes and back, sheets that can be cut again, maps whose colours grow lighter, PNG without loss."""

import numpy as np
import pytest

from lmtrain.data import images, pictures


@pytest.mark.parametrize("alphabet", [2, 17, 256])
def test_levels_come_back_from_bytes(alphabet):
    x_ND = np.arange(alphabet)[:, None].repeat(4, 1)
    shown = pictures.shade(x_ND, alphabet=alphabet, grid=(2, 2, 1))
    assert shown.shape == (alphabet, 2, 2, 1)
    assert shown.min() == 0
    assert shown.max() == 255
    assert np.array_equal(pictures.symbols(shown, alphabet=alphabet), x_ND)
    if alphabet == 256:
        assert np.array_equal(shown.reshape(256, 4), x_ND)


def test_reals_are_bytes_by_their_interval():
    x_ND = np.array([[0.0, 1 / 256, 0.5, 255.9 / 256, 1.3, -0.2]])
    assert pictures.shade(x_ND, alphabet=0, grid=(1, 6, 1)).ravel().tolist() == [0, 1, 128, 255, 255, 0]


@pytest.mark.parametrize(("count", "columns"), [(1, None), (7, 3), (12, None)])
def test_a_sheet_holds_every_image_whole(count, columns):
    made = np.random.default_rng(0).integers(0, 256, (count, 5, 3, 3), dtype=np.uint8)
    out = pictures.sheet(made, columns=columns)
    scale = 1
    while out[:scale, :scale].shape[0] == scale and (out[:scale] == 128).all():
        scale += 1
    scale -= 1  # the grey line above the first row is `scale` thick
    small = out[::scale, ::scale]
    across = (small.shape[1] - 1) // 4
    assert across == (columns or across)
    for k in range(count):
        top, left = (k // across) * 6 + 1, (k % across) * 4 + 1
        assert np.array_equal(small[top : top + 5, left : left + 3], made[k])


def test_heat_grows_lighter_and_stops_at_the_top():
    heat = pictures.heat(np.linspace(-1, 9, 50)[None, None], top=8.0)[0, 0].astype(int).sum(1)
    assert (np.diff(heat) >= 0).all()
    assert heat[0] == heat[4]  # what costs nothing, or less in a rounding, is black
    assert heat[-1] == heat[-4] > heat[20]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_is_the_same_pixels(channels):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 4, channels), dtype=np.uint8)
    assert np.array_equal(images.decode(images.encode(pixels), channels=None, where="x"), pixels)
