"""Samples, or rows that become samples on the spot, to batches."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modeling_mmar.configuration_mmar import IGNORE_INDEX
from ..processors.processing_mmar import TASKS, MMARProcessor
from .rows import check_row
from .samples import MAX_SEED, SampleMaker, draw


@dataclass
class MMARDataCollator:
    r"""
    Builds batches of samples; a row (rows.py) first becomes a sample of a task drawn by `task_weights`.

    Args:
        processor (`MMARProcessor`): Makes tokens and labels.
        num_latents (`int`): N.
        task_weights (`tuple[float, float, float]`, *optional*): Of t2i, i2t and uncond, for rows; (0.5, 0.45, 0.05) by
            default (suppl. Sec. 6.1).
        mask_ratio_min (`float`, *optional*, defaults to 0.7): Lower bound of the mask ratio, for rows; 0.7 in stage 1,
            0 later (Sec. 3.3.3).

    Attributes:
        for_trainer (`bool`): Also hand on what `MMARTrainer` reads and no model takes: `seeds`, `picture_tasks`,
            `skipped` and `position`. The trainer sets it.

    Example:

    ```python
    >>> from mmar import MMARProcessor
    >>> from mmar.training.collator import MMARDataCollator

    >>> processor = MMARProcessor.from_pretrained("checkpoints/mmar-tiny")
    >>> collator = MMARDataCollator(processor, num_latents=16)
    >>> batch = collator([{"image": "cat.png", "captions": ["a cat"]}])
    ```
    """

    processor: MMARProcessor
    num_latents: int
    task_weights: tuple[float, float, float] = (0.5, 0.45, 0.05)
    mask_ratio_min: float = 0.7
    for_trainer: bool = False

    def __post_init__(self):
        weights = self.task_weights
        if len(weights) != len(TASKS) or not all(weight >= 0 for weight in weights) or sum(weights) <= 0:
            raise ValueError(
                f"`task_weights` must be one number of at least 0 per task, {', '.join(TASKS)}, one above 0; got "
                f"{weights}."
            )
        self._maker = SampleMaker(self.processor, self.num_latents, self.mask_ratio_min)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            samples (`list[dict]`): Samples of `TrainingSamples` or `StreamedSamples`, or training rows.

        Returns:
            `dict` with `input_ids`, `attention_mask`, `labels` `(B, L)`, left padded; `latents` `(I, C, h, w)` or
            `pixel_values` `(I, 3, H, W)`, the pictures of all rows in reading order; `latent_mask` `(I, N)`, True
            where a latent is hidden. `for_trainer` has `latent_distributions` `(I, 2, C, h, w)` in place of `latents`.

        Raises:
            ValueError: If a row cannot be used, columns of samples or rows were removed, or some samples have latents
                and others pictures.
        """
        if not all("seeds" in sample if "input_ids" in sample else sample for sample in samples):
            raise ValueError(
                "expected samples or rows with all their columns; some were removed. Set "
                "`remove_unused_columns=False` in the training arguments: the collator reads columns that the model's "
                "`forward` does not name."
            )
        samples = [sample if "input_ids" in sample else self._sample(sample) for sample in samples]
        lengths = [len(sample["input_ids"]) for sample in samples]
        batch = {
            "input_ids": _pad([sample["input_ids"] for sample in samples], self.processor.tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * length for length in lengths], 0),
            "labels": _pad([sample["labels"] for sample in samples], IGNORE_INDEX),
        }
        kinds = ("latent_distributions", "pixel_values")
        given = [name for name in kinds if any(name in sample for sample in samples)]
        if len(given) == 2:
            raise ValueError(
                "expected latents of all pictures of a batch, or of none; got both. Cache the latents of every source."
            )
        for name in given:
            batch[name] = torch.cat([sample[name] for sample in samples if name in sample])
            batch["latent_mask"] = torch.cat([sample["latent_mask"] for sample in samples if name in sample])
        seeds = [seed for sample in samples for seed in sample["seeds"]]
        if not self.for_trainer and "latent_distributions" in batch:
            batch["latents"] = sample_latents(batch.pop("latent_distributions"), generators(seeds))
        if self.for_trainer:
            batch["seeds"] = torch.tensor(seeds, dtype=torch.long)
            tasks = [sample["task"] for sample in samples for _ in sample["seeds"]]
            batch["picture_tasks"] = torch.tensor(tasks, dtype=torch.long)
            batch["skipped"] = [entry for sample in samples for entry in sample.get("skipped", ())]
            # Of streams: a batch is of one worker, which stands where its last sample says.
            batch["position"] = samples[-1].get("position")
        return batch

    def _sample(self, row: dict[str, Any]) -> dict[str, Any]:
        task = TASKS[int(torch.multinomial(torch.tensor(self.task_weights), 1))]
        generator = torch.Generator().manual_seed(draw(MAX_SEED, None))
        return self._maker(check_row(row, "a row"), task, generator)


def generators(seeds: list[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One source of random numbers for each picture: of its posterior, then of its timesteps and noise."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def sample_latents(latent_distributions: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Mean and std `(I, 2, C, h, w)` to latents `(I, C, h, w)`, as `encode_images` samples those of pictures."""
    mean, std = latent_distributions.unbind(1)
    return mean + std * randn_tensor(mean.shape, generator=generators, device=mean.device)


def _pad(sequences: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")
