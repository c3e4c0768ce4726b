"""
Pure maps between the diffusion parameterizations x, epsilon and v, and the DDIM step (suppl. Sec. 6.2).

With cos(phi_t) = sqrt(alphas_cumprod_t) and sin(phi_t) = sqrt(1 - alphas_cumprod_t):

    noisy_latents = cos(phi) x + sin(phi) epsilon      (Eq. 10)
    v             = cos(phi) epsilon - sin(phi) x      (Eq. 7, 21)

Every function broadcasts, keeps the dtype of its arguments (float32 in the model, float64 in the tests) and takes
`alphas_cumprod_t` shaped to broadcast against the latents, for example `(M, 1)`.
"""

import torch
from torch import Tensor


def add_noise(latent_tokens: Tensor, noise: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    r"""
    Forward diffusion (Eq. 10).

    Args:
        latent_tokens (`torch.FloatTensor` of shape `(M, C)`): Clean tokens x in unit-variance latent space.
        noise (`torch.FloatTensor` of shape `(M, C)`): Standard normal noise.
        alphas_cumprod_t (`torch.FloatTensor` of shape `(M, 1)`): Alpha-bar in [0, 1].

    Returns:
        `torch.FloatTensor` of shape `(M, C)`: The noisy latents x^(t).
    """
    return alphas_cumprod_t.sqrt() * latent_tokens + (1 - alphas_cumprod_t).sqrt() * noise


def v_target(latent_tokens: Tensor, noise: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    r"""
    Training target of v-prediction (Eq. 7).

    Args:
        latent_tokens (`torch.FloatTensor` of shape `(M, C)`): Clean tokens in unit-variance latent space.
        noise (`torch.FloatTensor` of shape `(M, C)`): Standard normal noise.
        alphas_cumprod_t (`torch.FloatTensor` of shape `(M, 1)`): Alpha-bar in [0, 1].

    Returns:
        `torch.FloatTensor` of shape `(M, C)`.
    """
    return alphas_cumprod_t.sqrt() * noise - (1 - alphas_cumprod_t).sqrt() * latent_tokens


def x_from_v(noisy_latents: Tensor, v: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """Clean tokens from v: x = cos(phi) x^(t) - sin(phi) v (Eq. 12 with psi = phi + pi / 2)."""
    return alphas_cumprod_t.sqrt() * noisy_latents - (1 - alphas_cumprod_t).sqrt() * v


def epsilon_from_v(noisy_latents: Tensor, v: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """Noise from v: epsilon = sin(phi) x^(t) + cos(phi) v (Eq. 28)."""
    return (1 - alphas_cumprod_t).sqrt() * noisy_latents + alphas_cumprod_t.sqrt() * v


def v_from_epsilon(noisy_latents: Tensor, epsilon: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """v from noise: v = epsilon / cos(phi) - tan(phi) x^(t) (Eq. 24); undefined at alpha-bar = 0."""
    return (epsilon - (1 - alphas_cumprod_t).sqrt() * noisy_latents) / alphas_cumprod_t.sqrt()


def x_from_epsilon(noisy_latents: Tensor, epsilon: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """Clean tokens from noise: x = (x^(t) - sin(phi) epsilon) / cos(phi); undefined at alpha-bar = 0."""
    return (noisy_latents - (1 - alphas_cumprod_t).sqrt() * epsilon) / alphas_cumprod_t.sqrt()


def ddim_step(noisy_latents: Tensor, v: Tensor, alphas_cumprod_t: Tensor, alphas_cumprod_prev: Tensor) -> Tensor:
    r"""
    One deterministic DDIM step from t to t - 1 under v-prediction (Eq. 14 with psi_t = phi_t + pi / 2).

    Args:
        noisy_latents (`torch.FloatTensor` of shape `(M, C)`): x^(t).
        v (`torch.FloatTensor` of shape `(M, C)`): Predicted v^(t).
        alphas_cumprod_t (`torch.FloatTensor` of shape `(M, 1)`): Alpha-bar at t.
        alphas_cumprod_prev (`torch.FloatTensor` of shape `(M, 1)`): Alpha-bar at t - 1, larger.

    Returns:
        `torch.FloatTensor` of shape `(M, C)`: x^(t - 1).
    """
    phi_t = torch.acos(alphas_cumprod_t.sqrt())
    phi_prev = torch.acos(alphas_cumprod_prev.sqrt())
    # sin(psi - phi) = 1 and -sin(phi_prev - psi) = cos(phi_prev - phi).
    return torch.sin(phi_prev - phi_t) * v + torch.cos(phi_prev - phi_t) * noisy_latents
