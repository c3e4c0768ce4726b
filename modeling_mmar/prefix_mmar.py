"""
The text before the first picture of a batch, in training without gradients.

Where PLoRA is all that is trained of the language model, text that has seen no picture depends on nothing trainable:
a gradient that arrives there is thrown away. The columns of a batch before its first image token are such text, or
padding, in every row. Each layer computes them without gradients, keeping nothing for them, and then the rest, whose
tokens attend to the prefix's keys and values. Losses and gradients stay what they were.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.cache_utils import Cache

from .configuration_mmar import TRAINED_SUFFIXES


# A prefix of a smaller share of the columns is left as it is: splitting each layer in two costs about as much as it
# saves (benchmarks/training_savings.py).
MIN_PREFIX_SHARE = 1 / 16


def num_prefix_tokens(
    language_model: nn.Module,
    first_image_column: int,
    length: int,
    attention_mask: Tensor | dict | None = None,
    output_attentions: bool | None = None,
) -> int:
    r"""
    How many columns of a training batch need no gradient, or 0 where that would not be exact, or not pay.

    Exact it is only if the text's embeddings need no gradient either.

    Args:
        language_model (`MMARQwen2Model`): Its trainable parameters decide.
        first_image_column (`int`): Of any row; 0 without image tokens.
        length (`int`): L, columns of the batch.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 at padding. With any other kind text might
            see what comes after it.
        output_attentions (`bool`, *optional*): The attention weights are wanted, of all tokens at once.

    Returns:
        `int`: `first_image_column`, or 0.
    """
    if first_image_column < MIN_PREFIX_SHARE * length or not torch.is_grad_enabled():
        return 0
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        return 0
    # Qwen2's own weights, or a user's LoRA in its linears.
    trained = (name for name, parameter in language_model.named_parameters() if parameter.requires_grad)
    if not all(name.endswith(TRAINED_SUFFIXES) for name in trained):
        return 0
    if output_attentions or language_model.config.output_attentions or _gathers_within_layers(language_model):
        return 0
    return first_image_column


def _gathers_within_layers(language_model: nn.Module) -> bool:
    """
    Whether parts of a layer gather their own weights from other ranks.

    The number of columns is that of a rank's own batch. A layer is called once, with a prefix or without, so that
    where whole layers gather their weights (FSDP as accelerate and transformers set it up) all ranks do the same in
    the same order. Its linears are called twice with a prefix: where they do the gathering, as in DeepSpeed's ZeRO-3,
    a rank with a prefix and one without would wait for each other for ever.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    layer = language_model.layers[0]
    parts = (module for module in layer.modules() if module is not layer)
    is_zero3 = any(hasattr(parameter, "ds_id") for parameter in layer.parameters())
    return is_zero3 or any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in parts)


class PrefixStates:
    """In place of a cache, in one pass of a layer: keeps the prefix's keys and values for the rest to look at."""

    def __init__(self, cache: Cache | None):
        self.cache = cache
        self.prefix: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if self.prefix is None:
            self.prefix = key, value
            return key, value
        # (B, heads, P, head_dim) before (B, heads, L - P, head_dim)
        key, value = torch.cat([self.prefix[0], key], dim=2), torch.cat([self.prefix[1], value], dim=2)
        # The cache gets them at once, as without a prefix.
        return (key, value) if self.cache is None else self.cache.update(key, value, layer_idx)


def split_arguments(
    num: int, attention_mask: Tensor, position_embeddings: tuple[Tensor, Tensor], position_ids: Tensor, **kwargs
) -> tuple[dict[str, Any], dict[str, Any]]:
    r"""
    Splits a layer's arguments into those of the first `num` columns and of the rest.

    Args:
        num (`int`): P.
        attention_mask (`torch.Tensor` of shape `(B, 1, L, L)`): Additive, or True where a query may look.
        position_embeddings (`tuple` of two `torch.FloatTensor` of shape `(B, L, head_dim)`): Cosines and sines.
        position_ids (`torch.LongTensor` of shape `(B, L)`): RoPE positions.
        **kwargs: Arguments that are the same for both, and `past_key_values`.

    Returns:
        `tuple` of two `dict`: For the prefix, which sees itself, and for the rest, which sees both.
    """
    kwargs["past_key_values"] = PrefixStates(kwargs.get("past_key_values"))
    split = []
    for columns, seen in ((slice(num), slice(num)), (slice(num, None), slice(None))):
        own = {
            "attention_mask": attention_mask[..., columns, seen],
            "position_embeddings": tuple(part[:, columns] for part in position_embeddings),
            "position_ids": position_ids[:, columns],
        }
        split.append({**kwargs, **own})
    return tuple(split)
