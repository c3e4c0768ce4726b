"""What `mmar train` does: opens data and model after a recipe, trains, and writes the final weights."""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from transformers import set_seed

from ..conversion.models import open_model, open_processor
from ..modeling_mmar.configuration_mmar import shorten
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from .checkpoints import best_checkpoint, claimed, last_whole_checkpoint, num_steps
from .collator import MMARDataCollator
from .latents import LatentCache
from .mixture import Mixture
from .recipe import DataArguments, SourceArguments, accumulation_steps, parse, read_sources
from .samples import SampleMaker, StreamedSamples, TrainingSamples, TrainingSource
from .sources import open_source, open_stream
from .trainer import MMARTrainer, MMARTrainingArguments


def open_training_source(
    arguments: SourceArguments, model: MMARForConditionalGeneration | None = None, swap_rate: float = 0.0
) -> TrainingSource:
    r"""
    Opens a source, with its cached latents.

    Args:
        arguments (`SourceArguments`): The source.
        model (`MMARForConditionalGeneration`, *optional*): Whose VAE must have made the latents; for None that is for
            the caller to check, with `LatentCache.check`.
        swap_rate (`float`, *optional*, defaults to 0.0): As for `SampleMaker`.

    Raises:
        ValueError: If the source or its latents cannot be read, they do not belong together, or there is nothing to
            swap.
    """
    rows = open_source(arguments.path, arguments.columns, arguments.split, arguments.image_folder)
    cache = None
    if arguments.latents is not None:
        cache = LatentCache(arguments.latents)
        if model is not None:
            cache.check(model, rows)
    needs_relations = swap_rate > 0 or (cache is not None and cache.has_views)
    source = TrainingSource(rows, cache, needs_relations, arguments.name)
    if swap_rate > 0 and not source.contents:
        raise ValueError(
            f"`swap_rate` needs swaps in {arguments.name}; no row has them. Set it to 0, or add the column."
        )
    return source


def training_samples(
    sources: list[TrainingSource], arguments: list[SourceArguments], maker: SampleMaker, data: DataArguments, args: Any
) -> TrainingSamples:
    """The samples of all steps; sets `max_steps` where the recipe has epochs."""
    total_batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * sum(map(len, sources)) / total_batch_size)
    mixture = Mixture(
        [len(source) for source in sources],
        [source.weight for source in arguments],
        [source.task_weights or data.task_weights for source in arguments],
        args.seed if args.data_seed is None else args.data_seed,
    )
    group = args.train_batch_size if data.mask_ratio_per_batch else 1
    return TrainingSamples(sources, maker, mixture, args.max_steps * total_batch_size, group)


def open_streams(arguments: list[SourceArguments]) -> list[IterableDataset]:
    """The rows of sources as streams."""
    return [open_stream(source.path, source.columns, source.split, source.image_folder) for source in arguments]


def streamed_samples(
    arguments: list[SourceArguments],
    maker: SampleMaker,
    data: DataArguments,
    args: Any,
    streams: list[IterableDataset] | None = None,
) -> StreamedSamples:
    """The samples of the streams, which are opened unless they are given, for this rank."""
    return StreamedSamples(
        open_streams(arguments) if streams is None else streams,
        maker,
        [source.weight for source in arguments],
        [source.task_weights or data.task_weights for source in arguments],
        args.seed if args.data_seed is None else args.data_seed,
        args.process_index,
        args.world_size,
        data.shuffle_buffer,
        names=[source.name for source in arguments],
    )


def evaluation_samples(
    sources: list[TrainingSource],
    arguments: list[SourceArguments],
    maker: SampleMaker,
    data: DataArguments,
    args: MMARTrainingArguments,
) -> TrainingSamples:
    """As many samples as there are rows, or as asked for: the same in each evaluation."""
    sizes = [len(source) for source in sources]
    num_samples = sum(sizes) if data.num_eval_samples is None else data.num_eval_samples
    weights = [source.weight for source in arguments]
    task_weights = [source.task_weights or data.task_weights for source in arguments]
    return TrainingSamples(sources, maker, Mixture(sizes, weights, task_weights, args.seed), num_samples)


def check_same_vae(checkpoint: str, model: MMARForConditionalGeneration) -> None:
    r"""
    Cached latents are checked before a checkpoint is loaded, so its VAE and latent scale must be those of the model.

    Args:
        checkpoint (`str`): Folder to resume from.
        model (`MMARForConditionalGeneration`): The model that encodes.

    Raises:
        ValueError: If the checkpoint was trained on latents of another VAE.
    """
    weights = model.vae.state_dict()
    resumed = open_model(checkpoint, "the checkpoint", dtype="float32")
    stored = resumed.vae.state_dict()
    same = stored.keys() == weights.keys() and all(torch.equal(stored[n], weights[n].cpu()) for n in weights)
    if not same or resumed.config.vae_config != model.config.vae_config:
        raise ValueError(
            f"expected the VAE of `model` in the checkpoint {shorten(checkpoint)}, since latents are made with it; "
            "got another one. Set `resume=false`, or train into another `output_dir`."
        )


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the frozen weights of the language model, in place."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.startswith("vae."):
            parameter.data = parameter.data.to(dtype)


def main(arguments: list[str]) -> None:
    r"""
    Trains after a recipe, or goes on from the last complete checkpoint in its `output_dir`.

    Args:
        arguments (`list[str]`): The recipe and `key=value`, as in `parse`.

    Raises:
        ValueError: As `parse` raises; if data, model or checkpoint cannot be had or do not belong together, or another
            process trains into `output_dir`.
    """
    data, args = parse(arguments)
    with claimed(args.output_dir, args.should_save):
        train(data, args)


def train(data: DataArguments, args: MMARTrainingArguments) -> None:
    """Trains, or goes on, and writes the final weights."""
    sources = read_sources(data.data, data.latents, data.streaming)
    eval_sources = [] if data.eval_data is None else read_sources(data.eval_data, option="eval_data")
    if data.total_batch_size is not None:
        args.gradient_accumulation_steps = accumulation_steps(
            data.total_batch_size, args.train_batch_size, args.world_size
        )
    # Before the model is loaded, which takes minutes and memory: what is wrong with the data shows at once.
    opened = [] if data.streaming else [open_training_source(source, None, data.swap_rate) for source in sources]
    streams = open_streams(sources) if data.streaming else None
    held_out = [open_training_source(source) for source in eval_sources]
    # Saved in bfloat16 or not, the weights are trained in float32; `bf16: true` is autocast.
    model = open_model(data.model, dtype="float32", attn_implementation=data.attn_implementation)
    set_seed(args.seed)
    model.config.diffusion_config.diffusion_batch_mul = data.diffusion_batch_mul
    model.freeze(train_backbone=args.train_backbone)
    cast_frozen(model, getattr(torch, data.frozen_dtype))
    processor = open_processor(data.model)
    maker = SampleMaker(processor, model.config.num_latents, data.mask_ratio_min, data.swap_rate)
    for source in opened + held_out:
        if source.cache is not None:
            source.cache.check(model, source.rows)
    if streams is not None:
        train_dataset = streamed_samples(sources, maker, data, args, streams)
    else:
        train_dataset = training_samples(opened, sources, maker, data, args)
    eval_dataset = None
    if held_out:
        eval_maker = SampleMaker(processor, maker.num_latents, data.mask_ratio_min)
        eval_dataset = evaluation_samples(held_out, eval_sources, eval_maker, data, args)
    trainer = MMARTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=MMARDataCollator(processor, model.config.num_latents),
        processing_class=processor,
    )
    last = last_whole_checkpoint(args.output_dir) if data.resume else None
    if last is not None and any(source.cache is not None for source in opened + held_out):
        check_same_vae(last, model)
    if last is not None and 0 < args.max_steps <= num_steps(last):
        # transformers would take one more step.
        last = best_checkpoint(last) if args.load_best_model_at_end else last
        print(f"{args.output_dir} has all of `max_steps`, {args.max_steps}; writing the final weights of {last}.")
        trainer.load_checkpoint(last)
    else:
        trainer.train(resume_from_checkpoint=last)
        trainer.save_state()
    with trainer.ema_weights():
        trainer.save_model(str(Path(args.output_dir) / "final"))
