import pytest
import torch
from PIL import Image

from mmar.training.views import MAX_OWN_SHARE, distort, mix_tokens, restyle


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
    places = torch.arange(16.0).view(1, 4, 4)
    # The mean tells the picture, the std the place.
    own, *donors = (torch.stack([torch.full_like(places, number), places]) for number in range(4))
    generator = torch.Generator().manual_seed(0)
    mixed = torch.stack([mix_tokens(own, donors, generator) for _ in range(300)])
    sources, found = mixed.unbind(1)
    assert torch.equal(found, places.expand(300, 1, 4, 4))
    shares = sources.flatten().long().bincount(minlength=4) / sources.numel()
    # Half of the bound on average; three standard deviations are 0.04.
    assert shares[0].item() == pytest.approx(MAX_OWN_SHARE / 2, abs=0.04)
    assert shares[1:].tolist() == pytest.approx([(1 - MAX_OWN_SHARE / 2) / 3] * 3, abs=0.03)
    assert torch.equal(mix_tokens(own, [], generator), own)
