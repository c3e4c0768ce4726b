import pytest
import torch
from PIL import Image

from mmar.training.views import MAX_OWN_SHARE, distort, mix_style, restyle


@pytest.fixture
def picture():
    """A red square with a blue middle on white."""
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste("red", (10, 10, 22, 22))
    picture.paste("blue", (14, 14, 18, 18))
    return picture


@pytest.mark.parametrize("change", [distort, restyle])
def test_changed_pictures_keep_size_and_white_background(picture, change):
    torch.manual_seed(0)
    changed = [change(picture) for _ in range(40)]
    for view in changed:
        assert view.size == (32, 32) and view.mode == "RGB"
        assert view.getpixel((0, 0)) == (255, 255, 255)
        assert min(view.convert("L").get_flattened_data()) < 230  # something is still to be seen
    assert len({view.tobytes() for view in changed}) > 20
    torch.manual_seed(0)
    assert [change(picture).tobytes() for _ in range(40)] == [view.tobytes() for view in changed]


def test_restyle_leaves_the_shape_where_it_was(picture):
    torch.manual_seed(0)
    for _ in range(40):
        ink = restyle(picture).convert("L").point(lambda value: 255 * (value < 215)).getbbox()
        # Within the blur and the width of a line.
        assert all(abs(a - b) <= 3 for a, b in zip(ink, (10, 10, 22, 22), strict=True))


def test_mixed_tokens_are_of_the_style_and_at_their_places():
    styles = ["flat", "bold"] * 50
    rows, places = torch.arange(100.0), torch.arange(16.0)
    # The mean tells the row, the std the place.
    latents = torch.stack([rows[:, None].expand(100, 16), places.expand(100, 16)], 1).view(100, 2, 1, 4, 4)
    torch.manual_seed(0)
    mixed = mix_style(latents, styles).flatten(3).squeeze(2)
    sources, found = mixed.unbind(1)
    assert torch.equal(found, places.expand(100, 16))
    assert torch.equal(sources % 2, (rows % 2)[:, None].expand(100, 16))
    own = (sources == rows[:, None]).float().mean().item()
    # Half of the bound on average, and 1 in 50 by chance; three standard deviations are 0.07.
    assert abs(own - (MAX_OWN_SHARE / 2 + (1 - MAX_OWN_SHARE / 2) / 50)) < 0.07
