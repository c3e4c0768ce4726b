"""MMAR, and the models that build on it, by their configs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModel

from ..modeling_mmar.configuration_mmar import MMARConfig, shorten
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..pipelines.pipeline_mmar import MMARPipeline
from ..processors.processing_mmar import MMARProcessor


# Of a path in a message.
MAX_PATH_LENGTH = 200


@contextlib.contextmanager
def opening(path: str | Path, option: str) -> Iterator[None]:
    r"""
    Within the context a model, processor or pipeline is opened; what goes wrong names the user's option and the path.

    Args:
        path (`str` or `Path`): Folder or repository.
        option (`str`): What the user named it with, such as `"--model"`.

    Raises:
        ValueError: If there is no such folder and no such repository, or its files are nested too deep to be read.
    """
    expected = f"{option} must be the folder of an MMAR or a repository of the Hub"
    if not os.path.isdir(path):
        try:
            validate_repo_id(str(path))
        except HFValidationError as error:
            there = "is a file" if os.path.exists(path) else "does not exist"
            raise ValueError(f"{expected}; got {_shortened(path)}, which {there}. Correct the path.") from error
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{expected}; a file of {_shortened(path)} is nested too deep. Copy it again.") from error
    except (OSError, ValueError) as error:
        if os.path.isdir(path):
            raise
        raise ValueError(
            f"{expected}; got {_shortened(path)}, no folder here, and cannot be opened from the Hub "
            f"({shorten(error)}). Correct it."
        ) from error


def _shortened(path: str | Path) -> str:
    return repr(str(path)[:MAX_PATH_LENGTH])


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def default_dtype(device: str | torch.device) -> torch.dtype | None:
    """
    float32 on a CPU, in which an image and an answer do not depend on their batch; None, the saved dtype, elsewhere.
    """
    return torch.float32 if torch.device(device).type == "cpu" else None


def open_pipeline(
    path: str | Path,
    option: str = "`model`",
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
) -> MMARPipeline:
    r"""
    Loads a pipeline, for a command.

    Args:
        path (`str` or `Path`): Folder or repository.
        option (`str`, *optional*, defaults to "`model`"): What the user named it with.
        dtype (`torch.dtype` or `"auto"`, *optional*): Of the weights; `"auto"` is as saved. `default_dtype` by
            default.
        device (`str` or `torch.device`, *optional*): Where it runs; `default_device` by default.

    Returns:
        `MMARPipeline`

    Raises:
        ValueError: If it is not there, or not complete.
    """
    device = default_device() if device is None else device
    dtype = default_dtype(device) if dtype is None else dtype
    with opening(path, option):
        return MMARPipeline.from_pretrained(path, **({} if dtype in (None, "auto") else {"dtype": dtype})).to(device)


def open_processor(path: str | Path, option: str = "`model`") -> MMARProcessor:
    """The processor of a folder or repository, for a command; raises a `ValueError` as `open_pipeline` does."""
    with opening(path, option):
        return MMARProcessor.from_pretrained(path)


def open_model(path: str | Path, option: str = "`model`", **kwargs: Any) -> MMARForConditionalGeneration:
    r"""
    Loads a model by the class that its config names.

    Args:
        path (`str` or `Path`): Folder or repository.
        option (`str`, *optional*, defaults to "`model`"): What the user named it with.
        **kwargs: Of `from_pretrained`.

    Returns:
        `MMARForConditionalGeneration`, or one of `ablations/`.

    Raises:
        ValueError: If it is not there, not whole, or of another kind.
    """
    with opening(path, option):
        return _open_model(path, **kwargs)


def _open_model(path: str | Path, **kwargs: Any) -> MMARForConditionalGeneration:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError):
        # What is wrong with it is said there.
        return MMARForConditionalGeneration.from_pretrained(path, **kwargs)
    if type(config) is MMARConfig:
        return MMARForConditionalGeneration.from_pretrained(path, **kwargs)
    if not isinstance(config, MMARConfig):
        raise ValueError(
            f"expected an MMAR in {shorten(path)}; its config is of a {shorten(config.model_type)}. Name another "
            "folder."
        )
    return AutoModel.from_pretrained(path, config=config, **kwargs)


def model_class_of(config: MMARConfig) -> type[MMARForConditionalGeneration]:
    """The class of the models that have such a config."""
    with torch.device("meta"):
        return type(AutoModel.from_config(config))
