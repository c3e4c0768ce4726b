"""`MMARTrainer`: transformers' `Trainer` with exact losses and batches, EMA, and the frozen parts frozen."""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    WandbCallback,
    get_available_reporting_integrations,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, PredictionOutput, SaveStrategy

from ..modeling_mmar.configuration_mmar import IGNORE_INDEX, shorten
from ..modeling_mmar.modeling_mmar import MMARPreTrainedModel
from ..modeling_mmar.saving_mmar import apply_umask
from ..pipelines.pipeline_mmar import MMARPipeline
from ..processors.processing_mmar import TASKS, MMARProcessor
from .checkpoints import check_weights, claimed, fault, finish, last_whole_checkpoint, num_steps, rotate, saving_folder
from .collator import MMARDataCollator, generators, sample_latents
from .ema import EMA, local_part
from .rows import BadRow, open_pictures
from .samples import CAPTION_QUESTION, StepSampler, StreamedSamples, TrainingSamples
from .sharding import (
    SHARD_CHOICES,
    is_sharded,
    load_optimizer_state,
    load_sharded,
    mixed_precision,
    shard_model,
    whole_optimizer_state,
    whole_state,
)


logger = logging.getLogger(__name__)

# Rows that could not be used, one JSON line each.
SKIPPED_FILE = "skipped_rows.jsonl"
# So many of them are also told on the spot.
NUM_TOLD_ROWS = 10
# Where the workers of a rank stand in the streams, and which of them gave the last batch.
POSITIONS_FILE = "stream_positions_{rank}.json"
LAST_WORKER = "last_worker"
# Intervals of timesteps whose image losses are logged apart.
NUM_TIMESTEP_BINS = 10


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
        text_loss_weight, image_loss_weight (`float`, *optional*, defaults to 1.0): Of the losses (Eq. 4).
        learning_rate_scales (`dict[str, float]`, *optional*): Factors of the learning rate for parameters whose names
            begin so, such as `{"diffusion_mlp": 2.0}`; the longest name wins, and 0 freezes.
        learning_rate_phases (`list[float]`, *optional*, defaults to `[1.0]`): Factors of the learning rate, each for
            an equal part of the steps.
        sort_by_length (`bool`, *optional*, defaults to `False`): Put samples of like length into one micro-batch,
            within each optimizer step, which leaves its gradient as it is.
        shard (`str`, *optional*, defaults to `"none"`): Shard weights, their gradients and optimizer states over the
            ranks (FSDP2): `"trained"` ones only, so that frozen weights, of which every rank has all, are never
            gathered; or `"all"`.
        num_eval_pictures (`int`, *optional*, defaults to 0): Pictures to draw and to describe in each evaluation;
            they go to `output_dir/samples`, TensorBoard and W&B.
    """

    ema_decay: float = field(default=0.9999, metadata={"help": "momentum of the weights' moving average; 0: none"})
    train_backbone: bool = field(default=False, metadata={"help": "also train Qwen2's own weights"})
    compile_layers: bool = field(default=False, metadata={"help": "compile each layer with torch.compile"})
    text_loss_weight: float = field(default=1.0, metadata={"help": "of the text loss (Eq. 4)"})
    image_loss_weight: float = field(default=1.0, metadata={"help": "of the image loss (Eq. 4)"})
    learning_rate_scales: dict | str | None = field(
        default=None, metadata={"help": "factors of the learning rate by the beginning of parameters' names"}
    )
    learning_rate_phases: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "factors of the learning rate, each for an equal part of the steps"},
    )
    sort_by_length: bool = field(default=False, metadata={"help": "samples of like length in one micro-batch"})
    shard: str = field(default="none", metadata={"help": "over ranks: none, trained or all weights"})
    num_eval_pictures: int = field(default=0, metadata={"help": "pictures to draw and describe in each evaluation"})

    def __post_init__(self):
        # transformers refuses bf16 on a CPU that was not asked for by name.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if isinstance(self.learning_rate_scales, str):
            with contextlib.suppress(json.JSONDecodeError, RecursionError):
                self.learning_rate_scales = json.loads(self.learning_rate_scales)
        super().__post_init__()
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{entry.name}` must be finite; got {value!r}.")
        installed = get_available_reporting_integrations()
        # Of Flyte transformers does not say whether it is there.
        if missing := [str(name) for name in self.report_to if name not in (*installed, "flyte")]:
            raise ValueError(
                f"`report_to` must name trackers that are installed, {', '.join(installed) or 'none so far'}; got "
                f"{', '.join(missing)}. Install it with pip, or set `report_to=none`."
            )
        if not _is_number(self.ema_decay) or not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be a number in [0, 1); got {shorten(self.ema_decay)}.")
        for name in ("text_loss_weight", "image_loss_weight"):
            weight = getattr(self, name)
            if not _is_number(weight) or not 0 <= weight < float("inf"):
                raise ValueError(f"`{name}` must be at least 0 and finite; got {shorten(weight)}.")
        scales = {} if self.learning_rate_scales is None else self.learning_rate_scales
        if not isinstance(scales, dict) or not all(isinstance(name, str) for name in scales):
            raise ValueError(
                "`learning_rate_scales` must give a number for each beginning of parameters' names, such as "
                f'{{"diffusion_mlp": 2.0}}; got {shorten(scales)}.'
            )
        for name, scale in scales.items():
            if not _is_number(scale) or not 0 <= scale < float("inf"):
                raise ValueError(
                    f"`learning_rate_scales` must be numbers of at least 0; got {shorten(scale)} for {shorten(name)}."
                )
        phases = self.learning_rate_phases
        numbers = isinstance(phases, list) and all(_is_number(factor) for factor in phases)
        if not numbers or not phases or phases[0] != 1 or not all(0 < factor < float("inf") for factor in phases):
            raise ValueError(
                "`learning_rate_phases` must be numbers above 0, the first of them 1, such as [1.0, 0.5] for half the "
                f"learning rate in the second half of the training; got {shorten(phases)}."
            )
        if self.shard not in SHARD_CHOICES:
            raise ValueError(f"`shard` must be one of {', '.join(SHARD_CHOICES)}; got {shorten(self.shard)}.")
        if type(self.num_eval_pictures) is not int or self.num_eval_pictures < 0:
            raise ValueError(
                f"`num_eval_pictures` must be an integer of at least 0; got {shorten(self.num_eval_pictures)}."
            )
        # The collator reads columns that `forward` does not name.
        self.remove_unused_columns = False
        # A loss of NaN must show, and stops the training.
        self.logging_nan_inf_filter = False
        # Losses are summed here; gathered logits of a whole vocabulary would not fit.
        self.prediction_loss_only = True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _UpdateEMA(TrainerCallback):
    def __init__(self, trainer: "MMARTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.ema.follow(self.trainer.plain_model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.ema.update(self.trainer.plain_model)


class _Progress(ProgressCallback):
    """transformers' progress bar, whose estimate counts steps, with the samples per second."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None and "samples_per_second" in (logs or {}):
            self.training_bar.set_postfix_str(f"{logs['samples_per_second']:.1f} samples/s")


class _StreamLoader(DataLoader):
    """A loader of `StreamedSamples`, without the batches of workers whose turn it is not yet."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (batch for batch in super().__iter__() if batch is not None)


def _collate_stream(collator: Callable, samples: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    return None if samples[0] is None else collator(samples)


class LossSums:
    """Sums of losses and their numbers of tokens, kept on the device: no sync but when they are read."""

    def __init__(self, num_train_timesteps: int):
        size = -(-num_train_timesteps // NUM_TIMESTEP_BINS)
        self.bin_size = size
        ranges = [(start, min(start + size, num_train_timesteps) - 1) for start in range(0, num_train_timesteps, size)]
        self.names = ["text_loss", "image_loss", *(f"{task}_loss" for task in TASKS)]
        self.names += [f"image_loss_t{first:03d}_{last:03d}" for first, last in ranges]
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, outputs: Any, inputs: dict[str, Tensor], picture_tasks: Tensor | None) -> None:
        """Adds a micro-batch; `picture_tasks` `(I,)` are the numbers of its pictures' tasks, if they are known."""
        device = inputs["input_ids"].device
        # float64: sums over thousands of tokens and steps, which ranks add in another order.
        sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)
        if outputs.text_loss is not None:
            num_labels = count_labels(inputs["labels"])
            text = torch.stack([outputs.text_loss.double() * num_labels, num_labels.double()])
            sums[0] += text
            sums[2 + TASKS.index("i2t")] += text
        if outputs.token_losses is not None:
            losses = outputs.token_losses.double()
            sums[1] += torch.stack([losses.sum(), losses.new_tensor(losses.numel())])
            ones = torch.ones_like(losses)
            bins = 2 + len(TASKS) + outputs.timesteps // self.bin_size
            pairs = torch.stack([losses, ones], -1).flatten(0, 1)
            sums.index_add_(0, bins.flatten(), pairs)
            if picture_tasks is not None:
                own = picture_tasks[inputs["latent_mask"].nonzero()[:, 0]]  # (M,)
                sums.index_add_(0, 2 + own.repeat(len(losses)), pairs)
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, reduce: Any, device: torch.device) -> dict[str, float]:
        """Means since the last call, over all ranks, of the losses that there were."""
        sums = self.sums if self.sums is not None else torch.zeros(len(self.names), 2, dtype=torch.float64)
        self.sums = None
        # MPS has no float64.
        sums = reduce(sums.to(device, torch.float32 if device.type == "mps" else torch.float64), "sum").tolist()
        return {name: total / number for name, (total, number) in zip(self.names, sums, strict=True) if number > 0}

    def is_finite(self) -> bool:
        """Whether all losses since the last `take` were; waits for the device."""
        return self.sums is None or bool(torch.isfinite(self.sums).all())


def count_labels(labels: Tensor) -> Tensor:
    """Labelled tokens that have a token before them, which predicts them."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def count_hidden(inputs: dict[str, Any]) -> Tensor:
    """Hidden latents, which the image loss is taken of."""
    mask = inputs.get("latent_mask")
    return torch.zeros((), dtype=torch.long) if mask is None else mask.sum()


class MMARTrainer(Trainer):
    r"""
    Trains an `MMARForConditionalGeneration`; see `Trainer` for the arguments.

    The loss of an optimizer step is the mean over all its labelled tokens plus the mean over all its hidden latents
    (Eq. 4), over all micro-batches and ranks: how a step is cut into them changes nothing. With `TrainingSamples` the
    samples and all random numbers are functions of the seed, so that a resumed training is the unbroken one.

    Logs, beside `loss`: `text_loss` and `image_loss`; `t2i_loss`, `i2t_loss` and `uncond_loss` by task; the image loss
    by interval of timesteps, `image_loss_t000_099` and so on; `samples_per_second`; `skipped_rows`, rows so far that
    could not be used. Keeps an EMA of the trained weights, saved and resumed with each checkpoint, which evaluations
    use and `ema_weights()` applies. Freezes what the paper freezes. Checkpoints are whole or not there
    (checkpoints.py).

    A model with peft's adapters on top is trained as they say, and its checkpoints hold the adapters.
    """

    # `compute_loss` takes the mean over the whole step.
    loss_is_scaled_for_ga = True

    def __init__(self, model: nn.Module, args: MMARTrainingArguments, **kwargs):
        if not isinstance(args, MMARTrainingArguments):
            raise ValueError(f"`args` must be MMARTrainingArguments; got {type(args).__name__}.")
        if not hasattr(model, "freeze"):
            raise ValueError(f"`model` must be an MMARForConditionalGeneration; got {type(model).__name__}.")
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` must not be given: evaluations sum losses and keep no logits, which would not fit. "
                    "Measure answers and drawings in a callback's `on_evaluate`."
                )
        # A user's LoRA on top trains what peft says.
        is_adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        if is_adapted and args.train_backbone:
            raise ValueError("`train_backbone` must be false for a model with peft's adapters; they are what learns.")
        if args.train_backbone and model.config.frozen_weights == "reference":
            raise ValueError(
                "`train_backbone` needs a model that holds its backbone; this one keeps it by reference. Save it with "
                "`frozen='include'` and train that."
            )
        if not is_adapted:
            model.freeze(train_backbone=args.train_backbone)
        self._scales = learning_rate_scales(model, args.learning_rate_scales or {})
        if args.shard != "none":
            shard_model(model, args.device, shard_frozen=args.shard == "all", dtype=autocast_dtype(args))
        # transformers does not resume sharded models; we do.
        save_only_model = args.save_only_model
        args.save_only_model = save_only_model or is_sharded(model)
        super().__init__(model=model, args=args, **kwargs)
        args.save_only_model = save_only_model
        if args.ema_decay > 0 and self.is_deepspeed_enabled:
            raise ValueError(
                f"`ema_decay` must be 0 with DeepSpeed, whose partitioned weights the average cannot follow; got "
                f"{args.ema_decay}. Shard with FSDP2, or set `ema_decay=0`."
            )
        if args.compile_layers:
            for module in model.modules():
                if type(module).__name__.removeprefix("FSDP") in MMARPreTrainedModel._no_split_modules:
                    module.compile(dynamic=True)
        self._pipeline = None
        if isinstance(self.processing_class, MMARProcessor):
            plain = model.get_base_model() if is_adapted else model
            self._pipeline = MMARPipeline(plain, self.processing_class, plain.default_scheduler())
        self._is_adapted = is_adapted
        if isinstance(self.data_collator, MMARDataCollator):
            self.data_collator.for_trainer = True
        num_train_timesteps = model.config.diffusion_config.num_train_timesteps
        self._sums, self._eval_sums = LossSums(num_train_timesteps), LossSums(num_train_timesteps)
        self._num_skipped = self._num_done_steps = 0
        self._positions: dict[int, Any] = {}
        self._grad_norm: Tensor | float | None = None
        self._last_worker = -1
        self._is_saving = False
        self._uploading: str | None = None
        self._last_log = (time.monotonic(), 0)
        self.ema = EMA(model, args.ema_decay) if args.ema_decay > 0 else None
        if self.ema is not None:
            self.add_callback(_UpdateEMA(self))
        if not args.disable_tqdm and self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Progress)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self._is_fsdp2_of_accelerate:
            # accelerate's own policy casts latents and losses to bfloat16, and reduces gradients in it.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = mixed_precision(autocast_dtype(self.args))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        dtype = autocast_dtype(self.args)
        if dtype is None or not self._is_fsdp2_of_accelerate:
            return super().autocast_smart_context_manager(cache_enabled)
        # accelerate has none around FSDP2, whose inputs it casts instead.
        return torch.autocast(self.args.device.type, dtype, cache_enabled=cache_enabled)

    @property
    def _is_fsdp2_of_accelerate(self) -> bool:
        return self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 2

    @property
    def plain_model(self) -> nn.Module:
        """The model without the wrappers of DDP and the like."""
        return self.accelerator.unwrap_model(self.model)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the context the model holds the EMA weights, if there is an EMA."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied_to(self.plain_model):
                yield

    # ---------------------------------------------------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, StreamedSamples):
            return super().get_train_dataloader()
        self.train_dataset.batch_size = self._train_batch_size
        # Each rank has rows of its own already.
        return _StreamLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=partial(_collate_stream, self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and not self.args.use_cpu,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, TrainingSamples):
            return super()._get_train_sampler(train_dataset)
        step_size = self.get_total_train_batch_size(self.args)
        return StepSampler(dataset, step_size, self.args.sort_by_length, self._num_done_steps * step_size)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        r"""
        Trains; see `Trainer.train`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): Folder of a checkpoint, or True for the last whole
                one in `output_dir`.
            **kwargs: Those of `Trainer.train`.

        Raises:
            ValueError: If there is no such checkpoint, it is not whole or cannot be resumed, another training runs in
                `output_dir`, or a loss, the gradient's norm or a weight that is to be saved is NaN or infinite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"expected a whole checkpoint in {shorten(self.args.output_dir)} to resume from; there is none. "
                    "Train without `resume_from_checkpoint`."
                )
        if resume_from_checkpoint and (wrong := fault(resume_from_checkpoint)) is not None:
            raise ValueError(
                f"expected a whole checkpoint to resume from at {shorten(str(resume_from_checkpoint))}; {wrong}. "
                "Check the path, or resume from another one."
            )
        # The sampler is made before transformers reads the checkpoint's state.
        self._num_done_steps = num_steps(resume_from_checkpoint) if resume_from_checkpoint else 0
        if resume_from_checkpoint and isinstance(self.train_dataset, StreamedSamples):
            self._resume_streams(Path(resume_from_checkpoint))
        self._last_log = (time.monotonic(), None)
        with claimed(self.args.output_dir, self.args.should_save):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _resume_streams(self, checkpoint: Path) -> None:
        path = checkpoint / POSITIONS_FILE.format(rank=self.args.process_index)
        other = checkpoint / POSITIONS_FILE.format(rank=self.args.world_size)
        if not path.is_file() or other.is_file():
            raise ValueError(
                f"expected the places in the streams of {self.args.world_size} ranks in {shorten(str(checkpoint))}; "
                "they are not there. Resume with as many ranks as before, or start anew with `resume=false`."
            )
        positions = json.loads(path.read_text(encoding="utf-8"))
        self._last_worker = positions.pop(LAST_WORKER, -1)
        self._positions = {int(worker): position for worker, position in positions.items()}
        self.train_dataset.positions = dict(self._positions)
        self.train_dataset.last_worker = self._last_worker
        # The streams go on from there by themselves.
        self.args.ignore_data_skip = True

    # ---------------------------------------------------------------------------------------------------------- loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Labelled tokens and hidden latents of an optimizer step, over its micro-batches and all ranks: `(2,)`."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        counts = torch.zeros(2, dtype=torch.long)
        for batch in batch_samples:
            counts += torch.stack([count_labels(batch["labels"]).cpu(), count_hidden(batch).cpu()])
        return self.accelerator.reduce(counts.to(device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        seeds, picture_tasks = inputs.pop("seeds", None), inputs.pop("picture_tasks", None)
        skipped, position = inputs.pop("skipped", None), inputs.pop("position", None)
        if seeds is not None:
            own_generators = generators(seeds.tolist(), inputs["input_ids"].device)
            if "latent_distributions" in inputs:
                inputs["latents"] = sample_latents(inputs.pop("latent_distributions"), own_generators)
            inputs["generator"] = own_generators or None
        weights = (self.args.text_loss_weight, self.args.image_loss_weight)
        if model.training:
            self._note_skipped(skipped or ())
            if position is not None:
                self._last_worker, self._positions[position[0]] = position[0], position[1]
            if num_items_in_batch is not None:
                own = torch.stack([count_labels(inputs["labels"]), count_hidden(inputs).to(num_items_in_batch)])
                # Ranks' gradients are averaged, so that their sum needs the factor.
                shares = own * self.args.world_size / num_items_in_batch.clamp(min=1)
                weights = tuple(weight * share for weight, share in zip(weights, shares, strict=True))
        else:
            inputs["logits_to_keep"] = 1
        outputs = model(**inputs, loss_weights=weights, return_dict=True)
        sums = self._sums if model.training else self._eval_sums
        sums.add(outputs, inputs, picture_tasks)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _note_skipped(self, skipped: list[tuple[str, Any, str]]) -> None:
        """Tells of rows that could not be used, in the log and in a file."""
        if not skipped:
            return
        lines = [json.dumps({"source": name, "row": row, "reason": reason}) for name, row, reason in skipped]
        for line in lines[: max(0, NUM_TOLD_ROWS - self._num_skipped)]:
            logger.warning("a row could not be used and was replaced by another: %s", line)
        self._num_skipped += len(skipped)
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        # One write each, so that ranks do not cut into each other's lines.
        with open(Path(self.args.output_dir) / SKIPPED_FILE, "a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            self._check_finite()
            logs = {**logs, **self._sums.take(self.accelerator.reduce, self.args.device), **self._speed()}
            skipped = torch.tensor(self._num_skipped, device=self.args.device)
            logs["skipped_rows"] = int(self.accelerator.reduce(skipped, "sum"))
        super().log(logs, *args, **kwargs)

    def _speed(self) -> dict[str, float]:
        (then, step), now = self._last_log, time.monotonic()
        self._last_log = (now, self.state.global_step)
        if step is None or now <= then:
            return {}  # the first interval has the compilation and the skipping of a resumed training in it
        num_samples = (self.state.global_step - step) * self.get_total_train_batch_size(self.args)
        return {"samples_per_second": round(num_samples / (now - then), 2)}

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def _check_finite(self) -> None:
        """Raises a `ValueError` if a loss since the last log, or the gradient's norm, was NaN or infinite."""
        # float16's scaler skips such a step.
        is_used = self._grad_norm is not None and not self.accelerator.optimizer_step_was_skipped
        if not self._sums.is_finite():
            what = "losses"
        elif is_used and not bool(torch.isfinite(torch.as_tensor(self._grad_norm))):
            what = "norms of the gradient"
        else:
            return
        raise ValueError(f"expected finite {what}; got NaN or infinity {self._what_to_do}")

    def _check_weights(self) -> None:
        """Raises a `ValueError` if a weight, its average or the optimizer's state is NaN or infinite."""
        weights = dict(self.plain_model.named_parameters())
        states = {} if self.optimizer is None else self.optimizer.state
        named = [(name, value.detach()) for name, value in weights.items()]
        named += [(f"the average of {name}", value) for name, value in (self.ema.shadow if self.ema else {}).items()]
        named += [
            # An infinite moment would keep the weight where it is, for ever.
            (f"the optimizer's {key} of {name}", value)
            for name, weight in weights.items()
            for key, value in states.get(weight, {}).items()
            if isinstance(value, Tensor)
        ]
        check_weights(((name, local_part(value)) for name, value in named), f"That came {self._what_to_do}")

    @property
    def _what_to_do(self) -> str:
        return (
            f"before step {self.state.global_step}. Lower `learning_rate`, or look for broken rows; the checkpoints "
            "before it are good."
        )

    # ----------------------------------------------------------------------------------------------------- optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """No weight decay on norms, biases and embeddings."""
        names = super().get_decay_parameter_names(model)
        return [
            name for name in names if not name.endswith(("mask_token", "position_embedding", "embed_tokens.weight"))
        ]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None or not self._scales:
            return super().create_optimizer(model)
        own_model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(own_model))
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in own_model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self._scales.get(name, 1.0), name in decayed), []).append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, own_model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate * scale,
                    "weight_decay": self.args.weight_decay if has_decay else 0.0,
                }
                for (scale, has_decay), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new:
            apply_learning_rate_phases(scheduler, self.args.learning_rate_phases, num_training_steps)
        return scheduler

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.ema_weights():
            metrics = super().evaluate(*args, **kwargs)
            if self.args.num_eval_pictures > 0:
                self._show_samples()
        return metrics

    def predict(self, *args, **kwargs) -> PredictionOutput:
        with self.ema_weights():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_sums.take(self.accelerator.reduce, self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_sums.take(self.accelerator.reduce, self.args.device)
        weights = {"text_loss": self.args.text_loss_weight, "image_loss": self.args.image_loss_weight}
        # Of all tokens, and not of micro-batches that have more or fewer of them.
        means["loss"] = sum(weight * means[name] for name, weight in weights.items() if name in means)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _show_samples(self) -> None:
        """Draws captions of the evaluation rows and describes their pictures; see `num_eval_pictures`."""
        dataset = self.eval_dataset
        if not isinstance(dataset, TrainingSamples) or self._pipeline is None:
            logger.warning(
                "`num_eval_pictures` needs TrainingSamples as `eval_dataset` and an MMARProcessor as "
                "`processing_class`; nothing is drawn."
            )
            return
        if not self.args.should_save or is_sharded(self.model) or self.is_fsdp_enabled:
            return
        shown = eval_rows(dataset, self.args.num_eval_pictures)
        if not shown:
            return
        model, was_training = self.plain_model, self.model.training
        model.eval()
        generators = [torch.Generator().manual_seed(self.args.seed + i) for i in range(len(shown))]
        captions = [caption for caption, _ in shown]
        self._pipeline.set_progress_bar_config(disable=True)
        drawn = self._pipeline(captions, generator=generators).images
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": CAPTION_QUESTION}]}]
            for _, p in shown
        ]
        inputs = self.processing_class.apply_chat_template(
            chats, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        ).to(model.device)
        answers = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        described = [text.strip() for text in self.processing_class.batch_decode(answers, skip_special_tokens=True)]
        model.train(was_training)
        self._write_samples(captions, drawn, [picture for _, picture in shown], described)

    def _write_samples(
        self, captions: list[str], drawn: list[Image.Image], shown: list[Image.Image], described: list[str]
    ) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir) / "samples" / f"step-{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i, (caption, picture, original, answer) in enumerate(zip(captions, drawn, shown, described, strict=True)):
            picture.save(folder / f"{i:03d}_drawn.png")
            original.save(folder / f"{i:03d}_shown.png")
            lines.append(json.dumps({"number": i, "caption": caption, "description": answer}))
        (folder / "texts.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for i, (caption, picture, answer) in enumerate(zip(captions, drawn, described, strict=True)):
                    callback.tb_writer.add_image(f"samples/{i:03d}", np.asarray(picture), step, dataformats="HWC")
                    callback.tb_writer.add_text(f"samples/{i:03d}", f"{caption} / described: {answer}", step)
            elif isinstance(callback, WandbCallback) and callback._wandb is not None:
                pictures = [callback._wandb.Image(p, caption=c) for p, c in zip(drawn, captions, strict=True)]
                callback._wandb.log({"samples": pictures, "train/global_step": step})

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(saving_folder(folder)) if self._is_saving else folder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._check_finite()
        self._check_weights()
        if output_dir is None or Path(output_dir) == Path(self.args.output_dir):
            # An upload reads the files that this writes.
            self._finish_current_push()
        if state_dict is None and is_sharded(self.model):
            state_dict = whole_state(self.model)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            apply_umask(output_dir if output_dir is not None else self.args.output_dir)  # adapters
        if self.args.should_save and self._pipeline is not None and not self._is_adapted:
            # So that a checkpoint opens through every door.
            self._pipeline.save_index(output_dir if output_dir is not None else self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model) or self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.model, self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        self._check_weights()
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written = saving_folder(run_dir) / name
        if self.args.should_save:
            # Left by a training that was killed while it saved.
            shutil.rmtree(saving_folder(run_dir), ignore_errors=True)
            written.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            if self.ema is not None:
                self.ema.save(written, self.plain_model, self.args.should_save)
            if self._positions:
                path = written / POSITIONS_FILE.format(rank=self.args.process_index)
                positions = {**self._positions, LAST_WORKER: self._last_worker}
                path.write_text(json.dumps(positions), encoding="utf-8")
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        # Every rank loads the best checkpoint at the end, from where it stays.
        if (best := self.state.best_global_step) and self.args.save_strategy != SaveStrategy.NO:
            best_folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}"
            if best_folder.is_dir() or best == self.state.global_step:
                self.state.best_model_checkpoint = str(best_folder)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            finish(written, run_dir / name)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(run_dir / name))
            self._rotate(run_dir)
        self.accelerator.wait_for_everyone()

    def _rotate(self, run_dir: str | Path) -> None:
        kept = [self.state.best_model_checkpoint, self._uploading if self._is_uploading() else None]
        rotate(run_dir, self.args.save_total_limit, [folder for folder in kept if folder is not None])

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float):
        if self._uploading is not None:
            # transformers removes checkpoints here before it waits for their uploads.
            self._finish_current_push()
            # It may have stayed beyond the limit.
            self._rotate(self._get_output_dir(trial))
        return super()._finalize_training(trial, num_train_samples, start_time)

    def load_checkpoint(self, folder: str) -> None:
        """Loads the weights of a checkpoint and their EMA, to evaluate or save them; `train` resumes a training."""
        self._load_from_checkpoint(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_sharded(self.model) and not self.is_fsdp_enabled:
            load_sharded(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint, self.plain_model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if is_sharded(self.model) and not self.is_fsdp_enabled:
            load_sharded(self.model, best)
        else:
            super()._load_best_model()
        # The metric was that of the averaged weights.
        if self.ema is not None:
            self.ema.load(best, self.plain_model)

    # ------------------------------------------------------------------------------------------------------- uploads

    def _is_uploading(self) -> bool:
        push = getattr(self, "push_in_progress", None)
        return push is not None and not push.is_done()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run beside the training: of a folder that keeps its name.
        if self._is_saving or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if Path(checkpoint_folder).parent != Path(self.args.output_dir):
            # Of a trial of a search: an upload would take the checkpoints of all along, half-written ones too.
            return
        if self._is_uploading() and not self.args.hub_always_push:
            return
        # What follows writes the files that an upload reads.
        self._finish_current_push()
        if self._pipeline is not None and not self._is_adapted:
            # transformers adds weights, configs and processor.
            self._pipeline.model.save_code(self.args.output_dir)
            self._pipeline.save_index(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            self._uploading = checkpoint_folder
        for job in self.push_in_progress.jobs:
            job.add_done_callback(self._warn_of_a_failed_push)

    def _warn_of_a_failed_push(self, job: Future) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            reason = error if error.__cause__ is None else f"{error} ({error.__cause__})"
            logger.warning(
                "a push to %s failed: %s. The checkpoints in %s are whole; the next push, or `push_to_hub()`, uploads "
                "the model of that time.",
                self.hub_model_id,
                reason,
                self.args.output_dir,
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = Path(checkpoint) / OPTIMIZER_NAME
        if not path.is_file():
            raise ValueError(
                f"expected {OPTIMIZER_NAME} in {shorten(str(checkpoint))} to resume from it; it is not there. A "
                "checkpoint of `save_only_model=true` can be the `model` of a new training, but not be resumed."
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        load_optimizer_state(self.model, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """That of the mixed precision that a training asks for."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)


def learning_rate_factor(phases: list[float], step: int, num_training_steps: int) -> float:
    r"""
    Args:
        phases (`list[float]`): Factors of the learning rate, each for an equal part of the steps.
        step (`int`): Of the optimizer, from 0.
        num_training_steps (`int`): How many there are.

    Returns:
        `float`: The factor of that step.
    """
    return phases[min(step * len(phases) // num_training_steps, len(phases) - 1)]


def apply_learning_rate_phases(scheduler: LRScheduler, phases: list[float], num_training_steps: int) -> None:
    r"""
    Multiplies a schedule by `MMARTrainingArguments.learning_rate_phases`: 7B's second stage halves its rate midway
    (Sec. 4.2), for which transformers has no schedule.

    Args:
        scheduler (`LRScheduler`): As `Trainer.create_scheduler` makes it; changed in place, before its first step.
        phases (`list[float]`): The factors.
        num_training_steps (`int`): Steps of the whole training.

    Raises:
        ValueError: If the schedule is no function of the step.
    """
    if phases == [1.0]:
        return
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            "`learning_rate_phases` need an `lr_scheduler_type` that is a function of the step; got a "
            f"{type(scheduler).__name__}. Choose constant_with_warmup, or drop them."
        )

    def in_phases(schedule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: schedule(step) * learning_rate_factor(phases, step, num_training_steps)

    scheduler.lr_lambdas = [in_phases(schedule) for schedule in scheduler.lr_lambdas]


def learning_rate_scales(model: nn.Module, scales: dict[str, float]) -> dict[str, float]:
    r"""
    Factors of the learning rate by parameter; freezes those whose factor is 0.

    Args:
        model (`nn.Module`): Frozen as it will be trained.
        scales (`dict[str, float]`): Factors by the beginning of names.

    Returns:
        `dict[str, float]`: Of the trained parameters that have one.

    Raises:
        ValueError: If no trained parameter has a beginning.
    """
    found, unused = {}, set(scales)
    for name, parameter in model.named_parameters():
        prefix = max((prefix for prefix in scales if name.startswith(prefix)), key=len, default=None)
        if prefix is None or not parameter.requires_grad:
            continue
        unused.discard(prefix)
        found[name] = scales[prefix]
        parameter.requires_grad_(scales[prefix] > 0)
    if unused:
        raise ValueError(
            f"`learning_rate_scales` must name trained parameters; none begins with {', '.join(sorted(unused))}. "
            "Names are those of `model.named_parameters()`, such as 'diffusion_mlp'."
        )
    return found


def eval_rows(dataset: TrainingSamples, count: int) -> list[tuple[str, Image.Image]]:
    """First captions and pictures of the first rows that have both."""
    shown = []
    for source in dataset.sources:
        for index in range(len(source)):
            if len(shown) == count:
                return shown
            with contextlib.suppress(BadRow):
                row = source.rows[index]
                if row.get("captions") and row.get("image") is not None:
                    shown.append((row["captions"][0], open_pictures(row)[0]))
    return shown
