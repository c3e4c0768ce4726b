"""The experiments on four squares: each system trained for two steps, measured, kept, and written as a page."""

import importlib
import json
import shlex
import shutil
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from commands import mmar
from diffusers import AutoencoderKL, VQModel
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from test_commands import run, write_squares

from mmar import MMARConfig
from mmar.ablations import (
    cfg_sweep,
    chessboard,
    first_timestep,
    noise_levels,
    scaling,
    stage2,
    study,
    table3,
    train_vq,
)
from mmar.ablations.study import Study, Trial, cell, interval
from mmar.ablations.systems import SYSTEMS, num_trained, system_config
from mmar.ablations.train_vq import kmeans, vq_from_kl
from mmar.modeling_mmar.generation_mmar import Preset
from mmar.training import train_vae


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "ablations/configs/emoji"
# The paper's protocol with two steps in place of a hundred.
PRESET = Preset(1.0, 2)
JUDGE = """
import json, pathlib, sys
lines = [json.loads(line) for line in (pathlib.Path(sys.argv[-1]) / "captions.jsonl").read_text().splitlines()]
# Each system its own: the Transfusion-like one is best here.
trial = pathlib.Path(sys.argv[-1]).parent.name
frechet = {"mmar": 20.0, "epsilon": 30.0, "vq": 40.0}.get(trial.split("_")[0], 12.0)
figures = {"n": len(lines), "name_top1": 0.25, "name_top5": 0.5, "style": 0.75}
print(json.dumps({**figures, "frechet": frechet, "frechet_real": 3.0}))
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Rows, a VAE of one step, a VQ tokenizer of two, and a judge."""
    folder = tmp_path_factory.mktemp("parts")
    data, judge = folder / "squares.parquet", folder / "judge.py"
    write_squares(data)
    judge.write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        options = ["--data", data, "--out", folder / "vae"]
        run(train_vae, patch, "--config", CONFIG, *options, "--num_steps", 1, "--num_views", 2, "--word_weight", 0)
        options = ["--data", data, "--eval_data", data, "--start", folder / "vae", "--out", folder / "vq"]
        run(train_vq, patch, *options, "--num_codes", 8, "--num_steps", 2, "--batch_size", 2)
    return folder


@pytest.fixture(autouse=True)
def one_day_and_commit(monkeypatch):
    """Pages are named by the day and tell the commit, either of which may be another one by the end of a test."""
    monkeypatch.setattr(study, "date", SimpleNamespace(today=lambda: date(2026, 1, 31)))
    monkeypatch.setattr(study, "commit", lambda: "0123abc")


@pytest.fixture
def in_process(monkeypatch):
    """Commands run here and not in processes of their own, which would start for seconds each; their names."""
    called = []

    def call(command, *words):
        called.append(command.split()[-1].rpartition(".")[2])
        if command.startswith("mmar "):
            mmar(command.split()[1], *words, *(["use_cpu=true"] if command == "mmar train" else []))
            return
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        importlib.import_module(command).main()

    monkeypatch.setattr(study, "_call", call)
    monkeypatch.setattr(study, "NUM_INFERENCE_STEPS", 2)
    return called


def words(parts, tmp_path, *more):
    data = parts / "squares.parquet"
    given = ["--config", CONFIG, "--data", data, "--test", data, "--vae", parts / "vae", "--vq", parts / "vq"]
    given += ["--judge", parts / "judge.py", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    return [*given, "--seeds", 2, "--num_steps", 2, *more]


def page(tmp_path, name):
    (file,) = (tmp_path / "out").glob(f"*_{name}.md")
    assert Image.open(file.with_suffix(".png")).size[0] > 300
    text = file.read_text()
    assert f"![]({file.stem}.png)" in text and "python -m mmar.ablations." in text
    return text


@torch.no_grad()
def name_log_probability(pipe, row):
    """Of a row's name, token by token, without batches."""
    (picture,) = pipe.processor.image_processor.fetch_images([row["image"]])
    content = [{"type": "image", "image": picture}, {"type": "text", "text": row["questions"][1]}]
    inputs = pipe.processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    total = 0.0
    for token in pipe.processor.tokenizer(row["answers"][1])["input_ids"]:
        logits = pipe.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
    return total


def test_systems_train_as_many_weights():
    base = MMARConfig.from_pretrained(CONFIG)
    kl = base.vae_config
    vq = {name: kl[name] for name in ("block_out_channels", "down_block_types", "up_block_types", "latent_channels")}
    vq |= {"vq_embed_dim": 32, "num_vq_embeddings": 1024, "norm_num_groups": 1, "layers_per_block": 1}
    numbers = {name: num_trained(system_config(name, base, vq), True) for name in SYSTEMS}
    assert max(numbers.values()) / min(numbers.values()) < 1.01, numbers
    assert numbers["mmar"] == numbers["epsilon"] == num_trained(base, True)
    epsilon = system_config("epsilon", base)
    assert epsilon.diffusion_config.prediction_type == "epsilon" and base.diffusion_config.prediction_type != "epsilon"
    assert system_config("transfusion", base).plora_alpha == base.plora_alpha
    with pytest.raises(ValueError, match="'vq'"):
        system_config("vq", base, {**vq, "num_vq_embeddings": 16384})
    with pytest.raises(ValueError, match="'gan'"):
        system_config("gan", base)


@torch.no_grad()
def test_a_vq_tokenizer_starts_as_the_kl_one(parts):
    vae, pictures = AutoencoderKL.from_pretrained(parts / "vae"), torch.rand(2, 3, 64, 64) * 2 - 1
    for has_quant_conv in (True, False):
        config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
        own = AutoencoderKL(
            **{**config, "use_quant_conv": has_quant_conv, "use_post_quant_conv": has_quant_conv}
        ).eval()
        vq = vq_from_kl(own, 8).eval()
        means = own.encode(pictures).latent_dist.mode()
        torch.testing.assert_close(vq.encode(pictures).latents, means, atol=1e-5, rtol=1e-5)
        drawn = vq.decode(means, force_not_quantize=True).sample
        torch.testing.assert_close(drawn, own.decode(means).sample, atol=1e-5, rtol=1e-5)


def test_kmeans_finds_groups_and_leaves_no_code_unused():
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    tokens = (middles[:, None] + 0.1 * torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    found = kmeans(tokens, 3, generator)
    assert torch.cdist(middles, found).amin(1).max() < 0.1
    assert (torch.cdist(tokens, kmeans(tokens, 12, generator)).argmin(-1).bincount(minlength=12) > 0).all()


def test_a_trained_vq_tokenizer_is_kept(parts):
    report = json.loads((parts / "vq" / "report.json").read_text())
    assert report["steps"] == 2 and report["train"] == report["held_out"] and 1 <= report["train"]["codes_used"] <= 8
    assert VQModel.from_pretrained(parts / "vq").config.num_vq_embeddings == 8


def test_what_a_vq_tokenizer_cannot_learn_from_or_be_written_to_is_told(parts, tmp_path, monkeypatch, capsys):
    """Before the training, which takes most of an hour at its default length."""
    monkeypatch.setattr(train_vq, "train", lambda *arguments: pytest.fail("was trained"))
    given = ["--data", parts / "squares.parquet", "--start", parts / "vae", "--num_codes", 8]
    with pytest.raises(FileNotFoundError, match="none.parquet"):
        run(train_vq, monkeypatch, *given, "--out", tmp_path / "vq", "--eval_data", tmp_path / "none.parquet")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "vq"):
        with pytest.raises(ValueError, match="--out"):
            run(train_vq, monkeypatch, *given, "--out", out)
    with pytest.raises(SystemExit):
        run(train_vq, monkeypatch, *given, "--start", parts / "vq", "--out", tmp_path / "vq")
    assert "--start" in capsys.readouterr().err


def test_a_vq_tokenizer_that_did_not_train_is_not_written(parts, tmp_path, monkeypatch):
    given = ["--data", parts / "squares.parquet", "--start", parts / "vae", "--num_codes", 8, "--num_steps", 2]
    with pytest.raises(ValueError, match="--learning_rate"):
        run(train_vq, monkeypatch, *given, "--batch_size", 2, "--learning_rate", 1e30, "--out", tmp_path / "vq")
    assert not (tmp_path / "vq").exists()


def test_table3_of_all_systems_and_what_goes_on_from_it(parts, tmp_path, monkeypatch, in_process):
    run(table3, monkeypatch, *words(parts, tmp_path))
    assert in_process.count("train") == 8 and in_process.count("init_tiny") == 8
    text = page(tmp_path, "table3_emoji")
    assert all(name in text for name in SYSTEMS.values()) and "25.0 ± 0.0 %" in text
    assert text.count("paper: mmar > epsilon > vq > transfusion") == 2
    assert "by Frechet distance: transfusion > mmar > epsilon > vq\n" in text
    command = next(line for line in text.splitlines() if line.startswith("    python -m mmar.ablations.table3 "))
    assert "--systems mmar epsilon vq transfusion" in command and f"--vq {parts / 'vq'}" in command
    # Each of its own kind, from weights of its own.
    trials = tmp_path / "work" / "trials"
    kinds = {
        path.parent.parent.parent.name: json.loads(path.read_text()) for path in trials.glob("*/run/final/config.json")
    }
    assert {name.split("_")[0]: config["model_type"] for name, config in kinds.items()} == {
        "mmar": "mmar",
        "epsilon": "mmar",
        "vq": "mmar_vq",
        "transfusion": "mmar_transfusion",
    }
    weights = [load_file(path / "init" / "model.safetensors") for path in sorted(trials.glob("mmar_*"))]
    assert len(weights) == 2 and not torch.equal(*(own["diffusion_mlp.input_projection.weight"] for own in weights))

    # Again: nothing is trained, and the figures are those of before.
    in_process.clear()
    run(table3, monkeypatch, *words(parts, tmp_path))
    assert not in_process and page(tmp_path, "table3_emoji") == text

    # The Transfusion-like models of before, read at six levels. They are made of no VQ tokenizer, named or not.
    given = words(parts, tmp_path)
    run(noise_levels, monkeypatch, *given[: given.index("--vq")], *given[given.index("--vq") + 2 :])
    run(noise_levels, monkeypatch, *given)
    levels = page(tmp_path, "noise_levels_emoji")
    assert not in_process and all(f"| {level} |" in levels for level in (0, 125, 750))
    kept = trials / "transfusion_seed1_max_steps2" / "understanding_750.json"
    before = kept.read_text()
    kept.unlink()
    run(noise_levels, monkeypatch, *words(parts, tmp_path))
    assert kept.read_text() == before and page(tmp_path, "noise_levels_emoji") == levels

    # The models that draw by diffusion, from an earlier timestep: of two steps, 999 and 0, or 500 and 0.
    monkeypatch.setattr(first_timestep, "NUM_INFERENCE_STEPS", 2)
    run(first_timestep, monkeypatch, *words(parts, tmp_path))
    begun = page(tmp_path, "first_timestep_emoji")
    assert not in_process and begun.count("| 999 | 4.9e-05 |") == 3 == begun.count("| 500 | 7.0e-01 |")
    assert "w/ VQ" not in begun
    trial = trials / "epsilon_seed0_max_steps2"
    drawings = [Image.open(trial / name / "00000.png").tobytes() for name in ("pictures", "drawn_leading")]
    assert drawings[0] != drawings[1]

    # Whatever the figures hang on: other rows, another judge, another number of copies.
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(parts / "squares.parquet").slice(0, 3), other)
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE.replace("0.25", "0.5"))
    for option, value, name in (
        ("--data", other, "training data"),
        ("--test", other, "held-out data"),
        ("--judge", judge, "judge.py"),
        ("--vae", tmp_path / "work" / "vae", "VAE"),
    ):
        if option == "--vae":
            shutil.copytree(parts / "vae", value)
            weights = load_file(value / "diffusion_pytorch_model.safetensors")
            weights["decoder.conv_out.bias"] += 1
            save_file(weights, value / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=name):
            run(table3, monkeypatch, *words(parts, tmp_path, option, value))
    with pytest.raises(ValueError, match="copies"):
        run(table3, monkeypatch, *words(parts, tmp_path, "--num_copies", 1))


def test_scaling_and_the_second_stage(parts, tmp_path, monkeypatch, in_process):
    monkeypatch.setattr(scaling, "SHARES", (0.5, 1.0))
    run(scaling, monkeypatch, *words(parts, tmp_path, "--seeds", 1))
    text = page(tmp_path, "scaling_emoji")
    assert "| 0.5 |" in text and "| 1 |" in text and "| 1.0, 3.2 M trained weights |" in text
    # The base model with all rows and steps is one trial, not three.
    assert in_process.count("train") == 4
    sizes = {
        path.parts[-3]: sum(value.numel() for value in load_file(path).values())
        for path in (tmp_path / "work" / "trials").glob("*/init/model.safetensors")
    }
    assert len(set(sizes.values())) == 2

    in_process.clear()
    run(stage2, monkeypatch, *words(parts, tmp_path, "--seeds", 1))
    assert "second stage in (0, 1]" in page(tmp_path, "stage2_emoji")
    # The first stage once, and two that go on from it.
    assert in_process.count("train") == 3 and in_process.count("init_tiny") == 1
    name = "vae.decoder.conv_in.weight"
    first, *rest = (
        load_file(path) for path in sorted((tmp_path / "work" / "trials").glob("*mask_ratio*/run/final/*.safetensors"))
    )
    assert len(rest) == 2 and all(torch.equal(first[name], own[name]) for own in rest)


def test_guidance_sweep(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(cfg_sweep, "SCALES", (1.0, 20.0))
    monkeypatch.setattr("mmar.modeling_mmar.generation_mmar.PRESETS", {"paper": PRESET})
    options = ["--data", ROOT / "checkpoints/emoji-lite/test.parquet", "--judge", parts / "judge.py", "--num_rows", 2]
    options += ["--work", tmp_path / "work", "--out", tmp_path / "out", "--seeds", 1]
    run(cfg_sweep, monkeypatch, ROOT / "checkpoints/mmar-tiny", *options)
    text = page(tmp_path, "cfg_sweep")
    assert "| 20.0 | 25.0 %" in text
    command = shlex.split(next(line for line in text.splitlines() if "python -m mmar.ablations.cfg_sweep" in line))
    run(cfg_sweep, monkeypatch, *command[3:])  # the very command
    run(cfg_sweep, monkeypatch, ROOT / "checkpoints/mmar-tiny", *options)
    options[5] = 3
    with pytest.raises(ValueError, match="another"):
        run(cfg_sweep, monkeypatch, ROOT / "checkpoints/mmar-tiny", *options)


def test_what_is_missing_is_told(parts, tmp_path, monkeypatch, in_process, capsys):
    given = words(parts, tmp_path)
    # Two seeds would be counted as four, and the interval be too narrow.
    with pytest.raises(SystemExit):
        run(table3, monkeypatch, *given, "--systems", "mmar", "vq", "mmar")
    assert "--systems" in capsys.readouterr().err
    for option, message in (
        ("--data", "--data"),
        ("--vae", "folder"),
    ):
        broken = list(given)
        broken[broken.index(option) + 1] = tmp_path / "none"
        with pytest.raises(ValueError, match=message):
            run(table3, monkeypatch, *broken)
    with pytest.raises(ValueError, match="--seeds"):
        run(table3, monkeypatch, *given, "--seeds", 11)
    for option, value in (("--num_steps", 0), ("--num_copies", -1)):
        with pytest.raises(ValueError, match="--num_steps"):
            run(table3, monkeypatch, *given, option, value)
    # What would be told by the last step, after hours.
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(ValueError, match="--out"):
            run(table3, monkeypatch, *given, "--out", out)
        with pytest.raises(ValueError, match="--out"):
            run(chessboard, monkeypatch, "--out", out)
    with pytest.raises(ValueError, match="--work"):
        run(table3, monkeypatch, *given, "--work", tmp_path / "file")
    for judge in ("none.py", ""):
        with pytest.raises(ValueError, match="--judge"):
            run(table3, monkeypatch, *given, "--judge", judge)
    place = given.index("--vq")
    with pytest.raises(ValueError, match="--vq"):
        run(table3, monkeypatch, *given[:place], *given[place + 2 :])
    with pytest.raises(StrictDataclassError, match="num_vq_embeddings"):
        run(table3, monkeypatch, *given, "--vq", parts / "vae")
    assert not (tmp_path / "work").exists() and not in_process
    without = Study(CONFIG, *[parts / "squares.parquet"] * 2, parts / "vae", None, "none.py", tmp_path / "work")
    with pytest.raises(ValueError, match="--vq"):
        without.run(Trial("vq", 0))
    with pytest.raises(ValueError, match="none.py"):
        without.scored(tmp_path)
    rows = [{"questions": ["Describe the image.", "What is it?", style]} for style in ("Which style?", "Which shade?")]
    with pytest.raises(ValueError, match="row 1 .*Which shade"):
        without.understand(None, rows)


def test_a_part_that_fails_is_told():
    with pytest.raises(ValueError, match="mmar cache-latents"):
        study._call("mmar cache-latents", "--unknown")


@pytest.mark.parametrize("number", [1, 10])
def test_a_report_of_few_and_of_many_seeds(number):
    run = {"name": 0.5, "name_loss": 1.0, "style": 0.5, "name_top1": 0.5, "style_drawn": 0.5}
    runs = [{**run, "frechet": 9.0 + seed, "frechet_real": 3.0, "image_loss": 0.25} for seed in range(number)]
    text = table3.report(dict.fromkeys(SYSTEMS, runs), "picture.png", "squares")
    assert "the Frechet distance is 3.0." in text and "| 0.250, codes, in nats |" in text
    # 2.262 is Student's quantile of ten seeds, and 3.028 the deviation of 0 to 9: 2.262 * 3.028 / 10 ** 0.5.
    assert text.count("| 9.0 |" if number == 1 else "| 13.5 ± 2.2 |") == 4
    assert text.count("mmar ≈ epsilon ≈ vq ≈ transfusion") == 4


def test_order_of_systems():
    """Half of the interval of two seeds that are 0.002 apart is 12.706 * 0.001."""
    means = {"mmar": 0.2, "vq": 0.3, "epsilon": 0.21}
    figures = {
        system: [{"name": mean + away, "frechet": mean + away} for away in (-0.001, 0.001)]
        for system, mean in means.items()
    }
    assert table3.order(figures, "name") == "vq > epsilon ≈ mmar"
    assert table3.order(figures, "frechet") == "mmar ≈ epsilon > vq"
    assert table3.order({system: runs[:1] for system, runs in figures.items()}, "name") == "vq ≈ epsilon ≈ mmar"


def test_intervals():
    # Student's t with 2 degrees of freedom: 4.303 * 1 / sqrt(3).
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.4844, abs=1e-3))
    assert cell([{"name": 0.5}, {"name": 0.5}], "name") == "50.0 ± 0.0 %"
    assert cell([{"name": 0.5, "frechet": 2.0}], "name") == "50.0 %"
    assert cell([{"frechet": 7.0}, {"frechet": 9.0}], "frechet") == "8.0 ± 12.7"
    assert cell([{"name_loss": 5.678}], "name_loss") == "5.68"


def test_pictures_of_a_trial_are_the_pipelines(parts, tmp_path, in_process):
    own = Study(
        CONFIG, *[parts / "squares.parquet"] * 2, parts / "vae", parts / "vq", str(parts / "judge.py"), tmp_path
    )
    trial = Trial("mmar", 3, {"max_steps": 1})
    figures = own.run(trial)
    assert figures["frechet"] == 20.0 and {"caption", "name", "style", "text_loss", "image_loss"} <= figures.keys()
    pipe = study.open_pipeline(own.final_of(trial))
    assert pipe.dtype == torch.bfloat16
    folder = tmp_path / "trials" / trial.name / "pictures"
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    prompts = [f"an emoji of {line['label']} in flat style" for line in lines]
    generators = [torch.Generator().manual_seed(3000 + index) for index in range(len(lines))]
    rows = study.read_rows(parts / "squares.parquet")
    nats = [-name_log_probability(pipe, row) for row in rows]
    assert figures["name_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-2)
    images = pipe(prompts, generator=generators, num_inference_steps=2).images
    for image, line in zip(images, lines, strict=True):
        assert image.tobytes() == Image.open(folder / line["file"]).tobytes()
