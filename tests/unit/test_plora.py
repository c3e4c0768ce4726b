"""PLoRA: nothing without B, image tokens only, and equal to merged weights."""

import pytest
import torch
from helpers import qwen2_of, tiny_model
from torch.nn import functional as F

from mmar.modeling_mmar.plora_mmar import PLoRALinear


@pytest.fixture
def linear():
    torch.manual_seed(0)
    linear = PLoRALinear(12, 10, rank=3, alpha=6.0)
    torch.nn.init.normal_(linear.image_B)
    return linear


def test_scaling_is_alpha_over_rank(linear):
    assert linear.image_scaling == 2.0


def test_fresh_branch_is_zero():
    linear = PLoRALinear(12, 10, rank=3, alpha=6.0)
    x = torch.randn(2, 5, 12)
    base = F.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x, torch.ones(2, 5, dtype=torch.bool)), base)
    assert linear.image_A.abs().max() > 0


def test_image_tokens_only(linear):
    x = torch.randn(2, 5, 12)
    mask = torch.tensor([[True, False, True, False, False], [False, False, True, True, True]])
    base = F.linear(x, linear.weight, linear.bias)
    output = linear(x, mask)
    assert torch.equal(linear(x), base)
    assert torch.equal(output[~mask], base[~mask])
    expected = x @ (linear.weight + 2.0 * linear.image_B @ linear.image_A).T + linear.bias
    # The same sum in another order: some roundings of 2^-24 on values near 10.
    torch.testing.assert_close(output[mask], expected[mask], atol=2e-5, rtol=0)
    assert (output[mask] - base[mask]).abs().min(-1).values.max() > 1e-2


def test_all_false_mask_gives_the_base_and_zero_gradients(linear):
    x = torch.randn(2, 5, 12)
    output = linear(x, torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(output, linear(x))
    output.sum().backward()
    assert not linear.image_A.grad.any() and not linear.image_B.grad.any()


def test_every_linear_of_every_layer_has_the_branch():
    model = tiny_model()
    for layer in model.model.language_model.layers:
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        assert len(linears) == 7 and all(isinstance(module, PLoRALinear) for module in linears)


def test_zero_b_equals_qwen2_on_image_tokens():
    model = tiny_model()
    for name, parameter in model.named_parameters():
        if name.endswith("image_B"):
            torch.nn.init.zeros_(parameter)
    embeds = torch.randn(2, 11, 64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    output = model.model.language_model(inputs_embeds=embeds, image_token_mask=mask).last_hidden_state
    assert torch.equal(output, qwen2_of(model).model(inputs_embeds=embeds).last_hidden_state)


def test_merged_weights_equal_the_branch_in_the_whole_stack():
    model = tiny_model()
    embeds = torch.randn(2, 11, 64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    branch = model.model.language_model(inputs_embeds=embeds, image_token_mask=mask).last_hidden_state
    plain = model.model.language_model(inputs_embeds=embeds).last_hidden_state
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PLoRALinear):
                module.weight += module.image_scaling * module.image_B @ module.image_A
    merged = qwen2_of(model).model(inputs_embeds=embeds).last_hidden_state
    # Normalized outputs near 1 to 3 through three layers: about a hundred float32 roundings.
    torch.testing.assert_close(branch, merged, atol=5e-5, rtol=0)
    assert (branch - plain).abs().max() > 0.1
