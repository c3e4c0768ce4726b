"""`MMARTrainer`: transformers' `Trainer` with losses by kind, EMA and the frozen parts frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..pipelines.pipeline_mmar import MMARPipeline
from ..processors.processing_mmar import MMARProcessor


EMA_FILE = "ema.safetensors"
LOSSES = ("text_loss", "image_loss")
# Early steps average over fewer: decay (1 + t) / (10 + t), as in TensorFlow's moving averages.
EMA_WARMUP = 10


@dataclass
class MMARTrainingArguments(TrainingArguments):
    r"""
    `TrainingArguments` with MMAR's own.

    Args:
        ema_decay (`float`, *optional*, defaults to 0.9999): Momentum of the moving average of the trained weights
            (Sec. 3.3.3); 0 turns it off.
        train_backbone (`bool`, *optional*, defaults to `False`): Also train Qwen2's own weights; for a backbone that
            was not pretrained.
        compile_layers (`bool`, *optional*, defaults to `False`): Compile each transformer layer and diffusion block
            with `torch.compile` for any batch and length; on a CPU it needs a C++ compiler. `torch_compile` compiles
            the whole model, which breaks where MMAR looks at its masks.
    """

    ema_decay: float = field(default=0.9999, metadata={"help": "momentum of the weights' moving average; 0: none"})
    train_backbone: bool = field(default=False, metadata={"help": "also train Qwen2's own weights"})
    compile_layers: bool = field(default=False, metadata={"help": "compile each layer with torch.compile"})

    def __post_init__(self):
        # transformers refuses bf16 on a CPU that was not asked for by name.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1); got {self.ema_decay}.")
        # The collator reads columns that `forward` does not name.
        self.remove_unused_columns = False
        # A loss of NaN must show, and stops the training.
        self.logging_nan_inf_filter = False


class EMA:
    """Exponential moving average of a model's trainable parameters, float32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.num_updates = decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (EMA_WARMUP + self.num_updates))
        parameters = dict(model.named_parameters())
        shadows = list(self.shadow.values())
        torch._foreach_lerp_(shadows, [parameters[name].detach().float() for name in self.shadow], 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model holds the averaged weights."""
        parameters = dict(model.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.shadow}
        self._write(parameters, self.shadow)
        try:
            yield
        finally:
            self._write(parameters, kept)

    @staticmethod
    @torch.no_grad()
    def _write(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)

    def save(self, folder: str | Path) -> None:
        save_file(
            {**self.shadow, "num_updates": torch.tensor(self.num_updates)}, Path(folder) / EMA_FILE, {"format": "pt"}
        )

    def load(self, folder: str | Path) -> None:
        """Raises ValueError if the file is missing or its parameters are not those of the average."""
        if not (Path(folder) / EMA_FILE).is_file():
            raise ValueError(f"expected {EMA_FILE} in the checkpoint; it is not there. Resume with `ema_decay=0`.")
        stored = load_file(Path(folder) / EMA_FILE)
        self.num_updates = int(stored.pop("num_updates"))
        if stored.keys() != self.shadow.keys():
            raise ValueError(
                f"{EMA_FILE} must hold the {len(self.shadow)} trained parameters; got {len(stored)}. Resume with the "
                "same `train_backbone` and model."
            )
        for name, value in stored.items():
            self.shadow[name].copy_(value)


class _SeedPerRank(TrainerCallback):
    """Tasks, masks and noise differ between ranks; transformers seeds all alike. A resumed state comes later."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            set_seed(args.seed + args.process_index)


class _UpdateEMA(TrainerCallback):
    def __init__(self, trainer: "MMARTrainer"):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.ema.update(self.trainer.accelerator.unwrap_model(self.trainer.model))


class MMARTrainer(Trainer):
    r"""
    Trains an `MMARForConditionalGeneration`; see `Trainer` for the arguments.

    Logs `text_loss` and `image_loss` beside `loss`, keeps an EMA of the trained weights (saved and resumed with each
    checkpoint; `ema_weights()` applies it) and freezes what the paper freezes.
    """

    # MMAR's losses are means over a micro-batch; the Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, model: nn.Module, args: MMARTrainingArguments, **kwargs):
        if not isinstance(args, MMARTrainingArguments):
            raise ValueError(f"`args` must be MMARTrainingArguments; got {type(args).__name__}.")
        if not hasattr(model, "freeze"):
            raise ValueError(f"`model` must be an MMARForConditionalGeneration; got {type(model).__name__}.")
        if args.train_backbone and model.config.frozen_weights == "referenced":
            raise ValueError(
                "`train_backbone` needs a model that holds its backbone; this one keeps it by reference. Save it with "
                "`frozen='include'` and train that."
            )
        model.freeze(train_backbone=args.train_backbone)
        super().__init__(model=model, args=args, **kwargs)
        if args.ema_decay > 0 and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"`ema_decay` must be 0 with FSDP and DeepSpeed, whose sharded weights the average cannot follow; got "
                f"{args.ema_decay}. Train on one device or with DDP, or set `ema_decay=0`."
            )
        if args.compile_layers:
            for module in model.modules():
                if type(module).__name__ in model._no_split_modules:
                    module.compile(dynamic=True)
        if isinstance(self.processing_class, MMARProcessor):
            self._pipeline = MMARPipeline(model, self.processing_class, model.default_scheduler())
        self._sums: dict[str, Tensor] = {}
        self.add_callback(_SeedPerRank())
        self.ema = EMA(model, args.ema_decay) if args.ema_decay > 0 else None
        if self.ema is not None:
            self.add_callback(_UpdateEMA(self))

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the context the model holds the EMA weights, if there is an EMA."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied_to(self.accelerator.unwrap_model(self.model)):
                yield

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        for name in LOSSES:
            value = getattr(outputs, name)
            if model.training and value is not None:
                # Stays on the device: no sync but when it is logged.
                entry = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)])
                self._sums[name] = self._sums.get(name, 0) + entry
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            self._check_finite()
            logs = {**logs, **self._mean_losses()}
        super().log(logs, *args, **kwargs)

    def _check_finite(self) -> None:
        """Raises a `ValueError` if a loss since the last log was NaN or infinite: nothing good can come after it."""
        for name, total in self._sums.items():
            if not bool(torch.isfinite(total).all()):
                raise ValueError(
                    f"expected finite losses; got a {name} of NaN or infinity before step {self.state.global_step}. "
                    "Lower `learning_rate`, or look for broken rows; the checkpoints before it are good."
                )

    def _mean_losses(self) -> dict[str, float]:
        """Means of the losses since the last call, over the micro-batches of all ranks that had them."""
        none = torch.zeros(2, device=self.args.device)
        totals = {name: self._sums.get(name, none) for name in LOSSES}
        self._sums = {}
        totals = {name: self.accelerator.reduce(total.clone(), "sum") for name, total in totals.items()}
        return {name: round((total[0] / total[1]).item(), 4) for name, total in totals.items() if total[1] > 0}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """No weight decay on norms, biases and embeddings."""
        names = super().get_decay_parameter_names(model)
        return [
            name for name in names if not name.endswith(("mask_token", "position_embedding", "embed_tokens.weight"))
        ]

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.ema_weights():
            return super().evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._check_finite()
        super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self.processing_class, MMARProcessor):
            # So that a checkpoint opens through every door.
            self._pipeline.save_index(output_dir if output_dir is not None else self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        if self.ema is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self.ema.save(folder)
        super()._save_checkpoint(model, trial)

    def load_checkpoint(self, folder: str) -> None:
        """Loads the weights of a checkpoint and their EMA, to evaluate or save them; `train` resumes a training."""
        self._load_from_checkpoint(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)
