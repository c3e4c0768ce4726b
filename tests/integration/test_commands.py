"""The commands of the README one after the other, on four squares: VAE, init, training, resume, export, evaluation."""

import io
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import mmar
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import load_file
from squares import COLOURS, make_processor, make_rows, make_squares_model

from mmar import MMARForConditionalGeneration, MMARPipeline, MMARProcessor
from mmar.evaluation import emoji_styles
from mmar.training import init_tiny, train_latent_encoder, train_vae
from mmar.training.emoji_rows import DEPENDS_ON, QUESTIONS
from mmar.training.train_vae import LATENT_ENCODER_NAME


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
                "depends_on": DEPENDS_ON,
                "swaps": [colour, None, None],
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
    options = ["--config", ROOT / "configs/mmar-tiny", "--data", data, "--eval_data", data, "--seed", seed]
    run(train_vae, monkeypatch, *options, "--out", folder / "start", "--num_steps", 3, "--num_views", 4)
    # Goes on from there.
    run(train_vae, monkeypatch, *options, "--start", folder / "start", "--out", vae, "--num_steps", 1)
    init = folder / f"init{seed}"
    run(init_tiny, monkeypatch, "--config", ROOT / "configs/mmar-tiny", "--data", data, "--vae", vae, "--out", init)
    return init


def test_from_pictures_to_an_evaluated_checkpoint(tmp_path, data, monkeypatch, capsys):
    init = make_init(tmp_path, data, monkeypatch, 0)
    report = json.loads((tmp_path / "vae0" / "report.json").read_text())
    assert report["steps"] > 0 and len(report["train"]["latents_std"]) == 32
    assert report["held_out"]["psnr"] == pytest.approx(report["train"]["psnr"], abs=1e-3)  # the same pictures
    assert report["held_out"]["told"].keys() == {"content", "style"} and report["held_out"]["told"]["style"] == 1.0
    # The model's latent encoder is the one that learned beside the VAE.
    learned = load_file(tmp_path / "vae0" / LATENT_ENCODER_NAME)
    weights = load_file(init / "model.safetensors")
    assert all(torch.equal(weights[f"model.latent_encoder.{name}"], value) for name, value in learned.items())
    assert not torch.equal(
        learned["post_projector.layers.0.weight"],
        load_file(tmp_path / "start" / LATENT_ENCODER_NAME)["post_projector.layers.0.weight"],
    )

    cache = tmp_path / "latents"
    mmar("cache-latents", data, "--model", init, "--out", cache, "--num_copies", 1)
    reader = tmp_path / "reader"
    read = [init, "--data", data, "--latents", cache, "--eval_data", data, "--batch_size", 4, "--num_steps", 3]
    run(train_latent_encoder, monkeypatch, *read, "--out", reader)
    report = json.loads((reader / "report.json").read_text())
    assert report["steps"] == 3 and report["told"].keys() == {"content", "style"} and report["told"]["style"] == 1.0
    taught = load_file(reader / "model.safetensors")
    changed = {name for name in weights if not torch.equal(weights[name], taught[name])}
    assert "model.latent_encoder.embedding_vit.layers.0.qkv.weight" in changed
    assert all(name.startswith("model.latent_encoder.") for name in changed)
    assert isinstance(MMARPipeline.from_pretrained(reader).model, MMARForConditionalGeneration)
    # Nothing to measure it on: told at once.
    with_chat = tmp_path / "with_chat.jsonl"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]
    with_chat.write_text(json.dumps({"conversations": turns}))
    with pytest.raises(ValueError, match="held-out"):
        run(train_latent_encoder, monkeypatch, *read[:6], with_chat, *read[7:], "--out", tmp_path / "again")
    # The same command, the same weights.
    run(train_latent_encoder, monkeypatch, *read, "--out", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in taught.items())
    without_kinds = tmp_path / "without_kinds.parquet"
    pq.write_table(pq.read_table(data).drop_columns(["depends_on"]), without_kinds)
    mmar("cache-latents", without_kinds, "--model", init, "--out", tmp_path / "without_kinds")
    read[2], read[4] = without_kinds, tmp_path / "without_kinds"
    with pytest.raises(ValueError, match="`depends_on`"):
        run(train_latent_encoder, monkeypatch, *read, "--out", reader)

    init = reader
    recipe = [ROOT / "training/recipes/mmar_tiny_stage1.yaml", f"data={data}", f"output_dir={tmp_path / 'run'}"]
    recipe += [f"latents={cache}", f"eval_data={data}", "eval_strategy=steps", "eval_steps=2", "num_eval_pictures=1"]
    recipe += ["per_device_train_batch_size=4", "save_steps=2", "use_cpu=true", "logging_steps=1"]
    mmar("train", *recipe, f"model={init}", "max_steps=2")
    # Goes on from step 2, and has the right VAE.
    mmar("train", *recipe, f"model={init}", "max_steps=4")
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]

    # All done: a further start writes the final weights again, and trains no further.
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "final" / "model.safetensors").unlink()
    mmar("train", *recipe, f"model={init}", "max_steps=4")
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == final
    assert not (tmp_path / "run" / "checkpoint-5").exists()

    # A model with a VAE of its own would be trained on latents that its VAE, or the checkpoint's, does not make.
    other = make_init(tmp_path, data, monkeypatch, 1)
    with pytest.raises(ValueError, match="latents"):
        mmar("train", *recipe, f"model={other}", "max_steps=6")
    others = tmp_path / "other_latents"
    mmar("cache-latents", data, "--model", other, "--out", others, "--num_copies", 1)
    with pytest.raises(ValueError, match="`model`"):
        mmar("train", *recipe, f"model={other}", f"latents={others}", "max_steps=6")

    # The later stages go on from there; the last one trains the head only.
    weights = []
    for stage, folder in ((2, tmp_path / "run"), (3, tmp_path / "stage2")):
        recipe[0] = ROOT / f"training/recipes/mmar_tiny_stage{stage}.yaml"
        recipe[2] = f"output_dir={tmp_path / f'stage{stage}'}"
        mmar("train", *recipe, f"model={folder / 'final'}", "max_steps=2", "warmup_steps=0")
        weights.append(load_file(tmp_path / f"stage{stage}" / "final" / "model.safetensors"))
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed and all(name.startswith("diffusion_mlp.") for name in changed)

    folder = tmp_path / "exported"
    mmar("export", tmp_path / "stage3" / "final", folder, "--guidance_scale", 2, "--num_ar_steps", 3)
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


def test_a_model_starts_from_any_measured_autoencoder_and_from_others_when_allowed(tmp_path, data, monkeypatch):
    config = json.loads((ROOT / "configs/mmar-tiny/config.json").read_text())["vae_config"]
    config |= {"shift_factor": None, "latents_mean": None, "latents_std": None}
    AutoencoderKL(**(config | {"scaling_factor": 1.0})).save_pretrained(tmp_path / "unmeasured")
    AutoencoderKL(**(config | {"scaling_factor": 0.5})).save_pretrained(tmp_path / "measured")
    VQModel(num_vq_embeddings=16, norm_num_groups=4, block_out_channels=[8]).save_pretrained(tmp_path / "vq")
    options = ["--config", ROOT / "configs/mmar-tiny", "--data", data, "--out", tmp_path / "init", "--vae"]
    with pytest.raises(ValueError, match="--vae"):
        run(init_tiny, monkeypatch, *options, tmp_path / "unmeasured")
    with pytest.raises(ValueError, match="VQModel"):
        run(init_tiny, monkeypatch, *options, tmp_path / "vq")
    assert not (tmp_path / "init").exists()
    for folder, extra, scale in (("unmeasured", ["--allow_unmeasured_scale"], 1.0), ("measured", [], 0.5)):
        run(init_tiny, monkeypatch, *options, tmp_path / folder, *extra)
        written = json.loads((tmp_path / "init" / "config.json").read_text())["vae_config"]
        assert written["scaling_factor"] == scale


def test_a_model_with_a_new_vocabulary_starts_from_another(tmp_path, data, monkeypatch):
    # A word that the old vocabulary has not.
    rows = pq.read_table(data).to_pylist()
    for row in rows:
        row["captions"] = [f"{caption}, heraldic" for caption in row["captions"]]
    pq.write_table(pa.Table.from_pylist(rows), data)
    checkpoint, out = ROOT / "checkpoints/mmar-tiny", tmp_path / "init"
    options = ["--config", ROOT / "configs/mmar-tiny", "--data", data, "--out", out]
    run(init_tiny, monkeypatch, *options, "--model", checkpoint)
    models = [
        MMARForConditionalGeneration.from_pretrained(folder, dtype=torch.float32) for folder in (checkpoint, out)
    ]
    tokenizers = [MMARProcessor.from_pretrained(folder).tokenizer for folder in (checkpoint, out)]
    embeddings = "model.language_model.embed_tokens.weight"
    before, after = (model.state_dict() for model in models)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in (embeddings, "lm_head.weight"))
    old_ids, new_ids = (tokenizer.get_vocab() for tokenizer in tokenizers)
    shared = sorted(set(old_ids) & set(new_ids))
    assert len(shared) > 260 and any(old_ids[token] != new_ids[token] for token in shared)
    for token in shared:
        assert torch.equal(after[embeddings][new_ids[token]], before[embeddings][old_ids[token]])
    word = "Ġheraldic"
    assert word in new_ids and word not in old_ids
    spelled = tokenizers[0](word.replace("Ġ", " "))["input_ids"]
    assert len(spelled) > 1
    torch.testing.assert_close(after[embeddings][new_ids[word]], before[embeddings][spelled].mean(0))

    preset = json.loads((ROOT / "configs/mmar-tiny/config.json").read_text())
    preset["text_config"]["num_hidden_layers"] += 1
    preset["text_config"].pop("layer_types", None)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/config.json").write_text(json.dumps(preset))
    with pytest.raises(ValueError, match="--model"):
        run(init_tiny, monkeypatch, *options, "--model", checkpoint, "--config", tmp_path / "deeper")


def test_a_streamed_training_resumes_as_if_unbroken(tmp_path, monkeypatch):
    processor = make_processor()
    make_squares_model(processor).save_pretrained(tmp_path / "init")
    processor.save_pretrained(tmp_path / "init")
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in make_rows() * 3]
    for shard in range(2):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"rows-{shard}.parquet")
    sources = [{"path": "rows-*.parquet", "weight": 3.0}, {"path": "rows-0.parquet", "task_weights": [0.0, 1.0, 0.0]}]
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    recipe = [ROOT / "training/recipes/mmar_tiny_stage1.yaml", f"model={tmp_path / 'init'}", "streaming=true"]
    recipe += [f"data={tmp_path / 'sources.yaml'}", "swap_rate=0", "per_device_train_batch_size=4", "use_cpu=true"]
    recipe += ["save_steps=2", "logging_steps=1", "dataloader_num_workers=1", "warmup_steps=0"]

    def losses(folder):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    mmar("train", *recipe, f"output_dir={tmp_path / 'whole'}", "max_steps=6")
    mmar("train", *recipe, f"output_dir={tmp_path / 'broken'}", "max_steps=4")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    mmar("train", *recipe, f"output_dir={tmp_path / 'broken'}", "max_steps=6")
    assert len(losses(tmp_path / "whole")) == 6 and losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_held_out_data_may_be_what_data_is(tmp_path, monkeypatch):
    processor = make_processor()
    make_squares_model(processor).save_pretrained(tmp_path / "init")
    processor.save_pretrained(tmp_path / "init")
    for number, row in enumerate(make_rows()[:3]):
        (tmp_path / f"{number}.png").write_bytes(row["image"])
    rows = [{"photo": f"{number}.png", "words": "a square"} for number in range(3)]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "rows.json").write_text(json.dumps(rows))
    source = {"path": "lists/rows.json", "columns": {"image": "photo", "captions": "words"}, "image_folder": "."}
    sources = [{**source, "name": "one", "task_weights": [1.0, 0.0, 0.0]}, {**source, "name": "two", "weight": 2.0}]
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    recipe = [ROOT / "training/recipes/mmar_tiny_stage1.yaml", f"model={tmp_path / 'init'}", "swap_rate=0"]
    recipe += [f"{name}={tmp_path / 'sources.yaml'}" for name in ("data", "eval_data")]
    recipe += ["per_device_train_batch_size=4", "use_cpu=true", "max_steps=2", "warmup_steps=0"]
    recipe += ["num_eval_samples=null"]
    mmar("train", *recipe, f"output_dir={tmp_path / 'out'}", "eval_strategy=steps", "eval_steps=1")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_t2i_loss" in entry for entry in history) == 2


@pytest.mark.parametrize("name", ["data", "eval_data", "latents"])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_data_is_looked_at_before_the_model_is_loaded(tmp_path, monkeypatch, name, streaming):
    if name == "latents" and streaming == "true":
        return
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in make_rows()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist([{"image": b""}] * 3), tmp_path / "bad.parquet")
    monkeypatch.setattr("mmar.training.train.open_model", lambda *args, **kwargs: pytest.fail("loaded"))
    arguments = {"model": "init", "data": "rows.parquet", "output_dir": "out", "streaming": streaming, "max_steps": 1}
    arguments |= {"eval_strategy": "steps", "eval_data": "rows.parquet", name: "bad.parquet", "use_cpu": "true"}
    monkeypatch.chdir(tmp_path)
    words = [f"{key}={value}" for key, value in arguments.items()]
    recipe = ROOT / "training/recipes/mmar_tiny_stage1.yaml"
    with pytest.raises((ValueError, OSError), match="bad.parquet"):
        mmar("train", recipe, "swap_rate=0", *words)
