"""The plan's operations are those of a real step, and its numbers those worked out by hand."""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import IMAGE, random_latents, random_text, seeded, tiny_config, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmar.conversion.init_from_qwen2 import load_preset
from mmar.evaluation.memory import training_memory
from mmar.evaluation.training_plan import (
    NETWORK,
    NVLINK,
    PEAK,
    WeightBytes,
    batch_plan,
    gpu_memory,
    main,
    mean_mask_ratio,
    paper_samples,
    sample_operations,
    samples_per_second,
    sending_seconds,
    vae_operations,
    weight_bytes,
)
from mmar.modeling_mmar.masking_mmar import sample_mask_ratios
from mmar.training.recipe import DataArguments


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "training/recipes/mmar_7b_stage1.yaml"
# The parameter counts of MMAR-7B (tests/parity/test_parameter_counts.py): PLoRA, head, Qwen2, KL-16; of Qwen2, the
# rows of embedding and lm_head, and the last norm.
PLORA, HEAD, QWEN2, KL16, WIDTH, VOCABULARY = 3_229_614_080, 574_418_960, 7_615_616_512, 69_610_963, 3584, 152_064
# Everything in round numbers.
WEIGHTS = WeightBytes(
    trained=4000, frozen=3000, tables=1000, vae=100, trained_layer=400, frozen_layer=200, trained_root=80
)


@pytest.mark.parametrize("minimum", [0.7, 0.0])
def test_mean_mask_ratio_is_that_of_the_draws(minimum):
    drawn = sample_mask_ratios(200_000, minimum, seeded(0)).double()
    # Four standard errors.
    assert mean_mask_ratio(minimum) == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 200_000**0.5)


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_a_real_step(checkpointing, train_backbone):
    """Of two rows: a picture that is read with its labelled text, and one of which some latents are drawn."""
    config = {"vit_config": {"num_hidden_layers": 4}, "diffusion_config": {"hidden_size": 96, "num_hidden_layers": 4}}
    model = tiny_model(attn_implementation="eager", **config).train()
    model.freeze(train_backbone)
    if checkpointing:
        model.activation_checkpointing_enable()
    num_latents, text_length, num_hidden = model.config.num_latents, 24, 12
    # The picture comes first, so that no prefix of text is left out of the backward pass.
    text = random_text(2, text_length)
    ids = torch.cat([torch.full((2, num_latents), IMAGE), text], dim=1)
    labels = torch.full_like(ids, -100)
    labels[0, num_latents:] = text[0]
    latent_mask = torch.zeros(2, num_latents, dtype=torch.bool)
    latent_mask[1, :num_hidden] = True
    inputs = {"input_ids": ids, "labels": labels, "latents": random_latents(model, 2), "latent_mask": latent_mask}
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()

    mul = model.config.diffusion_config.diffusion_batch_mul
    data = DataArguments("m", "d", task_weights=[0.5, 0.5, 0.0], diffusion_batch_mul=mul)
    parts = sample_operations(model.config, data, checkpointing, text_length, train_backbone)
    # As many hidden latents as there are here, and not as there are on average.
    parts["Diffusion MLP"] *= num_hidden / (num_latents * mean_mask_ratio(data.mask_ratio_min))
    # The plan has gradients for inputs of first layers too, which nobody needs, and the counter has no attention of
    # EmbeddingViT on a CPU; this model is so small that both show.
    assert 0.96 < 2 * sum(parts.values()) / counter.get_total_flops() < 1.06


def test_operations_by_hand():
    config = load_preset("mmar-7b")
    data = DataArguments("m", "d", task_weights=[0.5, 0.45, 0.05], mask_ratio_min=0.0, diffusion_batch_mul=16)
    parts = sample_operations(config, data, False, text_length=44)
    tokens, layers = 256 + 44, QWEN2 - 2 * VOCABULARY * WIDTH
    # Qwen2's norms and biases multiply no token: a thousandth of the weights at most.
    assert parts["Qwen2"] == pytest.approx(4 * layers * tokens, rel=1e-3)
    assert parts["PLoRA"] == 6 * PLORA * 256
    assert parts["lm_head"] == pytest.approx(4 * VOCABULARY * WIDTH * 0.45 * 44)
    assert parts["Diffusion MLP"] == pytest.approx(6 * HEAD * 0.55 * 256 * mean_mask_ratio(0.0) * 16, rel=1e-3)
    attention_of_qwen2, attention_of_vit = 28 * tokens**2 * WIDTH, 16 * 256**2 * 1024
    assert parts["attention"] == 12 * (attention_of_qwen2 + attention_of_vit)
    assert parts["layers run again"] == 0
    again = sample_operations(config, data, True, text_length=44)["layers run again"]
    vit = 16 * 12 * 1024**2 * 256
    expected = 2 * (layers * tokens + PLORA * 256 + 2 * (attention_of_qwen2 + attention_of_vit) + vit)
    assert again == pytest.approx(expected, rel=1e-3)
    only_drawn = DataArguments("m", "d", task_weights=[0.9, 0.0, 0.1])
    assert sample_operations(config, only_drawn, False, 44)["lm_head"] == 0


def test_vae_operations_are_those_of_its_convolutions():
    model = tiny_model()
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        if isinstance(module, nn.Conv2d):
            counted += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            counted += 2 * output.numel() * module.in_features

    for module in model.vae.modules():
        module.register_forward_hook(count)
    model.vae.encode(torch.zeros(1, 3, model.config.image_size, model.config.image_size))
    # The attention between its linears comes on top.
    assert counted <= vae_operations(model.config) < 1.05 * counted


def test_samples_per_second():
    assert samples_per_second(PEAK / 4, 0.0, 0.5) == pytest.approx(2.0)
    # The VAE runs at half the speed.
    assert samples_per_second(PEAK / 4, PEAK / 8, 0.5) == pytest.approx(1.0)


def test_weights_of_the_7b_model():
    weights = weight_bytes(load_preset("mmar-7b"), torch.bfloat16)
    tables = 2 * VOCABULARY * WIDTH
    assert (weights.frozen, weights.tables, weights.vae) == (2 * QWEN2, 2 * tables, 4 * KL16)
    assert weights.trained_layer == 4 * PLORA // 28
    assert weights.frozen_layer == 2 * (QWEN2 - tables - WIDTH) // 28
    memory = training_memory(tiny_config())
    tiny = weight_bytes(tiny_config(), torch.bfloat16)
    assert memory["weights"] == tiny.trained + tiny.frozen + tiny.vae
    # Embedding and head are one in the small model.
    assert tiny.tables == 2 * 128 * 64
    assert weight_bytes(tiny_config(), torch.bfloat16, train_backbone=True).frozen == 0


@pytest.mark.parametrize(
    ("layout", "kept", "at_once", "gathered"),
    [
        ("none", 100 + 7000, 0, 0),
        # Trained weights in two bytes.
        ("trained", 100 + 3000 + 1000, 2 * 200 + 40, 2000),
        ("all", 100 + 1750, 2 * 200 + 40 + 2 * 200 + 1000, 2000 + 3000),
        ("fsdp2.yaml", 100 + 1000 + 1500, 2 * 200 + 40 + 2 * 200, 2000 + 2000),
    ],
)
def test_what_sharding_keeps_and_gathers(layout, kept, at_once, gathered):
    assert WEIGHTS.kept(layout, 1 if layout == "none" else 4) == kept
    assert (WEIGHTS.gathered_at_once(layout), WEIGHTS.gathered(layout)) == (at_once, gathered)


def test_memory_of_layouts():
    memory = {"gradients": 40, "optimizer": 80, "EMA": 48, "autocast": 20, "activations": 7}
    assert gpu_memory(memory, WEIGHTS) == {
        "weights": 7100,
        "gradients": 40,
        "optimizer": 80,
        "EMA": 48,
        "copies": 20,
        "activations": 7,
    }
    assert gpu_memory(memory, WEIGHTS, num_gpus=8)["copies"] == 20 + 40
    assert gpu_memory(memory, WEIGHTS, "trained", 4) == {
        "weights": 4100,
        "gradients": 40,
        "optimizer": 20,
        "EMA": 12,
        "copies": 440,
        "activations": 7,
    }
    parts = gpu_memory(memory, WEIGHTS, "fsdp2.yaml", 4, accumulates=False, has_ema=False)
    assert (parts["gradients"], parts["EMA"], parts["copies"]) == (10, 0, 840)


def test_seconds_of_sending():
    # A ring: 7/8 of the gradients, there and back.
    assert sending_seconds(WEIGHTS, "none", 8, 3) == pytest.approx(2 * 4000 * 7 / 8 / NVLINK)
    assert sending_seconds(WEIGHTS, "none", 16, 3) == pytest.approx(2 * 4000 * 15 / 16 / NETWORK)
    assert sending_seconds(WEIGHTS, "trained", 16, 3) == pytest.approx((6 * 2000 + 4000) * 15 / 16 / NETWORK)
    within = (6 * 4000 + 4000) * 7 / 8 / NVLINK
    assert sending_seconds(WEIGHTS, "fsdp2.yaml", 8, 3) == pytest.approx(within)
    assert sending_seconds(WEIGHTS, "fsdp2.yaml", 16, 3) == pytest.approx(within + 2 * 500 / 2 / NETWORK)
    assert sending_seconds(WEIGHTS, "none", 1, 3) == 0


@pytest.mark.parametrize(
    ("wanted", "planned"),
    [
        ((1152, 6, 8), (1152, 6, 24)),
        ((1152, 6, 64), (1152, 6, 3)),
        ((1152, 6, 512), (1024, 2, 1)),
        ((480, 5, 64), (512, 4, 2)),
        ((8, 4, 32), (32, 1, 1)),
    ],
)
def test_batch_plan_of_every_wish(wanted, planned):
    assert batch_plan(*wanted) == planned


def run(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["training_plan", *map(str, options)])
    main()
    return capsys.readouterr().out


def test_command(monkeypatch, capsys):
    options = ["--config", "mmar-tiny", "--recipe", RECIPE, "--num_samples", 1152, "--gpus", "2,512"]
    out = run(monkeypatch, capsys, *options, "num_train_epochs=8", "per_device_train_batch_size=9")
    assert "| 2 | 1152 = 2 x 9 x 64 | 8 |" in out
    assert "| 512 | 1024 = 512 x 2 x 1 (1152 is no multiple of 512) | 9 |" in out
    assert "9,216 samples." in out
    cached = run(monkeypatch, capsys, *options, "max_steps=3", "--cached_latents")
    assert "| VAE | 0.00 |" in cached and "3,456 samples." in cached


@pytest.mark.parametrize(
    "options",
    [
        ["--recipe", RECIPE.parent / "mmar_tiny_stage1.yaml"],
        ["--recipe", RECIPE, "--num_samples", "0"],
        ["--recipe", RECIPE, "--gpus", "8,0"],
        ["--recipe", RECIPE, "--gpus", "many"],
        ["--recipe", RECIPE, "--utilization", "1.5"],
        ["--recipe", RECIPE, "--text_length", "0"],
    ],
)
def test_options_that_are_refused(options, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, "--config", "mmar-tiny", *options)
    assert ended.value.code == 2


def test_samples_of_the_paper():
    """Sec. 4.1: 120 M; 20 M, 1.2 M, 12 M and 12 M; 665 K."""
    paths = sorted(RECIPE.parent.glob("mmar_[07]*.yaml"))
    counts = {"stage1": 120_000_000, "stage2": 45_200_000, "stage3": 45_200_000, "sft": 665_000}
    assert [paper_samples(path) for path in paths] == [counts[path.stem.rpartition("_")[2]] for path in paths]
    assert len(paths) == 8
    assert paper_samples("mmar_tiny_stage1.yaml") is paper_samples("mmar_7b_stage9.yaml") is None


@pytest.mark.slow
def test_docs_quote_the_command(monkeypatch, capsys):
    """What docs/training.md says that a command prints is what it prints today."""
    text = (ROOT / "docs/training.md").read_text()
    commands = re.findall(r"python -m mmar\.evaluation\.training_plan ([^`\n]+)", text)
    assert commands
    monkeypatch.chdir(ROOT)
    for options in commands:
        assert run(monkeypatch, capsys, *options.split()).strip() in text
