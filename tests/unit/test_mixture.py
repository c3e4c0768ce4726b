"""Samples are a function of the seed and their number: exact proportions, every row once per pass."""

from collections import Counter

import pytest
import torch

from mmar.training.mixture import BLOCK, ROW_ORDER, Mixture, Proportions, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_permutations_hit_everything_once(size):
    assert sorted(permuted(i, size, 7) for i in range(size)) == list(range(size))


def test_permutations_are_random_and_depend_on_the_seed():
    size = 4096
    first, second = ([permuted(i, size, seed) for i in range(size)] for seed in (0, 1))
    # Places that stay, and that agree: each 1 on average for random ones.
    assert sum(i == place for i, place in enumerate(first)) < 8
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 8
    places = torch.tensor(first, dtype=torch.float64)
    # Correlation with the number and with the neighbour: std 1 / 64.
    for other in (torch.arange(size, dtype=torch.float64), places.roll(1)):
        assert abs(torch.corrcoef(torch.stack([places, other]))[0, 1]) < 4 / 64
    # Of millions no table is made.
    assert 0 <= permuted(145_000_000 - 1, 145_000_000, 3) < 145_000_000


def test_proportions_are_exact_in_each_block():
    weights = [0.5, 0.45, 0.05]
    proportions = Proportions(weights, 3)
    dealt = [proportions(number) for number in range(3 * BLOCK)]
    for block in range(3):
        counts = Counter(kind for kind, _ in dealt[block * BLOCK : (block + 1) * BLOCK])
        assert [counts[i] for i in range(3)] == [500, 450, 50]
    for kind in range(3):
        turns = [turn for own, turn in dealt if own == kind]
        assert sorted(turns) == list(range(len(turns)))
    # In short windows the order is random: not the same in each block.
    orders = [[kind for kind, _ in dealt[block * BLOCK :][:50]] for block in range(3)]
    assert len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize("weights", [[1 / 3, 1 / 3, 1 / 3], [1, 2, 4], [0.123, 0.456, 0.421], [1.0], [0.0, 2.0]])
def test_quotas_are_within_one_of_the_weights(weights):
    quotas = Proportions(weights).quotas
    assert sum(quotas) == BLOCK
    assert all(abs(q - BLOCK * w / sum(weights)) < 1 for q, w in zip(quotas, weights, strict=True))


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 2.0], [float("nan")], [float("inf")], [0.0005, 0.9995]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        Proportions(weights)


def test_every_row_once_per_pass_and_tasks_as_weighted():
    mixture = Mixture([7, 1500], [1, 3], [[0.5, 0.45, 0.05], [0.0, 1.0, 0.0]], seed=5)
    samples = [mixture(number) for number in range(12 * BLOCK)]
    rows = {source: [row for own, row, _ in samples if own == source] for source in (0, 1)}
    assert (len(rows[0]), len(rows[1])) == (3 * BLOCK, 9 * BLOCK)
    # Numbers of a source do not come in order, so that a pass ends within a block.
    assert set(Counter(rows[1]).values()) == {6}
    assert max(Counter(rows[0]).values()) - min(Counter(rows[0]).values()) <= 1
    tasks = Counter((source, task) for source, _, task in samples)
    assert tasks == {(0, 0): 1500, (0, 1): 1350, (0, 2): 150, (1, 1): 9000}


def test_each_pass_has_an_order_of_its_own():
    # A pass of so many rows is two blocks: which of them come in its first block is decided by the pass.
    mixture = Mixture([2 * BLOCK], [1], [[1]], seed=3)
    first, second = ({row for _, row, _ in map(mixture, range(start, start + BLOCK))} for start in (0, 2 * BLOCK))
    # Half of the rows agree on average, with a std of 11.
    assert 400 < len(first & second) < 600


def test_sources_of_like_task_weights_have_tasks_of_their_own():
    seed, tasks = 5, [{}, {}]
    mixture = Mixture([BLOCK, BLOCK], [1, 1], [[1, 1], [1, 1]], seed)
    for number in range(2 * BLOCK):
        source, row, task = mixture(number)
        tasks[source][row] = task
    # In the order in which each source's rows come.
    first, second = (
        [own[permuted(turn, BLOCK, seed, ROW_ORDER, source, 0)] for turn in range(BLOCK)]
        for source, own in enumerate(tasks)
    )
    # Half of 1000 agree on average, with a std of 16.
    assert 400 < sum(a == b for a, b in zip(first, second, strict=True)) < 600


def test_samples_depend_on_seed_and_number_alone():
    first, again, other = (Mixture([100], [1], [[1, 1, 0]], seed) for seed in (1, 1, 2))
    numbers = [3, 999, 1000, 123_456_789]
    assert [first(n) for n in numbers] == [again(n) for n in reversed(numbers)][::-1]
    assert [first(n) for n in range(50)] != [other(n) for n in range(50)]
    draw = torch.rand(4, generator=first.generator(3, 17))
    assert torch.equal(draw, torch.rand(4, generator=again.generator(3, 17)))
    assert not torch.equal(draw, torch.rand(4, generator=first.generator(3, 18)))
    with pytest.raises(ValueError, match="size"):
        Mixture([0], [1], [[1, 1, 1]], 0)
