"""Commands end with one line that says what is wrong."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from mmar import MMARConfig
from mmar.command import run_command
from mmar.conversion.models import open_model, open_pipeline, open_processor
from mmar.training.trainer import MMARTrainingArguments


ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    path
    for folder in ("ablations", "benchmarks", "conversion", "evaluation", "training")
    for path in (ROOT / folder).rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_is_run_so(path: Path):
    last = ast.unparse(ast.parse(path.read_text(encoding="utf-8")).body[-1])
    assert last == "if __name__ == '__main__':\n    run_command(main)"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("benchmarks.generation", ["--out", "LICENSE"], "error: expected a folder for --out; LICENSE is a file"),
        ("benchmarks.gpu", ["--device", "gpu"], "error: --device must be one that torch has here; got 'gpu'"),
        (
            "benchmarks.gpu",
            ["--device", "cpu", "--presets", "mmar-tiny", "nope"],
            "error: `preset` must be one of",
        ),
        (
            "convert",
            ["kl16", "no.ckpt", "out"],
            "error: expected a checkpoint file; there is none",
        ),
        (
            "convert",
            ["vq16", "no.ckpt", "out"],
            "error: expected a checkpoint file; there is none",
        ),
        ("card", ["nowhere"], "error: expected the folder of an MMAR; 'nowhere' has no readable"),
        (
            "card",
            ["checkpoints/mmar-tiny", "--facts", "LICENSE"],
            "error: expected the facts of",
        ),
        (
            "evaluate",
            ["fid", "checkpoints/mmar-tiny", "--captions", "no.json", "--real", "real", "--out", "out"],
            "error: expected captions in COCO's layout",
        ),
        (
            "export",
            ["./nowhere", "out"],
            "error: `source` must be the folder of an MMAR or a repository of the Hub; got './nowhere'",
        ),
        ("evaluate", ["geneval", "scores", "no.jsonl"], "error: expected the results of GenEval's scorer"),
        (
            "training.train_latent_encoder",
            [
                "checkpoints/mmar-tiny",
                "--data",
                "checkpoints/emoji-lite/train.parquet",
                "--latents",
                "no",
                "--out",
                "no",
            ],
            "error: expected a folder of latents; there is no",
        ),
        ("train", ["no.yaml"], "error: `recipe`, the first argument, must be "),
    ],
)
def test_one_line_says_what_is_wrong(module, arguments, message):
    done = run(f"mmar.{module}" if "." in module else "mmar", *([] if "." in module else [module]), *arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout
    assert lines[-1].startswith(message) and lines[-1].endswith(" (MMAR_TRACEBACK=1 shows where)")
    assert "Traceback" not in done.stderr and sum(line.startswith("error:") for line in lines) == 1


def test_a_config_that_fits_nothing_is_told(monkeypatch):
    """What a strict config raises is no ValueError."""

    def main():
        MMARConfig(image_size=255)

    monkeypatch.delenv("MMAR_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code.startswith("error: Class validation error") and "`image_size`" in ended.value.code


class Failing:
    """A data set whose rows raise an error."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        try:
            raise KeyError("before")
        except KeyError as cause:
            raise self.error from cause


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("`x` must be 1; got 2.\nDo 3: now."), "`x` must be 1; got 2. Do 3: now."),
        (FileNotFoundError("shard-1.tar is gone"), "shard-1.tar is gone"),
        (SafetensorError("No space left on device (os error 28)"), "No space left on device (os error 28)"),
        (RuntimeError("PytorchStreamWriter failed"), "RuntimeError: PytorchStreamWriter failed"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
        (ModuleNotFoundError("No module named 'apex'"), "ModuleNotFoundError: No module named 'apex'"),
        (KeyError("image"), "KeyError: 'image'"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 10**6), "x" * 2000 + "..."),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_any_error_is_one_line_also_of_a_data_worker(monkeypatch, error, line, num_workers):
    monkeypatch.delenv("MMAR_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: list(DataLoader(Failing(error), num_workers=num_workers)))
    assert ended.value.code == f"error: {line} (MMAR_TRACEBACK=1 shows where)"


@pytest.mark.parametrize("open_part", [open_model, open_pipeline, open_processor])
def test_a_wrong_model_is_named_with_its_option(tmp_path, monkeypatch, open_part):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "none", tmp_path / "file", "a/b/c", "some/repository"):
        with pytest.raises(ValueError, match="`model`"):
            open_part(name)
    with pytest.raises(ValueError, match="--start"):
        open_part("x" * 10**4, "--start")


def test_a_config_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(ValueError, match="`model`"):
        open_model(tmp_path)


@pytest.mark.parametrize("trackers", ["tensorboard", ["wandb"], "no_such_tracker"])
def test_trackers_that_are_not_installed_are_refused(tmp_path, trackers):
    with pytest.raises(ValueError, match="`report_to`"):
        MMARTrainingArguments(output_dir=str(tmp_path), report_to=trackers)


def test_traceback_when_asked():
    done = run("mmar", "convert", "kl16", "no.ckpt", "out", MMAR_TRACEBACK="1")
    assert done.returncode == 1 and "Traceback" in done.stderr
