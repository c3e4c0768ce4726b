"""Recipes have the paper's values, say where each is from, and refuse what is none; accelerate reads its configs."""

import dataclasses
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers import tiny_model
from transformers import Trainer, get_scheduler

from mmar.training.recipe import (
    REQUIRED,
    DataArguments,
    SourceArguments,
    accumulation_steps,
    parse,
    read_sources,
)
from mmar.training.trainer import MMARTrainer, MMARTrainingArguments, apply_learning_rate_phases, learning_rate_factor


ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in (ROOT / "training/recipes").glob("mmar_[07]*.yaml")}
# Sec. 4.2 and 3.3.3, suppl. Sec. 6.1: learning rates of equal parts of the training, epochs, epochs of warm-up, batch
# size, lower bound of the mask ratio, tasks.
MIX = [0.5, 0.45, 0.05]
PAPER = {
    "mmar_0_5b_stage1": ([5e-5], 4, 0.5, 2496, 0.7, MIX),
    "mmar_7b_stage1": ([5e-5], 4, 0.5, 1152, 0.7, MIX),
    "mmar_0_5b_stage2": ([5e-5], 3, 0.5, 768, 0.0, MIX),
    "mmar_7b_stage2": ([2e-6, 1e-6], 3, None, 480, 0.0, MIX),
    "mmar_0_5b_stage3": (None, None, None, None, None, [0.9, 0.0, 0.1]),
    "mmar_7b_stage3": (None, None, None, None, None, [0.9, 0.0, 0.1]),
}
# Micro-batches of a step by number of GPUs, as the recipes' comments have them.
MICRO_BATCHES = {
    "mmar_0_5b_stage1": {8: 24, 64: 3, 96: 2},
    "mmar_7b_stage1": {8: 24, 64: 3, 96: 2},
    "mmar_0_5b_stage2": {8: 8, 64: 1},
    "mmar_7b_stage2": {8: 12, 32: 3, 96: 1},
    "mmar_0_5b_stage3": {8: 8, 64: 1},
    "mmar_7b_stage3": {8: 12, 32: 3, 96: 1},
    "mmar_0_5b_sft": {8: 1},
    "mmar_7b_sft": {8: 4, 32: 1},
}


def read(name, tmp_path, *overrides):
    return parse([str(RECIPES[name]), "model=m", "data=d", f"output_dir={tmp_path}", *overrides])


EVERY = sorted(path for folder in ("training", "ablations") for path in (ROOT / folder / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_every_value_of_every_recipe_arrives(path, tmp_path):
    data, args = parse([str(path), "model=m", "data=d", f"output_dir={tmp_path}"])
    for name, value in yaml.safe_load(path.read_text()).items():
        # transformers makes a list of trackers of it.
        expected = [] if (name, value) == ("report_to", "none") else value
        assert getattr(data if hasattr(data, name) else args, name) == expected, name


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_transfusion_like_model_is_trained_as_mmar_on_whole_pictures(stage):
    text = (ROOT / f"ablations/recipes/mmar_0_5b_transfusion_{stage}.yaml").read_text()
    own, mmars = yaml.safe_load(text), yaml.safe_load(RECIPES[f"mmar_0_5b_{stage}"].read_text())
    assert own.pop("mask_ratio_min") == 0.999 and mmars.keys() - own.keys() == {
        "mask_ratio_min",
        "diffusion_batch_mul",
    }
    assert all(mmars[name] == value for name, value in own.items())


def test_there_is_a_recipe_for_each_size_and_stage():
    assert RECIPES.keys() == MICRO_BATCHES.keys()


@pytest.mark.parametrize("name", PAPER)
def test_values_are_the_papers(name, tmp_path):
    data, args = read(name, tmp_path)
    rates, epochs, warmup_epochs, batch_size, mask_ratio_min, task_weights = PAPER[name]
    assert data.task_weights == task_weights
    assert args.bf16 and (args.adam_beta1, args.adam_beta2) == (0.9, 0.95)
    assert args.lr_scheduler_type == "constant_with_warmup" and args.ema_decay == 0.9999
    if rates is None:  # the paper gives stage 3 its tasks only
        return
    assert [args.learning_rate * factor for factor in args.learning_rate_phases] == pytest.approx(rates)
    assert (args.num_train_epochs, data.total_batch_size) == (epochs, batch_size)
    assert data.mask_ratio_min == mask_ratio_min
    steps = 300_000
    if warmup_epochs is not None:
        assert args.get_warmup_steps(steps) / steps * epochs == pytest.approx(warmup_epochs, abs=0.001)


@pytest.mark.parametrize("name", ["mmar_0_5b_sft", "mmar_7b_sft"])
def test_instruction_tuning_is_llavas(name, tmp_path):
    """arXiv 2310.03744, second stage: 1 epoch, learning rate 2e-5 with cosine and warm-up of 3 %, batches of 128."""
    data, args = read(name, tmp_path)
    assert (args.num_train_epochs, args.learning_rate, args.weight_decay) == (1, 2e-5, 0)
    assert (args.lr_scheduler_type, args.warmup_steps, data.total_batch_size) == ("cosine", 0.03, 128)
    assert data.task_weights == [0, 1, 0]


@pytest.mark.parametrize("name", sorted(name for name in PAPER if "stage3" not in name))
def test_the_other_reading_of_the_task_mix_is_one_override(name, tmp_path):
    override = "task_weights=[0.45,0.5,0.05]"
    assert f"{override}." in RECIPES[name].read_text()
    # v1, Sec. 3.3.3: pictures and understanding 1 : 1; of the pictures, text to image and unconditional 9 : 1.
    assert read(name, tmp_path, override)[0].task_weights == pytest.approx([0.5 * 0.9, 0.5, 0.5 * 0.1])


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_is_a_field_with_a_source(name):
    text = RECIPES[name].read_text()
    values = yaml.safe_load(text)
    fields = {f.name for part in (DataArguments, MMARTrainingArguments) for f in dataclasses.fields(part)}
    assert values.keys() <= fields - {*REQUIRED, "latents", "eval_data"}
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == len(values)
    for line in lines:
        assert re.search(r" # (ours\b|Sec\. \d|suppl\. Sec\. \d)", line), line
    # 5e-5 would be read as text.
    assert not any(isinstance(values[key], str) for key in ("learning_rate", "warmup_steps", "weight_decay"))


def test_no_field_is_in_both_classes():
    names = [f.name for part in (DataArguments, MMARTrainingArguments) for f in dataclasses.fields(part)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", r"a recipe may hold model, data, .*; got 'lerning_rate' \(near: learning_rate"),
        ("--max_steps=1", r"got '--max_steps' \(near: max_steps"),
        ("zzz=1", "got 'zzz'. Correct or drop the key"),
        ("total_batch_size=0", "`total_batch_size` must be an integer of at least 1; got 0"),
        ("total_batch_size=1e3", "`total_batch_size` must be an integer"),
        ("shuffle_buffer=0", "`shuffle_buffer` must be an integer of at least 1; got 0"),
        ("num_eval_samples=x", "`num_eval_samples` must be an integer"),
        ("gradient_accumulation_steps=2", "follows from `total_batch_size`.*got both"),
        ("per_device_train_batch_size=0", "`per_device_train_batch_size` must be at least 1; got 0"),
        ("resume_from_checkpoint=a", "goes on from the last whole checkpoint of `output_dir` by itself; got .*'a'"),
        ("eval_data=rows.parquet", "`eval_data` is measured with an `eval_strategy` only; got none"),
        ("num_train_epochs=-1", "`num_train_epochs` must be above 0 where there is no `max_steps`; got -1"),
        ("frozen_dtype=float16", "`frozen_dtype` must be one of float32, bfloat16; got 'float16'"),
        ("bf16=false", "`frozen_dtype` must be float32 without `bf16=true`"),
        ("learning_rate_phases=[]", r"`learning_rate_phases` must be numbers above 0.*got \[\]"),
        ("learning_rate_phases=[0.5, 1.0]", "the first of them 1"),
        ("learning_rate_phases=[1, 0]", "`learning_rate_phases` must be numbers above 0"),
        ("learning_rate_scales=[1]", r"`learning_rate_scales` must give a number for each beginning .*got \[1\]"),
        ("learning_rate_scales=0.5", "`learning_rate_scales` must give a number for each beginning .*got 0.5"),
        ("learning_rate_scales=mlp", "`learning_rate_scales` must give a number for each beginning .*got 'mlp'"),
        ("learning_rate_scales={mlp: true}", "`learning_rate_scales` must be numbers .*got True for 'mlp'"),
        ("task_weights=[1, 1]", "`task_weights` must be three numbers"),
        ("task_weights=[0, 0, 0]", "not all 0"),
        ("task_weights=[1, true, 0]", "`task_weights` must be three numbers"),
        ("task_weights=0.5", "`task_weights` must be three numbers"),
        ("lr_scheduler_type=constnt", "`lr_scheduler_type` must be one of linear, cosine, .*; got 'constnt'"),
        ("optim=adam", "`optim` must be one of adamw_torch, .*; got 'adam'"),
        ("streaming=true", "`max_steps` must be above 0 with `streaming=true`.*epochs"),
        ("latents=5", "`latents` must be a text; got 5"),
        ("streaming=maybe", "`streaming` must be true or false; got 'maybe'"),
        ("data=", "the training needs data"),
    ],
)
def test_what_is_refused(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read("mmar_7b_stage1", tmp_path, override)


@pytest.mark.parametrize(
    "setting", ["latents=folder", "mask_ratio_per_batch=true", "swap_rate=0.5", "sort_by_length=true"]
)
def test_streams_have_no_rows_by_number(setting, tmp_path):
    name = setting.partition("=")[0]
    with pytest.raises(ValueError, match=f"`{name}`"):
        read("mmar_7b_stage1", tmp_path, "streaming=true", "max_steps=10", setting)
    data, args = read("mmar_7b_stage1", tmp_path, "streaming=true", "max_steps=10")
    assert data.streaming and args.max_steps == 10


def test_a_step_of_no_micro_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`gradient_accumulation_steps`"):
        read("mmar_7b_stage1", tmp_path, "total_batch_size=null", "gradient_accumulation_steps=0")


def test_yaml_without_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    rest = ["model=m", "data=d", f"output_dir={tmp_path}"]
    for text, message in (
        ("seed: 1\nbf16: true\nseed: 2\n", "seed"),
        ("- seed\n", "list"),
        ("seed: [\n", "recipe.yaml"),
        ("1: 2\n", "'1'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse([str(path), *rest])
    path.write_bytes(b"seed: \xff\n")
    with pytest.raises(ValueError, match="UTF-8"):
        parse([str(path), *rest])
    path.write_text("")
    assert parse([str(path), *rest])[0].task_weights == [0.5, 0.45, 0.05]
    # `no` is false in YAML 1.1, and a strategy of transformers.
    assert parse([str(path), *rest, "save_strategy=no"])[1].save_strategy == "no"
    # A value given on the command line replaces the recipe's.
    path.write_text("total_batch_size: 6\n")
    data, args = parse([str(path), *rest, "total_batch_size=null", "gradient_accumulation_steps=2"])
    assert (data.total_batch_size, args.gradient_accumulation_steps) == (None, 2)


# Sources


def test_one_source():
    assert read_sources("shards/a-{000..012}.tar", "cache") == [
        SourceArguments(path="shards/a-{000..012}.tar", name="a-{000..012}.tar", latents="cache")
    ]


def test_sources_of_a_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "mix.yaml").write_text(
        "- path: captions/*.parquet\n"
        "  weight: 2.0e+1\n"
        "  columns: {image: jpg, captions: null}\n"
        "  latents: latents/captions\n"
        "- {path: pictures, task_weights: [1, 0, 0], weight: 1e-1}\n"
        "- {path: owner/name, name: hub, split: validation}\n"
        "- {path: ./owner/name, image_folder: pictures}\n"
        "- {path: /data/chats.jsonl, weight: null}\n"
        "- {path: 'hf://datasets/owner/name/a.parquet'}\n"
    )
    sources = read_sources(str(tmp_path / "mix.yaml"))
    assert sources == [
        SourceArguments(
            f"{tmp_path}/captions/*.parquet",
            "*.parquet",
            20.0,
            columns={"image": "jpg", "captions": None},
            latents=f"{tmp_path}/latents/captions",
        ),
        SourceArguments(f"{tmp_path}/pictures", "pictures", 0.1, [1.0, 0.0, 0.0]),
        SourceArguments("owner/name", "hub", split="validation"),
        SourceArguments(f"{tmp_path}/owner/name", "name", image_folder=f"{tmp_path}/pictures"),
        SourceArguments("/data/chats.jsonl", "chats.jsonl"),
        SourceArguments("hf://datasets/owner/name/a.parquet", "a.parquet"),
    ]
    with pytest.raises(ValueError, match="`latents`"):
        read_sources(str(tmp_path / "mix.yaml"), streaming=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: a\n", "expected a list of sources"),
        ("[]", "expected a list of sources"),
        ("- a.parquet\n", "expected a list of sources"),
        ("- {name: a}\n", "source 1 of .* must have a `path`, a text; got None"),
        ("- {path: 5}\n", "source 1 of .* must have a `path`, a text; got 5"),
        ("- {path: a}\n- {path: b, wieght: 2}\n", r"source 2 of .* may hold path, .*got 'wieght' \(near: weight\)"),
        ("- {path: a, weight: 0}\n", "`weight` of the source 'a' must be a number above 0; got 0"),
        ("- {path: a, weight: .inf}\n", "`weight` of the source 'a' must be a number above 0; got inf"),
        ("- {path: a, weight: much}\n", "`weight` must be a number; got 'much'"),
        ("- {path: a, task_weights: [1, 2]}\n", "`task_weights` of the source 'a' must be three numbers"),
        ("- {path: a, columns: jpg}\n", "`columns` of the source 'a' must name a column for each key"),
        ("- {path: a, columns: {image: 3}}\n", "`columns` of the source 'a' must name a column for each key"),
        ("- {path: a, split: 3}\n", "`split` of a source must be a text; got 3"),
        ("- {path: a, latents: 3}\n", "`latents` of a source must be a text; got 3"),
        ("- {path: x/a}\n- {path: y/a}\n", "names of their own; a stands twice .*Add `name`"),
        ("- {path: a, path: b}\n", "given twice: path"),
    ],
)
def test_sources_that_are_refused(text, message, tmp_path):
    file = tmp_path / "mix.yml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sources(str(file))


def test_sources_and_latents_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="`data`"):
        read_sources(str(tmp_path / "none.yaml"))
    (tmp_path / "mix.yaml").write_text("- {path: a}\n- {path: b}\n")
    with pytest.raises(ValueError, match="`latents`"):
        read_sources(str(tmp_path / "mix.yaml"), "cache")


# Batches and learning rates


@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_are_those_of_the_comments(name, tmp_path):
    data, args = read(name, tmp_path)
    counts = MICRO_BATCHES[name]
    for num_gpus, steps in counts.items():
        assert accumulation_steps(data.total_batch_size, args.per_device_train_batch_size, num_gpus) == steps
    comment = re.search(r"per_device_train_batch_size: \d+ # (.*)", RECIPES[name].read_text())[1]
    assert [int(n) for n in re.findall(r"\d+", comment.replace("v1.5", ""))][: 2 * len(counts)] == [
        *counts.values(),
        *counts,
    ]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1152, 12, 64), r"12 x 64 = 768; got 1152. Set .* to one of 1, 2, 3, 6, 9, 18\."),
        ((1152, 6, 512), r"6 x 512 = 3072; got 1152. Start 384 or 576 processes, or set .* to 1024 or 1536\."),
        ((6, 1, 8), r"1 x 8 = 8; got 6. Start 6 processes, or set `total_batch_size` to 8\."),
    ],
)
def test_batches_that_cannot_be_shared(sizes, message):
    with pytest.raises(ValueError, match=message):
        accumulation_steps(*sizes)


def schedule_of(phases, num_steps, warmup, kind="constant_with_warmup"):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_scheduler(kind, optimizer, warmup, num_steps)
    apply_learning_rate_phases(scheduler, phases, num_steps)
    return optimizer, scheduler


def rates(optimizer, scheduler, num_steps):
    seen = []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_learning_rate_phases_multiply_the_schedule():
    assert rates(*schedule_of([1.0, 0.5], 6, 2), 6) == [0.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    assert rates(*schedule_of([1.0], 4, 0), 4) == [2.0] * 4
    assert [learning_rate_factor([1.0, 0.5, 0.1], step, 7) for step in range(8)] == [1, 1, 1, 0.5, 0.5, 0.1, 0.1, 0.1]


def test_learning_rate_phases_after_a_resume():
    optimizer, scheduler = schedule_of([1.0, 0.5], 6, 2)
    rates(optimizer, scheduler, 4)
    resumed_optimizer, resumed = schedule_of([1.0, 0.5], 6, 2)
    resumed.load_state_dict(scheduler.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    assert rates(resumed_optimizer, resumed, 2) == rates(optimizer, scheduler, 2) == [1.0, 1.0]


def test_learning_rate_phases_need_a_function_of_the_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_scheduler("reduce_lr_on_plateau", optimizer)
    with pytest.raises(ValueError, match="constant_with_warmup"):
        apply_learning_rate_phases(scheduler, [1.0, 0.5], 6)


# accelerate

CONFIGS = {path.stem: path for path in (ROOT / "configs/accelerate").glob("*.yaml")}
WRAPPED = {"MMARQwen2DecoderLayer", "MMARViTLayer", "MMARDiffusionBlock"}


def launched(name, *options):
    """The environment that `accelerate launch` gives to the processes of a training."""
    line = [
        "--config_file",
        str(CONFIGS[name]),
        "--main_process_port",
        "0",
        *options,
        "-m",
        "mmar",
        "train",
        "R",
    ]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def test_accelerate_configs_load():
    assert CONFIGS.keys() == {"ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "multi_node"}
    kinds = {name: load_config_from_file(str(path)).distributed_type.value for name, path in CONFIGS.items()}
    assert kinds == {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "multi_node": "FSDP",
        "deepspeed_zero2": "DEEPSPEED",
        "deepspeed_zero3": "DEEPSPEED",
    }
    for name in CONFIGS:
        environment = launched(name, "--machine_rank", "0", "--main_process_ip", "localhost")
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("name", ["fsdp2", "multi_node"])
def test_fsdp2_reaches_the_processes_and_finds_the_layers(name, monkeypatch):
    environment = launched(name, "--machine_rank", "0", "--main_process_ip", "localhost")
    settings = load_config_from_file(str(CONFIGS[name])).fsdp_config
    assert settings == load_config_from_file(str(CONFIGS["fsdp2"])).fsdp_config
    for key, value in settings.items():
        # Keys that accelerate does not know would be lost without a word.
        variable = key.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS")
        assert environment[variable] == (str(value).lower() if isinstance(value, bool) else str(value))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for variable, value in environment.items():
        if variable.startswith(("FSDP_", "PARALLELISM_", "ACCELERATE_USE_PARALLELISM")):
            monkeypatch.setenv(variable, value)
    plugin, model = FullyShardedDataParallelPlugin(), tiny_model()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    plugin.set_auto_wrap_policy(model)
    assert {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]} == WRAPPED
    assert set(type(model)._no_split_modules) == WRAPPED
    ignored = {module for module, _ in model.named_modules() if re.fullmatch(plugin.ignored_modules, module)}
    assert ignored == {"vae", "model.language_model.embed_tokens", "lm_head"}
    assert not any(p.requires_grad for module in ignored for p in model.get_submodule(module).parameters())
    if name == "multi_node":
        assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
        parallelism = ParallelismConfig()
        assert (parallelism.dp_replicate_size, parallelism.dp_shard_size, parallelism.total_size) == (2, 8, 16)


@pytest.mark.parametrize("bf16", [True, False])
def test_fsdp2_of_accelerate_casts_no_latents_and_reduces_gradients_in_float32(tmp_path, monkeypatch, bf16):
    """What the trainer makes of accelerate's plugin, which itself needs a GPU."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.reduce_dtype is torch.bfloat16

    def as_on_gpus(trainer):
        trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", as_on_gpus)
    trainer = MMARTrainer.__new__(MMARTrainer)
    trainer.args = MMARTrainingArguments(output_dir=str(tmp_path), bf16=bf16, report_to="none")
    trainer.create_accelerator_and_postprocess()
    policy = plugin.mixed_precision_policy
    assert (policy.reduce_dtype, policy.output_dtype, policy.cast_forward_inputs) == (torch.float32, None, False)
    assert policy.param_dtype is (torch.bfloat16 if bf16 else None)
    # Inputs stay as they are, so layers need autocast.
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16 if bf16 else torch.float32)
    with trainer.autocast_smart_context_manager():
        assert layer(torch.ones(1, 2)).dtype is layer.weight.dtype


def test_more_machines_are_three_options():
    options = "--num_machines 8 --num_processes 64 --parallelism_config_dp_replicate_size 8 --machine_rank 3"
    environment = launched("multi_node", *options.split(), "--main_process_ip", "localhost")
    assert environment["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "8"
    assert environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_batches_and_clipping_from_the_recipe(stage, monkeypatch):
    for variable, value in launched(f"deepspeed_zero{stage}").items():
        if variable.startswith("ACCELERATE_"):
            monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    config = plugin.deepspeed_config
    assert plugin.zero_stage == config["zero_optimization"]["stage"] == stage
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    assert config["train_micro_batch_size_per_gpu"] == config["train_batch_size"] == "auto"
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["offload_param"]["device"] == "none"
    assert plugin.zero3_save_16bit_model is (stage == 3) and plugin.zero3_init_flag is False


def test_long_values_and_keys_are_shortened(tmp_path):
    long = "k" * 10**5
    for line in (f"{long}: 1", f"learning_rate: {long}", f"task_weights: [{long}]", f"frozen_dtype: {long}", long):
        (tmp_path / "recipe.yaml").write_text(line)
        with pytest.raises(ValueError) as info:
            parse([str(tmp_path / "recipe.yaml"), "model=m", "data=d", "output_dir=o", "use_cpu=true"])
        assert len(str(info.value)) < 10_000, line[:30]
    for entry in (f"{long}: 1", f"path: {{{long}: 1}}", f"path: a\n  columns: {long}", f"path: a\n  weight: {long}"):
        (tmp_path / "mix.yaml").write_text(f"- {entry}")
        with pytest.raises(ValueError) as info:
            read_sources(str(tmp_path / "mix.yaml"))
        assert len(str(info.value)) < 2000, entry[:30]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 40)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "at most 100000 values"),
        (f"- path: a\n  columns: *none\n{BOMB}", "expected YAML"),
        ("- &a [*a]", "at most 100000 values"),
        (MERGES, "at most 100000 values"),
        ("[" * 10**5 + "]" * 10**5, "nested too deep"),
        ("{a: " * 10**4 + "}" * 10**4, "nested too deep"),
        ("- path: 2024-99-99", "expected YAML"),
        ("- path: " + "9" * 10**4, "expected YAML"),
        ("- path: \x00", "expected YAML"),
    ],
    ids=["anchors", "unknown anchor", "itself", "merges", "lists", "dicts", "date", "digits", "control character"],
)
@pytest.mark.parametrize("as_recipe", [True, False])
def test_yaml_that_would_hang_or_break_is_refused_at_once(tmp_path, text, message, as_recipe):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        parse([str(file)]) if as_recipe else read_sources(str(file))
    assert time.monotonic() - start < 30 and len(str(error.value)) < 1000


def test_anchors_are_read(tmp_path):
    file = tmp_path / "sources.yaml"
    file.write_text("- &one {path: a.parquet, columns: {image: jpg}}\n- {<<: *one, path: b.parquet}\n")
    assert [source.columns for source in read_sources(str(file))] == [{"image": "jpg"}] * 2


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("max_grad_norm=.nan", "max_grad_norm"),
        ("learning_rate=.inf", "learning_rate"),
        ("learning_rate=nan", "learning_rate"),
        ("weight_decay=.nan", "weight_decay"),
        ("adam_epsilon=-.inf", "adam_epsilon"),
        ("adam_beta2=.nan", "adam_beta2"),
        ("warmup_steps=.nan", "warmup_steps"),
        ("ema_decay=.nan", "ema_decay"),
        ("image_loss_weight=.nan", "image_loss_weight"),
        ("swap_rate=.nan", "swap_rate"),
        ("mask_ratio_min=.nan", "mask_ratio_min"),
        ("task_weights=[.nan, 1, 1]", "task_weights"),
        ("task_weights=[.inf, 1, 1]", "task_weights"),
        ("learning_rate_phases=[1, .nan]", "learning_rate_phases"),
        ("learning_rate_scales={diffusion_mlp: .nan}", "learning_rate_scales"),
        ("num_train_epochs=.nan", "num_train_epochs"),
        (f"learning_rate={'9' * 400}", "learning_rate"),
        (f"total_batch_size={10**12}", "total_batch_size"),
        (f"num_eval_samples={10**12}", "num_eval_samples"),
    ],
)
def test_settings_that_are_not_finite_or_endless_are_refused(tmp_path, override, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        read("mmar_0_5b_stage1", tmp_path, override)


def test_arguments_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_grad_norm`"):
        MMARTrainingArguments(output_dir=str(tmp_path), max_grad_norm=float("nan"))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"])
@pytest.mark.parametrize("as_recipe", [True, False])
def test_tags_that_name_python_objects_are_refused(tmp_path, tag, as_recipe):
    file = tmp_path / "a.yaml"
    file.write_text(f"- path: {tag} [touch {tmp_path / 'ran'}]\n")
    with pytest.raises(ValueError, match="YAML"):
        parse([str(file)]) if as_recipe else read_sources(str(file))
    assert not (tmp_path / "ran").exists()
