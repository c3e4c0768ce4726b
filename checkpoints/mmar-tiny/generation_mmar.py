"""The masked autoregressive image loop (Sec. 3.3.1, "Pipeline"; Sec. 3.3.4)."""

import copy
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from .diffusion_mmar import cosine_alphas_cumprod
from .masking_mmar import sample_orders, shared_position_ids, tokens_per_step


MAX_SEED = 2**63 - 1
# How guidance goes over the autoregressive rounds: MAR's two.
GUIDANCE_SCHEDULES = ("constant", "linear")


class MMARImageGenerationMixin:
    """`generate_images` for a model with `model`, `diffusion_mlp`, `vae` and `config`."""

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
        num_inference_steps: int | None = None,
        scheduler: Any | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        latent_mask: Tensor | None = None,
        callback: Callable[[int, int, Tensor, Tensor], dict[str, Any] | None] | None = None,
        output_type: str = "pt",
        **kwargs,
    ) -> Tensor:
        r"""
        Draws pictures after a text prefix: N tokens per autoregressive step in random order, each by diffusion.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): The text before the picture, without image tokens,
                left padded.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 at padding.
            negative_input_ids (`torch.LongTensor` of shape `(B, L')`, *optional*): The null prompt; needed for
                guidance.
            negative_attention_mask (`torch.Tensor` of shape `(B, L')`, *optional*): 0 at padding.
            guidance_scale (`float`, *optional*): w in v = v_u + w (v_c - v_u); active above 1. Default from
                `config.image_generation`, like the two steps below.
            guidance_schedule (`str`, *optional*, defaults to `"constant"`): `"linear"` raises w from 1 to
                `guidance_scale` with the share of latents drawn by the end of each round, as MAR does.
            num_ar_steps (`int`, *optional*): Autoregressive rounds, between 1 and the number of hidden latents.
            num_inference_steps (`int`, *optional*): Diffusion steps per token.
            scheduler (diffusers scheduler, *optional*): Defaults to `default_scheduler()`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One per picture, or one from which a
                seed per picture is drawn: a picture does not depend on the others of its batch.
            latents (`torch.FloatTensor` of shape `(B, C, h, w)`, *optional*): Known tokens, where `latent_mask` is
                False (inpainting).
            latent_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True where to generate; equally many per
                picture. Defaults to everywhere.
            callback (`Callable`, *optional*): Called after each round with its index, the number of rounds, the
                partial latents `(B, C, h, w)` and the mask `(B, N)` of what is still hidden. It may return a dict with
                "latents" to go on with, and "interrupt", True to stop here.
            output_type (`str`, *optional*, defaults to `"pt"`): "pt" for pictures, "latent" for latents.

        Returns:
            `torch.FloatTensor`, float32: pictures `(B, 3, H, W)` in [-1, 1] or latents `(B, C, h, w)`.

        Raises:
            ValueError: For arguments outside their range, guidance without a null prompt, a scheduler of another
                prediction type, or latents that are NaN or infinite.
        """
        kwargs.pop("mm_token_type_ids", None)
        if kwargs:
            raise ValueError(f"unexpected arguments {sorted(kwargs)}; see the docstring of `generate_images`.")
        if self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "expected a model in eval mode: gradient checkpointing drops the cached prompt in training mode. Call "
                "`model.eval()` first."
            )
        if output_type not in ("pt", "latent"):
            raise ValueError(f"`output_type` must be 'pt' or 'latent'; got {output_type!r}.")
        defaults = self.config.image_generation
        guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        num_inference_steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        scheduler = self.default_scheduler() if scheduler is None else scheduler
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(
                f"`input_ids` must be a torch tensor of shape (B, L); got {got}. `MMARProcessor.generation_inputs` "
                "makes it."
            )
        batch, device = len(input_ids), input_ids.device
        num_latents, channels = self.config.num_latents, self.config.latent_channels
        self._check_image_arguments(
            input_ids, negative_input_ids, guidance_scale, num_inference_steps, num_ar_steps, scheduler
        )
        if guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"`guidance_schedule` must be one of {', '.join(GUIDANCE_SCHEDULES)}; got {guidance_schedule!r}."
            )
        for name, mask in (
            ("attention_mask", attention_mask),
            ("negative_attention_mask", negative_attention_mask),
        ):
            if mask is not None and not isinstance(mask, Tensor):
                raise ValueError(f"`{name}` must be a torch tensor; got {type(mask).__name__}.")
            if mask is not None and not bool(mask[:, -1].all()):
                raise ValueError(
                    f"`{name}` must end with 1 in every row: the picture follows the text, so prompts are padded on "
                    "the left; got right padding. `MMARProcessor.generation_inputs` pads so."
                )
        tokens, hidden = self._start(batch, latents, latent_mask, device)
        num_hidden = int(hidden[0].sum())
        num_ar_steps = min(defaults["num_ar_steps"], num_hidden) if num_ar_steps is None else num_ar_steps
        counts = tokens_per_step(num_hidden, num_ar_steps)
        generators = _generator_per_image(generator, batch)
        # A scheduler has state: the caller's is left alone, and calls do not disturb each other.
        scheduler = copy.deepcopy(scheduler)

        # 1. The text prefix never sees the picture: its keys and values are made once, conditional rows first.
        guided = guidance_scale > 1
        if guided:
            input_ids, attention_mask = _stack_left_padded(
                input_ids, attention_mask, negative_input_ids, negative_attention_mask
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prefix = _Prefix(self.model, input_ids, attention_mask, num_latents)

        # 2. Hidden positions in a random order per picture, known ones never visited.
        orders = sample_orders(batch, num_latents, generators).to(device)
        visible = ~hidden.gather(1, orders)
        orders = orders.gather(1, visible.long().argsort(dim=1, stable=True))[:, :num_hidden]  # (B, num_hidden)

        start = 0
        for step, count in enumerate(counts):
            positions = orders[:, start : start + count]  # (B, count)
            start += count
            # 3. z of the next positions, given the text and the tokens so far.
            embeds = self.model.latent_encoder(tokens, hidden)
            z = prefix.run(embeds.repeat(2, 1, 1) if guided else embeds)
            index = positions.repeat(2, 1) if guided else positions
            z = z.gather(1, index[..., None].expand(-1, -1, z.shape[-1])).flatten(0, 1)  # (rows * count, D)
            # 4. The tokens, by diffusion.
            scale = guidance_scale if guided else None
            if guided and guidance_schedule == "linear":
                scale = 1 + (guidance_scale - 1) * start / num_hidden
            drawn = self._denoise(z, scale, scheduler, num_inference_steps, generators)
            drawn = drawn.view(batch, count, channels)
            tokens = tokens.scatter(1, positions[..., None].expand_as(drawn), drawn)
            hidden = hidden.scatter(1, positions, False)
            if callback is not None:
                partial = self._as_latents(tokens)
                changed = _checked_changes(callback(step, num_ar_steps, partial, hidden.clone()), partial)
                tokens = changed["latents"].to(tokens).flatten(2).transpose(1, 2)
                if changed["interrupt"]:
                    break

        latents = self._as_latents(tokens)
        if not bool(torch.isfinite(latents).all()):
            raise ValueError(
                "expected finite latents; got NaN or infinite values, from broken weights, the scheduler or an "
                "overflow. Lower `guidance_scale`, take the default scheduler, or run the model in bfloat16 or "
                "float32 instead of float16."
            )
        return latents if output_type == "latent" else self.decode_latents(latents)

    def _denoise(
        self,
        z: Tensor,
        guidance_scale: float | None,
        scheduler: Any,
        num_inference_steps: int,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Samples tokens `(M, C)` for conditions z `(M, D)`, or `(2 M, D)` with the unconditional half last."""
        num_tokens = len(z) // (1 if guidance_scale is None else 2)
        per_token = [item for item in generators for _ in range(num_tokens // len(generators))]
        shape = (num_tokens // len(generators), self.config.latent_channels)
        noise = [torch.randn(shape, generator=item, device=item.device).to(z.device) for item in generators]
        scheduler.set_timesteps(num_inference_steps, device=z.device)
        # float32 state: the network's output is cast before each update (Sec. 3.3.4).
        noisy_latents = torch.cat(noise) * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": per_token} if takes_generator else {}
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(noisy_latents, timestep)
            scaled = scaled if guidance_scale is None else scaled.repeat(2, 1)
            prediction = self.diffusion_mlp(scaled, timestep.expand(len(scaled)), z)
            if guidance_scale is not None:
                cond, uncond = prediction.chunk(2)
                prediction = uncond + guidance_scale * (cond - uncond)
            noisy_latents = scheduler.step(prediction, timestep, noisy_latents, **step_kwargs).prev_sample
        return noisy_latents

    def _start(
        self, batch: int, latents: Tensor | None, latent_mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        num_latents, channels = self.config.num_latents, self.config.latent_channels
        if (latents is None) != (latent_mask is None):
            raise ValueError(
                "expected `latents` and `latent_mask` together; pass both to keep known tokens, or neither."
            )
        if latents is None:
            tokens = torch.zeros(batch, num_latents, channels, device=device)
            return tokens, torch.ones(batch, num_latents, dtype=torch.bool, device=device)
        for name, value in (("latents", latents), ("latent_mask", latent_mask)):
            if not isinstance(value, Tensor):
                raise ValueError(f"`{name}` must be a torch tensor; got {type(value).__name__}.")
        if latent_mask.dtype != torch.bool:
            raise ValueError(f"`latent_mask` must be bool, True where to draw; got {latent_mask.dtype}.")
        size = self.config.latent_size
        if latents.shape != (batch, channels, size, size) or latent_mask.shape != (batch, num_latents):
            raise ValueError(
                f"`latents` and `latent_mask` must have the shapes {(batch, channels, size, size)} and "
                f"{(batch, num_latents)}; got {tuple(latents.shape)} and {tuple(latent_mask.shape)}."
            )
        counts = latent_mask.sum(-1)
        if int(counts.min()) != int(counts.max()) or int(counts[0]) == 0:
            raise ValueError(
                "`latent_mask` must hide the same number of latents, at least one, in every picture; got "
                f"{counts.tolist()}. Draw pictures with different masks one by one."
            )
        latent_mask = latent_mask.to(device)
        tokens = latents.to(device, torch.float32).flatten(2).transpose(1, 2)
        if not bool((torch.isfinite(tokens).all(-1) | latent_mask).all()):
            raise ValueError("expected finite latents where `latent_mask` is False; got NaN or infinite values.")
        # What stood at hidden places is shown to no one, the callback included.
        return tokens.masked_fill(latent_mask[..., None], 0.0), latent_mask

    def _as_latents(self, tokens: Tensor) -> Tensor:
        size = self.config.latent_size
        return tokens.transpose(1, 2).reshape(len(tokens), -1, size, size)

    def _check_image_arguments(
        self,
        input_ids: Tensor,
        negative_input_ids: Tensor | None,
        guidance_scale: float,
        num_inference_steps: int,
        num_ar_steps: int | None,
        scheduler: Any,
    ) -> None:
        diffusion = self.config.diffusion_config
        if not isinstance(guidance_scale, numbers.Real) or not 0 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be a finite number of at least 0; got {guidance_scale!r}.")
        for name, value in (("num_inference_steps", num_inference_steps), ("num_ar_steps", num_ar_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
                raise ValueError(f"`{name}` must be an integer; got {value!r}.")
        self._check_scheduler(scheduler)
        if not 1 <= num_inference_steps <= diffusion.num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` must be between 1 and {diffusion.num_train_timesteps}, the number of training "
                f"timesteps; got {num_inference_steps}."
            )
        spacing = scheduler.config.get("timestep_spacing")
        if num_inference_steps == 1 and spacing in ("linspace", "leading"):
            raise ValueError(
                f"`num_inference_steps` must be at least 2 with `timestep_spacing` {spacing!r}, whose only step is"
                " at the least noise; got 1. Set `timestep_spacing='trailing'` for a single step."
            )
        texts = [ids for ids in (input_ids, negative_input_ids) if ids is not None]
        if any(bool((ids == self.config.image_token_id).any()) for ids in texts):
            raise ValueError(
                "`input_ids` and `negative_input_ids` must be the text before the picture; got image tokens in it. "
                "`MMARProcessor.generation_inputs` makes the prefix."
            )
        if guidance_scale > 1 and negative_input_ids is None:
            raise ValueError(
                f"`guidance_scale` {guidance_scale} needs a null prompt; pass `negative_input_ids` (see "
                "`MMARProcessor.generation_inputs`) or set `guidance_scale=1`."
            )
        if guidance_scale > 1 and len(negative_input_ids) != len(input_ids):
            raise ValueError(
                f"`negative_input_ids` must hold one null prompt per picture, {len(input_ids)}; got "
                f"{len(negative_input_ids)}."
            )
        longest = max(input_ids.shape[1], 0 if negative_input_ids is None else negative_input_ids.shape[1])
        limit = self.config.text_config.max_position_embeddings
        if longest + 1 > limit:
            raise ValueError(f"the prompt must be shorter than {limit} tokens; got {longest}. Shorten it.")

    def _check_scheduler(self, scheduler: Any) -> None:
        diffusion = self.config.diffusion_config
        if not isinstance(scheduler, SchedulerMixin):
            raise ValueError(
                "`scheduler` must be a diffusers scheduler, such as "
                f"`DDIMScheduler.from_config(pipe.scheduler.config)`; got {scheduler!r}."
            )
        # What a scheduler does not take, `from_config` carries along unused.
        taken = inspect.signature(type(scheduler).__init__).parameters
        prediction_type = scheduler.config.get("prediction_type") if "prediction_type" in taken else None
        if prediction_type != diffusion.prediction_type:
            raise ValueError(
                f"the scheduler must have `prediction_type` {diffusion.prediction_type!r}, which the model predicts; "
                f"got {prediction_type!r}. Make it with `from_config(pipe.scheduler.config)`."
            )
        if "beta_schedule" not in taken or "Inverse" in type(scheduler).__name__:
            raise ValueError(
                "the scheduler must step down the noise schedule that the model was trained with; "
                f"{type(scheduler).__name__} does not. Take DDPM, DDIM, DPMSolverMultistep or another with a "
                "`beta_schedule`."
            )
        expected = {
            "use_flow_sigmas": False,
            "num_train_timesteps": diffusion.num_train_timesteps,
            "beta_schedule": diffusion.beta_schedule,
            "clip_sample": False,
            "thresholding": False,
        }
        for name, value in expected.items():
            if name in taken and scheduler.config.get(name) != value:
                raise ValueError(
                    f"the scheduler must have `{name}` {value!r}, as the model was trained; got "
                    f"{scheduler.config.get(name)!r}. Make it with `from_config(pipe.scheduler.config)`."
                )
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is not None:
            trained = cosine_alphas_cumprod(diffusion.num_train_timesteps)
            # diffusers multiplies the same betas up in float32: 2e-5 apart at most.
            if not torch.allclose(alphas_cumprod.cpu().float(), trained, rtol=0, atol=1e-3):
                raise ValueError(
                    "the scheduler must have the noise schedule that the model was trained with; got other "
                    "`alphas_cumprod` (from `trained_betas`?). Make it with "
                    "`from_config(pipe.scheduler.config)`."
                )


class _Prefix:
    """Keys and values of the text before the pictures, and the LLM on the pictures' tokens behind it."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor, num_latents: int):
        self.language_model = model.language_model
        self.cache = DynamicCache(config=self.language_model.config)
        no_image = torch.zeros_like(input_ids, dtype=torch.bool)
        position_ids = shared_position_ids(no_image, num_latents, attention_mask)
        self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        # All tokens of the picture share the position after the text.
        self.position_ids = (position_ids[:, -1:] + 1).expand(-1, num_latents)
        visible = F.pad(attention_mask.bool(), (0, num_latents), value=True)
        self.visible = visible[:, None, None, :].expand(-1, 1, num_latents, -1)  # (rows, 1, N, P + N)

    def run(self, embeds: Tensor) -> Tensor:
        """z `(rows, N, D)` of image token embeddings `(rows, N, D)`; the cache is left as it was."""
        mask = self.visible
        if self.language_model.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(
                ~mask, torch.finfo(embeds.dtype).min
            )
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": mask},
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            image_token_mask=torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device),
        ).last_hidden_state
        self.cache.crop(-embeds.shape[1])
        return output


def _generator_per_image(
    generator: torch.Generator | list[torch.Generator] | None, batch: int
) -> list[torch.Generator]:
    entries = generator if isinstance(generator, (list, tuple)) else [generator]
    is_list = isinstance(generator, (list, tuple))
    if wrong := [e for e in entries if (e is not None or is_list) and not isinstance(e, torch.Generator)]:
        raise ValueError(f"`generator` must be a torch.Generator or a list of them; got {wrong[0]!r}.")
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch:
            raise ValueError(f"`generator` must hold one generator per picture, {batch}; got {len(generator)}.")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(0, MAX_SEED, (batch,), generator=generator, device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _checked_changes(changed: Any, partial: Tensor) -> dict[str, Any]:
    """What a callback returned, completed: "latents" of the shape of `partial`, and "interrupt"."""
    changed = {} if changed is None else changed
    if not isinstance(changed, dict):
        raise ValueError(
            f"the callback must return None or a dict; got {type(changed).__name__}. Return the `callback_kwargs` that"
            " it was given."
        )
    if unknown := sorted(changed.keys() - {"latents", "latent_mask", "interrupt"}):
        raise ValueError(f"the callback may return `latents` and `interrupt`; got {', '.join(map(str, unknown))}.")
    latents = changed.get("latents", partial)
    if not isinstance(latents, Tensor) or latents.shape != partial.shape:
        got = f"{tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"the callback must return latents as a tensor of the shape {tuple(partial.shape)} that it was given; got "
            f"{got}."
        )
    if latents is not partial and not bool(torch.isfinite(latents).all()):
        raise ValueError("the callback must return finite latents; got NaN or infinite values.")
    return {"latents": latents, "interrupt": bool(changed.get("interrupt", False))}


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
