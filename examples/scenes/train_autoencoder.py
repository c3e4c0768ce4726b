"""
Trains the KL autoencoder of the scenes: 8 x 8 latents of 32 channels from 64 x 64 pixels.

    python -m examples.scenes.train_autoencoder --out runs/scenes/vae

The loss is the absolute and squared error of pixels and of their differences to the next pixel, and the KL divergence
of the latents. `--decoder_only` goes on with a frozen encoder, so that latents stay as they are.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F

from .judge import score
from .texts import all_facts
from .world import (
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    KINDS,
    SIZES,
    Group,
    Mix,
    Scene,
    free_corner,
    is_held_out_color,
    render,
    sample_scene,
    scene_of,
)


VAE_CONFIG = {
    # Few channels at full size, where a convolution costs most.
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 32,
    # One group of all channels: several groups lose the hues of flat areas.
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
    "sample_size": IMAGE_SIZE,
    # The latents' mean and standard deviation are measured channel by channel instead.
    "scaling_factor": 1.0,
}
# More groups than the model sees, since every glyph teaches the autoencoder something.
MIX = Mix(one=0.25, several=0.25, two=0.5)
# Seeds of the worlds: training, held-out measurement.
TRAIN_SEED, TEST_SEED = 0, 1
NUM_MEASURED = 1000
# Glyphs that are tried for an image full of them.
NUM_CROWD = 14
SAVE_SECONDS = 300


def crowded_scene(number: int) -> Scene:
    """A background full of different glyphs: more to learn per image than a scene of the world has."""
    generator = np.random.default_rng([TRAIN_SEED, number])
    scene = Scene(list(BACKGROUNDS)[generator.integers(len(BACKGROUNDS))], ())
    for _ in range(NUM_CROWD):
        size = list(SIZES)[generator.integers(len(SIZES))]
        corner = free_corner(scene, size, generator)
        kind, color = KINDS[generator.integers(len(KINDS))], list(COLORS)[generator.integers(len(COLORS))]
        if corner is not None and not is_held_out_color(kind, color):
            scene = replace(scene, groups=(*scene.groups, Group(kind, color, size, (corner,))))
    return scene


def batch_of(first: int, size: int) -> Tensor:
    """Training images `(size, 3, 64, 64)` in [-1, 1], from that number on: scenes and crowds in turn."""
    scenes = [
        crowded_scene(number) if number % 2 else scene_of(TRAIN_SEED, number, MIX)
        for number in range(first, first + size)
    ]
    images = np.stack([render(scene) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """From each pixel to the next one, to the right and down."""
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(predicted: Tensor, images: Tensor) -> Tensor:
    """Absolute and squared error of pixels, and absolute error of their differences."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(differences(predicted), differences(images), strict=True))
    return F.l1_loss(predicted, images) + 4 * F.mse_loss(predicted, images) + 0.5 * edges


@torch.no_grad()
def measure(vae: AutoencoderKL) -> dict[str, float | list[float]]:
    """PSNR, share of scenes that the judge finds all right, and the latents' statistics, on scenes held out too."""
    scenes = [sample_scene(np.random.default_rng([TEST_SEED, number]), MIX) for number in range(NUM_MEASURED)]
    images = np.stack([render(scene) for scene in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    means, errors, num_right = [], [], 0
    for start in range(0, len(scenes), 50):
        posterior = vae.encode(pixels[start : start + 50]).latent_dist
        means.append(posterior.mean)
        decoded = vae.decode(posterior.mean).sample.clamp(-1, 1)
        errors.append(((decoded - pixels[start : start + 50]) / 2).square().mean(dim=(1, 2, 3)))
        shown = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        pairs = zip(shown, scenes[start : start + 50], strict=True)
        num_right += sum(score(image, all_facts(scene)).all_right for image, scene in pairs)
    latents = torch.cat(means)
    psnr = -10 * torch.cat(errors).log10()
    return {
        "psnr": float(psnr.mean()),
        "psnr_of_mean_error": float(-10 * torch.cat(errors).mean().log10()),
        "all_right": num_right / len(scenes),
        "latents_mean": latents.mean(dim=(0, 2, 3)).tolist(),
        "latents_std": latents.std(dim=(0, 2, 3)).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--start", type=Path, help="folder of an autoencoder to go on from")
    parser.add_argument("--decoder_only", action="store_true", help="keep the encoder of --start as it is")
    parser.add_argument("--num_steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2.0e-3)
    parser.add_argument("--kl_weight", type=float, default=0.01, help="per nat, against the sum over all pixels")
    parser.add_argument("--first_scene", type=int, default=0, help="number of the first training scene")
    parser.add_argument("--bf16", action="store_true", help="for a CPU with instructions for bfloat16; slow on others")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.start) if args.start else AutoencoderKL(**VAE_CONFIG)
    vae.to(memory_format=torch.channels_last).train()
    if args.decoder_only:
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1.0e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.num_steps, pct_start=0.05)
    averaged = EMAModel(vae.parameters(), decay=0.998)
    begin = last_save = time.monotonic()
    for step in range(args.num_steps):
        images = batch_of(args.first_scene + step * args.batch_size, args.batch_size)
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().float().mean()
        reconstruction = reconstruction_loss(decoded, images)
        loss = reconstruction
        if not args.decoder_only:
            # The latents learn to carry the image before they are asked to carry little.
            loss = loss + min(1.0, 4 * step / args.num_steps) * args.kl_weight * kl / images[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        averaged.step(vae.parameters())
        if (step + 1) % 100 == 0:
            error = F.mse_loss(decoded, images).item() / 4
            rate = (step + 1) * args.batch_size / (time.monotonic() - begin)
            print(
                f"step {step + 1} loss {reconstruction.item():.4f} psnr {-10 * np.log10(error):.1f} "
                f"kl {kl.item():.0f} images/s {rate:.0f}",
                flush=True,
            )
        if time.monotonic() - last_save > SAVE_SECONDS or step + 1 == args.num_steps:
            last_save = time.monotonic()
            averaged.store(vae.parameters())
            averaged.copy_to(vae.parameters())
            vae.save_pretrained(args.out)
            averaged.restore(vae.parameters())
    averaged.copy_to(vae.parameters())
    report = measure(vae.eval())
    if not args.decoder_only:
        vae.register_to_config(latents_mean=report["latents_mean"], latents_std=report["latents_std"])
    vae.save_pretrained(args.out)
    (args.out / "report.json").write_text(json.dumps({"steps": args.num_steps, **report}, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
