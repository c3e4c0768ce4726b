"""The Diffusion MLP on top of the LLM's hidden states, and its loss (Sec. 3.2, 3.3.2; suppl. Fig. 6)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mmar import MMARDiffusionConfig
from .parameterization_mmar import add_noise, v_target


# Caps a step's noise so that alpha-bar stays above 0 at the last timestep (Nichol & Dhariwal, arXiv 2102.09672).
MAX_BETA = 0.999
# Slowest sinusoid of the timestep embedding, in timesteps (DiT).
MAX_PERIOD = 10000.0
# Std of the time MLP's weights at the start (DiT, MAR).
TIMESTEP_INITIAL_STD = 0.02


def cosine_alphas_cumprod(num_train_timesteps: int) -> Tensor:
    r"""
    Alpha-bar of the cosine schedule, `squaredcos_cap_v2` in diffusers.

    Args:
        num_train_timesteps (`int`): T.

    Returns:
        `torch.FloatTensor` of shape `(T,)`, float32; index 0 has the least noise.
    """
    time = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)
    return (1 - betas).cumprod(0).float()


class MMARDiffusionLinear(nn.Linear):
    """A linear of the head; `initialization` of its weight is "xavier", "normal" or "zero" (MAR), its bias is 0."""

    def __init__(self, in_features: int, out_features: int, initialization: str = "xavier"):
        super().__init__(in_features, out_features)
        self.initialization = initialization


class MMARTimestepEmbedding(nn.Module):
    """Sinusoids of the integer timestep, then two linears with SiLU (DiT, MAR)."""

    def __init__(self, frequency_embedding_size: int, hidden_size: int):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.linear_1 = MMARDiffusionLinear(frequency_embedding_size, hidden_size, "normal")
        self.linear_2 = MMARDiffusionLinear(hidden_size, hidden_size, "normal")

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.frequency_embedding_size // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponent)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (M, frequency_embedding_size)
        return self.linear_2(F.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


class MMARDiffusionBlock(nn.Module):
    """AdaLN, two-layer MLP with SiLU, gated residual (suppl. Fig. 6)."""

    def __init__(self, config: MMARDiffusionConfig):
        super().__init__()
        width, expanded = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.linear_1 = MMARDiffusionLinear(width, expanded)
        self.linear_2 = MMARDiffusionLinear(expanded, width)
        self.modulation = MMARDiffusionLinear(width, 3 * width, "zero")

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        update = self.norm(hidden_states) * (1 + scale) + shift
        return hidden_states + gate * self.linear_2(F.silu(self.linear_1(update)))


class MMARDiffusionMLP(nn.Module):
    r"""
    Predicts v (or the noise) of noisy image tokens from the condition `z` (suppl. Sec. 6.1).

    Args:
        config (`MMARDiffusionConfig`): Sizes.
        latent_channels (`int`): C.
        condition_size (`int`): D, the LLM's width.
    """

    def __init__(self, config: MMARDiffusionConfig, latent_channels: int, condition_size: int):
        super().__init__()
        width = config.hidden_size
        self.timestep_embedding = MMARTimestepEmbedding(config.frequency_embedding_size, width)
        self.condition_projection = MMARDiffusionLinear(condition_size, width)
        self.input_projection = MMARDiffusionLinear(latent_channels, width)
        self.blocks = nn.ModuleList(MMARDiffusionBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(width, eps=config.layer_norm_eps, elementwise_affine=False)
        self.final_modulation = MMARDiffusionLinear(width, 2 * width, "zero")
        self.output_projection = MMARDiffusionLinear(width, latent_channels, "zero")

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        r"""
        Args:
            noisy_latents (`torch.FloatTensor` of shape `(M, C)`): x^(t).
            timesteps (`torch.LongTensor` of shape `(M,)`): t, 0 = least noise.
            z (`torch.FloatTensor` of shape `(M, D)`): The LLM's output for the token.

        Returns:
            `torch.FloatTensor` of shape `(M, C)`, float32: the prediction, cast before any sampler update
            ("Mixed-Precision Inference", Sec. 3.3.4).
        """
        dtype = self.input_projection.weight.dtype
        condition = F.silu(self.timestep_embedding(timesteps) + self.condition_projection(z.to(dtype)))
        hidden_states = self.input_projection(noisy_latents.to(dtype))
        for block in self.blocks:
            hidden_states = block(hidden_states, condition)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        return self.output_projection(self.final_norm(hidden_states) * (1 + scale) + shift).float()


def diffusion_losses(
    diffusion_mlp: MMARDiffusionMLP,
    latent_tokens: Tensor,
    z: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str = "v_prediction",
    diffusion_batch_mul: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    num_tokens: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    Squared errors of the predicted v (Eq. 8) or noise (Eq. 3 with w_t = 1) at random timesteps.

    Args:
        diffusion_mlp (`MMARDiffusionMLP`): The network.
        latent_tokens (`torch.FloatTensor` of shape `(M, C)`): Clean tokens in unit-variance latent space.
        z (`torch.FloatTensor` of shape `(M, D)`): Conditions.
        alphas_cumprod (`torch.FloatTensor` of shape `(T,)`): Noise schedule, float32.
        prediction_type (`str`, *optional*, defaults to `"v_prediction"`): `"v_prediction"` or `"epsilon"`.
        diffusion_batch_mul (`int`, *optional*, defaults to 1): Timesteps drawn per `z`.
        generator (`torch.Generator` or a list of them, *optional*): Source of timesteps and noise; with one for each
            picture these do not depend on the other pictures of the batch.
        num_tokens (`list[int]`, *optional*): With a list of generators, how many of the M tokens each picture has.

    Returns:
        `tuple` of `torch.FloatTensor` of shape `(diffusion_batch_mul, M)`, float32, means over channels, and
        `torch.LongTensor` of that shape, the timesteps.
    """
    generators = generator if isinstance(generator, list) else [generator]
    counts = [len(z)] if num_tokens is None else num_tokens
    timesteps, noise = [], []
    for own, count in zip(generators, counts, strict=True):
        device, shape = _device(own, z), (diffusion_batch_mul, count)
        timesteps.append(torch.randint(0, len(alphas_cumprod), shape, generator=own, device=device))
        noise.append(torch.randn(*shape, latent_tokens.shape[-1], generator=own, device=device))
    # (mul, M) and (mul, M, C) -> (mul * M,) and (mul * M, C)
    timesteps = torch.cat(timesteps, dim=1).flatten().to(z.device)
    noise = torch.cat(noise, dim=1).flatten(0, 1).to(z.device)
    latent_tokens = latent_tokens.float().repeat(diffusion_batch_mul, 1)
    z = z.repeat(diffusion_batch_mul, 1)
    alphas_cumprod_t = alphas_cumprod.to(z.device)[timesteps][:, None]  # (mul * M, 1)
    prediction = diffusion_mlp(add_noise(latent_tokens, noise, alphas_cumprod_t), timesteps, z)
    target = v_target(latent_tokens, noise, alphas_cumprod_t) if prediction_type == "v_prediction" else noise
    losses = (prediction - target).square().mean(-1)
    return losses.view(diffusion_batch_mul, -1), timesteps.view(diffusion_batch_mul, -1)


def diffusion_loss(*args, **kwargs) -> Tensor:
    """Mean of `diffusion_losses`, with its arguments, over tokens and timesteps: a float32 scalar."""
    return diffusion_losses(*args, **kwargs)[0].mean()


def _device(generator: torch.Generator | None, tensor: Tensor) -> torch.device:
    return tensor.device if generator is None else generator.device
