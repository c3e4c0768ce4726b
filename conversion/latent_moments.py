"""Mean and std of a VAE's latents, measured on the run, with their standard errors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modeling_mmar.configuration_mmar import shorten


# Fewer say too little of their own spread.
MIN_PICTURES = 64
# What `convert_kl16` writes before a measurement, and what diffusers writes for every VAE that is given no scale.
UNMEASURED_SCALES = (1.0, 0.18215)


def check_measured(vae_config: Mapping[str, Any], source: Any, option: str, allow: str) -> None:
    r"""
    Refuses a VAE whose latent scale was never measured: its latents would not have unit variance.

    Args:
        vae_config (`Mapping`): All of an `AutoencoderKL`'s; that of a `VQModel`, whose scale is not used, passes.
        source: The folder, for the error.
        option (`str`): What the user named it with, such as "`vae`".
        allow (`str`): What the user passes to take it as it is.

    Raises:
        ValueError: If there is neither a shift nor a scale other than the defaults.
    """
    is_kl, scale = "latents_std" in vae_config, vae_config["scaling_factor"]
    if not is_kl or scale not in UNMEASURED_SCALES or vae_config["shift_factor"] or vae_config["latents_std"]:
        return
    raise ValueError(
        f"{option} must have a measured latent scale; got {shorten(str(source))} with the default `scaling_factor` "
        f"{scale} and no shift. Measure it with "
        f"`mmar latent-scale`, or pass {allow} to take it as it is."
    )


class LatentMoments:
    r"""
    Running moments of latents, per channel and over all channels.

    Each picture counts as one sample of its channels' first and second moments, so that the standard errors hold for
    pictures whose latents hang together. The posterior's own noise counts: what training samples has unit variance.

    Args:
        num_channels (`int`): C.
    """

    def __init__(self, num_channels: int):
        self.num_pictures = 0
        # Sums over pictures of m, q, m^2, q^2, m q, per channel and, last, over all channels.
        self._sums = torch.zeros(5, num_channels + 1, dtype=torch.float64)

    def update(self, mean: Tensor, std: Tensor) -> None:
        r"""
        Adds pictures.

        Args:
            mean (`torch.FloatTensor` of shape `(I, C, h, w)`): Means of the unscaled latents' posterior.
            std (`torch.FloatTensor` of shape `(I, C, h, w)`): Its stds.
        """
        mean, std = mean.double().cpu(), std.double().cpu()
        first, second = mean.mean((2, 3)), (mean.square() + std.square()).mean((2, 3))  # (I, C)
        first, second = (torch.cat([part, part.mean(1, keepdim=True)], dim=1) for part in (first, second))
        products = (first, second, first.square(), second.square(), first * second)
        self._sums += torch.stack([part.sum(0) for part in products])
        self.num_pictures += len(mean)

    @property
    def mean(self) -> Tensor:
        """`(C + 1,)`, float64: per channel, then over all channels."""
        return self._sums[0] / self.num_pictures

    @property
    def std(self) -> Tensor:
        """`(C + 1,)`, float64, likewise."""
        return (self._sums[1] / self.num_pictures - self.mean.square()).clamp_min(0).sqrt()

    def errors(self) -> Tensor:
        """Standard errors of mean and std in units of the std, `(2, C + 1)`, float64."""
        n = self.num_pictures
        if n < 2:
            return torch.full((2, self._sums.shape[1]), torch.inf, dtype=torch.float64)
        mean_first, mean_second, square_first, square_second, product = self._sums / n
        variance_first = square_first - mean_first.square()
        variance_second = square_second - mean_second.square()
        covariance = product - mean_first * mean_second
        # std^2 = E q - (E m)^2, hence d std = (dq - 2 E m dm) / (2 std).
        mu, std = self.mean, self.std
        variance_std = (variance_second - 4 * mu * covariance + 4 * mu.square() * variance_first) / (4 * std.square())
        variances = torch.stack([variance_first, variance_std]).clamp_min(0)
        return (variances / (n - 1)).sqrt() / std

    def converged(self, tolerance: float) -> bool:
        """Whether `MIN_PICTURES` were read and all standard errors are below `tolerance` times the std."""
        return self.num_pictures >= MIN_PICTURES and bool((self.errors() < tolerance).all())
