"""
Views of a picture for image to text: changed pictures for which an answer still holds.

Each answer of a row hangs on one of `KINDS`, and each kind has its views:

    picture     on all of it: the picture itself, and moved
    content     on what is shown, in whatever style: moved, and redrawn
    style       on how it is drawn, whatever is shown: tokens of several pictures of one style

The pictures' views draw from torch's global generator.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor


KINDS = ("picture", "content", "style")
# Bounds of `distort`: degrees, and shares of the size, the picture's width and height, and the ink.
MAX_ANGLE, MAX_SCALE, MAX_SHIFT, MAX_LIGHT = 20.0, 0.3, 0.12, 0.2
# Of `restyle`: shares of its manners, the rest staying as it is; the share that is blurred.
LINES, FILLED, FEW_COLOURS, OTHER_COLOURS, BLURRED = 0.2, 0.15, 0.15, 0.3, 0.3
# Bounds of its draws: strength of lines; least grey that counts as shape, and what it is filled with, of 255; bits per
# colour; share of other inks in an ink, and strength of the blend; radius of the blur in pixels.
LINE_STRENGTH, LEAST_INK, FILL_INK, COLOUR_BITS = (1.5, 4.0), (5, 75), (165, 255), (2, 4)
OTHER_INK, BLEND_STRENGTH, BLUR_RADIUS = 0.6, (0.6, 1.3), (0.3, 1.2)
# `mix_tokens` keeps at most this share of a picture's own tokens.
MAX_OWN_SHARE = 0.7


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def distort(picture: Image.Image) -> Image.Image:
    r"""
    A moved, turned and scaled picture on white, of other colour strength: what it shows and how stays.

    Args:
        picture (`PIL.Image.Image`): RGB on white.

    Returns:
        `PIL.Image.Image` of the same size.
    """
    width, height = picture.size
    angle, scale, right, down, light = (torch.rand(5) * 2 - 1).tolist()
    angle, scale = math.radians(MAX_ANGLE * angle), 1 / (1 + MAX_SCALE * scale)
    # Where the picture's middle goes to, and where it comes from.
    to_x, to_y = width * (0.5 + MAX_SHIFT * right), height * (0.5 + MAX_SHIFT * down)
    from_x, from_y = width / 2, height / 2
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    matrix = (cos, sin, from_x - cos * to_x - sin * to_y, -sin, cos, from_y + sin * to_x - cos * to_y)
    moved = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white"
    )
    # Grey in an eighth of the copies, colours as they are in a quarter, paler between: names hold without colour.
    moved = ImageEnhance.Color(moved).enhance(min(1.0, max(0.0, _uniform(-0.2, 1.4))))
    return moved.point(lambda value: 255 - (255 - value) * (1 + MAX_LIGHT * light))


def restyle(picture: Image.Image) -> Image.Image:
    r"""
    A picture redrawn in another manner on white: what it shows stays.

    One of: its edges as lines, its shape filled, few colours, other colours, or as it is; blurred at times.

    Args:
        picture (`PIL.Image.Image`): RGB on white.

    Returns:
        `PIL.Image.Image` of the same size.
    """
    ink, kind = ImageOps.invert(picture), float(torch.rand(()))
    if kind < LINES:
        edges = ImageOps.grayscale(ink).filter(ImageFilter.SMOOTH).filter(ImageFilter.FIND_EDGES)
        # FIND_EDGES copies the border.
        edges = ImageOps.expand(ImageOps.crop(edges, 1), 1, fill=0)
        strength = _uniform(*LINE_STRENGTH)
        ink = edges.point(lambda value: value * strength).convert("RGB")
    elif kind < LINES + FILLED:
        least, fill = _uniform(*LEAST_INK), round(_uniform(*FILL_INK))
        shape = ImageOps.grayscale(ink).point(lambda value: fill if value > least else 0)
        ink = shape.filter(ImageFilter.SMOOTH).convert("RGB")
    elif kind < LINES + FILLED + FEW_COLOURS:
        fewest, most = COLOUR_BITS
        ink = ImageOps.posterize(ink, int(torch.randint(fewest, most + 1, ())))
    elif kind < LINES + FILLED + FEW_COLOURS + OTHER_COLOURS:
        # Each colour of ink becomes a blend of the three; rows sum to 1 before the strength.
        blend = torch.distributions.Dirichlet(torch.ones(3)).sample((3,))
        blend = torch.lerp(torch.eye(3), blend, OTHER_INK) * _uniform(*BLEND_STRENGTH)
        rows = [value for row in blend.tolist() for value in (*row, 0.0)]
        ink = ink.convert("RGB", rows)
    redrawn = ImageOps.invert(ink)
    if torch.rand(()) < BLURRED:
        redrawn = redrawn.filter(ImageFilter.GaussianBlur(_uniform(*BLUR_RADIUS)))
    return redrawn


def mix_tokens(own: Tensor, donors: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    r"""
    Latents of which many tokens come from other pictures of the same style: the style stays, and what is shown goes.

    Args:
        own (`torch.Tensor` of shape `(2, C, h, w)`): Mean and std of a picture.
        donors (`Sequence[torch.Tensor]`): Of other pictures of its style, each of that shape.
        generator (`torch.Generator`): Source of the shares and places.

    Returns:
        `torch.Tensor` of the shape of `own`; each token stays at its place.
    """
    if not donors:
        return own
    # Picture 0 is its own; it keeps a share of the tokens, and the donors get the rest.
    shape = own.shape[-2:]
    sources = torch.randint(1, len(donors) + 1, shape, generator=generator)
    own_share = MAX_OWN_SHARE * torch.rand((), generator=generator)
    sources[torch.rand(shape, generator=generator) < own_share] = 0
    pictures = torch.stack([own, *donors])  # (1 + K, 2, C, h, w)
    return pictures.gather(0, sources.expand(1, *own.shape))[0]
