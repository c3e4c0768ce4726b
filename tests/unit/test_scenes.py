"""The world of scenes: what is said of a scene is true, and the judge finds what is there and nothing else."""

import numpy as np
import pytest

from examples.scenes.dialogues import as_text, sample_dialogue
from examples.scenes.edits import EDIT_KINDS, is_done, sample_edit, sample_held_out_edit
from examples.scenes.judge import find, scene_of_image, score
from examples.scenes.rows import SceneRows
from examples.scenes.texts import (
    NUMBERS,
    Facts,
    Thing,
    agrees,
    all_facts,
    caption,
    description,
    notes,
    parse,
    question,
    words_of,
)
from examples.scenes.world import (
    COLORS,
    KINDS,
    RELATIONS,
    Group,
    Scene,
    held_out,
    is_held_out_color,
    is_held_out_relation,
    render,
    sample_scene,
    scene_of,
)


NUM_SCENES = 150


def scenes(count: int = NUM_SCENES) -> list[Scene]:
    return [sample_scene(np.random.default_rng([77, number])) for number in range(count)]


def test_a_scene_is_a_function_of_its_number():
    assert scene_of(3, 5) == scene_of(3, 5)
    assert scene_of(3, 5) != scene_of(3, 6)
    assert np.array_equal(render(scene_of(3, 5)), render(scene_of(3, 5)))


def test_nothing_held_out_is_trained_on():
    assert not any(held_out(scene_of(0, number)) for number in range(NUM_SCENES))
    for number in range(40):
        generator = np.random.default_rng(number)
        pictured = [item for turn in sample_dialogue(generator) for item in turn.items if isinstance(item, Scene)]
        assert pictured and not any(held_out(scene) for scene in pictured)
        edit = sample_held_out_edit(np.random.default_rng(number))
        assert held_out(edit.before) or held_out(edit.after)


def test_a_sixth_of_the_colors_is_held_out():
    pairs = [(kind, color) for kind in KINDS for color in COLORS]
    assert len(KINDS) >= 40
    assert sum(is_held_out_color(*pair) for pair in pairs) == len(pairs) / 6


def test_a_relation_and_its_inverse_are_held_out_together():
    for first, second in (("anchor", "crab"), ("key", "moon"), ("bell", "star")):
        assert is_held_out_relation(first, "left", second) == is_held_out_relation(second, "right", first)
        assert is_held_out_relation(first, "above", second) == is_held_out_relation(second, "below", first)


def test_the_judge_finds_the_scene_that_was_rendered():
    def content(scene: Scene) -> tuple:
        return scene.background, frozenset(scene.groups)

    found = [scene_of_image(render(scene)) for scene in scenes()]
    right = [
        shown is not None and content(shown) == content(scene) for shown, scene in zip(found, scenes(), strict=True)
    ]
    assert np.mean(right) >= 0.99


def test_the_judge_passes_true_captions_only():
    world = scenes()
    images = [render(scene) for scene in world]
    true = [score(image, all_facts(scene)).all_right for image, scene in zip(images, world, strict=True)]
    shuffled = [score(image, all_facts(scene)).all_right for image, scene in zip(images, world[1:], strict=False)]
    assert np.mean(true) >= 0.99
    assert np.mean(shuffled) <= 0.01


def test_the_judge_finds_nothing_in_noise():
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    assert not any(find(image).glyphs or find(image).is_clear for image in noise)


@pytest.mark.parametrize(
    ("changed", "judged"),
    [
        ({"kind": "key"}, "kinds"),
        ({"color": "blue"}, "colors"),
        ({"corners": ((0, 0), (40, 40))}, "counts"),
    ],
)
def test_the_judge_says_what_is_wrong(changed, judged):
    group = Group("crab", "red", "small", ((8, 8),))
    asked = Facts((Thing("crab", 1, "red"),))
    assert score(render(Scene("white", (group,))), asked).all_right
    verdict = score(render(Scene("white", (Group(**{**vars(group), **changed}),))), asked)
    assert getattr(verdict, judged) is False
    assert not verdict.all_right


def test_the_judge_sees_a_thing_that_nobody_asked_for():
    crab, key = Group("crab", "red", "small", ((8, 8),)), Group("key", "blue", "small", ((40, 40),))
    image = render(Scene("white", (crab, key)))
    assert not score(image, Facts((Thing("crab", 1, "red"),))).is_clear
    image = render(Scene("white", (crab,)))
    image[30:50, 30:50] = (0, 255, 0)
    assert not score(image, Facts((Thing("crab", 1, "red"),))).is_clear


def test_every_wording_is_read_as_what_it_says():
    for number, scene in enumerate(scenes()):
        generator = np.random.default_rng(number)
        assert agrees(parse(description(scene, generator)), scene, is_complete=True)
        assert agrees(parse(description(scene)), scene, is_complete=True)
        assert agrees(parse(caption(scene, generator)), scene)


def test_a_wrong_description_does_not_agree():
    crab, keys = Group("crab", "red", "small", ((8, 8),)), Group("key", "blue", "small", ((40, 40), (40, 8)))
    scene = Scene("white", (crab, keys))
    right = "two blue keys to the right of a red crab on a white background"
    assert agrees(parse(right), scene, is_complete=True)
    for wrong in (
        right.replace("right", "left"),
        right.replace("two", "three"),
        right.replace("red", "pink"),
        right.replace("white", "black"),
        right.replace("crab", "bell"),
        right.replace(" on a white background", ""),
        right.replace("red crab", "very red crab"),
        "",
    ):
        assert not agrees(parse(wrong), scene, is_complete=True), wrong


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_reads_the_same_from_both_sides(relation):
    facts = Facts((Thing("crab", 1, "red"), Thing("key", 2, "blue")), relation)
    for number in range(30):
        said = parse(words_of(facts, np.random.default_rng(number)))
        if said.things[0].kind == "key":
            opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
            assert said.relation == opposite[relation] and said.things == facts.things[::-1]
        else:
            assert said == facts


def test_answers_are_true():
    for number, scene in enumerate(scenes()):
        for turn in range(6):
            asked, answer = question(scene, np.random.default_rng([number, turn]))
            by_name = {
                name: group for group in scene.groups for name in asked.rstrip("?").split() if name in group.kind
            }
            if asked.startswith("How many objects"):
                assert answer == NUMBERS[sum(group.count for group in scene.groups)]
            elif asked.startswith(("What color is the b", "What color is the background")) and "background" in asked:
                assert answer == scene.background
            elif asked.startswith("Is there"):
                words = asked.rstrip("?").split()[3:]
                there = any(g.kind == words[-1] and (len(words) == 1 or words[0] == g.color) for g in scene.groups)
                assert answer == ("yes" if there else "no")
            elif asked.startswith("What is to") and by_name:
                assert parse(answer).things[0] != parse(f"a {next(iter(by_name.values())).kind}").things[0]


def test_notes_name_every_glyph_once():
    for number, scene in enumerate(scenes(30)):
        items = notes(scene, np.random.default_rng(number)).split(", ")
        assert len(items) == 1 + sum(group.count for group in scene.groups)
        assert f"{scene.background} background" in items


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_is_done_by_its_result_and_by_nothing_else(kind):
    for number in range(12):
        edit = sample_edit(np.random.default_rng([5, number]), kind)
        assert is_done(edit, render(edit.after))
        assert not is_done(edit, render(edit.before))


def test_an_edit_must_leave_the_rest_as_it_was():
    crab, key = Group("crab", "red", "small", ((8, 8),)), Group("key", "blue", "small", ((40, 40),))
    edits = (sample_edit(np.random.default_rng([6, number]), "recolor") for number in range(1000))
    edit = next(edit for edit in edits if len(edit.after.groups) == 1 and edit.after.groups[0].count == 1)
    group = edit.after.groups[0]
    other_place = 0 if group.corners[0][0] >= 16 else 32
    moved = Scene(edit.after.background, (Group(group.kind, group.color, group.size, ((other_place, 0),)),))
    assert not is_done(edit, render(moved))
    assert not is_done(edit, render(Scene("white", (crab, key))))


def test_dialogues_alternate_and_have_notes_for_images():
    for number in range(30):
        generator = np.random.default_rng(number)
        turns = sample_dialogue(generator)
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        text, shown = as_text(turns, generator)
        assert text.count("<|im_start|>") == text.count("<|im_end|>") == len(turns)
        assert "background" in text
        shows = sum(isinstance(item, Scene) for turn in turns if turn.role == "user" for item in turn.items)
        assert len(shown) == shows and all("background" in text[first:last] for first, last in shown)


def test_rows_are_functions_of_their_numbers():
    rows = SceneRows(seed=4)
    first, again = rows[2**30], SceneRows(seed=4)[2**30]
    assert first["captions"] == again["captions"] and first["answers"] == again["answers"]
    assert np.array_equal(first["image"], again["image"])
    with pytest.raises(IndexError):
        rows[len(rows)]
