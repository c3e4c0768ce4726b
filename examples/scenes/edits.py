"""
Edits of scenes: an instruction, the scene before and the scene after, and whether an image shows what was asked.
"""

from dataclasses import dataclass, replace

import numpy as np

from .judge import TOLERANCE, scene_of_image, score
from .texts import PLACE_WORDS, Facts, Thing, noun, phrase, toward
from .world import (
    BACKGROUNDS,
    COLORS,
    INVERSE,
    KINDS,
    MAX_COUNT,
    PLACES,
    RELATIONS,
    SIZES,
    WORLD,
    Group,
    Mix,
    Scene,
    arrange,
    free_corner,
    held_out,
    sample_scene,
)


# Places that are named like the way there.
SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Edit:
    r"""
    Args:
        kind (`str`): One of `EDIT_KINDS`.
        instruction (`str`): What the user asks for.
        before, after (`Scene`): The scene, and one that follows.
        asked (`Facts`): Relation and place that the instruction asks for, with the things that they are about.
        moved (`str`, *optional*): Kind whose glyphs may stand anywhere afterwards.
        dropped (`str`, *optional*): Kind of which one glyph goes, whichever.
        grown (`str`, *optional*): Kind of which one glyph more comes, anywhere.
    """

    kind: str
    instruction: str
    before: Scene
    after: Scene
    asked: Facts = Facts()
    moved: str | None = None
    dropped: str | None = None
    grown: str | None = None


def sample_edit(generator: np.random.Generator, kind: str | None = None, mix: Mix = WORLD) -> Edit:
    """An edit of a random scene; neither scene is held out of training."""
    return _sample_edit(generator, kind, mix, is_training=True)


def sample_held_out_edit(generator: np.random.Generator, kind: str | None = None, mix: Mix = WORLD) -> Edit:
    """An edit whose scene before or after is held out of training."""
    return _sample_edit(generator, kind, mix, is_training=False)


def _sample_edit(generator: np.random.Generator, kind: str | None, mix: Mix, is_training: bool) -> Edit:
    while True:
        scene = sample_scene(generator, mix)
        chosen = kind or EDIT_KINDS[generator.integers(len(EDIT_KINDS))]
        edit = _EDITORS[chosen](scene, generator)
        if edit is not None and is_training == (not held_out(edit.before) and not held_out(edit.after)):
            return edit


def _pick(choices, excluded, generator: np.random.Generator):
    left = [choice for choice in choices if choice not in excluded]
    return left[generator.integers(len(left))]


def _named(group: Group) -> str:
    return f"the {noun(group.kind, group.count)}"


def _with_group(scene: Scene, index: int, group: Group) -> Scene:
    return replace(scene, groups=tuple(group if i == index else other for i, other in enumerate(scene.groups)))


def _recolor(scene: Scene, generator: np.random.Generator) -> Edit:
    index = int(generator.integers(len(scene.groups)))
    group = scene.groups[index]
    color = _pick(COLORS, {group.color}, generator)
    wording = _pick(("make {name} {color}", "turn {name} {color}", "change {name} to {color}"), (), generator)
    after = _with_group(scene, index, replace(group, color=color))
    return Edit("recolor", wording.format(name=_named(group), color=color), scene, after)


def _replace(scene: Scene, generator: np.random.Generator) -> Edit:
    index = int(generator.integers(len(scene.groups)))
    group = scene.groups[index]
    kind = _pick(KINDS, {g.kind for g in scene.groups}, generator)
    new = phrase(Thing(kind, 1)) if group.count == 1 else noun(kind, group.count)
    wording = _pick(("turn {name} into {new}", "replace {name} with {new}"), (), generator)
    after = _with_group(scene, index, replace(group, kind=kind))
    return Edit("replace", wording.format(name=_named(group), new=new), scene, after)


def _background(scene: Scene, generator: np.random.Generator) -> Edit:
    background = _pick(BACKGROUNDS, {scene.background}, generator)
    wording = _pick(("make the background {name}", "change the background to {name}"), (), generator)
    return Edit("background", wording.format(name=background), scene, replace(scene, background=background))


def _remove(scene: Scene, generator: np.random.Generator) -> Edit | None:
    index = int(generator.integers(len(scene.groups)))
    group = scene.groups[index]
    if group.count > 1 and (len(scene.groups) == 1 or generator.random() < 0.5):
        corners = list(group.corners)
        del corners[generator.integers(len(corners))]
        after = _with_group(scene, index, replace(group, corners=tuple(corners)))
        if not _is_plain(after):
            return None
        return Edit("remove", f"remove one {noun(group.kind, 1)}", scene, after, dropped=group.kind)
    if len(scene.groups) == 1:
        return None
    after = replace(scene, groups=tuple(other for other in scene.groups if other is not group))
    return Edit("remove", f"remove {_named(group)}", scene, after) if _is_plain(after) else None


def _is_plain(scene: Scene) -> bool:
    """Whether a scene is one that the world has: a lone glyph in a clear place, two groups in a clear relation."""
    if len(scene.groups) == 2:
        return scene.relation is not None
    return scene.groups[0].count > 1 or scene.place is not None


def _add(scene: Scene, generator: np.random.Generator) -> Edit | None:
    if len(scene.groups) == 2 or generator.random() < 0.3:
        return _add_another(scene, generator)
    group = scene.groups[0]
    kind, color = _pick(KINDS, {group.kind}, generator), _pick(COLORS, (), generator)
    size = "medium" if generator.random() < 0.5 else "small"
    relation = RELATIONS[generator.integers(len(RELATIONS))]
    after = arrange(scene.background, [(kind, color, size, 1)], generator, INVERSE[relation], kept=scene.groups)
    if after is None:
        return None
    thing = Thing(kind, 1, color)
    if generator.random() < 0.5:
        return Edit("add", f"add {phrase(thing)}", scene, after, moved=kind)
    asked = Facts((thing, Thing(group.kind)), relation)
    return Edit("add", f"add {phrase(thing)} {toward(relation)} {_named(group)}", scene, after, asked, moved=kind)


def _add_another(scene: Scene, generator: np.random.Generator) -> Edit | None:
    """One more glyph of a group, at a free place."""
    index = int(generator.integers(len(scene.groups)))
    group = scene.groups[index]
    if group.count == MAX_COUNT or group.size == "large":
        return None
    corner = free_corner(scene, group.size, generator)
    if corner is None:
        return None
    after = _with_group(scene, index, replace(group, corners=tuple(sorted((*group.corners, corner)))))
    wording = _pick(("add another {name}", "add one more {name}"), (), generator)
    instruction = wording.format(name=noun(group.kind, 1))
    return Edit("add", instruction, scene, after, grown=group.kind) if _is_plain(after) else None


def _move(scene: Scene, generator: np.random.Generator) -> Edit | None:
    index = int(generator.integers(len(scene.groups)))
    group = scene.groups[index]
    spec = [(group.kind, group.color, group.size, group.count)]
    if len(scene.groups) == 2:
        other = scene.groups[1 - index]
        now = scene.relation if index == 0 else INVERSE[scene.relation]
        relation = _pick(RELATIONS, {now}, generator)
        after = arrange(scene.background, spec, generator, INVERSE[relation], kept=(other,))
        if after is None:
            return None
        asked = Facts((Thing(group.kind), Thing(other.kind)), relation)
        instruction = f"move {_named(group)} {toward(relation)} {_named(other)}"
        return Edit("move", instruction, scene, after, asked, moved=group.kind)
    if scene.place is None:
        return None
    if generator.random() < 0.5:
        place = _pick([place for row in PLACES for place in row], {scene.place}, generator)
        # "To the left" keeps the height; the place in the middle of the left side has other words.
        words = f"so that it is {PLACE_WORDS[place]}" if place in SIDES else f"to the {place}"
    else:
        row = next(i for i, names in enumerate(PLACES) if scene.place in names)
        column = PLACES[row].index(scene.place)
        way = SIDES[generator.integers(len(SIDES))]
        target = {"left": (row, 0), "right": (row, 2), "top": (0, column), "bottom": (2, column)}[way]
        place, words = PLACES[target[0]][target[1]], f"to the {way}"
        if place == scene.place:
            return None
    after = arrange(scene.background, spec, generator, place=place)
    if after is None:
        return None
    asked = Facts((Thing(group.kind),), None, place)
    return Edit("move", f"move the {group.kind} {words}", scene, after, asked, moved=group.kind)


def _resize(scene: Scene, generator: np.random.Generator) -> Edit | None:
    if scene.place is None:
        return None
    group = scene.groups[0]
    size = _pick(SIZES, {group.size}, generator)
    after = arrange(scene.background, [(group.kind, group.color, size, 1)], generator, place=scene.place)
    if after is None:
        return None
    asked = Facts((Thing(group.kind),), None, scene.place)
    wording = _pick(("make the {name} {size}", "change the size of the {name} to {size}"), (), generator)
    return Edit("resize", wording.format(name=group.kind, size=size), scene, after, asked, moved=group.kind)


_EDITORS = {
    "recolor": _recolor,
    "replace": _replace,
    "background": _background,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "resize": _resize,
}
EDIT_KINDS = tuple(_EDITORS)


def is_done(edit: Edit, image: np.ndarray) -> bool:
    r"""
    Whether an image shows what an edit asks for, and all else as it was.

    Args:
        edit (`Edit`): The edit.
        image (`np.ndarray` of shape `(64, 64, 3)`): 8 bits.
    """
    shown = scene_of_image(image)
    if shown is None or shown.background != edit.after.background or len(shown.groups) != len(edit.after.groups):
        return False
    found = {group.kind: group for group in shown.groups}
    for group in edit.after.groups:
        other = found.get(group.kind)
        if other is None or (other.color, other.count) != (group.color, group.count):
            return False
        # The size of a new thing is not asked for.
        is_new = group.kind == edit.moved and edit.kind == "add"
        if not is_new and other.size != group.size:
            return False
        before = next((old.corners for old in edit.before.groups if old.kind == group.kind), group.corners)
        if group.kind == edit.moved:
            continue
        if group.kind == edit.dropped:
            kept, among = other.corners, before
        elif group.kind == edit.grown:
            kept, among = before, other.corners
        else:
            kept, among = group.corners, other.corners
        if not all(any(_is_near(corner, another) for another in among) for corner in kept):
            return False
    if edit.asked.relation is None and edit.asked.place is None:
        return True
    verdict = score(image, edit.asked)
    return verdict.relation is not False and verdict.place is not False


def _is_near(corner: tuple[int, int], other: tuple[int, int]) -> bool:
    return max(abs(corner[0] - other[0]), abs(corner[1] - other[1])) <= TOLERANCE
