"""Tokens by diffusion: the plain and the fast sampler against the head and diffusers' schedulers step by step."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from helpers import seeded, tiny_model

from mmar.modeling_mmar import fast_generation_mmar
from mmar.modeling_mmar.diffusion_mmar import MMARDiffusionBlock, MMARDiffusionMLP
from mmar.modeling_mmar.fast_generation_mmar import CachedDiffusionHead, LinearSteps, step_noise


# One float32 product summed in another order, values near 1.
ATOL = 5e-6
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
LINEAR = {
    "DDPM": DDPMScheduler(**SCHEDULE, prediction_type="v_prediction", timestep_spacing="linspace"),
    "DDPM, epsilon": DDPMScheduler(**SCHEDULE, prediction_type="epsilon"),
    "DDPM, trailing, large variance": DDPMScheduler(
        **SCHEDULE, prediction_type="v_prediction", timestep_spacing="trailing", variance_type="fixed_large"
    ),
    "DDIM": DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"),
    "DDIM, last alpha below 1": DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", set_alpha_to_one=False),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def sampler_of(model, scheduler, num_steps, fast=True):
    return model.token_samplers(scheduler, {num_steps}, torch.device("cpu"), 16, fast)[num_steps]


def conditions(model, number, seed=0):
    return torch.randn(number, model.config.text_config.hidden_size, generator=seeded(seed))


@torch.no_grad()
@pytest.mark.parametrize("max_elements", [1, 2000, 10**9], ids=["a step at a time", "some steps", "all steps"])
def test_cached_head_is_the_head(model, monkeypatch, max_elements):
    monkeypatch.setattr(fast_generation_mmar, "MAX_MODULATION_ELEMENTS", max_elements)
    head, z = model.diffusion_mlp, conditions(model, 6)
    timesteps = torch.tensor([999, 700, 400, 13, 0])
    linears = {part: part for part in head.modules()}
    cached = CachedDiffusionHead(head, linears, head.timestep_embedding(timesteps), z)
    for step, timestep in enumerate(timesteps):
        for number in (6, 3):
            noisy_latents = torch.randn(number, 4, generator=seeded(step))
            expected = head(noisy_latents, timestep.expand(number), z[:number])
            torch.testing.assert_close(cached(step, noisy_latents), expected, atol=ATOL, rtol=ATOL)
    assert expected.std() > 0.1


@pytest.mark.parametrize("scheduler", LINEAR.values(), ids=LINEAR)
def test_linear_steps_are_the_schedulers(scheduler):
    steps = LinearSteps.of(scheduler, 7)
    scheduler.set_timesteps(7)
    for index, timestep in enumerate(scheduler.timesteps):
        sample, prediction = torch.randn(2, 5, 4, generator=seeded(index)).double()
        kwargs = {"generator": seeded(9)} if steps.noise_std[index] else {}
        noise = torch.randn(5, 4, generator=seeded(9), dtype=torch.float64)
        expected = scheduler.step(prediction, timestep, sample, **kwargs).prev_sample
        linear = steps.keep[index] * sample + steps.take[index] * prediction + steps.noise_std[index] * noise
        # The same float32 coefficients on both sides; epsilon divides by sqrt(alpha-bar), 5e-5 at the last timestep.
        torch.testing.assert_close(linear, expected, atol=1e-9, rtol=1e-9)
    has_noise = [std != 0 for std in steps.noise_std]
    assert any(has_noise) == isinstance(scheduler, DDPMScheduler)


def test_linear_steps_are_kept_by_all_that_they_depend_on():
    scheduler = DDPMScheduler(**SCHEDULE)
    steps = LinearSteps.of(scheduler, 5)
    assert LinearSteps.of(DDPMScheduler(**SCHEDULE), 5) is steps
    assert LinearSteps.of(DDIMScheduler(**SCHEDULE), 5) != steps
    assert LinearSteps.of(scheduler, 6) != steps
    assert LinearSteps.of(DDPMScheduler(**SCHEDULE | {"timestep_spacing": "trailing"}), 5) != steps
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.square()
    assert LinearSteps.of(scheduler, 5) != steps


def test_steps_with_memory_or_unknown_ones_are_not_read_off():
    class MyScheduler(DDPMScheduler):
        pass

    for scheduler_class in (DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, MyScheduler):
        scheduler = scheduler_class.from_config(LINEAR["DDPM"].config)
        assert LinearSteps.of(scheduler, 5) is None
    # The first step divides by an alpha-bar of 0.
    assert (
        LinearSteps.of(DDPMScheduler(**SCHEDULE, rescale_betas_zero_snr=True, timestep_spacing="trailing"), 3) is None
    )
    # Reading off leaves the scheduler as it was.
    scheduler = DDPMScheduler(**SCHEDULE)
    LinearSteps.of(scheduler, 5)
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize("channels", [4, 16, 32, 40])
def test_step_noise_is_that_of_single_draws(channels):
    generator = seeded(3)
    expected = [torch.randn(1, channels, generator=generator) for _ in range(6)]
    noise = step_noise(seeded(3), 2, 3, channels)
    assert torch.equal(noise, torch.cat(expected).view(2, 3, channels))
    assert step_noise(seeded(3), 0, 3, channels).shape == (0, 3, channels)


@torch.no_grad()
def plain_tokens(model, scheduler, z, scales, generators, num_inference_steps):
    """One picture's tokens after the other, one network call per branch, the scheduler's own steps."""
    per_picture = len(z) // (1 if scales is None else 2) // len(generators)
    conditional, unconditional = (z, None) if scales is None else z.chunk(2)
    tokens = []
    for picture, generator in enumerate(generators):
        own = slice(picture * per_picture, (picture + 1) * per_picture)
        scheduler.set_timesteps(num_inference_steps)
        sample = torch.randn(per_picture, 4, generator=generator) * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(sample, timestep)
            times = timestep.expand(per_picture)
            prediction = model.diffusion_mlp(scaled, times, conditional[own])
            if scales is not None and scales[index] != 1:
                without = model.diffusion_mlp(scaled, times, unconditional[own])
                prediction = without + scales[index] * (prediction - without)
            kwargs = {} if type(scheduler) is DDIMScheduler else {"generator": [generator] * per_picture}
            sample = scheduler.step(prediction, timestep, sample, **kwargs).prev_sample
        tokens.append(sample)
    return torch.cat(tokens)


@torch.no_grad()
@pytest.mark.parametrize("scales", [None, [3.0] * 6, [1.0, 1.0, 4.0, 4.0, 1.0, 1.0]], ids=["none", "all", "some"])
@pytest.mark.parametrize(
    "scheduler_class", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler]
)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_tokens_are_those_of_single_calls(model, scheduler_class, scales, fast):
    scheduler = scheduler_class.from_config(LINEAR["DDPM"].config)
    z = conditions(model, 6 if scales is None else 12)
    sampler = sampler_of(model, scheduler, 6, fast)
    expected = plain_tokens(model, scheduler, z, scales, [seeded(1), seeded(2)], 6)
    for _ in range(2):  # a second time, as in each round
        tokens = sampler(z, scales, [seeded(1), seeded(2)])
        torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_head_with_hooks_is_called_as_a_whole(model):
    scheduler, z, calls = LINEAR["DDPM"], conditions(model, 4), []
    expected = sampler_of(model, scheduler, 5)(z, None, [seeded(0)])
    handle = model.diffusion_mlp.register_forward_hook(lambda *_: calls.append(1))
    try:
        tokens = sampler_of(model, scheduler, 5)(z, None, [seeded(0)])
    finally:
        handle.remove()
    assert len(calls) == 5
    torch.testing.assert_close(tokens, expected, atol=ATOL, rtol=ATOL)


class LouderHead(MMARDiffusionMLP):
    def forward(self, *inputs):
        return 2 * super().forward(*inputs)


class LouderBlock(MMARDiffusionBlock):
    def forward(self, *inputs):
        return 2 * super().forward(*inputs)


@torch.no_grad()
@pytest.mark.parametrize("part", ["head", "block", "wrapped block"])
def test_a_head_of_another_class_is_called_as_a_whole(part):
    model, scheduler = tiny_model(), LINEAR["DDPM"]
    head, z = model.diffusion_mlp, conditions(model, 4)
    if part == "head":
        head.__class__ = LouderHead
    elif part == "block":
        head.blocks[1].__class__ = LouderBlock
    else:
        head.blocks[1] = torch.compile(head.blocks[1], backend="eager")
    tokens = sampler_of(model, scheduler, 5)(z, [2.0] * 5, [seeded(0)])
    expected = plain_tokens(model, scheduler, z, [2.0] * 5, [seeded(0)], 5)
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_steps_without_guidance_leave_the_unconditional_half_out(model, monkeypatch):
    rows, call = [], CachedDiffusionHead.__call__

    def counted(self, step, noisy_latents):
        rows.append(len(noisy_latents))
        return call(self, step, noisy_latents)

    monkeypatch.setattr(CachedDiffusionHead, "__call__", counted)
    sampler = sampler_of(model, LINEAR["DDPM"], 4)
    sampler(conditions(model, 6), [1.0, 2.0, 2.0, 1.0], [seeded(0)])
    assert rows == [3, 6, 6, 3]
