"""MMAR, and the models that build on it, by their configs."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from ..modeling_mmar.configuration_mmar import MMARConfig
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration


def open_model(path: str, **kwargs: Any) -> MMARForConditionalGeneration:
    r"""
    Loads a model by the class that its config names.

    Args:
        path (`str`): Folder or repository.
        **kwargs: Of `from_pretrained`.

    Returns:
        `MMARForConditionalGeneration`, or one of `ablations/`.

    Raises:
        ValueError: If it is not there, not whole, or of another kind.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError):
        # What is wrong with it is said there.
        return MMARForConditionalGeneration.from_pretrained(path, **kwargs)
    if type(config) is MMARConfig:
        return MMARForConditionalGeneration.from_pretrained(path, **kwargs)
    if not isinstance(config, MMARConfig):
        raise ValueError(
            f"expected an MMAR in {path!r}; its config is of a {config.model_type!r}. Name another folder."
        )
    return AutoModel.from_pretrained(path, config=config, **kwargs)


def model_class_of(config: MMARConfig) -> type[MMARForConditionalGeneration]:
    """The class of the models that have such a config."""
    with torch.device("meta"):
        return type(AutoModel.from_config(config))
