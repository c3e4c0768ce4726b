"""x, epsilon and v in float64; Eq. 14 in its general form; CFG; the size of bfloat16's error (suppl. Sec. 6.2)."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from mmar.modeling_mmar.diffusion_mmar import cosine_alphas_cumprod
from mmar.modeling_mmar.parameterization_mmar import (
    add_noise,
    ddim_step,
    epsilon_from_v,
    v_from_epsilon,
    v_target,
    x_from_epsilon,
    x_from_v,
)


# float64 rounds to 1e-16; dividing by cos(phi) >= 0.03 (alpha-bar >= 1e-3) keeps errors below 1e-13.
EXACT = {"atol": 1e-12, "rtol": 0}


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(512, 4, generator=generator, dtype=torch.float64)
    alpha_bar = torch.rand(512, 1, generator=generator, dtype=torch.float64) * 0.998 + 0.001
    return x, noise, alpha_bar


def general_ddim_step(x_t, u_over_r, phi_t, phi_prev, psi_t):
    """Eq. 14 as printed, for a prediction u = r (cos(psi) x + sin(psi) epsilon)."""
    numerator = torch.sin(phi_prev - phi_t) * u_over_r - torch.sin(phi_prev - psi_t) * x_t
    return numerator / torch.sin(psi_t - phi_t)


def angles(alpha_bar):
    return torch.acos(alpha_bar.sqrt())


def test_round_trips(draw):
    x, noise, alpha_bar = draw
    noisy, v = add_noise(x, noise, alpha_bar), v_target(x, noise, alpha_bar)
    torch.testing.assert_close(x_from_v(noisy, v, alpha_bar), x, **EXACT)
    torch.testing.assert_close(epsilon_from_v(noisy, v, alpha_bar), noise, **EXACT)
    torch.testing.assert_close(v_from_epsilon(noisy, noise, alpha_bar), v, **EXACT)
    torch.testing.assert_close(x_from_epsilon(noisy, noise, alpha_bar), x, **EXACT)


def test_v_and_epsilon_maps_are_inverse(draw):
    noisy, anything, alpha_bar = draw
    there = epsilon_from_v(noisy, anything, alpha_bar)
    torch.testing.assert_close(v_from_epsilon(noisy, there, alpha_bar), anything, **EXACT)
    there = v_from_epsilon(noisy, anything, alpha_bar)
    torch.testing.assert_close(epsilon_from_v(noisy, there, alpha_bar), anything, **EXACT)


def test_v_has_unit_variance_for_unit_variance_data(draw):
    x, noise, _ = draw
    for alpha_bar in (0.001, 0.3, 0.9, 0.999):
        v = v_target(x, noise, torch.tensor(alpha_bar, dtype=torch.float64))
        # 2048 values: the variance of a normal sample is known to 3 percent, and 5 of these are allowed.
        assert abs(v.var().item() - 1) < 0.16


def test_one_step_equals_eq_14_in_general_form(draw):
    x, noise, alpha_bar = draw
    alpha_prev = alpha_bar + (1 - alpha_bar) * 0.37
    phi, phi_prev = angles(alpha_bar), angles(alpha_prev)
    noisy = add_noise(x, noise, alpha_bar)
    v = v_target(x, noise, alpha_bar)
    ours = ddim_step(noisy, v, alpha_bar, alpha_prev)
    # v-prediction is psi = phi + pi / 2, r = 1 (Eq. 21); epsilon-prediction is psi = pi / 2 (Sec. A.3).
    torch.testing.assert_close(ours, general_ddim_step(noisy, v, phi, phi_prev, phi + math.pi / 2), **EXACT)
    half_pi = torch.full_like(phi, math.pi / 2)
    torch.testing.assert_close(ours, general_ddim_step(noisy, noise, phi, phi_prev, half_pi), **EXACT)
    # Any other angle and scale predict the same step.
    psi, scale = phi + 1.1, 3.0
    u = scale * (psi.cos() * x + psi.sin() * noise)
    torch.testing.assert_close(ours, general_ddim_step(noisy, u / scale, phi, phi_prev, psi), **EXACT)
    # And it is Eq. 13: the same x and epsilon at the new angle.
    torch.testing.assert_close(ours, add_noise(x, noise, alpha_prev), **EXACT)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("num_inference_steps", [1, 7])
def test_step_equals_diffusers_ddim(draw, prediction_type, num_inference_steps):
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(num_inference_steps)
    noisy, v = draw[0].float(), draw[1].float()
    alphas = cosine_alphas_cumprod(1000)
    for timestep in scheduler.timesteps:
        alpha_t = alphas[timestep].reshape(1, 1)
        previous = timestep - 1000 // num_inference_steps
        alpha_prev = alphas[previous].reshape(1, 1) if previous >= 0 else torch.ones(1, 1)
        output = v if prediction_type == "v_prediction" else epsilon_from_v(noisy, v, alpha_t)
        theirs = scheduler.step(output, timestep, noisy, eta=0.0).prev_sample
        # The angle form takes acos near 1 in float32, good to 3e-4 of an angle below 0.01; schedules agree to 6e-5.
        torch.testing.assert_close(ddim_step(noisy, v, alpha_t, alpha_prev), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("w", [1.5, 10.0])
def test_cfg_on_v_equals_cfg_on_epsilon(draw, w):
    v_u, v_c, alpha_bar = draw
    noisy = torch.randn(512, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    guided_v = v_u + w * (v_c - v_u)
    epsilon_u, epsilon_c = epsilon_from_v(noisy, v_u, alpha_bar), epsilon_from_v(noisy, v_c, alpha_bar)
    guided_epsilon = epsilon_u + w * (epsilon_c - epsilon_u)
    torch.testing.assert_close(epsilon_from_v(noisy, guided_v, alpha_bar), guided_epsilon, **EXACT)
    torch.testing.assert_close(v_from_epsilon(noisy, guided_epsilon, alpha_bar), guided_v, atol=1e-11, rtol=0)


def test_relative_error_of_the_output_enters_as_eq_18(draw):
    x, noise, alpha_bar = draw
    alpha_prev = alpha_bar + (1 - alpha_bar) * 0.37
    phi, phi_prev = angles(alpha_bar), angles(alpha_prev)
    noisy, v, delta = add_noise(x, noise, alpha_bar), v_target(x, noise, alpha_bar), 1 / 128
    wrong = ddim_step(noisy, v * (1 + delta), alpha_bar, alpha_prev) - add_noise(x, noise, alpha_prev)
    torch.testing.assert_close(wrong, torch.sin(phi_prev - phi) * v * delta, **EXACT)
    # The same error of an epsilon-prediction is 1 / cos(phi) times as large per step (Eq. 22).
    psi = torch.full_like(phi, math.pi / 2)
    wrong = general_ddim_step(noisy, noise * (1 + delta), phi, phi_prev, psi) - add_noise(x, noise, alpha_prev)
    torch.testing.assert_close(wrong, torch.sin(phi_prev - phi) * noise / phi.cos() * delta, **EXACT)


@pytest.mark.parametrize("timestep", [100, 500, 900, 990])
def test_bfloat16_error_of_epsilon_grows_as_eq_27_and_of_v_does_not(timestep):
    """
    Eq. 27: an epsilon-prediction of relative error delta errs on v by delta^2 / alpha-bar on average.

    The paper sets delta to 1 / 128, the spacing of bfloat16; a rounding is uniform within half a spacing, whose size
    relative to the value is on average less. So the real error is a fixed fraction of Eq. 27, the same at every t.
    """
    generator = torch.Generator().manual_seed(timestep)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    alpha_bar = cosine_alphas_cumprod(1000)[timestep].double()
    noisy, v = add_noise(x, noise, alpha_bar), v_target(x, noise, alpha_bar)
    rounded_epsilon = v_from_epsilon(noisy, noise.to(torch.bfloat16).double(), alpha_bar)
    epsilon_error = (rounded_epsilon - v).square().mean()
    v_error = (v.to(torch.bfloat16).double() - v).square().mean()
    bound = 1 / (128**2 * alpha_bar)
    # Uniform in half a spacing of 2^-7 on mantissas in [1, 2): 1 / 12 of spacing^2 over mantissa^2, 0.04 for a normal.
    assert 0.03 < epsilon_error / bound < 0.06
    assert 0.03 < v_error * 128**2 < 0.06
    # The ratio of both is 1 / alpha-bar, to the accuracy of 200,000 draws.
    torch.testing.assert_close(epsilon_error / v_error * alpha_bar, torch.ones_like(v_error), rtol=0.03, atol=0)
