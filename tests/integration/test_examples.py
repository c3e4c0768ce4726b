"""The examples beside the demo, as they are run, on a few rows."""

import io
import json
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import PeftModel
from PIL import Image

from mmar import MMARForConditionalGeneration


ROOT = Path(__file__).parents[2]
NAMES = {"red apple": "apple", "green apple": "apple", "lemon": "lemon"}


def photo(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_parquet(folder):
    rows = [
        {"image": {"bytes": photo(colour), "path": None}, "label_name": name, "coarse_name": kind}
        for (name, kind), colour in zip(NAMES.items(), ("red", "green", "yellow"), strict=True)
    ]
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def write_photos(folder):
    """As the set's own repository has them."""
    places = {"Fruit/Apple/Red-Apple": "red", "Fruit/Apple/Green-Apple": "green", "Fruit/Lemon": "yellow"}
    for split in ("train", "test"):
        for place, colour in places.items():
            (folder / split / place).mkdir(parents=True)
            (folder / split / place / "photo_001.jpg").write_bytes(photo(colour))


def run_example(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(ROOT / "examples")
    return runpy.run_path(str(ROOT / "examples" / "finetune_lora.py"), run_name="__main__")


@pytest.mark.parametrize("write", [write_parquet, write_photos])
def test_a_lora_on_groceries(tmp_path, monkeypatch, capsys, write):
    write(tmp_path)
    out = tmp_path / "out"
    run_example(monkeypatch, tmp_path, "--out", out, "--num_steps", 2)
    result = json.loads((out / "result.json").read_text())
    assert result["rows"] == {"train": 3, "test": 3}
    for when in ("before", "after"):
        assert result[when].keys() == {"name", "kind", "image_loss"} and result[when]["image_loss"] > 0
    assert result["after"]["image_loss"] != result["before"]["image_loss"]
    assert Image.open(out / "drawn.png").size[0] > 500
    loaded = PeftModel.from_pretrained(
        MMARForConditionalGeneration.from_pretrained(ROOT / "checkpoints/mmar-tiny"), out / "adapter"
    )
    assert sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name) == result["trained_parameters"]
    # Started again, it trains no further.
    run_example(monkeypatch, tmp_path, "--out", out, "--num_steps", 2)
    again = json.loads((out / "result.json").read_text())
    assert again["after"] == result["after"]


def test_a_folder_without_groceries(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_example(monkeypatch, tmp_path, "--out", tmp_path / "out")
    assert ended.value.code == 2
    assert "parquet" in capsys.readouterr().err
