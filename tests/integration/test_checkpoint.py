"""The bundled checkpoint and its data: small, apart, and as good as its card says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import run_fresh
from huggingface_hub import ModelCard

from mmar import MMARConfig, MMARForConditionalGeneration, MMARPipeline
from mmar.conversion.card import count_parameters
from mmar.conversion.models import open_pipeline
from mmar.evaluation.answers import MMARAnswerer
from mmar.evaluation.emoji_styles import score_captions
from mmar.modeling_mmar.saving_mmar import export_remote_code
from mmar.training.emoji_rows import read_rows


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "mmar-tiny"
DATA = CHECKPOINT.parent / "emoji-lite"
MAX_BYTES = 24_000_000
MINIMUM_SHARES = {"name": 0.5, "style": 0.5, "caption": 0.29}


@pytest.fixture(scope="module")
def pipe():
    pipeline = MMARPipeline.from_pretrained(CHECKPOINT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_size_and_formats():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert not [path.name for path in files if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    assert (CHECKPOINT / "README.md").is_file() and (DATA / "README.md").is_file()


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


def test_held_out_pictures_are_described(pipe):
    scores = score_captions(pipe, read_rows(DATA / "test.parquet"))
    # Well below the card's figures, which are exact for one machine: other processors round bfloat16 otherwise.
    for name, share in MINIMUM_SHARES.items():
        assert scores[name]["all"] >= share, name


def test_pictures_differ_by_prompt_and_agree_by_seed(pipe):
    def draw(prompt):
        return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np").images

    crab, again, apple = draw("an emoji of crab in noto style"), draw("an emoji of crab in noto style"), draw("apple")
    assert (crab == again).all()
    assert abs(crab - apple).mean() > 0.02
    # Emoji stand on white.
    assert crab[0, :2].mean() > 0.9


def test_an_image_of_a_list_of_seeds_is_generated_again_alone():
    """Loaded as the commands do, in float32; 48 of 255 levels apart in bfloat16."""
    pipe = open_pipeline(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["an emoji of crab in noto style", "an emoji of banana in openmoji style", "apple"]
    together = pipe(prompts, generator=[torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]).images
    for index, seed in enumerate((7, 8, 9)):
        (alone,) = pipe(prompts[index], generator=torch.Generator().manual_seed(seed)).images
        difference = np.asarray(alone).astype(int) - np.asarray(together[index])
        # Where rounding falls on the other side of a level.
        assert abs(difference).max() <= 1


def test_commands_load_float32_on_a_cpu():
    assert open_pipeline(CHECKPOINT, device="cpu").model.lm_head.weight.dtype == torch.float32
    assert MMARAnswerer.from_pretrained(str(CHECKPOINT), device="cpu").model.dtype == torch.float32
    saved = MMARAnswerer.from_pretrained(str(CHECKPOINT), device="cpu", dtype="auto")
    assert saved.model.dtype == torch.bfloat16
    assert open_pipeline(CHECKPOINT, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_card_is_a_made_one():
    card = ModelCard.load(CHECKPOINT / "README.md")
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("transformers", "cc-by-sa-4.0", "any-to-any")
    assert data.datasets == ["emoji-styles"] and "mmar" in data.tags
    figures = {result.metric_name: result.metric_value for result in data.eval_results}
    # Of all of emoji-styles, where these rows are of its best known part.
    assert 0.3 <= figures["name answered exactly"] < 1
    assert {"drawings that the judge names as asked", "drawings that copy a training picture"} <= set(figures)
    with torch.device("meta"):
        counts = count_parameters(MMARForConditionalGeneration(MMARConfig.from_pretrained(CHECKPOINT)))
    assert all(f"{part} {count:,}" in card.text for part, count in counts.items())
    for heading in ("Intended use", "Limitations", "Training data", "Training", "Evaluation", "License"):
        assert f"## {heading}\n" in card.text
    assert "Not stated" not in card.text and "OpenMoji" in card.text


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "remote code"])
def test_each_example_of_the_card_runs(tmp_path, installed):
    blocks = re.findall(r"```python\n(.*?)```", (CHECKPOINT / "README.md").read_text(), re.DOTALL)
    chosen = [block for block in blocks if ("from mmar import" in block) == installed]
    assert len(blocks) == 5 and chosen
    (tmp_path / "checkpoints").symlink_to(CHECKPOINT.parent)
    code = "\n".join(chosen)
    size = run_fresh(
        f"{code}\nfrom PIL import Image\nresult = Image.open('drawn.png').size", tmp_path, None, None, installed
    )
    assert size == [64, 64]
