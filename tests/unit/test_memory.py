"""The memory that a config promises is the memory that a run takes."""

import pytest
import torch
from commands import mmar
from helpers import IMAGE, random_latents, random_text, tiny_config, tiny_model
from transformers import DynamicCache

from mmar.ablations.modeling_transfusion_mmar import MMARTransfusionConfig
from mmar.ablations.modeling_vq_mmar import MMARVQConfig
from mmar.evaluation.memory import (
    AllocatedMemory,
    cache_bytes,
    inference_memory,
    make_gradients,
    meta_model,
    peak_of,
    training_memory,
    training_step,
    weights_bytes,
)
from mmar.modeling_mmar import prefix_mmar


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_counts_what_is_alive_at_the_same_time(device):
    with AllocatedMemory() as memory:
        first = torch.zeros(1000, device=device)
        second = first + 1  # 8,000 bytes alive
        view = second.view(10, 100)  # no memory of its own
        first.add_(1)
        del first
        third = torch.zeros(500, device=device)  # 6,000
        assert (memory.bytes, memory.peak) == (6000, 8000)
        del second
        assert memory.bytes == 6000  # its view is alive
        del view, third
    assert (memory.bytes, memory.peak) == (0, 8000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_are_those_of_a_real_model(dtype):
    model = tiny_model().to(dtype)
    assert weights_bytes(meta_model(model.config, dtype)) == bytes_of(model.parameters())
    cache = DynamicCache()
    with torch.no_grad():
        model(random_text(2, 11), past_key_values=cache, use_cache=True)
    kept = bytes_of(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(model.config, 11, 2, dtype) == kept


def labelled_pictures(model, batch, text_length):
    """Rows of a labelled text and a hidden picture."""
    num_latents = model.config.num_latents
    marks = torch.full((batch, num_latents), IMAGE)
    ids = torch.cat([random_text(batch, text_length), marks], dim=1)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == IMAGE, -100),
        "latents": random_latents(model, batch),
        "latent_mask": torch.ones(batch, num_latents, dtype=torch.bool),
    }


def test_optimizer_gradients_and_average_are_those_of_a_real_step():
    model = tiny_model().train()
    memory = training_memory(model.config, dtype=torch.float32)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**labelled_pictures(model, 1, 8)).loss.backward()
    optimizer.step()
    assert memory["weights"] == bytes_of(model.parameters())
    assert memory["gradients"] == bytes_of(parameter.grad for parameter in trained)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert memory["optimizer"] == bytes_of(moments)
    assert memory["EMA"] == bytes_of(trained)
    assert memory["autocast"] == 0
    assert training_memory(model.config)["autocast"] == bytes_of(trained) // 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_step(checkpointing, monkeypatch):
    """
    Of the model's own `forward` and `backward`; its EmbeddingViT has nothing to do where all is hidden. Batches of
    mixed tasks have no common prefix, so what that saves is not counted.
    """
    monkeypatch.setattr(prefix_mmar, "MIN_PREFIX_SHARE", 2.0)
    model = tiny_model(text_config={"num_hidden_layers": 6}).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batch, text_length = 4, 40
    inputs = labelled_pictures(model, batch, text_length)
    make_gradients(model)
    peak = peak_of(lambda: model(**inputs).loss.backward())
    expected = training_memory(model.config, batch, text_length, torch.float32, checkpointing)["activations"]
    assert 0.95 * peak < expected < 1.25 * peak


def test_meta_device_counts_as_the_cpu_does():
    model = tiny_model().train()
    on_meta = training_memory(model.config, 4, 40, torch.float32, False)["activations"]
    make_gradients(model)
    peak = peak_of(lambda: training_step(model, 4, 40).backward())
    # The CPU's fused attention keeps no weights; the meta device counts them.
    assert 0.98 * peak < on_meta < 1.2 * peak


def test_checkpointing_saves_and_more_rows_cost():
    config = tiny_config(text_config={"num_hidden_layers": 6})
    few, many = (training_memory(config, batch, gradient_checkpointing=True) for batch in (1, 8))
    without = training_memory(config, 8, gradient_checkpointing=False)
    assert many["activations"] > 4 * few["activations"]
    assert many["activations"] < 0.6 * without["activations"]
    backbone = training_memory(config, 1, train_backbone=True)
    assert backbone["optimizer"] > few["optimizer"] and backbone["weights"] > few["weights"]


def test_inference_needs_what_drawing_needs():
    model = tiny_model()
    memory = inference_memory(model.config, 3, 20, torch.float32)
    assert memory["weights"] == bytes_of(model.parameters())
    assert memory["cache"] == cache_bytes(model.config, 20 + model.config.num_latents, 6, torch.float32)
    latents = random_latents(model, 3)
    with torch.no_grad():
        decoding = peak_of(lambda: model.decode_latents(latents))
    assert memory["activations"] >= 0.9 * decoding


def test_command(capsys):
    mmar("memory", "mmar-tiny", "--batch_size", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| GB | weights | gradients | optimizer | EMA | autocast | activations | cache | together |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| mmar-tiny, inference",
        "| mmar-tiny, training",
        "| mmar-tiny, training without checkpointing",
    ]


@pytest.mark.parametrize("config_class", [MMARVQConfig, MMARTransfusionConfig])
def test_other_systems_have_other_steps(config_class):
    """Their memory is not that of EmbeddingViT and Diffusion MLP."""
    for memory in (inference_memory, training_memory):
        with pytest.raises(ValueError, match=f"{config_class.model_type}"):
            memory(config_class())
