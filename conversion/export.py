"""
Writes an MMAR folder again as one Hub folder that opens through every door, in bfloat16 unless another dtype is asked.

    python -m mmar.conversion.export runs/mmar-tiny/final checkpoints/mmar-tiny --dtype bfloat16
"""

import argparse
from pathlib import Path

import torch

from ..command import run_command
from ..modeling_mmar.configuration_mmar import shorten
from ..pipelines.pipeline_mmar import MMARPipeline
from .models import open_model, open_processor


DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a trained model and its processor, for example a checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of all but the VAE, which stays float32")
    for name, kind in (("guidance_scale", float), ("num_ar_steps", int), ("num_inference_steps", int)):
        parser.add_argument(f"--{name}", type=kind, help="new default of image generation")
    args = parser.parse_args()

    if Path(args.source).resolve() == args.out.resolve():
        raise ValueError(
            f"expected another folder than {shorten(args.source)} to write to: its weights would be overwritten."
        )
    model = open_model(args.source, "`source`", dtype=DTYPES[args.dtype])
    scheduler = model.default_scheduler()
    if (Path(args.source) / "scheduler").is_dir():
        scheduler = MMARPipeline.from_pretrained(args.source, model=model).scheduler
    for name in ("guidance_scale", "num_ar_steps", "num_inference_steps"):
        if getattr(args, name) is not None:
            model.config.image_generation[name] = getattr(args, name)
    model.config.validate_architecture()
    processor = open_processor(args.source, "`source`")
    pipe = MMARPipeline(model=model, processor=processor, scheduler=scheduler)
    pipe.save_pretrained(args.out)


if __name__ == "__main__":
    run_command(main)
