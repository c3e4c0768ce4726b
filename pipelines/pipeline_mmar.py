"""MMAR as a pipeline of diffusers: pictures from text."""

import numbers
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from huggingface_hub import CommitInfo
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class MMARPipelineOutput(BaseOutput):
    r"""
    Output of `MMARPipeline`.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): B pictures: PIL images, arrays
            `(B, H, W, 3)` or tensors `(B, 3, H, W)` in [0, 1], or latents `(B, C, h, w)`.
    """

    images: list[Image.Image] | np.ndarray | Tensor


# Trust was given, or not needed, before this file was loaded: installed, MMAR's own classes are registered.
_TRUST_REMOTE_CODE = __name__.startswith("diffusers_modules.")


class MMARConfigLoader:
    """Loads the config of the pipeline's model from the root of its folder."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, subfolder: str | None = None, **kwargs):
        return AutoConfig.from_pretrained(folder, trust_remote_code=_TRUST_REMOTE_CODE)


class MMARModelLoader(PreTrainedModel):
    """Loads the pipeline's model from the root of its folder, through the one door that finds its class."""

    # With these two diffusers makes an empty model, to see how large it is, for `device_map="balanced"`.
    config_class = MMARConfigLoader

    def __new__(cls, config: PreTrainedConfig):
        return AutoModel.from_config(config, trust_remote_code=_TRUST_REMOTE_CODE)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, dtype: torch.dtype | str | None = None, **kwargs):
        # Without a wish, the dtype that was saved.
        dtype = "auto" if dtype is None else dtype
        return AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=_TRUST_REMOTE_CODE, **kwargs)


class MMARProcessorLoader(ProcessorMixin):
    """Loads the pipeline's processor, likewise."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs):
        return AutoProcessor.from_pretrained(folder, trust_remote_code=_TRUST_REMOTE_CODE, **kwargs)


LOADERS = {"model": MMARModelLoader, "processor": MMARProcessorLoader}


class MMARPipeline(DiffusionPipeline):
    r"""
    Draws pictures from text with MMAR.

    Its folder opens with every other door too: the model and the processor lie at the root, not in sub-folders.

    Args:
        model (`MMARForConditionalGeneration`): The model, with its VAE.
        processor (`MMARProcessor`): Prompts to tokens, pictures to PIL.
        scheduler (diffusers scheduler): Samples each token; any of diffusers whose `prediction_type` is the model's.

    Example:

    ```python
    >>> import torch
    >>> from mmar import MMARPipeline

    >>> pipe = MMARPipeline.from_pretrained("checkpoints/mmar-tiny")
    >>> image = pipe("an emoji of crab in noto style", generator=torch.Generator().manual_seed(0)).images[0]
    >>> image.save("crab.png")
    ```
    """

    model_cpu_offload_seq = "model"
    _callback_tensor_inputs = ["latents", "latent_mask"]

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, scheduler: Any):
        super().__init__()
        self._check_components(model, processor, scheduler)
        self.register_modules(model=model, processor=processor, scheduler=scheduler)
        # For callers of the model alone, which knows no tokenizer.
        model.config.null_prompt_ids = list(processor.generation_inputs(None, return_tensors=None)["input_ids"][0])
        self._interrupt = False
        self._guidance_scale = model.config.image_generation["guidance_scale"]
        self._num_timesteps = 0

    @staticmethod
    def _check_components(model: Any, processor: Any, scheduler: Any) -> None:
        """Raises a `ValueError` if the components are not MMAR's, or not made for each other."""
        # "mmar", or of a model that builds on it.
        if not str(getattr(getattr(model, "config", None), "model_type", None)).startswith("mmar"):
            raise ValueError(f"`model` must be an MMARForConditionalGeneration; got {type(model).__name__}.")
        if not hasattr(model, "generate_images"):
            raise ValueError(f"`model` must be an MMARForConditionalGeneration; got {type(model).__name__}.")
        if not isinstance(scheduler, SchedulerMixin):
            raise ValueError(
                "`scheduler` must be a diffusers scheduler, such as `model.default_scheduler()`; got "
                f"{type(scheduler).__name__}."
            )
        if not hasattr(processor, "generation_inputs"):
            raise ValueError(f"`processor` must be an MMARProcessor; got {type(processor).__name__}.")
        config, size = model.config, processor.image_processor.size
        pairs = {
            "num_image_tokens": (processor.num_image_tokens, config.num_latents),
            "image_token_id": (processor.image_token_id, config.image_token_id),
            "size": ((size["height"], size["width"]), (config.image_size, config.image_size)),
        }
        for name, (got, expected) in pairs.items():
            if got != expected:
                raise ValueError(
                    f"the processor's `{name}` must be the model's, {expected}; got {got}. Load both from one folder."
                )
        if len(processor.tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer must have at most {config.text_config.vocab_size} tokens, the rows of the model's "
                f"embedding; got {len(processor.tokenizer)}. Load both from one folder."
            )

    @property
    def guidance_scale(self) -> float:
        """Guidance of the call that runs or ran last."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that guidance is active."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs or ran last, after each of which the callback is called."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """
        Set `pipe._interrupt = True` in a callback to stop drawing; what is drawn by then is returned. It stops all
        calls of this pipeline, those of other threads too.
        """
        return self._interrupt

    # ----------------------------------------------------------------------------------------------------- drawing

    def check_inputs(
        self,
        prompt: str | list[str | None] | None,
        negative_prompt: str | list[str | None] | None,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        guidance_scale: float | None = None,
        latents: Tensor | None = None,
        latent_mask: Tensor | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> None:
        r"""
        Checks what the model and the processor do not check themselves.

        Raises:
            ValueError: If an argument is of a wrong type, out of range, or does not match another in number.
        """
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            entries = value if isinstance(value, list) else [value]
            wrong = [entry for entry in entries if entry is not None and not isinstance(entry, str)]
            if wrong:
                raise ValueError(f"`{name}` must be a string, a list of strings or None; got {type(wrong[0])}.")
            if not entries:
                raise ValueError(f"`{name}` must hold at least one prompt; got an empty list.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be callable; got {reprlib.repr(callback_on_step_end)}.")
        if guidance_scale is not None and not isinstance(guidance_scale, numbers.Real):
            raise ValueError(f"`guidance_scale` must be a number or None; got {reprlib.repr(guidance_scale)}.")
        for name, value in (("latents", latents), ("latent_mask", latent_mask)):
            if value is not None and (not isinstance(value, Tensor) or value.ndim == 0):
                raise ValueError(f"`{name}` must be a torch tensor with a batch axis; got {type(value).__name__}.")
        batch = len(prompt) if isinstance(prompt, list) else 1
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch:
            raise ValueError(
                f"`negative_prompt` must be one string or as many as `prompt`, {batch}; got {len(negative_prompt)}."
            )
        is_count = isinstance(num_images_per_prompt, numbers.Integral) and not isinstance(num_images_per_prompt, bool)
        if not is_count or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be an integer of at least 1; got {num_images_per_prompt}.")
        if isinstance(generator, (list, tuple)) and len(generator) != batch * num_images_per_prompt:
            raise ValueError(
                f"`generator` must be one, or one per picture: {batch} prompts x {num_images_per_prompt} pictures = "
                f"{batch * num_images_per_prompt}; got {len(generator)}."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}; got {reprlib.repr(output_type)}."
            )
        if not isinstance(callback_on_step_end_tensor_inputs, (list, tuple)):
            raise ValueError(
                "`callback_on_step_end_tensor_inputs` must be a list of names; got "
                f"{reprlib.repr(callback_on_step_end_tensor_inputs)}."
            )
        known = self._callback_tensor_inputs
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name not in known]:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {', '.join(known)}; got "
                f"{', '.join(map(str, unknown))}."
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str | None] | None = None,
        negative_prompt: str | list[str | None] | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "constant",
        num_ar_steps: int | None = None,
        num_inference_steps: int | tuple[int, int] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        latent_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["MMARPipeline", int, int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        preset: str | None = None,
        order: str = "random",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        fast: bool | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> MMARPipelineOutput | tuple:
        r"""
        Draws pictures.

        Args:
            prompt (`str` or `list[str]`, *optional*): Captions; None or `""` for unconditional pictures.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance leads away from, one for all prompts or
                one each; the null prompt by default. Without effect where guidance is off.
            guidance_scale (`float`, *optional*): w in v = v_u + w (v_c - v_u); active above 1. Default from
                `model.config.image_generation`, like the two steps below.
            guidance_schedule (`str`, *optional*, defaults to `"constant"`): `"linear"` raises w from 1 to
                `guidance_scale` as the picture fills.
            num_ar_steps (`int`, *optional*): Autoregressive steps, between 1 and the number of latents to draw.
            num_inference_steps (`int` or `tuple[int, int]`, *optional*): Diffusion steps per token, or those of the
                first and the last autoregressive step, with even changes between.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Pictures per prompt, beside each other in the
                output.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One for all images, or one per image.
                The next number of an image's generator is its seed, so that a generator gives the same image alone and
                in a list. In float32 an image does not depend on the others of its batch; in bfloat16 rounding does.
            latents (`torch.FloatTensor` of shape `(B, C, h, w)`, *optional*): Known latents to keep where
                `latent_mask` is False (inpainting); B counts all pictures.
            latent_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True where to draw; with `latents`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each autoregressive step as
                `callback(pipe, step, step, callback_kwargs)`. The step comes twice, since diffusers' third argument
                is a timestep, of which every step here runs through all. It returns a dict, whose "latents", if
                there, replace the partial ones. In a call that began with guidance, `pipe._guidance_scale`, set in it,
                holds for the steps that follow.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`): What
                `callback_kwargs` holds: `"latents"`, the partial ones `(B, C, h, w)`, zero where nothing is drawn, and
                `"latent_mask"` `(B, N)`, True where nothing is drawn yet. A `PipelineCallback` of diffusers says it
                itself.
            preset (`str`, *optional*): `"paper"`, `"balanced"` or `"fast"`, for the two step numbers, where
                they are not given, and for the scheduler, in place of `pipe.scheduler`.
            order (`str`, *optional*, defaults to `"random"`): In which latents are drawn: `"random"`, as the model was
                trained, `"checkerboard"`, at random but first those that share no side, or `"raster"`, row by row.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): The diffusion steps that
                are guided, as shares of all of them from the noisiest on.
            fast (`bool`, *optional*): Whether to generate in faster ways, which need a second copy of the language
                model's layers in memory for the call and give the same up to rounding. By default where the
                accelerator has room for it.
            height, width (`int`, *optional*): As diffusers' pipelines have them; only the model's `image_size`.

        Returns:
            `MMARPipelineOutput`, or a tuple with its `images`.

        Raises:
            ValueError: For arguments of a wrong type, outside their range or of unequal number, for a scheduler of
                another prediction type or with a learned variance, and for latents that are NaN or infinite.
        """
        # 1. Check, and fill in the defaults.
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            # As every pipeline of diffusers does: these say themselves what they take.
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
            guidance_scale,
            latents,
            latent_mask,
            callback_on_step_end,
        )
        config = self.model.config
        defaults, chosen = config.image_generation, self.model.image_preset(preset)
        guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        num_to_draw = config.num_latents if latent_mask is None else int(latent_mask.sum(-1).min())
        num_ar_steps = self.model.num_ar_steps(chosen, num_to_draw) if num_ar_steps is None else num_ar_steps
        # For callers to read; one that draws in another thread has settings of its own, but the same `interrupt`.
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, num_ar_steps, False

        # 2. Prompts to tokens, each once per picture.
        prompts = prompt if isinstance(prompt, list) else [prompt]
        negative_prompts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * len(prompts)
        inputs = self.processor.generation_inputs(
            prompts, [text or "" for text in negative_prompts] if guidance_scale > 1 else None
        )
        device = self._execution_device
        inputs = {
            name: value.repeat_interleave(num_images_per_prompt, dim=0).to(device) for name, value in inputs.items()
        }

        # 3. Draw.
        if hasattr(self.model, "_hf_hook"):
            # Offloading waits for `forward`, which drawing does not go through.
            self.model._hf_hook.pre_forward(self.model)
        with self.progress_bar(total=num_ar_steps) as progress_bar:

            def on_step_end(step: int, num_steps: int, partial: Tensor, mask: Tensor) -> dict[str, Any] | None:
                # Of a model that draws in one round, the diffusion steps.
                self._num_timesteps = progress_bar.total = num_steps
                progress_bar.update()
                changed = None
                if callback_on_step_end is not None:
                    values = {"latents": partial, "latent_mask": mask}
                    callback_kwargs = {name: values[name] for name in callback_on_step_end_tensor_inputs}
                    guidance_before = self._guidance_scale
                    changed = callback_on_step_end(self, step, step, callback_kwargs)
                    if self._guidance_scale != guidance_before and isinstance(changed, dict | None):
                        changed = {**(changed or {}), "guidance_scale": self._guidance_scale}
                if self.interrupt and isinstance(changed, dict | None):
                    changed = {**(changed or {}), "interrupt": True}
                return changed

            drawn = self.model.generate_images(
                **inputs,
                guidance_scale=guidance_scale,
                guidance_schedule=guidance_schedule,
                guidance_interval=guidance_interval,
                preset=preset,
                num_ar_steps=num_ar_steps,
                num_inference_steps=num_inference_steps,
                order=order,
                scheduler=self.scheduler if preset is None else None,
                generator=list(generator) if isinstance(generator, tuple) else generator,
                latents=None if latents is None else latents.to(device),
                latent_mask=None if latent_mask is None else latent_mask.to(device),
                callback=on_step_end,
                output_type="latent",
                fast=fast,
                height=height,
                width=width,
            )

        # 4. Latents to pictures.
        images = drawn
        if output_type != "latent":
            images = self.processor.postprocess(self.model.decode_latents(drawn), output_type=output_type)
        self.maybe_free_model_hooks()
        return MMARPipelineOutput(images=images) if return_dict else (images,)

    # ------------------------------------------------------------------------------------------- saving and loading

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        frozen: str | None = None,
        **kwargs,
    ) -> None:
        r"""
        Writes the folder that opens through every door: model, processor and code at the root, the scheduler beside.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if it does not exist.
            safe_serialization (`bool`, *optional*, defaults to `True`): Part of diffusers' signature; only `True`.
            variant (`str`, *optional*): Part of diffusers' signature; only None.
            max_shard_size (`int` or `str`, *optional*): Largest weights file, as `"5GB"`; transformers' by default.
            push_to_hub (`bool`, *optional*, defaults to `False`): Also upload, to `repo_id` or a repository of the
                folder's name.
            frozen (`str`, *optional*): `"include"` or `"reference"`; see the model's `save_pretrained`.
            **kwargs: Arguments of `push_to_hub`.

        Raises:
            ValueError: If weights are asked for in another format or as a variant.
        """
        _check_format(safe_serialization, variant)
        shard_size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        self.model.save_folder(save_directory, self, frozen=frozen, **shard_size)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, max_shard_size=max_shard_size, frozen=frozen, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload MMARPipeline",
        max_shard_size: int | str | None = None,
        frozen: str | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs,
    ) -> CommitInfo:
        r"""
        Uploads the whole folder that `save_pretrained` writes, and a model card where the repository has none.

        Args:
            repo_id (`str`): Repository, made if it does not exist.
            commit_message (`str`, *optional*): Title of the commit.
            max_shard_size (`int` or `str`, *optional*): Largest weights file.
            frozen (`str`, *optional*): `"include"` or `"reference"`; see the model's `save_pretrained`.
            safe_serialization (`bool`, *optional*, defaults to `True`): Part of diffusers' signature; only `True`.
            variant (`str`, *optional*): Part of diffusers' signature; only None.
            **kwargs: `commit_description`, `private`, `token`, `revision` (a branch) and `create_pr`.

        Returns:
            `huggingface_hub.CommitInfo`

        Raises:
            ValueError: If there is no token that may write, the upload broke, or a part is kept by reference to a
                local folder, which others do not have.
        """
        _check_format(safe_serialization, variant)
        shard_size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        return self.model.push_to_hub(
            repo_id, pipeline=self, frozen=frozen, commit_message=commit_message, **shard_size, **kwargs
        )

    def save_index(self, folder: str | os.PathLike) -> None:
        """Writes what diffusers needs to open a folder of the model and the processor: model_index.json, scheduler."""
        self.model.save_index(folder, self)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Reads model_index.json for this very class, and not for the one that the folder brings along."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return config

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """Has the components at the root loaded by our loaders, whatever class the folder names."""
        init_dict, unused_kwargs, hidden_config_dict = super().extract_init_dict(config_dict, **kwargs)
        for name, loader in LOADERS.items():
            if name in init_dict:
                init_dict[name] = [loader.__module__, loader.__name__]
        return init_dict, unused_kwargs, hidden_config_dict


def _check_format(safe_serialization: bool, variant: str | None) -> None:
    """Raises a `ValueError` if weights are asked for in another format or as a variant."""
    if not safe_serialization or variant is not None:
        raise ValueError(
            "`safe_serialization` must be True and `variant` None, so that all doors find the weights; got "
            f"{safe_serialization} and {reprlib.repr(variant)}. For half precision call `pipe.to(torch.bfloat16)`."
        )


__all__ = ["MMARPipeline", "MMARPipelineOutput"]
