"""What users of transformers expect of every model: outputs, dtypes, attention, and its own `Trainer`."""

import logging

import numpy as np
import pytest
import torch
from helpers import image_marks, random_latents, random_text, seeded, tiny_config, tiny_model
from transformers import AutoModel, AutoProcessor, AutoTokenizer, Trainer, TrainingArguments

from mmar import MMARConfig, MMARForConditionalGeneration, MMARProcessor
from mmar.modeling_mmar.modeling_mmar import MMARModel


CHECKPOINT = "checkpoints/mmar-tiny"


@pytest.fixture(autouse=True)
def root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def log():
    """The warnings that transformers logs."""
    lines = []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler = Lines(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield lines
    logging.getLogger("transformers").removeHandler(handler)


def make_batch(model, rows=2):
    text = random_text(rows, 9)
    input_ids = torch.cat([text[:, :4], image_marks(model, rows), text[:, 4:]], 1)
    labels = torch.where(torch.arange(input_ids.shape[1]) >= 20, input_ids, -100)
    return {"input_ids": input_ids, "labels": labels, "latents": random_latents(model, rows)}


# --------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("is_in_config", [False, True], ids=["argument", "config"])
@torch.no_grad()
def test_outputs_as_tuples(is_in_config):
    model = tiny_model()
    batch = make_batch(model)
    inner = {"input_ids": random_text(2, 6), "output_hidden_states": True}
    expected, expected_inner = model(**batch), model.model(**inner)
    tokens = model.generate(random_text(1, 4), max_new_tokens=3, do_sample=False)
    drawing = {"guidance_scale": 1.0, "num_ar_steps": 2, "num_inference_steps": 2, "generator": seeded(0)}
    image = model.generate_images(random_text(1, 4), **drawing)
    model.config.return_dict = model.config.text_config.return_dict = not is_in_config
    kwargs = {} if is_in_config else {"return_dict": False}
    outputs = model(**batch, **kwargs)
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[0], expected.loss) and torch.equal(outputs[1], expected.logits)
    hidden_states, cache, layers = model.model(**inner, **kwargs)
    assert torch.equal(hidden_states, expected_inner.last_hidden_state) and cache.get_seq_length() == 6
    assert all(torch.equal(*pair) for pair in zip(layers, expected_inner.hidden_states, strict=True))
    # The argument wins.
    assert torch.equal(model(**batch, return_dict=True).logits, expected.logits)
    assert torch.equal(model.model(**inner, return_dict=True).last_hidden_state, hidden_states)
    # Generation reads outputs by name, whatever the config says.
    assert torch.equal(model.generate(random_text(1, 4), max_new_tokens=3, do_sample=False), tokens)
    assert torch.equal(model.generate_images(random_text(1, 4), **drawing | {"generator": seeded(0)}), image)


def test_a_config_of_tuples_is_loaded(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, return_dict=False)
    loss, logits, *_ = model(random_text(1, 6), labels=random_text(1, 6))
    assert loss.ndim == 0 and logits.shape == (1, 6, 128)


# ---------------------------------------------------------------------------------------------------------- Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self, model, number):
        self.batch = make_batch(model, number)

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


def make_trainer(model, folder, **kwargs):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=2, save_steps=1,
        use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows(model, 4), eval_dataset=Rows(model, 4), **kwargs)


def test_the_stock_trainer_predicts_logits(tmp_path):
    model = tiny_model()
    rows, seen = Rows(model, 4), {}

    def compute_metrics(prediction):
        logits, labels = prediction
        seen["shapes"] = logits.shape, labels.shape
        return {"accuracy": (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100].mean()}

    trainer = make_trainer(model, tmp_path, compute_metrics=compute_metrics)
    output = trainer.predict(rows)
    with torch.no_grad():
        expected = model(**rows.batch).logits
    np.testing.assert_allclose(output.predictions, expected, atol=1e-4)
    assert seen["shapes"] == (expected.shape, rows.batch["labels"].shape)
    assert 0 <= output.metrics["test_accuracy"] <= 1
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_resumed_training_misses_no_keys(tmp_path, log):
    make_trainer(tiny_model(), tmp_path).train()
    model = tiny_model(seed=1)
    make_trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not [line for line in log if "missing keys" in line]
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_an_untied_head_is_saved(tmp_path):
    model = tiny_model(text_config={"tie_word_embeddings": False})
    model.save_pretrained(tmp_path)
    assert torch.equal(MMARForConditionalGeneration.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


# ------------------------------------------------------------------------------------------- dtypes, attention, names


def test_sub_configs_keep_their_dtype(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    model = MMARForConditionalGeneration.from_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "again")
    config = MMARConfig.from_pretrained(tmp_path / "again")
    assert {getattr(config, name).dtype for name in config.sub_configs} == {config.dtype} == {torch.bfloat16}
    # And saved once more, it is the same file.
    MMARForConditionalGeneration.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "third")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "third/config.json").read_bytes()
    own = MMARConfig(text_config={"model_type": "qwen2", "vocab_size": 151936, "dtype": "float16"}).to_dict()
    assert MMARConfig(**own).text_config.dtype == torch.float16


def test_only_a_model_with_a_vae_keeps_it_in_float32(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    inner = MMARModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not inner._keep_in_fp32_modules_strict and inner.dtype == torch.bfloat16
    model = MMARForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.vae.dtype == torch.float32 and model.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["all", "inner"])
def test_another_attention_without_warnings(part, log):
    model = tiny_model()
    config = model.config
    changed = model if part == "all" else model.model
    for implementation in ("eager", "sdpa", "eager"):
        changed.set_attn_implementation(implementation)
        parts = [config, *(getattr(config, name) for name in config.sub_configs)]
        assert {own._attn_implementation for own in parts} == {implementation}
    with torch.no_grad():
        attentions = model(random_text(1, 6), output_attentions=True).attentions
    assert len(attentions) == 3 and attentions[0].shape == (1, 4, 6, 6)
    changed.set_attn_implementation({"text_config": "sdpa"})
    assert config.text_config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="Flash Attention 2"):
        changed.set_attn_implementation("flash_attention_2")
    MMARForConditionalGeneration._from_config(tiny_config(), attn_implementation="eager")
    assert not log


def test_what_is_wrong_is_said_once(log):
    """Neither an image's place twice, nor transformers' warning before the error of a long text."""
    processor = MMARProcessor.from_pretrained(CHECKPOINT)
    chat = [{"role": "user", "content": [{"type": "image", "url": "missing.png"}, {"type": "text", "text": "What?"}]}]
    calls = (
        lambda: processor(images=[["missing.png"]], text=["<image>"]),
        lambda: processor.image_processor([["missing.png"]]),
        lambda: processor.image_processor.fetch_images([["missing.png"]]),
        lambda: processor.apply_chat_template([chat], tokenize=True, return_dict=True),
    )
    for call in calls:
        with pytest.raises(ValueError, match="missing.png") as error:
            call()
        assert str(error.value).count("Picture 0 of") == str(error.value).count("missing.png") == 1
    with pytest.raises(ValueError, match="Picture 2 of 3: "):
        processor.image_processor.fetch_images([[np.zeros((8, 8))], [np.zeros((8, 8)), "missing.png"]])
    long = "crab " * 600
    with pytest.raises(ValueError, match="Text 0 .*512"):
        processor(text=long)
    with pytest.raises(ValueError, match="512"):
        processor.generation_inputs([long])
    with pytest.raises(ValueError, match="512"):
        processor.training_example("t2i", long)
    # Not even where nothing is wrong: 40 images are 640 tokens, and 40 positions.
    processor(images=[np.zeros((64, 64, 3), np.uint8)] * 40, text="<image>" * 40)
    assert not log


def test_the_tokenizer_names_the_image_token(tmp_path):
    """With the processor and without, and again after it was saved."""
    tokenizers = [AutoTokenizer.from_pretrained(CHECKPOINT), AutoProcessor.from_pretrained(CHECKPOINT).tokenizer]
    tokenizers.append(MMARProcessor.from_pretrained(CHECKPOINT, image_token="<|im_start|>").tokenizer)
    for tokenizer, name, number in zip(tokenizers, ("<|image|>", "<|image|>", "<|im_start|>"), (3, 3, 1), strict=True):
        assert (tokenizer.image_token, tokenizer.image_token_id) == (name, number)
        tokenizer.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path).image_token == name
