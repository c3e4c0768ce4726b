"""
A world of small scenes: one or two groups of tinted glyphs on a plain background, 64 x 64 pixels, made from a seed.

A scene is data (`Scene`), and its image is a pure function of it (`render`). What is held out of training is a rule of
names (`held_out`): some pairs of kind and color, some triples of kind, relation and kind, some pairs of kind and
count.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


IMAGE_SIZE = 64
GLYPHS_FILE = Path(__file__).with_name("glyphs.png")
# Pixels of a glyph in `GLYPHS_FILE`.
GLYPH_SIZE = 64
KINDS = (
    "anchor bell bicycle bird bone butterfly cactus car cat chair cloud crab crown dog duck fish frog "
    "gift guitar hammer hat heart house key lamp leaf lock moon mushroom octopus pear penguin plane "
    "rabbit robot rocket snail snake star tree turtle umbrella"
).split()
COLORS = {
    "red": (215, 35, 40),
    "orange": (245, 130, 25),
    "yellow": (240, 200, 30),
    "green": (35, 155, 65),
    "blue": (40, 95, 225),
    "purple": (130, 50, 180),
    "pink": (245, 115, 185),
    "gray": (120, 122, 128),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (22, 22, 26),
    "beige": (238, 222, 190),
    "mint": (200, 238, 215),
    "lavender": (222, 212, 245),
    "sky": (198, 226, 250),
}
# Pixels of the square in which a glyph stands.
SIZES = {"small": 16, "medium": 24, "large": 32}
# Squares stand on multiples of `LATTICE` pixels; a glyph leaves `BORDER` pixels of its square free on each side.
LATTICE, BORDER = 4, 1
MAX_COUNT = 4
RELATIONS = ("left", "right", "above", "below")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
# Thirds of the image, in which the centre of a lone glyph lies, `SLACK` pixels or more from the next third.
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
SLACK = 2
# Random arrangements that are tried before a scene is given up.
MAX_TRIES = 60


@dataclass(frozen=True)
class Group:
    r"""
    Glyphs of one kind, color and size.

    Args:
        kind (`str`): One of `KINDS`.
        color (`str`): A key of `COLORS`.
        size (`str`): A key of `SIZES`.
        corners (`tuple[tuple[int, int], ...]`): Left and top pixel of each glyph's square.
    """

    kind: str
    color: str
    size: str
    corners: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return len(self.corners)

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of each square, the latter two exclusive."""
        side = SIZES[self.size]
        return [(left, top, left + side, top + side) for left, top in self.corners]


@dataclass(frozen=True)
class Scene:
    r"""
    One or two groups of different kinds on a background.

    Args:
        background (`str`): A key of `BACKGROUNDS`.
        groups (`tuple[Group, ...]`): One or two.
    """

    background: str
    groups: tuple[Group, ...]

    @property
    def relation(self) -> str | None:
        """Where the first group is, seen from the second; None for one group."""
        return relation_of(*self.groups) if len(self.groups) == 2 else None

    @property
    def place(self) -> str | None:
        """The third of the image in which a lone glyph stands, one of `PLACES`; None for more glyphs."""
        if len(self.groups) != 1 or self.groups[0].count != 1:
            return None
        return place_of(self.groups[0].boxes[0])


def relation_of(first: Group, second: Group) -> str | None:
    """The only relation, one of `RELATIONS`, in which all of one group stand to all of another; None without one."""
    a_left, a_top, a_right, a_bottom = _hull(first)
    b_left, b_top, b_right, b_bottom = _hull(second)
    holds = {
        "left": a_right <= b_left,
        "right": a_left >= b_right,
        "above": a_bottom <= b_top,
        "below": a_top >= b_bottom,
    }
    found = [relation for relation in RELATIONS if holds[relation]]
    return found[0] if len(found) == 1 else None


def _hull(group: Group) -> tuple[int, int, int, int]:
    lefts, tops, rights, bottoms = zip(*group.boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def place_of(box: tuple[int, int, int, int]) -> str | None:
    """The third of the image, one of `PLACES`, in which a box has its centre; None too close to the next one."""
    thirds = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        third, rest = divmod((low + high) / 2, IMAGE_SIZE / 3)
        is_near_next = min(rest + (third == 0) * SLACK, IMAGE_SIZE / 3 - rest + (third == 2) * SLACK) < SLACK
        thirds.append(None if is_near_next else int(third))
    return None if None in thirds else PLACES[thirds[1]][thirds[0]]


# What is held out of training


def is_held_out_color(kind: str, color: str) -> bool:
    """One sixth of the pairs of kind and color; each kind lacks one or two colors, each color some seven kinds."""
    return (KINDS.index(kind) + list(COLORS).index(color)) % 6 == 0


def is_held_out_relation(first: str, relation: str, second: str) -> bool:
    """One seventh of the triples; "a left of b" and "b right of a" are the same triple."""
    if relation in ("right", "below"):
        first, relation, second = second, INVERSE[relation], first
    return (KINDS.index(first) + 3 * KINDS.index(second) + 5 * (relation == "above")) % 7 == 0


def is_held_out_count(kind: str, count: int) -> bool:
    """One of the counts 2, 3 and 4 for every fourth kind."""
    place = KINDS.index(kind)
    return place % 4 == 1 and count == 2 + place // 4 % 3


def held_out(scene: Scene) -> set[str]:
    """For which reasons a scene is held out of training: a subset of "color", "count" and "relation"."""
    reasons = {"color" for group in scene.groups if is_held_out_color(group.kind, group.color)}
    reasons |= {"count" for group in scene.groups if is_held_out_count(group.kind, group.count)}
    if len(scene.groups) == 2:
        first, second = scene.groups
        if is_held_out_relation(first.kind, scene.relation, second.kind):
            reasons.add("relation")
    return reasons


# Scenes from random numbers


@dataclass(frozen=True)
class Mix:
    r"""
    Of what the scenes are.

    Args:
        one, several, two (`float`): Shares of scenes with one glyph, with one group of several, and with two groups.
        large (`float`): Share of large glyphs among the lone ones; small and medium ones share the rest.
    """

    one: float = 0.3
    several: float = 0.25
    two: float = 0.45
    large: float = 1 / 3


WORLD = Mix()


def sample_scene(generator: np.random.Generator, mix: Mix = WORLD) -> Scene:
    """A scene with everything at random, whether it is held out or not."""
    shares = np.array([mix.one, mix.several, mix.two])
    while True:
        kind_of_scene = generator.choice(3, p=shares / shares.sum())
        kinds = [KINDS[i] for i in generator.choice(len(KINDS), 2, replace=False)]
        colors = [list(COLORS)[i] for i in generator.integers(len(COLORS), size=2)]
        background = list(BACKGROUNDS)[generator.integers(len(BACKGROUNDS))]
        if kind_of_scene == 0:
            counts, small = (1,), (1 - mix.large) / 2
            sizes = [str(generator.choice(list(SIZES), p=(small, small, mix.large)))]
        elif kind_of_scene == 1:
            counts = (int(generator.integers(2, MAX_COUNT + 1)),)
            # Four medium glyphs would leave little choice of places.
            sizes = ["medium" if counts[0] < 4 and generator.random() < 0.5 else "small"]
        else:
            counts = TWO_GROUP_COUNTS[generator.integers(len(TWO_GROUP_COUNTS))]
            sizes = ["medium" if count == 1 and generator.random() < 0.5 else "small" for count in counts]
        specs = list(zip(kinds, colors, sizes, counts, strict=False))
        relation = RELATIONS[generator.integers(len(RELATIONS))] if len(specs) == 2 else None
        scene = arrange(background, specs, generator, relation)
        if scene is not None:
            return scene


# A third of the scenes with two groups have one glyph of each.
TWO_GROUP_COUNTS = ((1, 1), (1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (1, 1))


def arrange(
    background: str,
    specs: list[tuple[str, str, str, int]],
    generator: np.random.Generator,
    relation: str | None = None,
    place: str | None = None,
    kept: tuple[Group, ...] = (),
) -> Scene | None:
    r"""
    Finds places for groups of glyphs.

    Args:
        background (`str`): A key of `BACKGROUNDS`.
        specs (`list[tuple[str, str, str, int]]`): Kind, color, size and count of each new group.
        generator (`np.random.Generator`): Of the places.
        relation (`str`, *optional*): Of the first group to the second; any by default.
        place (`str`, *optional*): Where a lone glyph must stand; anywhere by default.
        kept (`tuple[Group, ...]`, *optional*): Groups that stand already and come first.

    Returns:
        `Scene`, or None where `MAX_TRIES` arrangements do not fit.
    """
    for _ in range(MAX_TRIES):
        groups, boxes = list(kept), [box for group in kept for box in group.boxes]
        for kind, color, size, count in specs:
            side: int = SIZES[size]
            corners: list[tuple[int, int]] = []
            while len(corners) < count and (corner := _free_corner(boxes, side, generator)) is not None:
                corners.append(corner)
                boxes.append((*corner, corner[0] + side, corner[1] + side))
            if len(corners) < count:
                break
            groups.append(Group(kind, color, size, tuple(sorted(corners))))
        if len(groups) < len(kept) + len(specs):
            continue
        scene = Scene(background, tuple(groups))
        if len(groups) == 2 and (scene.relation is None or relation not in (None, scene.relation)):
            continue
        if len(groups) == 1 and groups[0].count == 1 and (scene.place is None or place not in (None, scene.place)):
            continue
        return scene
    return None


def free_corner(scene: Scene, size: str, generator: np.random.Generator) -> tuple[int, int] | None:
    """Left and top of a square of that size that meets no glyph; None where `MAX_TRIES` places are taken."""
    return _free_corner([box for group in scene.groups for box in group.boxes], SIZES[size], generator)


def _free_corner(boxes: list[tuple[int, int, int, int]], side: int, generator: np.random.Generator):
    for _ in range(MAX_TRIES):
        left, top = (LATTICE * int(i) for i in generator.integers((IMAGE_SIZE - side) // LATTICE + 1, size=2))
        if all(_apart((left, top, left + side, top + side), other) for other in boxes):
            return left, top
    return None


def _apart(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    """Whether two squares do not meet; the glyphs in them leave `BORDER` pixels on each side."""
    return box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]


def scene_of(seed: int, number: int, mix: Mix = WORLD) -> Scene:
    """The scene of that number in the world of that seed, none that is held out."""
    generator = np.random.default_rng([seed, number])
    while True:
        scene = sample_scene(generator, mix)
        if not held_out(scene):
            return scene


# Images


@cache
def _sheet() -> np.ndarray:
    return np.asarray(Image.open(GLYPHS_FILE)).reshape(len(KINDS), GLYPH_SIZE, GLYPH_SIZE, 2)


@cache
def glyph(kind: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Luminance and opacity of a glyph in a square of that many pixels, each `(side, side)` in [0, 1]."""
    sheet = _sheet()[KINDS.index(kind)].astype(np.float32) / 255
    inner = side - 2 * BORDER
    luminance, opacity = sheet[..., 0], sheet[..., 1]
    resized = [
        np.asarray(Image.fromarray(channel).resize((inner, inner), Image.Resampling.BOX))
        for channel in (luminance * opacity, opacity)
    ]
    shade = resized[0] / np.maximum(resized[1], 1e-4)
    return tuple(np.pad(channel, BORDER) for channel in (shade, resized[1]))


@cache
def tinted(kind: str, color: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A glyph's colors `(side, side, 3)` in [0, 255] and its opacity `(side, side, 1)` in [0, 1]."""
    shade, opacity = glyph(kind, side)
    base = np.array(COLORS[color], dtype=np.float32)
    # From dark over the color itself to light.
    dark, light = 0.45 * base, 0.5 * base + 127.5
    shade = shade[..., None]
    colors = np.where(shade < 0.5, dark + (base - dark) * 2 * shade, base + (light - base) * (2 * shade - 1))
    return colors.astype(np.float32), opacity[..., None]


def render(scene: Scene) -> np.ndarray:
    """The image of a scene, `(64, 64, 3)`, 8 bits."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for group in scene.groups:
        colors, opacity = tinted(group.kind, group.color, SIZES[group.size])
        for left, top, right, bottom in group.boxes:
            under = canvas[top:bottom, left:right]
            canvas[top:bottom, left:right] = under + opacity * (colors - under)
    return np.rint(canvas).astype(np.uint8)
