"""Models that are larger than memory: other dtypes, maps of devices, offloading, quantized backbones."""

import pytest
import torch
from doors import outputs_of
from helpers import random_latents, random_text, tiny_config
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from mmar import MMARForConditionalGeneration, MMARPipeline
from mmar.conversion.card import count_parameters


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
    got, expected = outputs_of(model, plain.processor), outputs_of(plain.model, plain.processor)
    for name in ("latents", "picture"):
        # Layers on the disk are called as they are; the plain model's run by merged weights, with other roundings.
        torch.testing.assert_close(got.pop(name), expected.pop(name), atol=1e-4, rtol=1e-4)
    assert same(got, expected)
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


def bitsandbytes_config(bits):
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


CONFIGS = {"torchao": torchao_config, "bitsandbytes": bitsandbytes_config}
needs_torchao = pytest.mark.skipif(not is_torchao_available(), reason="needs torchao")
needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
each_method = pytest.mark.parametrize(
    ("method", "bits"),
    [
        pytest.param("torchao", 8, marks=needs_torchao),
        pytest.param("torchao", 4, marks=needs_torchao),
        pytest.param("bitsandbytes", 8, marks=needs_bitsandbytes),
        pytest.param("bitsandbytes", 4, marks=needs_bitsandbytes),
    ],
)


@pytest.fixture
def quantized(folder, method, bits):
    return MMARForConditionalGeneration.from_pretrained(folder, quantization_config=CONFIGS[method](bits))


@each_method
def test_only_the_backbone_is_quantized(folder, quantized, bits):
    plain = MMARForConditionalGeneration.from_pretrained(folder)
    state = dict(plain.named_parameters())
    for name, value in quantized.named_parameters():
        is_linear = name.endswith("_proj.weight") and not not_quantized(name)
        is_plain = value.dtype == state[name].dtype == torch.float32 and type(value) is torch.nn.Parameter
        assert is_plain != is_linear, name
        if not is_linear:
            assert torch.equal(value, state[name]), name
    ids = random_text(2, 7)
    expected = plain(ids).logits
    error = (quantized(ids).logits - expected).std() / expected.std()
    # bitsandbytes quantizes what goes into a linear to 8 bits as well.
    assert 0 < error < {8: 0.05, 4: 0.4}[bits]
    with pytest.raises(ValueError, match="`train_backbone`"):
        quantized.freeze(train_backbone=True)


@each_method
def test_quantized_backbone_draws_answers_and_trains(folder, quantized):
    pipe, model = MMARPipeline.from_pretrained(folder), quantized
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


@needs_bitsandbytes
@pytest.mark.parametrize(("method", "bits"), [("bitsandbytes", 8), ("bitsandbytes", 4)])
def test_a_model_quantized_with_bitsandbytes_is_saved_and_loaded(folder, quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    again = MMARForConditionalGeneration.from_pretrained(tmp_path)
    processor = MMARPipeline.from_pretrained(folder).processor
    assert same(outputs_of(again, processor), outputs_of(quantized, processor))
    with pytest.raises(ValueError, match="quantized"):
        quantized.config.frozen_parts = {"backbone": {"repo_id": "Qwen/Qwen2-0.5B", "revision": "main"}}
        quantized.save_pretrained(tmp_path / "reference", frozen="reference")


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
def test_modules_named_by_the_user_stay_and_nothing_is_dequantized(folder, bits):
    config = bitsandbytes_config(bits)
    config.llm_int8_skip_modules = ["down_proj"]
    model = MMARForConditionalGeneration.from_pretrained(folder, quantization_config=config)
    layer = model.model.language_model.layers[1].mlp
    assert layer.down_proj.weight.dtype == torch.float32 and layer.up_proj.weight.dtype != torch.float32
    assert count_parameters(model) == count_parameters(MMARForConditionalGeneration.from_pretrained(folder))
    with pytest.raises(ValueError, match="quantized"):
        model.dequantize()


@needs_bitsandbytes
def test_other_models_are_quantized_as_ever(folder, tmp_path):
    from transformers import Qwen2ForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    config = tiny_config().text_config
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    kinds = dict(AUTO_QUANTIZER_MAPPING)
    for when in ("before", "after"):
        other = Qwen2ForCausalLM.from_pretrained(tmp_path, quantization_config=bitsandbytes_config(4))
        assert type(other.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit", when
        MMARForConditionalGeneration.from_pretrained(folder, quantization_config=bitsandbytes_config(4))
    assert AUTO_QUANTIZER_MAPPING == kinds


@pytest.mark.parametrize("wrong", ["int8", 5, [], {}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "none"}])
def test_other_quantizations_are_refused(folder, wrong):
    with pytest.raises(ValueError, match="`quantization_config`"):
        MMARForConditionalGeneration.from_pretrained(folder, quantization_config=wrong)
