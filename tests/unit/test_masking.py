"""Positions and blocks worked by hand, the mask ratio's distribution, orders and the schedule of tokens per step."""

import math

import pytest
import torch
from transformers.cache_utils import DynamicCache

from mmar.modeling_mmar.masking_mmar import (
    cached_position_ids,
    image_block_ids,
    sample_latent_mask,
    sample_mask_ratios,
    sample_orders,
    shared_position_ids,
    tokens_per_step,
)


def marks(text: str) -> torch.Tensor:
    """ "i" marks an image token; one row per word."""
    return torch.tensor([[letter == "i" for letter in row] for row in text.split()])


def test_block_ids_by_hand():
    # Two pictures of two tokens with text between, two pictures side by side, none.
    expected = [[-1, 0, 0, -1, 1, 1, -1], [0, 0, 1, 1, -1, -1, -1], [-1] * 7]
    assert image_block_ids(marks("tiitiit iiiittt ttttttt"), 2).tolist() == expected


def test_position_ids_by_hand():
    # A picture takes one position, the next token the next; two pictures side by side take two.
    expected = [[0, 1, 1, 2, 3, 3, 4], [0, 0, 1, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    assert shared_position_ids(marks("tiitiit iiiittt ttttttt"), 2).tolist() == expected


def test_position_ids_with_left_padding_by_hand():
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [1] * 7])
    # Padding gets 0 and takes no position, before text and before a picture alike.
    expected = [[0, 0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 0, 1, 2], [0, 1, 1, 2, 3, 4, 5]]
    assert shared_position_ids(marks("tttiitt tttiitt tiitttt"), 2, attention_mask).tolist() == expected


def cache_of(length: int, rows: int = 1) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(rows, 1, length, 2), torch.zeros(rows, 1, length, 2), 0)
    return cache


def test_cached_position_ids():
    assert cached_position_ids(None, 2).shape == (2, 0)
    # A cache that nobody annotated holds text.
    assert cached_position_ids(cache_of(3), 1).tolist() == [[0, 1, 2]]
    cache = cache_of(6)
    cache.mmar_position_ids = torch.tensor([[0, 1, 1, 2]])
    # Two later tokens passed unnoticed: text.
    assert cached_position_ids(cache, 1).tolist() == [[0, 1, 1, 2, 3, 4]]
    cache.crop(-4)
    assert cached_position_ids(cache, 1).tolist() == [[0, 1]]
    # Behind padding on the right, which has position 0, the text goes on after its last position.
    padded = cache_of(5)
    padded.mmar_position_ids = torch.tensor([[0, 1, 2, 0]])
    assert cached_position_ids(padded, 1).tolist() == [[0, 1, 2, 0, 3]]
    with pytest.raises(ValueError, match="1 .*3"):
        cached_position_ids(cache, 3)


def truncated_normal_cdf(x: float, low: float) -> float:
    """Of a normal with mean 1 and std 0.25 on [low, 1]."""

    def normal(value: float) -> float:
        return 0.5 * (1 + math.erf((value - 1) / (0.25 * math.sqrt(2))))

    return (normal(x) - normal(low)) / (normal(1) - normal(low))


@pytest.mark.parametrize("minimum", [0.7, 0.0])
def test_mask_ratio_distribution(minimum):
    count = 20000
    ratios = sample_mask_ratios(count, minimum, torch.Generator().manual_seed(0)).double().sort().values
    assert minimum <= ratios[0] and ratios[-1] <= 1
    cdf = torch.tensor([truncated_normal_cdf(x, minimum) for x in ratios.tolist()])
    steps = torch.arange(count + 1) / count
    distance = torch.maximum((cdf - steps[:-1]).abs(), (steps[1:] - cdf).abs()).max()
    # Kolmogorov-Smirnov: a true sample exceeds 1.63 / sqrt(n) once in a hundred seeds.
    assert distance < 1.63 / math.sqrt(count)


@pytest.mark.parametrize("minimum", [-0.1, 1.0])
def test_mask_ratio_minimum_out_of_range(minimum):
    with pytest.raises(ValueError, match="`minimum`"):
        sample_mask_ratios(1, minimum)


@pytest.mark.parametrize("minimum", [0.7, 0.0])
def test_latent_mask_hides_the_ratio_and_at_least_one(minimum):
    count, num_latents = 4000, 16
    mask = sample_latent_mask(count, num_latents, minimum, torch.Generator().manual_seed(3))
    ratios = sample_mask_ratios(count, minimum, torch.Generator().manual_seed(3))
    hidden = mask.sum(-1)
    assert torch.equal(hidden, (ratios * num_latents).ceil().long())
    assert hidden.min() >= max(1, math.ceil(minimum * num_latents))
    # Every place is as likely: five standard deviations of a frequency over 4000 pictures are below 0.04.
    assert (mask.float().mean(0) - mask.float().mean()).abs().max() < 0.04
    assert torch.equal(mask, sample_latent_mask(count, num_latents, minimum, torch.Generator().manual_seed(3)))


def test_one_latent_is_always_hidden():
    assert sample_latent_mask(50, 1, 0.0).all()
    assert sample_latent_mask(3, 16, 0.0, mask_ratios=torch.zeros(3)).sum(-1).tolist() == [1, 1, 1]


def test_orders_are_fresh_reproducible_permutations():
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 1)]
    orders = sample_orders(3, 64, generators)
    assert torch.equal(orders.sort(-1).values, torch.arange(64).expand(3, -1))
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])
    torch.manual_seed(5)
    first = sample_orders(2, 64)
    torch.manual_seed(5)
    assert torch.equal(first, sample_orders(2, 64)) and not torch.equal(first[0], first[1])


def test_other_orders():
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.equal(sample_orders(2, 16, generators, "raster"), torch.arange(16).expand(2, -1))
    # The generators were asked as for a random order.
    states = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    sample_orders(2, 16, states)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, states, strict=True))
    orders = sample_orders(2, 16, generators, "checkerboard")
    assert torch.equal(orders.sort(-1).values, torch.arange(16).expand(2, -1))
    assert not torch.equal(orders[0], orders[1])
    # On a board of 4 x 4 the first half are the places whose row and column are both even or both odd.
    assert orders[0, :8].sort().values.tolist() == [0, 2, 5, 7, 8, 10, 13, 15]
    with pytest.raises(ValueError, match="`order`"):
        sample_orders(1, 16, order="spiral")


def test_tokens_per_step_follow_the_cosine():
    counts = tokens_per_step(256, 64)
    hidden = (256 - torch.tensor(counts).cumsum(0)).tolist()
    cosine = [math.floor(256 * math.cos(math.pi / 2 * (step + 1) / 64)) for step in range(64)]
    # The cosine is flat at its start, where MAR draws the minimum of one token; later it rules.
    assert hidden[:11] == list(range(255, 244, -1))
    assert hidden[11:] == cosine[11:] and hidden[-1] == 0
    # Ends of the range, by hand: floor(4 cos(30 deg)) = 3, floor(4 cos(60 deg)) = 2, then 0.
    assert tokens_per_step(4, 3) == [1, 1, 2]
    assert tokens_per_step(7, 1) == [7]
    assert tokens_per_step(256, 256) == [1] * 256


def test_tokens_per_step_sum_and_minimum_for_every_count():
    for num_hidden in range(1, 41):
        for num_ar_steps in range(1, num_hidden + 1):
            counts = tokens_per_step(num_hidden, num_ar_steps)
            assert len(counts) == num_ar_steps and sum(counts) == num_hidden and min(counts) >= 1


@pytest.mark.parametrize("num_ar_steps", [0, -1, 257, 300])
def test_tokens_per_step_out_of_range(num_ar_steps):
    with pytest.raises(ValueError, match="`num_ar_steps`"):
        tokens_per_step(256, num_ar_steps)
