"""
Writes an MMAR's PLoRA as a LoRA adapter of peft, and reads one back.

    mmar peft export runs/mmar-7b runs/plora
    mmar peft import runs/mmar-7b runs/plora runs/mmar-7b-again

The adapter has the names of Qwen2, so that `PeftModel.from_pretrained(qwen2, folder)` opens it too, where it acts on
all tokens; in MMAR it acts on image tokens only. No number is changed either way.
"""

import json
import math
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..modeling_mmar.configuration_mmar import shorten
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..modeling_mmar.plora_mmar import PLoRALinear
from .folders import new_folder


ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# peft's names for the layers of a `Qwen2ForCausalLM`; MMAR's for the same layers.
PEFT_PREFIX, MMAR_PREFIX = "base_model.model.model.", "model.language_model."
FACTORS = {"lora_A.weight": "image_A", "lora_B.weight": "image_B"}
# Settings under which peft computes something else than W x + alpha / r B A x.
OTHER_KINDS = (
    "use_dora",
    "use_rslora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "modules_to_save",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)


def _plora_layers(model: MMARForConditionalGeneration) -> dict[str, PLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PLoRALinear)}


def plora_config(model: MMARForConditionalGeneration) -> LoraConfig:
    """peft's settings of a model's PLoRA."""
    backbone = (model.config.frozen_parts or {}).get("backbone", {})
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=backbone.get("repo_id"),
        revision=backbone.get("revision"),
        r=model.config.plora_rank,
        lora_alpha=int(alpha) if (alpha := model.config.plora_alpha).is_integer() else alpha,
        lora_dropout=0.0,
        target_modules=sorted({name.rpartition(".")[2] for name in _plora_layers(model)}),
        inference_mode=True,
    )


def export_plora(model: MMARForConditionalGeneration, folder: str | Path) -> None:
    r"""
    Writes a model's PLoRA in peft's format: adapter_config.json and adapter_model.safetensors.

    Args:
        model (`MMARForConditionalGeneration`): The model.
        folder (`str` or `Path`): Folder to make.

    Raises:
        ValueError: If the folder holds something.
    """
    tensors = {}
    for name, module in _plora_layers(model).items():
        layer = PEFT_PREFIX + name.removeprefix(MMAR_PREFIX)
        for theirs, ours in FACTORS.items():
            tensors[f"{layer}.{theirs}"] = getattr(module, ours).detach().cpu().contiguous()
    with new_folder(folder, sum(tensor.nbytes for tensor in tensors.values())) as unfinished:
        save_file(tensors, unfinished / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        plora_config(model).save_pretrained(unfinished)


def import_plora(model: MMARForConditionalGeneration, folder: str | Path) -> None:
    r"""
    Replaces a model's PLoRA by an adapter in peft's format, of Qwen2's layers or of MMAR's.

    Args:
        model (`MMARForConditionalGeneration`): The model; its rank must be the adapter's, and its alpha becomes it.
        folder (`str` or `Path`): As `export_plora` or peft wrote it.

    Raises:
        ValueError: If files are missing or broken, the adapter is of another kind or size, or lacks layers. The model
            is unchanged then.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"expected a LoRA in {shorten(str(folder))}; got an adapter of type {shorten(settings.get('peft_type'))}."
        )
    if others := [name for name in OTHER_KINDS if settings.get(name)] + ["bias"] * (settings.get("bias") != "none"):
        raise ValueError(
            f"expected a LoRA of one rank on all layers, without {', '.join(others)}; {shorten(str(folder))} has it. "
            "PLoRA computes W x + alpha / r B A x."
        )
    if settings.get("r") != model.config.plora_rank:
        raise ValueError(
            f"expected the rank {model.config.plora_rank} of the model's PLoRA in {shorten(str(folder))}; got "
            f"{shorten(settings.get('r'))}. Make a model of that `plora_rank`."
        )
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"expected a `lora_alpha` above 0 in {shorten(str(folder))}; got {shorten(alpha)}.")
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"expected the adapter's weights in {shorten(str(folder / ADAPTER_WEIGHTS))}; they are missing or broken "
            f"({shorten(error)}). Copy the folder whole; only safetensors are read."
        ) from error
    values = {_name_in_mmar(name): tensor for name, tensor in tensors.items()}
    targets = {
        f"{name}.{ours}": getattr(module, ours)
        for name, module in _plora_layers(model).items()
        for ours in FACTORS.values()
    }
    missing, left_over = sorted(targets.keys() - values.keys()), sorted(values.keys() - targets.keys())
    if len(values) != len(tensors):
        raise ValueError(
            f"expected each factor once in {shorten(str(folder))}; got {len(tensors)} tensors for {len(values)} "
            "factors, some under two names."
        )
    if missing or left_over:
        raise ValueError(
            f"expected an adapter of all {len(targets)} factors of the model's PLoRA in {shorten(str(folder))}; "
            f"{len(missing)} are missing ({', '.join(missing[:2]) or 'none'}), {len(left_over)} left over "
            f"({', '.join(left_over[:2]) or 'none'})."
        )
    for name, target in targets.items():
        if values[name].shape != target.shape:
            raise ValueError(
                f"expected {name} of shape {tuple(target.shape)}; the adapter has {tuple(values[name].shape)}. It "
                "belongs to a backbone of another size."
            )
        if not values[name].is_floating_point() or not bool(torch.isfinite(values[name]).all()):
            raise ValueError(
                f"expected {name} of finite numbers in {shorten(str(folder))}; got {values[name].dtype} with NaN, "
                "infinity or integers. Train or export the adapter again."
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
    model.config.plora_alpha = float(alpha)
    for module in _plora_layers(model).values():
        module.image_scaling = model.config.plora_alpha / model.config.plora_rank


def _read_settings(folder: Path) -> dict:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"names and values expected, got {shorten(settings)}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected the folder of a peft adapter; {shorten(str(folder / ADAPTER_CONFIG))} cannot be read "
            f"({shorten(error)})."
        ) from error
    return settings


def _name_in_mmar(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    for theirs, ours in FACTORS.items():
        name = name.removesuffix(theirs) + ours if name.endswith(theirs) else name
    return name if name.startswith(MMAR_PREFIX) else MMAR_PREFIX + name.removeprefix("model.")
