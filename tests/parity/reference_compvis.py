"""
The KL and the VQ autoencoder of latent diffusion, written out plainly under CompVis' names, to compare the conversions
with, and what training code saves of them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels_in), _norm(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(_swish(self.norm2(self.conv1(_swish(self.norm1(x))))))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, h * w)
        weights = torch.einsum("bcq,bck->bqk", query, key) * x.shape[1] ** -0.5
        mixed = torch.einsum("bqk,bck->bcq", weights.softmax(-1), value)
        return x + self.proj_out(mixed.view_as(x))


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            _Block(channels, channels),
            _Attention(channels),
            _Block(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Resample(nn.Module):
    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    """Blocks, each followed by attention where the level has it, then a change of size."""

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int, attention: bool, resample: str | None):
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(_Block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(_Attention(channels_out) for _ in range(num_blocks if attention else 0))
        if resample:
            setattr(self, f"{resample}sample", _Resample(channels_out, up=resample == "up"))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, widths: list[int], num_blocks: int, channels_out: int, attention: bool):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], width, num_blocks, attention and i == last, "down" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(_swish(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, widths: list[int], num_blocks: int, z_channels: int, attention: bool):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        # CompVis counts the decoder's levels by resolution, the largest first, and runs them from the last.
        self.up = nn.ModuleList(
            _Level(widths[min(i + 1, last)], width, num_blocks + 1, attention and i == last, "up" if i > 0 else None)
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_swish(self.norm_out(x)))


class ReferenceKL(nn.Module):
    """`widths` of the levels; `decoder_attention` is what tells LDM's kl-f16 (True) from MAR's (False)."""

    def __init__(self, widths: list[int], num_blocks: int = 2, z_channels: int = 16, decoder_attention: bool = True):
        super().__init__()
        self.encoder = _Encoder(widths, num_blocks, 2 * z_channels, attention=True)
        self.decoder = _Decoder(widths, num_blocks, z_channels, attention=decoder_attention)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean and log-variance, `(B, 2 * z_channels, h, w)`."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class ReferenceVQ(nn.Module):
    """`widths` of the levels; `num_codes` entries of `code_channels` are the codebook, by default vq-f16's."""

    def __init__(
        self,
        widths: list[int],
        num_blocks: int = 2,
        z_channels: int = 8,
        code_channels: int = 8,
        num_codes: int = 16384,
    ):
        super().__init__()
        self.encoder = _Encoder(widths, num_blocks, z_channels, attention=True)
        self.decoder = _Decoder(widths, num_blocks, z_channels, attention=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(num_codes, code_channels)
        self.quant_conv = nn.Conv2d(z_channels, code_channels, 1)
        self.post_quant_conv = nn.Conv2d(code_channels, z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """What is quantized, `(B, code_channels, h, w)`."""
        return self.quant_conv(self.encoder(x))

    def codes(self, encoded: Tensor) -> Tensor:
        """Numbers `(B, h, w)` of the nearest entries."""
        # (B, 1, C, h, w) - (K, C, 1, 1) -> (B, K, h, w)
        distances = (encoded[:, None] - self.quantize.embedding.weight[:, :, None, None]).square().sum(2)
        return distances.argmin(1)

    def decode(self, codes: Tensor) -> Tensor:
        entries = self.quantize.embedding.weight[codes]  # (B, h, w, C)
        return self.decoder(self.post_quant_conv(entries.movedim(-1, 1)))


def with_random_vectors(reference: nn.Module) -> nn.Module:
    """In eval mode, with norms and biases that are not trivial."""
    for parameter in reference.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    return reference.eval()


def with_lit_ema(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """LitEma's averages, which are `state`, beside weights that are not averaged, here zeros."""
    average = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in state.items()}
    average |= {"model_ema.losslogvar": torch.zeros(()), "model_ema.decay": torch.tensor(0.999)}
    average["model_ema.num_updates"] = torch.tensor(7)
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()} | average


def in_diffusion_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An LDM's weights, `state` among them."""
    own = {"model.diffusion_model.out.2.weight": torch.zeros(1), "model_ema.decay": torch.tensor(0.5)}
    return {f"first_stage_model.{name}": tensor for name, tensor in state.items()} | own


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the expected spread."""
    return float((got - expected).abs().max() / expected.std())


KL16_WIDTHS = [128, 128, 256, 256, 512]
