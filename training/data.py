"""
Training data: rows with a picture, captions and question-answer pairs -> batches of the three tasks (Sec. 3.3.3).

A row is a dict with `image` (bytes, PIL picture or path), `captions` (list of str), `questions` and `answers` (lists
of str, pair by pair). Two more lists may go with the answers, pair by pair: `depends_on`, the kind of views (views.py)
that an answer holds for, and `swaps`, the part of an answer that names the content, or None. Each time a row is drawn
it becomes one of

    t2i     caption, then the picture with a random part hidden: P(I|T)
    i2t     the whole picture and a question, then the answer: P(T|I)
    uncond  the null prompt, then the picture with a random part hidden: P(I)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..modeling_mmar.configuration_mmar import IGNORE_INDEX
from ..modeling_mmar.masking_mmar import sample_latent_mask
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..processors.processing_mmar import TASKS, MMARProcessor
from .views import KINDS, distort, mix_style, restyle


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    r"""
    Reads a parquet file of training rows.

    Args:
        path (`str` or `Path`): File with the columns image {bytes, path}, captions, questions, answers, and
            optionally depends_on and swaps.

    Returns:
        `list[dict]`: The rows; `image` holds the file's bytes.

    Raises:
        ValueError: If a column is missing, the file has no rows, or a row lacks its picture, has no caption, an empty
            text, questions and answers of unequal number, or an unknown kind or a swap that is not in its answer.
    """
    if not Path(path).is_file():
        raise ValueError(f"expected a parquet file; there is none at {str(path)!r}. Check the path.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"expected a parquet file at {str(path)!r}; it cannot be read ({error}).") from error
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
    legal = {
        "depends_on": f"one of {', '.join(KINDS)}",
        "swaps": "a text that stands in it once, before a space, or null",
    }
    for column, what in legal.items():
        if row.get(column) is None:
            continue
        values = row[column]
        good = isinstance(values, list) and len(values) == len(row["answers"])
        for value, answer in zip(values, row["answers"], strict=True) if good else ():
            # Something must follow that can be learned, and begin a token of its own.
            is_part = isinstance(value, str) and bool(value.strip()) and answer.count(value) == 1
            is_part = is_part and answer.partition(value)[2][:1].isspace()
            good &= value in KINDS if column == "depends_on" else value is None or is_part
        if not good:
            raise ValueError(f"{name} must have `{column}` with, for each answer, {what}; got {values!r}.")


def _check_texts(row: dict[str, Any], processor: MMARProcessor, index: int, longest_swap: str) -> None:
    """Tries each text of a row now, and not hours into a training; swapped answers with the longest swap."""
    try:
        for answer, swap, question in zip(row["answers"], row.get("swaps") or (), row["questions"], strict=False):
            for content in (swap, longest_swap) if swap is not None else ():
                _swapped_answer(processor, answer, swap, content, question, learns_content=True)
        for caption in row["captions"]:
            processor.training_example("t2i", caption)
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            processor.training_example("i2t", answer, question)
    except ValueError as error:
        raise ValueError(f"row {index}: {error}") from error


class MMARLatentDataset(Dataset):
    r"""
    Rows whose pictures were encoded once: the posterior's mean and std of the picture and of its views.

    The views widen the pictures that understanding sees; generation always learns the picture itself.

    Args:
        rows (`list[dict]`): As `read_rows` gives them.
        model (`MMARForConditionalGeneration`): Its frozen VAE encodes.
        processor (`MMARProcessor`): Its image processor reads.
        num_copies (`int`, *optional*, defaults to 0): Views of each kind per picture.
        batch_size (`int`, *optional*, defaults to 64): Pictures per VAE pass.

    Attributes:
        latents (`dict[str, torch.HalfTensor]`): Per kind of `KINDS` that the rows have, mean and std of shape
            `(R, copies, 2, C, h, w)`; the first of `"picture"` is the picture itself.
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
        swaps = [swap for row in rows for swap in row.get("swaps") or () if swap is not None]
        longest_swap = max(swaps, default="", key=lambda swap: len(processor.tokenizer(swap)["input_ids"]))
        for index, row in enumerate(self.rows):
            _check_texts(row, processor, index, longest_swap)
        # A style is told by the answer that hangs on it; a row without one is of a style of its own.
        styles = [
            dict(zip(row.get("depends_on") or (), row["answers"], strict=False)).get("style", index)
            for index, row in enumerate(rows)
        ]
        kinds = {kind for row in rows for kind in row.get("depends_on") or ()}

        def encode(change: Callable[[Image.Image], Image.Image] | None, name: str) -> Tensor:
            # (R, 2, C, h, w); half precision is far finer than the posterior's std.
            encoded = []
            for start in tqdm(range(0, len(rows), batch_size), desc=name, delay=2):
                pictures = processor.image_processor.fetch_images(
                    [row["image"] for row in rows[start : start + batch_size]]
                )
                if change is not None:
                    pictures = [change(picture.convert("RGB")) for picture in pictures]
                pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
                distribution = model.encode_image_distributions(pixel_values.to(model.device))
                encoded.append(torch.stack([part.cpu().half() for part in distribution], dim=1))
            return torch.cat(encoded)

        banks: dict[str, list[Tensor]] = {"picture": [encode(None, "latents")]}
        for copy in range(num_copies):
            name = f"views {copy + 1}/{num_copies}"
            moved = encode(distort, name)
            banks["picture"].append(moved)
            if "content" in kinds:
                banks.setdefault("content", []).append(encode(lambda picture: distort(restyle(picture)), name))
            if "style" in kinds:
                banks.setdefault("style", []).append(mix_style(moved, styles))
        self.latents = {kind: torch.stack(bank, dim=1) for kind, bank in banks.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "latents": {kind: bank[index] for kind, bank in self.latents.items()}}


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
        swap_rate (`float`, *optional*, defaults to 0.0): Share of the answers with a swap that get another row's
            content in its place, and teach only what follows it; the others then teach only what comes before and the
            content itself. So what is said of the style must come from the picture, and not from a name that was seen
            in some styles only. What follows a swap is shown views of the style, where the row has an answer that
            hangs on it.
    """

    processor: MMARProcessor
    num_latents: int
    task_weights: tuple[float, float, float] = (0.5, 0.45, 0.05)
    mask_ratio_min: float = 0.7
    swap_rate: float = 0.0

    def __post_init__(self):
        if len(self.task_weights) != len(TASKS):
            raise ValueError(
                f"`task_weights` must be one number per task, {', '.join(TASKS)}; got {self.task_weights}."
            )
        if not 0 <= self.swap_rate <= 1:
            raise ValueError(f"`swap_rate` must be in [0, 1]; got {self.swap_rate!r}.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        r"""
        Args:
            rows (`list[dict]`): Rows of `MMARLatentDataset`, or rows with `image`. Swaps come from these rows.

        Returns:
            `dict` with `input_ids`, `attention_mask`, `labels` `(B, L)`, left padded; `latents` `(B, C, h, w)` or
            `pixel_values` `(B, 3, H, W)`; `latent_mask` `(B, N)`, True where a latent is hidden.
        """
        weights = torch.tensor(self.task_weights, dtype=torch.float)
        tasks = torch.multinomial(weights, len(rows), replacement=True).tolist()
        examples, latents, pictures = [], [], []
        latent_mask = sample_latent_mask(len(rows), self.num_latents, self.mask_ratio_min)
        contents = [swap for row in rows for swap in row.get("swaps") or () if swap is not None]
        for i, (row, task_index) in enumerate(zip(rows, tasks, strict=True)):
            task, kind = TASKS[task_index], "picture"
            if task == "i2t":
                example, kind = self._answer(row, contents)
                latent_mask[i] = False
            else:
                caption = row["captions"][int(torch.randint(len(row["captions"]), ()))]
                example = self.processor.training_example(task, caption)
            examples.append(example)
            if "latents" in row:
                views = row["latents"].get(kind, row["latents"]["picture"])
                copy = int(torch.randint(len(views), ())) if task == "i2t" else 0
                mean, std = views[copy].float()
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

    def _answer(self, row: dict[str, Any], contents: list[str]) -> tuple[dict[str, list[int]], str]:
        """One of a row's answers, at times with another's content in it, and the kind of views that it holds for."""
        pair = int(torch.randint(len(row["questions"]), ()))
        question, answer = row["questions"][pair], row["answers"][pair]
        kind = row["depends_on"][pair] if row.get("depends_on") else "picture"
        swap = row["swaps"][pair] if row.get("swaps") else None
        if swap is None or self.swap_rate == 0:
            return self.processor.training_example("i2t", answer, question), kind
        is_own = bool(torch.rand(()) >= self.swap_rate)
        content = swap if is_own else contents[int(torch.randint(len(contents), ()))]
        example = _swapped_answer(self.processor, answer, swap, content, question, learns_content=is_own)
        has_style = "style" in (row.get("depends_on") or ())
        return example, "style" if has_style and not is_own else kind


def _swapped_answer(
    processor: MMARProcessor, answer: str, swap: str, content: str, question: str, learns_content: bool
) -> dict[str, list[int]]:
    """An answer with other content in place of its swap; labels up to the content's end, or only after it."""
    before, _, after = answer.partition(swap)
    given = before + content
    example = processor.training_example("i2t", given + after, question)
    labels = example["labels"]
    start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    given_ids = processor.tokenizer(given, add_special_tokens=False)["input_ids"]
    border = start + len(given_ids)
    if labels[start:border] != given_ids:
        raise ValueError(
            f"expected the swap {swap!r} to end where a token of the answer {answer!r} ends; with {content!r} in its "
            "place, what follows is one token with its end. Let it end before a space, or drop it."
        )
    learned = slice(0, border) if learns_content else slice(border, None)
    example["labels"] = [IGNORE_INDEX] * len(labels)
    example["labels"][learned] = labels[learned]
    return example


def _pad(sequences: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")
