"""
Which row the k-th sample of a training is, and for which task: a pure function of the seed and of k.

So a run that goes on after a crash, with other workers or on another number of ranks, meets the samples that it would
have met, and nothing has to be stored but k. Proportions of sources are exact in every block of `BLOCK` samples, those
of tasks in every block of `BLOCK` samples of one source.
"""

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch


# Samples in which the proportions hold exactly; weights finer than that are refused.
BLOCK = 1000
FEISTEL_ROUNDS = 4
# Shares come from divisions of floats.
ROUNDING = 1e-9
# Streams of random numbers of one seed.
SOURCE_ORDER, TASK_ORDER, ROW_ORDER, SAMPLE_DRAWS, MASK_RATIO_DRAWS, STREAM_ORDER = range(6)


def stable_hash(*values: int) -> int:
    """An integer of 64 bits from integers of up to 64 bits, the same on every machine."""
    packed = struct.pack(f"<{len(values)}Q", *(value & 0xFFFFFFFFFFFFFFFF for value in values))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def permuted(index: int, size: int, *seed: int) -> int:
    r"""
    A pseudo-random permutation of `range(size)`, number by number and without a table: a Feistel network whose domain
    is a power of 4, applied until it falls inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains").

    Args:
        index (`int`): In `range(size)`.
        size (`int`): Size of the permuted range.
        *seed (`int`): Which permutation.

    Returns:
        `int`: Where `index` goes.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (stable_hash(right, round_number, *seed) & mask)
        index = left << half_bits | right
        if index < size:
            return index


class Proportions:
    r"""
    Deals numbers out to kinds in given proportions, in random order, exactly in each block of `BLOCK`.

    Args:
        weights (`Sequence[float]`): Of the kinds; at least one above 0.
        *seed (`int`): Of the order.

    Raises:
        ValueError: If a weight is negative or not finite, none is above 0, or one is above 0 but below 1 / `BLOCK` of
            their sum.
    """

    def __init__(self, weights: Sequence[float], *seed: int):
        total = sum(weights)
        if not weights or not all(weight >= 0 for weight in weights) or not 0 < total < float("inf"):
            raise ValueError(f"weights must be at least 0 and finite, one of them above 0; got {list(weights)}.")
        shares = [BLOCK * weight / total for weight in weights]
        quotas = [int(share + ROUNDING) for share in shares]
        # The largest remainders get what rounding left.
        by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])
        for i in by_remainder[: BLOCK - sum(quotas)]:
            quotas[i] += 1
        if lost := [weight for weight, share in zip(weights, shares, strict=True) if 0 < share < 1 - ROUNDING]:
            raise ValueError(
                f"weights must be at least 1 / {BLOCK} of their sum, {total}, or 0; got {lost}. Raise or drop them."
            )
        self.quotas, self.seed = quotas, seed
        self._ends = list(accumulate(quotas))

    def __call__(self, number: int) -> tuple[int, int]:
        r"""
        Args:
            number (`int`): Of the sample, from 0.

        Returns:
            `tuple[int, int]`: Its kind, and how many samples of that kind come before it: each number of a kind comes
            once, and none is left out.
        """
        block, place = divmod(number, BLOCK)
        place = permuted(place, BLOCK, *self.seed, block)
        kind = bisect_right(self._ends, place)
        start = self._ends[kind] - self.quotas[kind]
        return kind, block * self.quotas[kind] + place - start


class Mixture:
    r"""
    Draws rows of several sources, and tasks for them.

    Args:
        sizes (`Sequence[int]`): Rows of each source.
        weights (`Sequence[float]`): Of the sources.
        task_weights (`Sequence[Sequence[float]]`): For each source, of the tasks.
        seed (`int`): Of everything.

    Raises:
        ValueError: If a source has no rows, or weights are wrong.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        task_weights: Sequence[Sequence[float]],
        seed: int,
    ):
        if not len(sizes) == len(weights) == len(task_weights) or not all(size > 0 for size in sizes):
            raise ValueError(
                f"expected a size above 0, a weight and task weights for each source; got {list(sizes)}, "
                f"{list(weights)} and {len(task_weights)} task weights."
            )
        self.sizes, self.seed = list(sizes), seed
        self._sources = Proportions(weights, seed, SOURCE_ORDER)
        self._tasks = [Proportions(own, seed, TASK_ORDER, source) for source, own in enumerate(task_weights)]

    def __call__(self, number: int) -> tuple[int, int, int]:
        r"""
        Args:
            number (`int`): Of the sample, from 0, over all ranks.

        Returns:
            `tuple[int, int, int]`: Source, row in it, and task. A source's rows come in another order in each pass,
            each once per pass.
        """
        source, turn = self._sources(number)
        task, _ = self._tasks[source](turn)
        passes, place = divmod(turn, self.sizes[source])
        return source, permuted(place, self.sizes[source], self.seed, ROW_ORDER, source, passes), task

    def generator(self, *stream: int) -> torch.Generator:
        """The source of the random numbers of a stream: what they are for, whose they are."""
        return torch.Generator().manual_seed(stable_hash(self.seed, *stream))
