"""`mmar generate` and `mmar describe`."""

import re
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from .app import ROOT, app, command


BUNDLED = ROOT / "checkpoints" / "mmar-tiny"
MAX_NAME_LENGTH = 60

Model = Annotated[str | None, Option(help="folder or Hub id of an MMAR; the bundled mmar-tiny by default")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    Option(help="of the weights; float32 on a CPU by default, as saved elsewhere"),
]
GuidanceScale = Annotated[float | None, Option(help="strength of the guidance; the model's by default")]
Preset = Annotated[Literal["paper", "balanced", "fast"] | None, Option(help="numbers of steps and sampler")]
NumArSteps = Annotated[int | None, Option(help="autoregressive steps; the model's by default")]
NumInferenceSteps = Annotated[int | None, Option(help="diffusion steps per token; the model's by default")]


@command(app)
def generate(
    prompt: Annotated[str, Argument(metavar="PROMPT", help="what the image shows")],
    model: Model = None,
    out: Annotated[Path | None, Option(help="image file to write; named after prompt and seed by default")] = None,
    seed: Annotated[int, Option(help="of the noise: another seed, another image")] = 0,
    dtype: Dtype = None,
    guidance_scale: GuidanceScale = None,
    preset: Preset = None,
    num_ar_steps: NumArSteps = None,
    num_inference_steps: NumInferenceSteps = None,
) -> None:
    """Generate an image of a prompt."""
    import torch
    from PIL import Image

    from mmar.conversion.models import open_pipeline

    if out is None:
        words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:MAX_NAME_LENGTH] or "image"
        out = Path(f"{words}-{seed}.png")
    # Before the model is loaded.
    if not out.parent.is_dir() or out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"`out` must be a file such as image.png in a folder that exists; got {str(out)!r}.")
    pipe = open_pipeline(model or BUNDLED, dtype=None if dtype is None else getattr(torch, dtype))
    image = pipe(
        prompt,
        generator=torch.Generator().manual_seed(seed),
        guidance_scale=guidance_scale,
        preset=preset,
        num_ar_steps=num_ar_steps,
        num_inference_steps=num_inference_steps,
    ).images[0]
    image.save(out)
    print(out)


@command(app)
def describe(
    image: Annotated[str, Argument(metavar="IMAGE", help="path or URL of an image")],
    model: Model = None,
    question: Annotated[str, Option(help="what to ask about the image")] = "Describe the image.",
    max_new_tokens: Annotated[int | None, Option(help="most tokens of the answer; the model's by default")] = None,
    dtype: Dtype = None,
) -> None:
    """Describe an image, or answer a question about it."""
    from mmar.evaluation.answers import MMARAnswerer
    from mmar.processors.image_processing_mmar import read_image

    # Before the model is loaded.
    content = [{"type": "image", "image": read_image(image)}, {"type": "text", "text": question}]
    answerer = MMARAnswerer.from_pretrained(str(model or BUNDLED), dtype=dtype)
    print(*answerer.answer([[{"role": "user", "content": content}]], max_new_tokens=max_new_tokens))
