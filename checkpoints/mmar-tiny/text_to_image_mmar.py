"""transformers' "text-to-image" pipeline of MMAR. `MMARPipeline` is the one for diffusers, and can do more."""

import os
import reprlib
from typing import Any

from torch import Tensor
from transformers import Pipeline


GENERATION_ARGUMENTS = (
    "guidance_scale",
    "guidance_schedule",
    "guidance_interval",
    "preset",
    "num_ar_steps",
    "num_inference_steps",
    "order",
    "generator",
    "scheduler",
    "fast",
    "height",
    "width",
)
OUTPUT_TYPES = ("pil", "np", "pt")


class MMARTextToImagePipeline(Pipeline):
    r"""
    Draws pictures from prompts, as `transformers.pipeline("text-to-image")`.

    Arguments of a call, or of the pipeline as defaults of its calls: `negative_prompt`, `guidance_scale`,
    `guidance_schedule`, `guidance_interval`, `preset`, `num_ar_steps`, `num_inference_steps`, `order`, `generator`
    (in a call also a list with one per prompt, which are generated one by one), `scheduler`, `fast`, `height` and
    `width` (the model's own), `output_type` ("pil", "np" or "pt") and, of every pipeline, `batch_size`.

    Example:

    ```python
    >>> import mmar
    >>> from transformers import pipeline

    >>> pipe = pipeline("text-to-image", model="checkpoints/mmar-tiny")
    >>> pipe("an emoji of crab in noto style").save("crab.png")
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, inputs: str | list[str], **kwargs) -> Any:
        r"""
        Draws one picture per prompt.

        Args:
            inputs (`str` or `list[str]`): Prompts; `""` for an unconditional picture.
            **kwargs: See the class.

        Returns:
            One `PIL.Image.Image` for a string, a list of them for a list, and with `num_images_per_prompt` above 1 a
            list of so many in the place of each; with `output_type` "np" arrays `(H, W, 3)`, with "pt" tensors
            `(3, H, W)`, both in [0, 1], and so many of them on a first axis.

        Raises:
            ValueError: For arguments outside their range; see `MMARForConditionalGeneration.generate_images`.
        """
        generate, generators = super().__call__, kwargs.get("generator")
        if not isinstance(generators, (list, tuple)):
            return generate(inputs, **kwargs)
        prompts = inputs if isinstance(inputs, list) else [inputs]
        if len(generators) != len(prompts):
            raise ValueError(f"`generator` must be one, or one per prompt, {len(prompts)}; got {len(generators)}.")
        pairs = zip(prompts, generators, strict=True)
        images = [generate(prompt, **{**kwargs, "generator": own}) for prompt, own in pairs]
        return images if isinstance(inputs, list) else images[0]

    def _sanitize_parameters(
        self,
        negative_prompt: str | None = None,
        output_type: str | None = None,
        num_images_per_prompt: int | None = None,
        **kwargs,
    ) -> tuple[dict, dict, dict]:
        if unknown := sorted(kwargs.keys() - set(GENERATION_ARGUMENTS)):
            known = ", ".join(("negative_prompt", "output_type", "num_images_per_prompt", *GENERATION_ARGUMENTS))
            raise ValueError(f'"text-to-image" knows the arguments {known}; got {", ".join(unknown)}. Drop them.')
        if output_type not in (None, *OUTPUT_TYPES):
            raise ValueError(
                f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}; got {reprlib.repr(output_type)}."
            )
        if isinstance(kwargs.get("generator"), (list, tuple)):
            raise ValueError(
                "`generator` must be one `torch.Generator` of the pipeline; got a list. Give it to a call."
            )
        count = num_images_per_prompt
        if count is not None:
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(
                    f"`num_images_per_prompt` must be an integer of at least 1; got {reprlib.repr(count)}."
                )
            kwargs["num_images_per_prompt"] = count
        preprocess = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        postprocess = {} if output_type is None else {"output_type": output_type}
        return preprocess, kwargs, postprocess

    def preprocess(self, prompt: str, negative_prompt: str = "") -> dict[str, Tensor]:
        # Rows with and without guidance look alike, and can be batched.
        return dict(self.processor.generation_inputs([prompt], [negative_prompt]))

    def _forward(self, model_inputs: dict[str, Tensor], num_images_per_prompt: int = 1, **kwargs) -> dict[str, Tensor]:
        count = num_images_per_prompt
        inputs = {name: value.repeat_interleave(count, dim=0) for name, value in model_inputs.items()}
        images = self.model.generate_images(**inputs, **kwargs)
        # (B * count, 3, H, W) -> (B, count, 3, H, W), since transformers cuts batches up along the first axis.
        return {"images": images.unflatten(0, (-1, count))}

    def postprocess(self, model_outputs: dict[str, Tensor], output_type: str = "pil") -> Any:
        images = self.processor.postprocess(model_outputs["images"][0], output_type=output_type)
        return images[0] if len(images) == 1 else images

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        r"""
        Writes the model, with its code, and the processor; `MMARPipeline` adds what diffusers needs.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if it does not exist.
            **kwargs: Arguments of the model's `save_pretrained`.
        """
        self.model.save_folder(save_directory, self, **kwargs)


__all__ = ["MMARTextToImagePipeline"]
