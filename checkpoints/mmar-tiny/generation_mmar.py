"""The masked autoregressive image loop (Sec. 3.3.1, "Pipeline"; Sec. 3.3.4)."""

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from .configuration_mmar import shorten, shorten_names
from .denoising_mmar import Denoiser
from .diffusion_mmar import cosine_alphas_cumprod
from .embedding_vit_mmar import MMARLatentEncoder
from .graphs_mmar import GraphCache, has_hooks
from .image_layers_mmar import ImageWeights, MergedContext, PlainContext, can_merge
from .masking_mmar import ORDERS, sample_orders, tokens_per_step
from .packed_linear_mmar import packed_linears


MAX_SEED = 2**63 - 1
# Shapes of EmbeddingViT over the rounds of a picture: more of them pad less, and come again less often.
NUM_BUCKETS = 8
# How guidance goes over the autoregressive rounds: MAR's two.
GUIDANCE_SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class Preset:
    r"""
    How much is spent on a picture.

    Args:
        rounds_per_latent (`float`): Autoregressive rounds by the number of latents: 1 draws one at a time.
        num_inference_steps (`int` or `tuple[int, int]`): Diffusion steps per token, or those of the first and last
            round.
        scheduler_class (`type`, *optional*): diffusers' sampler; the model's by default.
    """

    rounds_per_latent: float
    num_inference_steps: int | tuple[int, int]
    scheduler_class: type | None = None


PRESETS = {
    "paper": Preset(1.0, 100),  # Sec. 4.6: 256 x 100
    "balanced": Preset(1 / 4, (50, 5)),
    "fast": Preset(1 / 8, 10, DPMSolverMultistepScheduler),
}


@dataclass
class ImageRun:
    r"""
    What a call of `generate_images` draws by: its arguments, checked and completed.

    Args:
        context (`PlainContext` or `MergedContext`): The text, and the language model behind it; with guidance all rows
            with the caption, then all with the null prompt.
        tokens (`torch.FloatTensor` of shape `(B, N, C)`): Known latents, 0 elsewhere.
        hidden (`torch.BoolTensor` of shape `(B, N)`): True where to draw.
        num_hidden (`int`): How many of each picture.
        generators (`list[torch.Generator]`): One per picture.
        is_guided (`bool`): Whether there is guidance.
        guidance_scale, guidance_schedule, guidance_interval, num_ar_steps, num_inference_steps, order, scheduler,
            callback: Of `generate_images`.
    """

    context: PlainContext
    tokens: Tensor
    hidden: Tensor
    num_hidden: int
    generators: list[torch.Generator]
    is_guided: bool
    guidance_scale: float
    guidance_schedule: str
    guidance_interval: tuple[float, float]
    num_ar_steps: int
    num_inference_steps: int | tuple[int, int]
    order: str
    scheduler: SchedulerMixin
    callback: Callable[[int, int, Tensor, Tensor], dict[str, Any] | None] | None

    def scales(self, drawn_share: float, num_steps: int) -> list[float]:
        """Guidance of each diffusion step, once so much of the picture is drawn; 1 outside the interval of shares."""
        # A callback may have turned guidance off.
        scale = max(1.0, float(self.guidance_scale))
        if self.guidance_schedule == "linear":
            scale = 1 + (scale - 1) * drawn_share
        first, last = self.guidance_interval
        return [scale if first <= (step + 0.5) / num_steps < last else 1.0 for step in range(num_steps)]


class RoundEncoder:
    r"""
    The latent encoder, round after round with more known tokens; where they can be graphs, in `NUM_BUCKETS` shapes.

    Args:
        latent_encoder (`MMARLatentEncoder`): It.
    """

    def __init__(self, latent_encoder: MMARLatentEncoder):
        self._latent_encoder, self._graphs = latent_encoder, GraphCache()
        self._is_hooked = has_hooks(latent_encoder)

    def __call__(self, tokens: Tensor, hidden: Tensor, num_known: int) -> Tensor:
        r"""
        Args:
            tokens (`torch.FloatTensor` of shape `(B, N, C)`): Latents; hidden ones are never read.
            hidden (`torch.BoolTensor` of shape `(B, N)`): True where a latent is hidden.
            num_known (`int`): How many are not, in each picture.

        Returns:
            `torch.FloatTensor` of shape `(B, N, D)`.
        """
        if self._is_hooked or num_known == 0 or not GraphCache.is_capturable(tokens):
            return self._latent_encoder(tokens, hidden, num_known)
        size = -(-hidden.shape[1] // NUM_BUCKETS)
        num_slots = min(-(-num_known // size) * size, hidden.shape[1])
        return self._graphs.run(self._encode, num_slots, tokens, hidden)

    def _encode(self, num_slots: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        return self._latent_encoder(tokens, hidden, num_slots=num_slots)


class MMARImageGenerationMixin:
    """`generate_images` for a model with `model`, `diffusion_mlp` as its `image_head`, `vae` and `config`."""

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

    def token_sampler(self, scheduler: Any, num_inference_steps: int, device: torch.device) -> Denoiser:
        """What draws the tokens of a round from their z."""
        return Denoiser(self.diffusion_mlp, scheduler, num_inference_steps, device)

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

    def num_rounds(self, preset: Preset, num_hidden: int) -> int:
        """A preset's autoregressive rounds for pictures with `num_hidden` latents to draw."""
        return min(max(1, round(preset.rounds_per_latent * self.config.num_latents)), num_hidden)

    def preset_scheduler(self, preset: Preset) -> SchedulerMixin:
        """The sampler of a preset, on the model's schedule."""
        scheduler = self.default_scheduler()
        return scheduler if preset.scheduler_class is None else preset.scheduler_class.from_config(scheduler.config)

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
        merge_image_weights: bool | None = None,
        height: int | None = None,
        width: int | None = None,
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
            num_inference_steps (`int` or `tuple[int, int]`, *optional*): Diffusion steps per token, or those of the
                first and the last round, with even changes between: later tokens are surer.
            scheduler (diffusers scheduler, *optional*): Defaults to the preset's, or `default_scheduler()`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One for all images, or one per image.
                The next number of an image's generator is its seed, so that a generator gives the same image alone and
                in a list. In float32 an image does not depend on the others of its batch; in bfloat16 rounding does.
            latents (`torch.FloatTensor` of shape `(B, C, h, w)`, *optional*): Known tokens, where `latent_mask` is
                False (inpainting).
            latent_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True where to generate; equally many per
                picture. Defaults to everywhere.
            callback (`Callable`, *optional*): Called after each round with its index, the number of rounds, the
                partial latents `(B, C, h, w)` and the mask `(B, N)` of what is still hidden. It may return a dict with
                "latents" to go on with, "guidance_scale" of what follows (in a call that began with guidance), and
                "interrupt", True to stop here.
            output_type (`str`, *optional*, defaults to `"pt"`): "pt" for pictures, "latent" for latents.
            preset (`str`, *optional*): A key of `PRESETS`, for the two step numbers and the scheduler; what is given
                wins.
            order (`str`, *optional*, defaults to `"random"`): Of the latents; one of `ORDERS`.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): The diffusion steps that
                are guided, as shares of all of them from the noisiest on (arXiv 2404.07724); the others are
                conditional only, and cheaper.
            merge_image_weights (`bool`, *optional*): Run image tokens by weights with PLoRA merged in, where that is
                possible: the same up to rounding and faster, for a second copy of the language model's layers in
                memory. The copy is kept for the next call until `train()` is called. By default where the accelerator
                has room for it.
            height, width (`int`, *optional*): As diffusers' pipelines have them; only `config.image_size`.

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
            raise ValueError(f"`output_type` must be 'pt' or 'latent'; got {shorten(output_type)}.")
        defaults = self.config.image_generation
        guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        chosen = self.image_preset(preset)
        num_inference_steps = chosen.num_inference_steps if num_inference_steps is None else num_inference_steps
        scheduler = self.preset_scheduler(chosen) if scheduler is None else scheduler
        vocab_size = self.config.text_config.vocab_size
        _check_prompt("", input_ids, attention_mask, vocab_size)
        if negative_input_ids is not None:
            _check_prompt("negative_", negative_input_ids, negative_attention_mask, vocab_size)
        _check_guidance(guidance_scale, guidance_schedule, guidance_interval)
        for name, value in (("height", height), ("width", width)):
            if value is not None and (not _is_integer(value) or value != self.config.image_size):
                raise ValueError(
                    f"`{name}` must be {self.config.image_size}, the size of all images of this model; got "
                    f"{shorten(value)}. Leave it out, and resize the image."
                )
        if not isinstance(order, str) or order not in ORDERS:
            raise ValueError(f"`order` must be one of {', '.join(ORDERS)}; got {shorten(order)}.")
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback` must be callable; got {shorten(callback)}.")
        if merge_image_weights is not None and not isinstance(merge_image_weights, bool):
            raise ValueError(f"`merge_image_weights` must be True, False or None; got {shorten(merge_image_weights)}.")
        batch, device = len(input_ids), input_ids.device
        num_latents = self.config.num_latents
        self._check_image_arguments(
            input_ids, negative_input_ids, guidance_scale, num_inference_steps, num_ar_steps, scheduler
        )
        tokens, hidden = self._start(batch, latents, latent_mask, device)
        num_hidden = int(hidden[0].sum())
        num_ar_steps = self.num_rounds(chosen, num_hidden) if num_ar_steps is None else num_ar_steps

        # 1. The text prefix never sees the picture: its keys and values are made once, conditional rows first.
        is_guided = guidance_scale > 1
        if is_guided:
            input_ids, attention_mask = _stack_left_padded(
                input_ids, attention_mask, negative_input_ids, negative_attention_mask
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        language_model = self.model.language_model
        if merge_image_weights is None:
            merge_image_weights = ImageWeights.fit(language_model)
        is_merged = merge_image_weights and can_merge(language_model)
        context_class = MergedContext if is_merged else PlainContext
        run = ImageRun(
            context=context_class(language_model, input_ids, attention_mask, num_latents),
            tokens=tokens,
            hidden=hidden,
            num_hidden=num_hidden,
            generators=_generator_per_image(generator, batch),
            is_guided=is_guided,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_interval=guidance_interval,
            num_ar_steps=num_ar_steps,
            num_inference_steps=num_inference_steps,
            order=order,
            scheduler=scheduler,
            callback=callback,
        )

        # 2.-4. The picture's tokens behind it.
        try:
            tokens = self.draw_tokens(run)
        finally:
            del run
            if hasattr(self, "_hf_hook"):
                # The model is offloaded as a whole, and the copy would stay.
                ImageWeights.drop(language_model)

        latents = self._as_latents(tokens)
        if not bool(torch.isfinite(latents).all()):
            raise ValueError(
                "expected finite latents; got NaN or infinite values, from broken weights, the scheduler or an "
                "overflow. Lower `guidance_scale`, take the default scheduler, or run the model in bfloat16 or "
                "float32 instead of float16."
            )
        return latents if output_type == "latent" else self.decode_latents(latents)

    def draw_tokens(self, run: ImageRun) -> Tensor:
        r"""
        Draws the hidden tokens of pictures, a few at a time.

        Args:
            run (`ImageRun`): What by.

        Returns:
            `torch.FloatTensor` of shape `(B, N, C)`.
        """
        tokens, hidden, num_hidden = run.tokens, run.hidden, run.num_hidden
        batch, num_latents, channels = tokens.shape
        counts = tokens_per_step(num_hidden, run.num_ar_steps)
        steps_of_rounds = _steps_of_rounds(run.num_inference_steps, run.num_ar_steps)
        samplers = {
            number: self.token_sampler(run.scheduler, number, tokens.device) for number in sorted(set(steps_of_rounds))
        }

        # 2. Hidden positions in a random order per picture, known ones never visited.
        orders = sample_orders(batch, num_latents, run.generators, run.order).to(tokens.device)
        visible = ~hidden.gather(1, orders)
        orders = orders.gather(1, visible.long().argsort(dim=1, stable=True))[:, :num_hidden]  # (B, num_hidden)

        encoder = RoundEncoder(self.model.latent_encoder)
        start, branches = 0, 2 if run.is_guided else 1
        # About so many rows pass the head and, half of the latents known, EmbeddingViT at once.
        head_rows, vit_rows = branches * batch * num_hidden // run.num_ar_steps, batch * num_latents // 2
        packed_head = packed_linears(self.image_head, head_rows)
        packed_encoder = packed_linears(self.model.latent_encoder, vit_rows)
        with packed_head, packed_encoder:
            for step, count in enumerate(counts):
                positions = orders[:, start : start + count]  # (B, count)
                # 3. z of the next positions, given the text and the tokens so far.
                embeds = encoder(tokens, hidden, num_latents - num_hidden + start)
                z = run.context.run(embeds.repeat(branches, 1, 1), positions.repeat(branches, 1))
                z = z.flatten(0, 1)  # (branches * B * count, D)
                start += count
                # 4. The tokens, by diffusion.
                sampler = samplers[steps_of_rounds[step]]
                scales = run.scales(start / num_hidden, sampler.num_steps) if run.is_guided else None
                drawn = sampler(z, scales, run.generators).view(batch, count, channels)
                tokens = tokens.scatter(1, positions[..., None].expand_as(drawn), drawn)
                hidden = hidden.scatter(1, positions, False)
                tokens, is_interrupted = self.call_back(run, step, run.num_ar_steps, tokens, hidden)
                if is_interrupted:
                    break
        return tokens

    def call_back(
        self, run: ImageRun, step: int, num_steps: int, tokens: Tensor, hidden: Tensor
    ) -> tuple[Tensor, bool]:
        """Shows a round's tokens `(B, N, C)` to the caller: what to go on with, and whether to stop."""
        if run.callback is None:
            return tokens, False
        partial = self._as_latents(tokens)
        changed = _checked_changes(run.callback(step, num_steps, partial, hidden.clone()), partial)
        if "guidance_scale" in changed:
            run.guidance_scale = changed["guidance_scale"]
            _check_guidance(run.guidance_scale, run.guidance_schedule, run.guidance_interval)
            if run.guidance_scale > 1 and not run.is_guided:
                raise ValueError(
                    f"the callback must leave guidance off in a call that began without; got `guidance_scale` "
                    f"{run.guidance_scale}. Begin with one above 1."
                )
        return changed["latents"].to(tokens).flatten(2).transpose(1, 2), changed["interrupt"]

    def _start(
        self, batch: int, latents: Tensor | None, latent_mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        num_latents, channels = self.config.num_latents, self.config.latent_channels
        if (latents is None) != (latent_mask is None):
            raise ValueError(
                "expected `latents` and `latent_mask` together; pass both to keep known tokens, or neither."
            )
        if latents is None:
            tokens = torch.zeros(batch, num_latents, channels, device=device, dtype=torch.float32)
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
        num_inference_steps: int | tuple[int, int],
        num_ar_steps: int | None,
        scheduler: Any,
    ) -> None:
        diffusion = self.config.diffusion_config
        is_pair = isinstance(num_inference_steps, (tuple, list)) and len(num_inference_steps) == 2
        numbers_of_steps = num_inference_steps if is_pair else [num_inference_steps]
        if not all(map(_is_integer, numbers_of_steps)):
            raise ValueError(
                f"`num_inference_steps` must be an integer; got {shorten(num_inference_steps)}. Two of them, in a "
                "tuple, are the steps of the first and of the last round."
            )
        if num_ar_steps is not None and not _is_integer(num_ar_steps):
            raise ValueError(f"`num_ar_steps` must be an integer; got {shorten(num_ar_steps)}.")
        self._check_scheduler(scheduler)
        if not all(1 <= number <= diffusion.num_train_timesteps for number in numbers_of_steps):
            raise ValueError(
                f"`num_inference_steps` must be between 1 and {diffusion.num_train_timesteps}, the number of training "
                f"timesteps; got {num_inference_steps}."
            )
        spacing = scheduler.config.get("timestep_spacing")
        if min(numbers_of_steps) == 1 and spacing in ("linspace", "leading"):
            raise ValueError(
                f"`num_inference_steps` must be at least 2 with `timestep_spacing` {shorten(spacing)}, whose only "
                "step is at the least noise; got 1. Set `timestep_spacing='trailing'` for a single step."
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
                f"`DDIMScheduler.from_config(pipe.scheduler.config)`; got {shorten(scheduler)}."
            )
        # What a scheduler does not take, `from_config` carries along unused.
        taken = inspect.signature(type(scheduler).__init__).parameters
        prediction_type = scheduler.config.get("prediction_type") if "prediction_type" in taken else None
        if prediction_type != diffusion.prediction_type:
            raise ValueError(
                f"the scheduler must have `prediction_type` {shorten(diffusion.prediction_type)}, which the model "
                f"predicts; got {shorten(prediction_type)}. Make it with `from_config(pipe.scheduler.config)`."
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
                    f"the scheduler must have `{name}` {shorten(value)}, as the model was trained; got "
                    f"{shorten(scheduler.config.get(name))}. Make it with `from_config(pipe.scheduler.config)`."
                )
        variance_type = scheduler.config.get("variance_type") if "variance_type" in taken else None
        if str(variance_type).startswith("learned"):
            raise ValueError(
                "the scheduler must have a fixed `variance_type`, since the model predicts no variance; got "
                f"{shorten(variance_type)}. Make it with `from_config(pipe.scheduler.config, "
                "variance_type='fixed_small')`."
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


def _steps_of_rounds(num_inference_steps: int | tuple[int, int], num_rounds: int) -> list[int]:
    """Diffusion steps of each round: a pair's first number, evenly towards its second."""
    if isinstance(num_inference_steps, numbers.Integral):
        return [num_inference_steps] * num_rounds
    first, last = num_inference_steps
    return [round(first + (last - first) * index / max(1, num_rounds - 1)) for index in range(num_rounds)]


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_prompt(prefix: str, ids: Any, mask: Any, vocab_size: int) -> None:
    """Raises a `ValueError` if token ids, or the mask beside them, are not those of a text before a picture."""
    name, mask_name = f"{prefix}input_ids", f"{prefix}attention_mask"
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"`{name}` must be a torch tensor of shape (B, L), at least one row and one token; got {got}. "
            "`MMARProcessor.generation_inputs` makes it."
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers; got {ids.dtype}. `MMARProcessor.generation_inputs` makes them.")
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`{name}` must be in [0, {vocab_size}), the model's vocabulary; got {lowest if lowest < 0 else highest}. "
            "Take tokenizer and model from one folder."
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise ValueError(f"`{mask_name}` must be a torch tensor; got {type(mask).__name__}.")
    if mask.shape != ids.shape:
        raise ValueError(
            f"`{mask_name}` must have the shape {tuple(ids.shape)} of `{name}`; got {tuple(mask.shape)}. "
            "`MMARProcessor.generation_inputs` makes both."
        )
    if not bool(mask[:, -1].all()):
        raise ValueError(
            f"`{mask_name}` must end with 1 in every row: the picture follows the text, so prompts are padded on the "
            "left; got right padding. `MMARProcessor.generation_inputs` pads so."
        )


def _check_guidance(scale: Any, schedule: Any, interval: Any) -> None:
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool) or not 0 <= scale < math.inf:
        raise ValueError(f"`guidance_scale` must be a finite number of at least 0; got {shorten(scale)}.")
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(
            f"`guidance_schedule` must be one of {', '.join(GUIDANCE_SCHEDULES)}; got {shorten(schedule)}."
        )
    is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2
    if not is_pair or not all(isinstance(share, numbers.Real) for share in interval):
        raise ValueError(f"`guidance_interval` must be two shares of the diffusion steps; got {shorten(interval)}.")
    if not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"`guidance_interval` must be two different shares in [0, 1], the lesser first; got {shorten(interval)}. "
            "`guidance_scale=1` turns guidance off."
        )


def _generator_per_image(
    generator: torch.Generator | list[torch.Generator] | None, batch: int
) -> list[torch.Generator]:
    """A generator for each image, seeded by the next number of the one that was given for it, alone or in a list."""
    is_list = isinstance(generator, (list, tuple))
    given = list(generator) if is_list else [generator] * batch
    if wrong := [own for own in given if (own is not None or is_list) and not isinstance(own, torch.Generator)]:
        raise ValueError(f"`generator` must be a torch.Generator or a list of them; got {shorten(wrong[0])}.")
    if len(given) != batch:
        raise ValueError(f"`generator` must hold one generator per picture, {batch}; got {len(given)}.")
    seeded = []
    for own in given:
        device = "cpu" if own is None else own.device
        # One number at a time: several at once are other numbers on an accelerator.
        seed = int(torch.randint(0, MAX_SEED, (), generator=own, device=device))
        seeded.append(torch.Generator(device).manual_seed(seed))
    return seeded


def _checked_changes(changed: Any, partial: Tensor) -> dict[str, Any]:
    """What a callback returned, with "latents" of the shape of `partial` and "interrupt" in any case."""
    changed = {} if changed is None else changed
    if not isinstance(changed, dict):
        raise ValueError(
            f"the callback must return None or a dict; got {type(changed).__name__}. Return the `callback_kwargs` that"
            " it was given."
        )
    if unknown := sorted(changed.keys() - {"latents", "latent_mask", "guidance_scale", "interrupt"}):
        raise ValueError(
            f"the callback may return `latents`, `guidance_scale` and `interrupt`; got {shorten_names(unknown)}."
        )
    latents = changed.get("latents", partial)
    if not isinstance(latents, Tensor) or latents.shape != partial.shape:
        got = f"{tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"the callback must return latents as a tensor of the shape {tuple(partial.shape)} that it was given; got "
            f"{got}."
        )
    if latents is not partial and not bool(torch.isfinite(latents).all()):
        raise ValueError("the callback must return finite latents; got NaN or infinite values.")
    return {**changed, "latents": latents, "interrupt": bool(changed.get("interrupt", False))}


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
