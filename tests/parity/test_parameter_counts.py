"""Parameter counts of the presets against the paper (Sec. 4.1; suppl. Table 5), on the meta device."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from mmar.modeling_mmar.configuration_mmar import MMARConfig
from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration


CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.fixture(scope="module", params=["mmar-0.5b", "mmar-7b"])
def model(request):
    with torch.device("meta"):
        model = MMARForConditionalGeneration(MMARConfig.from_pretrained(CONFIGS / request.param))
    model.preset = request.param
    return model


def plora(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith(("image_A", "image_B"))]


def test_plora(model):
    # The paper has no such numbers; by hand, r (in + out) of seven linears per layer.
    assert count(plora(model)) == {"mmar-0.5b": 281_542_656, "mmar-7b": 3_229_614_080}[model.preset]


def test_diffusion_mlp(model):
    """By hand: blocks of norm, two-layer MLP and modulation; time, condition and input; final modulation, output."""
    width, llm = model.config.diffusion_config.hidden_size, model.config.text_config.hidden_size
    block = 2 * width + 2 * 4 * width * width + 4 * width + width + 3 * width * width + 3 * width
    inputs = 256 * width + width + width * width + width + llm * width + width + 16 * width + width
    output = 2 * width * width + 2 * width + 16 * width + 16
    total = count(model.diffusion_mlp.parameters())
    assert total == model.config.diffusion_config.num_hidden_layers * block + inputs + output
    assert total == {"mmar-0.5b": 96_720_912, "mmar-7b": 574_418_960}[model.preset]


def test_kl16(model):
    assert count(model.vae.parameters()) == 69_610_963


def test_backbone_is_qwen2(model):
    backbone = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("model.language_model.", "lm_head.")) and not name.endswith(("image_A", "image_B"))
    }
    with torch.device("meta"):
        qwen2 = Qwen2ForCausalLM(model.config.text_config)
    assert {name.replace("model.language_model.", "model.") for name in backbone} == dict(
        qwen2.named_parameters()
    ).keys()
    expected = {"mmar-0.5b": 494_032_768, "mmar-7b": 7_615_616_512}[model.preset]
    assert count(model.get_parameter(name) for name in backbone) == count(qwen2.parameters()) == expected


def test_latent_encoder(model):
    """By hand: 16 ViT layers of 1024 with biases, two projectors, mask token, two position tables, last norm."""
    width, llm = 1024, model.config.text_config.hidden_size
    layer = 4 * (width * width + width) + 2 * 4 * width * width + 4 * width + width + 4 * width
    vit = 16 * layer + 256 * width + 2 * width
    post_projector = 16 * width + width + width * width + width
    vis_projector = width * llm + llm + 2 * (llm * llm + llm)
    expected = vit + post_projector + vis_projector + width + 256 * width
    assert count(model.model.latent_encoder.parameters()) == expected


def test_trainable_parameters_are_all_but_vae_and_backbone(model):
    expected = count(plora(model)) + count(model.diffusion_mlp.parameters())
    expected += count(model.model.latent_encoder.parameters())
    assert count(parameter for parameter in model.parameters() if parameter.requires_grad) == expected
