"""
Finds the glyphs of an image by matching templates, without learning, and says what of a caption they fulfil.

Every glyph of every kind, color and size is compared with the image at every place. The error of a match is the
squared difference to the rendered glyph, as a share of what the glyph differs from the plain background; matches
below `LARGEST_ERROR` count, the best first, each place once. What is left unexplained counts as an unknown thing.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from .texts import Facts
from .world import BACKGROUNDS, COLORS, IMAGE_SIZE, INVERSE, KINDS, SIZES, Group, Scene, place_of, tinted


# A glyph is found where the error of its match is below this share.
LARGEST_ERROR = 0.45
# Matches to look at more closely, which are searched for on every second pixel.
LARGEST_COARSE_ERROR = 0.85
STRIDE = 2
# Of the smaller square's area: two glyphs do not share more.
LARGEST_OVERLAP = 0.25
# Root mean square of the three channels from which on a pixel differs, in levels of 255.
LARGEST_DIFFERENCE = 55.0
# So many differing pixels that no glyph explains are an unknown thing.
LARGEST_UNEXPLAINED = 40
# The background must fill this share of the image.
SMALLEST_GROUND = 0.3
# A pixel is of the background if it differs by less than this, in levels of 255.
GROUND_TOLERANCE = 22.0
TEMPLATES = [(kind, color) for kind in KINDS for color in COLORS]


@dataclass(frozen=True)
class Glyph:
    """A glyph that was found: its kind, color, size, left and top pixel, and the error of its match."""

    kind: str
    color: str
    size: str
    corner: tuple[int, int]
    error: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        side = SIZES[self.size]
        return (*self.corner, self.corner[0] + side, self.corner[1] + side)


@dataclass(frozen=True)
class Findings:
    r"""
    What an image shows.

    Args:
        background (`str`, *optional*): A key of `BACKGROUNDS`; None for another one.
        glyphs (`tuple[Glyph, ...]`): All that were found.
        num_unexplained (`int`): Pixels that differ from what was found.
    """

    background: str | None
    glyphs: tuple[Glyph, ...]
    num_unexplained: int

    @property
    def is_clear(self) -> bool:
        """Whether the image shows known glyphs on a known background, and nothing else."""
        return self.background is not None and self.num_unexplained <= LARGEST_UNEXPLAINED


@cache
def _templates(background: str, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Differences of all glyphs from a background, `(pixels * 3, templates)`, and their squared norms."""
    ground, side = np.array(BACKGROUNDS[background], dtype=np.float32), SIZES[size]
    columns = []
    for kind, color in TEMPLATES:
        colors, opacity = tinted(kind, color, side)
        columns.append((opacity * (colors - ground)).reshape(-1))
    stacked = np.stack(columns, axis=1)
    return stacked, (stacked**2).sum(0)


def background_of(image: np.ndarray) -> str | None:
    """The background that fills most of an image `(64, 64, 3)`; None where none fills enough of it."""
    distances = {
        name: np.abs(image.astype(np.float32) - np.array(color, dtype=np.float32)).max(-1)
        for name, color in BACKGROUNDS.items()
    }
    shares = {name: float((distance < GROUND_TOLERANCE).mean()) for name, distance in distances.items()}
    best = max(shares, key=shares.get)
    # Pale backgrounds are close to each other: of those that fill as much, the nearest one.
    close = [name for name, share in shares.items() if share > 0.8 * shares[best]]
    best = min(close, key=lambda name: float(np.median(distances[name])))
    return best if shares[best] >= SMALLEST_GROUND else None


def find(image: np.ndarray) -> Findings:
    r"""
    Finds the glyphs of an image.

    Args:
        image (`np.ndarray` of shape `(64, 64, 3)`): 8 bits.

    Returns:
        `Findings`
    """
    background = background_of(image)
    if background is None:
        return Findings(None, (), image.shape[0] * image.shape[1])
    difference = image.astype(np.float32) - np.array(BACKGROUNDS[background], dtype=np.float32)
    candidates = [match for size in SIZES for match in _coarse_matches(difference, background, size)]
    candidates.sort(key=lambda match: match[0])
    glyphs: list[Glyph] = []
    for _, size, left, top in candidates:
        if any(_overlap(size, (left, top), glyph) > LARGEST_OVERLAP for glyph in glyphs):
            continue
        glyph = _refined(difference, background, size, left, top)
        if glyph.error < LARGEST_ERROR and not any(
            _overlap(glyph.size, glyph.corner, other) > LARGEST_OVERLAP for other in glyphs
        ):
            glyphs.append(glyph)
    rest = difference.copy()
    for glyph in glyphs:
        left, top, right, bottom = glyph.box
        templates, _ = _templates(background, glyph.size)
        shown = templates[:, TEMPLATES.index((glyph.kind, glyph.color))].reshape(bottom - top, right - left, 3)
        rest[top:bottom, left:right] -= shown
    num_unexplained = int((np.sqrt((rest**2).mean(-1)) > LARGEST_DIFFERENCE).sum())
    return Findings(background, tuple(sorted(glyphs, key=lambda g: (g.kind, g.color, g.corner))), num_unexplained)


def _errors(patches: np.ndarray, background: str, size: str) -> np.ndarray:
    """Errors of all templates, `(places, templates)`, for the patches `(places, pixels * 3)`."""
    templates, norms = _templates(background, size)
    squares = (patches**2).sum(1, keepdims=True)
    return (squares - 2 * patches @ templates + norms) / norms


def _patches(difference: np.ndarray, side: int, lefts: np.ndarray, tops: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(difference, (side, side), axis=(0, 1))  # (y, x, 3, side, side)
    return windows[tops, lefts].transpose(0, 2, 3, 1).reshape(len(lefts), -1)


def _coarse_matches(difference: np.ndarray, background: str, size: str) -> list[tuple[float, str, int, int]]:
    """Places on every second pixel where some glyph might be: its error, size, left and top."""
    side = SIZES[size]
    starts = np.arange(0, IMAGE_SIZE - side + 1, STRIDE)
    tops, lefts = (grid.ravel() for grid in np.meshgrid(starts, starts, indexing="ij"))
    # Where hardly anything differs from the background there is no glyph, and no need to compare.
    sums = np.pad((difference**2).sum(-1), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = sums[tops + side, lefts + side] - sums[tops, lefts + side] - sums[tops + side, lefts] + sums[tops, lefts]
    near = inside > (1 - LARGEST_COARSE_ERROR) ** 2 * _templates(background, size)[1].min()
    tops, lefts = tops[near], lefts[near]
    if not len(tops):
        return []
    errors = _errors(_patches(difference, side, lefts, tops), background, size).min(1)
    return [
        (float(error), size, int(left), int(top))
        for error, left, top in zip(errors, lefts, tops, strict=True)
        if error < LARGEST_COARSE_ERROR
    ]


def _refined(difference: np.ndarray, background: str, size: str, left: int, top: int) -> Glyph:
    """The best match within one pixel of a place."""
    limit = IMAGE_SIZE - SIZES[size]
    places = [(x, y) for x in range(left - 1, left + 2) for y in range(top - 1, top + 2)]
    places = [(x, y) for x, y in places if 0 <= x <= limit and 0 <= y <= limit]
    lefts, tops = (np.array(values) for values in zip(*places, strict=True))
    errors = _errors(_patches(difference, SIZES[size], lefts, tops), background, size)
    place, template = np.unravel_index(int(errors.argmin()), errors.shape)
    kind, color = TEMPLATES[template]
    return Glyph(kind, color, size, places[place], float(errors[place, template]))


def _overlap(size: str, corner: tuple[int, int], glyph: Glyph) -> float:
    """Share of the smaller square's area that two squares have in common."""
    side = SIZES[size]
    left, top, right, bottom = glyph.box
    width = min(corner[0] + side, right) - max(corner[0], left)
    height = min(corner[1] + side, bottom) - max(corner[1], top)
    return max(width, 0) * max(height, 0) / min(side, right - left) ** 2


def groups_of(findings: Findings) -> tuple[Group, ...]:
    """The glyphs that were found, by kind and color; a group's size is that of its first glyph."""
    found: dict[tuple[str, str], list[Glyph]] = {}
    for glyph in findings.glyphs:
        found.setdefault((glyph.kind, glyph.color), []).append(glyph)
    return tuple(
        Group(kind, color, glyphs[0].size, tuple(sorted(glyph.corner for glyph in glyphs)))
        for (kind, color), glyphs in found.items()
    )


def scene_of_image(image: np.ndarray) -> Scene | None:
    """The scene that an image shows; None if it is not clear or shows no glyph."""
    findings = find(image)
    groups = groups_of(findings)
    return Scene(findings.background, groups) if findings.is_clear and groups else None


@dataclass(frozen=True)
class Score:
    r"""
    What of a caption an image fulfils; None where the caption says nothing.

    Args:
        kinds, counts, colors, sizes (`bool`): For all its things together, each thing by its own glyphs.
        relation, place, background (`bool`, *optional*): Of the things.
        is_clear (`bool`): Whether nothing else is in the image.
    """

    kinds: bool
    counts: bool | None
    colors: bool | None
    sizes: bool | None
    relation: bool | None
    place: bool | None
    background: bool | None
    is_clear: bool

    @property
    def all_right(self) -> bool:
        return all(value is not False for value in vars(self).values())


def score(image: np.ndarray, asked: Facts) -> Score:
    r"""
    Judges an image by a caption's facts.

    Args:
        image (`np.ndarray` of shape `(64, 64, 3)`): 8 bits.
        asked (`Facts`): The caption's.

    Returns:
        `Score`
    """
    findings = find(image)
    shown = [[glyph for glyph in findings.glyphs if glyph.kind == thing.kind] for thing in asked.things]
    are_there = all(shown)
    others = len(findings.glyphs) - sum(map(len, shown))

    def judged(name: str, holds) -> bool | None:
        pairs = zip(asked.things, shown, strict=True)
        values = [holds(thing, glyphs) for thing, glyphs in pairs if getattr(thing, name) is not None]
        return (are_there and all(values)) if values else None

    relation = place = None
    if asked.relation is not None:
        relation = are_there and _stands(shown[0], asked.relation, shown[1])
    if asked.place is not None:
        place = are_there and len(shown[0]) == 1 and _is_at(shown[0][0], asked.place)
    return Score(
        kinds=are_there,
        counts=judged("count", lambda thing, glyphs: len(glyphs) == thing.count),
        colors=judged("color", lambda thing, glyphs: all(glyph.color == thing.color for glyph in glyphs)),
        sizes=judged("size", lambda thing, glyphs: all(glyph.size == thing.size for glyph in glyphs)),
        relation=relation,
        place=place,
        background=None if asked.background is None else asked.background == findings.background,
        is_clear=findings.is_clear and others == 0,
    )


# Pixels by which squares may overlap and centres stand outside of their third.
TOLERANCE = 2


def _stands(first: list[Glyph], relation: str, second: list[Glyph]) -> bool:
    """Whether all glyphs of one thing stand in a relation to all of another."""
    if relation in ("right", "below"):
        first, relation, second = second, INVERSE[relation], first
    axis = 0 if relation == "left" else 1
    return max(glyph.box[axis + 2] for glyph in first) <= min(glyph.box[axis] for glyph in second) + TOLERANCE


def _is_at(glyph: Glyph, place: str) -> bool:
    shifts = (-TOLERANCE, 0, TOLERANCE)
    left, top, right, bottom = glyph.box
    return any(place_of((left + dx, top + dy, right + dx, bottom + dy)) == place for dx in shifts for dy in shifts)
