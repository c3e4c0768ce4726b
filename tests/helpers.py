"""A model of a few thousand weights in which nothing is trivially zero."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from mmar.modeling_mmar.configuration_mmar import MMARConfig
from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration


IMAGE = 127  # the image token's id; text ids are drawn below 100
TEXT_IDS = 100


def tiny_config(**overrides: Any) -> MMARConfig:
    """16 latents of 4 channels, a Qwen2 of three layers; dicts among `overrides` update the sub-config's dict."""
    parts = {
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        "vit_config": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "diffusion_config": {"hidden_size": 32, "num_hidden_layers": 2, "diffusion_batch_mul": 2},
        "vae_config": {
            "block_out_channels": [8, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 8,
            "scaling_factor": 1.5,
            "shift_factor": 0.25,
        },
        "image_size": 8,
        "plora_rank": 4,
        "plora_alpha": 8.0,
        "image_token_id": IMAGE,
        "image_generation": {"num_ar_steps": 4, "num_inference_steps": 5, "guidance_scale": 3.0},
    }
    for name, value in overrides.items():
        parts[name] = parts[name] | value if isinstance(value, dict) else value
    return MMARConfig(**parts)


def tiny_arguments(**overrides: Any) -> dict[str, Any]:
    """The arguments of `tiny_config`, for a config of another class."""
    config = tiny_config(**overrides).to_dict()
    dropped = ("auto_map", "custom_pipelines", "model_type", "transformers_version", "tie_word_embeddings")
    return {name: value for name, value in config.items() if name not in dropped}


def tiny_model(seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any) -> MMARForConditionalGeneration:
    """A model in eval mode whose zero-initialized weights and Qwen2 biases are random too."""
    torch.manual_seed(seed)
    config = tiny_config(**overrides)
    model = MMARForConditionalGeneration._from_config(config, attn_implementation=attn_implementation).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("image_B", "modulation", "output_projection")):
            nn.init.normal_(parameter, std=0.1)
        elif "self_attn" in name and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif name.startswith(("model.language_model.", "lm_head.")) and parameter.ndim == 2 and "image_" not in name:
            # Wider than 0.02, so that attention is not uniform and a wrong mask or position shows.
            nn.init.normal_(parameter, std=0.15)
    return model


def qwen2_of(model: MMARForConditionalGeneration) -> Qwen2ForCausalLM:
    """transformers' own Qwen2 with the weights and dtype of the model's backbone, as `from_pretrained` makes it."""
    qwen2 = Qwen2ForCausalLM._from_config(model.config.text_config, dtype=model.dtype).eval()
    state = {
        name.replace("model.language_model.", "model."): value
        for name, value in model.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head.")) and not name.endswith(("image_A", "image_B"))
    }
    qwen2.load_state_dict(state)
    return qwen2


def random_text(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids `(batch, length)` without image tokens."""
    return torch.randint(1, TEXT_IDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_latents(model: MMARForConditionalGeneration, num_images: int, seed: int = 0) -> Tensor:
    """Latents `(num_images, C, h, w)` of unit variance."""
    size = model.config.latent_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, model.config.latent_channels, size, size, generator=generator)


def random_mask(model: MMARForConditionalGeneration, num_images: int, ratio: float = 0.6, seed: int = 0) -> Tensor:
    """A latent mask `(num_images, N)`, True where hidden."""
    return torch.rand(num_images, model.config.num_latents, generator=torch.Generator().manual_seed(seed)) < ratio


def image_marks(model: MMARForConditionalGeneration, batch: int) -> Tensor:
    """The N placeholders of one picture per row."""
    return torch.full((batch, model.config.num_latents), IMAGE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
