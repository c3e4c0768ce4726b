"""
From training rows to samples of the three tasks (Sec. 3.3.3).

A row (rows.py) becomes one of

    t2i     caption, then the picture with a random part hidden: P(I|T)
    i2t     pictures and text, then the answers: P(T|I)
    uncond  the null prompt, then the picture with a random part hidden: P(I)

All random choices of a sample come from one generator, which is seeded by the sample's number: with `TrainingSamples`
a training draws the same samples whatever the number of ranks and workers, and after whatever interruption.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..modeling_mmar.configuration_mmar import IGNORE_INDEX, shorten
from ..modeling_mmar.masking_mmar import sample_latent_mask, sample_mask_ratios
from ..processors.processing_mmar import TASKS, MMARProcessor
from .latents import LatentCache
from .mixture import (
    MASK_RATIO_DRAWS,
    SAMPLE_DRAWS,
    SOURCE_ORDER,
    STREAM_ORDER,
    TASK_ORDER,
    Mixture,
    Proportions,
    stable_hash,
)
from .rows import BadRow, as_bad_row, check_row, open_pictures, row_id
from .sources import Source
from .views import mix_tokens


# Question of a picture that has a caption and no questions.
CAPTION_QUESTION = "Describe the image."
# A source of which so many rows in turn are broken is not worth training on.
MAX_BAD_ROWS = 100
# Pictures that share their tokens with one that shows a style.
NUM_STYLE_DONORS = 4
# Largest seed of a torch generator that a tensor of int64 holds.
MAX_SEED = 2**63 - 1


def draw(count: int, generator: torch.Generator | None) -> int:
    """A number in `range(count)`; None is torch's global generator. Without a choice no random number is used up."""
    return 0 if count == 1 else int(torch.randint(count, (), generator=generator))


@dataclass
class TrainingSource:
    r"""
    A source with what its rows need of each other.

    Args:
        rows (`Source`): Training rows; a list of them will do.
        cache (`LatentCache`, *optional*): Their latents, in place of the pictures.
        needs_relations (`bool`, *optional*, defaults to `False`): Read all rows once, for the contents that answers
            swap and the pictures of one style; a row lacks both otherwise.
        label (`str`, *optional*): What reports call it; the rows' name by default.

    Attributes:
        contents (`list[str]`): What stands in the rows' `swaps`.
        styles (`dict[Hashable, list[int]]`): Rows by the answer that hangs on their style.
    """

    rows: Source
    cache: LatentCache | None = None
    needs_relations: bool = False
    label: str | None = None
    contents: list[str] = field(default_factory=list, init=False)
    styles: dict[Hashable, list[int]] = field(default_factory=dict, init=False)

    def __post_init__(self):
        if self.cache is not None and len(self.cache) != len(self.rows):
            raise ValueError(
                f"expected latents of all {len(self.rows)} rows of {self.name}; got {len(self.cache)}. Encode them "
                "again."
            )
        for index in range(len(self.rows)) if self.needs_relations else ():
            try:
                row = self.rows[index]
            except BadRow:
                continue  # counted when it is drawn
            self.contents += [swap for swap in row.get("swaps") or () if swap is not None]
            if (style := style_of(row)) is not None:
                self.styles.setdefault(style, []).append(index)

    @property
    def name(self) -> str:
        """For reports."""
        return self.label or getattr(self.rows, "name", type(self.rows).__name__)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """A row, with its latents where there is a cache; raises `BadRow`."""
        row = self.rows[index]
        return row if self.cache is None else {**row, "latents": self.cache[index]}

    def style_view(self, row: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Mean and std `(2, C, h, w)` of a picture whose tokens partly come from others of its style."""
        own = row["latents"]["picture"]
        own = own[draw(len(own), generator)]
        members = self.styles.get(style_of(row), [])
        donors = []
        for _ in range(NUM_STYLE_DONORS if members else 0):
            try:
                views = self.cache[members[draw(len(members), generator)]]["picture"]
            except BadRow:
                continue
            donors.append(views[draw(len(views), generator)])
        return mix_tokens(own, donors, generator)


def style_of(row: dict[str, Any]) -> str | None:
    """The answer of a row that hangs on its style."""
    return dict(zip(row.get("depends_on") or (), row.get("answers") or (), strict=False)).get("style")


@dataclass
class SampleMaker:
    r"""
    Makes samples of rows.

    Args:
        processor (`MMARProcessor`): Makes tokens, labels and pixels.
        num_latents (`int`): N.
        mask_ratio_min (`float`, *optional*, defaults to 0.7): Lower bound of the mask ratio; 0.7 in stage 1, 0 later
            (Sec. 3.3.3).
        swap_rate (`float`, *optional*, defaults to 0.0): Share of the answers with a swap that get another row's
            content in its place, and teach only what follows it; the others then teach only what comes before and the
            content itself. So what is said of the style must come from the picture, and not from a name that was seen
            in some styles only. What follows a swap is shown views of the style, where there are some.
    """

    processor: MMARProcessor
    num_latents: int
    mask_ratio_min: float = 0.7
    swap_rate: float = 0.0

    def __post_init__(self):
        if not 0 <= self.mask_ratio_min < 1:
            raise ValueError(f"`mask_ratio_min` must be in [0, 1); got {shorten(self.mask_ratio_min)}.")
        if not 0 <= self.swap_rate <= 1:
            raise ValueError(f"`swap_rate` must be in [0, 1]; got {shorten(self.swap_rate)}.")

    def __call__(
        self,
        row: dict[str, Any],
        task: str,
        generator: torch.Generator,
        source: TrainingSource | None = None,
        mask_ratio: float | None = None,
    ) -> dict[str, Any]:
        r"""
        Args:
            row (`dict`): A training row (rows.py).
            task (`str`): One of `TASKS`.
            generator (`torch.Generator`): Source of every choice.
            source (`TrainingSource`, *optional*): Where the row is from; needed for swaps and views of styles.
            mask_ratio (`float`, *optional*): In place of a drawn one.

        Returns:
            `dict` with `input_ids` and `labels`, lists of one length; `latent_distributions` of shape
            `(I, 2, C, h, w)`, mean and std of the latents, or `pixel_values` of shape `(I, 3, H, W)`, unless there are
            no pictures; `latent_mask` of shape `(I, N)`, True
            where a latent is hidden; `seeds`, a list of one integer per picture, for its posterior, timesteps and
            noise; `task`, the number of the task.

        Raises:
            BadRow: If the row cannot serve the task, or its texts or pictures are broken.
        """
        example, kind = self._example(row, task, generator, source)
        num_images = example["input_ids"].count(self.processor.image_token_id) // self.num_latents
        sample = {**example, **self._pictures(row, kind, num_images, generator, source)}
        if task == "i2t":
            sample["latent_mask"] = torch.zeros(num_images, self.num_latents, dtype=torch.bool)
        else:
            ratios = None if mask_ratio is None else torch.full((1,), mask_ratio)
            sample["latent_mask"] = sample_latent_mask(1, self.num_latents, self.mask_ratio_min, generator, ratios)
        sample["seeds"] = [draw(MAX_SEED, generator) for _ in range(num_images)]
        sample["task"] = TASKS.index(task)
        return sample

    def length(self, row: dict[str, Any], task: str, generator: torch.Generator, source: TrainingSource) -> int:
        """Tokens of the sample that the same arguments make, without its pictures."""
        return len(self._example(row, task, generator, source)[0]["input_ids"])

    def _example(
        self, row: dict[str, Any], task: str, generator: torch.Generator, source: TrainingSource | None
    ) -> tuple[dict[str, list[int]], str | None]:
        """Tokens and labels, and for i2t the kind of views that they hold for."""
        with as_bad_row("a row"):  # tokenizers raise what they meet
            if task == "i2t":
                return self._answer(row, generator, source)
            return self.processor.training_example(task, self._caption(row, task, generator)), None

    def _caption(self, row: dict[str, Any], task: str, generator: torch.Generator) -> str | None:
        if _num_pictures(row) != 1:
            raise BadRow(f"a row for {shorten(task)} must have one picture; got {_num_pictures(row)}.")
        if task == "uncond":
            return None
        captions = row.get("captions") or ()
        if not captions:
            raise BadRow("a row for 't2i' must have a caption; got none.")
        return captions[draw(len(captions), generator)]

    def _answer(
        self, row: dict[str, Any], generator: torch.Generator, source: TrainingSource | None
    ) -> tuple[dict[str, list[int]], str]:
        """One of a row's answers or its chat, at times with another's content, and the kind of views it holds for."""
        if row.get("messages"):
            return self.processor.training_chat(row["messages"]), "picture"
        if not row.get("questions"):
            answer = self._caption(row, "t2i", generator)
            return self.processor.training_example("i2t", answer, CAPTION_QUESTION), "picture"
        pair = draw(len(row["questions"]), generator)
        question, answer = row["questions"][pair], row["answers"][pair]
        kind = row["depends_on"][pair] if row.get("depends_on") else "picture"
        swap = row["swaps"][pair] if row.get("swaps") else None
        num_images = _num_pictures(row)
        if swap is None or self.swap_rate == 0 or source is None or not source.contents:
            return self.processor.training_example("i2t", answer, question, num_images), kind
        is_own = bool(torch.rand((), generator=generator) >= self.swap_rate)
        content = swap if is_own else source.contents[draw(len(source.contents), generator)]
        example = self._swapped_answer(answer, swap, content, question, learns_content=is_own)
        return example, "style" if style_of(row) is not None and not is_own else kind

    def _swapped_answer(
        self, answer: str, swap: str, content: str, question: str, learns_content: bool
    ) -> dict[str, list[int]]:
        """An answer with other content in place of its swap; labels up to the content's end, or only after it."""
        before, _, after = answer.partition(swap)
        given = before + content
        example = self.processor.training_example("i2t", given + after, question)
        labels = example["labels"]
        start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        given_ids = self.processor.text_ids(given)
        border = start + len(given_ids)
        if labels[start:border] != given_ids:
            raise BadRow(
                f"expected the swap {shorten(swap)} to end where a token of the answer {shorten(answer)} ends; with "
                f"{shorten(content)} in its place, what follows is one token with its end. Let it end before a space, "
                "or drop it."
            )
        learned = slice(0, border) if learns_content else slice(border, None)
        example["labels"] = [IGNORE_INDEX] * len(labels)
        example["labels"][learned] = labels[learned]
        return example

    def _pictures(
        self,
        row: dict[str, Any],
        kind: str | None,
        num_images: int,
        generator: torch.Generator,
        source: TrainingSource | None,
    ) -> dict[str, Tensor]:
        """The pictures of a sample, or their latents: a view of the kind that is read, or for None what is drawn."""
        if num_images != _num_pictures(row):
            raise BadRow(
                f"a row must have as many pictures as its text has marks, {num_images}; got {_num_pictures(row)}."
            )
        if num_images == 0:
            return {}
        if "latents" not in row:
            with as_bad_row("a row"):
                pictures = open_pictures(row)
                return {"pixel_values": self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]}
        views = row["latents"]
        if kind is None:
            chosen = views["picture"][0]  # the picture itself
        elif kind == "style" and source is not None and source.styles:
            chosen = source.style_view(row, generator)
        else:
            own = views.get(kind, views["picture"])
            chosen = own[draw(len(own), generator)]
        return {"latent_distributions": chosen.float()[None]}


def _num_pictures(row: dict[str, Any]) -> int:
    if row.get("image") is not None or "latents" in row:
        return 1
    return len(row.get("images") or ())


class TrainingSamples(Dataset):
    r"""
    The samples of a training by their numbers: the k-th is always the same, whoever asks for it and when.

    A row that cannot be used is replaced by another one of its source, drawn by the sample's number too, and the
    sample tells so.

    Args:
        sources (`list[TrainingSource]`): Where rows come from.
        maker (`SampleMaker`): Makes samples of them.
        mixture (`Mixture`): Which row and task a number is.
        num_samples (`int`): How many there are.
        mask_ratio_group (`int`, *optional*, defaults to 1): So many samples in turn share one mask ratio: with the
            size of a micro-batch no slot of EmbeddingViT is padding, as in MAR's own training.
    """

    def __init__(
        self,
        sources: list[TrainingSource],
        maker: SampleMaker,
        mixture: Mixture,
        num_samples: int,
        mask_ratio_group: int = 1,
    ):
        self.sources, self.maker, self.mixture = sources, maker, mixture
        self.num_samples, self.mask_ratio_group = num_samples, mask_ratio_group

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        r"""
        Args:
            number (`int`): In `range(len(self))`.

        Returns:
            `dict`: As `SampleMaker` makes it, with `number` and `skipped`, a list of (source, row, reason) of rows
            that could not be used.

        Raises:
            IndexError: If there is no such number.
            ValueError: If `MAX_BAD_ROWS` rows in turn cannot be used.
        """
        if not 0 <= number < self.num_samples:
            raise IndexError(f"expected a number in [0, {self.num_samples}); got {number}.")
        mask_ratio = None
        if self.mask_ratio_group > 1:
            generator = self.mixture.generator(MASK_RATIO_DRAWS, number // self.mask_ratio_group)
            mask_ratio = float(sample_mask_ratios(1, self.maker.mask_ratio_min, generator))
        skipped = []
        for attempt in range(MAX_BAD_ROWS):
            source, index, task, generator = self._choice(number, attempt)
            try:
                sample = self.maker(source.row(index), task, generator, source, mask_ratio)
            except BadRow as error:
                skipped.append((source.name, index, str(error)))
                continue
            return {**sample, "number": number, "skipped": skipped}
        raise too_many_bad_rows(skipped)

    def length(self, number: int) -> int:
        """Tokens of a sample, without opening its pictures; 0 where its first row is broken."""
        source, index, task, generator = self._choice(number, 0)
        try:
            return self.maker.length(source.rows[index], task, generator, source)
        except ValueError:
            return 0

    def _choice(self, number: int, attempt: int) -> tuple[TrainingSource, int, str, torch.Generator]:
        """The source, row and task of a sample, and its generator; other rows after so many broken ones."""
        source, index, task = self.mixture(number)
        generator = self.mixture.generator(SAMPLE_DRAWS, number, attempt)
        if attempt > 0:
            # Another row than the first one, whose fault is known.
            size = len(self.sources[source])
            index = (index + 1 + draw(max(1, size - 1), generator)) % size
        return self.sources[source], index, TASKS[task], generator


def too_many_bad_rows(skipped: list[tuple[str, Any, str]]) -> ValueError:
    """What ends a training in which nothing can be read any more."""
    name, index, reason = skipped[-1]
    return ValueError(
        f"expected rows that can be used; {len(skipped)} in turn cannot, the last of them row {index} of {name}: "
        f"{reason} Look at the source, or at `task_weights`, which must suit its rows."
    )


class StepSampler(Sampler[int]):
    r"""
    The numbers of a training's samples in order; within each optimizer step by length, if asked for.

    A step's loss and gradient are sums over its samples (trainer.py), so that their order within it changes nothing
    but the padding: micro-batches hold samples of like length.

    Args:
        samples (`TrainingSamples`): The samples.
        step_size (`int`): Samples of an optimizer step, over all ranks and micro-batches.
        sort_by_length (`bool`): Sort them.
        num_done (`int`, *optional*, defaults to 0): Samples that a resumed training skips; their order, which nobody
            sees, is not looked up.
    """

    def __init__(self, samples: TrainingSamples, step_size: int, sort_by_length: bool, num_done: int = 0):
        self.samples, self.step_size, self.sort_by_length, self.num_done = samples, step_size, sort_by_length, num_done

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self), self.step_size):
            numbers = range(start, min(start + self.step_size, len(self)))
            if self.sort_by_length and start >= self.num_done:
                numbers = sorted(numbers, key=self.samples.length, reverse=True)
            yield from numbers


class StreamedSamples(IterableDataset):
    r"""
    The samples of a training whose rows come one after the other.

    Each rank and worker reads rows of its own (`datasets` deals them out), pass after pass without an end, and makes
    the next sample of them, in the proportions that `Mixture` has, exact for each rank and worker. Each sample carries
    the position after it, from which another run goes on.

    Args:
        streams (`list[datasets.IterableDataset]`): Training rows (`open_stream`).
        maker (`SampleMaker`): Makes samples of them.
        weights (`list[float]`): Of the streams.
        task_weights (`list[list[float]]`): For each stream, of the tasks.
        seed (`int`): Of everything.
        rank, world_size (`int`, *optional*): This process and their number.
        buffer_size (`int`, *optional*, defaults to 1): Rows of which the next one is drawn.
        positions (`dict[int, dict]`, *optional*): Where each worker goes on, as its samples told.
        last_worker (`int`, *optional*, defaults to -1): Which worker gave the last batch before. A `DataLoader` begins
            with worker 0 whoever's turn it is, so that those before give a batch of None first, which is to be
            dropped.
        batch_size (`int`, *optional*, defaults to 1): Samples of a batch.
        names (`list[str]`, *optional*): What reports call the streams; `stream 0` and so on by default.
    """

    def __init__(
        self,
        streams: list[datasets.IterableDataset],
        maker: SampleMaker,
        weights: list[float],
        task_weights: list[list[float]],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 1,
        positions: dict[int, dict[str, Any]] | None = None,
        names: list[str] | None = None,
        last_worker: int = -1,
        batch_size: int = 1,
    ):
        self.streams, self.maker, self.weights, self.task_weights = streams, maker, weights, task_weights
        self.seed, self.rank, self.world_size, self.buffer_size = seed, rank, world_size, buffer_size
        self.positions, self.last_worker, self.batch_size = positions or {}, last_worker, batch_size
        self.names = [f"stream {index}" for index in range(len(streams))] if names is None else names

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self.positions and max(self.positions) >= num_workers:
            raise ValueError(
                f"expected at least {max(self.positions) + 1} data loader workers, as before; got {num_workers}. Each "
                "stands at a place of its own in the streams."
            )
        if worker < (self.last_worker + 1) % num_workers:
            yield from [None] * self.batch_size
        start = self.positions.get(worker, {"num_samples": 0, "places": [[0, 0] for _ in self.streams]})
        places = [list(place) for place in start["places"]]
        rows = [self._rows(index, *place) for index, place in enumerate(places)]
        seeds = (self.seed, self.rank, worker)
        sources = Proportions(self.weights, *seeds, SOURCE_ORDER)
        tasks = [Proportions(own, *seeds, TASK_ORDER, index) for index, own in enumerate(self.task_weights)]
        for number in count(start["num_samples"]):
            source, turn = sources(number)
            task = TASKS[tasks[source](turn)[0]]
            skipped = []
            while True:
                if len(skipped) == MAX_BAD_ROWS:
                    raise too_many_bad_rows(skipped)
                row, places[source] = next(rows[source], (None, None))
                if row is None:
                    return  # there are fewer shards than workers, and none for this one
                generator = torch.Generator().manual_seed(stable_hash(*seeds, SAMPLE_DRAWS, number, len(skipped)))
                name = self.names[source]
                try:
                    with as_bad_row(name):
                        sample = self.maker(check_row(row, name), task, generator)
                    break
                except BadRow as error:
                    own_id = row_id(row)
                    skipped.append((name, places[source][1] - 1 if own_id is None else own_id, str(error)))
            position = {"num_samples": number + 1, "places": [list(place) for place in places]}
            yield {**sample, "number": number, "skipped": skipped, "position": (worker, position)}

    def _rows(self, index: int, passes: int, num_read: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Rows of a stream after so many passes and rows, each with the place behind it; none if there are none."""
        while True:
            # One order of the shards for all ranks, or some would be read twice. It hangs on the number of the pass,
            # not on the stream's epoch: that is in memory that all workers share, and each is in a pass of its own.
            seed = stable_hash(self.seed, STREAM_ORDER, passes)
            stream = self.streams[index].shuffle(seed=seed, buffer_size=self.buffer_size)
            seen = 0
            for seen, row in enumerate(split_dataset_by_node(stream, self.rank, self.world_size), start=1):
                if seen > num_read:
                    yield row, [passes, seen]
            if seen == 0:
                return
            passes, num_read = passes + 1, 0
