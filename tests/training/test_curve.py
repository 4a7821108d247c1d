"""The picture of the validation losses."""

import io

from PIL import Image

from mochi_tune.training.curve import draw_losses


def test_the_line_goes_through_the_losses():
    picture = Image.open(io.BytesIO(draw_losses([(0, 0.4), (500, 0.4), (1000, 0.2)], "validation loss"))).convert("RGB")
    assert picture.size == (720, 360)
    blue = [
        (x, y)
        for y in range(40, 310)
        for x in range(76, 700)
        if (p := picture.getpixel((x, y))) and isinstance(p, tuple) and p[2] - p[0] > 100
    ]
    # The axes are 0 to 1000 over 76 to 696, and 0.2 to 0.4 over 304 to 40.
    for step, loss in ((0, 0.4), (250, 0.4), (500, 0.4), (750, 0.3), (1000, 0.2)):
        x, y = 76 + 620 * step / 1000, 304 - 264 * (loss - 0.2) / 0.2
        assert min(abs(x - a) + abs(y - b) for a, b in blue) <= 2


def test_a_single_loss_is_a_point():
    assert Image.open(io.BytesIO(draw_losses([(7, 0.5)], "x"))).size == (720, 360)
