"""
Training data: rows with a picture, captions and question-answer pairs -> batches of the three tasks (Sec. 3.3.3).

A row is a dict with `image` (bytes, PIL picture or path), `captions` (list of str), `questions` and `answers` (lists
of str, pair by pair). Each time a row is drawn it becomes one of

    t2i     caption, then the picture with a random part hidden: P(I|T)
    i2t     the whole picture and a question, then the answer: P(T|I)
    uncond  the null prompt, then the picture with a random part hidden: P(I)
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..modeling_mmar.configuration_mmar import IGNORE_INDEX
from ..modeling_mmar.masking_mmar import sample_latent_mask
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..processors.processing_mmar import TASKS, MMARProcessor


# Bounds of `distort`: degrees, and shares of the size, the picture's width and height, and the ink.
MAX_ANGLE, MAX_SCALE, MAX_SHIFT, MAX_LIGHT = 15.0, 0.2, 0.08, 0.15


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    r"""
    Reads a parquet file of training rows.

    Args:
        path (`str` or `Path`): File with the columns image {bytes, path}, captions, questions, answers.

    Returns:
        `list[dict]`: The rows; `image` holds the file's bytes.

    Raises:
        ValueError: If a column is missing, the file has no rows, or a row lacks its picture, has no caption, an empty
            text, or questions and answers of unequal number.
    """
    table = pq.read_table(path)
    missing = {"image", "captions", "questions", "answers"} - set(table.column_names)
    if missing:
        raise ValueError(
            f"{Path(path).name} must have the columns image, captions, questions and answers; missing: "
            f"{', '.join(sorted(missing))}. `python -m mmar.training.emoji_lite` shows how to make them."
        )
    rows = table.to_pylist()
    if not rows:
        raise ValueError(f"{Path(path).name} must have at least one row; got none.")
    for index, row in enumerate(rows):
        _check_row(row, f"row {index} of {Path(path).name}")
    return [{**row, "image": row["image"]["bytes"]} for row in rows]


def _check_row(row: dict[str, Any], name: str) -> None:
    image = row["image"]
    if not isinstance(image, dict) or not image.get("bytes"):
        got = "none" if not image or isinstance(image, dict) else type(image).__name__
        raise ValueError(
            f"{name} must hold its picture's file as image {{bytes, path}}; got {got}. Fill the bytes or drop the row."
        )
    for column in ("captions", "questions", "answers"):
        texts = row[column]
        if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(f"{name} must have `{column}` as a list of strings; got {texts!r}. Make it a list.")
        if not texts or not all(text and text.strip() for text in texts):
            raise ValueError(
                f"{name} must have `{column}`, none of them empty; got {texts!r}. Drop the row or fill it."
            )
    if len(row["questions"]) != len(row["answers"]):
        raise ValueError(
            f"{name} must have one answer per question; got {len(row['questions'])} questions and "
            f"{len(row['answers'])} answers."
        )


def _check_texts(row: dict[str, Any], processor: MMARProcessor, index: int) -> None:
    """Tries each text of a row now, and not hours into a training."""
    try:
        for caption in row["captions"]:
            processor.training_example("t2i", caption)
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            processor.training_example("i2t", answer, question)
    except ValueError as error:
        raise ValueError(f"row {index}: {error}") from error


def distort(picture: Image.Image) -> Image.Image:
    """A moved, turned and scaled picture on white of other colour strength, from torch's global generator."""
    width, height = picture.size
    angle, scale, right, down, light = (torch.rand(5) * 2 - 1).tolist()
    angle, scale = math.radians(MAX_ANGLE * angle), 1 / (1 + MAX_SCALE * scale)
    # Where the picture's middle goes to, and where it comes from.
    to_x, to_y = width * (0.5 + MAX_SHIFT * right), height * (0.5 + MAX_SHIFT * down)
    from_x, from_y = width / 2, height / 2
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    matrix = (cos, sin, from_x - cos * to_x - sin * to_y, -sin, cos, from_y + sin * to_x - cos * to_y)
    moved = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white"
    )
    # Grey in an eighth of the copies, colours as they are in a quarter, paler between: names hold without colour.
    moved = ImageEnhance.Color(moved).enhance(min(1.0, max(0.0, 1.6 * float(torch.rand(())) - 0.2)))
    return moved.point(lambda value: 255 - (255 - value) * (1 + MAX_LIGHT * light))


class MMARLatentDataset(Dataset):
    r"""
    Rows whose pictures were encoded once: the posterior's mean and std of the picture and of distorted copies.

    The distorted copies widen the pictures that understanding sees; generation always learns the picture itself.

    Args:
        rows (`list[dict]`): As `read_rows` gives them.
        model (`MMARForConditionalGeneration`): Its frozen VAE encodes.
        processor (`MMARProcessor`): Its image processor reads.
        num_copies (`int`, *optional*, defaults to 0): Distorted copies per picture.
        batch_size (`int`, *optional*, defaults to 64): Pictures per VAE pass.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        model: MMARForConditionalGeneration,
        processor: MMARProcessor,
        num_copies: int = 0,
        batch_size: int = 64,
    ):
        if not rows or num_copies < 0:
            raise ValueError(
                f"expected at least one row and `num_copies` of at least 0; got {len(rows)} rows and {num_copies}."
            )
        self.rows = [{key: value for key, value in row.items() if key != "image"} for row in rows]
        for index, row in enumerate(self.rows):
            _check_texts(row, processor, index)
        means, stds = [], []
        for copy in range(num_copies + 1):
            for start in tqdm(range(0, len(rows), batch_size), desc=f"latents {copy + 1}/{num_copies + 1}", delay=2):
                pictures = processor.image_processor.fetch_images(
                    [row["image"] for row in rows[start : start + batch_size]]
                )
                if copy > 0:
                    pictures = [distort(picture.convert("RGB")) for picture in pictures]
                pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
                mean, std = model.encode_image_distributions(pixel_values.to(model.device))
                means.append(mean.cpu())
                stds.append(std.cpu())
        # (copies * rows, C, h, w) -> (rows, copies, C, h, w)
        shape = (num_copies + 1, len(rows), *means[0].shape[1:])
        self.means = torch.cat(means).view(shape).transpose(0, 1).contiguous()
        self.stds = torch.cat(stds).view(shape).transpose(0, 1).contiguous()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "latent_means": self.means[index], "latent_stds": self.stds[index]}


@dataclass
class MMARDataCollator:
    r"""
    Draws a task per row and builds the batch.

    Args:
        processor (`MMARProcessor`): Makes tokens and labels.
        num_latents (`int`): N.
        task_weights (`tuple[float, float, float]`, *optional*): Of t2i, i2t and uncond; (0.5, 0.45, 0.05) by default
            (suppl. Sec. 6.1).
        mask_ratio_min (`float`, *optional*, defaults to 0.7): Lower bound of the mask ratio; 0.7 in stage 1, 0 later
            (Sec. 3.3.3).
    """

    processor: MMARProcessor
    num_latents: int
    task_weights: tuple[float, float, float] = (0.5, 0.45, 0.05)
    mask_ratio_min: float = 0.7

    def __post_init__(self):
        if len(self.task_weights) != len(TASKS):
            raise ValueError(
                f"`task_weights` must be one number per task, {', '.join(TASKS)}; got {self.task_weights}."
            )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        r"""
        Args:
            rows (`list[dict]`): Rows of `MMARLatentDataset`, or rows with `image`.

        Returns:
            `dict` with `input_ids`, `attention_mask`, `labels` `(B, L)`, left padded; `latents` `(B, C, h, w)` or
            `pixel_values` `(B, 3, H, W)`; `latent_mask` `(B, N)`, True where a latent is hidden.
        """
        weights = torch.tensor(self.task_weights, dtype=torch.float)
        tasks = torch.multinomial(weights, len(rows), replacement=True).tolist()
        examples, latents, pictures = [], [], []
        latent_mask = sample_latent_mask(len(rows), self.num_latents, self.mask_ratio_min)
        for i, (row, task_index) in enumerate(zip(rows, tasks, strict=True)):
            task = TASKS[task_index]
            if task == "i2t":
                pair = int(torch.randint(len(row["questions"]), ()))
                example = self.processor.training_example(task, row["answers"][pair], row["questions"][pair])
                latent_mask[i] = False
            else:
                caption = row["captions"][int(torch.randint(len(row["captions"]), ()))]
                example = self.processor.training_example(task, caption)
            examples.append(example)
            if "latent_means" in row:
                copy = int(torch.randint(len(row["latent_means"]), ())) if task == "i2t" else 0
                mean, std = row["latent_means"][copy], row["latent_stds"][copy]
                latents.append(mean + std * torch.randn(mean.shape))
            else:
                pictures.append(row["image"])
        input_ids = _pad([example["input_ids"] for example in examples], self.processor.tokenizer.pad_token_id)
        labels = _pad([example["labels"] for example in examples], IGNORE_INDEX)
        attention_mask = _pad([[1] * len(example["input_ids"]) for example in examples], 0)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "latent_mask": latent_mask,
        }
        if latents:
            batch["latents"] = torch.stack(latents)
        else:
            batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return batch


def _pad(sequences: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")
