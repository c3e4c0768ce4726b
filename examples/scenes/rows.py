"""Training rows of the scenes: as many as are asked for, each a pure function of its number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .texts import caption, question
from .world import WORLD, Mix, held_out, render, sample_scene


class SceneRows(Sequence):
    r"""
    Rows with one image, one caption, and one question with its answer; none is held out.

    Args:
        seed (`int`): Of the world.
        mix (`Mix`, *optional*): Of the scenes.
        num_rows (`int`, *optional*, defaults to 2**31): How many there are; none is made before it is asked for.
    """

    name = "scenes"

    def __init__(self, seed: int, mix: Mix = WORLD, num_rows: int = 2**31):
        self.seed, self.mix, self.num_rows = seed, mix, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self.num_rows:
            raise IndexError(number)
        generator = np.random.default_rng([self.seed, number])
        while held_out(scene := sample_scene(generator, self.mix)):
            pass
        asked, answer = question(scene, generator)
        return {
            "id": number,
            "image": Image.fromarray(render(scene)),
            "captions": [caption(scene, generator)],
            "questions": [asked],
            "answers": [answer],
        }
