"""
The language model on the tokens of pictures that are being drawn, behind a text that never sees them.

All running tokens are image tokens, so each linear is one product with W + alpha / r B A. All tokens of a picture
share one RoPE position, so only the text's keys are turned, once, by that position backwards. The text's keys and
values stay where they are, and the last layer runs for the wanted tokens only.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from .graphs_mmar import GraphCache
from .masking_mmar import shared_position_ids
from .packed_linear_mmar import PackedLinear
from .plora_mmar import MMARQwen2Attention, MMARQwen2DecoderLayer, MMARQwen2MLP, MMARQwen2Model, PLoRALinear


# Memory that must be free on a CUDA device, by what the merged weights take: they are summed in float32, and a picture
# needs some too.
ROOM = 1.25
# Attention that merged layers compute as well; another one is a user's.
ATTENTION = ("sdpa", "eager")


@dataclass
class _ImageLayer:
    """The linears of one layer as image tokens see them: merged, and those of one input in one."""

    # The last layer's alone, whose queries are wanted of fewer tokens than its keys; else `key_value` is all three.
    query: PackedLinear | None
    key_value: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear


class ImageWeights:
    r"""
    Qwen2's linears with PLoRA merged in: W + alpha / r B A, as much memory as the layers of the language model.

    Args:
        language_model (`MMARQwen2Model`): One that `can_merge`.
        num_rows (`int`): Image tokens of a call, at least.
    """

    _kept: "weakref.WeakKeyDictionary[MMARQwen2Model, ImageWeights]" = weakref.WeakKeyDictionary()

    def __init__(self, language_model: MMARQwen2Model, num_rows: int):
        last = language_model.layers[-1]
        self.layers = [_merged_layer(layer, num_rows, layer is last) for layer in language_model.layers]
        self._state, self._probe = _state_of(language_model), _probe(language_model)

    @classmethod
    def of(cls, language_model: MMARQwen2Model, num_rows: int) -> "ImageWeights":
        """The merged weights of a model: those of the last call, if the model's weights are still the same."""
        kept = cls._kept.get(language_model)
        if kept is None or not kept._is_current(language_model):
            # The old ones first: two copies might not fit.
            cls._kept.pop(language_model, None)
            del kept
            kept = cls._kept[language_model] = cls(language_model, num_rows)
        return kept

    @classmethod
    def fit(cls, language_model: MMARQwen2Model) -> bool:
        """Whether there are merged weights already, or a CUDA device has room for them; elsewhere it is not known."""
        device, kept = language_model.embed_tokens.weight.device, cls._kept.get(language_model)
        # Others of the same tensors take the place of those that are there.
        if device.type != "cuda" or (kept is not None and kept._state == _state_of(language_model)):
            return True
        free = torch.cuda.mem_get_info(device)[0]
        # What torch keeps and does not use is free too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        parts = language_model.layers.parameters()
        return ROOM * sum(part.numel() * part.element_size() for part in parts) <= free

    @classmethod
    def drop(cls, language_model: MMARQwen2Model) -> None:
        """Frees the merged weights of a model, if there are any."""
        cls._kept.pop(language_model, None)

    def _is_current(self, language_model: MMARQwen2Model) -> bool:
        return _state_of(language_model) == self._state and torch.equal(_probe(language_model), self._probe)


def can_merge(language_model: nn.Module) -> bool:
    """
    Whether the weights of image tokens can be merged and run past the modules: floating point, on their device, each
    the PLoRA linear itself (no adapter on top, no shard, no quantized weight), and no hook that waits for a call.
    """
    config = language_model.config
    if config.rope_parameters.get("rope_type", "default") != "default" or config._attn_implementation not in ATTENTION:
        return False
    for module in (language_model, language_model.rotary_emb, *language_model.layers.modules(), language_model.norm):
        # accelerate, and others, put a `forward` of their own into the module.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    # Another class may compute something else.
    if type(language_model) is not MMARQwen2Model:
        return False
    for layer in language_model.layers:
        if type(layer) is not MMARQwen2DecoderLayer:
            return False
        if type(layer.self_attn) is not MMARQwen2Attention or type(layer.mlp) is not MMARQwen2MLP:
            return False
    for linear in _linears(language_model):
        if type(linear) is not PLoRALinear or linear.weight.is_meta or not linear.weight.is_floating_point():
            return False
        if type(linear.weight) is not nn.Parameter or type(linear.weight.data) is not Tensor:
            return False
    return len({parameter.device for parameter in language_model.parameters()}) == 1


def _linears(language_model: nn.Module) -> list[nn.Module]:
    return [
        linear
        for layer in language_model.layers
        for linear in (
            *(getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"),
            *(getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")),
        )
    ]


def _sources(language_model: MMARQwen2Model) -> list[Tensor]:
    """The tensors that merged weights are made of."""
    parts = [(linear.weight, linear.bias, linear.image_A, linear.image_B) for linear in _linears(language_model)]
    return [part for own in parts for part in own if part is not None]


def _state_of(language_model: MMARQwen2Model) -> list[tuple]:
    """Where the weights are, how often they were written to as far as torch counts it, and the branches' factors."""
    weights = [
        (part.data_ptr(), 0 if part.is_inference() else part._version, part.dtype, part.device)
        for part in _sources(language_model)
    ]
    return weights + [(linear.image_scaling,) for linear in _linears(language_model)]


@torch.no_grad()
def _probe(language_model: MMARQwen2Model) -> Tensor:
    """
    The sums of each weight's rows and columns: writes to `.data` are not counted, and may be to a few elements only,
    or move them.
    """
    sums = []
    for part in _sources(language_model):
        dtype = torch.promote_types(part.dtype, torch.float32)
        sums += [part.sum(dim, dtype=dtype) for dim in (-1, 0)] if part.ndim > 1 else [part.to(dtype)]
    return torch.cat(sums)


@torch.no_grad()
def _merged(linear: PLoRALinear) -> Tensor:
    """W + alpha / r B A `(out, in)`, summed in float32 at least, in W's dtype."""
    dtype = torch.promote_types(linear.weight.dtype, torch.float32)
    weight, factor_A, factor_B = (part.to(dtype) for part in (linear.weight, linear.image_A, linear.image_B))
    # Without autocast, which would round the product.
    with torch.autocast(factor_A.device.type, enabled=False):
        merged = torch.addmm(weight, factor_B, factor_A, alpha=linear.image_scaling)
    return merged.to(linear.weight.dtype)


def _joined(num_rows: int, *linears: PLoRALinear) -> PackedLinear:
    """Linears of one input as one, merged."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    weight, bias = torch.cat([_merged(linear) for linear in linears]), torch.cat(biases) if biases else None
    return PackedLinear(weight, bias, num_rows=num_rows)


@torch.no_grad()
def _merged_layer(layer: MMARQwen2DecoderLayer, num_rows: int, is_last: bool) -> _ImageLayer:
    attention, mlp = layer.self_attn, layer.mlp
    of_keys = (attention.k_proj, attention.v_proj)
    return _ImageLayer(
        query=_joined(num_rows, attention.q_proj) if is_last else None,
        key_value=_joined(num_rows, *(of_keys if is_last else (attention.q_proj, *of_keys))),
        output=_joined(num_rows, attention.o_proj),
        gate_up=_joined(num_rows, mlp.gate_proj, mlp.up_proj),
        down=_joined(num_rows, mlp.down_proj),
    )


class PlainContext:
    r"""
    A text, and the language model on the tokens of a picture behind it, by the model's own modules.

    Args:
        language_model (`MMARQwen2Model`): It.
        input_ids (`torch.LongTensor` of shape `(rows, P)`): The text, left padded.
        attention_mask (`torch.Tensor` of shape `(rows, P)`): 0 at padding.
        num_latents (`int`): N.
    """

    def __init__(self, language_model: Any, input_ids: Tensor, attention_mask: Tensor, num_latents: int):
        self.language_model, self.dtype = language_model, language_model.embed_tokens.weight.dtype
        self.cache = DynamicCache(config=language_model.config)
        no_image = torch.zeros_like(input_ids, dtype=torch.bool)
        position_ids = shared_position_ids(no_image, num_latents, attention_mask)
        # The text never sees the picture: its keys and values are made once.
        language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        # All tokens of the picture share the position after the text.
        self.position_ids = position_ids[:, -1:] + 1  # (rows, 1)
        visible = F.pad(attention_mask.bool(), (0, num_latents), value=True)
        self.visible = visible[:, None, None]  # (rows, 1, 1, P + N)

    def run(self, embeds: Tensor, positions: Tensor) -> Tensor:
        r"""
        Args:
            embeds (`torch.FloatTensor` of shape `(rows, N, D)`): Of the picture's tokens.
            positions (`torch.LongTensor` of shape `(rows, K)`): The wanted tokens.

        Returns:
            `torch.FloatTensor` of shape `(rows, K, D)`: z there.
        """
        embeds = embeds.to(self.dtype)
        rows, num_latents, _ = embeds.shape
        mask = self.visible.expand(-1, 1, num_latents, -1)
        if self.language_model.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(
                ~mask, torch.finfo(embeds.dtype).min
            )
        z = self.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": mask},
            position_ids=self.position_ids.expand(-1, num_latents),
            past_key_values=self.cache,
            use_cache=True,
            image_token_mask=torch.ones(rows, num_latents, dtype=torch.bool, device=embeds.device),
            return_dict=True,
        ).last_hidden_state
        self.cache.crop(-num_latents)
        return _at(z, positions)


class MergedContext(PlainContext):
    """As `PlainContext`, with merged weights, past the modules; for a model that `can_merge`."""

    def __init__(self, language_model: Any, input_ids: Tensor, attention_mask: Tensor, num_latents: int):
        super().__init__(language_model, input_ids, attention_mask, num_latents)
        self.weights = ImageWeights.of(language_model, num_rows=num_latents)
        self.num_text = input_ids.shape[1]
        # Without padding there is nothing to hide, and attention is faster without a mask.
        self.mask = None if bool(attention_mask.all()) else self.visible
        # By the layers' own numbers: some may have been taken out, or changed places.
        cached = [self.cache.layers[layer.self_attn.layer_idx] for layer in language_model.layers]
        cos, sin = language_model.rotary_emb(cached[0].keys, self.position_ids)
        wide = torch.promote_types(cached[0].keys.dtype, torch.float32)
        cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)  # (rows, 1, 1, head_dim)
        self.states = []
        for layer in cached:
            keys, values = layer.keys, layer.values  # (rows, kv_heads, P, head_dim)
            # Image tokens then need no turn: scores hang on differences of positions.
            turned = (keys.to(wide) * cos - rotate_half(keys.to(wide)) * sin).to(keys.dtype)
            # The places of the picture's tokens are written in each round.
            self.states.append([F.pad(part, (0, 0, 0, num_latents)) for part in (turned, values)])
        self.cache = None
        self._graphs = GraphCache()

    def run(self, embeds: Tensor, positions: Tensor) -> Tensor:
        return self._graphs.run(self._run, None, embeds.to(self.dtype), positions)

    def _run(self, _: None, embeds: Tensor, positions: Tensor) -> Tensor:
        hidden_states = embeds
        layers = zip(self.language_model.layers, self.weights.layers, self.states, strict=True)
        for layer, weights, (keys, values) in layers:
            hidden_states = self._layer(layer, weights, keys, values, hidden_states, positions)
        return self.language_model.norm(hidden_states)

    def _layer(
        self,
        layer: MMARQwen2DecoderLayer,
        weights: _ImageLayer,
        keys: Tensor,
        values: Tensor,
        hidden_states: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """A layer for all tokens, or, the last one, for those at `positions`; all tokens are attended to."""
        config = self.language_model.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, layer.self_attn.head_dim
        rows = len(hidden_states)
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        inputs = layer.input_layernorm(hidden_states)
        if weights.query is None:
            query, key, value = weights.key_value(inputs).split(sizes, dim=-1)
        else:
            hidden_states = _at(hidden_states, positions)
            query = weights.query(_at(inputs, positions))
            key, value = weights.key_value(inputs).split(sizes[1:], dim=-1)
        for states, part in ((keys, key), (values, value)):
            # (rows, N, kv_heads * head_dim) -> (rows, kv_heads, N, head_dim)
            states[:, :, self.num_text :] = part.unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)
        # The heads that share a key are more queries of it: (rows, K, heads * d) -> (rows, kv_heads, groups * K, d)
        query = query.view(rows, -1, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
        shape = query.shape
        attention = F.scaled_dot_product_attention(
            query.flatten(2, 3).to(keys.dtype), keys, values, attn_mask=self.mask, scale=layer.self_attn.scaling
        )
        attention = attention.view(shape).permute(0, 3, 1, 2, 4).flatten(2)  # (rows, K, heads * d)
        hidden_states = hidden_states + weights.output(attention)
        gate, up = weights.gate_up(layer.post_attention_layernorm(hidden_states)).chunk(2, dim=-1)
        return hidden_states + weights.down(layer.mlp.act_fn(gate) * up)


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """Rows of `(rows, N, D)` at `(rows, K)`: `(rows, K, D)`."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
