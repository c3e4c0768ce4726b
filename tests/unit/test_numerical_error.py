"""bfloat16's error in a DDIM step: against Eq. 14, 18 and 27, and a page from a short training."""

import math

import pytest
import torch
from helpers import seeded

from mmar.ablations import numerical_error
from mmar.ablations.numerical_error import general_ddim_step, step_errors
from mmar.modeling_mmar.diffusion_mmar import cosine_alphas_cumprod
from mmar.modeling_mmar.parameterization_mmar import add_noise, ddim_step, v_target


def test_general_step_is_ddims():
    """For v (psi = phi + pi / 2) our `ddim_step`; for epsilon the same from an exact epsilon."""
    clean, noise = torch.randn(2, 64, generator=seeded(0), dtype=torch.float64)
    now, before = (cosine_alphas_cumprod(1000).double()[t] for t in (600, 500))
    noisy, v = add_noise(clean, noise, now), v_target(clean, noise, now)
    phi = torch.acos(now.sqrt())
    unit = torch.sin(torch.acos(before.sqrt()) - phi)
    expected = ddim_step(noisy, v, now, before)
    torch.testing.assert_close(general_ddim_step(noisy, v, phi, phi + math.pi / 2, unit), expected)
    half = torch.tensor(math.pi / 2, dtype=torch.float64)
    torch.testing.assert_close(general_ddim_step(noisy, noise, phi, half, unit), expected)
    torch.testing.assert_close(expected, add_noise(clean, noise, before))


def test_measured_errors_lie_below_the_papers():
    curves = step_errors()
    # Rounding to nearest errs by at most 1 / 256 of a number, a quarter of the squared bound.
    assert (curves.v < curves.bound_v / 4).all() and (curves.epsilon < curves.bound_epsilon / 4).all()
    assert (curves.v > curves.bound_v / 100).all() and (curves.epsilon > curves.bound_epsilon / 100).all()
    # The same where there is hardly noise; at the end epsilon's is divided by alpha-bar.
    ratio = curves.epsilon / curves.v
    assert 0.8 < float(ratio[0]) < 1.2 and float(ratio[-1]) > 1e8
    assert torch.equal(curves.timesteps, torch.arange(1, 1000))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_a_head_learns(monkeypatch, prediction_type):
    monkeypatch.setattr(numerical_error, "BATCH_SIZE", 128)
    monkeypatch.setattr(numerical_error, "EMA_DECAY", 0.9)
    # One picture with unit tokens that differ by place: what a place tells is all there is to know.
    tokens = torch.randn(1, 4, 8, generator=seeded(0))
    network = numerical_error.train_head(tokens, prediction_type, 250, seed=0)
    untrained = numerical_error.train_head(tokens, prediction_type, 1, seed=0)
    losses, before = (numerical_error.v_losses(own, tokens, prediction_type, 500, 1) for own in (network, untrained))
    assert losses.shape == (numerical_error.NUM_BINS,)
    # In the middle of the schedule, where both predictions say the same.
    assert float(losses[8:12].mean()) < 0.5 * float(before[8:12].mean())


def test_page_and_plot(tmp_path):
    curves = step_errors(num_samples=64)
    losses = {"v_prediction": torch.full((20,), 0.1), "epsilon": torch.linspace(0.1, 9.0, 20)}
    page = numerical_error.report(curves, losses, "the command", "errors.png")
    assert "the command" in page and "![](errors.png)" in page
    assert "| 950 to 999 | 0.1000 | 9 | 8.9 |" in page and "| 999 | " in page
    numerical_error.plot(curves, losses, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1000
