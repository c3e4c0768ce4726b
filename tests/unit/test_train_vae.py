"""What a picture shows, as words that the VAE's tokens learn to tell."""

import math

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import tiny_config, tiny_model
from torch import nn

from mmar.training.train_vae import WordReader, Words, share_told, with_drawn_noise, words_of


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
    config = tiny_config()
    vae = AutoencoderKL(**config.vae_config).eval()
    words = {"content": Words(ROWS, "content")}
    reader = WordReader(
        tiny_model().model.latent_encoder, config.latent_channels, config.text_config.hidden_size, {"content": 4}
    ).eval()
    # A reader that sees an arrow everywhere.
    nn.init.zeros_(reader.heads["content"].weight)
    reader.heads["content"].bias.data = torch.tensor([0.0, -9.0, -9.0, 0.0])
    pictures = torch.zeros(3, 3, config.image_size, config.image_size, dtype=torch.uint8)
    unknown = {"answers": ["down arrow"], "depends_on": ["content"]}
    assert share_told(vae, reader, pictures, [ROWS[0], ROWS[1], unknown], words) == {"content": 0.5}
    assert share_told(vae, reader, pictures[:1], [unknown], words) == {}


def test_latent_noise_is_a_share_of_each_channels_spread():
    torch.manual_seed(0)
    latents = torch.randn(4000, 2, 4, 4) * torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    noise = with_drawn_noise(latents, 0.5) - latents
    # A strength per picture, even in [0, 0.5]: its square is 1 / 12 in the mean.
    std = noise.std((0, 2, 3))
    torch.testing.assert_close(std, torch.tensor([1.0, 10.0]) / math.sqrt(12), rtol=0.05, atol=0)
    per_picture = noise[:, 1].std((1, 2)) / 10
    assert per_picture.min() < 0.02 and per_picture.max() > 0.4
    assert with_drawn_noise(latents, 0.0) is latents
