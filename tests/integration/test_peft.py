"""PLoRA in peft's format, and a user's own LoRA on top of an MMAR."""

import json

import pytest
import torch
from commands import mmar
from helpers import qwen2_of, random_latents, random_text, tiny_model
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from squares import losses, make_processor, make_squares_model, make_trainer

from mmar import MMARForConditionalGeneration
from mmar.conversion.plora_peft import export_plora, import_plora
from mmar.modeling_mmar.plora_mmar import PLoRALinear


IMAGE = 127


def image_inputs(model):
    """A picture between two texts."""
    marks = torch.full((1, model.config.num_latents), IMAGE)
    ids = torch.cat([random_text(1, 5), marks, random_text(1, 4, seed=1)], dim=1)
    return {"input_ids": ids, "latents": random_latents(model, 1)}


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def plora_of(model):
    return {name: value for name, value in model.state_dict().items() if name.endswith(("image_A", "image_B"))}


def test_export_and_import_change_no_number(tmp_path):
    model, other = tiny_model(), tiny_model(seed=1)
    export_plora(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    import_plora(other, tmp_path / "adapter")
    expected = plora_of(model)
    assert len(expected) == 3 * 7 * 2
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected.get(name, before[name])), name
    export_plora(other, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_peft_opens_it_on_qwen2_as_lora_on_all_tokens(tmp_path):
    model = tiny_model()
    export_plora(model, tmp_path / "adapter")
    on_qwen2 = PeftModel.from_pretrained(qwen2_of(model), tmp_path / "adapter").eval()
    # The same weights, all tokens taken for image tokens: layer by layer the same branch.
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, PLoRALinear):
            theirs = on_qwen2.base_model.model.model.get_submodule(name)
            hidden = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(0))
            ours = module(hidden, torch.ones(2, 3, dtype=torch.bool))
            torch.testing.assert_close(theirs(hidden), ours, rtol=1e-5, atol=1e-5)  # another order of products
            assert torch.equal(theirs.lora_A["default"].weight, module.image_A)
            assert torch.equal(theirs.lora_B["default"].weight, module.image_B)


def test_import_takes_what_peft_wrote(tmp_path):
    """An adapter trained by peft on the text model becomes PLoRA."""
    model = tiny_model()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=2, target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(qwen2_of(model), config)
    adapted.save_pretrained(tmp_path / "adapter")
    import_plora(model, tmp_path / "adapter")
    layer = model.model.language_model.layers[1].mlp.down_proj
    theirs = adapted.base_model.model.model.layers[1].mlp.down_proj
    assert torch.equal(layer.image_A, theirs.lora_A["default"].weight)
    assert layer.image_scaling == 0.5 and model.config.plora_alpha == 2.0
    model.save_pretrained(tmp_path / "model")
    again = MMARForConditionalGeneration.from_pretrained(tmp_path / "model")
    inputs = image_inputs(model)
    assert torch.equal(logits(again, **inputs), logits(model, **inputs))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no folder", "adapter_config.json' cannot be read"),
        ("no weights", "adapter_model.safetensors'; they are missing or broken"),
        ("rank", "expected the rank 4.*got 2"),
        ("kind", "adapter of type 'LOHA'"),
        ("dora", "without use_dora"),
        ("missing", "1 are missing .*layers.0.mlp.up_proj.image_A"),
        ("left over", "1 left over .*model.language_model.layers.9"),
        ("alpha", "expected a `lora_alpha` above 0 .*got nan"),
        ("zero alpha", "expected a `lora_alpha` above 0 .*got 0"),
        ("no rank", "expected the rank 4.*got None"),
        ("text", "adapter_config.json' cannot be read .names and values expected"),
        ("targets", "without target_parameters"),
        ("twice", "got 43 tensors for 42 factors, some under two names"),
        ("nan", "up_proj.image_A of finite numbers .*got torch.float32"),
        ("integers", "up_proj.image_A of finite numbers .*got torch.int64"),
        ("shape", r"image_A of shape \(4, 64\); the adapter has \(4, 32\)"),
    ],
)
def test_bad_adapters_change_nothing(tmp_path, case, message):
    model = tiny_model()
    export_plora(model, tmp_path / "adapter")
    before = {name: value.clone() for name, value in plora_of(model).items()}
    settings_file, weights_file = (tmp_path / "adapter" / f"adapter_{n}" for n in ("config.json", "model.safetensors"))
    settings, tensors = json.loads(settings_file.read_text()), load_file(weights_file)
    settings |= {
        "rank": {"r": 2},
        "no rank": {"r": None},
        "kind": {"peft_type": "LOHA"},
        "dora": {"use_dora": True},
        "alpha": {"lora_alpha": float("nan")},
        "zero alpha": {"lora_alpha": 0},
        "targets": {"target_parameters": ["up_proj.weight"]},
    }.get(case, {})
    settings_file.write_text(json.dumps([] if case == "text" else settings))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    if case == "missing":
        del tensors[name]
    elif case == "left over":
        tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()
    elif case == "twice":
        tensors[name.replace("model.layers", "model.language_model.layers")] = tensors[name].clone()
    elif case == "nan":
        tensors[name][0, 0] = float("nan")
    elif case == "integers":
        tensors[name] = torch.ones_like(tensors[name], dtype=torch.long)
    elif case == "shape":
        tensors[name] = torch.zeros(4, 32)
    save_file(tensors, weights_file)
    if case == "no weights":
        weights_file.unlink()
    with pytest.raises(ValueError, match=message):
        import_plora(model, tmp_path / ("nowhere" if case == "no folder" else "adapter"))
    assert all(torch.equal(value, before[name]) for name, value in plora_of(model).items())


def test_commands(tmp_path):
    from conftest import make_pipeline

    make_pipeline().save_pretrained(tmp_path / "model")
    for command in (["export", "model", "adapter"], ["import", "model", "adapter", "again"]):
        mmar("peft", command[0], *(tmp_path / name for name in command[1:]))
    for name in ("model.safetensors", "config.json", "model_index.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


# ------------------------------------------------------------------------------------------ a user's own LoRA


def with_lora(model):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"])
    return get_peft_model(model, config)


def trained(model):
    """A few steps of the user's LoRA; nothing else moves."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    inputs = image_inputs(model.base_model.model)
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_own_lora_trains_saves_loads_merges_and_unloads(tmp_path):
    plain, model = tiny_model(), tiny_model()
    inputs = image_inputs(model)
    expected = logits(plain, **inputs)
    adapted = with_lora(model)
    # B = 0: nothing changes yet, and PLoRA is active.
    assert torch.equal(logits(adapted, **inputs), expected)
    trained(adapted)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    after = logits(adapted, **inputs)
    assert (after - expected).abs().max() > 1e-3
    for name, value in plora_of(plain).items():
        assert torch.equal(value, dict(_without_wrappers(adapted))[name]), name

    adapted.save_pretrained(tmp_path / "own")
    names = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert names and not any("image_" in name for name in names)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "own").eval()
    assert torch.equal(logits(loaded, **inputs), after)

    # PLoRA is active under it: without the image's branch the result is another.
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if name.endswith("image_B"):
                parameter.zero_()
    assert (logits(loaded, **inputs) - after).abs().max() > 1e-3

    merged = PeftModel.from_pretrained(tiny_model(), tmp_path / "own").merge_and_unload().eval()
    assert isinstance(merged, MMARForConditionalGeneration)
    torch.testing.assert_close(logits(merged, **inputs), after, rtol=1e-4, atol=1e-4)  # W + BA in one product
    assert all(torch.equal(value, plora_of(plain)[name]) for name, value in plora_of(merged).items())
    merged.save_pretrained(tmp_path / "merged")
    again = MMARForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, **inputs), logits(merged, **inputs))

    unloaded = adapted.unload().eval()
    assert torch.equal(logits(unloaded, **inputs), expected)
    assert unloaded.state_dict().keys() == plain.state_dict().keys()


def _without_wrappers(adapted):
    for name, value in adapted.state_dict().items():
        yield name.removeprefix("base_model.model.").replace(".base_layer", ""), value


def test_own_lora_generates_text_and_pictures():
    model = tiny_model()
    adapted = trained(with_lora(model))
    inputs = image_inputs(model)
    generated = adapted.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    step = logits(adapted, **inputs)[:, -1].argmax(-1)
    assert int(generated[0, inputs["input_ids"].shape[1]]) == int(step)
    prompt = {"input_ids": random_text(1, 6), "guidance_scale": 1.0, "output_type": "latent"}
    prompt["generator"] = torch.Generator().manual_seed(0)
    drawn = adapted.base_model.model.generate_images(**prompt)
    prompt["generator"] = torch.Generator().manual_seed(0)
    assert (drawn - tiny_model().generate_images(**prompt)).abs().max() > 1e-3


@pytest.mark.parametrize("tuning", [PromptTuningConfig, PrefixTuningConfig])
def test_trained_prompts_stand_before_text_and_images(tuning):
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model(), tuning(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids = torch.cat([image_inputs(adapted)["input_ids"]] * 2)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    generated = adapted.generate(**given, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
    # All again for each token.
    for step in range(4):
        last = logits(adapted, **given)[:, -1].clone()
        last[:, IMAGE] = -torch.inf
        token = last.argmax(-1, keepdim=True)
        assert torch.equal(generated[:, step : step + 1], token)
        given["input_ids"] = torch.cat([given["input_ids"], token], 1)
        given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
    adapted.train()
    adapted(**given, labels=given["input_ids"]).loss.backward()
    trained_weights = [value for value in adapted.parameters() if value.requires_grad]
    assert trained_weights and all(value.grad.abs().sum() > 0 for value in trained_weights)


def test_a_lora_is_trained_saved_and_resumed(tmp_path):
    processor = make_processor()

    def lora_trainer(**options):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "linear_1"], lora_alpha=8)
        model = get_peft_model(make_squares_model(processor), config)
        return make_trainer(tmp_path, processor, model, save_strategy="steps", save_steps=3, **options)

    trainer = lora_trainer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name} and changed == set(trainer.ema.shadow)
    assert sorted(path.name for path in (tmp_path / "checkpoint-3").glob("*.safetensors")) == [
        "adapter_model.safetensors",
        "ema.safetensors",
    ]
    resumed = lora_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(trainer)
    loaded = PeftModel.from_pretrained(make_squares_model(processor), tmp_path / "checkpoint-6")
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())
    with pytest.raises(ValueError, match="`train_backbone`"):
        lora_trainer(train_backbone=True)
