"""
The systems of Table 3 as configs of one size: MMAR, epsilon-prediction, VQ tokens, and the Transfusion-like model.

Without EmbeddingViT and Diffusion MLP the others have fewer weights; PLoRA's rank, the LLM's own capacity for image
tokens, is raised until each system trains as many as MMAR (within half a rank).
"""

import copy
from typing import Any

import torch
from transformers import AutoModel

from ..modeling_mmar.configuration_mmar import MMARConfig, shorten
from .modeling_transfusion_mmar import MMARTransfusionConfig
from .modeling_vq_mmar import MMARVQConfig


# By the names of Table 3.
SYSTEMS = {
    "mmar": "MMAR (full method)",
    "epsilon": "w/ epsilon-pred.",
    "vq": "w/ VQ",
    "transfusion": "Transfusion-like",
}
# The class of a system's config; that of MMAR's own in the others.
CONFIG_CLASSES = {"vq": MMARVQConfig, "transfusion": MMARTransfusionConfig}
# What a config says of its own class and of the files beside it.
OF_THE_CLASS = ("auto_map", "custom_pipelines", "model_type", "architectures", "transformers_version")


def num_trained(config: MMARConfig, train_backbone: bool) -> int:
    r"""
    Counts what a training changes.

    Args:
        config (`MMARConfig`): Of a system.
        train_backbone (`bool`): Whether Qwen2's weights are among it.

    Returns:
        `int`: Number of trained weights.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    model.freeze(train_backbone=train_backbone)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def system_config(
    name: str, base: MMARConfig, vq_config: dict[str, Any] | None = None, train_backbone: bool = True
) -> MMARConfig:
    r"""
    A system of the size of an MMAR.

    Args:
        name (`str`): A key of `SYSTEMS`.
        base (`MMARConfig`): The MMAR, of v-prediction.
        vq_config (`dict`, *optional*): Arguments of the `VQModel` of "vq"; LDM's vq-f16 by default.
        train_backbone (`bool`, *optional*, defaults to `True`): Whether Qwen2's weights are trained: it decides what
            is counted.

    Returns:
        `MMARConfig`, or one that builds on it, of as many trained weights.

    Raises:
        ValueError: For another name, or if it has more trained weights without PLoRA.
    """
    if name not in SYSTEMS:
        raise ValueError(f"expected one of the systems {', '.join(SYSTEMS)}; got {shorten(name)}.")
    values = copy.deepcopy({key: value for key, value in base.to_dict().items() if key not in OF_THE_CLASS})
    if name in ("epsilon", "transfusion"):
        values["diffusion_config"]["prediction_type"] = "epsilon"
    if name == "vq":
        values["vae_config"] = vq_config
    config_class = CONFIG_CLASSES.get(name, MMARConfig)
    target = num_trained(base, train_backbone)

    def of_rank(rank: int) -> MMARConfig:
        # Alpha stays, as it does from 0.5B to 7B (suppl. Sec. 6.1), so that the learning rate need not change.
        return config_class.from_dict({**values, "plora_rank": rank})

    if name in ("mmar", "epsilon"):
        return of_rank(base.plora_rank)
    one, two = (num_trained(of_rank(rank), train_backbone) for rank in (1, 2))
    rank = 1 + round((target - one) / (two - one))
    if rank < 1:
        raise ValueError(
            f"expected {target:,} trained weights for {shorten(name)}; without PLoRA it has {2 * one - two:,}. Take "
            "fewer codes, or a larger base."
        )
    return of_rank(rank)
