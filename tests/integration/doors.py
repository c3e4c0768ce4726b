"""Opens doors in a process of its own: `python doors.py SPEC.json`. MMAR itself is not imported here."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file as save_contiguous
from torch import Tensor


PROMPT = "a red square"
NUM_NEW_TOKENS = 5


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values)


def chat() -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "Which colour?"}]
    return [{"role": "user", "content": content}]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    save_contiguous({name: value.contiguous().clone() for name, value in tensors.items()}, path)


@torch.no_grad()
def outputs_of(model: Any, processor: Any) -> dict[str, Tensor]:
    """Logits, tokens and text after a picture; latents and picture after a prompt. On one thread, as everything here:
    sums of several threads may differ in the last bit."""
    torch.set_num_threads(1)
    inputs = processor.apply_chat_template(
        chat(), tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    generated = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, min_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    answer = processor.post_process_image_text_to_text(generated[:, inputs.input_ids.shape[1] :])[0]
    prefix = processor.generation_inputs([PROMPT], [""])
    latents = model.generate_images(**prefix, generator=seeded(), output_type="latent")
    return {
        "logits": model(**inputs).logits,
        "generated": generated,
        "text": as_tensor(answer),
        "latents": latents,
        "picture": processor.postprocess(model.decode_latents(latents), output_type="pt")[0],
    }


def open_transformers(repo: str, save_to: Path, **trust: Any) -> dict[str, dict[str, Tensor]]:
    """The doors of transformers; saves again what the first two gave."""
    import transformers
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

    processor = AutoProcessor.from_pretrained(repo, **trust)
    model = AutoModel.from_pretrained(repo, **trust)
    assert not model.training
    model.save_pretrained(save_to)
    processor.save_pretrained(save_to)
    opened = {"AutoModel": outputs_of(model, processor)}
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        opened[auto_class.__name__] = outputs_of(auto_class.from_pretrained(repo, **trust), processor)

    pipe = pipeline("text-to-image", model=repo, **trust)
    opened["text-to-image"] = {"picture": pipe(PROMPT, generator=seeded(), output_type="pt")}

    lengths = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
    tasks = ["image-text-to-text"]
    if transformers.utils.is_torchvision_available():
        tasks.append("any-to-any")
    for task in tasks:
        pipe = pipeline(task, model=repo, **trust)
        answer = pipe(text=chat(), return_full_text=False, generate_kwargs=dict(lengths))
        opened[task] = {"text": as_tensor(answer[0]["generated_text"])}
    return opened


def open_diffusers(repo: str, save_to: Path, pipeline_class: Any = None, **trust: Any) -> dict[str, dict[str, Tensor]]:
    """The door of diffusers; saves again what it gave."""
    if pipeline_class is None:
        from diffusers import DiffusionPipeline as pipeline_class

    pipe = pipeline_class.from_pretrained(repo, **trust)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(save_to, max_shard_size="200KB" if "sharded" in repo else None)
    return {
        pipeline_class.__name__: outputs_of(pipe.model, pipe.processor),
        f"{pipeline_class.__name__} call": {
            "latents": pipe(PROMPT, generator=seeded(), output_type="latent").images,
            "picture": pipe(PROMPT, generator=seeded(), output_type="pt").images[0],
        },
    }


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    for number, repo in enumerate(spec["repos"]):
        out = Path(spec["out"]) / str(number)
        trust = {} if spec["doors"] == "installed" else {"trust_remote_code": True}
        if spec["doors"] == "installed":
            from mmar import MMARPipeline

            opened = open_transformers(repo, out / "transformers") | open_diffusers(
                repo, out / "diffusers", MMARPipeline
            )
        elif spec["doors"] == "transformers":
            opened = open_transformers(repo, out / "transformers", **trust)
        else:
            opened = open_diffusers(repo, out / "diffusers", **trust)
        is_installed = any(name.startswith("mmar.") for name in sys.modules)
        is_remote = any(name.startswith(("transformers_modules.", "diffusers_modules.")) for name in sys.modules)
        loaded = sorted(name for name in sys.modules if "mmar" in name)
        assert (is_installed, is_remote) == (spec["doors"] == "installed", spec["doors"] != "installed"), loaded
        tensors = {f"{door}: {name}": value for door, values in opened.items() for name, value in values.items()}
        save_file(tensors, out / "opened.safetensors")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
