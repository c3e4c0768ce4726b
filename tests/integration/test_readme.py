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


def test_the_examples_give_the_output_that_is_printed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    text = (ROOT / "README.md").read_text()
    (expected,) = re.findall(r"```\n(an emoji of .*?)```", text, re.DOTALL)
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == expected


PAGES = ["README.md", "checkpoints/mmar-tiny/README.md", "configs/mmar-tiny/card.yaml"]
# The log of runs names recipes of its time.
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "runs.md"]


@pytest.mark.parametrize("page", PAGES)
def test_recipes_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"(?:recipes/|\b)(mmar_\w+\.yaml|small\.yaml)", text):
        assert list(ROOT.glob(f"*/recipes/{name}")), name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert MAKE_COMMANDS
    for target in MAKE_COMMANDS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
