"""DDP and FSDP2 on two gloo ranks give the losses and weights of one process, save and resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from squares import losses, make_processor, make_squares_model, make_trainer

from mmar.training.checkpoints import last_whole_checkpoint


HERE = Path(__file__).parent
# Sums of float32 in another order, spread by six steps of a learning rate of 1e-2.
TOLERANCE = 1e-4
# Parameters that no autocast casts, such as position embeddings, are rounded when they are gathered. How products of
# bfloat16 are rounded depends on the processor: 1.1 percent in the second step where it has no instructions for them.
BF16_TOLERANCE = 2e-2


def train_on_two_ranks(out, mode, steps=6, checkpoint=None, must_end_well=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(HERE / "distributed_training.py")]
    command += [str(out), mode, str(steps)] + ([str(checkpoint)] if checkpoint else [])
    paths = [str(HERE.parents[1]), str(HERE.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == must_end_well, done.stderr[-4000:]
    if not must_end_well:
        return None
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    # Where a gradient is hardly more than rounding, AdamW's usual epsilon would make a step of it.
    trainer = make_trainer(folder, make_processor(), save_strategy="steps", save_steps=3, adam_epsilon=1e-3)
    trainer.train()
    with trainer.ema_weights():
        trainer.save_model(str(folder / "final"))
    return trainer, load_file(folder / "final" / "model.safetensors"), folder


@pytest.mark.parametrize(
    ("mode", "trained", "frozen"),
    [
        ("ddp", ["Parameter"], ["Parameter"]),
        ("fsdp_trained", ["DTensor"], ["Parameter"]),
        ("fsdp_all", ["DTensor"], ["DTensor", "Parameter"]),
        ("distributed_config", ["DTensor"], ["DTensor"]),
    ],
)
def test_two_ranks_train_as_one_process_and_resume(tmp_path, one_process, mode, trained, frozen):
    whole, weights, _ = one_process
    make_squares_model(make_processor()).save_pretrained(tmp_path / "init")
    result = train_on_two_ranks(tmp_path, mode)
    assert (result["trained"], result["frozen"]) == (trained, frozen)
    assert result["losses"] == pytest.approx(losses(whole), rel=TOLERANCE)
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        ours = saved[name]
        if name.endswith("qkv.bias"):
            # Softmax is blind to a bias of the keys: its gradient is rounding, which Adam blows up.
            ours, value = (torch.stack([part.chunk(3)[i] for i in (0, 2)]) for part in (ours, value))
        torch.testing.assert_close(ours, value, atol=1e-4, rtol=1e-3, msg=name)
    for ours, theirs in zip(result["log"], whole.state.log_history, strict=True):
        for name in set(theirs) & {"text_loss", "image_loss", "t2i_loss", "grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name

    resumed = train_on_two_ranks(tmp_path, mode, checkpoint=tmp_path / "checkpoint-3")
    # The same batches, noise and weights, bit for bit.
    assert resumed["losses"] == result["losses"]
    again = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in saved.items())


@pytest.mark.parametrize("mode", ["fsdp_trained_bf16", "fsdp_all_bf16"])
def test_sharded_in_bfloat16_the_losses_stay_float32(tmp_path, mode):
    """Weights are gathered in bfloat16, where autocast of one process casts them layer by layer."""
    trainer = make_trainer(tmp_path / "one", make_processor(), max_steps=2, bf16=True, adam_epsilon=1e-3)
    trainer.train()
    result = train_on_two_ranks(tmp_path, mode, steps=2)
    assert result["losses"] == pytest.approx(losses(trainer), rel=BF16_TOLERANCE)
    # No float of bfloat16's 8 bits: neither losses nor inputs were cast.
    assert all(value != float(torch.tensor(value).bfloat16()) for value in result["losses"])


def test_a_rank_that_dies_ends_all_and_the_next_start_goes_on(tmp_path, one_process):
    whole, _, _ = one_process
    train_on_two_ranks(tmp_path, "ddp_dies", must_end_well=False)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "final").exists()
    result = train_on_two_ranks(tmp_path, "ddp", checkpoint=last_whole_checkpoint(tmp_path))
    assert result["losses"] == pytest.approx(losses(whole), rel=TOLERANCE)


def test_a_checkpoint_of_one_process_resumes_sharded(tmp_path, one_process):
    whole, _, folder = one_process
    result = train_on_two_ranks(tmp_path, "fsdp_trained", checkpoint=folder / "checkpoint-3")
    assert result["losses"] == pytest.approx(losses(whole), rel=TOLERANCE)


def test_a_sharded_checkpoint_resumes_in_one_process(tmp_path, one_process):
    whole, _, _ = one_process
    train_on_two_ranks(tmp_path, "fsdp_trained", steps=6)
    trainer = make_trainer(tmp_path / "one", make_processor(), adam_epsilon=1e-3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(trainer)[-3:] == pytest.approx(losses(whole)[-3:], rel=TOLERANCE)
