import json
from collections import defaultdict

import datasets
import pytest
import torch
from helpers import seeded
from PIL import Image
from squares import losses as losses_of
from squares import (
    make_processor,
    make_rows,
    make_samples,
    make_squares_model,
    make_trainer,
)
from transformers import Trainer, TrainingArguments

from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from mmar.pipelines.pipeline_mmar import MMARPipeline
from mmar.training.checkpoints import best_checkpoint
from mmar.training.collator import MMARDataCollator
from mmar.training.ema import EMA
from mmar.training.latents import LatentCache, cache_latents
from mmar.training.samples import SampleMaker, StreamedSamples, TrainingSamples
from mmar.training.trainer import MMARTrainer, MMARTrainingArguments


@pytest.fixture
def processor():
    return make_processor()


def test_the_frozen_parts_stay(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, max_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_training_lowers_both_losses(tmp_path, processor):
    torch.manual_seed(0)
    config = make_squares_model(processor).config
    model = MMARForConditionalGeneration(config)
    with torch.no_grad():
        # An untrained VAE's posterior is mostly noise, which nothing can predict: its log-variance channels.
        model.vae.quant_conv.weight[4:] = 0
        model.vae.quant_conv.bias[4:] = -20
    trainer = make_trainer(tmp_path, processor, model, 100, train_backbone=True)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "text_loss" in entry and "image_loss" in entry]
    for name in ("text_loss", "image_loss"):
        first, last = (sum(e[name] for e in part) / len(part) for part in (history[:10], history[-10:]))
        assert last < 0.85 * first, name


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(tmp_path, processor):
    expected = make_trainer(tmp_path, processor)
    expected.train()
    compiled = make_trainer(tmp_path, processor, compile_layers=True)
    compiled.train()
    # Fused operations round otherwise, in float32; six steps of a learning rate of 1e-2 spread that.
    assert losses_of(compiled) == pytest.approx(losses_of(expected), rel=1e-3)
    assert compiled.model.state_dict().keys() == expected.model.state_dict().keys()


def test_resumed_training_equals_unbroken_training(tmp_path, processor):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", processor, **options)
    whole.train()
    part = make_trainer(tmp_path / "whole", processor, **options)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    # The same batches, noise and weights: bit for bit.
    assert losses_of(part) == losses_of(whole)
    for name, value in whole.ema.shadow.items():
        assert torch.equal(part.ema.shadow[name], value), name


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_resumed_streams_equal_unbroken_streams(tmp_path, processor, num_workers):
    """Also after a number of micro-batches that the workers did not share evenly, and with one that has no shard."""

    def rows(shards):
        for shard in shards:
            yield from make_rows()[shard::2]

    def samples():
        stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1]})
        return StreamedSamples([stream], SampleMaker(processor, 16, 0.5), [1.0], [[0.4, 0.4, 0.2]], 0, buffer_size=2)

    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "max_steps": 5}
    options["dataloader_num_workers"] = num_workers
    whole = make_trainer(tmp_path, processor, train_dataset=samples(), **options)
    whole.train()
    for step in (1, 2, 3):
        part = make_trainer(tmp_path / f"from-{step}", processor, train_dataset=samples(), **options)
        part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name, value in whole.ema.shadow.items():
            assert torch.equal(part.ema.shadow[name], value), (step, name)


def test_train_backbone_trains_qwen2(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, train_backbone=True, max_steps=1)
    weight = trainer.model.model.language_model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    trainer.train()
    assert not torch.equal(weight, before)


def test_ema_is_the_moving_average():
    linear = torch.nn.Linear(2, 1, bias=False)
    ema = EMA(linear, decay=0.9)
    start = linear.weight.detach().clone()
    with torch.no_grad():
        linear.weight.add_(1.0)
    ema.update(linear)
    # First step: decay min(0.9, 2 / 11).
    torch.testing.assert_close(ema.shadow["weight"], start + (1 - 2 / 11))
    with ema.applied_to(linear):
        torch.testing.assert_close(linear.weight, start + (1 - 2 / 11))
    assert torch.equal(linear.weight, start + 1.0)


def test_the_average_reaches_its_decay_after_89990_updates():
    model = torch.nn.Linear(1, 1, bias=False).double()
    ema = EMA(model, 0.9999)
    for updates, decay in ((1, 2 / 11), (89_989, 89_990 / 89_999), (89_990, 0.9999), (200_000, 0.9999)):
        ema.num_updates = updates - 1
        with torch.no_grad():
            ema.shadow["weight"].zero_()
            model.weight.fill_(1.0)
        ema.update(model)
        # Float32 tells the last two decays apart, which are a hundred thousandth of 1 - decay from each other.
        assert float(ema.shadow["weight"]) == pytest.approx(1 - decay, rel=2e-6)


def test_saved_model_holds_the_ema_within_the_context(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    trainer.train()
    with trainer.ema_weights():
        trainer.save_model(str(tmp_path / "final"))
    loaded = MMARForConditionalGeneration.from_pretrained(tmp_path / "final")
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in trainer.ema.shadow.items())


def test_a_checkpoint_opens_as_a_pipeline(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    pipe = MMARPipeline.from_pretrained(tmp_path / "checkpoint-1")
    trainer.model.eval()
    expected = MMARPipeline(trainer.model, processor, trainer.model.default_scheduler())
    drawn = [p("red square", generator=seeded(0), output_type="latent").images for p in (pipe, expected)]
    assert torch.equal(*drawn)


def test_a_plain_trainer_trains_with_our_collator(tmp_path, processor):
    ours = make_trainer(tmp_path, processor)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    collator = MMARDataCollator(processor, ours.model.config.num_latents)
    trainer = Trainer(ours.model, args, data_collator=collator, train_dataset=make_rows())
    trainer.train()
    assert len(losses_of(trainer)) == 3 and all(0 < loss < 20 for loss in losses_of(trainer))
    args.remove_unused_columns = True
    for dataset in (make_rows(), make_samples(processor, 4)):
        with pytest.raises(ValueError, match="`remove_unused_columns=False`"):
            Trainer(ours.model, args, data_collator=collator, train_dataset=dataset).train()


def test_a_loss_of_nan_ends_the_training_and_saves_nothing(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, save_strategy="steps", save_steps=1)
    with torch.no_grad():
        trainer.model.diffusion_mlp.output_projection.bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        trainer.train()
    # Nothing that was begun is left either.
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_trainer_arguments_of_another_kind(tmp_path, processor):
    with pytest.raises(ValueError, match="`args`"):
        MMARTrainer(make_squares_model(processor), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="`model`"):
        MMARTrainer(torch.nn.Linear(1, 1), MMARTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_checkpoint_of_another_model_is_refused(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, max_steps=1)
    trainer.ema.save(tmp_path, trainer.model)
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="trained parameters"):
        EMA(linear, 0.9).load(tmp_path, linear)


def test_evaluation_reports_its_own_losses(tmp_path, processor):
    held_out = make_samples(processor, 10, seed=3)
    trainer = make_trainer(tmp_path, processor, max_steps=2, eval_dataset=held_out, per_device_eval_batch_size=4)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.log({"loss": 0.0})  # nothing of it reaches the training's log
    assert not any(name.endswith("_loss") for name in trainer.state.log_history[-1])
    with trainer.ema_weights():
        text, image = [], []
        trainer.model.eval()
        for number in range(10):
            batch = MMARDataCollator(processor, 16)([held_out[number]])
            seed = [seeded(seed) for seed in held_out[number]["seeds"]]
            outputs = trainer.model(**batch, generator=seed)
            if outputs.text_loss is not None:
                text += [outputs.text_loss.item()] * int((batch["labels"][:, 1:] != -100).sum())
            if outputs.token_losses is not None:
                image += outputs.token_losses.flatten().tolist()
    expected = {"text_loss": sum(text) / len(text), "image_loss": sum(image) / len(image)}
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert metrics["eval_loss"] == pytest.approx(sum(expected.values()), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
    # Of the same weights.
    assert trainer.predict(held_out).metrics["test_image_loss"] == metrics["eval_image_loss"]


def test_metrics_of_logits_are_refused(tmp_path, processor):
    args = MMARTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="`compute_metrics`"):
        MMARTrainer(make_squares_model(processor), args, compute_metrics=lambda prediction: {})


def test_evaluation_draws_and_describes(tmp_path, processor):
    held_out = make_samples(processor, 4, seed=3)
    trainer = make_trainer(tmp_path, processor, max_steps=1, eval_dataset=held_out, num_eval_pictures=3)
    trainer.train()
    trainer.evaluate()
    folder = tmp_path / "samples" / "step-0000001"
    lines = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [row["captions"][0] for row in make_rows()[:3]]
    assert len(list(folder.glob("*_drawn.png"))) == len(list(folder.glob("*_shown.png"))) == 3
    with trainer.ema_weights():
        trainer.model.eval()
        pipe = MMARPipeline(trainer.model, processor, trainer.model.default_scheduler())
        generators = [seeded(trainer.args.seed + i) for i in range(3)]
        drawn = pipe([line["caption"] for line in lines], generator=generators).images
    for i, picture in enumerate(drawn):
        assert picture.tobytes() == Image.open(folder / f"{i:03d}_drawn.png").tobytes()


def test_an_evaluation_that_cannot_draw_says_so(tmp_path, processor, caplog):
    held_out = {"squares": make_samples(processor, 4, seed=3)}
    trainer = make_trainer(tmp_path, processor, max_steps=1, eval_dataset=held_out, num_eval_pictures=1)
    assert "eval_squares_loss" in trainer.evaluate()
    assert "`num_eval_pictures`" in caplog.text
    assert not (tmp_path / "samples").exists()


def test_the_best_checkpoint_is_loaded_with_its_average(tmp_path, processor):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "image_loss"}
    trainer = make_trainer(tmp_path, processor, eval_dataset=make_samples(processor, 6), **options)
    trainer.train()
    measured = {e["step"]: e["eval_image_loss"] for e in trainer.state.log_history if "eval_image_loss" in e}
    best = min(measured, key=measured.get)
    # Some steps after it are worse by a hundredth and more, where processors differ by less than a thousandth.
    assert best < 6 and trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert best_checkpoint(tmp_path / "checkpoint-6") == trainer.state.best_model_checkpoint
    assert best_checkpoint(tmp_path / "checkpoint-1") == str(tmp_path / "checkpoint-1")
    assert trainer.evaluate()["eval_image_loss"] == measured[best]


def test_ranks_that_do_not_save_know_the_best_checkpoint(tmp_path, processor, monkeypatch):
    trainer = make_trainer(tmp_path, processor, save_strategy="steps")
    trainer.create_optimizer_and_scheduler(6)
    monkeypatch.setattr(MMARTrainingArguments, "should_save", property(lambda self: False))
    trainer.state.best_global_step = trainer.state.global_step = 2
    trainer._save_checkpoint(trainer.model, None)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


# How a step is cut


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"sort_by_length": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2},
        {"gradient_checkpointing": True},
    ],
)
def test_how_a_step_is_cut_changes_nothing(tmp_path, processor, options):
    # Where a gradient is hardly more than rounding, AdamW's usual epsilon would make a step of it.
    whole, cut = (make_trainer(tmp_path, processor, adam_epsilon=1e-3, **own) for own in ({}, options))
    for trainer in (whole, cut):
        trainer.train()
    # Sums of float32 in another order, spread by six steps of a learning rate of 1e-2.
    assert losses_of(cut) == pytest.approx(losses_of(whole), rel=1e-4)
    for ours, theirs in zip(cut.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        assert ours.keys() >= theirs.keys() - {"samples_per_second"}
        for name in theirs.keys() - {"samples_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_a_resumed_sorted_training_looks_up_no_length_of_what_is_done(tmp_path, processor, monkeypatch):
    options = {"sort_by_length": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path, processor, **options)
    whole.train()
    resumed, looked_up, length = make_trainer(tmp_path, processor, **options), [], TrainingSamples.length
    monkeypatch.setattr(
        TrainingSamples, "length", lambda self, number: looked_up.append(number) or length(self, number)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert looked_up == list(range(12, 24)) and losses_of(resumed) == losses_of(whole)


def test_losses_by_task_and_timestep_are_means_over_tokens(tmp_path, processor):
    samples = make_samples(processor, 4)
    trainer = make_trainer(tmp_path, processor, max_steps=1, train_dataset=samples)
    collected = defaultdict(list)
    for number in range(4):
        sample = samples[number]
        outputs = trainer.model.train()(
            **MMARDataCollator(processor, 16)([sample]), generator=[seeded(seed) for seed in sample["seeds"]]
        )
        task = ("t2i", "i2t", "uncond")[sample["task"]]
        if outputs.text_loss is not None:
            count = sum(label != -100 for label in sample["labels"])
            for name in ("text_loss", "i2t_loss"):
                collected[name] += [outputs.text_loss.item()] * count
        else:
            for loss, step in zip(outputs.token_losses.flatten(), outputs.timesteps.flatten(), strict=True):
                first = int(step) // 100 * 100
                for name in ("image_loss", f"{task}_loss", f"image_loss_t{first:03d}_{first + 99:03d}"):
                    collected[name].append(loss.item())
    trainer.train()
    logged = trainer.state.log_history[0]
    expected = {name: sum(values) / len(values) for name, values in collected.items()}
    assert {name for name in logged if name.endswith("_loss") or "loss_t" in name} == set(expected)
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-4), name
    assert logged["loss"] == pytest.approx(expected["text_loss"] + expected["image_loss"], rel=1e-4)


def test_cached_latents_give_the_losses_of_the_pictures(tmp_path, processor):
    model, rows = make_squares_model(processor), make_rows()
    cache_latents(rows, model, processor, tmp_path / "latents")
    # Steps so small that Adam, which makes much of rounding, does not lead the two apart.
    pictures = make_trainer(tmp_path, processor, learning_rate=1e-5)
    samples = make_samples(processor, 24)
    samples.sources[0].cache = LatentCache(tmp_path / "latents")
    cached = make_trainer(tmp_path, processor, train_dataset=samples, learning_rate=1e-5)
    for trainer in (pictures, cached):
        trainer.train()
    # The same posterior samples, timesteps and noise; the cache is in half precision.
    assert losses_of(cached) == pytest.approx(losses_of(pictures), rel=5e-4)
    assert "latent_distributions" in cached.data_collator([samples[0]])


def test_loss_weights(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, max_steps=1, text_loss_weight=0.5, image_loss_weight=2.0)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(0.5 * logged["text_loss"] + 2.0 * logged["image_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text_loss_weight", -1, "`text_loss_weight` must be at least 0 and finite; got -1"),
        ("image_loss_weight", "1", "`image_loss_weight` must be at least 0 and finite; got '1'"),
        ("ema_decay", None, r"`ema_decay` must be a number in \[0, 1\); got None"),
        ("num_eval_pictures", 1.5, "`num_eval_pictures` must be an integer of at least 0; got 1.5"),
    ],
)
def test_arguments_of_the_wrong_kind(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        MMARTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_broken_rows_are_counted_and_reported(tmp_path, processor):
    rows = make_rows()
    rows[1]["image"] = b"broken"
    trainer = make_trainer(
        tmp_path, processor, train_dataset=make_samples(processor, 24, rows), dataloader_num_workers=1
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    assert lines and all(line["row"] == 1 and "pictures that can be read" in line["reason"] for line in lines)
    assert trainer.state.log_history[-2]["skipped_rows"] == len(lines)


def test_learning_rates_by_parameter(tmp_path, processor):
    scales = {"diffusion_mlp": 0.0, "diffusion_mlp.output_projection": 2.0}
    trainer = make_trainer(tmp_path, processor, max_steps=1, learning_rate_scales=scales, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.diffusion_mlp.named_parameters()}
    trainer.train()
    parameters = dict(trainer.model.diffusion_mlp.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(parameters[name], value)}
    assert changed == {"output_projection.weight", "output_projection.bias"}
    rates = {(group["initial_lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert rates == {(rate, decay) for rate in (1e-2, 2e-2) for decay in (0.0, 0.1)}
    with pytest.raises(ValueError, match="vae"):
        make_trainer(tmp_path, processor, learning_rate_scales={"vae": 0.5})


def test_a_sharded_training_needs_two_processes(tmp_path, processor):
    with pytest.raises(ValueError, match="`shard`"):
        make_trainer(tmp_path, processor, shard="trained")
    with pytest.raises(ValueError, match="`shard`"):
        make_trainer(tmp_path, processor, shard="some")


def test_weight_decay_spares_norms_biases_and_embeddings(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    names = trainer.get_decay_parameter_names(trainer.model)
    decayed = {name for name in names if not name.startswith("vae.")}  # frozen, whatever its group
    dimensions = {name: p.ndim for name, p in trainer.model.named_parameters() if not name.startswith("vae.")}
    assert {ndim for name, ndim in dimensions.items() if name in decayed} == {2}
    assert not [name for name in decayed if "embed" in name.split(".")[-1] or "norm" in name or "bias" in name]
    assert "model.language_model.embed_tokens.weight" not in decayed


def test_a_checkpoint_without_ema_is_refused(tmp_path):
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ema_decay=0"):
        EMA(linear, 0.9).load(tmp_path, linear)
