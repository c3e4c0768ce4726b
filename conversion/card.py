"""Model cards made from facts: the config, what an evaluation printed, and what the author states. Nothing else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import write_whole
from ..modeling_mmar.configuration_mmar import TRAINED_SUFFIXES, shorten, shorten_names
from ..modeling_mmar.saving_mmar import (
    ABOUT,
    CARD_NAME,
    NEEDS_PROCESSOR,
    NOT_STATED,
    PROMPT,
    QUESTION,
    TAGS,
    USAGE,
    backbone_of,
    usage,
)


# Next to those of a short card; each opens a complete repository in a fresh process; the tests run them.
FURTHER_USAGE = {
    "transformers, text to image": """\
from transformers import pipeline

pipe = pipeline("text-to-image", model="{repo}", trust_remote_code=True, dtype="float32")
pipe({prompt}).save("drawn.png")
""",
    "transformers, model and processor": """\
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{repo}", trust_remote_code=True, dtype="float32")
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
content = [{{"type": "image", "url": "drawn.png"}}, {{"type": "text", "text": {question}}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    tokenize=True,
    return_dict=True,
    add_generation_prompt=True,
    return_tensors="pt",
)
answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
""",
}


@dataclass
class MMARCardFacts:
    r"""
    What the author of a model states; each may be left out, and is then not in the card or "not stated".

    Args:
        title (`str`, *optional*): Heading; the repository's name by default.
        description (`str`, *optional*): What it is, in a paragraph.
        license (`str`, *optional*): The Hub's identifier, as `"apache-2.0"`.
        license_notice (`str`, *optional*): What the licence demands to be said.
        language (`list[str]`): ISO 639-1 codes.
        datasets (`list[str]`): Training sets, by their Hub ids or names.
        base_model (`list[str]`): Hub ids of the models that it was made from.
        training_data (`str`, *optional*): What was and what was not trained on.
        training (`str`, *optional*): Commands, steps, seed, hardware, time.
        intended_use (`str`, *optional*): What it is for.
        limitations (`str`, *optional*): What it cannot do.
        prompt (`str`): A prompt for the examples.
        question (`str`): A question about a picture, for the examples.
    """

    title: str | None = None
    description: str | None = None
    license: str | None = None
    license_notice: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    base_model: list[str] = field(default_factory=list)
    training_data: str | None = None
    training: str | None = None
    intended_use: str | None = None
    limitations: str | None = None
    prompt: str = PROMPT
    question: str = QUESTION

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MMARCardFacts":
        r"""
        Raises:
            ValueError: If a value has an unknown name or is of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"expected the facts of a card as names and values; got {type(values).__name__}.")
        names = [entry.name for entry in fields(cls)]
        if unknown := sorted(str(name) for name in values.keys() - set(names)):
            raise ValueError(f"the facts of a card may hold {', '.join(names)}; got {shorten_names(unknown)}.")
        for name, value in values.items():
            is_list = name in ("language", "datasets", "base_model")
            entries = value if is_list and isinstance(value, list) else [value]
            if isinstance(value, list) != is_list or not all(isinstance(entry, str) for entry in entries):
                raise ValueError(
                    f"`{name}` must be {'a list of texts' if is_list else 'a text'}; got {shorten(value)}."
                )
        return cls(**values)


def make_model_card(
    config: Any,
    repo_id: str,
    facts: MMARCardFacts | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
    num_parameters: dict[str, int] | None = None,
    has_processor: bool = True,
) -> ModelCard:
    r"""
    Makes the card of an MMAR.

    Args:
        config (`MMARConfig`): The model's configuration.
        repo_id (`str`): Repository or folder that the examples open.
        facts (`MMARCardFacts`, *optional*): What the author states.
        evaluations (`Sequence[dict]`, *optional*): What evaluations wrote: `command`, `dataset` with `type`, `name`
            and `split`, and `metrics`, a list of `task`, `type`, `name` and `value`.
        num_parameters (`dict[str, int]`, *optional*): Parameters by part, as `count_parameters` gives them.
        has_processor (`bool`, *optional*, defaults to `True`): Whether the processor is in the folder; the examples
            need it.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        ValueError: If an evaluation lacks one of these.
    """
    facts = MMARCardFacts() if facts is None else facts
    name = repo_id.rstrip("/").split("/")[-1]
    results = [result for evaluation in evaluations for result in _eval_results(evaluation)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=list(TAGS),
        license=facts.license,
        language=facts.language or None,
        datasets=facts.datasets or None,
        base_model=facts.base_model or backbone_of(config),
        model_name=name if results else None,
        eval_results=results or None,
    )
    text = _text(config, repo_id, facts, evaluations, num_parameters, has_processor)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters of the parts of an `MMARForConditionalGeneration`; a tied `lm_head` counts once."""
    counts = dict.fromkeys(("Qwen2", "PLoRA", "latent encoder", "diffusion MLP", "VAE"), 0)
    for name, parameter in model.named_parameters():
        if name.endswith(TRAINED_SUFFIXES):
            part = "PLoRA"
        elif name.startswith(("model.language_model.", "lm_head.")):
            part = "Qwen2"
        else:
            module = name.split(".")[0]
            part = {"model": "latent encoder", "diffusion_mlp": "diffusion MLP", "vae": "VAE"}.get(module, module)
        # In 4 bits several numbers share an element.
        packed = getattr(parameter, "quant_state", None)
        number = parameter.numel() if packed is None else packed.shape.numel()
        counts[part] = counts.get(part, 0) + number
    return {part: number for part, number in counts.items() if number}


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    try:
        dataset = evaluation["dataset"]
        if not isinstance(evaluation["command"], str):
            raise TypeError("command")
        return [
            EvalResult(
                task_type=metric["task"],
                dataset_type=dataset["type"],
                dataset_name=dataset["name"],
                dataset_split=dataset.get("split"),
                metric_type=metric["type"],
                metric_name=metric["name"],
                metric_value=metric["value"],
            )
            for metric in evaluation["metrics"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "an evaluation for a card must have `command`, `dataset` {type, name, split} and `metrics`, a list of "
            f"{{task, type, name, value}}; {shorten(error)} is wrong or missing. Take what `mmar.evaluation` wrote."
        ) from error


def _text(
    config: Any,
    repo_id: str,
    facts: MMARCardFacts,
    evaluations: Sequence[dict[str, Any]],
    num_parameters: dict[str, int] | None,
    has_processor: bool,
) -> str:
    title = facts.title or repo_id.rstrip("/").split("/")[-1]
    parts = [
        f"# {title}",
        ABOUT,
    ]
    if facts.description:
        parts.append(facts.description.strip())
    parts += [
        "## Use",
        "The examples load float32, which a CPU computes best and in which an image does not depend on its batch. On "
        "an accelerator leave `dtype` out: the saved one is loaded then.",
    ]
    parts += [] if has_processor else [NEEDS_PROCESSOR]
    parts += usage(repo_id, facts.prompt, facts.question, {**USAGE, **FURTHER_USAGE})
    parts += ["## Model", _architecture(config, num_parameters)]
    sections = {
        "Intended use": facts.intended_use,
        "Limitations": facts.limitations,
        "Training data": facts.training_data,
        "Training": facts.training,
    }
    for heading, text in sections.items():
        parts += [f"## {heading}", (text or NOT_STATED).strip()]
    parts += ["## Evaluation"]
    if not evaluations:
        parts.append("No evaluation was recorded for these weights.")
    for evaluation in evaluations:
        dataset = evaluation["dataset"]
        where = f"{dataset['name']}, {dataset['split']}" if dataset.get("split") else dataset["name"]
        rows = "\n".join(f"| {metric['name']} | {metric['value']} |" for metric in evaluation["metrics"])
        parts.append(f"{where}, by `{evaluation['command']}`:\n\n| figure | value |\n| --- | --- |\n{rows}")
    parts += ["## License", _license(facts)]
    return "\n\n".join(parts) + "\n"


def _license(facts: MMARCardFacts) -> str:
    name = f"Weights: {facts.license}." if facts.license else f"Weights: {NOT_STATED.lower()}"
    notice = f" {facts.license_notice.strip()}" if facts.license_notice else ""
    return f"{name} Code in this folder: Apache-2.0.{notice}"


def _architecture(config: Any, num_parameters: dict[str, int] | None) -> str:
    text = config.text_config
    rows = {
        "language model": f"Qwen2, {text.num_hidden_layers} layers of width {text.hidden_size}, "
        f"{text.vocab_size} tokens; PLoRA of rank {config.plora_rank}, alpha {config.plora_alpha:g}, on image tokens",
        "image tokens": f"{config.num_latents} of {config.latent_channels} channels for a picture of "
        f"{config.image_size} x {config.image_size} pixels",
        **config.image_parts,
        "drawing by default": ", ".join(f"{name} {value}" for name, value in sorted(config.image_generation.items())),
    }
    if num_parameters:
        rows["parameters"] = ", ".join(f"{part} {count:,}" for part, count in num_parameters.items())
    return "| part | what |\n| --- | --- |\n" + "\n".join(f"| {name} | {what} |" for name, what in rows.items())


def write_model_card(folder: str | Path, card: ModelCard) -> None:
    """Writes README.md, completely or not at all."""
    write_whole(Path(folder) / CARD_NAME, str(card).encode())


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """Reads what an evaluation wrote; raises a `ValueError` if it is no JSON or lacks what a card needs."""
    try:
        evaluation = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"expected the result of an evaluation in {shorten(str(path))}; {shorten(error)}.") from error
    if not isinstance(evaluation, dict):
        raise ValueError(f"expected the result of an evaluation in {shorten(str(path))}; got {shorten(evaluation)}.")
    _eval_results(evaluation)
    return evaluation
