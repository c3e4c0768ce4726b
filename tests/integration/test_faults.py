"""What a training leaves behind when it is killed, its disk is full, a rank dies, or its files are broken."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from squares import losses, make_processor, make_rows, make_squares_model, make_trainer
from transformers import TrainerCallback

from mmar.training.checkpoints import (
    MANIFEST_FILE,
    SAVING_FOLDER,
    claimed,
    fault,
    last_whole_checkpoint,
    rotate,
)
from mmar_cli.app import app


ROOT = Path(__file__).parents[2]
STEPS = 16
OPTIONS = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


class KillSoon(TrainerCallback):
    """Kills the process so many steps after it goes on, and so many seconds after that, wherever it is then."""

    def __init__(self, steps, seconds):
        self.steps, self.seconds = steps, seconds

    def on_step_begin(self, *args, **kwargs):
        self.steps -= 1
        if self.steps == 0:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def train(folder, moment=None):
    """Goes on from the last whole checkpoint in `folder`; killed at a moment, if there is one."""
    torch.set_num_threads(1)
    trainer = make_trainer(folder, make_processor(), max_steps=STEPS, **OPTIONS)
    if moment is not None:
        trainer.add_callback(KillSoon(*moment))
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    return trainer


def train_killed(folder, moment):
    process = multiprocessing.get_context("forkserver").Process(target=train, args=(folder, moment))
    process.start()
    process.join(600)
    return process.exitcode


@pytest.mark.parametrize("num_kills", [6, pytest.param(24, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_resumes_as_if_unbroken(tmp_path, num_kills):
    whole = train(tmp_path / "whole")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["squares"])
    draw, folder = random.Random(0), tmp_path / "killed"
    reached, in_saving, kills = [], 0, 0
    while kills < num_kills:
        # A step takes some hundredths of a second, a checkpoint, each second step, more.
        exit_code = train_killed(folder, (draw.randint(1, 5), draw.uniform(0, 0.15)))
        for checkpoint in folder.glob("checkpoint-*"):
            assert fault(checkpoint) is None
        if exit_code == 0:
            # It came to its end: begin anew, so that all kills hit a training.
            check_equal(folder, whole)
            shutil.rmtree(folder)
            continue
        assert exit_code == -signal.SIGKILL
        kills += 1
        in_saving += (folder / SAVING_FOLDER).exists()
        last = last_whole_checkpoint(folder)
        reached.append(0 if last is None else int(last.rsplit("-", 1)[1]))
    # Kills hit before the first checkpoint, between others, and in the middle of saving.
    assert len(set(reached)) > 1 and (in_saving > 0 or num_kills < 20)
    train(folder)
    check_equal(folder, whole)


def check_equal(folder, whole):
    """The last checkpoint holds the losses, weights and averages of the unbroken training, bit for bit."""
    checkpoint, expected = folder / f"checkpoint-{STEPS}", f"{whole.args.output_dir}/checkpoint-{STEPS}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert [entry["loss"] for entry in state["log_history"] if "loss" in entry] == losses(whole)
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = load_file(checkpoint / name), load_file(f"{expected}/{name}")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture
def two_checkpoints(tmp_path):
    trainer = make_trainer(tmp_path, make_processor(), max_steps=4, **OPTIONS)
    trainer.train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    return tmp_path, losses(trainer)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors has .* bytes in place of"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: (folder / "optimizer.pt").open("ab").write(b"more"), "optimizer.pt has .* bytes in place of"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json cannot be read"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("{"), "manifest.json cannot be read"),
        (lambda folder: [path.unlink() for path in folder.glob("*") if path.is_file()], "trainer_state.json"),
    ],
)
def test_a_broken_checkpoint_is_passed_over(two_checkpoints, spoil, message):
    folder, expected = two_checkpoints
    spoil(folder / "checkpoint-4")
    trainer = make_trainer(folder, make_processor(), max_steps=4, **OPTIONS)
    with pytest.warns(UserWarning, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == expected
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")  # written anew


@pytest.mark.parametrize(
    ("method", "read", "message"),
    [
        ("read_text", "trainer_state.json", "trainer_state.json is missing"),
        ("is_file", MANIFEST_FILE, "manifest.json cannot be read"),
    ],
)
def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(two_checkpoints, monkeypatch, method, read, message):
    """As by the training that still runs, under the eyes of who looks for its last checkpoint."""
    folder, _ = two_checkpoints
    original = getattr(Path, method)

    def last_look(path, *args, **kwargs):
        result = original(path, *args, **kwargs)
        if path == folder / "checkpoint-4" / read:
            shutil.rmtree(path.parent, ignore_errors=True)
        return result

    monkeypatch.setattr(Path, method, last_look)
    with pytest.warns(UserWarning, match=message):
        assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")


def test_checkpoints_without_a_manifest_are_looked_into(two_checkpoints):
    folder, _ = two_checkpoints
    for name in ("checkpoint-2", "checkpoint-4"):
        (folder / name / MANIFEST_FILE).unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    cut(folder / "checkpoint-4" / "model.safetensors")
    with pytest.warns(UserWarning, match="model.safetensors"):
        assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    ("limit", "kept", "left"),
    [
        (None, [], [2, 4, 10, 12]),
        (3, [], [4, 10, 12]),
        (1, [], [12]),
        (1, [4], [4, 12]),
        (2, [2], [2, 12]),
        (2, [2, 4], [2, 4, 12]),
        (2, [12, 3], [10, 12]),
    ],
)
def test_the_oldest_checkpoints_go_but_those_that_are_kept(tmp_path, limit, kept, left):
    rotate(tmp_path, limit)
    for number in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{number}").mkdir()
    rotate(tmp_path, limit, [str(tmp_path / f"checkpoint-{number}") for number in kept])
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{number}" for number in left}


def test_a_checkpoint_that_is_half_removed_has_no_name(tmp_path, monkeypatch):
    for number in (2, 4):
        (tmp_path / f"checkpoint-{number}").mkdir()

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def spoil_weight(trainer):
    trainer.model.diffusion_mlp.output_projection.bias.data[0] = float("inf")


def spoil_average(trainer):
    trainer.ema.shadow["diffusion_mlp.output_projection.bias"][0] = float("nan")


def spoil_moment(trainer):
    trainer.optimizer.state[trainer.model.diffusion_mlp.output_projection.bias]["exp_avg_sq"][0] = float("inf")


class Spoil(TrainerCallback):
    """Changes something after the optimizer's second step."""

    def __init__(self, trainer, spoil):
        self.trainer, self.spoil = trainer, spoil

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.spoil(self.trainer)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (spoil_weight, "diffusion_mlp.output_projection.bias"),
        (spoil_average, "the average of diffusion_mlp.output_projection.bias"),
        (spoil_moment, "the optimizer's exp_avg_sq of diffusion_mlp.output_projection.bias"),
    ],
)
def test_non_finite_weights_are_not_saved(tmp_path, spoil, name):
    trainer = make_trainer(tmp_path, make_processor(), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.add_callback(Spoil(trainer, spoil))
    with pytest.raises(ValueError, match=name):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    # Nor is a model, after which there is no step.
    with pytest.raises(ValueError, match="finite"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_ends_the_training(tmp_path):
    trainer = make_trainer(tmp_path, make_processor(), max_steps=2, save_strategy="steps", save_steps=1)
    # Without a weight that moves, so that only the norm tells.
    trainer.model.diffusion_mlp.output_projection.bias.register_hook(lambda gradient: gradient * float("inf"))
    trainer.args.max_grad_norm, trainer.args.learning_rate = 0.0, 0.0
    trainer.args.logging_steps = 10
    with pytest.raises(ValueError, match="NaN"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_resuming_passes_over_weights_that_are_not_finite(two_checkpoints, name):
    """As an earlier version saved them: of the right size, and in the manifest."""
    folder, _ = two_checkpoints
    tensors = load_file(folder / "checkpoint-4" / name)
    tensors["diffusion_mlp.output_projection.bias"][1] = float("nan")
    save_file(tensors, folder / "checkpoint-4" / name, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"{name} .*diffusion_mlp"):
        assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda state: state["state"][0]["exp_avg_sq"].fill_(float("inf")),
            "holds NaN or infinity in state.0.exp_avg_sq",
        ),
        (lambda state: state.update(path=Path()), "holds other things than numbers"),
    ],
)
def test_resuming_looks_into_the_optimizer(two_checkpoints, spoil, message):
    folder, _ = two_checkpoints
    file = folder / "checkpoint-4" / "optimizer.pt"
    state = torch.load(file)
    spoil(state)
    torch.save(state, file)
    (folder / "checkpoint-4" / MANIFEST_FILE).unlink()
    with pytest.warns(UserWarning, match="optimizer.pt"):
        assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")


def test_the_command_ends_with_status_1_where_weights_are_not_finite(tmp_path, monkeypatch):
    processor = make_processor()
    make_squares_model(processor).save_pretrained(tmp_path / "init")
    processor.save_pretrained(tmp_path / "init")
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in make_rows()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    words = ["train", str(ROOT / "training/recipes/mmar_tiny_stage1.yaml"), f"model={tmp_path / 'init'}"]
    words += [f"data={tmp_path / 'rows.parquet'}", f"output_dir={tmp_path / 'run'}", "swap_rate=0", "use_cpu=true"]
    words += ["per_device_train_batch_size=4", "warmup_steps=0", "max_steps=1", "learning_rate=1e39"]
    monkeypatch.delenv("MMAR_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        app(words, standalone_mode=False)
    assert ended.value.code.startswith("error: expected finite weights to save; ")
    assert not list((tmp_path / "run").rglob("model.safetensors"))


HOLD = """
import sys, time
from mmar.training.checkpoints import claimed
with claimed(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(600)
"""


def test_one_training_at_a_time_and_none_after_a_kill(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "claimed\n"
        trainer = make_trainer(tmp_path, make_processor(), max_steps=1, **OPTIONS)
        with pytest.raises(ValueError, match="`output_dir`"):
            trainer.train()
        # Its other processes claim nothing.
        with claimed(tmp_path, is_main_process=False):
            pass
    finally:
        other.kill()
        other.communicate()
    trainer.train()
    assert losses(trainer)
    # The command claims the folder before the trainer does.
    with claimed(tmp_path), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_nothing_to_resume_from(tmp_path):
    trainer = make_trainer(tmp_path, make_processor())
    assert last_whole_checkpoint(tmp_path / "none") is None
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_what_cannot_be_resumed_is_told(tmp_path):
    trainer = make_trainer(tmp_path, make_processor(), max_steps=1, save_strategy="steps", save_only_model=True)
    trainer.train()
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="_state.json"):
            trainer.train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="`save_only_model=true`"):
        trainer.train(resume_from_checkpoint=True)


def test_a_full_disk_leaves_the_checkpoints_before(two_checkpoints, monkeypatch):
    folder, _ = two_checkpoints
    shutil.rmtree(folder / "checkpoint-4")
    trainer = make_trainer(folder, make_processor(), max_steps=4, **OPTIONS)
    save = torch.save

    def no_space(content, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt"):
            raise OSError(28, "No space left on device")
        return save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="space"):
        trainer.train(resume_from_checkpoint=True)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_disappears_ends_the_training(tmp_path, num_workers):
    """Through the command, as it runs: one line names the shard, and the checkpoints are whole."""
    processor = make_processor()
    make_squares_model(processor).save_pretrained(tmp_path / "init")
    processor.save_pretrained(tmp_path / "init")
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for i, row in enumerate(make_rows()):
                for name, content in ((f"{i}.png", row["image"]), (f"{i}.txt", row["captions"][0].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    command = [sys.executable, "-m", "mmar", "train", str(ROOT / "training/recipes/mmar_tiny_stage1.yaml")]
    command += [
        f"model={tmp_path / 'init'}",
        f"data={tmp_path / 'shard-{0..1}.tar'}",
        f"output_dir={tmp_path / 'run'}",
    ]
    command += ["swap_rate=0", "per_device_train_batch_size=4", "use_cpu=true", "save_steps=2", "max_steps=100000"]
    command += [f"dataloader_num_workers={num_workers}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        while last_whole_checkpoint(tmp_path / "run") is None and process.poll() is None:
            time.sleep(0.1)
        (tmp_path / "shard-1.tar").unlink()
        _, said = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 1
    lines = [line for line in said.splitlines() if "which was there at the start" in line]
    assert len(lines) == 1 and "shard-1.tar" in lines[0] and lines[0].startswith("error: expected"), said
    assert "Traceback" not in said
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        assert fault(checkpoint) is None
