"""A small Qwen2 in its own format, with Qwen2's kind of tokenizer, and a small VAE, made on the spot."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from squares import make_processor
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


VAE_CONFIG = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 8,
    "scaling_factor": 1.5,
    "shift_factor": 0.25,
}


def text_tokenizer(reserved: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """ChatML tokens, those that are `reserved`, and no image token, as Qwen2's."""
    tokenizer = make_processor().tokenizer
    from mmar.training.init_tiny import SPECIAL_TOKENS, train_tokenizer

    names = [name for name in SPECIAL_TOKENS if "image" not in name]
    fresh = train_tokenizer(["a red square", "Which colour?"], len(tokenizer), 512, special_tokens=names)
    fresh.chat_template = "{{ messages[0]['content'] }}"
    fresh.add_tokens([AddedToken(name, special=True, normalized=False) for name in reserved], special_tokens=True)
    return fresh


def make_qwen2(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "5GB",
    reserved: tuple[str, ...] = (),
    **overrides: Any,
) -> Qwen2ForCausalLM:
    """
    Saves a Qwen2 of two layers whose embedding has unused rows, or with `vocab_size=None` none; biases and all are
    random.
    """
    torch.manual_seed(seed)
    tokenizer = text_tokenizer(reserved)
    if overrides.get("vocab_size", 0) is None:
        overrides["vocab_size"] = len(tokenizer)
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**(values | overrides))).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    # Casting has rounded RoPE's frequencies; loading keeps them.
    return Qwen2ForCausalLM.from_pretrained(folder)


def make_vae(folder: Path, seed: int = 1) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE_CONFIG).eval()
    vae.save_pretrained(folder)
    return vae


def make_preset(folder: Path) -> Path:
    """Small sizes for all but the language model and the VAE."""
    from helpers import tiny_config

    tiny_config().save_pretrained(folder)
    return folder
