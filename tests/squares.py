"""Four coloured squares with captions and questions, and a processor for them."""

import functools
import io
from typing import Any

from helpers import tiny_config, tiny_model
from PIL import Image

from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from mmar.processors.image_processing_mmar import MMARImageProcessor
from mmar.processors.processing_mmar import MMARProcessor
from mmar.training.collator import MMARDataCollator
from mmar.training.init_tiny import train_tokenizer
from mmar.training.mixture import Mixture
from mmar.training.samples import SampleMaker, TrainingSamples, TrainingSource
from mmar.training.trainer import MMARTrainer, MMARTrainingArguments


COLOURS = ["red", "green", "blue", "black"]


def make_rows() -> list[dict[str, Any]]:
    rows = []
    for colour in COLOURS:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
        rows.append(
            {
                "image": buffer.getvalue(),
                "captions": [f"a {colour} square", f"{colour} square"],
                "questions": ["Which colour?", "Describe the image."],
                "answers": [colour, f"a {colour} square"],
            }
        )
    return rows


@functools.cache
def make_processor() -> MMARProcessor:
    """For `tiny_config`: 8 x 8 pictures of 16 tokens, a tokenizer of up to 300 tokens."""
    texts = [text for row in make_rows() for text in row["captions"] + row["questions"]]
    tokenizer = train_tokenizer(texts, 300, 512)
    return MMARProcessor(MMARImageProcessor(size=8), tokenizer, num_image_tokens=tiny_config().num_latents)


def make_squares_model(processor: MMARProcessor) -> MMARForConditionalGeneration:
    """`tiny_model` with the vocabulary of the squares' tokenizer."""
    return tiny_model(text_config={"vocab_size": len(processor.tokenizer)}, image_token_id=processor.image_token_id)


def make_samples(
    processor: MMARProcessor,
    num_samples: int,
    rows: list[dict[str, Any]] | None = None,
    task_weights: tuple[float, float, float] = (0.5, 0.4, 0.1),
    seed: int = 0,
    **options: Any,
) -> TrainingSamples:
    source = TrainingSource(make_rows() if rows is None else rows)
    maker = SampleMaker(processor, tiny_config().num_latents, mask_ratio_min=0.5)
    return TrainingSamples(
        [source], maker, Mixture([len(source)], [1.0], [task_weights], seed), num_samples, **options
    )


def make_trainer(
    folder: Any,
    processor: MMARProcessor,
    model: MMARForConditionalGeneration | None = None,
    max_steps: int = 6,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    **options: Any,
) -> MMARTrainer:
    """A trainer of a tiny model on the squares: 4 samples a step, however they are cut."""
    arguments = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.5, "save_strategy": "no"}
    args = MMARTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=max_steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{**arguments, **options},
    )
    return MMARTrainer(
        model=make_squares_model(processor) if model is None else model,
        args=args,
        train_dataset=make_samples(processor, 4 * max_steps) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        data_collator=MMARDataCollator(processor, tiny_config().num_latents),
        processing_class=processor,
    )


def losses(trainer: MMARTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
