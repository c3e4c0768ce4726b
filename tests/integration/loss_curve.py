"""
The losses of the tiny recipe's first 200 steps, in batches of 8, on 256 rows of the bundled data.

    python tests/integration/loss_curve.py      # writes loss_curve.json anew; say in the commit why it changed
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from mmar.modeling_mmar.configuration_mmar import MMARConfig
from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from mmar.processors.processing_mmar import MMARProcessor
from mmar.training import train
from mmar.training.latents import cache_latents
from mmar.training.sources import open_source


ROOT = Path(__file__).parents[2]
CHECKPOINT, DATA = ROOT / "checkpoints/mmar-tiny", ROOT / "checkpoints/emoji-lite/train.parquet"
CURVE = Path(__file__).with_name("loss_curve.json")
STEPS, INTERVAL, NUM_ROWS = 200, 20, 256


def untrained(folder: Path) -> tuple[MMARForConditionalGeneration, MMARProcessor]:
    """The bundled model with its trained weights drawn anew, saved to `folder`."""
    trained = MMARForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    processor = MMARProcessor.from_pretrained(CHECKPOINT)
    torch.manual_seed(0)
    model = MMARForConditionalGeneration(MMARConfig.from_pretrained(CHECKPOINT))
    model.vae.load_state_dict(trained.vae.state_dict())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def losses(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Means of the losses over each `INTERVAL` steps."""
    data = folder / "rows.parquet"
    pq.write_table(pq.read_table(DATA).slice(0, NUM_ROWS), data)
    model, processor = untrained(folder / "init")
    cache_latents(open_source(data), model, processor, folder / "latents", num_copies=1)
    recipe = [ROOT / "training/recipes/mmar_tiny_stage1.yaml", f"model={folder / 'init'}", f"data={data}"]
    recipe += [f"latents={folder / 'latents'}", f"output_dir={folder / 'run'}", f"max_steps={STEPS}", "use_cpu=true"]
    recipe += [
        f"logging_steps={INTERVAL}",
        "per_device_train_batch_size=8",
        "save_strategy=no",
        "disable_tqdm=true",
        "bf16=false",
    ]
    train.main([*map(str, recipe), *overrides])
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    return [
        {name: entry[name] for name in ("step", "text_loss", "image_loss")} for entry in history if "loss" in entry
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        CURVE.write_text(json.dumps(losses(Path(temporary)), indent=1) + "\n")
