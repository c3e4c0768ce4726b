"""
Trains a small `AutoencoderKL` from scratch on a parquet of pictures and stores its measured latent scale.

    python -m mmar.training.train_vae --config configs/mmar-tiny --data checkpoints/emoji-lite/train.parquet \
        --out runs/vae

Made for toy sizes: a real MMAR takes a published KL-16. There the autoencoder has seen millions of pictures; here it
sees a few thousand, and a ViT on top of its tokens learns too little from them. So where the rows have answers
(rows.py), MMAR's latent encoder learns beside the autoencoder to tell from its tokens the words of what a picture
shows and of its style (words.py), from views for which they hold. `init_tiny` starts the model's latent encoder with
those weights.

Everything runs in bfloat16 autocast with float32 weights; the result is a diffusers folder with an EMA of the weights
and each channel's `latents_mean` and `latents_std`, and beside it the latent encoder's weights.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..command import run_command
from ..conversion.latent_moments import LatentMoments
from ..files import check_folder
from ..modeling_mmar.configuration_mmar import MMARConfig
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..modeling_mmar.saving_mmar import apply_umask
from .checkpoints import check_weights
from .rows import open_cell
from .views import distort, restyle
from .words import WordReader, Words, known_words, share_told


EMA_DECAY = 0.999
# Parts of the training before the KL term comes in, and over which it grows.
KL_START, KL_WARMUP = 0.35, 0.2
# The latent encoder's weights, in the VAE's folder.
LATENT_ENCODER_NAME = "latent_encoder.safetensors"


def read_pictures(path: str | Path, size: int) -> tuple[list[dict[str, Any]], Tensor]:
    """
    Reads a parquet with a column `image`, in whatever form the rows of a training have it: its rows without the
    pictures, and those as `torch.ByteTensor` of shape `(N, 3, size, size)`; raises `ValueError` if the column or a
    row's picture is missing or broken.
    """
    table = pq.read_table(path)
    if "image" not in table.column_names or not len(table):
        raise ValueError(f"{Path(path).name} must have a column `image` and at least one row.")
    pictures = []
    for index, image in enumerate(table.column("image").to_pylist()):
        picture = open_cell(image, Path(path).parent, f"row {index} of {Path(path).name}")
        pictures.append(np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)))
    rows = table.drop_columns(["image"]).to_pylist()
    return rows, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def shift(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts pictures by up to 4 pixels (white border). They are not flipped: left and right have names."""
    batch, _, size, _ = pixel_values.shape
    padded = F.pad(pixel_values, (4, 4, 4, 4), value=1.0)
    out = torch.empty_like(pixel_values)
    for i in range(batch):
        top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
        out[i] = padded[i, :, top : top + size, left : left + size]
    return out


def draw_views(pictures: Tensor, redraw: bool) -> Tensor:
    """Views (views.py) of pictures, bytes `(B, 3, H, W)`, in [-1, 1]: moved, and redrawn before where asked."""
    views = []
    for picture in pictures.permute(0, 2, 3, 1).numpy():
        view = Image.fromarray(picture)
        views.append(np.asarray(distort(restyle(view) if redraw else view)))
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 127.5 - 1


def view_losses(
    vae: AutoencoderKL,
    reader: WordReader,
    pictures: Tensor,
    words: dict[str, Words],
    num_views: int,
    generator: torch.Generator,
    with_noise: bool,
) -> dict[str, Tensor]:
    """The words' losses per kind on fresh views: what a picture shows from all, its style from those not redrawn."""
    index = torch.randint(0, len(pictures), (num_views,), generator=generator)
    moved, redrawn = index[: num_views // 2], index[num_views // 2 :]
    views = torch.cat([draw_views(pictures[moved], redraw=False), draw_views(pictures[redrawn], redraw=True)])
    views = views.to(vae.device, memory_format=torch.channels_last)
    with torch.autocast(views.device.type, torch.bfloat16):
        posterior = vae.encode(views).latent_dist
        logits = reader(posterior.sample() if with_noise else posterior.mode())
    losses = {"content": (logits.get("content"), index), "style": (logits.get("style"), moved)}
    return {kind: words[kind].loss(own[: len(rows)], rows) for kind, (own, rows) in losses.items() if kind in words}


def with_drawn_noise(latents: Tensor, most: float) -> Tensor:
    """
    Latents `(B, C, h, w)` with noise of up to `most` times each channel's std, as much for each picture as is drawn.

    Latents that a model generates are never exact; a decoder that has seen noise draws them better (Yang et al.,
    "Latent denoising makes good visual tokenizers", arXiv 2507.15856).
    """
    if most == 0:
        return latents
    strength = most * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    std = latents.detach().float().std((0, 2, 3), keepdim=True)
    return latents + strength * std * torch.randn_like(latents, dtype=torch.float32)


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
def encode_all(vae: AutoencoderKL, pictures: Tensor) -> Iterator[Tensor]:
    """Modes `(64, C, h, w)` of the posteriors of pictures, bytes `(N, 3, H, W)`; the last batch may be smaller."""
    for chunk in pictures.split(64):
        yield vae.encode((chunk.float() / 127.5 - 1).to(vae.device)).latent_dist.mode()


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


def save(vae: AutoencoderKL, reader: WordReader, folder: Path) -> None:
    """Writes the VAE as diffusers does, and the latent encoder beside it where it learned."""
    check_weights((*vae.named_parameters(), *reader.named_parameters()), "Lower --learning_rate.")
    vae.save_pretrained(folder)
    if reader.heads:
        save_file(reader.encoder.state_dict(), folder / LATENT_ENCODER_NAME)
    apply_umask(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="folder of the MMAR's config.json")
    parser.add_argument("--data", required=True, help="parquet of training rows")
    parser.add_argument("--eval_data", help="parquet of held-out rows, measured and never trained on")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--start", type=Path, help="folder of a VAE trained by this command, to go on from")
    parser.add_argument("--num_steps", type=int, default=15_000)
    parser.add_argument("--batch_size", type=int, default=16, help="pictures to draw again in a step")
    parser.add_argument("--num_views", type=int, default=64, help="views to tell the words of in a step")
    parser.add_argument("--learning_rate", type=float, default=2.0e-3)
    parser.add_argument("--kl_weight", type=float, default=0.03, help="per unit of KL, against summed absolute error")
    parser.add_argument("--word_weight", type=float, default=0.3, help="per nat of the words' cross entropy")
    parser.add_argument(
        "--latent_noise", type=float, default=0.0, help="greatest std of noise on the decoder's latents, of theirs"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.num_steps, args.batch_size, args.num_views // 2) < 1:
        parser.error("--num_steps and --batch_size must be at least 1, and --num_views at least 2")
    if args.start is not None and not (args.start / "config.json").is_file():
        parser.error(f"--start must be a VAE's folder; there is no config.json in {args.start}")
    if not 0 <= args.latent_noise < math.inf:
        parser.error("--latent_noise must be at least 0")
    check_folder(args.out)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    config = MMARConfig.from_pretrained(args.config)
    rows, pictures = read_pictures(args.data, config.image_size)
    held_out = read_pictures(args.eval_data, config.image_size) if args.eval_data else None
    words = known_words(rows) if args.word_weight > 0 else {}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    vae = AutoencoderKL.from_pretrained(args.start) if args.start else AutoencoderKL(**config.vae_config)
    encoder = MMARForConditionalGeneration(config).model.latent_encoder
    if args.start and (args.start / LATENT_ENCODER_NAME).is_file():
        encoder.load_state_dict(load_file(args.start / LATENT_ENCODER_NAME))
    norm = nn.BatchNorm2d(config.latent_channels, affine=False)
    reader = WordReader(encoder, config.text_config.hidden_size, words, norm).to(device)
    vae.to(device, memory_format=torch.channels_last).train()
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(pictures)} pictures", flush=True)
    trained = nn.ModuleList([vae, reader])
    averaged = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True
    )
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1.0e-4, fused=True
    )

    start, last = time.monotonic(), 0.0
    for step in range(args.num_steps):
        passed = step / args.num_steps
        warmup = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warmup * 0.5 * (1 + np.cos(np.pi * passed))
        index = torch.randint(0, len(pictures), (args.batch_size,), generator=generator)
        pixel_values = shift(pictures[index].float() / 127.5 - 1, generator).to(
            device, memory_format=torch.channels_last
        )
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixel_values).latent_dist
            # No noise in the latents until the KL term comes in: otherwise hues never get through.
            with_noise = args.start is not None or passed >= KL_START
            latents = posterior.sample() if with_noise else posterior.mode()
            prediction = vae.decode(
                with_drawn_noise(latents, args.latent_noise) if with_noise else latents
            ).sample.float()
        absolute = (prediction - pixel_values).abs().mean()
        kl = posterior.kl().float().mean()
        elements = pixel_values[0].numel()
        kl_weight = args.kl_weight
        if not args.start:
            kl_weight *= min(1.0, max(0.0, passed - KL_START) / KL_WARMUP)
        square = F.mse_loss(prediction, pixel_values)
        loss = absolute + 4 * square + 0.5 * gradient_loss(prediction, pixel_values) + kl_weight * kl / elements
        told = {}
        if words:
            told = view_losses(vae, reader, pictures, words, args.num_views, generator, with_noise)
            loss = loss + args.word_weight * sum(told.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(trained)
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1} l1 {absolute.item():.4f} "
                f"chroma {chroma_error(prediction, pixel_values).item():.4f} kl {kl.item():.0f} "
                + "".join(f"{kind} {value.item():.3f} " for kind, value in told.items())
                + f"pictures/s {(step + 1) * args.batch_size / (time.monotonic() - start):.0f}",
                flush=True,
            )
        if time.monotonic() - last > 120:
            last = time.monotonic()
            save(*averaged.module, args.out)

    vae, reader = averaged.module.eval()
    report = {"steps": args.num_steps, "train": measure(vae, pictures)}
    if held_out is not None:
        held_out_rows, held_out_pictures = held_out
        report["held_out"] = measure(vae, held_out_pictures)
        report["held_out"]["told"] = share_told(reader, encode_all(vae, held_out_pictures), held_out_rows, words)
    if not math.isfinite(report["train"]["psnr"]):
        raise ValueError("expected a VAE that trained; its error is NaN or infinite. Lower --learning_rate.")
    # The channels differ in spread; one scale for all would leave some of them with hardly any of the loss.
    vae.register_to_config(
        scaling_factor=1.0,
        latents_mean=report["train"]["latents_mean"],
        latents_std=report["train"]["latents_std"],
    )
    save(vae, reader, args.out)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_command(main)
