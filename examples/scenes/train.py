"""
Trains an MMAR on scenes, after a recipe.

    python -m examples.scenes.train examples/scenes/stage1.yaml --mix 0.6 0.2 0.2 0.5 \
        model=runs/scenes/init output_dir=runs/scenes/stage1

As `mmar train`, with rows that are made when they are needed. `--mix` gives the shares of scenes with one
glyph, with one group and with two groups, and that of large glyphs among the lone ones.
"""

import argparse
from pathlib import Path
from typing import Any

from torch.nn import functional as F
from transformers import set_seed

from mmar.command import run_command
from mmar.conversion.models import open_model
from mmar.modeling_mmar import prefix_mmar
from mmar.modeling_mmar.configuration_mmar import IGNORE_INDEX
from mmar.modeling_mmar.masking_mmar import sample_mask_ratios
from mmar.processors.processing_mmar import TASKS, MMARProcessor
from mmar.training.checkpoints import last_whole_checkpoint
from mmar.training.collator import MMARDataCollator
from mmar.training.mixture import MASK_RATIO_DRAWS, SAMPLE_DRAWS, Mixture
from mmar.training.recipe import parse
from mmar.training.samples import SampleMaker, TrainingSamples, TrainingSource
from mmar.training.trainer import MMARTrainer

from .rows import SceneRows
from .world import Mix


MASK_RATIO_STEP, LENGTH_STEP = 1 / 16, 32


def tasks_of_batch(batch_size: int, weights: list[float]) -> list[int]:
    """The tasks of a batch's samples, by number, in the proportions of their weights."""
    total = sum(weights)
    counts = [round(batch_size * weight / total) for weight in weights]
    # What rounding left goes to the largest.
    counts[counts.index(max(counts))] += batch_size - sum(counts)
    return [task for task, count in enumerate(counts) for _ in range(count)]


class SceneSamples(TrainingSamples):
    r"""
    The samples of a training on scenes: each has its own scene, and is a pure function of its number.

    Every batch has the same tasks and one mask ratio, in steps of `MASK_RATIO_STEP`, so that its tensors have few
    shapes: on a CPU, matrix kernels are compiled anew for each shape, which takes longer than to run them.
    """

    def __getitem__(self, number: int) -> dict[str, Any]:
        task = TASKS[self.tasks[number % len(self.tasks)]]
        generator = self.mixture.generator(SAMPLE_DRAWS, number)
        of_batch = self.mixture.generator(MASK_RATIO_DRAWS, number // self.mask_ratio_group)
        ratio = float(sample_mask_ratios(1, self.maker.mask_ratio_min, of_batch))
        ratio = max(1, round(ratio / MASK_RATIO_STEP)) * MASK_RATIO_STEP
        source = self.sources[0]
        sample = self.maker(source.row(number), task, generator, source, ratio)
        return {**sample, "number": number, "skipped": []}


class PaddingCollator(MMARDataCollator):
    """A collator that pads texts to multiples of `LENGTH_STEP` tokens, likewise for few shapes."""

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(samples)
        fillings = {
            "input_ids": self.processor.tokenizer.pad_token_id,
            "attention_mask": 0,
            "labels": IGNORE_INDEX,
        }
        missing = -batch["input_ids"].shape[1] % LENGTH_STEP
        padded = {name: F.pad(batch[name], (missing, 0), value=value) for name, value in fillings.items()}
        return {**batch, **padded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE of the recipe, model and output_dir")
    parser.add_argument("--mix", nargs=4, type=float, metavar=("ONE", "SEVERAL", "TWO", "LARGE"))
    options = parser.parse_intermixed_args()
    # Texts before the first image differ in length from batch to batch: to leave out their gradients makes new shapes.
    prefix_mmar.MIN_PREFIX_SHARE = 1.0
    data, args = parse([options.recipe, "data=scenes", *options.settings])
    model = open_model(data.model, dtype="float32", attn_implementation=data.attn_implementation)
    set_seed(args.seed)
    model.config.diffusion_config.diffusion_batch_mul = data.diffusion_batch_mul
    model.freeze(train_backbone=args.train_backbone)
    processor = MMARProcessor.from_pretrained(data.model)
    maker = SampleMaker(processor, model.config.num_latents, data.mask_ratio_min)
    mix = Mix(*options.mix) if options.mix else Mix()
    source = TrainingSource(SceneRows(args.seed, mix))
    mixture = Mixture([len(source)], [1.0], [data.task_weights], args.seed)
    samples = SceneSamples([source], maker, mixture, args.max_steps * args.train_batch_size, args.train_batch_size)
    samples.tasks = tasks_of_batch(args.train_batch_size, data.task_weights)
    trainer = MMARTrainer(
        model=model,
        args=args,
        train_dataset=samples,
        data_collator=PaddingCollator(processor, model.config.num_latents),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(args.output_dir) if data.resume else None)
    trainer.save_state()
    with trainer.ema_weights():
        trainer.save_model(str(Path(args.output_dir) / "final"))


if __name__ == "__main__":
    run_command(main)
