"""Four coloured squares with captions and questions, and a processor for them."""

import functools
import io
from typing import Any

from helpers import tiny_config
from PIL import Image

from mmar.processors.image_processing_mmar import MMARImageProcessor
from mmar.processors.processing_mmar import MMARProcessor
from mmar.training.init_tiny import train_tokenizer


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
