"""What a picture shows, as words that the latent encoder learns to tell."""

import math

import pytest
import torch
from helpers import tiny_config, tiny_model
from PIL import Image
from torch import nn

from mmar.training.train_latent_encoder import picture_of, usable_rows
from mmar.training.words import WordReader, Words, known_words, share_told, words_of


ROWS = [
    {"answers": ["Thumbs up: dark", "flat"], "depends_on": ["content", "style"]},
    {"answers": ["up arrow", "flat"], "depends_on": ["content", "style"]},
    {"answers": ["an arrow", None], "depends_on": ["picture", "picture"]},
    {},
]
THUMB, ARROW = ("dark", "thumbs", "up"), ("arrow", "up")


def test_words_of_answers():
    assert [words_of(row, "content") for row in ROWS] == [THUMB, ARROW, (), ()]
    assert words_of(ROWS[0], "style") == ("flat",)
    words = Words(ROWS, "content")
    assert words.answers == [ARROW, THUMB]
    assert words.vocabulary == {"arrow": 0, "dark": 1, "thumbs": 2, "up": 3}


def test_the_loss_is_least_where_an_answers_words_share_all():
    words = Words(ROWS, "content")
    # A third for each word of the thumb; the rows without an answer do not count.
    logits = torch.tensor([[-30.0, 0.0, 0.0, 0.0]]).repeat(3, 1)
    assert float(words.loss(logits, torch.tensor([0, 2, 3]))) == pytest.approx(math.log(3), abs=1e-4)
    assert float(words.loss(logits + torch.tensor([0, 2.0, 0, 0]), torch.tensor([0, 2, 3]))) > math.log(3) + 0.1
    assert float(words.loss(logits, torch.tensor([2, 3, 2]))) == 0.0


def test_the_best_answer_has_the_words_that_are_told_and_no_others():
    words = Words(ROWS, "content")
    # All of an answer's words are told of the thumb; of the arrow's answer one is missing, which a longer one has.
    logits = torch.tensor([[-9.0, 0.0, 0.0, 0.0], [0.0, -9.0, -9.0, 0.0]])
    assert words.best(logits) == [THUMB, ARROW]


def test_share_told_counts_rows_whose_answer_is_known():
    words = {"content": Words(ROWS, "content")}
    reader = WordReader(tiny_model().model.latent_encoder, tiny_config().text_config.hidden_size, words).eval()
    # A reader that sees an arrow everywhere.
    nn.init.zeros_(reader.heads["content"].weight)
    reader.heads["content"].bias.data = torch.tensor([0.0, -9.0, -9.0, 0.0])
    latents = torch.zeros(3, 4, 4, 4)
    unknown = {"answers": ["down arrow"], "depends_on": ["content"]}
    assert share_told(reader, latents.split(2), [ROWS[0], ROWS[1], unknown], words) == {"content": 0.5}
    assert share_told(reader, [latents[:1]], [unknown], words) == {}


def test_rows_without_answers_have_no_words():
    assert known_words(ROWS[3:]) == {}
    assert known_words(ROWS).keys() == {"content", "style"}


def test_held_out_rows_without_one_picture_that_opens_are_left_out():
    picture, chat = Image.new("RGB", (8, 8)), [{"role": "user", "content": "Hi"}]
    rows = [{"image": b"broken"}, {"image": picture, **ROWS[0]}, {"images": [picture] * 2}, {"messages": chat}]
    assert usable_rows(rows, lambda number, row: picture_of(row)) == ([ROWS[0]], [1])
