"""What `train_vae` does to latents."""

import math

import torch

from mmar.training.train_vae import with_drawn_noise


def test_latent_noise_is_a_share_of_each_channels_spread():
    torch.manual_seed(0)
    latents = torch.randn(4000, 2, 4, 4) * torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    noise = with_drawn_noise(latents, 0.5) - latents
    # A strength per picture, even in [0, 0.5]: its square is 1 / 12 in the mean.
    std = noise.std((0, 2, 3))
    torch.testing.assert_close(std, torch.tensor([1.0, 10.0]) / math.sqrt(12), rtol=0.05, atol=0)
    per_picture = noise[:, 1].std((1, 2)) / 10
    assert per_picture.min() < 0.02 and per_picture.max() > 0.4
    assert with_drawn_noise(latents, 0.0) is latents
