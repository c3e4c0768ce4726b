"""
Teaches a model's latent encoder the words of the answers (words.py) from cached latents.

    python -m mmar.training.train_latent_encoder MODEL --data train.parquet --latents runs/latents --out runs/reader

Where the latent encoder is to learn from few pictures, it learns them some twenty times as fast here as within a
training of the whole model: neither VAE nor language model are in the loop. The result is MODEL with the new latent
encoder; a training goes on from there. The linears that tell the words are thrown away.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from ..command import run_command
from ..conversion.models import open_model, open_processor
from ..files import check_folder
from ..modeling_mmar.configuration_mmar import shorten
from ..modeling_mmar.embedding_vit_mmar import MMARViTLinear
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..pipelines.pipeline_mmar import MMARPipeline
from ..processors.processing_mmar import MMARProcessor
from .checkpoints import check_weights
from .latents import LatentCache
from .rows import BadRow, open_pictures
from .samples import draw
from .sources import Source, open_source
from .words import WordReader, Words, known_words, share_told


WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
EVAL_BATCH_SIZE = 128


def usable_rows(source: Source, check: Callable[[int, dict[str, Any]], Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows, without their pictures, at which neither source nor `check` raises `BadRow`, and their numbers."""
    rows, numbers = [], []
    for number in range(len(source)):
        try:
            row = source[number]
            check(number, row)
        except BadRow:
            continue
        rows.append({"answers": row.get("answers"), "depends_on": row.get("depends_on")})
        numbers.append(number)
    return rows, numbers


def picture_of(row: dict[str, Any]) -> Image.Image:
    """The one picture of a row; raises `BadRow` if it has more or none, or it cannot be opened."""
    pictures = open_pictures(row)
    if len(pictures) != 1:
        raise BadRow(f"expected one picture; got {len(pictures)}.")
    return pictures[0]


def draw_latents(cache: LatentCache, numbers: list[int], kind: str, generator: torch.Generator) -> Tensor:
    """Latents `(B, C, h, w)` of a view of each row, drawn from its posterior."""
    views = []
    for number in numbers:
        own = cache[number]
        own = own.get(kind, own["picture"])
        views.append(own[draw(len(own), generator)])
    mean, std = torch.stack(views, dim=1).float()
    return mean + std * torch.randn(mean.shape, generator=generator)


def word_losses(
    reader: WordReader,
    cache: LatentCache,
    numbers: list[int],
    words: dict[str, Words],
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """
    The words' losses per kind, in nats, on views of `batch_size` rows: what a picture shows is told from all of them,
    its style from the half that was not redrawn.
    """
    index = torch.randint(0, len(numbers), (batch_size,), generator=generator)
    drawn = [numbers[i] for i in index.tolist()]
    half = batch_size // 2
    latents = torch.cat(
        [
            draw_latents(cache, drawn[:half], "picture", generator),
            draw_latents(cache, drawn[half:], "content", generator),
        ]
    )
    device = next(reader.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        logits = reader(latents.to(device))
    losses = {"content": (logits.get("content"), index), "style": (logits.get("style"), index[:half])}
    return {kind: words[kind].loss(own[: len(rows)], rows) for kind, (own, rows) in losses.items() if kind in words}


def make_optimizers(
    reader: WordReader, learning_rate: float, muon_learning_rate: float
) -> list[torch.optim.Optimizer]:
    """
    Muon (Jordan et al., 2024) on AdamW's scale (Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982) for
    the matrices of layers and projectors; AdamW for all else. With batches as large as here Muon costs little.
    """
    modules = [module for module in reader.encoder.modules() if isinstance(module, MMARViTLinear)]
    matrices = [module.weight for module in modules]
    in_muon = set(map(id, matrices))
    others = [weight for weight in reader.parameters() if id(weight) not in in_muon]
    options = {"weight_decay": WEIGHT_DECAY}
    return [
        torch.optim.Muon(matrices, lr=muon_learning_rate, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), **options),
    ]


@torch.no_grad()
def encode_all(
    model: MMARForConditionalGeneration, processor: MMARProcessor, source: Source, numbers: list[int]
) -> Iterator[Tensor]:
    """Latents `(B, C, h, w)` of rows, batch by batch: the modes of their posteriors."""
    for start in range(0, len(numbers), EVAL_BATCH_SIZE):
        pictures = [picture_of(source[number]) for number in numbers[start : start + EVAL_BATCH_SIZE]]
        pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        yield model.encode_image_distributions(pixel_values.to(model.vae.device))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of an MMAR")
    parser.add_argument("--data", required=True, help="rows to train on")
    parser.add_argument("--latents", required=True, type=Path, help="their cached latents, with views")
    parser.add_argument("--eval_data", help="held-out rows, measured at the end and never trained on")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--num_steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1.0e-3, help="of AdamW")
    parser.add_argument("--muon_learning_rate", type=float, default=6.0e-3, help="of Muon, on AdamW's scale")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.num_steps < 1 or args.batch_size < 2:
        parser.error("--num_steps must be at least 1, and --batch_size at least 2")
    check_folder(args.out)
    if not hasattr(torch.optim, "Muon"):
        parser.error(f"this command needs torch 2.9 or newer, which has Muon; this is {torch.__version__}")

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    source, held_out = open_source(args.data), open_source(args.eval_data) if args.eval_data else None
    cache = LatentCache(args.latents)
    model, processor = open_model(args.model, dtype=torch.float32), open_processor(args.model)
    cache.check(model, source)
    rows, numbers = usable_rows(source, lambda number, row: cache[number])
    words = known_words(rows)
    if not words:
        raise ValueError(
            f"expected answers whose `depends_on` is content or style in {shorten(args.data)}; there are none. "
            "`python -m mmar.training.emoji_rows` shows how such rows look."
        )
    if held_out is not None:
        held_out_rows, held_out_numbers = usable_rows(held_out, lambda number, row: picture_of(row))
        if not held_out_rows:
            raise ValueError(
                f"expected held-out rows with one picture each in {shorten(args.eval_data)}; there are none."
            )
        num_left_out = len(held_out) - len(held_out_rows)
        print(f"{len(held_out_rows)} held-out rows, {num_left_out} without a picture left out", flush=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device)
    reader = WordReader(model.model.latent_encoder, model.config.text_config.hidden_size, words).to(device)
    optimizers = make_optimizers(reader, args.learning_rate, args.muon_learning_rate)
    schedulers = [get_cosine_schedule_with_warmup(own, WARMUP_STEPS, args.num_steps) for own in optimizers]
    print(f"{len(rows)} rows, {len(source) - len(rows)} of them without latents left out", flush=True)

    start = time.monotonic()
    for step in range(args.num_steps):
        losses = word_losses(reader, cache, numbers, words, args.batch_size, generator)
        reader.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for part in (*optimizers, *schedulers):
            part.step()
        if (step + 1) % 100 == 0 or step + 1 == args.num_steps:
            told = " ".join(f"{kind} {value.item():.3f}" for kind, value in losses.items())
            views = (step + 1) * args.batch_size / (time.monotonic() - start)
            print(f"step {step + 1} {told} views/s {views:.0f}", flush=True)
    if not all(math.isfinite(value.item()) for value in losses.values()):
        raise ValueError("expected a latent encoder that learned; its loss is NaN or infinite. Lower --learning_rate.")

    check_weights(model.named_parameters(), "Lower --learning_rate.")
    report = {"steps": args.num_steps}
    if held_out is not None:
        latents = encode_all(model, processor, held_out, held_out_numbers)
        report["told"] = share_told(reader.eval(), latents, held_out_rows, words)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    MMARPipeline(model, processor, model.default_scheduler()).save_index(args.out)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_command(main)
