"""
Trains MMAR after a recipe.

    python -m mmar.training.train training/recipes/mmar_tiny.yaml model=runs/init data=train.parquet output_dir=runs/a

RECIPE is a YAML file of `DataArguments` and `MMARTrainingArguments` fields; `key=value` on the command line wins.
"""

import contextlib
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch
import yaml
from transformers import HfArgumentParser, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..command import run_command
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..processors.processing_mmar import MMARProcessor
from .data import MMARDataCollator, MMARLatentDataset, read_rows
from .trainer import MMARTrainer, MMARTrainingArguments


@dataclass
class DataArguments:
    """What to train on, and how the tasks are drawn."""

    model: str = field(metadata={"help": "folder of an initialized MMAR"})
    data: str = field(metadata={"help": "parquet with image, captions, questions, answers"})
    task_weights: list[float] = field(
        default_factory=lambda: [0.5, 0.45, 0.05], metadata={"help": "of text to image, image to text, unconditional"}
    )
    mask_ratio_min: float = field(default=0.7, metadata={"help": "lower bound of the mask ratio"})
    num_copies: int = field(default=0, metadata={"help": "views of each picture and kind for image to text"})
    swap_rate: float = field(default=0.0, metadata={"help": "share of answers with another row's content in them"})
    diffusion_batch_mul: int = field(default=4, metadata={"help": "timesteps drawn per z"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention of transformers to train with"})
    resume: bool = field(default=True, metadata={"help": "go on from the last checkpoint in output_dir"})

    def __post_init__(self):
        weights = self.task_weights
        numbers = isinstance(weights, list) and all(isinstance(w, (int, float)) and w >= 0 for w in weights)
        if not numbers or len(weights) != 3 or not 0 < sum(weights) < math.inf:
            raise ValueError(
                "`task_weights` must be three numbers of at least 0, not all 0: text to image, image to text, "
                f"unconditional; got {weights!r}."
            )
        self.task_weights = [float(weight) for weight in weights]
        if not 0 <= self.mask_ratio_min < 1:
            raise ValueError(f"`mask_ratio_min` must be in [0, 1); got {self.mask_ratio_min!r}.")
        if not 0 <= self.swap_rate <= 1:
            raise ValueError(f"`swap_rate` must be in [0, 1]; got {self.swap_rate!r}.")
        for name, minimum in (("num_copies", 0), ("diffusion_batch_mul", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"`{name}` must be an integer of at least {minimum}; got {value!r}.")


def parse(arguments: list[str]) -> tuple[DataArguments, MMARTrainingArguments]:
    r"""
    Reads a recipe and the overrides after it.

    Raises:
        ValueError: If there is no recipe, an override is not `key=value`, a key is unknown or missing, or a value of
            another type than its field's.
    """
    if not arguments or not Path(arguments[0]).is_file():
        raise ValueError(f"expected a recipe (a YAML file) as first argument; got {arguments[:1]}.")
    values = _yaml(Path(arguments[0]).read_text(encoding="utf-8"), arguments[0]) or {}
    if not isinstance(values, dict):
        raise ValueError(f"expected a recipe of `key: value` lines in {arguments[0]}; got a {type(values).__name__}.")
    for argument in arguments[1:]:
        key, found, value = argument.partition("=")
        if not found:
            raise ValueError(f"expected key=value after the recipe; got {argument!r}.")
        values[key] = _yaml(value, key)
    if missing := [key for key in ("model", "data", "output_dir") if values.get(key) is None]:
        raise ValueError(f"the training needs {', '.join(missing)}; give them as key=value.")
    kinds = {f.name: f.type for part in (DataArguments, MMARTrainingArguments) for f in dataclasses.fields(part)}
    values = {name: _typed(name, value, kinds[name]) if name in kinds else value for name, value in values.items()}
    return HfArgumentParser((DataArguments, MMARTrainingArguments)).parse_dict(values)


def _yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML in {name!r}; it cannot be read ({error}).") from error


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value of a recipe as its field's type; YAML 1.1 reads 1e-3 as text, and any text as true."""
    kinds = set(get_args(kind)) if get_origin(kind) in (Union, UnionType) else {kind}
    if value is None and (NoneType in kinds or not kinds & {bool, int, float, str}):
        return value
    if kinds - {NoneType} == {str} and not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text; got {value!r}.")
    expected = next((k for k in (bool, int, float) if k in kinds), None)
    if expected is None or (str in kinds and value is not None):
        return value
    if expected is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    elif type(value) is expected or (expected is int and float in kinds and type(value) is float):
        return value
    example = {bool: "true or false", int: "an integer", float: "a number"}[expected]
    raise ValueError(f"`{name}` must be {example}; got {value!r}.")


def check_same_vae(checkpoint: str, model: MMARForConditionalGeneration) -> None:
    r"""
    The latents are made before a checkpoint is loaded, so its VAE and latent scale must be those of the model.

    Args:
        checkpoint (`str`): Folder to resume from.
        model (`MMARForConditionalGeneration`): The model that encodes.

    Raises:
        ValueError: If the checkpoint was trained on latents of another VAE.
    """
    weights = model.vae.state_dict()
    resumed = MMARForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
    stored = resumed.vae.state_dict()
    same = stored.keys() == weights.keys() and all(torch.equal(stored[n], weights[n].cpu()) for n in weights)
    if not same or resumed.config.vae_config != model.config.vae_config:
        raise ValueError(
            f"expected the VAE of `model` in the checkpoint {checkpoint!r}, since latents are made with it; got "
            "another one. Set `resume=false`, or train into another `output_dir`."
        )


def num_steps(checkpoint: str) -> int:
    """Steps that a checkpoint was trained for."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step


def main() -> None:
    data_args, args = parse(sys.argv[1:])
    rows = read_rows(data_args.data)
    if data_args.swap_rate > 0 and not any(row.get("swaps") for row in rows):
        raise ValueError("`swap_rate` needs swaps in `data`; no row has them. Set it to 0, or add the column.")
    # Saved in bfloat16 or not, the weights are trained in float32; `bf16: true` is autocast.
    model = MMARForConditionalGeneration.from_pretrained(
        data_args.model, dtype="float32", attn_implementation=data_args.attn_implementation
    )
    set_seed(args.seed)
    model.to(args.device)
    model.config.diffusion_config.diffusion_batch_mul = data_args.diffusion_batch_mul
    processor = MMARProcessor.from_pretrained(data_args.model)
    dataset = MMARLatentDataset(rows, model, processor, data_args.num_copies)
    collator = MMARDataCollator(
        processor,
        model.config.num_latents,
        tuple(data_args.task_weights),
        data_args.mask_ratio_min,
        data_args.swap_rate,
    )
    trainer = MMARTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=collator, processing_class=processor
    )
    last = get_last_checkpoint(args.output_dir) if data_args.resume and Path(args.output_dir).is_dir() else None
    if last is not None:
        check_same_vae(last, model)
    if last is not None and 0 < args.max_steps <= num_steps(last):
        # transformers would take one more step.
        print(f"{last} has all of `max_steps`, {args.max_steps}; writing its final weights.")
        trainer.load_checkpoint(last)
    else:
        trainer.train(resume_from_checkpoint=last)
    with trainer.ema_weights():
        trainer.save_model(str(Path(args.output_dir) / "final"))


if __name__ == "__main__":
    run_command(main)
