"""Files have the permissions that the umask leaves to new ones, weights too."""

import os
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import tiny_model
from squares import make_processor, make_rows, make_squares_model, make_trainer

from mmar.conversion.folders import new_folder
from mmar.files import write_whole
from mmar.pipelines.pipeline_mmar import MMARPipeline
from mmar.training.latents import cache_latents


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def save_pipeline(folder: Path) -> None:
    processor = make_processor()
    model = make_squares_model(processor)
    MMARPipeline(model, processor, model.default_scheduler()).save_pretrained(folder, max_shard_size="100KB")


def train(folder: Path) -> None:
    trainer = make_trainer(folder, make_processor(), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "final"))


def encode(folder: Path) -> None:
    cache_latents(make_rows(), tiny_model(), make_processor(), folder)


def write_new_folder(folder: Path) -> None:
    with new_folder(folder) as unfinished:
        tiny_model().vae.save_pretrained(unfinished)
        pq.write_table(pa.table({"a": [1]}), unfinished / "rows.parquet")


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: tiny_model().save_pretrained(folder),
        lambda folder: tiny_model().model.save_pretrained(folder),
        lambda folder: tiny_model().vae.save_pretrained(folder),
        save_pipeline,
        train,
        encode,
        write_new_folder,
        lambda folder: write_whole(folder / "a.json", b"{}"),
    ],
    ids=["model", "inner model", "vae", "pipeline", "training", "latents", "new folder", "write_whole"],
)
def test_new_files_have_the_permissions_of_the_umask(tmp_path, umask, write):
    write(tmp_path / "out")
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in paths}
    expected = {name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask for name in modes}
    # What filelock writes is no result.
    modes.pop("out/_lock", None), expected.pop("out/_lock", None)
    assert modes == expected and len(modes) > 1
