"""The language model on image tokens by merged weights, against its own modules."""

import copy
import gc
import pickle
import platform

import pytest
import torch
from helpers import random_text, seeded, tiny_model
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from mmar.modeling_mmar import fast_generation_mmar
from mmar.modeling_mmar.fast_generation_mmar import (
    FusedPLoRAContext,
    FusedPLoRALayer,
    PackedLinear,
    can_fuse,
    can_pack,
)
from mmar.modeling_mmar.plora_mmar import MMARQwen2MLP, MMARQwen2Model


# float32 sums in another order: states near 10 through three layers.
ATOL = 5e-5


@pytest.fixture
def model():
    return tiny_model()


def embeds_of(model, rows, seed=0):
    return torch.randn(rows, model.config.num_latents, model.config.text_config.hidden_size, generator=seeded(seed))


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "not packed"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 1, 4)], ids=["no padding", "left padding"])
def test_fused_context_is_the_plain_one(attn_implementation, lengths, is_packed, monkeypatch):
    monkeypatch.setattr(fast_generation_mmar, "MIN_PACKED_MULTIPLY_ADDS", 0 if is_packed else 2**40)
    model = tiny_model(attn_implementation=attn_implementation)
    num_latents = model.config.num_latents
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths]).long()
    contexts = [model.text_context(random_text(3, 7), mask, fast) for fast in (False, True)]
    positions = torch.stack([torch.randperm(num_latents, generator=seeded(row))[:5] for row in range(3)])
    for seed in range(2):  # rounds leave nothing behind
        expected, z = (context.condition(embeds_of(model, 3, seed), positions) for context in contexts)
        assert z.shape == (3, 5, 64)
        torch.testing.assert_close(z, expected, atol=ATOL, rtol=ATOL)
    assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("numbers", [(1, 0, 2), (0, 2)], ids=["changed places", "one taken out"])
def test_layers_are_known_by_their_own_numbers(model, numbers):
    language_model, mask = model.model.language_model, torch.ones(1, 7, dtype=torch.long)
    language_model.layers = torch.nn.ModuleList(language_model.layers[number] for number in numbers)
    contexts = [model.text_context(random_text(1, 7), mask, fast) for fast in (False, True)]
    expected, z = (context.condition(embeds_of(model, 1), torch.arange(16)[None]) for context in contexts)
    torch.testing.assert_close(z, expected, atol=ATOL, rtol=ATOL)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    """Merged weights are rounded once more; neither way is farther from float32 than the dtype is fine."""
    model = tiny_model()
    num_latents, text, mask = model.config.num_latents, random_text(2, 5), torch.ones(2, 5, dtype=torch.long)
    positions, embeds = torch.arange(num_latents).expand(2, -1), embeds_of(model, 2)
    exact = model.text_context(text, mask, fast=False).condition(embeds, positions)
    model.to(dtype)
    errors = []
    for fast in (False, True):
        z = model.text_context(text, mask, fast).condition(embeds.to(dtype), positions)
        assert z.dtype == dtype
        errors.append(float((z.float() - exact).norm() / exact.norm()))
    # Three layers; float32's own rounding beside float64.
    assert max(errors) < max(8 * torch.finfo(dtype).eps, 1e-5)


def test_merged_weights_are_the_sum(model):
    fused = FusedPLoRALayer(model.model.language_model.layers[1])
    attention = model.model.language_model.layers[1].self_attn

    def exact(linear):
        return linear.weight.double() + linear.image_scaling * linear.image_B.double() @ linear.image_A.double()

    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    expected = torch.cat([exact(linear) for linear in linears]), torch.cat([linear.bias for linear in linears])
    # Of unit vectors: the columns of W, and b.
    output = fused.linear("qkv", 64)(torch.eye(64))
    torch.testing.assert_close(output.double(), expected[0].T + expected[1], atol=1e-6, rtol=1e-6)
    assert (expected[0][:64] - attention.q_proj.weight).abs().max() > 0.01
    assert not output.requires_grad


def test_fused_weights_are_kept_until_they_are_dropped(model):
    """They are made per call, unless `fuse_plora` keeps them; training and loading weights drop them."""
    settings = {"guidance_scale": 1, "num_ar_steps": 2, "num_inference_steps": 2, "output_type": "latent"}
    expected = model.generate_images(random_text(1, 6), **settings, generator=seeded(0))
    assert model.fused_plora is None
    keys = model.state_dict().keys()
    for drop in (lambda: model.train().eval(), lambda: model.load_state_dict(model.state_dict()), model.unfuse_plora):
        model.fuse_plora()
        assert model.fused_plora is not None and model.state_dict().keys() == keys
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        for own in (model, copied):
            latents = own.generate_images(random_text(1, 6), **settings, generator=seeded(0))
            assert torch.equal(latents, expected)
        drop()
        assert model.fused_plora is None


@torch.no_grad()
def test_each_call_uses_the_weights_as_they_are(model):
    settings = {"guidance_scale": 1, "num_ar_steps": 2, "num_inference_steps": 2, "output_type": "latent"}
    before = model.generate_images(random_text(1, 6), **settings, generator=seeded(0))
    model.model.language_model.layers[2].mlp.down_proj.image_B.data[:, 1:].mul_(1.5)
    changed, plain = (
        model.generate_images(random_text(1, 6), **settings, generator=seeded(0), fast=fast) for fast in (True, False)
    )
    torch.testing.assert_close(changed, plain, atol=ATOL, rtol=ATOL)
    assert (changed - before).abs().max() > 1e-3


def test_images_leave_nothing_behind(model):
    """Without a garbage collector: no cycle holds the weights of a call."""
    gc.collect()
    gc.disable()
    try:
        model.generate_images(random_text(1, 6), guidance_scale=1, num_ar_steps=2, num_inference_steps=2)
        left = [part for part in gc.get_objects() if isinstance(part, (FusedPLoRALayer, FusedPLoRAContext))]
    finally:
        gc.enable()
    assert not left


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch may lack the operators elsewhere")
def test_this_torch_can_pack():
    """Without it the tests of packed products compare torch with itself."""
    assert can_pack(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (2, 33, 48)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_packed_linear_is_the_linear(dtype, shape, has_bias, monkeypatch):
    monkeypatch.setattr(fast_generation_mmar, "MIN_PACKED_MULTIPLY_ADDS", 0)
    weight = torch.randn(20, 48, generator=seeded(0)).to(dtype) / 7
    bias = torch.randn(20, generator=seeded(1)).to(dtype) if has_bias else None
    inputs = torch.randn(shape, generator=seeded(2)).to(dtype)
    output = PackedLinear(weight, bias, 8)(inputs)
    expected = F.linear(inputs, weight, bias)
    assert output.shape == expected.shape and output.dtype == dtype
    # Rounding of sums of 48 products near 1.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 0.0}
    torch.testing.assert_close(output, expected, atol=tolerance[dtype], rtol=0)


@pytest.mark.parametrize("result", ["missing", "wrong"])
def test_packed_products_that_are_missing_or_wrong_are_not_used(monkeypatch, result):
    def product(inputs, weight, bias, *args):
        if result == "missing":
            raise AttributeError
        return torch.zeros(len(inputs), len(bias))

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product, raising=False)
    assert not can_pack.__wrapped__(torch.float32)


def test_what_cannot_be_fused(model):
    language_model = model.model.language_model
    assert can_fuse(language_model)
    handle = language_model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert not can_fuse(language_model)
    handle.remove()
    assert can_fuse(language_model)
    scaled = tiny_model(text_config={"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})
    assert not can_fuse(scaled.model.language_model)
    language_model.config._attn_implementation = "mine"
    assert not can_fuse(language_model)
    language_model.config._attn_implementation = "sdpa"
    norm = language_model.norm
    norm.forward = norm.forward
    assert not can_fuse(language_model)
    del norm.forward
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert not can_fuse(adapted.get_base_model().model.language_model)


class HalfModel(MMARQwen2Model):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state / 2
        return outputs


class HalfMLP(MMARQwen2MLP):
    def forward(self, *inputs):
        return super().forward(*inputs) / 2


class Half(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs) / 2


@torch.no_grad()
@pytest.mark.parametrize("change", ["model", "class", "wrapper", "hook on RoPE"])
def test_layers_of_another_class_are_not_fused(change):
    model = tiny_model()
    arguments = {"guidance_scale": 1, "num_ar_steps": 2, "num_inference_steps": 3, "output_type": "latent"}
    before = model.generate_images(random_text(1, 6), **arguments, generator=seeded(0))
    layer = model.model.language_model.layers[1]
    if change == "model":
        model.model.language_model.__class__ = HalfModel
    elif change == "class":
        layer.mlp.__class__ = HalfMLP
    elif change == "wrapper":
        layer.mlp = Half(layer.mlp)
    else:
        model.model.language_model.rotary_emb.register_forward_hook(lambda _, __, turn: (turn[0] / 2, turn[1] / 2))
    got = model.generate_images(random_text(1, 6), **arguments, generator=seeded(0))
    expected = model.generate_images(random_text(1, 6), **arguments, generator=seeded(0), fast=False)
    torch.testing.assert_close(got, expected)
    assert (got - before).abs().max() > 1e-3


@torch.no_grad()
def test_fast_images_are_the_plain_ones(model, monkeypatch):
    arguments = {"guidance_scale": 2.0, "num_ar_steps": 4, "num_inference_steps": 3, "output_type": "latent"}
    texts = {"input_ids": random_text(2, 6), "negative_input_ids": random_text(2, 3)}
    fast = model.generate_images(**texts, **arguments, generator=seeded(0))
    monkeypatch.setattr(FusedPLoRAContext, "condition", None)
    plain = model.generate_images(**texts, **arguments, generator=seeded(0), fast=False)
    # Four rounds that feed each other.
    torch.testing.assert_close(fast, plain, atol=2e-4, rtol=2e-4)
    assert plain.std() > 0.1
