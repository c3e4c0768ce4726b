"""
What is said about scenes: captions, questions with answers, and notes that list a scene in words; and the parser that
reads facts from any of the wordings, so that every right wording counts as right.
"""

import re
from dataclasses import dataclass

import numpy as np

from .world import (
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    INVERSE,
    KINDS,
    PLACES,
    RELATIONS,
    SIZES,
    Group,
    Scene,
    is_held_out_color,
)


PLURALS = {
    "butterfly": "butterflies",
    "cactus": "cactuses",
    "fish": "fish",
    "leaf": "leaves",
    "octopus": "octopuses",
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
DESCRIBE = "Describe the image."
LIST = "What is in the image?"
# Squares of the notes' coordinates, as on a chessboard: columns a to h, rows 1 to 8 from the top.
SQUARE = IMAGE_SIZE // 8


def noun(kind: str, count: int) -> str:
    return kind if count == 1 else PLURALS.get(kind, kind + "s")


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


@dataclass(frozen=True)
class Thing:
    r"""
    What a text says of a group; None where it says nothing.

    Args:
        kind (`str`, *optional*): One of `KINDS`.
        count (`int`, *optional*): Of the glyphs.
        color (`str`, *optional*): A key of `COLORS`.
        size (`str`, *optional*): A key of `SIZES`.
    """

    kind: str | None = None
    count: int | None = None
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Facts:
    r"""
    What a text says of a scene; None where it says nothing.

    Args:
        things (`tuple[Thing, ...]`): Of the groups.
        relation (`str`, *optional*): Of the first thing to the second, one of `RELATIONS`.
        place (`str`, *optional*): Of a lone glyph, one of `PLACES`.
        background (`str`, *optional*): A key of `BACKGROUNDS`.
    """

    things: tuple[Thing, ...] = ()
    relation: str | None = None
    place: str | None = None
    background: str | None = None


def all_facts(scene: Scene) -> Facts:
    """Everything that a description says: sizes and places only of a lone glyph."""
    is_lone = scene.place is not None
    things = tuple(Thing(g.kind, g.count, g.color, g.size if is_lone else None) for g in scene.groups)
    return Facts(things, scene.relation, scene.place, scene.background)


# Facts to words


def phrase(thing: Thing, generator: np.random.Generator | None = None) -> str:
    """A noun phrase, such as "two red crabs"; with a generator in one of several wordings."""
    count = 1 if thing.count is None else thing.count
    size = thing.size if thing.size != "medium" else None
    words = " ".join(filter(None, (size, thing.color, noun(thing.kind, count))))
    if generator is not None and thing.color is not None and generator.random() < 0.1:
        words = " ".join(filter(None, (size, noun(thing.kind, count), "in", thing.color)))
    if count == 1:
        says_one = generator is not None and generator.random() < 0.1
        return f"one {words}" if says_one else _with_article(words)
    return f"{NUMBERS[count]} {words}"


PLACE_WORDS = {
    place: f"in the {place}"
    if place == "middle"
    else f"on the {place}"
    if place in ("left", "right")
    else f"at the {place}"
    for row in PLACES
    for place in row
}
RELATION_WORDS = {
    "left": ("{a} to the left of {b}", "{a} left of {b}", "{a} on the left and {b} on the right"),
    "right": ("{a} to the right of {b}", "{a} right of {b}", "{a} on the right and {b} on the left"),
    "above": ("{a} above {b}", "{a} over {b}", "{a} at the top and {b} at the bottom"),
    "below": ("{a} below {b}", "{a} under {b}", "{a} at the bottom and {b} at the top"),
}


def toward(relation: str) -> str:
    """The words between two things in that relation."""
    return f"to the {relation} of" if relation in ("left", "right") else relation


def words_of(facts: Facts, generator: np.random.Generator | None = None) -> str:
    """A caption that says just these facts; without a generator in the wording that comes first."""
    phrases = [phrase(thing, generator) for thing in facts.things]
    if len(phrases) == 2:
        relation = facts.relation
        if generator is not None and generator.random() < 0.5:
            phrases, relation = phrases[::-1], INVERSE.get(relation)
        wordings = RELATION_WORDS.get(relation, ("{a} and {b}",))
        chosen = wordings[0 if generator is None else generator.integers(len(wordings))]
        words = chosen.format(a=phrases[0], b=phrases[1])
    else:
        words = phrases[0]
        if facts.place is not None:
            words += f" {PLACE_WORDS[facts.place]}"
    if facts.background is None:
        return words
    ground = f"on {_with_article(facts.background)} background"
    if generator is not None and generator.random() < 0.25:
        return f"{ground}, {words}"
    return f"{words} {ground}"


def description(scene: Scene, generator: np.random.Generator | None = None) -> str:
    """All facts of a scene in words."""
    return words_of(all_facts(scene), generator)


def caption(scene: Scene, generator: np.random.Generator) -> str:
    """Some facts of a scene in words: at times all of them, at times hardly any."""
    facts = all_facts(scene)
    keeps_colors, keeps_size, keeps_place, keeps_ground = generator.random(4) < (0.8, 0.6, 0.5, 0.5)
    things = tuple(
        Thing(t.kind, t.count, t.color if keeps_colors else None, t.size if keeps_size else None) for t in facts.things
    )
    return words_of(
        Facts(
            things,
            facts.relation if generator.random() < 0.8 else None,
            facts.place if keeps_place else None,
            facts.background if keeps_ground else None,
        ),
        generator,
    )


# Questions


def question(scene: Scene, generator: np.random.Generator) -> tuple[str, str]:
    """A question about a scene, and its answer."""
    asked = int(generator.integers(len(scene.groups)))
    group = scene.groups[asked]
    other = scene.groups[1 - asked] if len(scene.groups) == 2 else None
    one = group.count == 1
    name = noun(group.kind, group.count)
    choices = ["color", "count", "exists", "exists", "background", "list", "describe", "describe"]
    choices += ["relation", "where"] if other is not None else []
    choices += ["where", "size"] if scene.place is not None else []
    kind = choices[generator.integers(len(choices))]
    if kind == "color":
        spelled = "color" if generator.random() < 0.7 else "colour"
        return f"What {spelled} {'is' if one else 'are'} the {name}?", group.color
    if kind == "count":
        if generator.random() < 0.2:
            return "How many objects are there?", NUMBERS[sum(g.count for g in scene.groups)]
        return f"How many {noun(group.kind, 2)} are there?", NUMBERS[group.count]
    if kind == "exists":
        return _existence(scene, group, generator)
    if kind == "background":
        return "What color is the background?", scene.background
    if kind == "list":
        things = tuple(Thing(g.kind, g.count, g.color) for g in scene.groups)
        return LIST, words_of(Facts(things), generator)
    if kind == "describe":
        return DESCRIBE, description(scene, generator)
    if kind == "size":
        return f"How big {'is' if one else 'are'} the {name}?", group.size
    verb = "is" if one else "are"
    if other is None:
        return f"Where {verb} the {name}?", PLACE_WORDS[scene.place]
    relation = scene.relation if asked == 0 else INVERSE[scene.relation]
    if kind == "where":
        return f"Where {verb} the {name}?", f"{toward(relation)} the {noun(other.kind, other.count)}"
    # What stands in that relation to the other group: the asked one.
    return f"What is {toward(relation)} the {noun(other.kind, other.count)}?", phrase(
        Thing(group.kind, group.count, group.color)
    )


def _existence(scene: Scene, group: Group, generator: np.random.Generator) -> tuple[str, str]:
    """Is there a crab, or a red crab? In half of the cases there is none."""
    is_there, says_color = generator.random(2) < 0.5
    kind, color = group.kind, group.color
    if not is_there:
        # Nothing that is held out is asked for in vain: a training would learn that it is never there.
        if says_color and generator.random() < 0.5:
            excluded = {color} | {other for other in COLORS if is_held_out_color(kind, other)}
            color = _other(list(COLORS), excluded, generator)
        else:
            excluded = {g.kind for g in scene.groups} | {other for other in KINDS if is_held_out_color(other, color)}
            kind = _other(KINDS, excluded, generator)
    thing = Thing(kind, 1, color if says_color else None)
    return f"Is there {phrase(thing)}?", "yes" if is_there else "no"


def _other(choices: list[str], excluded: set[str], generator: np.random.Generator) -> str:
    left = [choice for choice in choices if choice not in excluded]
    return left[generator.integers(len(left))]


# Notes: a scene without an image, for the language model


def notes(scene: Scene, generator: np.random.Generator) -> str:
    """All glyphs of a scene in random order with their squares, and the background."""
    items = [f"{scene.background} background"]
    for group in scene.groups:
        for left, top in group.corners:
            column, row = ((value + SIZES[group.size] // 2) // SQUARE for value in (left, top))
            items.append(f"{group.size} {group.color} {noun(group.kind, 1)} {'abcdefgh'[column]}{row + 1}")
    return ", ".join(items[i] for i in generator.permutation(len(items)))


# Words to facts

_KIND_OF = {name: kind for kind in KINDS for name in (noun(kind, 1), noun(kind, 2))}
_COUNT_OF = {"a": 1, "an": 1, "one": 1, "the": None} | {word: i for i, word in enumerate(NUMBERS) if i > 1}
_THING = re.compile(
    rf"(?:(?P<count>{'|'.join(_COUNT_OF)}) )?(?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?"
    rf"(?P<noun>{'|'.join(sorted(_KIND_OF, key=len, reverse=True))})\b(?: in (?P<late_color>{'|'.join(COLORS)})\b)?"
)
_GROUND = re.compile(rf",?\s*(?:on )?(?:an? )?(?P<name>{'|'.join(BACKGROUNDS)}) background,?\s*")
_BETWEEN = {
    "left": re.compile(r"^(to the |on the )?left of( the)?$"),
    "right": re.compile(r"^(to the |on the )?right of( the)?$"),
    "above": re.compile(r"^(above|over)( the)?$"),
    "below": re.compile(r"^(below|under|beneath)( the)?$"),
}
_SIDES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}


def parse(text: str) -> Facts | None:
    r"""
    Reads the facts of a caption, a description or an answer that lists things.

    Args:
        text (`str`): In any of the wordings that this file has.

    Returns:
        `Facts`, or None where a part of the text is not understood.
    """
    text = " ".join(text.lower().strip().rstrip(".").split())
    ground = None
    if found := _GROUND.search(text):
        ground = found["name"]
        text = (text[: found.start()] + " " + text[found.end() :]).strip()
    matches = list(_THING.finditer(text))
    if not 1 <= len(matches) <= 2:
        return None
    things = tuple(_thing(match) for match in matches)
    before, after = text[: matches[0].start()].strip(), text[matches[-1].end() :].strip()
    if before:
        return None
    if len(things) == 1:
        place = None
        if after:
            place = next((place for place, words in PLACE_WORDS.items() if words == after), None)
            if place is None:
                return None
        return Facts(things, None, place, ground)
    between = text[matches[0].end() : matches[1].start()].strip()
    if between == "and" and not after:
        return Facts(things, None, None, ground)
    for relation in RELATIONS:
        is_sides = between == f"{_SIDES[relation]} and" and after == _SIDES[INVERSE[relation]]
        if is_sides or (not after and _BETWEEN[relation].match(between)):
            return Facts(things, relation, None, ground)
    return None


def _thing(match: re.Match) -> Thing:
    kind, said = _KIND_OF[match["noun"]], match["count"]
    count = _COUNT_OF[said] if said is not None else None
    return Thing(kind, count, match["color"] or match["late_color"], match["size"])


def agrees(said: Facts | None, scene: Scene, is_complete: bool = False) -> bool:
    r"""
    Whether all that a text says holds in a scene.

    Args:
        said (`Facts`, *optional*): What `parse` read; None agrees with nothing.
        scene (`Scene`): The scene.
        is_complete (`bool`, *optional*, defaults to `False`): Whether the text must say all that a description says.
    """
    if said is None or len(said.things) != len(scene.groups):
        return False
    true = all_facts(scene)
    order = (0, 1) if len(said.things) == 2 and said.things[0].kind == true.things[0].kind else (1, 0)
    order = order if len(said.things) == 2 else (0,)
    relation = true.relation if order == (0, 1) or true.relation is None else INVERSE[true.relation]
    pairs = [(said.relation, relation), (said.place, true.place), (said.background, true.background)]
    for thing, place in zip(said.things, order, strict=True):
        other = true.things[place]
        # "A crab" without a size is one of medium size in a complete description.
        size = thing.size or ("medium" if is_complete and other.size is not None else None)
        pairs += [(thing.kind, other.kind), (thing.count, other.count), (thing.color, other.color), (size, other.size)]
    if is_complete:
        return all(one == another for one, another in pairs)
    return all(one is None or one == another for one, another in pairs)
