"""MMAR: text from images and images from text with one model (arXiv 2410.10798)."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


# In a checkout the folders stand beside this one; in an installation they stand inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "modeling_mmar").is_dir():
    __path__.append(str(_checkout))

__version__ = "0.1.0"

_EXPORTS = {
    "MMARConfig": "modeling_mmar.configuration_mmar",
    "MMARViTConfig": "modeling_mmar.configuration_mmar",
    "MMARDiffusionConfig": "modeling_mmar.configuration_mmar",
    "MMARModel": "modeling_mmar.modeling_mmar",
    "MMARForConditionalGeneration": "modeling_mmar.modeling_mmar",
    "MMARImageProcessor": "processors.image_processing_mmar",
    "MMARProcessor": "processors.processing_mmar",
    "MMARPipeline": "pipelines.pipeline_mmar",
    "MMARPipelineOutput": "pipelines.pipeline_mmar",
    "MMARTextToImagePipeline": "pipelines.text_to_image_mmar",
    "MMARTrainer": "training.trainer",
    "MMARTrainingArguments": "training.trainer",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from .modeling_mmar.configuration_mmar import MMARConfig, MMARDiffusionConfig, MMARViTConfig  # noqa: F401
    from .modeling_mmar.modeling_mmar import MMARForConditionalGeneration, MMARModel  # noqa: F401
    from .pipelines.pipeline_mmar import MMARPipeline, MMARPipelineOutput  # noqa: F401
    from .pipelines.text_to_image_mmar import MMARTextToImagePipeline  # noqa: F401
    from .processors.image_processing_mmar import MMARImageProcessor  # noqa: F401
    from .processors.processing_mmar import MMARProcessor  # noqa: F401
    from .training.trainer import MMARTrainer, MMARTrainingArguments  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmar' has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def _register() -> None:
    """
    Makes MMAR known to transformers' auto classes and pipelines, so that they need no code from a repository.

    They take classes, not names; so this imports the model. Whoever imports `mmar` is about to.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    from .ablations.modeling_transfusion_mmar import MMARTransfusionConfig, MMARTransfusionForConditionalGeneration
    from .ablations.modeling_vq_mmar import MMARVQConfig, MMARVQForConditionalGeneration
    from .modeling_mmar.configuration_mmar import CUSTOM_PIPELINES, MMARConfig
    from .modeling_mmar.modeling_mmar import MMARForConditionalGeneration
    from .pipelines.text_to_image_mmar import MMARTextToImagePipeline
    from .processors.image_processing_mmar import MMARImageProcessor
    from .processors.processing_mmar import MMARProcessor

    models = {
        MMARConfig: MMARForConditionalGeneration,
        MMARVQConfig: MMARVQForConditionalGeneration,
        MMARTransfusionConfig: MMARTransfusionForConditionalGeneration,
    }
    for config_class, model_class in models.items():
        AutoConfig.register(config_class.model_type, config_class)
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            auto_class.register(config_class, model_class)
        AutoImageProcessor.register(config_class, slow_image_processor_class=MMARImageProcessor)
        AutoProcessor.register(config_class, MMARProcessor)
    for task, entry in CUSTOM_PIPELINES.items():
        PIPELINE_REGISTRY.register_pipeline(
            task, pipeline_class=MMARTextToImagePipeline, pt_model=AutoModel, type=entry["type"]
        )


_register()
