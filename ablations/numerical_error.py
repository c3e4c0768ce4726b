"""
bfloat16's error in a DDIM step, measured and as the paper predicts it, and what it does to trained networks (Fig. 3 A;
Eq. 18, 23, 27).

    python -m mmar.ablations.numerical_error --model checkpoints/mmar-tiny \
        --data checkpoints/emoji-lite/train.parquet --out docs/results

First, without a network: exact v and epsilon of unit-variance tokens, rounded to bfloat16, pass a DDIM step; the error
per unit of step is compared with delta^2 for v and delta^2 / alpha-bar for epsilon, with the paper's delta = 1 / 128.
That is an upper bound: rounding to nearest errs by 1 / 256 at most. Second, two Diffusion MLPs learn v and epsilon of
the VAE's tokens of real pictures, with their place as condition; their squared errors of v are compared by timestep.
"""

import argparse
import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from ..command import run_command
from ..conversion.models import open_pipeline
from ..evaluation.provenance import commit, processor, versions
from ..modeling_mmar.configuration_mmar import MMARDiffusionConfig
from ..modeling_mmar.diffusion_mmar import MMARDiffusionMLP, cosine_alphas_cumprod, diffusion_loss
from ..modeling_mmar.parameterization_mmar import add_noise, v_from_epsilon, v_target
from ..training.emoji_rows import read_rows
from .chessboard import start_as_mmar
from .study import check_plots


DELTA = 1 / 128  # suppl. Sec. 6.2
NUM_TIMESTEPS, NUM_BINS = 1000, 20
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 512, 5.0e-4, 0.999
# Tokens and noises that a timestep's error is measured on.
NUM_MEASURED = 4096


@dataclass
class Curves:
    """Per timestep `(T - 1,)`: mean squared errors per unit of step, and what Eq. 27 bounds them by."""

    timesteps: Tensor
    v: Tensor
    epsilon: Tensor
    bound_v: Tensor
    bound_epsilon: Tensor


def step_errors(num_samples: int = NUM_MEASURED, seed: int = 0) -> Curves:
    """Measured errors of one DDIM step from exact v and epsilon that are rounded to bfloat16, in float64."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    alphas_cumprod = cosine_alphas_cumprod(NUM_TIMESTEPS).double()
    now, before = alphas_cumprod[1:, None], alphas_cumprod[:-1, None]  # (T - 1, 1)
    noisy_latents, v = add_noise(clean, noise, now), v_target(clean, noise, now)  # (T - 1, M)
    phi = torch.acos(now.sqrt())
    unit = torch.sin(torch.acos(before.sqrt()) - phi)
    errors = []
    for psi, output in ((phi + math.pi / 2, v), (torch.full_like(phi, math.pi / 2), noise.expand_as(v))):
        exact, rounded = (
            general_ddim_step(noisy_latents, u, phi, psi, unit) for u in (output, output.bfloat16().double())
        )
        errors.append(((rounded - exact) / unit).square().mean(-1))
    bound_v = torch.full((NUM_TIMESTEPS - 1,), DELTA**2, dtype=torch.float64)
    return Curves(torch.arange(1, NUM_TIMESTEPS), *errors, bound_v, DELTA**2 / now[:, 0])


def general_ddim_step(noisy_latents: Tensor, output: Tensor, phi: Tensor, psi: Tensor, unit: Tensor) -> Tensor:
    """x^(t-1) from an output r (cos(psi) x + sin(psi) epsilon) with r = 1 (Eq. 14); `unit` is sin(phi' - phi)."""
    phi_before = phi + torch.asin(unit)
    return (unit * output - torch.sin(phi_before - psi) * noisy_latents) / torch.sin(psi - phi)


def read_tokens(model: str, data: Path) -> Tensor:
    """Latent tokens of all pictures of a parquet, `(I, N, C)`."""
    pipe = open_pipeline(model, "--model", device="cpu")
    processor, tokens = pipe.processor.image_processor, []
    rows = read_rows(data)
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        pictures = processor.fetch_images([row["image"] for row in batch], places=False)
        pixel_values = processor(pictures, return_tensors="pt")["pixel_values"]
        tokens.append(pipe.model.encode_images(pixel_values).flatten(2).transpose(1, 2))
    return torch.cat(tokens)


class PlacedHead(nn.Module):
    """A Diffusion MLP whose condition is the token's place, started as MMAR's."""

    def __init__(self, num_latents: int, channels: int, prediction_type: str, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        config = MMARDiffusionConfig(hidden_size=192, num_hidden_layers=4, prediction_type=prediction_type)
        self.head = start_as_mmar(MMARDiffusionMLP(config, channels, num_latents))
        self.register_buffer("places", torch.eye(num_latents))


def train_head(tokens: Tensor, prediction_type: str, num_steps: int, seed: int) -> PlacedHead:
    """A head that learned tokens `(I, N, C)` in bfloat16 autocast; the moving average of its weights."""
    _, num_latents, channels = tokens.shape
    network = PlacedHead(num_latents, channels, prediction_type, seed)
    generator, alphas_cumprod = torch.Generator().manual_seed(seed), cosine_alphas_cumprod(NUM_TIMESTEPS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=average)
    for _ in range(num_steps):
        pictures = torch.randint(0, len(tokens), (BATCH_SIZE,), generator=generator)
        places = torch.randint(0, num_latents, (BATCH_SIZE,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = diffusion_loss(
                network.head,
                tokens[pictures, places],
                network.places[places],
                alphas_cumprod,
                prediction_type,
                generator=generator,
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(network)
    return averaged.module


@torch.no_grad()
def v_losses(network: PlacedHead, tokens: Tensor, prediction_type: str, num_samples: int, seed: int) -> Tensor:
    """Mean squared errors of v in each of `NUM_BINS` intervals of timesteps, in bfloat16 as in training."""
    generator, schedule = torch.Generator().manual_seed(seed), cosine_alphas_cumprod(NUM_TIMESTEPS)
    losses = []
    for timesteps in torch.arange(NUM_TIMESTEPS).chunk(NUM_BINS):
        pictures = torch.randint(0, len(tokens), (num_samples,), generator=generator)
        places = torch.randint(0, tokens.shape[1], (num_samples,), generator=generator)
        drawn = timesteps[torch.randint(0, len(timesteps), (num_samples,), generator=generator)]
        clean = tokens[pictures, places]
        noise = torch.randn(clean.shape, generator=generator)
        alphas_cumprod_t = schedule[drawn][:, None]
        noisy_latents = add_noise(clean, noise, alphas_cumprod_t)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = network.head(noisy_latents, drawn, network.places[places])
        if prediction_type == "epsilon":
            prediction = v_from_epsilon(noisy_latents, prediction, alphas_cumprod_t)
        target = v_target(clean, noise, alphas_cumprod_t)
        losses.append((prediction - target).square().mean())
    return torch.stack(losses)


def plot(curves: Curves, losses: dict[str, Tensor], file: Path) -> None:
    """The two parts beside each other, on logarithmic scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    timesteps = curves.timesteps.tolist()
    for values, label, style in (
        (curves.v, "v, measured", "-"),
        (curves.epsilon, "epsilon, measured", "-"),
        (curves.bound_v, "v, 1 / 128²", "--"),
        (curves.bound_epsilon, "epsilon, 1 / (128² alpha-bar)", "--"),
    ):
        left.plot(timesteps, values.tolist(), style, label=label)
    middles = [(index + 0.5) * NUM_TIMESTEPS / NUM_BINS for index in range(NUM_BINS)]
    for prediction_type, own in losses.items():
        right.plot(middles, own.tolist(), "o-", label=f"{prediction_type}: error of v")
    gap = losses["epsilon"] - losses["v_prediction"]
    right.plot(middles, gap.where(gap > 0, math.nan).tolist(), "x-", label="gap, where above 0")
    right.plot(timesteps, curves.bound_epsilon.tolist(), "--", label="1 / (128² alpha-bar)")
    left.set(yscale="log", xlabel="timestep", ylabel="squared error per unit of DDIM step", title="bfloat16 alone")
    right.set(yscale="log", xlabel="timestep", ylabel="squared error", title="trained in bfloat16")
    left.legend()
    right.legend()
    figure.savefig(file)


def report(curves: Curves, losses: dict[str, Tensor], command: str, picture: str) -> str:
    """The results as a page of docs/results."""
    chosen = [1, 250, 500, 750, 900, 950, 990, 999]
    steps = "\n".join(
        f"| {t} | {curves.v[t - 1]:.2e} | {curves.bound_v[t - 1]:.2e} | {curves.epsilon[t - 1]:.2e} | "
        f"{curves.bound_epsilon[t - 1]:.2e} |"
        for t in chosen
    )
    size = NUM_TIMESTEPS // NUM_BINS
    trained = "\n".join(
        f"| {index * size} to {(index + 1) * size - 1} | {v:.4f} | {epsilon:.4g} | {epsilon - v:.4g} | "
        f"{float(curves.bound_epsilon[min(index * size + size // 2, NUM_TIMESTEPS - 2)]):.2e} |"
        for index, (v, epsilon) in enumerate(
            zip(losses["v_prediction"].tolist(), losses["epsilon"].tolist(), strict=True)
        )
    )
    return f"""# bfloat16's error of v and of epsilon (Fig. 3 A; Eq. 18, 23, 27)

{date.today().isoformat()}, commit {commit()}, {processor()}; {versions()}. Written by

    {command}

## Without a network

Mean squared error per unit of DDIM step, of outputs that are exact but for their rounding to bfloat16, and the paper's
delta^2 with delta = 1 / 128, above the rounding's largest error of 1 / 256.

| timestep | v, measured | v, bound | epsilon, measured | epsilon, bound |
| ---: | ---: | ---: | ---: | ---: |
{steps}

## Trained

Two Diffusion MLPs of 4 x 192, trained in bfloat16 autocast on the VAE's tokens of the training pictures; their squared
errors of v. The paper's Fig. 3 A shows the gap growing without bound above timestep 900.

| timesteps | trained on v | trained on epsilon | gap | 1 / (128^2 alpha-bar) |
| --- | ---: | ---: | ---: | ---: |
{trained}

![]({picture})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of an MMAR, for its VAE")
    parser.add_argument("--data", required=True, type=Path, help="parquet of training rows")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the page and the plot to")
    parser.add_argument("--num_steps", type=int, default=10_000, help="of training, each of 512 tokens")
    parser.add_argument("--num_samples", type=int, default=20_000, help="tokens per interval of timesteps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.num_steps, args.num_samples) < 1:
        parser.error("--num_steps and --num_samples must be at least 1")
    check_plots(args.out)
    tokens, curves, losses = read_tokens(args.model, args.data), step_errors(seed=args.seed), {}
    for prediction_type in ("v_prediction", "epsilon"):
        network = train_head(tokens, prediction_type, args.num_steps, args.seed)
        losses[prediction_type] = v_losses(network, tokens, prediction_type, args.num_samples, args.seed + 1)
        print(prediction_type, [f"{value:.4g}" for value in losses[prediction_type].tolist()], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{date.today().isoformat()}_numerical_error"
    plot(curves, losses, args.out / f"{name}.png")
    command = f"python -m mmar.ablations.numerical_error --model {args.model} --data {args.data} --out {args.out}"
    command += f" --num_steps {args.num_steps} --num_samples {args.num_samples} --seed {args.seed}"
    (args.out / f"{name}.md").write_text(report(curves, losses, command, f"{name}.png"), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
