"""
Run by torchrun: trains on the squares over two ranks and writes what came out.

    distributed_training.py OUT MODE STEPS [RESUME_FROM]
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from squares import losses, make_processor, make_squares_model, make_trainer
from transformers import TrainerCallback
from transformers.distributed import DistributedConfig

from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration


class DieInStep(TrainerCallback):
    def __init__(self, number: int):
        self.number = number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    out, mode, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    checkpoint = sys.argv[4] if len(sys.argv) > 4 else None
    processor = make_processor()
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3, "adam_epsilon": 1e-3}
    model = make_squares_model(processor)
    options["bf16"] = mode.endswith("_bf16")
    if mode == "distributed_config":
        # Sharded by transformers as it is loaded.
        model = MMARForConditionalGeneration.from_pretrained(
            out / "init", distributed_config=DistributedConfig(fsdp_size=2)
        )
    elif mode.startswith("fsdp_"):
        options["shard"] = mode.removeprefix("fsdp_").removesuffix("_bf16")
    trainer = make_trainer(out, processor, model, steps, **options)
    if mode == "ddp_dies" and trainer.args.process_index == 1:
        trainer.add_callback(DieInStep(5))
    trainer.train(resume_from_checkpoint=checkpoint)
    with trainer.ema_weights():
        trainer.save_model(str(out / "final"))
    if trainer.args.process_index == 0:
        kinds = sorted({type(p).__name__ for p in trainer.model.parameters() if p.requires_grad})
        frozen = sorted({type(p).__name__ for p in trainer.model.parameters() if not p.requires_grad})
        result = {"losses": losses(trainer), "trained": kinds, "frozen": frozen, "log": trainer.state.log_history}
        (out / "result.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    sys.stdout.flush()
    # Not by way of the interpreter's end, where gloo's threads may abort (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main()
