"""
What prediction type and precision do to tokens, on a distribution that one can check (suppl. Sec. 6.8, Fig. 11).

    python -m mmar.ablations.chessboard --out docs/results

Points of a chessboard, whose class is the quadrant, are learned by MMAR's Diffusion MLP with its losses and sampled
with its sampler. A sample is an error where it lies farther than `MARGIN` from every field of its class. The paper
gives rates for 1 M samples: below 1e-6 for v in bfloat16, 0.2 % for epsilon in bfloat16, 0.04 % for epsilon in
float32; board, network, margin and numbers of steps are ours, since it gives none. They matter: in few steps the first
one leaps from where epsilon's errors are divided by 5e-5, and a network must be trained for long to stand that.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..command import run_command
from ..evaluation.provenance import commit, processor, versions
from ..modeling_mmar.configuration_mmar import MMARDiffusionConfig
from ..modeling_mmar.diffusion_mmar import (
    TIMESTEP_INITIAL_STD,
    MMARDiffusionLinear,
    MMARDiffusionMLP,
    cosine_alphas_cumprod,
    diffusion_loss,
)
from ..modeling_mmar.fast_generation_mmar import LinearSteps
from ..modeling_mmar.saving_mmar import apply_umask
from .study import check_plots


# Fields along each side of the board, of side 1 / 2: unit variance is about what latents have. Classes are quadrants.
NUM_FIELDS, FIELD = 8, 0.5
NUM_CLASSES = 4
# Half a field: blurred edges are no errors, stray points are.
MARGIN = FIELD / 2
CONDITION_SIZE, WIDTH, NUM_BLOCKS, NUM_TIMESTEPS = 16, 128, 3, 1000
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 2048, 1.0e-3, 0.999
# Points whose activations stay in a core's cache.
SAMPLE_BATCH = 1000
# Points in the plot, beside all errors.
NUM_SHOWN = 1000
SYSTEMS = (("v_prediction", "bfloat16"), ("epsilon", "bfloat16"), ("epsilon", "float32"), ("v_prediction", "float32"))
# Fig. 11 and its text.
PAPER = {
    ("v_prediction", "bfloat16"): "< 0.0001 %",
    ("epsilon", "bfloat16"): "0.2 %",
    ("epsilon", "float32"): "0.04 %",
}


@dataclass
class Outcome:
    """A system, its last loss, how many of its samples are errors, and the CPU seconds of sampling them."""

    prediction_type: str
    dtype: str
    seed: int
    loss: float
    num_samples: int
    num_errors: int
    largest: float
    seconds: float


def fields_of(label: int) -> Tensor:
    """Middles `(F, 2)` of the black fields of a quadrant: 0 left below, 1 right below, 2 left above, 3 right above."""
    half = NUM_FIELDS // 2
    columns = torch.arange(half) + half * (label % 2)
    rows = torch.arange(half) + half * (label // 2)
    places = torch.cartesian_prod(columns, rows)
    black = places[(places.sum(-1) % 2) == 0]
    return (black - (NUM_FIELDS - 1) / 2) * FIELD


def sample_board(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Points `(M, 2)`, even on the black fields of their quadrants."""
    middles = torch.stack([fields_of(label) for label in range(NUM_CLASSES)])  # (classes, F, 2)
    field = torch.randint(0, middles.shape[1], labels.shape, generator=generator)
    inside = torch.rand(len(labels), 2, generator=generator) - 0.5
    return middles[labels, field] + FIELD * inside


def distances(points: Tensor, labels: Tensor) -> Tensor:
    """How far each point lies from the nearest black field of its quadrant, in the larger coordinate; 0 inside."""
    result = torch.empty(len(points))
    for label in range(NUM_CLASSES):
        own = labels == label
        away = (points[own, None] - fields_of(label)).abs().amax(-1) - FIELD / 2  # (m, F)
        result[own] = away.amin(-1).clamp(min=0)
    # NaN is an error as well.
    return result.nan_to_num(float("inf"))


def start_as_mmar(head: MMARDiffusionMLP) -> MMARDiffusionMLP:
    """Draws a head's weights as `MMARForConditionalGeneration` does, outside of it."""
    for module in head.modules():
        if isinstance(module, MMARDiffusionLinear):
            if module.initialization == "zero":
                nn.init.zeros_(module.weight)
            elif module.initialization == "normal":
                nn.init.normal_(module.weight, std=TIMESTEP_INITIAL_STD)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return head


def make_network(prediction_type: str, seed: int) -> nn.ModuleDict:
    """A head and the embedding of its classes."""
    torch.manual_seed(seed)
    config = MMARDiffusionConfig(hidden_size=WIDTH, num_hidden_layers=NUM_BLOCKS, prediction_type=prediction_type)
    head = start_as_mmar(MMARDiffusionMLP(config, latent_channels=2, condition_size=CONDITION_SIZE))
    return nn.ModuleDict({"head": head, "classes": nn.Embedding(NUM_CLASSES, CONDITION_SIZE)})


def train(network: nn.ModuleDict, prediction_type: str, dtype: torch.dtype, num_steps: int, seed: int) -> float:
    """Trains in place, with float32 weights and the network in `dtype`; returns the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(seed)
    alphas_cumprod = cosine_alphas_cumprod(NUM_TIMESTEPS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    last = []
    for step in range(num_steps):
        labels = torch.randint(0, NUM_CLASSES, (BATCH_SIZE,), generator=generator)
        points = sample_board(labels, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            z = network["classes"](labels)
            loss = diffusion_loss(network["head"], points, z, alphas_cumprod, prediction_type, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
        if step >= 0.9 * num_steps:
            last.append(loss.item())
    network.load_state_dict(averaged.module.state_dict())
    return sum(last) / len(last)


@torch.no_grad()
def sample(
    network: nn.ModuleDict, scheduler: DDPMScheduler, num_inference_steps: int, num_samples: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Batches of points `(M, 2)` and their labels, of each class as many up to one, by a network in its dtype and a
    sampler in float32 (Sec. 3.3.4).
    """
    scheduler.set_timesteps(num_inference_steps)
    steps, head = LinearSteps.of(scheduler, num_inference_steps), network["head"]
    generator, z = torch.Generator().manual_seed(seed), network["classes"].weight
    for start in range(0, num_samples, SAMPLE_BATCH):
        number = min(SAMPLE_BATCH, num_samples - start)
        # (m, classes, 2): the conditions are worked out once per class, not once per point.
        points = torch.randn(math.ceil(number / NUM_CLASSES), NUM_CLASSES, 2, generator=generator)
        for index, timestep in enumerate(scheduler.timesteps):
            prediction = head(points, timestep[None], z)
            points = steps.keep[index] * points + steps.take[index] * prediction
            if steps.noise_std[index]:
                points += steps.noise_std[index] * torch.randn(points.shape, generator=generator)
        yield points.flatten(0, 1)[:number], torch.arange(NUM_CLASSES).repeat(len(points))[:number]


def kept_network(
    work: Path, prediction_type: str, dtype_name: str, seed: int, num_steps: int
) -> tuple[nn.ModuleDict, float]:
    """A trained network and its last loss, read from a folder if it was trained there, else kept there."""
    network = make_network(prediction_type, seed)
    file = work / f"network_{prediction_type}_{dtype_name}_{seed}_{num_steps}.safetensors"
    if not file.is_file():
        loss = train(network, prediction_type, getattr(torch, dtype_name), num_steps, seed)
        keep(file, network.state_dict(), {"loss": repr(loss)})
    with safe_open(file, "pt") as opened:
        network.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})
        return network, float(opened.metadata()["loss"])


def keep(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file that is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(file)
    apply_umask(file.parent)


def run(
    work: Path,
    prediction_type: str,
    dtype_name: str,
    seed: int,
    num_steps: int,
    num_samples: int,
    num_inference_steps: int,
) -> tuple[Outcome, Tensor, Tensor]:
    """Samples a system; its outcome, its first points with those that are errors, and which these are."""
    network, loss = kept_network(work, prediction_type, dtype_name, seed, num_steps)
    start, dtype = time.process_time(), getattr(torch, dtype_name)
    scheduler = DDPMScheduler(
        NUM_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        timestep_spacing="linspace",
        clip_sample=False,
    )
    shown, wrong, num_seen, num_errors, largest = [], [], 0, 0, 0.0
    for points, labels in sample(network.to(dtype), scheduler, num_inference_steps, num_samples, seed):
        is_error = distances(points, labels) > MARGIN
        num_errors += int(is_error.sum())
        largest = max(largest, float(points.abs().max()))
        kept = is_error.clone()
        kept[: max(0, NUM_SHOWN - num_seen)] = True
        num_seen += len(points)
        shown.append(points[kept])
        wrong.append(is_error[kept])
    seconds = time.process_time() - start
    outcome = Outcome(prediction_type, dtype_name, seed, loss, num_samples, num_errors, largest, seconds)
    return outcome, torch.cat(shown), torch.cat(wrong)


def kept_run(work: Path, *arguments: Any) -> tuple[Outcome, Tensor, Tensor]:
    """`run`, read from a folder if it was done there with these arguments, else kept there."""
    file = work / f"{'_'.join(map(str, arguments))}.safetensors"
    if not file.is_file():
        outcome, points, wrong = run(work, *arguments)
        keep(file, {"points": points, "wrong": wrong}, {"outcome": json.dumps(asdict(outcome))})
    with safe_open(file, "pt") as opened:
        outcome = Outcome(**json.loads(opened.metadata()["outcome"]))
        return outcome, opened.get_tensor("points"), opened.get_tensor("wrong")


def plot(clouds: dict[tuple[int, str, str], tuple[Tensor, Tensor]], file: Path) -> None:
    """Samples of each system on a scale of its own, errors in red; a row for each number of steps."""
    from matplotlib.figure import Figure

    columns = len(SYSTEMS)
    figure = Figure(figsize=(4 * columns, 4 * len(clouds) / columns), layout="constrained")
    panels = figure.subplots(len(clouds) // columns, columns, squeeze=False).flat
    for axes, ((steps, prediction_type, dtype), (points, wrong)) in zip(panels, clouds.items(), strict=True):
        axes.scatter(*points[~wrong].T.tolist(), s=1, color="tab:blue")
        axes.scatter(*points[wrong].T.tolist(), s=4, color="tab:red")
        axes.set_title(f"{prediction_type}, {dtype}, {steps} steps: {int(wrong.sum())} errors", fontsize="medium")
        axes.set_aspect("equal")
    figure.savefig(file)


def report(outcomes: dict[tuple[int, str, str], list[Outcome]], command: str, picture: str) -> str:
    """The results as a page of docs/results."""
    rows = []
    for (steps, prediction_type, dtype), own in outcomes.items():
        rates = [item.num_errors / item.num_samples for item in own]
        errors, samples = sum(item.num_errors for item in own), sum(item.num_samples for item in own)
        rows.append(
            f"| {steps} | {prediction_type} | {dtype} | {100 * errors / samples:.4f} % ({errors} of {samples:,}) | "
            f"{100 * min(rates):.4f} to {100 * max(rates):.4f} % | {max(item.largest for item in own):.2f} | "
            f"{PAPER.get((prediction_type, dtype), 'not given')} |"
        )
    table = "\n".join(rows)
    return f"""# Chessboard: prediction type and precision (suppl. Sec. 6.8)

{date.today().isoformat()}, commit {commit()}, {processor()}; {versions()}. Written by

    {command}

A Diffusion MLP of {NUM_BLOCKS} x {WIDTH} learns {NUM_FIELDS} x {NUM_FIELDS} fields of side {FIELD} with the quadrant
as its class. A sample is an error where it is more than {MARGIN} from every
field of its class. Training in bfloat16 is autocast; in sampling the network is in the dtype, the sampler in float32.

| steps of DDPM | prediction | network | samples that are errors | of single seeds | largest coordinate | paper |
| ---: | --- | --- | ---: | ---: | ---: | ---: |
{table}

![]({picture})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder to write the page and the plot to")
    parser.add_argument("--work", type=Path, help="folder that keeps networks and outcomes, to go on after a stop")
    parser.add_argument("--num_steps", type=int, default=20_000, help="of training, each of 2,048 points")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[100, 1000], help="of DDPM")
    parser.add_argument(
        "--num_samples",
        type=int,
        nargs="+",
        default=[1_000_000, 100_000],
        help="per system and seed, for each of them",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()
    if min(args.num_steps, *args.num_samples, args.seeds) < 1 or min(args.num_inference_steps) < 2:
        given = f"{args.num_steps}, {args.num_samples}, {args.seeds} and {args.num_inference_steps}"
        parser.error(
            f"--num_steps, --num_samples and --seeds must be at least 1, and --num_inference_steps 2; got {given}"
        )
    if len(args.num_samples) != len(args.num_inference_steps):
        parser.error(
            "--num_samples must be as many numbers as --num_inference_steps; got "
            f"{len(args.num_samples)} and {len(args.num_inference_steps)}"
        )
    check_plots(args.out)
    outcomes: dict[tuple[int, str, str], list[Outcome]] = {}
    clouds: dict[tuple[int, str, str], tuple[Tensor, Tensor]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) if args.work is None else args.work
        for steps, num_samples in zip(args.num_inference_steps, args.num_samples, strict=True):
            for prediction_type, dtype in SYSTEMS:
                for seed in range(args.seeds):
                    outcome, points, wrong = kept_run(
                        work, prediction_type, dtype, seed, args.num_steps, num_samples, steps
                    )
                    key = (steps, prediction_type, dtype)
                    outcomes.setdefault(key, []).append(outcome)
                    clouds.setdefault(key, (points, wrong))
                    print(json.dumps({"num_inference_steps": steps, **asdict(outcome)}), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{date.today().isoformat()}_chessboard"
    plot(clouds, args.out / f"{name}.png")
    command = f"python -m mmar.ablations.chessboard --out {args.out}"
    for option in ("num_steps", "num_inference_steps", "num_samples"):
        given = getattr(args, option)
        command += f" --{option} {' '.join(map(str, given if isinstance(given, list) else [given]))}"
    page = report(outcomes, f"{command} --seeds {args.seeds}", f"{name}.png")
    (args.out / f"{name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
