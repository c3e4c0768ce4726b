"""What diffusers opens first; written by saving_mmar.py."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # diffusers copies the files named here and no others.
    from .checks_mmar import *  # noqa: F403
    from .configuration_mmar import *  # noqa: F403
    from .diffusion_mmar import *  # noqa: F403
    from .embedding_vit_mmar import *  # noqa: F403
    from .fast_generation_mmar import *  # noqa: F403
    from .generation_mmar import *  # noqa: F403
    from .image_processing_mmar import *  # noqa: F403
    from .masking_mmar import *  # noqa: F403
    from .modeling_mmar import *  # noqa: F403
    from .parameterization_mmar import *  # noqa: F403
    from .pipeline_mmar import *  # noqa: F403
    from .plora_mmar import *  # noqa: F403
    from .prefix_mmar import *  # noqa: F403
    from .processing_mmar import *  # noqa: F403
    from .quantization_mmar import *  # noqa: F403
    from .saving_mmar import *  # noqa: F403
    from .text_to_image_mmar import *  # noqa: F403


# By path: diffusers makes the repository's name a part of the module's, and a dot in it breaks relative imports.
_spec = spec_from_file_location(f"{__name__}_pipeline", Path(__file__).with_name("pipeline_mmar.py"))
_module = module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
MMARPipeline = _module.MMARPipeline

__all__ = ["MMARPipeline"]
