"""The language model on image tokens by merged weights, against its own modules."""

import gc
import weakref

import pytest
import torch
from helpers import random_text, seeded, tiny_model
from peft import LoraConfig, get_peft_model

from mmar.modeling_mmar import packed_linear_mmar
from mmar.modeling_mmar.denoising_mmar import Denoiser
from mmar.modeling_mmar.image_layers_mmar import ImageWeights, MergedContext, PlainContext, can_merge
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
def test_merged_context_is_the_plain_one(attn_implementation, lengths, is_packed, monkeypatch):
    monkeypatch.setattr(packed_linear_mmar, "MIN_MULTIPLY_ADDS", 0 if is_packed else 2**40)
    model = tiny_model(attn_implementation=attn_implementation)
    language_model, num_latents = model.model.language_model, model.config.num_latents
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths]).long()
    contexts = [kind(language_model, random_text(3, 7), mask, num_latents) for kind in (PlainContext, MergedContext)]
    positions = torch.stack([torch.randperm(num_latents, generator=seeded(row))[:5] for row in range(3)])
    for seed in range(2):  # rounds leave nothing behind
        expected, z = (context.run(embeds_of(model, 3, seed), positions) for context in contexts)
        assert z.shape == (3, 5, 64)
        torch.testing.assert_close(z, expected, atol=ATOL, rtol=ATOL)
    assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("numbers", [(1, 0, 2), (0, 2)], ids=["changed places", "one taken out"])
def test_layers_are_known_by_their_own_numbers(model, numbers):
    language_model, mask = model.model.language_model, torch.ones(1, 7, dtype=torch.long)
    language_model.layers = torch.nn.ModuleList(language_model.layers[number] for number in numbers)
    num_latents = model.config.num_latents
    contexts = [kind(language_model, random_text(1, 7), mask, num_latents) for kind in (PlainContext, MergedContext)]
    expected, z = (context.run(embeds_of(model, 1), torch.arange(16)[None]) for context in contexts)
    torch.testing.assert_close(z, expected, atol=ATOL, rtol=ATOL)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    """Merged weights are rounded once more; neither way is farther from float32 than the dtype is fine."""
    model = tiny_model()
    num_latents, text, mask = model.config.num_latents, random_text(2, 5), torch.ones(2, 5, dtype=torch.long)
    positions, embeds = torch.arange(num_latents).expand(2, -1), embeds_of(model, 2)
    exact = PlainContext(model.model.language_model, text, mask, num_latents).run(embeds, positions)
    language_model = model.to(dtype).model.language_model
    errors = []
    for kind in (PlainContext, MergedContext):
        z = kind(language_model, text, mask, num_latents).run(embeds.to(dtype), positions)
        assert z.dtype == dtype
        errors.append(float((z.float() - exact).norm() / exact.norm()))
    # Three layers; float32's own rounding beside float64.
    assert max(errors) < max(8 * torch.finfo(dtype).eps, 1e-5)


def test_merged_weights_are_the_sum(model):
    weights = ImageWeights(model.model.language_model, 16)
    attention = model.model.language_model.layers[1].self_attn

    def exact(linear):
        return linear.weight.double() + linear.image_scaling * linear.image_B.double() @ linear.image_A.double()

    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    expected = torch.cat([exact(linear) for linear in linears]), torch.cat([linear.bias for linear in linears])
    # Of unit vectors: the columns of W, and b.
    output = weights.layers[1].key_value(torch.eye(64))
    torch.testing.assert_close(output.double(), expected[0].T + expected[1], atol=1e-6, rtol=1e-6)
    assert (expected[0][:64] - attention.q_proj.weight).abs().max() > 0.01
    assert not output.requires_grad


CHANGES = {
    "an optimizer's step": lambda linear: linear.image_B.add_(0.1),
    "a write to .data": lambda linear: linear.image_A.data.mul_(1.5),
    "a write to .data of all columns but the first": lambda linear: linear.image_B.data[:, 1:].mul_(1.5),
    "a write to .data of one row": lambda linear: linear.weight.data[3].add_(0.5),
    "a write to .data of one element": lambda linear: linear.image_A.data[1, 2].add_(0.5),
    "a write to .data that moves columns": lambda linear: linear.weight.data.copy_(
        linear.weight.roll(linear.weight.shape[1] // 2, 1)
    ),
    "a write to .data that swaps rows": lambda linear: linear.weight.data.copy_(linear.weight.flip(0)),
    "another tensor": lambda linear: setattr(linear, "weight", torch.nn.Parameter(linear.weight * 2)),
    "another dtype": lambda linear: linear.to(torch.bfloat16),
    "another factor": lambda linear: setattr(linear, "image_scaling", 0.0),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_merged_weights_are_kept_until_the_model_changes(model, change):
    language_model = model.model.language_model
    kept = ImageWeights.of(language_model, 16)
    assert ImageWeights.of(language_model, 16) is kept
    change(language_model.layers[2].mlp.down_proj)
    assert ImageWeights.of(language_model, 16) is not kept


def test_merged_weights_go_with_training_and_with_the_model(model):
    language_model = model.model.language_model
    kept = ImageWeights.of(language_model, 16)
    model.eval()
    assert ImageWeights.of(language_model, 16) is kept
    model.train()
    assert language_model not in ImageWeights._kept
    model.eval()
    ImageWeights.of(language_model, 16)
    model.to(torch.bfloat16)
    assert language_model not in ImageWeights._kept


def test_a_picture_leaves_nothing_behind_but_the_merged_weights(model):
    """Without a garbage collector: no cycle holds keys, graphs or weights that `train()` lets go of."""
    gc.collect()
    gc.disable()
    try:
        model.generate_images(random_text(1, 6), guidance_scale=1, num_ar_steps=2, num_inference_steps=2)
        kept = ImageWeights._kept[model.model.language_model]
        assert not [item for item in gc.get_objects() if isinstance(item, (PlainContext, Denoiser))]
        weights = weakref.ref(kept)
        del kept
        model.train()
        assert weights() is None
        own = tiny_model()
        ImageWeights.of(own.model.language_model, 16)
        before = len(ImageWeights._kept)
    finally:
        gc.enable()
    del own
    gc.collect()  # a model of transformers is full of cycles
    assert len(ImageWeights._kept) == before - 1


def test_what_cannot_be_merged(model):
    language_model = model.model.language_model
    assert can_merge(language_model)
    handle = language_model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert not can_merge(language_model)
    handle.remove()
    assert can_merge(language_model)
    scaled = tiny_model(text_config={"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})
    assert not can_merge(scaled.model.language_model)
    language_model.config._attn_implementation = "mine"
    assert not can_merge(language_model)
    language_model.config._attn_implementation = "sdpa"
    norm = language_model.norm
    norm.forward = norm.forward
    assert not can_merge(language_model)
    del norm.forward
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert not can_merge(adapted.get_base_model().model.language_model)


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
def test_layers_of_another_class_are_not_merged(change):
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
    expected = model.generate_images(random_text(1, 6), **arguments, generator=seeded(0), merge_image_weights=False)
    torch.testing.assert_close(got, expected)
    assert (got - before).abs().max() > 1e-3


@torch.no_grad()
def test_pictures_are_the_same_with_and_without_merging(model, monkeypatch):
    arguments = {"guidance_scale": 2.0, "num_ar_steps": 4, "num_inference_steps": 3, "output_type": "latent"}
    texts = {"input_ids": random_text(2, 6), "negative_input_ids": random_text(2, 3)}
    merged = model.generate_images(**texts, **arguments, generator=seeded(0))
    monkeypatch.setattr(MergedContext, "run", None)
    plain = model.generate_images(**texts, **arguments, generator=seeded(0), merge_image_weights=False)
    # Four rounds that feed each other.
    torch.testing.assert_close(merged, plain, atol=2e-4, rtol=2e-4)
    assert plain.std() > 0.1
