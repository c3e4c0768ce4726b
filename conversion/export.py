"""
Writes an MMAR folder again as one Hub folder that opens through every door, in bfloat16 unless another dtype is asked.

    mmar export runs/mmar-tiny/final checkpoints/mmar-tiny --dtype bfloat16
"""

from pathlib import Path

import torch

from ..modeling_mmar.configuration_mmar import shorten
from ..modeling_mmar.saving_mmar import SCHEDULER_FOLDER
from ..pipelines.pipeline_mmar import MMARPipeline
from .models import open_model, open_processor


def main(
    source: str,
    out: Path,
    dtype: str,
    guidance_scale: float | None,
    num_ar_steps: int | None,
    num_inference_steps: int | None,
) -> None:
    r"""
    Writes a folder again.

    Args:
        source (`str`): Folder or repository of a trained model and its processor, for example a checkpoint.
        out (`Path`): Another folder.
        dtype (`str`): Of all but the VAE, which stays float32.
        guidance_scale, num_ar_steps, num_inference_steps (*optional*): New defaults of image generation.

    Raises:
        ValueError: If `source` is no MMAR or is `out`, or a default is out of range.
    """
    if Path(source).resolve() == out.resolve():
        raise ValueError(
            f"expected another folder than {shorten(source)} to write to: its weights would be overwritten."
        )
    model = open_model(source, "`source`", dtype=getattr(torch, dtype))
    scheduler = model.default_scheduler()
    if (Path(source) / SCHEDULER_FOLDER).is_dir():
        scheduler = MMARPipeline.from_pretrained(source, model=model).scheduler
    given = {
        "guidance_scale": guidance_scale,
        "num_ar_steps": num_ar_steps,
        "num_inference_steps": num_inference_steps,
    }
    model.config.image_generation |= {name: value for name, value in given.items() if value is not None}
    model.config.validate_architecture()
    processor = open_processor(source, "`source`")
    pipe = MMARPipeline(model=model, processor=processor, scheduler=scheduler)
    pipe.save_pretrained(out)
