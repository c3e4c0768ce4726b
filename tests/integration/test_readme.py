"""Each Python block of the README runs, from a copy of the checkout's root with the bundled checkpoint."""

import re
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
MAKE_COMMANDS = re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("readme")
    (path / "checkpoints").symlink_to(ROOT / "checkpoints")
    return path


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_block_runs(index, folder, monkeypatch):
    monkeypatch.chdir(folder)  # a later block may read what an earlier one wrote
    names = {"__name__": "readme"}
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), names)
    # In bfloat16 an image would depend on its batch.
    assert names["pipe"].dtype == torch.float32


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert MAKE_COMMANDS
    for target in MAKE_COMMANDS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
