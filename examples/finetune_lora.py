"""
Fine-tunes the bundled mmar-tiny with a LoRA on photos of groceries, and measures it before and after.

    python examples/finetune_lora.py GROCERY_STORE --out runs/grocery_lora

GROCERY_STORE is the folder `dataset` of github.com/marcusklasson/GroceryStoreDataset (MIT; Klasson et al., WACV
2019), or a folder with `train*.parquet` and `test*.parquet` that have the columns image, label_name and coarse_name.
Photos become 64 x 64 pictures. The adapter goes to OUT/adapter, the figures to OUT/result.json, drawings to
OUT/drawn.png; a run that was stopped goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from demo import CHECKPOINT, sheet
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from mmar import MMARForConditionalGeneration, MMARPipeline, MMARProcessor, MMARTrainer, MMARTrainingArguments
from mmar.evaluation.emoji_styles import ask
from mmar.modeling_mmar.saving_mmar import apply_umask
from mmar.training.checkpoints import last_whole_checkpoint, num_steps
from mmar.training.collator import MMARDataCollator
from mmar.training.latents import LatentCache, cache_latents
from mmar.training.mixture import Mixture
from mmar.training.rows import open_pictures
from mmar.training.samples import SampleMaker, TrainingSamples, TrainingSource


QUESTION = "What is it?"
# Folders of the first level hold kinds of groceries, and no names.
CATEGORIES = ("Fruit", "Packages", "Vegetables")
# Moved copies of each training photo, for questions; drawing learns from the photos themselves.
NUM_COPIES = 8
RANK = 16
TASK_WEIGHTS = (0.5, 0.45, 0.05)
BATCH_SIZE = 32
NUM_DRAWN = 16


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """
    Training rows of a split, `train` or `test`, with `label` and `coarse`, the names of what is on the photo; raises
    `ValueError` if there are none.
    """
    rows = []
    for path in sorted(folder.glob(f"{split}*.parquet")):
        for row in pq.read_table(path, columns=["image", "label_name", "coarse_name"]).to_pylist():
            rows.append({"image": row["image"]["bytes"], "label": row["label_name"], "coarse": row["coarse_name"]})
    for path in [] if rows else sorted((folder / split).rglob("*.jpg")):
        names = [name for name in path.relative_to(folder / split).parts[:-1] if name not in CATEGORIES]
        label, coarse = (name.replace("-", " ").lower() for name in (names[-1], names[0]))
        rows.append({"image": str(path), "label": label, "coarse": coarse})
    if not rows:
        raise ValueError(f"expected {split}*.parquet or {split}/**/*.jpg in {str(folder)!r}; there is neither.")
    for row in rows:
        row |= {"captions": [f"a photo of {row['label']}"], "questions": [QUESTION], "answers": [row["label"]]}
    return rows


def with_lora(model: MMARForConditionalGeneration) -> PeftModel:
    """A LoRA on each linear of the latent encoder, the language model and the Diffusion MLP; the VAE stays."""
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("model.", "diffusion_mlp."))
    ]
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears))


def samples(source: TrainingSource, processor: MMARProcessor, count: int, task_weights: tuple) -> TrainingSamples:
    """`count` samples of a source, with any share of a picture hidden."""
    maker = SampleMaker(processor, processor.num_image_tokens, mask_ratio_min=0.0)
    return TrainingSamples([source], maker, Mixture([len(source)], [1.0], [task_weights], seed=0), count)


def measure(trainer: MMARTrainer, pipe: MMARPipeline, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of rows whose name, or at least whose kind, is told exactly, and the image loss given the captions."""
    coarse = {row["label"]: row["coarse"] for row in rows}
    pictures = [open_pictures(row)[0] for row in rows]
    with trainer.ema_weights():
        answers = ask(pipe, pictures, QUESTION)
    pairs = list(zip(answers, rows, strict=True))
    image_loss = trainer.evaluate()["eval_image_loss"]
    return {
        "name": round(sum(answer == row["label"] for answer, row in pairs) / len(rows), 4),
        "kind": round(sum(coarse.get(answer) == row["coarse"] for answer, row in pairs) / len(rows), 4),
        "image_loss": round(image_loss, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the GroceryStoreDataset")
    parser.add_argument("--model", default=CHECKPOINT, help="an MMAR of 64 x 64 pictures")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--num_steps", type=int, default=2000)
    parser.add_argument("--learning_rate", type=float, default=1.0e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        train_rows, test_rows = read_rows(args.data, "train"), read_rows(args.data, "test")
    except ValueError as error:
        parser.error(str(error))

    set_seed(args.seed)
    base = MMARForConditionalGeneration.from_pretrained(args.model, dtype="float32")
    processor = MMARProcessor.from_pretrained(args.model)
    caches = {}
    for name, rows, num_copies in (("train", train_rows, NUM_COPIES), ("test", test_rows, 0)):
        cache_latents(rows, base, processor, args.out / f"latents_{name}", num_copies)
        caches[name] = TrainingSource(rows, LatentCache(args.out / f"latents_{name}"))

    model = with_lora(base)
    trainer = MMARTrainer(
        model=model,
        args=MMARTrainingArguments(
            output_dir=str(args.out),
            max_steps=args.num_steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, args.num_steps // 10),
            ema_decay=0.99,
            bf16=True,
            seed=args.seed,
            logging_steps=50,
            save_steps=500,
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=samples(caches["train"], processor, args.num_steps * BATCH_SIZE, TASK_WEIGHTS),
        eval_dataset=samples(caches["test"], processor, len(test_rows), (1.0, 0.0, 0.0)),
        data_collator=MMARDataCollator(processor, processor.num_image_tokens),
        processing_class=processor,
    )
    pipe = MMARPipeline(base, processor, base.default_scheduler())
    names = sorted({row["label"] for row in test_rows})
    names = [names[i * len(names) // NUM_DRAWN] for i in range(NUM_DRAWN)]
    result = {"rows": {"train": len(train_rows), "test": len(test_rows)}, "before": measure(trainer, pipe, test_rows)}

    start = time.monotonic()
    last = last_whole_checkpoint(args.out)
    if last is not None and num_steps(last) >= args.num_steps:
        trainer.load_checkpoint(last)
    else:
        trainer.train(resume_from_checkpoint=last)
    result["minutes"] = round((time.monotonic() - start) / 60, 1)
    result["after"] = measure(trainer, pipe, test_rows)
    result["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with trainer.ema_weights():
        model.save_pretrained(args.out / "adapter")
        apply_umask(args.out / "adapter")
        generator = torch.Generator().manual_seed(args.seed)
        drawn = pipe([f"a photo of {name}" for name in names], generator=generator).images
    sheet(drawn, names, columns=4).save(args.out / "drawn.png")
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
