"""
Image generation as Sec. 3.3.1 ("Pipeline") and Sec. 3.3.4 describe it: the plain loop.

The text before an image is read once. Hidden latents are put in a random order. Each autoregressive step asks the
language model for z at the next positions, the diffusion turns every z into a token, and these tokens are known from
then on. `fast_generation_mmar.py` computes the same z and tokens faster.
"""

import copy
import inspect
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from .checks_mmar import check_callback_changes, check_generate_images, check_guidance, check_known_latents
from .configuration_mmar import shorten
from .masking_mmar import sample_orders, shared_position_ids, tokens_per_step


MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Preset:
    r"""
    How much work goes into an image.

    Args:
        ar_steps_per_latent (`float`): Autoregressive steps divided by the number of latents: 1 generates one latent at
            a time.
        num_inference_steps (`int` or `tuple[int, int]`): Diffusion steps per token, or those of the first and the last
            autoregressive step.
        scheduler_class (`type`, *optional*): diffusers' sampler; the model's by default.
    """

    ar_steps_per_latent: float
    num_inference_steps: int | tuple[int, int]
    scheduler_class: type | None = None


PRESETS = {
    "paper": Preset(1.0, 100),  # Sec. 4.6: 256 x 100
    "balanced": Preset(1 / 4, (50, 5)),
    "fast": Preset(1 / 8, 10, DPMSolverMultistepScheduler),
}


class TextContext:
    r"""
    A text and, after it, the language model on the tokens of an image.

    The text never attends to the image, so that its keys and values are computed once per image.

    Args:
        language_model (`MMARQwen2Model`): The language model.
        input_ids (`torch.LongTensor` of shape `(rows, P)`): The text, padded on the left.
        attention_mask (`torch.Tensor` of shape `(rows, P)`): 0 at padding.
        num_latents (`int`): N.
    """

    def __init__(self, language_model: Any, input_ids: Tensor, attention_mask: Tensor, num_latents: int):
        self.language_model, self.dtype = language_model, language_model.embed_tokens.weight.dtype
        self.cache = DynamicCache(config=language_model.config)
        no_image = torch.zeros_like(input_ids, dtype=torch.bool)
        position_ids = shared_position_ids(no_image, num_latents, attention_mask)
        language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        # All tokens of the image share the position after the text.
        self.position_ids = position_ids[:, -1:] + 1  # (rows, 1)
        visible = F.pad(attention_mask.bool(), (0, num_latents), value=True)
        self.visible = visible[:, None, None]  # (rows, 1, 1, P + N)

    def condition(self, embeds: Tensor, positions: Tensor) -> Tensor:
        r"""
        Runs the language model on the image's tokens.

        Args:
            embeds (`torch.FloatTensor` of shape `(rows, N, D)`): All tokens of the image, as the latent encoder embeds
                them.
            positions (`torch.LongTensor` of shape `(rows, K)`): The positions to generate next.

        Returns:
            `torch.FloatTensor` of shape `(rows, K, D)`: z at these positions.
        """
        embeds = embeds.to(self.dtype)
        rows, num_latents, _ = embeds.shape
        mask = self.visible.expand(-1, 1, num_latents, -1)
        if self.language_model.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(
                ~mask, torch.finfo(embeds.dtype).min
            )
        z = self.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": mask},
            position_ids=self.position_ids.expand(-1, num_latents),
            past_key_values=self.cache,
            use_cache=True,
            image_token_mask=torch.ones(rows, num_latents, dtype=torch.bool, device=embeds.device),
            return_dict=True,
        ).last_hidden_state
        # The tokens change with every step: only the text's keys and values stay.
        self.cache.crop(-num_latents)
        return rows_at(z, positions)


class TokenSampler:
    r"""
    Generates tokens from z by diffusion with a scheduler of diffusers.

    Args:
        head (`MMARDiffusionMLP`): The network.
        scheduler (diffusers scheduler): The sampler; it is copied, since it has state.
        num_inference_steps (`int`): T.
        device (`torch.device`): Of z.
    """

    def __init__(self, head: nn.Module, scheduler: Any, num_inference_steps: int, device: torch.device):
        self.head, self.scheduler = head, copy.deepcopy(scheduler)
        self.num_inference_steps, self.device = num_inference_steps, device
        start_schedule(self.scheduler, num_inference_steps, device)

    @property
    def num_steps(self) -> int:
        """Steps per token; some schedulers take more than they are asked for."""
        return len(self.scheduler.timesteps)

    def __call__(self, z: Tensor, guidance_scales: list[float] | None, generators: list[torch.Generator]) -> Tensor:
        r"""
        Args:
            z (`torch.FloatTensor` of shape `(M, D)`, or `(2 M, D)` with guidance): Conditions, the unconditional ones
                last.
            guidance_scales (`list[float]` of length T, *optional*): w of each step in v = v_u + w (v_c - v_u); steps
                with 1 need no v_u.
            generators (`list[torch.Generator]`): One per image, each for M / len(generators) of the tokens.

        Returns:
            `torch.FloatTensor` of shape `(M, C)`, float32.
        """
        # Forgets the tokens before.
        start_schedule(self.scheduler, self.num_inference_steps, self.device)
        network = self.network(z)
        noisy_latents = self.initial_noise(z if guidance_scales is None else z.chunk(2)[0], generators)
        per_token = [own for own in generators for _ in range(len(noisy_latents) // len(generators))]
        kwargs = {"generator": per_token} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for step, timestep in enumerate(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(noisy_latents, timestep)
            v = self.guided(network, step, scaled, guidance_scales)
            # In float32, as the network returns v (Sec. 3.3.4).
            noisy_latents = self.scheduler.step(v, timestep, noisy_latents, **kwargs).prev_sample
        return noisy_latents

    def network(self, z: Tensor) -> Callable[[int, Tensor], Tensor]:
        """The head for given z: of a step's index and noisy tokens `(m, C)`, for the first m rows of z."""
        timesteps = self.scheduler.timesteps
        return lambda step, tokens: self.head(tokens, timesteps[step].expand(len(tokens)), z[: len(tokens)])

    @staticmethod
    def guided(
        network: Callable[[int, Tensor], Tensor], step: int, noisy_latents: Tensor, guidance_scales: list[float] | None
    ) -> Tensor:
        """The prediction `(M, C)` of a step, with guidance v_u + w (v_c - v_u) where w is not 1."""
        if guidance_scales is None or guidance_scales[step] == 1:
            return network(step, noisy_latents)
        v_cond, v_uncond = network(step, noisy_latents.repeat(2, 1)).chunk(2)
        return torch.lerp(v_uncond, v_cond, guidance_scales[step])

    def initial_noise(self, z: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Noise `(M, C)` at the last timestep for conditions `(M, D)`, float32."""
        shape = len(z) // len(generators), self.head.input_projection.in_features
        noise = [torch.randn(shape, generator=own, device=own.device, dtype=torch.float32) for own in generators]
        return torch.cat(noise).to(z.device) * self.scheduler.init_noise_sigma


@dataclass
class GenerationState:
    r"""
    What a call of `generate_images` works with: its arguments, checked and completed.

    Args:
        context (`TextContext`): The text and the language model; with guidance all rows with the caption, then all
            with the null prompt.
        tokens (`torch.FloatTensor` of shape `(B, N, C)`): Known latents, 0 elsewhere.
        hidden (`torch.BoolTensor` of shape `(B, N)`): True where to generate.
        num_hidden (`int`): How many of each image.
        generators (`list[torch.Generator]`): One per image.
        is_guided (`bool`): Whether the call began with guidance.
        fast (`bool`): Whether tokens may be computed in the fast way.
        guidance_scale, guidance_schedule, guidance_interval, num_ar_steps, num_inference_steps, order, scheduler,
            callback: Of `generate_images`.
    """

    context: TextContext
    tokens: Tensor
    hidden: Tensor
    num_hidden: int
    generators: list[torch.Generator]
    is_guided: bool
    fast: bool
    guidance_scale: float
    guidance_schedule: str
    guidance_interval: tuple[float, float]
    num_ar_steps: int
    num_inference_steps: int | tuple[int, int]
    order: str
    scheduler: SchedulerMixin
    callback: Callable[[int, int, Tensor, Tensor], dict[str, Any] | None] | None

    def guidance_scales(self, known_share: float, num_steps: int) -> list[float] | None:
        """Guidance of each diffusion step, once so much of the image is generated; 1 outside of the interval."""
        if not self.is_guided:
            return None
        # A callback may have turned guidance off.
        scale = max(1.0, float(self.guidance_scale))
        if self.guidance_schedule == "linear":
            scale = 1 + (scale - 1) * known_share
        first, last = self.guidance_interval
        return [scale if first <= (step + 0.5) / num_steps < last else 1.0 for step in range(num_steps)]


class MMARImageGenerationMixin:
    """`generate_images` for a model with `model`, `diffusion_mlp` as its `image_head`, `vae` and `config`."""

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "constant",
        num_ar_steps: int | None = None,
        num_inference_steps: int | tuple[int, int] | None = None,
        scheduler: Any | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        latent_mask: Tensor | None = None,
        callback: Callable[[int, int, Tensor, Tensor], dict[str, Any] | None] | None = None,
        output_type: str = "pt",
        preset: str | None = None,
        order: str = "random",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        fast: bool | None = None,
        height: int | None = None,
        width: int | None = None,
        **kwargs,
    ) -> Tensor:
        r"""
        Generates images after a text: some latents per autoregressive step in random order, each by diffusion.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): The text before the image, without image tokens, padded
                on the left.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 at padding.
            negative_input_ids (`torch.LongTensor` of shape `(B, L')`, *optional*): The null prompt; needed for
                guidance.
            negative_attention_mask (`torch.Tensor` of shape `(B, L')`, *optional*): 0 at padding.
            guidance_scale (`float`, *optional*): w in v = v_u + w (v_c - v_u); active above 1. Default from
                `config.image_generation`, like the two numbers of steps below.
            guidance_schedule (`str`, *optional*, defaults to `"constant"`): `"linear"` raises w from 1 to
                `guidance_scale` with the share of latents that are known after each step, as MAR does.
            num_ar_steps (`int`, *optional*): Autoregressive steps, between 1 and the number of hidden latents.
            num_inference_steps (`int` or `tuple[int, int]`, *optional*): Diffusion steps per token, or those of the
                first and the last autoregressive step with even changes between: later tokens are less uncertain.
            scheduler (diffusers scheduler, *optional*): Defaults to the preset's, or `default_scheduler()`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One for all images, or one per image.
                The next number of an image's generator is its seed, so that a generator gives the same image alone and
                in a list. In float32 an image does not depend on the others of its batch; in bfloat16 rounding does.
            latents (`torch.FloatTensor` of shape `(B, C, h, w)`, *optional*): Known latents, where `latent_mask` is
                False (inpainting).
            latent_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True where to generate; equally many per
                image. Defaults to everywhere.
            callback (`Callable`, *optional*): Called after each autoregressive step with its index, the number of
                steps, the partial latents `(B, C, h, w)` and the mask `(B, N)` of what is still hidden. It may return
                a dict with "latents" to go on with, "guidance_scale" of what follows (in a call that began with
                guidance), and "interrupt", True to stop here.
            output_type (`str`, *optional*, defaults to `"pt"`): "pt" for images, "latent" for latents.
            preset (`str`, *optional*): A key of `PRESETS`, for the two numbers of steps and the scheduler; arguments
                that are given win.
            order (`str`, *optional*, defaults to `"random"`): Of the latents; one of `ORDERS`.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): The diffusion steps that
                are guided, as shares of all of them from the noisiest on (arXiv 2404.07724); the others are
                conditional only, and cost half.
            fast (`bool`, *optional*): Whether to compute in the faster ways of `fast_generation_mmar.py`, which need a
                second copy of the language model's layers in memory for the call and give the same up to rounding. By
                default where the accelerator has room for it.
            height, width (`int`, *optional*): As diffusers' pipelines have them; only `config.image_size`.

        Returns:
            `torch.FloatTensor`, float32: images `(B, 3, H, W)` in [-1, 1] or latents `(B, C, h, w)`.

        Raises:
            ValueError: For arguments outside their range, guidance without a null prompt, a scheduler of another
                prediction type, or latents that are NaN or infinite.
        """
        kwargs.pop("mm_token_type_ids", None)
        if "merge_image_weights" in kwargs:
            warnings.warn("`merge_image_weights` is called `fast` now.", FutureWarning, stacklevel=2)
            fast = kwargs.pop("merge_image_weights")
        if kwargs:
            raise ValueError(f"unexpected arguments {sorted(kwargs)}; see the docstring of `generate_images`.")
        if self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "expected a model in eval mode: gradient checkpointing drops the cached prompt in training mode. Call "
                "`model.eval()` first."
            )
        chosen = self.image_preset(preset)
        if guidance_scale is None:
            guidance_scale = self.config.image_generation["guidance_scale"]
        num_inference_steps = chosen.num_inference_steps if num_inference_steps is None else num_inference_steps
        scheduler = self.preset_scheduler(chosen) if scheduler is None else scheduler
        check_generate_images(
            self.config,
            input_ids,
            attention_mask,
            negative_input_ids,
            negative_attention_mask,
            guidance_scale,
            guidance_schedule,
            guidance_interval,
            num_ar_steps,
            num_inference_steps,
            scheduler,
            order,
            callback,
            fast,
            output_type,
            height,
            width,
        )
        check_known_latents(self.config, len(input_ids), latents, latent_mask)
        tokens, hidden = self._known_tokens(input_ids, latents, latent_mask)
        num_hidden = int(hidden[0].sum())

        # 1. Read the text: with guidance the captions, then the null prompts.
        is_guided = guidance_scale > 1
        if is_guided:
            input_ids, attention_mask = _stack_left_padded(
                input_ids, attention_mask, negative_input_ids, negative_attention_mask
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        fast = self.can_be_fast() if fast is None else fast
        state = GenerationState(
            context=self.text_context(input_ids, attention_mask, fast),
            tokens=tokens,
            hidden=hidden,
            num_hidden=num_hidden,
            generators=_generator_per_image(generator, len(tokens)),
            is_guided=is_guided,
            fast=fast,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_interval=guidance_interval,
            num_ar_steps=self.num_ar_steps(chosen, num_hidden) if num_ar_steps is None else num_ar_steps,
            num_inference_steps=num_inference_steps,
            order=order,
            scheduler=scheduler,
            callback=callback,
        )

        # 2. to 5. Generate the hidden latents.
        latents = self._as_latents(self.sample_tokens(state))
        if not bool(torch.isfinite(latents).all()):
            raise ValueError(
                "expected finite latents; got NaN or infinite values, from broken weights, the scheduler or an "
                "overflow. Lower `guidance_scale`, take the default scheduler, or run the model in bfloat16 or "
                "float32 instead of float16."
            )
        return latents if output_type == "latent" else self.decode_latents(latents)

    def sample_tokens(self, state: GenerationState) -> Tensor:
        r"""
        Generates the hidden tokens of images, some in each autoregressive step (Sec. 3.3.1).

        Args:
            state (`GenerationState`): What to generate, and how.

        Returns:
            `torch.FloatTensor` of shape `(B, N, C)`.
        """
        tokens, hidden, num_hidden = state.tokens, state.hidden, state.num_hidden
        batch, num_latents, channels = tokens.shape
        branches = 2 if state.is_guided else 1
        counts = tokens_per_step(num_hidden, state.num_ar_steps)
        diffusion_steps = _diffusion_steps(state.num_inference_steps, state.num_ar_steps)
        rows = branches * batch * num_hidden // state.num_ar_steps
        samplers = self.token_samplers(state.scheduler, set(diffusion_steps), tokens.device, rows, state.fast)

        # 2. Hidden positions in a random order for each image; known ones are left out.
        orders = sample_orders(batch, num_latents, state.generators, state.order).to(tokens.device)
        is_known = ~hidden.gather(1, orders)
        orders = orders.gather(1, is_known.long().argsort(dim=1, stable=True))[:, :num_hidden]  # (B, num_hidden)

        num_done = 0
        for step, count in enumerate(counts):
            positions = orders[:, num_done : num_done + count]  # (B, count)
            # 3. z of the next positions, given the text and the tokens so far.
            embeds = self.model.latent_encoder(tokens, hidden, num_latents - num_hidden + num_done)
            z = state.context.condition(embeds.repeat(branches, 1, 1), positions.repeat(branches, 1))
            num_done += count
            # 4. The tokens, by diffusion. (branches * B, count, D) -> (branches * B * count, D)
            sampler = samplers[diffusion_steps[step]]
            scales = state.guidance_scales(num_done / num_hidden, sampler.num_steps)
            generated = sampler(z.flatten(0, 1), scales, state.generators).view(batch, count, channels)
            # 5. They are known from now on.
            tokens = tokens.scatter(1, positions[..., None].expand_as(generated), generated)
            hidden = hidden.scatter(1, positions, False)
            tokens, is_interrupted = self.call_back(state, step, state.num_ar_steps, tokens, hidden)
            if is_interrupted:
                break
        return tokens

    # ------------------------------------------------------------------------------ what subclasses and users replace

    def text_context(self, input_ids: Tensor, attention_mask: Tensor, fast: bool) -> TextContext:
        """What gives z after texts `(rows, P)`."""
        return TextContext(self.model.language_model, input_ids, attention_mask, self.config.num_latents)

    def token_samplers(
        self, scheduler: Any, step_counts: set[int], device: torch.device, rows: int, fast: bool
    ) -> dict[int, TokenSampler]:
        """
        What generates tokens from z, for each number of diffusion steps: a `TokenSampler`, or another callable with
        its arguments and `num_steps`. About `rows` tokens pass it at once.
        """
        return {count: TokenSampler(self.diffusion_mlp, scheduler, count, device) for count in step_counts}

    def can_be_fast(self) -> bool:
        """Whether a call without `fast` may be fast."""
        return False

    def default_scheduler(self) -> DDPMScheduler:
        """The paper's sampler: DDPM on the training schedule, steps spread over all of it, no clipping (Sec. 4.6)."""
        diffusion = self.config.diffusion_config
        return DDPMScheduler(
            num_train_timesteps=diffusion.num_train_timesteps,
            beta_schedule=diffusion.beta_schedule,
            prediction_type=diffusion.prediction_type,
            timestep_spacing="linspace",
            clip_sample=False,
        )

    def image_preset(self, name: str | None = None) -> Preset:
        r"""
        A preset by its name, or the one of `config.image_generation`.

        Raises:
            ValueError: For another name than those of `PRESETS`.
        """
        if name is None:
            defaults = self.config.image_generation
            return Preset(defaults["num_ar_steps"] / self.config.num_latents, defaults["num_inference_steps"])
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}; got {shorten(name)}.")
        return PRESETS[name]

    def num_ar_steps(self, preset: Preset, num_hidden: int) -> int:
        """A preset's autoregressive steps for images with `num_hidden` latents to generate."""
        return min(max(1, round(preset.ar_steps_per_latent * self.config.num_latents)), num_hidden)

    def preset_scheduler(self, preset: Preset) -> SchedulerMixin:
        """The sampler of a preset, on the model's schedule."""
        scheduler = self.default_scheduler()
        return scheduler if preset.scheduler_class is None else preset.scheduler_class.from_config(scheduler.config)

    # -------------------------------------------------------------------------------------------------------- helpers

    def call_back(
        self, state: GenerationState, step: int, num_steps: int, tokens: Tensor, hidden: Tensor
    ) -> tuple[Tensor, bool]:
        """Shows the tokens `(B, N, C)` of a step to the caller; returns those to go on with, and whether to stop."""
        if state.callback is None:
            return tokens, False
        partial = self._as_latents(tokens)
        changed = check_callback_changes(state.callback(step, num_steps, partial, hidden.clone()), partial)
        if "guidance_scale" in changed:
            state.guidance_scale = changed["guidance_scale"]
            check_guidance(state.guidance_scale, state.guidance_schedule, state.guidance_interval)
            if state.guidance_scale > 1 and not state.is_guided:
                raise ValueError(
                    "`callback` must leave guidance off in a call that began without; got `guidance_scale` "
                    f"{state.guidance_scale}. Begin with one above 1."
                )
        return changed["latents"].to(tokens).flatten(2).transpose(1, 2), changed["interrupt"]

    def _known_tokens(
        self, input_ids: Tensor, latents: Tensor | None, latent_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Known tokens `(B, N, C)`, float32 and 0 at hidden places, and the mask `(B, N)` of hidden ones."""
        batch, device, num_latents = len(input_ids), input_ids.device, self.config.num_latents
        if latents is None:
            tokens = torch.zeros(batch, num_latents, self.config.latent_channels, device=device, dtype=torch.float32)
            return tokens, torch.ones(batch, num_latents, dtype=torch.bool, device=device)
        latent_mask = latent_mask.to(device)
        tokens = latents.to(device, torch.float32).flatten(2).transpose(1, 2)
        # What stood at hidden places is shown to no one, the callback included.
        return tokens.masked_fill(latent_mask[..., None], 0.0), latent_mask

    def _as_latents(self, tokens: Tensor) -> Tensor:
        size = self.config.latent_size
        return tokens.transpose(1, 2).reshape(len(tokens), -1, size, size)


def start_schedule(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    """Sets a scheduler's timesteps, the first one to be taken next."""
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
    except ValueError as error:
        raise ValueError(
            f"`num_inference_steps` must be a number that {type(scheduler).__name__} takes; got "
            f"{num_inference_steps} ({shorten(error)}). Take more steps, or another scheduler."
        ) from error
    # A scheduler that looks its first timestep up begins with the second of those that round to the same one, as with
    # Karras sigmas, and then has one step too few.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def rows_at(states: Tensor, positions: Tensor) -> Tensor:
    """Rows of `(rows, N, D)` at `(rows, K)`: `(rows, K, D)`."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def _diffusion_steps(num_inference_steps: int | tuple[int, int], num_ar_steps: int) -> list[int]:
    """Diffusion steps of each autoregressive step: from a pair's first number evenly to its second."""
    if isinstance(num_inference_steps, numbers.Integral):
        return [num_inference_steps] * num_ar_steps
    first, last = num_inference_steps
    return [round(first + (last - first) * index / max(1, num_ar_steps - 1)) for index in range(num_ar_steps)]


def _generator_per_image(
    generator: torch.Generator | list[torch.Generator] | None, batch: int
) -> list[torch.Generator]:
    """A generator for each image, seeded by the next number of the one that was given for it, alone or in a list."""
    is_list = isinstance(generator, (list, tuple))
    given = list(generator) if is_list else [generator] * batch
    if wrong := [own for own in given if (own is not None or is_list) and not isinstance(own, torch.Generator)]:
        raise ValueError(f"`generator` must be a torch.Generator or a list of them; got {shorten(wrong[0])}.")
    if len(given) != batch:
        raise ValueError(f"`generator` must hold one generator per image, {batch}; got {len(given)}.")
    seeded = []
    for own in given:
        device = "cpu" if own is None else own.device
        # One number at a time: several at once are other numbers on an accelerator.
        seed = int(torch.randint(0, MAX_SEED, (), generator=own, device=device))
        seeded.append(torch.Generator(device).manual_seed(seed))
    return seeded


def _stack_left_padded(
    input_ids: Tensor, attention_mask: Tensor | None, other_ids: Tensor, other_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Stacks two batches of token ids, the shorter one padded on the left."""
    width = max(input_ids.shape[1], other_ids.shape[1])
    ids, masks = [], []
    for row_ids, row_mask in ((input_ids, attention_mask), (other_ids, other_mask)):
        row_mask = torch.ones_like(row_ids) if row_mask is None else row_mask
        missing = width - row_ids.shape[1]
        ids.append(F.pad(row_ids, (missing, 0)))
        masks.append(F.pad(row_mask, (missing, 0)))
    return torch.cat(ids), torch.cat(masks)
