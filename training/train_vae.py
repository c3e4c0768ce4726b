"""
Trains a small `AutoencoderKL` from scratch on a parquet of pictures and stores its measured latent scale.

    python -m mmar.training.train_vae --data checkpoints/emoji-lite/train.parquet --out runs/vae

Made for toy sizes: a real MMAR takes a published KL-16. Everything runs in bfloat16 autocast with
float32 weights; the result is a diffusers folder with an EMA of the weights and each channel's `latents_mean` and
`latents_std`.
"""

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..command import run_command
from ..conversion.latent_moments import LatentMoments


# 16 pixels to a token along each axis, as KL-16: a 64 x 64 picture becomes 16 tokens of 32 channels.
VAE_CONFIG = {
    "block_out_channels": [16, 32, 64, 80, 80],
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "layers_per_block": 1,
    "latent_channels": 32,
    "norm_num_groups": 1,
    "sample_size": 64,
}
EMA_DECAY = 0.999
# Parts of the training before the KL term comes in, and over which it grows.
KL_START, KL_WARMUP = 0.35, 0.2


def read_pictures(path: str | Path, size: int) -> Tensor:
    """
    Reads the `image` column {bytes, path} of a parquet: `torch.ByteTensor` of shape `(N, 3, size, size)`; raises
    `ValueError` if the column or a row's picture is missing or broken.
    """
    table = pq.read_table(path)
    if "image" not in table.column_names or not len(table):
        raise ValueError(f"{Path(path).name} must have a column `image` and at least one row.")
    pictures = []
    for index, image in enumerate(table.column("image").to_pylist()):
        try:
            picture = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
        except (TypeError, KeyError, OSError) as error:
            raise ValueError(
                f"row {index} of {Path(path).name} must hold a picture's file as image {{bytes, path}}; it cannot be "
                f"read ({error}). Drop the row or mend it."
            ) from error
        pictures.append(np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def augment(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Flips half the pictures and shifts all by up to 4 pixels (white border)."""
    batch, _, size, _ = pixel_values.shape
    padded = F.pad(pixel_values, (4, 4, 4, 4), value=1.0)
    out = torch.empty_like(pixel_values)
    for i in range(batch):
        top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
        picture = padded[i, :, top : top + size, left : left + size]
        out[i] = picture.flip(-1) if torch.rand((), generator=generator) < 0.5 else picture
    return out


def gradient_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences: keeps edges sharp."""
    loss = torch.zeros((), device=prediction.device)
    for axis in (-1, -2):
        loss = loss + (prediction.diff(dim=axis) - target.diff(dim=axis)).abs().mean()
    return loss


def chroma_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of what is left of the colours without their grey; hues are learned last."""
    error = prediction - target
    return (error - error.mean(1, keepdim=True)).abs().mean()


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: Tensor) -> dict[str, float | list[float]]:
    """Reconstruction PSNR in dB (posterior mode), mean and std of each sampled channel, mean posterior std."""
    error, posterior_std = 0.0, 0.0
    moments = LatentMoments(vae.config.latent_channels)
    for chunk in pictures.split(64):
        pixel_values = (chunk.float() / 127.5 - 1).to(vae.device)
        posterior = vae.encode(pixel_values).latent_dist
        error += F.mse_loss(vae.decode(posterior.mode()).sample.clamp(-1, 1), pixel_values).item() * len(chunk)
        moments.update(posterior.mean, posterior.std)
        posterior_std += posterior.std.mean().item() * len(chunk)
    return {
        "psnr": 10 * math.log10(4 * len(pictures) / error),
        "latents_mean": moments.mean[:-1].tolist(),
        "latents_std": moments.std[:-1].tolist(),
        "posterior_std": posterior_std / len(pictures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet with an `image` column of training pictures")
    parser.add_argument("--eval_data", help="parquet of held-out pictures, measured and never trained on")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=24.0, help="the training time; learning rate decays over it")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2.0e-3)
    parser.add_argument("--kl_weight", type=float, default=0.03, help="per unit of KL, against summed absolute error")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf or args.batch_size < 1:
        parser.error("--minutes must be above 0 and --batch_size at least 1")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pictures = read_pictures(args.data, VAE_CONFIG["sample_size"])
    held_out = read_pictures(args.eval_data, VAE_CONFIG["sample_size"]) if args.eval_data else None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    vae = AutoencoderKL(**VAE_CONFIG).to(device, memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(pictures)} pictures", flush=True)
    averaged = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1.0e-4)

    start, step, last = time.monotonic(), 0, 0.0
    while (passed := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        warmup = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warmup * 0.5 * (1 + np.cos(np.pi * passed))
        index = torch.randint(0, len(pictures), (args.batch_size,), generator=generator)
        pixel_values = augment(pictures[index].float() / 127.5 - 1, generator).to(
            device, memory_format=torch.channels_last
        )
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixel_values).latent_dist
            # No noise in the latents until the KL term comes in: otherwise hues never get through.
            latents = posterior.mode() if passed < KL_START else posterior.sample()
            prediction = vae.decode(latents).sample.float()
        absolute = (prediction - pixel_values).abs().mean()
        kl = posterior.kl().float().mean()
        elements = pixel_values[0].numel()
        kl_weight = args.kl_weight * min(1.0, max(0.0, passed - KL_START) / KL_WARMUP)
        square = F.mse_loss(prediction, pixel_values)
        loss = absolute + 4 * square + 0.5 * gradient_loss(prediction, pixel_values) + kl_weight * kl / elements
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(vae)
        step += 1
        if step % 100 == 0:
            print(
                f"step {step} {passed:.0%} l1 {absolute.item():.4f} "
                f"chroma {chroma_error(prediction, pixel_values).item():.4f} kl {kl.item():.0f} "
                f"pictures/s {step * args.batch_size / (time.monotonic() - start):.0f}",
                flush=True,
            )
        if time.monotonic() - last > 120:
            last = time.monotonic()
            averaged.module.save_pretrained(args.out)

    vae = averaged.module.eval()
    report = {"steps": step, "train": measure(vae, pictures)}
    if held_out is not None:
        report["held_out"] = measure(vae, held_out)
    if not math.isfinite(report["train"]["psnr"]):
        raise ValueError("expected a VAE that trained; its error is NaN or infinite. Lower --learning_rate.")
    # The channels differ in spread; one scale for all would leave some of them with hardly any of the loss.
    vae.register_to_config(
        scaling_factor=1.0,
        latents_mean=report["train"]["latents_mean"],
        latents_std=report["train"]["latents_std"],
    )
    vae.save_pretrained(args.out)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_command(main)
