"""Linears with packed weights, against torch's."""

import copy
import io
import platform

import pytest
import torch
from helpers import image_marks, random_latents, random_mask, random_text, seeded, tiny_model
from torch import nn
from torch.nn import functional as F

from mmar.modeling_mmar import packed_linear_mmar
from mmar.modeling_mmar.packed_linear_mmar import PackedForward, PackedLinear, can_pack, packed_linears


# Rounding of sums of 48 products near 1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch may lack the operators elsewhere")
def test_this_torch_can_pack():
    """Without it the tests below compare torch with itself."""
    assert torch.backends.mkldnn.is_available()
    assert can_pack(torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not PackedLinear(torch.zeros(512, 512), num_rows=8).is_packed


@pytest.fixture(autouse=True)
def small_ones_pay(monkeypatch):
    monkeypatch.setattr(packed_linear_mmar, "MIN_MULTIPLY_ADDS", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (2, 33, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_packed_linear_is_the_linear(dtype, shape, has_bias):
    weight = torch.randn(20, 48, generator=seeded(0)).to(dtype) / 7
    bias = torch.randn(20, generator=seeded(1)).to(dtype) if has_bias else None
    inputs = torch.randn(shape, generator=seeded(2)).to(dtype)
    output = PackedLinear(weight, bias, num_rows=8)(inputs)
    expected = F.linear(inputs, weight, bias)
    assert output.shape == expected.shape and output.dtype == dtype
    torch.testing.assert_close(output, expected, atol=TOLERANCE.get(dtype, 0.0), rtol=0)


def test_rows_that_do_not_lie_together():
    """As the chunks of a fused product, or a transposed tensor."""
    weight, inputs = torch.randn(20, 48, generator=seeded(0)), torch.randn(6, 96, generator=seeded(1))
    for part in (*inputs.chunk(2, dim=-1), torch.randn(48, 6, generator=seeded(2)).T):
        torch.testing.assert_close(
            PackedLinear(weight, num_rows=8)(part), F.linear(part, weight), atol=1e-5, rtol=1e-5
        )


def test_where_torch_cannot_pack(monkeypatch):
    monkeypatch.setattr(packed_linear_mmar, "can_pack", lambda dtype: False)
    weight, inputs = torch.randn(20, 48, generator=seeded(0)), torch.randn(6, 48, generator=seeded(1))
    linear = PackedLinear(weight, num_rows=8)
    assert not linear.is_packed
    assert torch.equal(linear(inputs), F.linear(inputs, weight))


def test_operators_that_are_missing_or_wrong_are_not_used(monkeypatch):
    class Wrong:
        _reorder_linear_weight = staticmethod(lambda weight, rows: weight)
        _linear_pointwise = staticmethod(lambda inputs, weight, bias, *rest: F.linear(inputs, weight, bias) + 1)

    monkeypatch.setattr(torch.ops, "mkldnn", Wrong)
    assert not can_pack.__wrapped__(torch.float32)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not can_pack.__wrapped__(torch.float32)
    assert not can_pack(torch.float16)


def test_within_the_context_only():
    class Other(nn.Linear):
        def forward(self, inputs):
            return inputs

    module = nn.Sequential(nn.Linear(48, 48), Other(48, 48))
    inputs = torch.randn(3, 48, generator=seeded(0))
    expected = module(inputs)
    with packed_linears(module, 8):
        assert isinstance(module[0].forward, PackedLinear) == can_pack(torch.float32)
        assert "forward" not in vars(module[1])
        torch.testing.assert_close(module(inputs), expected, atol=1e-5, rtol=1e-5)
        with packed_linears(module, 8):  # another thread's
            pass
        assert isinstance(module[0].forward, PackedLinear) == can_pack(torch.float32)
        torch.testing.assert_close(copy.deepcopy(module)(inputs), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(module(inputs), expected)
    with pytest.raises(KeyError), packed_linears(module, 8):
        raise KeyError
    assert "forward" not in vars(module[0])


def test_drawing_leaves_the_linears_as_they_were():
    model = tiny_model()
    model.generate_images(random_text(1, 4), guidance_scale=1, num_ar_steps=2, num_inference_steps=2)
    assert not any("forward" in vars(module) for module in model.modules())


def test_who_trains_beside_a_picture_gets_gradients_and_copies_of_their_own():
    """As another thread does, or a callback."""
    model = tiny_model()
    # Head and latent encoder both take part in the image loss.
    inputs = {
        "input_ids": torch.cat([random_text(1, 4), image_marks(model, 1)], 1),
        "latents": random_latents(model, 1),
        "latent_mask": random_mask(model, 1),
    }
    copies = []

    def callback(*_):
        if copies:
            return
        with torch.enable_grad():
            model(**inputs, generator=seeded(1)).image_loss.backward()
        pickled = io.BytesIO()
        torch.save(model, pickled)
        pickled.seek(0)
        copies.extend([copy.deepcopy(model), torch.load(pickled, weights_only=False)])

    expected = model(**inputs, generator=seeded(1)).image_loss
    drawing = {"guidance_scale": 1, "num_ar_steps": 2, "num_inference_steps": 2}
    model.generate_images(random_text(1, 4), **drawing, callback=callback)
    trained = [*model.diffusion_mlp.named_parameters(), *model.model.latent_encoder.named_parameters()]
    assert not [name for name, parameter in trained if parameter.grad is None]
    for own in copies:
        head = own.diffusion_mlp
        with torch.no_grad(), packed_linears(head, 2):
            forwards = [vars(linear).get("forward") for linear in head.modules() if isinstance(linear, nn.Linear)]
            assert any(isinstance(forward, PackedForward) for forward in forwards)
        with torch.no_grad():
            torch.testing.assert_close(own(**inputs, generator=seeded(1)).image_loss, expected)
            for linear in (own.diffusion_mlp.input_projection, own.model.latent_encoder.vis_projector.layers[0]):
                linear.weight.zero_()
                assert torch.equal(linear(torch.ones(1, linear.in_features))[0], linear.bias)


def test_small_products_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(packed_linear_mmar, "MIN_MULTIPLY_ADDS", 2**20)
    weight = torch.zeros(512, 256)
    assert not PackedLinear(weight, num_rows=7).is_packed
    assert PackedLinear(weight, num_rows=8).is_packed == can_pack(torch.float32)
    # One row is a product with a vector, which nothing makes faster.
    assert not PackedLinear(torch.zeros(2048, 512), num_rows=1).is_packed
