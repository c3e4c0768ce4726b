"""The command line: its help, and what it finds without being told."""

import dataclasses
import os
import resource
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from commands import mmar
from PIL import Image

from mmar.evaluation import fid
from mmar.modeling_mmar.generation_mmar import PRESETS
from mmar.training.recipe import PARTS, DataArguments, MMARTrainingArguments, find_recipe
from mmar.training.trainer import TrainingArguments
from mmar_cli import evaluation as cli_evaluation
from mmar_cli.app import app
from mmar_cli.generation import Preset
from mmar_cli.training import own_keys


ROOT = Path(__file__).parents[2]
PROMPT = "an emoji of strawberry in fluent style"
# Ends with the names of the modules that were imported.
ASK = """
import sys
from mmar_cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
print("imported:", *sys.modules)
"""


def commands(group, words=()):
    """The words of each command, and of each group of them."""
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


@pytest.mark.parametrize("words", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_help_comes_within_a_second_and_without_torch(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", ASK, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    text, _, imported = done.stdout.partition("imported:")
    assert text.startswith(f"Usage: {' '.join(('mmar', *words))} ")
    assert not {"torch", "transformers", "diffusers", "numpy", "mmar"} & set(imported.split())
    # Of the processor, whatever else runs on this machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_help_of_train_lists_the_keys_that_are_not_those_of_transformers():
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = [field for part in PARTS for field in dataclasses.fields(part) if field.name not in theirs]
    assert PARTS == (DataArguments, MMARTrainingArguments)
    assert [name for name, _ in own_keys()] == [field.name for field in fields]
    for field, (_, about) in zip(fields, own_keys(), strict=True):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        end = "" if default is dataclasses.MISSING else f" (default: {default!r})"
        assert about == field.metadata["help"] + end


def test_choices_and_numbers_are_those_of_the_package():
    assert typing.get_args(typing.get_args(typing.get_args(Preset)[0])[0]) == tuple(PRESETS)
    assert cli_evaluation.NUM_PROMPTS == fid.NUM_PROMPTS


def test_all_keys_are_listed_when_asked(capsys):
    mmar("train", "--keys")
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in lines} == {f.name for part in PARTS for f in dataclasses.fields(part)}
    assert any(line.startswith("shuffle_buffer: int = 1000 # ") for line in lines)


@pytest.mark.parametrize("name", ["mmar_tiny_stage1", "mmar_tiny_stage1.yaml", "mmar_0_5b_transfusion_stage1"])
def test_shipped_recipes_are_found_by_name_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = find_recipe(name)
    assert path.stem == name.removesuffix(".yaml") and path.is_file()
    # A file of that name comes first.
    Path(name).write_text("seed: 1")
    assert find_recipe(name) == Path(name)


def test_an_option_of_train_is_named_as_a_wrong_key():
    with pytest.raises(ValueError, match="max_steps"):
        mmar("train", "mmar_tiny_stage1", "--max_steps=3", "model=m", "data=d", "output_dir=o")


def test_the_bundled_model_generates_and_describes_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mmar("generate", PROMPT, "--seed", 1, "--num_ar_steps", 8, "--num-inference-steps", 5)
    name = "an-emoji-of-strawberry-in-fluent-style-1.png"
    assert capsys.readouterr().out.splitlines() == [name]
    assert Image.open(name).size == (64, 64)
    mmar("generate", PROMPT, "--out", "again.png", "--seed", 1, "--num_ar_steps", 8, "--num-inference-steps", 5)
    assert Image.open("again.png").tobytes() == Image.open(name).tobytes()
    capsys.readouterr()
    mmar("describe", name)
    assert capsys.readouterr().out == f"{PROMPT}\n"
    mmar("describe", name, "--question", "Which style?")
    assert capsys.readouterr().out == "fluent\n"


@pytest.mark.parametrize("out", ["nowhere/image.png", "image.txt", "image"])
def test_an_image_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmar.conversion.models.open_pipeline", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="`out` must be"):
        mmar("generate", PROMPT, "--out", out)


def test_the_package_that_is_installed_has_what_the_commands_find(tmp_path):
    """As in a wheel, from a folder that is not the checkout."""
    site = tmp_path / "site"
    build = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", build, "-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", site]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    asked = "from mmar_cli import main, generation; from mmar.training.recipe import find_recipe; "
    asked += "print(generation.BUNDLED, find_recipe('mmar_7b_sft')); main()"
    words = ["generate", PROMPT, "--out", "a.png", "--num_ar_steps", "1", "--num_inference_steps", "2"]
    command = [sys.executable, "-c", asked, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipe = site / "mmar/training/recipes/mmar_7b_sft.yaml"
    assert done.stdout == f"{site / 'mmar/checkpoints/mmar-tiny'} {recipe}\na.png\n"
    assert Image.open(tmp_path / "a.png").size == (64, 64)


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_start_commands(tmp_path, launcher):
    command = [sys.executable, "-m", *launcher, "-m", "mmar", "train", "--keys"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("attn_implementation: "), done.stderr
