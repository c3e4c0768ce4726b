"""
Seconds per picture on a GPU, with random weights, by stage: the modules called plainly, and what MMAR does.

    python -m mmar.benchmarks.gpu --out docs/results

For MMAR-0.5B and MMAR-7B in bfloat16: the paper's protocol, 256 rounds of 100 DDPM steps with guidance, and the
presets, for one picture and for a batch. A stage's time is the median wall time of a call, the device waited for; the
protocol's is their sum times its rounds, and it is drawn whole where that is less than `MAX_PICTURE_SECONDS`. The
floor of a stage is the time in which the card could at best read its weights once, in a denoise loop once a step, or
do its multiply-adds. Meant to run unattended in less than ten minutes; not yet run.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import set_seed

from ..command import run_command
from ..conversion.init_from_qwen2 import load_preset
from ..evaluation.provenance import commit, versions
from ..files import check_folder
from ..modeling_mmar.configuration_mmar import MMARConfig
from ..modeling_mmar.generation_mmar import PRESETS
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration


NUM_TEXT, GUIDANCE, BRANCHES, SEED = 32, 3.0, 2, 0
MAX_PICTURE_SECONDS = 40.0
NUM_RUNS, NUM_BEFORE = 5, 2
NUM_COLUMNS = 8
STD, NUM_TEXT_IDS = 0.02, 100
# Of the cards' data sheets, by torch's names: bytes per second of their memory, dense bfloat16 operations per second.
CARDS = {"NVIDIA H100 80GB HBM3": (3.35e12, 989e12), "NVIDIA H200": (4.8e12, 989e12)}


@dataclass
class Stage:
    """Seconds of one call, and its floor: bytes of weights read, and multiply-adds."""

    name: str
    seconds: float
    weight_bytes: float
    multiply_adds: float

    def floor(self, card: tuple[float, float]) -> float:
        bandwidth, operations = card
        return max(self.weight_bytes / bandwidth, 2 * self.multiply_adds / operations)


def random_model(config: MMARConfig, device: torch.device, dtype: torch.dtype) -> MMARForConditionalGeneration:
    """Made on the device, in which nothing is zero."""
    set_seed(SEED)
    with torch.device(device):
        model = MMARForConditionalGeneration._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("image_B", "modulation", "output_projection")):
                nn.init.normal_(parameter, std=STD)
    return model


def seconds(run: Callable[[], object], device: torch.device, num_runs: int = NUM_RUNS) -> float:
    """Median wall time of a call with what it launches, after some calls that are not counted."""
    times = []
    for index in range(NUM_BEFORE + num_runs):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= NUM_BEFORE:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def prompts(model: MMARForConditionalGeneration, batch: int) -> tuple[Tensor, Tensor]:
    """Captions, then null prompts, of one length and without the image token."""
    ids = torch.randint(0, NUM_TEXT_IDS, (BRANCHES * batch, NUM_TEXT), device=model.device)
    ids += ids >= model.config.image_token_id
    return ids, torch.ones_like(ids)


def num_weights(*modules: nn.Module) -> int:
    """Weights of all linears of modules."""
    linears = (part for module in modules for part in module.modules() if isinstance(part, nn.Linear))
    return sum(linear.weight.numel() for linear in linears)


def language_model_stage(model: MMARForConditionalGeneration, batch: int, is_plain: bool) -> Stage:
    """One round's pass over the image tokens of both branches."""
    language_model, num_latents, device = model.model.language_model, model.config.num_latents, model.device
    context = model.text_context(*prompts(model, batch), fast=not is_plain)
    embeds = torch.randn(BRANCHES * batch, num_latents, model.config.text_config.hidden_size, device=device)
    embeds, positions = embeds.to(model.dtype), torch.zeros(BRANCHES * batch, 1, dtype=torch.long, device=device)
    number, size = num_weights(language_model.layers), language_model.embed_tokens.weight.element_size()
    return Stage(
        "language model",
        seconds(lambda: context.condition(embeds, positions), device),
        number * size,
        number * BRANCHES * batch * num_latents,
    )


def encoder_stage(model: MMARForConditionalGeneration, batch: int) -> Stage:
    """EmbeddingViT on half of the tokens, for both branches at once."""
    num_latents, device, encoder = model.config.num_latents, model.device, model.model.latent_encoder
    tokens = torch.randn(batch, num_latents, model.config.latent_channels, device=device)
    hidden = (torch.arange(num_latents, device=device) >= num_latents // 2).expand(batch, -1)
    of_known, of_all = num_weights(encoder.post_projector, encoder.embedding_vit), num_weights(encoder.vis_projector)
    return Stage(
        "EmbeddingViT",
        seconds(lambda: encoder(tokens, hidden, num_latents // 2), device),
        (of_known + of_all) * encoder.mask_token.element_size(),
        batch * num_latents * (of_known / 2 + of_all),
    )


def denoise(model: MMARForConditionalGeneration, batch: int, num_steps: int) -> Callable[[], Tensor]:
    """One round's denoise loop for one token a picture."""
    samplers = model.token_samplers(model.default_scheduler(), {num_steps}, model.device, BRANCHES * batch, fast=True)
    z = torch.randn(BRANCHES * batch, model.config.text_config.hidden_size, device=model.device)
    z, generators = z.to(model.dtype), [torch.Generator().manual_seed(seed) for seed in range(batch)]
    return lambda: samplers[num_steps](z, [GUIDANCE] * num_steps, generators)


def plain_denoise(model: MMARForConditionalGeneration, batch: int, num_steps: int) -> Callable[[], Tensor]:
    """The same with the head and the scheduler called in each step, one branch of guidance after the other."""
    scheduler, channels = model.default_scheduler(), model.config.latent_channels
    scheduler.set_timesteps(num_steps, device=model.device)
    conditional, unconditional = torch.randn(
        2, batch, model.config.text_config.hidden_size, device=model.device, dtype=model.dtype
    )

    def run() -> Tensor:
        tokens = torch.randn(batch, channels, device=model.device)
        for timestep in scheduler.timesteps:
            times = timestep.expand(batch)
            v_uncond = model.diffusion_mlp(tokens, times, unconditional)
            v = v_uncond + GUIDANCE * (model.diffusion_mlp(tokens, times, conditional) - v_uncond)
            tokens = scheduler.step(v, timestep, tokens).prev_sample
        return tokens

    return run


def denoise_stage(model: MMARForConditionalGeneration, batch: int, num_steps: int, is_plain: bool) -> Stage:
    """One round's denoise loop for one token a picture."""
    make = plain_denoise if is_plain else denoise
    head, rows = model.diffusion_mlp, BRANCHES * batch
    # Read once a loop: AdaLN for all steps, and what makes its condition.
    modulations = num_weights(*(block.modulation for block in head.blocks), head.final_modulation)
    of_condition, of_times = num_weights(head.condition_projection), num_weights(head.timestep_embedding)
    per_step = num_weights(head) - modulations - of_condition - of_times
    size = head.input_projection.weight.element_size()
    return Stage(
        f"denoise loop, {num_steps} steps",
        seconds(make(model, batch, num_steps), model.device),
        size * (num_steps * per_step + modulations + of_condition + of_times),
        rows * (num_steps * (per_step + modulations) + of_condition) + num_steps * of_times,
    )


def kernels_and_syncs(run: Callable[[], object], num_steps: int) -> tuple[float, int]:
    """Kernels and copies on the device per diffusion step, launched one by one, and host syncs in the loop."""
    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
    return kernels / num_steps, sum("synchroniz" in str(warning.message) for warning in caught)


def draw(model: MMARForConditionalGeneration, batch: int, **settings) -> Callable[[], Tensor]:
    ids, mask = prompts(model, batch)
    return lambda: model.generate_images(
        ids[:batch],
        attention_mask=mask[:batch],
        negative_input_ids=ids[batch:],
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
        **settings,
    )


def row(*cells: object) -> str:
    """A line of the table, filled up with empty cells."""
    texts = [str(cell) for cell in cells] + [""] * (NUM_COLUMNS - len(cells))
    return f"| {' | '.join(texts)} |"


def stage_row(name: str, batch: int, way: str, stage: Stage, card: tuple[float, float] | None) -> str:
    bandwidth = f"{stage.weight_bytes / stage.seconds / 1e12:.2f} TB/s"
    operations = f"{2 * stage.multiply_adds / stage.seconds / 1e12:.0f} TFLOP/s"
    multiple = "" if card is None else f"{stage.seconds / stage.floor(card):.1f}"
    return row(name, batch, way, stage.name, f"{1e3 * stage.seconds:.2f} ms", bandwidth, operations, multiple)


def measure(
    model: MMARForConditionalGeneration, name: str, batches: list[int], card: tuple[float, float] | None
) -> Iterator[str]:
    """Lines of the report, as they are measured; without a card's figures its floor is left out."""
    num_latents, num_steps = model.config.num_latents, PRESETS["paper"].num_inference_steps
    for batch in batches:
        for way in ("plain", "MMAR"):
            is_plain = way == "plain"
            stages = [
                language_model_stage(model, batch, is_plain),
                encoder_stage(model, batch),
                denoise_stage(model, batch, num_steps, is_plain),
            ]
            yield from (stage_row(name, batch, way, stage, card) for stage in stages)
            estimate = num_latents * sum(stage.seconds for stage in stages)
            floor = None if card is None else num_latents * sum(stage.floor(card) for stage in stages)
            what = f"{num_latents} x {num_steps}, sum of rounds"
            multiple = "" if floor is None else f"{estimate / floor:.1f}"
            yield row(name, batch, way, what, f"{estimate:.2f} s", "", "", multiple)
        for preset, settings in PRESETS.items():
            rounds = model.num_ar_steps(settings, num_latents)
            if preset == "paper" and estimate > MAX_PICTURE_SECONDS:
                continue
            run = draw(model, batch, preset=preset)
            run()
            start = time.perf_counter()
            run()  # ends with a check of the latents, which waits for the device
            whole = time.perf_counter() - start
            yield row(name, batch, "MMAR", f"preset {preset}, {rounds} rounds, with VAE", f"{whole:.2f} s")
    if model.device.type == "cuda":
        kernels, syncs = kernels_and_syncs(denoise(model, 1, num_steps), num_steps)
        yield row(name, 1, "MMAR", "kernels of a diffusion step", f"{kernels:.1f}")
        yield row(name, 1, "MMAR", "host syncs of a denoise loop", syncs)
        yield row(name, "", "", "peak memory", f"{torch.cuda.max_memory_allocated(model.device) / 2**30:.1f} GiB")


HEAD = (
    "| model | batch | way | what | time | weights read | done | times the floor |\n"
    "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |"
)


def report(lines: list[str], device_name: str, dtype: torch.dtype, card: tuple[float, float] | None) -> str:
    """The results as a page of docs/results."""
    body = "\n".join(lines)
    figures = "no figures of this card are at hand, so that the floor is left out"
    if card is not None:
        figures = f"floors from {card[0] / 1e12:.2f} TB/s and {card[1] / 1e12:.0f} TFLOP/s"
    return f"""# Generation on a GPU

{date.today().isoformat()}, commit {commit()}, {device_name}, {dtype}, {figures}; {versions()}. Written by
`python -m mmar.benchmarks.gpu`, random weights. "Plain" is the model's own modules without merged weights, and the
head and the scheduler called in each step, one branch of guidance after the other.

{HEAD}
{body}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["mmar-0.5b", "mmar-7b"], help="configs, by name or folder")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="pictures at once")
    parser.add_argument("--device", default="cuda", help="a CPU only serves to try the command on small configs")
    parser.add_argument("--out", type=Path, help="folder to write the page to, as <date>_gpu.md")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("expected a GPU; torch sees none. Run this where there is one.")
    try:
        device = torch.empty(0, device=arguments.device).device
    # AssertionError: torch was built without it.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that torch has here; got {arguments.device!r} ({error}).") from error
    if min(arguments.batches) < 1:
        parser.error(f"--batches must be at least 1; got {min(arguments.batches)}")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    card = CARDS.get(device_name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # What cannot be read or written ends the command before it has measured for minutes.
    configs = {name: load_preset(name) for name in arguments.presets}
    if arguments.out is not None:
        check_folder(arguments.out)
    lines = []
    print(HEAD)
    with torch.no_grad():
        for name, config in configs.items():
            model = random_model(config, device, dtype)
            for line in measure(model, Path(name).name, arguments.batches, card):
                lines.append(line)
                print(line, flush=True)
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
    if arguments.out is not None:
        page = report(lines, device_name, dtype, card)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{date.today().isoformat()}_gpu.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
