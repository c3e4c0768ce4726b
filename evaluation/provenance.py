"""Where a result was measured, and with which versions."""

import platform
import subprocess
from pathlib import Path

import torch
import transformers


def commit() -> str:
    """The checkout's commit, and whether there are changes on top, other than of the pages of results."""
    git = ["git", "-C", str(Path(__file__).parent)]
    code = [":(top)", ":(top,exclude)docs/results"]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def versions() -> str:
    """The versions of the libraries that a result depends on."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"
