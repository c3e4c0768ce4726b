"""Models that are larger than memory: other dtypes, maps of devices, offloading, quantized backbones."""

import pytest
import torch
from doors import outputs_of
from helpers import random_latents, random_text
from transformers.utils import is_torchao_available

from mmar import MMARForConditionalGeneration, MMARPipeline


def not_quantized(name):
    """Trained, or too sensitive: everything but the weights of Qwen2's linears."""
    return name.endswith(("image_A", "image_B")) or not name.startswith("model.language_model.layers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from conftest import make_pipeline

    path = tmp_path_factory.mktemp("size") / "mmar"
    make_pipeline().save_pretrained(path, max_shard_size="100KB")
    return path


def same(got, expected):
    return got.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_on_one_device_changes_nothing(folder, device_map):
    plain = MMARPipeline.from_pretrained(folder)
    model = MMARForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    assert same(outputs_of(model, plain.processor), outputs_of(plain.model, plain.processor))


@pytest.mark.parametrize(
    "on_disk",
    [
        ["model.language_model.layers.1"],
        ["model.latent_encoder", "diffusion_mlp"],
        ["model.language_model.layers.0", "model.language_model.layers.2", "vae"],
    ],
)
def test_parts_on_disk_give_the_same(folder, tmp_path, on_disk):
    plain = MMARPipeline.from_pretrained(folder)
    modules = ["model.language_model.embed_tokens", "model.language_model.norm", "model.language_model.rotary_emb"]
    modules += [f"model.language_model.layers.{i}" for i in range(3)]
    modules += ["model.latent_encoder", "lm_head", "diffusion_mlp", "vae"]
    device_map = {name: "disk" if name in on_disk else "cpu" for name in modules}
    model = MMARForConditionalGeneration.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert same(outputs_of(model, plain.processor), outputs_of(plain.model, plain.processor))
    model.save_pretrained(tmp_path / "again")
    again = MMARForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert same(again.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_dtype_is_of_all_but_the_vae(folder, dtype):
    model = MMARForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("vae.") else expected), name
    assert torch.isfinite(model(random_text(1, 5), latents=None).logits).all()


# -------------------------------------------------------------------------------------------------- quantization


def torchao_config(bits):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    if bits == 8:
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


needs_torchao = pytest.mark.skipif(not is_torchao_available(), reason="needs torchao")


@needs_torchao
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.03), (4, 0.4)])
def test_only_the_backbone_is_quantized(folder, bits, tolerance):
    plain = MMARForConditionalGeneration.from_pretrained(folder)
    model = MMARForConditionalGeneration.from_pretrained(folder, quantization_config=torchao_config(bits))
    state = plain.state_dict()
    for name, value in model.state_dict().items():
        is_linear = name.endswith("_proj.weight") and not not_quantized(name)
        assert (type(value) is not torch.Tensor) == is_linear, name
        if not is_linear:
            assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    ids = random_text(2, 7)
    expected = plain(ids).logits
    error = (model(ids).logits - expected).std() / expected.std()
    assert 0 < error < tolerance


@needs_torchao
def test_quantized_backbone_draws_answers_and_trains(folder):
    pipe = MMARPipeline.from_pretrained(folder)
    model = MMARForConditionalGeneration.from_pretrained(folder, quantization_config=torchao_config(8))
    outputs = outputs_of(model, pipe.processor)
    assert torch.isfinite(outputs["latents"]).all() and outputs["picture"].std() > 0
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(not_quantized(name) for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    latents = random_latents(model, 1)
    hidden = torch.ones(1, model.config.num_latents, dtype=torch.bool)
    marks = torch.full((1, model.config.num_latents), model.config.image_token_id)
    ids = torch.cat([random_text(1, 5), marks], dim=1)
    loss = model(ids, latents=latents, latent_mask=hidden).loss
    loss.backward()
    optimizer.step()
    moved = [name for name, parameter in trained.items() if not torch.equal(parameter, before[name])]
    assert any(name.endswith("image_B") for name in moved) and any(name.startswith("diffusion_mlp") for name in moved)
