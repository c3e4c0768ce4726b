"""
The paper's image protocol, written to be read: one picture at a time, no cache, the whole sequence through the LLM in
every autoregressive step, one token at a time through the diffusion, guidance as two separate passes.

It shares only the networks with the model (`model.model`, `diffusion_mlp`); masks, positions, noise schedule, sampler
and loop are its own. Python floats are float64, so the schedule here is the exact one.
"""

import math
from functools import cache

import torch
from torch import Tensor


@cache
def alphas_cumprod(num_train_timesteps: int) -> list[float]:
    """Cosine schedule with betas capped at 0.999."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    result, product = [], 1.0
    for step in range(num_train_timesteps):
        beta = 1 - alpha_bar((step + 1) / num_train_timesteps) / alpha_bar(step / num_train_timesteps)
        product *= 1 - min(beta, 0.999)
        result.append(product)
    return result


def respaced_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """From the last training timestep down to 0, evenly; a single step is timestep 0 (as `numpy.linspace`)."""
    if num_inference_steps == 1:
        return [0]
    last = num_train_timesteps - 1
    return [round(last * step / (num_inference_steps - 1)) for step in reversed(range(num_inference_steps))]


def cosine_counts(num_hidden: int, num_ar_steps: int) -> list[int]:
    """MAR's schedule: after step s floor(n cos(pi / 2 (s + 1) / S)) are left, and each step draws at least one."""
    counts, left = [], num_hidden
    for step in range(num_ar_steps):
        wanted = math.floor(num_hidden * math.cos(math.pi / 2 * (step + 1) / num_ar_steps))
        later_steps = num_ar_steps - 1 - step
        wanted = min(wanted, left - 1)
        wanted = max(wanted, later_steps)
        counts.append(left - wanted)
        left = wanted
    return counts


def condition(model, text: list[int], tokens: Tensor, hidden: list[bool]) -> Tensor:
    """z `(N, D)` of one picture behind its text, by one pass over the whole sequence."""
    num_text, num_latents = len(text), model.config.num_latents
    length = num_text + num_latents
    # Text is causal; every picture token sees the text and every picture token.
    sees = [
        [key <= query or (key >= num_text and query >= num_text) for key in range(length)] for query in range(length)
    ]
    sees = torch.tensor(sees)
    bias = torch.zeros(length, length).masked_fill(~sees, float("-inf"))
    positions = [position if position < num_text else num_text for position in range(length)]
    output = model.model(
        input_ids=torch.tensor([text + [model.config.image_token_id] * num_latents]),
        attention_mask={"full_attention": bias[None, None]},
        position_ids=torch.tensor([positions]),
        image_embeds=model.model.latent_encoder(tokens[None], torch.tensor([hidden])),
        use_cache=False,
    )
    return output.last_hidden_state[0, num_text:]


def denoise_token(model, z_cond, z_uncond, guidance_scale, num_inference_steps, noisy, draw_noise) -> Tensor:
    """One token `(C,)` by DDPM on v-prediction, from its starting noise; yields where it needs fresh noise."""
    num_train_timesteps = model.config.diffusion_config.num_train_timesteps
    schedule = alphas_cumprod(num_train_timesteps)
    timesteps = respaced_timesteps(num_train_timesteps, num_inference_steps)
    for index, timestep in enumerate(timesteps):
        is_last = index == len(timesteps) - 1
        alpha_bar = schedule[timestep]
        alpha_bar_prev = 1.0 if is_last else schedule[timesteps[index + 1]]
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha

        v = model.diffusion_mlp(noisy[None], torch.tensor([timestep]), z_cond[None])[0]
        if z_uncond is not None:
            v_uncond = model.diffusion_mlp(noisy[None], torch.tensor([timestep]), z_uncond[None])[0]
            v = v_uncond + guidance_scale * (v - v_uncond)
        x = math.sqrt(alpha_bar) * noisy - math.sqrt(1 - alpha_bar) * v

        # Mean and variance of q(x_{t-1} | x_t, x), Ho et al. 2020, Eq. 7; "fixed_small" variance.
        mean = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * x
        mean = mean + math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * noisy
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
        noisy = mean if is_last else mean + math.sqrt(variance) * draw_noise(index)
    return noisy


@torch.no_grad()
def generate_picture(
    model,
    text: list[int],
    null_text: list[int] | None,
    guidance_scale: float,
    num_ar_steps: int,
    num_inference_steps: int,
    generator: torch.Generator,
    known: Tensor | None = None,
    hidden: list[bool] | None = None,
    is_linear: bool = False,
) -> Tensor:
    """
    Latents `(N, C)` of one picture. Its seed is the next number of `generator`; a generator of that seed gives what
    `generate_images` draws, in the same order: the permutation, then per autoregressive step the starting noise of its
    tokens, then per diffusion step one draw per token. With `is_linear` guidance grows from 1 with the share of tokens
    drawn, those of the step included.
    """
    num_latents, channels = model.config.num_latents, model.config.latent_channels
    seed = torch.randint(0, 2**63 - 1, (1,), generator=generator).item()
    generator = torch.Generator().manual_seed(seed)
    hidden = [True] * num_latents if hidden is None else list(hidden)
    tokens = torch.zeros(num_latents, channels) if known is None else known.clone()
    order = [place for place in torch.randperm(num_latents, generator=generator).tolist() if hidden[place]]

    num_hidden = len(order)
    for count in cosine_counts(num_hidden, num_ar_steps):
        places, order = order[:count], order[count:]
        drawn_share = 1 - len(order) / num_hidden
        scale = 1 + (guidance_scale - 1) * drawn_share if is_linear else guidance_scale
        z_cond = condition(model, text, tokens, hidden)
        z_uncond = None if null_text is None else condition(model, null_text, tokens, hidden)
        start = torch.randn(count, channels, generator=generator)
        fresh = [
            [torch.randn(1, channels, generator=generator)[0] for _ in range(count)]
            for _ in range(num_inference_steps - 1)
        ]
        drawn = []
        for row, place in enumerate(places):
            drawn.append(
                denoise_token(
                    model,
                    z_cond[place],
                    None if z_uncond is None else z_uncond[place],
                    scale,
                    num_inference_steps,
                    start[row],
                    lambda index, row=row, fresh=fresh: fresh[index][row],
                )
            )
        for place, token in zip(places, drawn, strict=True):
            tokens[place] = token
            hidden[place] = False
    return tokens
