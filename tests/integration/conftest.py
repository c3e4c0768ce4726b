"""A tiny pipeline, its folder in two forms, and a Hub on the loopback address."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doors import outputs_of, save_file
from helpers import tiny_model
from hub_server import serve
from squares import make_processor

from mmar import MMARPipeline


# Dots and hyphens may stand in a repository's name, but not in a Python module's.
REPO = "tiny-org/mmar-tiny.v1"
SHARDED_REPO = "tiny-org/mmar-sharded-bf16"


def make_pipeline() -> MMARPipeline:
    processor = make_processor()
    tokenizer = processor.tokenizer
    model = tiny_model(
        text_config={
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=processor.image_token_id,
    )
    pipe = MMARPipeline(model, processor, model.default_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For such small models more threads only wait for each other; and one is what `doors.py` computes on."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def pipe() -> MMARPipeline:
    """Not to be changed by a test."""
    return make_pipeline()


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `REPO` (float32, one weights file) and `SHARDED_REPO` (bfloat16, several), each written elsewhere and
    then moved; beside them, as NAME.safetensors, what the saved model gave."""
    root = tmp_path_factory.mktemp("hub")
    written = tmp_path_factory.mktemp("written")
    for repo, dtype, max_shard_size in ((REPO, torch.float32, None), (SHARDED_REPO, torch.bfloat16, "200KB")):
        pipe = make_pipeline().to(dtype)
        pipe.save_pretrained(written / repo, max_shard_size=max_shard_size)
        save_file(outputs_of(pipe.model, pipe.processor), written / f"{repo}.safetensors")
    (written / "tiny-org").rename(root / "tiny-org")
    return root


@pytest.fixture(scope="session")
def hub_url(hub_root: Path) -> Iterator[str]:
    """Address of a Hub that serves `hub_root`."""
    with serve(hub_root) as url:
        yield url
