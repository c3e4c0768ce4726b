"""
A training planned on paper, from a config and a recipe alone: operations per sample, memory per GPU, samples per
second, days.

    python -m mmar.evaluation.training_plan --config configs/mmar-7b --recipe training/recipes/mmar_7b_stage1.yaml

`key=value` after it changes the recipe, such as `activation_checkpointing=false`.

Nothing is measured: the GPUs are assumed to reach a share of their peak, `--utilization`, in all that they compute,
recomputed layers included, and to wait for nothing. Memory is counted as in memory.py.
"""

import argparse
import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..command import run_command
from ..conversion.init_from_qwen2 import DTYPES, load_preset
from ..modeling_mmar.configuration_mmar import MMARConfig
from ..modeling_mmar.masking_mmar import MASK_RATIO_MEAN, MASK_RATIO_STD
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..modeling_mmar.plora_mmar import PLoRALinear
from ..training.recipe import DataArguments, accumulation_steps, parse
from ..training.trainer import MMARTrainingArguments
from .memory import meta_model, training_memory


# Samples of an epoch: Capfusion-120M; 20 M of it, ImageNet-1K-1.2M, CC12M and LAION-aesthetics-12M; and
# LLaVA-v1.5-mix-665K (Sec. 4.1). The third stage's data are ours: those of the second.
PAPER_SAMPLES = {"stage1": 120_000_000, "stage2": 45_200_000, "stage3": 45_200_000, "sft": 665_000}
# H100 SXM: dense bfloat16 operations per second (NVIDIA's data sheet: 1,979e12 with sparsity).
PEAK = 989e12
# TF32, in which PyTorch convolves float32, has half of bfloat16's peak (the same data sheet).
TF32_SLOWDOWN = 2
# Bytes per second and direction of a GPU: NVLink (900 GB/s both ways together), and 400 Gb/s to other nodes.
NVLINK, NETWORK = 450e9, 50e9
GPUS_PER_NODE = 8
# Where weights are: whole, as `MMARTrainingArguments.shard` has it, or as accelerate shards them with that file.
LAYOUTS = ("none", "trained", "all", "fsdp2.yaml")
# Rows of the table of memory: name, layout, and GPUs that share it.
MEMORY_ROWS = (
    ("one GPU", "none", 1),
    ("DDP", "none", GPUS_PER_NODE),
    *((f"shard={layout} on {gpus}", layout, gpus) for gpus in (8, 64) for layout in ("trained", "all")),
    ("fsdp2.yaml or multi_node.yaml", "fsdp2.yaml", GPUS_PER_NODE),
)
# Times that a matrix product is run: forward, and backward for its input; once more for a weight that is trained.
FROZEN, TRAINED = 2, 3
# A multiplication and an addition.
OPERATIONS = 2
# Layers of FSDP that are gathered at a time: the one that runs and the one that is fetched meanwhile.
GATHERED_LAYERS = 2
SECONDS_PER_DAY = 86_400
# A plan reads no data and writes nothing.
NO_PATHS = ["model=MODEL", "data=DATA", "output_dir=OUTPUT"]


def mean_mask_ratio(minimum: float) -> float:
    """Mean of `sample_mask_ratios`, a normal distribution of which the part in [`minimum`, its mean] is left."""
    lowest = (minimum - MASK_RATIO_MEAN) / MASK_RATIO_STD
    density = (1 - math.exp(-(lowest**2) / 2)) / math.sqrt(2 * math.pi)
    return MASK_RATIO_MEAN - MASK_RATIO_STD * density / (0.5 * math.erf(-lowest / math.sqrt(2)))


def num_weights(module: nn.Module) -> int:
    """Weights of a module's linears: so many multiplications take a token through it."""
    return sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))


def sample_operations(
    config: MMARConfig,
    data_args: DataArguments,
    activation_checkpointing: bool,
    text_length: int,
    train_backbone: bool = False,
) -> dict[str, float]:
    r"""
    Operations of a training step per sample, on average over the tasks.

    A frozen weight costs 4 operations per token and a trained one 6; a layer that is run again in the backward pass
    costs 2 more. All pictures take all their tokens through EmbeddingViT, since a picture that is read widens the
    batch to that. Text before the pictures, whose backward pass is left out, is counted like the rest.

    Args:
        config (`MMARConfig`): The model.
        data_args (`DataArguments`): Its `task_weights`, `mask_ratio_min` and `diffusion_batch_mul` are read.
        activation_checkpointing (`bool`): Whether layers run again in the backward pass.
        text_length (`int`): Tokens of text per sample; all of them have labels in image to text.
        train_backbone (`bool`, *optional*, defaults to `False`): Whether Qwen2's own weights are trained too.

    Returns:
        `dict[str, float]`: By part, without the VAE's.
    """
    model, text, vit = meta_model(config, torch.bfloat16), config.text_config, config.vit_config
    drawn, read = _shares(data_args.task_weights)
    num_latents, length = config.num_latents, config.num_latents + text_length
    layers = [module for module in model.model.language_model.layers.modules() if isinstance(module, PLoRALinear)]
    backbone = length * sum(layer.weight.numel() for layer in layers)
    plora = num_latents * sum(layer.image_A.numel() + layer.image_B.numel() for layer in layers)
    # Queries with keys, and weights with values.
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = text.num_hidden_layers * 2 * length**2 * text.num_attention_heads * head_dim
    vit_attention = vit.num_hidden_layers * 2 * num_latents**2 * vit.hidden_size
    encoder = model.model.latent_encoder
    num_noisy = drawn * num_latents * mean_mask_ratio(data_args.mask_ratio_min) * data_args.diffusion_batch_mul
    again = backbone + plora + attention + num_latents * num_weights(encoder.embedding_vit) + vit_attention
    qwen2 = TRAINED if train_backbone else FROZEN
    multiplications = {
        "Qwen2": qwen2 * backbone,
        "PLoRA": TRAINED * plora,
        # Neither factor of its products is a weight, and both have gradients.
        "attention": TRAINED * (attention + vit_attention),
        "EmbeddingViT and projectors": TRAINED * num_latents * num_weights(encoder),
        "Diffusion MLP": TRAINED * num_noisy * num_weights(model.diffusion_mlp),
        "lm_head": qwen2 * read * text_length * model.lm_head.weight.numel(),
        "layers run again": again if activation_checkpointing else 0,
    }
    return {part: float(OPERATIONS * number) for part, number in multiplications.items()}


def vae_operations(config: MMARConfig) -> float:
    """Operations of encoding a picture; the VAE has no backward pass."""
    vae = meta_model(config, torch.bfloat16).vae
    pixels = torch.zeros(1, 3, config.image_size, config.image_size, dtype=vae.dtype, device=vae.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(pixels)
    return float(counter.get_total_flops())


def samples_per_second(operations: float, vae_operations: float, utilization: float) -> float:
    """Of one GPU; all operations but the VAE's are bfloat16's."""
    return utilization * PEAK / (operations + TF32_SLOWDOWN * vae_operations)


@dataclass(frozen=True)
class WeightBytes:
    r"""
    Bytes of a model's weights, trained ones in float32, by what FSDP2 does with them.

    Args:
        trained, frozen (`int`): Of all but the VAE.
        tables (`int`): Of the frozen ones, those of token embeddings and `lm_head`, which are in no layer.
        vae (`int`): Of the VAE, whole on each GPU.
        trained_layer, frozen_layer (`int`): Of the largest layer that FSDP2 gathers as one.
        trained_root (`int`): Of the trained ones, those in no layer; they stay gathered.
    """

    trained: int
    frozen: int
    tables: int
    vae: int
    trained_layer: int
    frozen_layer: int
    trained_root: int

    @classmethod
    def of(cls, model: MMARForConditionalGeneration) -> "WeightBytes":
        """Those of a model on the meta device, frozen as it will be trained."""

        def split(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
            trained, frozen = 0, 0
            for parameter in parameters:
                if parameter.requires_grad:
                    trained += parameter.numel() * torch.float32.itemsize
                else:
                    frozen += parameter.numel() * parameter.element_size()
            return trained, frozen

        vae = split(model.vae.parameters())[1]
        trained, frozen = split(model.parameters())
        # Of the class: an instance also has those of its VAE.
        layers = [split(m.parameters()) for m in model.modules() if type(m).__name__ in type(model)._no_split_modules]
        # A set, since tied weights are one.
        tables = split({*model.get_input_embeddings().parameters(), *model.lm_head.parameters()})[1]
        return cls(
            trained, frozen - vae, tables, vae, *max(layers, key=sum), trained - sum(layer[0] for layer in layers)
        )

    def kept(self, layout: str, num_shards: int) -> float:
        """Bytes that a GPU always has."""
        sharded = self.sharded(layout)
        return self.vae + self.trained + self.frozen - sharded + sharded / num_shards

    def sharded(self, layout: str) -> int:
        """Bytes that are dealt out."""
        frozen = {"none": 0, "trained": 0, "all": self.frozen, "fsdp2.yaml": self.frozen - self.tables}[layout]
        return 0 if layout == "none" else self.trained + frozen

    def gathered_at_once(self, layout: str) -> int:
        """
        Bytes that a GPU has for a while: two layers, the one that runs and the next, and what is in no layer; trained
        weights in bfloat16.
        """
        if layout == "none":
            return 0
        frozen = 0 if layout == "trained" else GATHERED_LAYERS * self.frozen_layer
        frozen += self.tables if layout == "all" else 0
        return GATHERED_LAYERS * self.trained_layer // 2 + self.trained_root // 2 + frozen

    def gathered(self, layout: str) -> int:
        """Bytes that are gathered to run all layers once."""
        return 0 if layout == "none" else self.sharded(layout) - self.trained // 2


def weight_bytes(config: MMARConfig, frozen_dtype: torch.dtype, train_backbone: bool = False) -> WeightBytes:
    """Those of a model of a config."""
    model = meta_model(config, frozen_dtype)
    model.freeze(train_backbone)
    return WeightBytes.of(model)


def gpu_memory(
    memory: dict[str, int],
    weights: WeightBytes,
    layout: str = "none",
    num_gpus: int = 1,
    accumulates: bool = True,
    has_ema: bool = True,
) -> dict[str, float]:
    r"""
    Bytes of a training step on one of several GPUs.

    Args:
        memory (`dict[str, int]`): Of one that has everything, as `training_memory` counts it.
        weights (`WeightBytes`): Of the model.
        layout (`str`, *optional*, defaults to `"none"`): One of `LAYOUTS`.
        num_gpus (`int`, *optional*, defaults to 1): GPUs that share a layout; without shards, those of DDP.
        accumulates (`bool`, *optional*, defaults to `True`): Whether an optimizer step has several micro-batches:
            FSDP2 keeps gradients whole until the last one is done.
        has_ema (`bool`, *optional*, defaults to `True`): Whether there is a moving average.

    Returns:
        `dict[str, float]`: By part; without what CUDA and its allocator need.
    """
    shards = 1 if layout == "none" else num_gpus
    copies = weights.gathered_at_once(layout)
    if layout == "none":
        copies += memory["autocast"]
        copies += memory["gradients"] if num_gpus > 1 else 0  # the buckets in which DDP sends them
    return {
        "weights": weights.kept(layout, shards),
        "gradients": memory["gradients"] / (1 if accumulates else shards),
        "optimizer": memory["optimizer"] / shards,
        "EMA": memory["EMA"] / shards if has_ema else 0,
        "copies": copies,
        "activations": memory["activations"],
    }


def sending_seconds(weights: WeightBytes, layout: str, num_gpus: int, num_micro_batches: int) -> float:
    r"""
    Seconds that a GPU sends and receives in an optimizer step, at full speed and with nothing else to do.

    Weights are gathered twice per micro-batch, forward and backward; gradients are reduced once. `"fsdp2.yaml"` shards
    within each node, and nodes reduce their shards of the gradients among each other.

    Args:
        weights (`WeightBytes`): Of the model.
        layout (`str`): One of `LAYOUTS`; `"none"` is DDP.
        num_gpus (`int`): All GPUs.
        num_micro_batches (`int`): Per optimizer step.

    Returns:
        `float`: Seconds.
    """
    bandwidth, others = NVLINK if num_gpus <= GPUS_PER_NODE else NETWORK, 1 - 1 / num_gpus
    gathers = 2 * num_micro_batches
    if layout == "none":
        # A ring reduces, and then sends around what it has reduced.
        return 2 * weights.trained * others / bandwidth
    if layout != "fsdp2.yaml":
        return (gathers * weights.gathered(layout) + weights.trained) * others / bandwidth
    in_node = min(num_gpus, GPUS_PER_NODE)
    within = (gathers * weights.gathered(layout) + weights.trained) * (1 - 1 / in_node) / NVLINK
    return within + 2 * weights.trained / in_node * (1 - in_node / num_gpus) / NETWORK


def batch_plan(total_batch_size: int, per_device_train_batch_size: int, num_gpus: int) -> tuple[int, int, int]:
    r"""
    Args:
        total_batch_size (`int`): Samples per optimizer step, as the recipe has them.
        per_device_train_batch_size (`int`): Most samples of a micro-batch on a GPU.
        num_gpus (`int`): GPUs.

    Returns:
        `tuple[int, int, int]`: Total, micro-batch and accumulation steps that come nearest: another total only where
        the GPUs cannot share the recipe's.
    """
    per_gpu = max(1, round(total_batch_size / num_gpus))
    per_device = max(size for size in range(1, per_device_train_batch_size + 1) if per_gpu % size == 0)
    return per_gpu * num_gpus, per_device, accumulation_steps(per_gpu * num_gpus, per_device, num_gpus)


def plan(
    config: MMARConfig,
    data_args: DataArguments,
    args: MMARTrainingArguments,
    num_samples: int,
    num_gpus: Sequence[int],
    utilization: float,
    text_length: int,
    cached_latents: bool = False,
) -> str:
    r"""
    The plan as Markdown.

    Args:
        config (`MMARConfig`): The model.
        data_args, args: The recipe.
        num_samples (`int`): Rows of the data; an epoch has so many samples.
        num_gpus (`Sequence[int]`): Numbers of GPUs to plan for.
        utilization (`float`): Share of the peak that the GPUs reach.
        text_length (`int`): Tokens of text per sample.
        cached_latents (`bool`, *optional*, defaults to `False`): Whether the VAE has nothing to do.

    Returns:
        `str`: Tables of operations, memory, and time.
    """
    config = copy.deepcopy(config)
    config.diffusion_config.diffusion_batch_mul = data_args.diffusion_batch_mul
    checkpointing = args.activation_checkpointing
    operations = sample_operations(config, data_args, checkpointing, text_length, args.train_backbone)
    encoding = 0.0 if cached_latents else vae_operations(config)
    speed = samples_per_second(sum(operations.values()), encoding, utilization)
    total = data_args.total_batch_size or args.per_device_train_batch_size * args.gradient_accumulation_steps
    all_samples = args.num_train_epochs * num_samples if args.max_steps <= 0 else args.max_steps * total

    together = sum(operations.values()) + encoding
    rows = [[part, f"{number / 1e12:.2f}"] for part, number in {**operations, "VAE": encoding}.items()]
    tables = [
        _table(
            ["operations per sample", "1e12"],
            [*rows, ["together", f"{together / 1e12:.2f}"], ["samples per second and GPU", f"{speed:.1f}"]],
        )
    ]

    dtype, micro_batch = DTYPES[data_args.frozen_dtype], args.per_device_train_batch_size
    weights = weight_bytes(config, dtype, args.train_backbone)
    rows = []
    for again in (True, False):
        memory = training_memory(config, micro_batch, text_length, dtype, again, args.train_backbone)
        for name, layout, gpus in MEMORY_ROWS:
            accumulates = batch_plan(total, micro_batch, gpus)[2] > 1
            parts = gpu_memory(memory, weights, layout, gpus, accumulates, args.ema_decay > 0)
            numbers = [f"{value / 1e9:.1f}" for value in (*parts.values(), sum(parts.values()))]
            rows.append([f"{name}, {'with' if again else 'without'} checkpointing", *numbers])
    tables.append(_table(["GB per GPU", *parts, "together"], rows))

    rows = []
    for gpus in num_gpus:
        batch, per_device, steps = batch_plan(total, micro_batch, gpus)
        note = "" if batch == total else f" ({total} is no multiple of {gpus})"
        computing = batch / (gpus * speed)
        sending = {
            layout: sending_seconds(weights, layout, gpus, steps) for layout in ("none", "trained", "fsdp2.yaml")
        }
        step_seconds = [computing, *(max(computing, sending[layout]) for layout in ("trained", "fsdp2.yaml"))]
        rows.append(
            [
                f"{gpus}",
                f"{batch} = {gpus} x {per_device} x {steps}{note}",
                f"{all_samples / batch:,.0f}",
                f"{gpus * speed:,.0f}",
                *(f"{seconds:.2f}" for seconds in (computing, *sending.values())),
                *(f"{seconds * all_samples / batch / SECONDS_PER_DAY:.1f}" for seconds in step_seconds),
            ]
        )
    heads = ["GPUs", "batch = GPUs x micro-batch x accumulated", "steps", "samples/s", "s computing"]
    heads += [f"s sending, {name}" for name in ("DDP", "shard=trained", "multi_node.yaml")]
    heads += ["days computing", "days, shard=trained", "days, multi_node.yaml"]
    tables.append(_table(heads, rows))
    tables.append(
        f"{all_samples:,.0f} samples. Seconds are those of an optimizer step, which takes at least the longer of "
        "computing and sending."
    )
    return "\n\n".join(tables)


def _shares(task_weights: Sequence[float]) -> tuple[float, float]:
    """Shares of the samples that draw a picture and that read one."""
    t2i, i2t, uncond = task_weights
    total = t2i + i2t + uncond
    return (t2i + uncond) / total, i2t / total


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paper_samples(recipe: str | Path) -> int | None:
    """Samples of an epoch of one of the paper's recipes, by its name; None for others."""
    paper = re.fullmatch(r"mmar_(?:0_5b|7b)_(\w+)", Path(recipe).stem)
    return PAPER_SAMPLES.get(paper[1]) if paper else None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="mmar-0.5b, mmar-7b, or a folder with a config.json")
    parser.add_argument("--recipe", required=True, help="YAML file")
    parser.add_argument("override", nargs="*", metavar="key=value", help="in place of the recipe's own values")
    parser.add_argument("--num_samples", type=int, help="rows of the data; the paper's by the recipe's name")
    parser.add_argument("--gpus", type=_numbers, default=[8, 64, 512], help="numbers of GPUs, 8,64,512 by default")
    parser.add_argument("--utilization", type=float, default=0.40, help="share of the peak that the GPUs reach")
    parser.add_argument("--text_length", type=int, default=64, help="tokens of text beside the picture's")
    parser.add_argument("--cached_latents", action="store_true", help="the VAE has nothing to do")
    options = parser.parse_intermixed_args()
    num_samples = paper_samples(options.recipe) if options.num_samples is None else options.num_samples
    if num_samples is None:
        parser.error(f"--num_samples is needed for a recipe that is not the paper's; got {options.recipe}")
    if min(num_samples, options.text_length, *options.gpus) < 1 or not 0 < options.utilization <= 1:
        parser.error("--num_samples, --text_length and --gpus must be at least 1, --utilization in (0, 1]")
    data_args, args = parse([options.recipe, *NO_PATHS, *options.override])
    print(
        plan(
            load_preset(options.config),
            data_args,
            args,
            num_samples,
            options.gpus,
            options.utilization,
            options.text_length,
            options.cached_latents,
        )
    )


if __name__ == "__main__":
    run_command(main)
