"""
What the public entries of MMAR accept: one function for each. Nothing is checked again further inside.

Values of tensors are looked at where that costs no waiting for a device, and not while a graph is traced.
"""

import inspect
import math
import numbers
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from transformers.utils import is_tracing

from .configuration_mmar import IGNORE_INDEX, MMARConfig, shorten, shorten_names
from .diffusion_mmar import cosine_alphas_cumprod
from .masking_mmar import ORDERS, BatchCounts


# How guidance changes over the autoregressive steps: MAR's two schedules.
GUIDANCE_SCHEDULES = ("constant", "linear")
# What a callback of image generation may return. The mask is shown to it, and handed back without effect.
CALLBACK_CHANGES = ("latents", "guidance_scale", "interrupt")


# Largest absolute pixel value that is taken for [-1, 1]: resampled floats may overshoot a little.
MAX_PIXEL_VALUE = 1.1


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _looks_at_values(tensor: Tensor) -> bool:
    """Whether a tensor's values are checked: on a CPU, which does not have to be waited for, and outside of graphs."""
    return tensor.device.type == "cpu" and not is_tracing()


def check_one_of(**given: Any) -> None:
    """Raises a `ValueError` unless exactly one of these is given."""
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"expected exactly one of {' and '.join(f'`{name}`' for name in given)}; pass one of them.")


def check_forward(
    config: MMARConfig,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    attention_mask: Any = None,
    image_token_mask: Any = None,
    labels: Any = None,
    pixel_values: Any = None,
    latents: Any = None,
    latent_mask: Any = None,
) -> None:
    """Raises a `ValueError` if inputs of `forward` are no tensors, or their types and shapes do not fit together."""
    given = dict(locals())
    del given["config"]
    if isinstance(attention_mask, dict):
        del given["attention_mask"]
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(
                f"`{name}` must be a torch tensor; got {type(value).__name__}. `MMARProcessor` makes tensors with "
                '`return_tensors="pt"`; pass them as `**inputs`.'
            )
    for name in ("input_ids", "image_token_mask", "labels"):
        value = given[name]
        if value is not None and value.ndim != 2:
            raise ValueError(f"`{name}` must have the shape (B, L); got {tuple(value.shape)}. Add the batch axis.")
    inputs = input_ids if input_ids is not None else inputs_embeds
    if labels is not None and inputs is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"`labels` must have the shape {tuple(inputs.shape[:2])} of the inputs, {IGNORE_INDEX} where nothing is "
            f"predicted; got {tuple(labels.shape)}."
        )
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2 and inputs is not None:
        if mask.shape[0] != inputs.shape[0] or mask.shape[1] < inputs.shape[1]:
            raise ValueError(
                f"`attention_mask` must have a row and column per token, cached ones included, at least "
                f"{tuple(inputs.shape[:2])}; got {tuple(mask.shape)}."
            )
    for name, allowed in (("input_ids", None), ("labels", IGNORE_INDEX)):
        _check_ids(name, given[name], allowed, config.text_config.vocab_size)
    if pixel_values is not None and latents is not None:
        raise ValueError("expected at most one of `pixel_values` and `latents`; pass one of them.")
    if latents is not None:
        check_latents(latents, latent_mask, config)
    elif latent_mask is not None and pixel_values is not None:
        _check_latent_mask(latent_mask, len(pixel_values), config)


def _check_ids(name: str, ids: Tensor | None, allowed: int | None, vocab_size: int) -> None:
    if ids is None:
        return
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers; got {ids.dtype}.")
    # Not in each decoding step.
    if ids.shape[1] > 1 and _looks_at_values(ids):
        wrong = ((ids < 0) | (ids >= vocab_size)) & (ids != allowed if allowed else True)
        if bool(wrong.any()):
            raise ValueError(
                f"`{name}` must be in [0, {vocab_size}), the model's vocabulary"
                + (f", or {allowed}" if allowed else "")
                + f"; got {int(ids[wrong][0])}. Take tokenizer and model from one folder."
            )


def check_image_tokens(
    image_token_mask: Tensor | None, image_embeds: Tensor | None, config: MMARConfig, counts: BatchCounts | None
) -> None:
    """Raises a `ValueError` if image tokens and images do not match in number, or a row has part of an image."""
    if (image_token_mask is None and image_embeds is None) or is_tracing():
        return
    num_images = 0 if image_embeds is None else len(image_embeds)
    if counts is not None:
        rows = counts.num_image_tokens
    else:
        rows = [] if image_token_mask is None else image_token_mask.sum(-1).tolist()
    if sum(rows) != num_images * config.num_latents:
        raise ValueError(
            f"expected {config.num_latents} image tokens (id {config.image_token_id}) for each of the {num_images} "
            f"images given; got {sum(rows)} image tokens. Give one image per image mark of the text; `MMARProcessor` "
            "expands the marks."
        )
    if any(number % config.num_latents for number in rows):
        raise ValueError(
            f"expected complete images, {config.num_latents} image tokens each, in each row; got {rows} image tokens. "
            "Do not truncate a text inside of an image."
        )


def check_pixel_values(pixel_values: Tensor, config: MMARConfig) -> None:
    """Raises a `ValueError` if images have another size than the config's, or values outside of [-1, 1]."""
    size = config.image_size
    if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
        raise ValueError(
            f"`pixel_values` must have the shape (num_images, 3, {size}, {size}); got {tuple(pixel_values.shape)}. "
            "`MMARImageProcessor` resizes images."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` must be floating point, in [-1, 1]; got {pixel_values.dtype}. `MMARImageProcessor` "
            "scales images."
        )
    # NaN fails the comparison too.
    if _looks_at_values(pixel_values) and not bool((pixel_values.abs() <= MAX_PIXEL_VALUE).all()):
        raise ValueError(
            f"`pixel_values` must be finite and in [-1, 1]; got values up to {float(pixel_values.abs().max())}. "
            "`MMARImageProcessor` scales images; bytes are x / 127.5 - 1."
        )


def check_latents(latents: Tensor, latent_mask: Tensor | None, config: MMARConfig) -> None:
    """Raises a `ValueError` if latents have another shape than the config's, or known ones are not finite."""
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    if latents.shape[1:] != shape:
        raise ValueError(
            f"`latents` must have the shape {('num_images', *shape)}, as `encode_images` makes them; got "
            f"{tuple(latents.shape)}."
        )
    if latent_mask is not None:
        _check_latent_mask(latent_mask, len(latents), config)
    if _looks_at_values(latents):
        finite = torch.isfinite(latents).all(1).flatten(1)  # (I, N); hidden latents are never read
        if not bool((finite if latent_mask is None else finite | latent_mask).all()):
            raise ValueError("expected finite images or latents; got NaN or infinite values. Check the input.")


def _check_latent_mask(latent_mask: Tensor, num_images: int, config: MMARConfig) -> None:
    expected = (num_images, config.num_latents)
    if latent_mask.shape != expected or latent_mask.dtype != torch.bool:
        raise ValueError(
            f"`latent_mask` must be a bool tensor of shape {expected}, True where a latent is hidden; got "
            f"{latent_mask.dtype} of shape {tuple(latent_mask.shape)}."
        )


def check_generate_images(
    config: MMARConfig,
    input_ids: Any,
    attention_mask: Any,
    negative_input_ids: Any,
    negative_attention_mask: Any,
    guidance_scale: Any,
    guidance_schedule: Any,
    guidance_interval: Any,
    num_ar_steps: Any,
    num_inference_steps: Any,
    scheduler: Any,
    order: Any,
    callback: Any,
    fast: Any,
    output_type: Any,
    height: Any,
    width: Any,
) -> None:
    """Raises a `ValueError` for an argument of `generate_images` outside its range; see there for their meaning."""
    _check_prompt("", input_ids, attention_mask, config)
    if negative_input_ids is not None:
        _check_prompt("negative_", negative_input_ids, negative_attention_mask, config)
    check_guidance(guidance_scale, guidance_schedule, guidance_interval)
    if guidance_scale > 1 and negative_input_ids is None:
        raise ValueError(
            f"`guidance_scale` {guidance_scale} needs a null prompt; pass `negative_input_ids` (see "
            "`MMARProcessor.generation_inputs`) or set `guidance_scale=1`."
        )
    if guidance_scale > 1 and len(negative_input_ids) != len(input_ids):
        raise ValueError(
            f"`negative_input_ids` must hold one null prompt per image, {len(input_ids)}; got "
            f"{len(negative_input_ids)}."
        )
    if num_ar_steps is not None and not is_integer(num_ar_steps):
        raise ValueError(f"`num_ar_steps` must be an integer; got {shorten(num_ar_steps)}.")
    _check_steps_and_scheduler(config, num_inference_steps, scheduler)
    choices = {
        "order": (order, ORDERS),
        "output_type": (output_type, ("pt", "latent")),
        "fast": (fast, (None, True, False)),
    }
    for name, (value, allowed) in choices.items():
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}; got {shorten(value)}.")
    for name, value in (("height", height), ("width", width)):
        if value is not None and (not is_integer(value) or value != config.image_size):
            raise ValueError(
                f"`{name}` must be {config.image_size}, the size of all images of this model; got {shorten(value)}. "
                "Leave it out, and resize the image."
            )
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback` must be callable; got {shorten(callback)}.")


def _check_prompt(prefix: str, ids: Any, mask: Any, config: MMARConfig) -> None:
    """Raises a `ValueError` if token ids, or their mask, are not those of a text before an image."""
    name, mask_name = f"{prefix}input_ids", f"{prefix}attention_mask"
    maker = "`MMARProcessor.generation_inputs` makes it."
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"`{name}` must be a torch tensor of shape (B, L), at least one row and one token; got {got}. {maker}"
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers; got {ids.dtype}. {maker}")
    vocab_size, limit = config.text_config.vocab_size, config.text_config.max_position_embeddings
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`{name}` must be in [0, {vocab_size}), the model's vocabulary; got {lowest if lowest < 0 else highest}. "
            "Take tokenizer and model from one folder."
        )
    if bool((ids == config.image_token_id).any()):
        raise ValueError(f"`{name}` must be the text before the image; got image tokens in it. {maker}")
    if ids.shape[1] + 1 > limit:
        raise ValueError(f"`{name}` must be shorter than {limit} tokens; got {ids.shape[1]}. Shorten the prompt.")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`{mask_name}` must be a torch tensor of the shape {tuple(ids.shape)} of `{name}`; got {got}. {maker}"
        )
    if not bool(mask[:, -1].all()):
        raise ValueError(
            f"`{mask_name}` must end with 1 in every row, since the image follows the text; got padding on the right. "
            "Pad on the left, as `MMARProcessor.generation_inputs` does."
        )


def check_guidance(scale: Any, schedule: Any, interval: Any) -> None:
    """Raises a `ValueError` for guidance outside its range."""
    if not is_number(scale) or not 0 <= scale < math.inf:
        raise ValueError(f"`guidance_scale` must be a finite number of at least 0; got {shorten(scale)}.")
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(
            f"`guidance_schedule` must be one of {', '.join(GUIDANCE_SCHEDULES)}; got {shorten(schedule)}."
        )
    is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_number, interval))
    if not is_pair or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            "`guidance_interval` must be two different shares of the diffusion steps, in [0, 1] and the lesser first; "
            f"got {shorten(interval)}. `guidance_scale=1` turns guidance off."
        )


def _check_steps_and_scheduler(config: MMARConfig, num_inference_steps: Any, scheduler: Any) -> None:
    diffusion = config.diffusion_config
    is_pair = isinstance(num_inference_steps, (tuple, list)) and len(num_inference_steps) == 2
    counts = num_inference_steps if is_pair else [num_inference_steps]
    if not all(map(is_integer, counts)):
        raise ValueError(
            f"`num_inference_steps` must be an integer; got {shorten(num_inference_steps)}. Give two of them, in a "
            "tuple, for the first and the last autoregressive step."
        )
    if not all(1 <= count <= diffusion.num_train_timesteps for count in counts):
        raise ValueError(
            f"`num_inference_steps` must be between 1 and {diffusion.num_train_timesteps}, the number of training "
            f"timesteps; got {shorten(num_inference_steps)}."
        )
    if not isinstance(scheduler, SchedulerMixin):
        raise ValueError(
            "`scheduler` must be a diffusers scheduler; got "
            f"{shorten(scheduler)}. Make one, such as `DDIMScheduler.from_config(pipe.scheduler.config)`."
        )
    # A scheduler keeps entries of other schedulers' configs without using them.
    used = inspect.signature(type(scheduler).__init__).parameters
    settings = {name: value for name, value in scheduler.config.items() if name in used}
    advice = "Make it with `from_config(pipe.scheduler.config)`."
    if "beta_schedule" not in used or "Inverse" in type(scheduler).__name__:
        raise ValueError(
            "`scheduler` must step down the noise schedule that the model was trained with; got "
            f"{type(scheduler).__name__}, which does not. Take DDPM, DDIM, DPMSolverMultistep or another with a "
            "`beta_schedule`."
        )
    expected = {
        "prediction_type": diffusion.prediction_type,
        "num_train_timesteps": diffusion.num_train_timesteps,
        "beta_schedule": diffusion.beta_schedule,
        "use_flow_sigmas": False,
        "clip_sample": False,
        "thresholding": False,
    }
    for name, value in expected.items():
        if (name in used or name == "prediction_type") and settings.get(name) != value:
            raise ValueError(
                f"`scheduler` must have `{name}` {shorten(value)}, as the model was trained; got "
                f"{shorten(settings.get(name))}. {advice}"
            )
    if str(settings.get("variance_type")).startswith("learned"):
        raise ValueError(
            "`scheduler` must have a fixed `variance_type`, since the model predicts no variance; got "
            f"{shorten(settings['variance_type'])}. Make it with `variance_type='fixed_small'`."
        )
    alphas_cumprod, trained = getattr(scheduler, "alphas_cumprod", None), None
    if alphas_cumprod is not None:
        trained = cosine_alphas_cumprod(diffusion.num_train_timesteps)
        # diffusers multiplies the same betas in float32: they differ by at most 2e-5.
        if not torch.allclose(alphas_cumprod.cpu().float(), trained, rtol=0, atol=1e-3):
            raise ValueError(
                "`scheduler` must have the noise schedule that the model was trained with; got other `alphas_cumprod` "
                f"(from `trained_betas`?). {advice}"
            )
    spacing = settings.get("timestep_spacing")
    if min(counts) == 1 and spacing in ("linspace", "leading"):
        raise ValueError(
            f"`num_inference_steps` must be at least 2 with `timestep_spacing` {shorten(spacing)}, whose only step is "
            "at the least noise; got 1. Set `timestep_spacing='trailing'` for a single step."
        )


def check_known_latents(config: MMARConfig, batch: int, latents: Any, latent_mask: Any) -> None:
    """Raises a `ValueError` if latents to keep `(B, C, h, w)` and the mask `(B, N)` of hidden ones do not fit."""
    if (latents is None) != (latent_mask is None):
        raise ValueError("expected `latents` and `latent_mask` together; pass both to keep known tokens, or neither.")
    if latents is None:
        return
    for name, value in (("latents", latents), ("latent_mask", latent_mask)):
        if not isinstance(value, Tensor):
            raise ValueError(f"`{name}` must be a torch tensor; got {type(value).__name__}.")
    if latent_mask.dtype != torch.bool:
        raise ValueError(f"`latent_mask` must be bool, True where to generate; got {latent_mask.dtype}.")
    shapes = (batch, config.latent_channels, config.latent_size, config.latent_size), (batch, config.num_latents)
    if latents.shape != shapes[0] or latent_mask.shape != shapes[1]:
        raise ValueError(
            f"`latents` and `latent_mask` must have the shapes {shapes[0]} and {shapes[1]}; got "
            f"{tuple(latents.shape)} and {tuple(latent_mask.shape)}."
        )
    counts = latent_mask.sum(-1).tolist()
    if min(counts) != max(counts) or counts[0] == 0:
        raise ValueError(
            "`latent_mask` must hide the same number of latents, at least one, in every image; got "
            f"{counts}. Generate images with different masks one by one."
        )
    if not bool((torch.isfinite(latents).all(1).flatten(1) | latent_mask.to(latents.device)).all()):
        raise ValueError("expected finite latents where `latent_mask` is False; got NaN or infinite values.")


def check_callback_changes(changed: Any, partial: Tensor) -> dict[str, Any]:
    """What a callback returned, with "latents" of the shape of `partial` and "interrupt" in any case."""
    changed = {} if changed is None else changed
    if not isinstance(changed, dict):
        raise ValueError(
            f"`callback` must return None or a dict; got {type(changed).__name__}. Return the `callback_kwargs` that"
            " it was given."
        )
    if unknown := sorted(changed.keys() - {*CALLBACK_CHANGES, "latent_mask"}):
        raise ValueError(
            f"`callback` may return {', '.join(f'`{name}`' for name in CALLBACK_CHANGES)}; got "
            f"{shorten_names(unknown)}."
        )
    latents = changed.get("latents", partial)
    if not isinstance(latents, Tensor) or latents.shape != partial.shape:
        got = f"{tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"`callback` must return `latents` as a tensor of the shape {tuple(partial.shape)} that it was given; got "
            f"{got}."
        )
    if latents is not partial and not bool(torch.isfinite(latents).all()):
        raise ValueError("`callback` must return finite `latents`; got NaN or infinite values.")
    return {**changed, "latents": latents, "interrupt": bool(changed.get("interrupt", False))}
