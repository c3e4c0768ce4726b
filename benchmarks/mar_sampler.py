"""
MAR's published sampler design, to be measured against: classes of their own for network and diffusion, as in ADM.

From the description of MAR (arXiv 2406.11838, Sec. 3 and 4.1) and of the diffusion library that it took over (ADM,
arXiv 2105.05233): a respaced DDPM whose coefficients are taken from tables by timestep in each step; guidance in a
batch of twice the tokens, of which both halves carry the same noisy latents; timestep embedding, condition projection
and AdaLN computed in each step. The network is the model's own, and predicts v as MMAR's does.
"""

import torch
from torch import Tensor

from ..modeling_mmar.diffusion_mmar import MMARDiffusionMLP


class TableSampler:
    r"""
    A respaced DDPM by tables of its coefficients.

    Args:
        head (`MMARDiffusionMLP`): The network.
        alphas_cumprod (`torch.FloatTensor` of shape `(T,)`): Training schedule, float64.
        timesteps (`list[int]`): Rising, those that are kept.
    """

    def __init__(self, head: MMARDiffusionMLP, alphas_cumprod: Tensor, timesteps: list[int]):
        self.head = head
        kept = alphas_cumprod.double()[timesteps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        betas = 1 - kept / before
        variance = betas * (1 - before) / (1 - kept)
        self.timestep_map = torch.tensor(timesteps)
        self.tables = {
            "sqrt_alphas_cumprod": kept.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
            "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
            "posterior_mean_coef2": (1 - before) * (kept / before).sqrt() / (1 - kept),
        }

    def _extract(self, name: str, step: Tensor, like: Tensor) -> Tensor:
        """A table's value for each row, spread over its channels."""
        return self.tables[name].to(like.device)[step].float()[:, None].expand(like.shape)

    @torch.no_grad()
    def sample(self, z: Tensor, guidance_scale: float, generator: torch.Generator) -> Tensor:
        """Tokens `(M, C)` for conditions `(2 M, D)`, the unconditional half last."""
        num_tokens, channels = len(z) // 2, self.head.input_projection.in_features
        start = torch.randn(num_tokens, channels, generator=generator)
        latents = torch.cat([start, start])
        for index in reversed(range(len(self.timestep_map))):
            step = torch.full((len(latents),), index)
            v = self._guided(latents, self.timestep_map[step], z, guidance_scale)
            clean = self._extract("sqrt_alphas_cumprod", step, latents) * latents
            clean = clean - self._extract("sqrt_one_minus_alphas_cumprod", step, latents) * v
            mean = self._extract("posterior_mean_coef1", step, latents) * clean
            mean = mean + self._extract("posterior_mean_coef2", step, latents) * latents
            log_variance = self._extract("posterior_log_variance_clipped", step, latents)
            noise = torch.randn(num_tokens, channels, generator=generator)
            noise = torch.cat([noise, noise])
            is_noisy = (step != 0).float()[:, None]
            latents = mean + is_noisy * torch.exp(0.5 * log_variance) * noise
        return latents[:num_tokens]

    def _guided(self, latents: Tensor, timesteps: Tensor, z: Tensor, guidance_scale: float) -> Tensor:
        half = latents[: len(latents) // 2]
        prediction = self.head(torch.cat([half, half]), timesteps, z)
        conditional, unconditional = prediction.split(len(half))
        guided = unconditional + guidance_scale * (conditional - unconditional)
        return torch.cat([guided, guided])
