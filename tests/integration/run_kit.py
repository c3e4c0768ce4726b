"""
Runs a module or script with an evaluation kit: `python run_kit.py MODULE_OR_FILE ARGUMENTS`.

The kits import torchvision, whose package index builds fit torch for CUDA. Beside torch for CPU its compiled part does
not load, and then it fails to import, since two operators are unknown. No test uses them: here they get a name.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import torch


def name_missing_operators() -> None:
    """Makes torchvision importable where its compiled part does not fit this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    name_missing_operators()
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.path[0] = ""  # as `python -m` has it, and not this folder
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
