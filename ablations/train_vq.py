"""
Trains a small VQ tokenizer, for the paper's "w/ VQ" at toy size, from a trained `AutoencoderKL` of as many tokens.

    python -m mmar.ablations.train_vq --data checkpoints/emoji-lite/train.parquet --start runs/vae --out runs/vq

The first codebook is k-means of the KL latents' means; then encoder, codebook and decoder learn together, gradients
passing the codes straight through (van den Oord et al., "Neural discrete representation learning", arXiv 1711.00937),
and codes that nothing uses are put where pictures are. Made for toy sizes; at the paper's, convert LDM's vq-f16. The
result is a folder of diffusers' `VQModel`.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor
from torch.nn import functional as F

from ..command import run_command
from ..files import check_folder
from ..modeling_mmar.saving_mmar import apply_umask
from ..training.checkpoints import check_weights
from ..training.train_vae import gradient_loss, read_pictures, shift


# Arguments that both of diffusers' autoencoders have.
SHARED = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
)
NUM_CODES = 1024
KMEANS_ROUNDS, KMEANS_TOKENS = 20, 65_536
# Steps between looks at which codes are in use, and the part of the training after which none is moved any more.
RESTART_EVERY, LAST_RESTART = 200, 0.7
EMA_DECAY = 0.999


@torch.no_grad()
def vq_from_kl(vae: AutoencoderKL, num_codes: int) -> VQModel:
    r"""
    A `VQModel` whose encoder gives what the KL autoencoder's posterior has as its mean, and with its decoder.

    Args:
        vae (`AutoencoderKL`): With C latent channels.
        num_codes (`int`): K, entries of the codebook; they are not yet anything.

    Returns:
        `VQModel`: With codes of C channels.
    """
    vq = VQModel(
        **{name: vae.config[name] for name in SHARED},
        num_vq_embeddings=num_codes,
        vq_embed_dim=vae.config.latent_channels,
        mid_block_add_attention=vae.config.mid_block_add_attention,
    )
    state, channels = vae.state_dict(), vae.config.latent_channels
    # The 1 x 1 convolution behind the last one, in one: (C, 2 C) by (2 C, width, 3, 3); without the variances.
    weight, bias = state.pop("encoder.conv_out.weight"), state.pop("encoder.conv_out.bias")
    if vae.config.use_quant_conv:
        mixing = state.pop("quant_conv.weight")[:channels, :, 0, 0]
        weight = torch.einsum("cm,mihw->cihw", mixing, weight)
        bias = mixing @ bias + state.pop("quant_conv.bias")[:channels]
    state["encoder.conv_out.weight"], state["encoder.conv_out.bias"] = weight[:channels], bias[:channels]
    identity = torch.eye(channels)[..., None, None]
    state["quant_conv.weight"], state["quant_conv.bias"] = identity, torch.zeros(channels)
    state.setdefault("post_quant_conv.weight", identity)
    state.setdefault("post_quant_conv.bias", torch.zeros(channels))
    state["quantize.embedding.weight"] = vq.quantize.embedding.weight
    vq.load_state_dict(state)
    return vq


@torch.no_grad()
def kmeans(tokens: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm: middles `(K, C)` of tokens `(M, C)`; one that nothing is near is put on a token."""
    middles = tokens[torch.randperm(len(tokens), generator=generator)[:num_codes]].clone()
    for _ in range(KMEANS_ROUNDS):
        nearest = torch.cdist(tokens, middles).argmin(-1)
        counts = nearest.bincount(minlength=num_codes)
        sums = torch.zeros_like(middles).index_add_(0, nearest, tokens)
        middles = sums / counts.clamp(min=1)[:, None]
        unused = (counts == 0).nonzero()[:, 0]
        middles[unused] = tokens[torch.randint(0, len(tokens), (len(unused),), generator=generator)]
    return middles


@torch.no_grad()
def encoded(vq: VQModel, pictures: Tensor) -> Tensor:
    """Tokens `(N * h * w, C)` of pictures `(N, 3, H, W)`, bytes, before they become codes."""
    batches = [vq.encode(part.to(vq.device).float() / 127.5 - 1).latents.cpu() for part in pictures.split(64)]
    return torch.cat(batches).permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def measure(vq: VQModel, pictures: Tensor) -> dict[str, float]:
    """Reconstruction PSNR in dB, how many codes are used, and their perplexity."""
    error, counts = 0.0, torch.zeros(vq.config.num_vq_embeddings)
    for part in pictures.split(64):
        pixel_values = part.to(vq.device).float() / 127.5 - 1
        quantized, _, (_, _, codes) = vq.quantize(vq.encode(pixel_values).latents)
        drawn = vq.decode(quantized, force_not_quantize=True).sample.clamp(-1, 1)
        error += F.mse_loss(drawn, pixel_values).item() * len(part)
        counts += codes.flatten().bincount(minlength=len(counts)).cpu()
    shares = counts / counts.sum()
    return {
        "psnr": float(10 * torch.log10(torch.tensor(4 * len(pictures) / error))),
        "codes_used": int((counts > 0).sum()),
        "perplexity": float(torch.special.entr(shares).sum().exp()),
    }


def train(
    vq: VQModel, pictures: Tensor, num_steps: int, batch_size: int, learning_rate: float, generator: torch.Generator
) -> VQModel:
    r"""
    Trains a tokenizer in place, in bfloat16 autocast.

    Args:
        vq (`VQModel`): With a codebook to start from.
        pictures (`torch.ByteTensor` of shape `(N, 3, H, W)`): What to learn.
        num_steps, batch_size, learning_rate: Of AdamW, with a cosine to 0.
        generator (`torch.Generator`): Source of batches and shifts.

    Returns:
        `VQModel`: The moving average of its weights.
    """
    optimizer = torch.optim.AdamW(vq.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1.0e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    averaged = torch.optim.swa_utils.AveragedModel(vq, multi_avg_fn=average)
    counts, entries, start = torch.zeros(vq.config.num_vq_embeddings), vq.quantize.embedding.weight, time.monotonic()
    for step in range(num_steps):
        index = torch.randint(0, len(pictures), (batch_size,), generator=generator)
        pixel_values = shift(pictures[index].float() / 127.5 - 1, generator).to(vq.device)
        with torch.autocast(vq.device.type, torch.bfloat16):
            encoded_pictures = vq.encode(pixel_values).latents.float()
        quantized, code_loss, (_, _, codes) = vq.quantize(encoded_pictures)
        with torch.autocast(vq.device.type, torch.bfloat16):
            drawn = vq.decode(quantized, force_not_quantize=True).sample.float()
        loss = (drawn - pixel_values).abs().mean() + 4 * F.mse_loss(drawn, pixel_values)
        loss = loss + 0.5 * gradient_loss(drawn, pixel_values) + code_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(vq)
        counts += codes.flatten().bincount(minlength=len(counts)).cpu()
        if (step + 1) % RESTART_EVERY == 0:
            print(
                f"step {step + 1} of {num_steps}, {time.monotonic() - start:.0f} s: loss {loss.item():.4f}, "
                f"{int((counts > 0).sum())} codes in use",
                flush=True,
            )
            if step < LAST_RESTART * num_steps:
                unused = (counts == 0).nonzero()[:, 0].to(vq.device)
                tokens = encoded_pictures.detach().permute(0, 2, 3, 1).flatten(0, 2)
                chosen = torch.randint(0, len(tokens), (len(unused),), generator=generator).to(vq.device)
                entries.data[unused] = averaged.module.quantize.embedding.weight.data[unused] = tokens[chosen]
            counts.zero_()
    return averaged.module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet of training rows")
    parser.add_argument("--eval_data", help="parquet of held-out rows, measured and never trained on")
    parser.add_argument("--start", required=True, type=Path, help="folder of a trained AutoencoderKL")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the VQModel to")
    parser.add_argument("--num_codes", type=int, default=NUM_CODES)
    parser.add_argument("--num_steps", type=int, default=6_000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5.0e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.num_codes, args.num_steps, args.batch_size) < 1:
        given = f"{args.num_codes}, {args.num_steps} and {args.batch_size}"
        parser.error(f"--num_codes, --num_steps and --batch_size must be at least 1; got {given}")
    if not (args.start / "config.json").is_file():
        parser.error(f"--start must be an AutoencoderKL's folder; there is no config.json in {args.start}")
    if "num_vq_embeddings" in json.loads((args.start / "config.json").read_text()):
        parser.error(f"--start must be an AutoencoderKL's folder; {args.start} holds a VQModel")
    check_folder(args.out)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.start)
    _, pictures = read_pictures(args.data, vae.config.sample_size)
    # What is wrong with them shows before the training.
    held_out = read_pictures(args.eval_data, vae.config.sample_size)[1] if args.eval_data else None
    vq = vq_from_kl(vae, args.num_codes)
    tokens = encoded(vq, pictures)
    if len(tokens) < args.num_codes:
        raise ValueError(
            f"expected at least as many tokens as codes, {args.num_codes}; the pictures have {len(tokens)}. Lower "
            "--num_codes, or pass more pictures."
        )
    sample = tokens[torch.randperm(len(tokens), generator=generator)[:KMEANS_TOKENS]]
    vq.quantize.embedding.weight.data.copy_(kmeans(sample, args.num_codes, generator))
    if torch.accelerator.is_available():
        vq.to(torch.accelerator.current_accelerator())
    first = measure(vq, pictures)
    vq = train(vq, pictures, args.num_steps, args.batch_size, args.learning_rate, generator)
    report: dict[str, Any] = {"steps": args.num_steps, "kmeans": first, "train": measure(vq, pictures)}
    if not math.isfinite(psnr := report["train"]["psnr"]):
        raise ValueError(
            f"expected a tokenizer with a finite PSNR on its training pictures; got {psnr}. Lower --learning_rate, "
            f"which is {args.learning_rate}."
        )
    if held_out is not None:
        report["held_out"] = measure(vq, held_out)
    check_weights(vq.named_parameters(), "Lower --learning_rate.")
    vq.save_pretrained(args.out)
    apply_umask(args.out)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
