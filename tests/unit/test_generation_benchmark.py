"""The benchmark of generation compares the same computations, at a size that a test can run."""

import subprocess

import pytest
import torch
from helpers import tiny_config

from mmar.benchmarks import generation, gpu
from mmar.benchmarks.timing import Ratio, take_turns
from mmar.evaluation import provenance


# Three rounds of a few products; float32 sums in another order, states near 10.
ATOL = 1e-4
# Three diffusion steps with guidance 3 multiply what roundings there are.
TOKEN_ATOL = 5e-4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(generation, "NUM_STEPS", 3)
    monkeypatch.setattr(generation, "NUM_NEW_TOKENS", 4)


@pytest.fixture
def model():
    # 16 channels, of which one draw is a group of torch's generator, as of the paper's.
    config = tiny_config(vae_config={"latent_channels": 16})
    return generation.random_model(config, llm=2, vit=1, head=2)


def outputs(pair):
    with torch.no_grad():
        return pair.plain(), pair.fast()


def test_autoregressive_step(model):
    plain, fast = outputs(generation.autoregressive_step(model))
    torch.testing.assert_close(fast, plain, atol=ATOL, rtol=ATOL)
    assert plain.std() > 0.1


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_denoise_steps(model, num_tokens):
    for pair in generation.denoise_steps(model, num_tokens):
        plain, fast = outputs(pair)
        torch.testing.assert_close(fast, plain, atol=TOKEN_ATOL, rtol=TOKEN_ATOL)
        assert plain.shape == (num_tokens, 16) and plain.std() > 0.1


def test_whole_picture(model):
    plain, fast = outputs(generation.whole_picture(model))
    torch.testing.assert_close(fast, plain, atol=1e-2, rtol=1e-2)
    assert plain.shape == (16, 16) and plain.std() > 0.1


def test_merged_weights_give_what_masked_ones_give(model):
    plain, fast = outputs(generation.merged_against_masked(model))
    torch.testing.assert_close(fast, plain, atol=ATOL, rtol=ATOL)


def test_text_decode(model):
    plain, fast = outputs(generation.text_decode(model))
    assert torch.equal(plain, fast) and plain.shape == (1, generation.NUM_TEXT + 4)


def test_report(model):
    pair = generation.denoise_steps(model, 1)[0]
    result = generation.measure(pair, num_runs=3)
    line = generation.row(result)
    assert line.startswith("| denoise step, 1 token | plain protocol |") and line.endswith(" | 1.9 |")
    page = generation.report([line], 3)
    assert line in page and "medians of 3 runs" in page


def test_every_row_of_the_bar_is_measured(monkeypatch):
    """The figures that the project set itself, and nothing is left out by a change of the list."""
    made = []
    monkeypatch.setattr(generation, "random_model", lambda *args, **kwargs: None)
    for name in ("autoregressive_step", "denoise_steps", "whole_picture", "merged_against_masked", "text_decode"):
        monkeypatch.setattr(generation, name, lambda *args, name=name: made.append((name, *args[1:])) or [])
    monkeypatch.setattr(generation, "packed_product", lambda number: made.append(("packed_product", number)))
    for make in generation.pairs(tiny_config()):
        make()
    assert made == [
        ("autoregressive_step",),
        ("denoise_steps", 1),
        ("denoise_steps", 4),
        ("denoise_steps", 16),
        ("whole_picture",),
        ("merged_against_masked",),
        ("packed_product", 2),
        ("packed_product", 32),
        ("packed_product", 512),
        ("text_decode",),
    ]


def test_bars_are_those_that_were_set(model):
    """Changed on purpose only."""
    bars = {pair.plain_name: pair.bar for pair in generation.denoise_steps(model, 1)}
    assert bars == {"plain protocol": 1.9, "MAR's design": 1.9}
    assert generation.autoregressive_step(model).bar == 2.4
    assert generation.whole_picture(model).bar == 2.2
    assert generation.text_decode(model).bar == 0.97


@torch.no_grad()
def test_packed_product():
    plain, fast = outputs(generation.packed_product(32))
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_ratios_of_turns():
    ratio = Ratio.of([4.0, 2.0, 9.0, 8.0], [2.0, 2.0, 3.0, 2.0])
    assert ratio.median == 2.5 and ratio.low < 2.5 < ratio.high
    assert str(Ratio.of([3.0], [2.0])) == "1.50 (1.50 to 1.50)"
    calls = []
    times = take_turns([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    # Once to warm up, then in turn.
    assert calls == ["a", "b"] * 3 and [len(own) for own in times] == [2, 2]


@torch.no_grad()
def test_the_gpus_benchmark_runs(model):
    """On a CPU, where it measures what there is: stages of the plain way and of ours, sums, presets."""
    card = (1e12, 1e14)
    lines = list(gpu.measure(model, "tiny", [1, 2], card))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == gpu.HEAD.splitlines()[0].count("|") - 1 for row in cells)
    stages = ["language model", "EmbeddingViT", "denoise loop, 100 steps", "16 x 100, sum of rounds"]
    presets = {"paper": 16, "balanced": 4, "fast": 2}
    drawn = [f"preset {name}, {rounds} rounds, with VAE" for name, rounds in presets.items()]
    expected = [("plain", what) for what in stages] + [("MMAR", what) for what in stages + drawn]
    assert [(row[2], row[3]) for row in cells] == expected * 2
    assert [row[1] for row in cells] == ["1"] * 11 + ["2"] * 11
    # Sixteen rounds of the three stages, in seconds; far above a floor of 1 TB/s.
    total = 16 * sum(float(row[4].split()[0]) for row in cells[:3]) / 1000
    assert float(cells[3][4].split()[0]) == pytest.approx(total, abs=0.05)
    assert all(float(row[7]) > 1 for row in cells if row[3] in stages)
    page = gpu.report(lines, "a card", torch.float32, card)
    assert lines[-1] in page and "a card, torch.float32, floors from 1.00 TB/s and 100 TFLOP/s" in page
    without = list(gpu.measure(model, "tiny", [1], None))
    assert without[0].endswith(" |  |") and "floor is left out" in gpu.report(without, "x", torch.float32, None)


def test_prompts_leave_the_image_token_out():
    """As mmar-tiny's, whose number is among those that are drawn."""
    model = gpu.random_model(tiny_config(image_token_id=3), torch.device("cpu"), torch.float32)
    ids, mask = gpu.prompts(model, 16)
    assert ids.shape == mask.shape == (32, gpu.NUM_TEXT) and bool(mask.all())
    assert set(ids.unique().tolist()) == set(range(gpu.NUM_TEXT_IDS + 1)) - {3}


@torch.no_grad()
def test_floors_by_hand(model):
    """Weights are read once, the head's own once a step; a multiply-add is two operations."""
    stage = gpu.denoise_stage(model, 2, 5, is_plain=False)
    head = model.diffusion_mlp
    blocks = 2 * (2 * 32 * 128) + 32 * 16 + 16 * 32  # two blocks' linears, input and output projection
    modulations = 2 * 3 * 32 * 32 + 2 * 32 * 32
    others = head.condition_projection.weight.numel() + 256 * 32 + 32 * 32
    assert stage.weight_bytes == 4 * (5 * blocks + modulations + others)
    rows = 2 * gpu.BRANCHES
    condition = head.condition_projection.weight.numel()
    assert stage.multiply_adds == rows * (5 * (blocks + modulations) + condition) + 5 * (256 * 32 + 32 * 32)
    assert stage.floor((1e12, 1e9)) == 2 * stage.multiply_adds / 1e9
    assert stage.floor((1e3, 1e18)) == stage.weight_bytes / 1e3


def test_a_page_names_the_commit_and_what_changed_since(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "evaluation" / "provenance.py"))
    (tmp_path / "evaluation").mkdir()
    assert provenance.commit() == "unknown"
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    name = git("rev-parse", "--short", "HEAD")
    page = tmp_path / "docs" / "results" / "page.md"
    page.parent.mkdir(parents=True)
    page.write_text("what a benchmark has just written")
    assert provenance.commit() == name
    (tmp_path / "module.py").write_text("")
    assert provenance.commit() == f"{name} with changes"
