"""Where the evaluation kits are, and processes that run them: their import changes global state."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import HIDDEN


ROOT = Path(__file__).parents[2]
# Set by `make test-kits`: with it a kit that is missing or broken fails the tests, and does not skip them.
KITS = os.environ.get("MMAR_KITS")


def needs(kit: str) -> pytest.MarkDecorator:
    """Skips tests where a kit is not installed."""
    is_there = KITS is not None or importlib.util.find_spec(kit) is not None
    return pytest.mark.skipif(not is_there, reason=f"needs {kit}: `make test-kits`")


def run_kit(home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    r"""
    Args:
        home (`Path`): Home folder of the process.
        *arguments: Module or script, and its arguments.
        **environment (`str`): More variables; the process is offline and has one thread.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith((*HIDDEN, "LMUData"))}
    env |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    paths = [ROOT, Path(__file__).parent] + ([] if KITS is None else [Path(KITS).resolve()])
    env |= {"PYTHONPATH": os.pathsep.join(map(str, paths))} | environment
    command = [sys.executable, str(Path(__file__).parent / "run_kit.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
