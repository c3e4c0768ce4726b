from pathlib import Path

import pytest
import torch
from helpers import seeded, tiny_model
from squares import make_processor, make_rows
from transformers import Trainer, TrainingArguments

from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from mmar.pipelines.pipeline_mmar import MMARPipeline
from mmar.training.data import MMARDataCollator, MMARLatentDataset
from mmar.training.train import parse
from mmar.training.trainer import EMA, MMARTrainer, MMARTrainingArguments


RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "mmar_tiny.yaml"


@pytest.fixture
def processor():
    return make_processor()


def make_model(processor):
    return tiny_model(text_config={"vocab_size": len(processor.tokenizer)}, image_token_id=processor.image_token_id)


def make_trainer(folder, processor, model=None, max_steps=6, **options):
    model = make_model(processor) if model is None else model
    args = MMARTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"ema_decay": 0.5, "save_strategy": "no", **options},
    )
    dataset = MMARLatentDataset(make_rows(), model, processor)
    collator = MMARDataCollator(processor, model.config.num_latents, (0.5, 0.5, 0.0))
    return MMARTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=collator, processing_class=processor
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_frozen_parts_stay(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, max_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_training_lowers_both_losses(tmp_path, processor):
    torch.manual_seed(0)
    config = make_model(processor).config
    trainer = make_trainer(tmp_path, processor, MMARForConditionalGeneration(config), 100, train_backbone=True)
    trainer.train_dataset.latents["picture"][
        :, :, 1
    ].zero_()  # an untrained VAE's posterior is mostly noise, which nothing can predict
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
    assert losses(compiled) == pytest.approx(losses(expected), rel=1e-3)
    assert compiled.model.state_dict().keys() == expected.model.state_dict().keys()


def test_resumed_training_equals_unbroken_training(tmp_path, processor):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", processor, **options)
    whole.train()
    part = make_trainer(tmp_path / "whole", processor, **options)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    # The same batches, noise and weights: bit for bit.
    assert losses(part) == losses(whole)
    for name, value in whole.ema.shadow.items():
        assert torch.equal(part.ema.shadow[name], value), name


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
    trainer = Trainer(ours.model, args, data_collator=ours.data_collator, train_dataset=ours.train_dataset)
    trainer.train()
    assert len(losses(trainer)) == 3 and all(0 < loss < 20 for loss in losses(trainer))


def test_recipe_parses_and_overrides_win(tmp_path):
    overrides = [
        "model=m",
        "data=d",
        f"output_dir={tmp_path}",
        "max_steps=7",
        "task_weights=[1, 0, 0]",
        "ema_decay=0.5",
    ]
    data, args = parse([str(RECIPE), *overrides])
    assert (data.model, data.task_weights, args.max_steps, args.ema_decay) == ("m", [1, 0, 0], 7, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a recipe"),
        ([str(RECIPE), "nonsense"], "key=value"),
        ([str(RECIPE), "model=m", "data=d", "output_dir=o", "no_such=1"], "no_such"),
        ([str(RECIPE), "model=m"], "needs data, output_dir"),
    ],
)
def test_bad_command_lines(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_yaml_values_become_the_types_of_their_fields(tmp_path):
    base = [str(RECIPE), "model=m", "data=d", f"output_dir={tmp_path}"]
    assert parse([*base, "learning_rate=1e-3"])[1].learning_rate == 1e-3  # a string in YAML 1.1
    for override, message in (
        ("max_steps=abc", "`max_steps` must be an integer; got 'abc'"),
        ("swap_rate=null", "`swap_rate` must be a number; got None"),
        ("seed=", "`seed` must be an integer; got None"),
        ("output_dir=null", "the training needs output_dir"),
        ("data=5", "`data` must be a text; got 5"),
        ("swap_rate=[", "expected YAML in 'swap_rate'"),
        ("ema_decay=a", "`ema_decay` must be a number; got 'a'"),
        ("resume='no'", "`resume` must be true or false; got 'no'"),
        ("mask_ratio_min=1.0", r"`mask_ratio_min` must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            parse([*base, override])


def test_a_loss_of_nan_ends_the_training_and_saves_nothing(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, save_strategy="steps", save_steps=1)
    with torch.no_grad():
        trainer.model.diffusion_mlp.output_projection.bias[0] = float("nan")
    with pytest.raises(ValueError, match="expected finite losses; got a image_loss of NaN or infinity before step 1"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_trainer_arguments_of_another_kind(tmp_path, processor):
    with pytest.raises(ValueError, match="`args` must be MMARTrainingArguments; got TrainingArguments"):
        MMARTrainer(make_model(processor), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="`model` must be an MMARForConditionalGeneration; got Linear"):
        MMARTrainer(torch.nn.Linear(1, 1), MMARTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_checkpoint_of_another_model_is_refused(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, max_steps=1)
    trainer.ema.save(tmp_path)
    other = EMA(torch.nn.Linear(2, 2), 0.9)
    with pytest.raises(ValueError, match="trained parameters"):
        other.load(tmp_path)


def test_evaluation_does_not_reach_the_training_log(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, max_steps=1)
    trainer.train()
    dataset = trainer.train_dataset
    trainer.evaluate(dataset)
    assert trainer._mean_losses() == {}


def test_weight_decay_spares_norms_biases_and_embeddings(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    names = trainer.get_decay_parameter_names(trainer.model)
    decayed = {name for name in names if not name.startswith("vae.")}  # frozen, whatever its group
    dimensions = {name: p.ndim for name, p in trainer.model.named_parameters() if not name.startswith("vae.")}
    assert {ndim for name, ndim in dimensions.items() if name in decayed} == {2}
    assert not [name for name in decayed if "embed" in name.split(".")[-1] or "norm" in name or "bias" in name]
    assert "model.language_model.embed_tokens.weight" not in decayed


def test_a_checkpoint_without_ema_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ema_decay=0"):
        EMA(torch.nn.Linear(2, 2), 0.9).load(tmp_path)
