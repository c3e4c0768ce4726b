"""
Dialogues about scenes, with images in the turns of both sides; as text, notes stand in place of the images.
"""

from dataclasses import dataclass

import numpy as np

from .edits import sample_edit
from .texts import caption, notes, question
from .world import WORLD, Mix, Scene, held_out, sample_scene


IMAGE_REQUEST = "Generate an image: {caption}"
NULL_REQUEST = "Generate an image:"
# Shares of the kinds of dialogues.
SHARES = {"read": 0.5, "generate": 0.2, "unconditional": 0.02, "edit": 0.14, "chat": 0.14}
MAX_QUESTIONS = 6


@dataclass(frozen=True)
class Turn:
    """A turn of "user" or "assistant": texts and scenes, which stand for their images."""

    role: str
    items: tuple[str | Scene, ...]


def _training_scene(generator: np.random.Generator, mix: Mix) -> Scene:
    while held_out(scene := sample_scene(generator, mix)):
        pass
    return scene


def _questions(scene: Scene, generator: np.random.Generator, first: tuple[str | Scene, ...] = ()) -> list[Turn]:
    turns = []
    for number in range(int(generator.integers(1, MAX_QUESTIONS + 1))):
        asked, answer = question(scene, generator)
        turns += [Turn("user", (*first, asked) if number == 0 else (asked,)), Turn("assistant", (answer,))]
    return turns


def sample_dialogue(generator: np.random.Generator, mix: Mix = WORLD, kind: str | None = None) -> list[Turn]:
    r"""
    A dialogue about scenes that are not held out of training.

    Args:
        generator (`np.random.Generator`): Of everything.
        mix (`Mix`, *optional*): Of the scenes.
        kind (`str`, *optional*): One of `SHARES`; drawn by its share by default.

    Returns:
        `list[Turn]`: Turns of the user and the assistant, one after the other.
    """
    kind = kind or list(SHARES)[generator.choice(len(SHARES), p=list(SHARES.values()))]
    if kind == "read":
        scene = _training_scene(generator, mix)
        return _questions(scene, generator, first=(scene,))
    if kind == "unconditional":
        return [Turn("user", (NULL_REQUEST,)), Turn("assistant", (_training_scene(generator, mix),))]
    if kind == "edit":
        edit = sample_edit(generator, mix=mix)
        return [Turn("user", (edit.before, edit.instruction)), Turn("assistant", (edit.after,))]
    if kind == "generate":
        scene = _training_scene(generator, mix)
        request = IMAGE_REQUEST.format(caption=caption(scene, generator))
        return [Turn("user", (request,)), Turn("assistant", (scene,))]
    # A chat: an image is asked for, then changed, and asked about.
    edit = sample_edit(generator, mix=mix)
    request = IMAGE_REQUEST.format(caption=caption(edit.before, generator))
    turns = [Turn("user", (request,)), Turn("assistant", (edit.before,))]
    turns += [Turn("user", (edit.instruction,)), Turn("assistant", (edit.after,))]
    return turns + _questions(edit.after, generator)


def as_text(turns: list[Turn], generator: np.random.Generator) -> tuple[str, list[tuple[int, int]]]:
    r"""
    A dialogue in ChatML with notes in place of its images.

    Args:
        turns (`list[Turn]`): The dialogue.
        generator (`np.random.Generator`): Of the notes' order.

    Returns:
        `tuple` of the text and where notes stand in turns of the user, first and last character each; what the user
        shows cannot be predicted.
    """
    text, shown = "", []
    for turn in turns:
        text += f"<|im_start|>{turn.role}\n"
        for number, item in enumerate(turn.items):
            text += "\n" if number > 0 else ""
            words = notes(item, generator) if isinstance(item, Scene) else item
            if isinstance(item, Scene) and turn.role == "user":
                shown.append((len(text), len(text) + len(words)))
            text += words
        text += "<|im_end|>\n"
    return text, shown
