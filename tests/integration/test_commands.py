"""The commands of the README one after the other, on four squares: VAE, init, training, resume, export, evaluation."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from squares import COLOURS

from mmar import MMARPipeline
from mmar.conversion import export
from mmar.evaluation import emoji_styles
from mmar.training import init_tiny, train, train_vae
from mmar.training.emoji_lite import QUESTIONS


ROOT = Path(__file__).parents[2]
# What the judge of these tests prints: how many pictures it was given.
JUDGE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
assert all((folder / line["file"]).is_file() for line in lines)
print(json.dumps({"n": len(lines)}))
"""


def write_squares(path):
    rows = []
    for index, colour in enumerate(COLOURS):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
        rows.append(
            {
                "image": {"bytes": buffer.getvalue(), "path": None},
                "captions": [f"an emoji of {colour} in flat style"],
                "questions": list(QUESTIONS.values()),
                "answers": [f"an emoji of {colour} in flat style", colour, "flat"],
                "label": colour,
                "style": "flat",
                "sibling_in_train": index < 2,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    module.main()


@pytest.fixture
def data(tmp_path):
    write_squares(tmp_path / "squares.parquet")
    return tmp_path / "squares.parquet"


def make_init(folder, data, monkeypatch, seed):
    vae = folder / f"vae{seed}"
    run(train_vae, monkeypatch, "--data", data, "--eval_data", data, "--out", vae, "--minutes", 0.02, "--seed", seed)
    init = folder / f"init{seed}"
    run(init_tiny, monkeypatch, "--config", ROOT / "configs/mmar-tiny", "--data", data, "--vae", vae, "--out", init)
    return init


def test_from_pictures_to_an_evaluated_checkpoint(tmp_path, data, monkeypatch, capsys):
    init = make_init(tmp_path, data, monkeypatch, 0)
    report = json.loads((tmp_path / "vae0" / "report.json").read_text())
    assert report["steps"] > 0 and len(report["train"]["latents_std"]) == 32
    assert report["held_out"]["psnr"] == pytest.approx(report["train"]["psnr"], abs=1e-3)  # the same pictures

    recipe = [ROOT / "training/recipes/mmar_tiny.yaml", f"data={data}", f"output_dir={tmp_path / 'run'}"]
    recipe += ["num_copies=1", "per_device_train_batch_size=4", "save_steps=2", "use_cpu=true", "logging_steps=1"]
    run(train, monkeypatch, *recipe, f"model={init}", "max_steps=2")
    # Goes on from step 2, and has the right VAE.
    run(train, monkeypatch, *recipe, f"model={init}", "max_steps=4")
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]

    # All done: a further start writes the final weights again, and trains no further.
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "final" / "model.safetensors").unlink()
    run(train, monkeypatch, *recipe, f"model={init}", "max_steps=4")
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == final
    assert not (tmp_path / "run" / "checkpoint-5").exists()

    # A model with a VAE of its own would be trained on latents that the checkpoint's VAE does not make.
    other = make_init(tmp_path, data, monkeypatch, 1)
    with pytest.raises(ValueError, match="expected the VAE of `model` in the checkpoint .*Set `resume=false`"):
        run(train, monkeypatch, *recipe, f"model={other}", "max_steps=6")

    folder = tmp_path / "exported"
    run(export, monkeypatch, tmp_path / "run" / "final", folder, "--guidance_scale", 2, "--num_ar_steps", 3)
    pipe = MMARPipeline.from_pretrained(folder)
    assert pipe.dtype == torch.bfloat16 and pipe.model.vae.dtype == torch.float32
    assert pipe.model.config.image_generation == {
        "guidance_scale": 2.0,
        "num_ar_steps": 3,
        "num_inference_steps": 25,
    }

    judge, out = tmp_path / "judge.py", tmp_path / "evaluation"
    judge.write_text(JUDGE)
    capsys.readouterr()
    run(emoji_styles, monkeypatch, folder, "--data", data, "--out", out, "--judge", judge, "--num_inference_steps", 2)
    result = json.loads((out / "result.json").read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["rows"] == 4 and len(list((out / "pictures").glob("*.png"))) == 4
    assert {name: score["n"] for name, score in result["judge"].items()} == {"all": 4, "sibling": 2, "no_sibling": 2}
    assert set(result["captions"]) == set(QUESTIONS)
