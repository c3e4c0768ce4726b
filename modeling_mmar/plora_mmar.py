"""
Partial LoRA on Qwen2 (Sec. 3.3.2): every linear of every layer gets a low-rank branch for image tokens only.

The image token mask is an argument, not state: Qwen2's attention, MLP, layer and model are subclassed to pass it on.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


class PLoRALinear(nn.Linear):
    r"""
    A linear layer with a low-rank branch that only image tokens pass: `W x + b + mask * alpha / r * B A x`.

    Args:
        in_features (`int`): Input width.
        out_features (`int`): Output width.
        rank (`int`): r, the width of the branch.
        alpha (`float`): The branch is scaled by alpha / r.
        bias (`bool`, *optional*, defaults to `True`): Whether the base layer has a bias.
        **kwargs: Of a base layer that is quantized (quantization_mmar.py).

    Example:

    ```python
    >>> import torch
    >>> from mmar.modeling_mmar.plora_mmar import PLoRALinear

    >>> linear = PLoRALinear(8, 4, rank=2, alpha=1.0)
    >>> linear(torch.zeros(1, 3, 8), torch.tensor([[True, False, True]])).shape
    torch.Size([1, 3, 4])
    ```
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, bias: bool = True, **kwargs):
        super().__init__(in_features, out_features, bias=bias, **kwargs)
        # Parameters and names without "lora_": peft takes such modules and names for its own.
        self.image_A = nn.Parameter(torch.empty(rank, in_features))
        self.image_B = nn.Parameter(torch.empty(out_features, rank))
        self.image_scaling = alpha / rank
        nn.init.kaiming_uniform_(self.image_A, a=math.sqrt(5))
        nn.init.zeros_(self.image_B)

    def forward(self, hidden_states: Tensor, image_token_mask: Tensor | None = None) -> Tensor:
        r"""
        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, L, in_features)`): Input.
            image_token_mask (`torch.BoolTensor` of shape `(B, L)`, *optional*): True at image tokens. Without it the
                branch is skipped and the result is that of the base layer, bit for bit.

        Returns:
            `torch.FloatTensor` of shape `(B, L, out_features)`.
        """
        output = super().forward(hidden_states)
        if image_token_mask is None:
            return output
        # Masked where it is narrow, r channels, and by choice: infinity times zero would be NaN in float16.
        branch = F.linear(hidden_states, self.image_A) * self.image_scaling
        branch = branch.masked_fill(~image_token_mask[..., None], 0.0)
        return output + F.linear(branch, self.image_B)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.image_A.shape[0]}"


class MMARQwen2Attention(Qwen2Attention):
    """Qwen2's attention with PLoRA on q, k, v and o."""

    def __init__(self, config: Qwen2Config, layer_idx: int, rank: int, alpha: float):
        super().__init__(config, layer_idx)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, _with_plora(getattr(self, name), rank, alpha))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        image_token_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # (B, L, heads * head_dim) -> (B, heads, L, head_dim)
        query, key, value = (
            projection(hidden_states, image_token_mask).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2).contiguous(), image_token_mask), weights


class MMARQwen2MLP(Qwen2MLP):
    """Qwen2's gated MLP with PLoRA on gate, up and down."""

    def __init__(self, config: Qwen2Config, rank: int, alpha: float):
        super().__init__(config)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, _with_plora(getattr(self, name), rank, alpha))

    def forward(self, hidden_states: Tensor, image_token_mask: Tensor | None = None) -> Tensor:
        gate = self.act_fn(self.gate_proj(hidden_states, image_token_mask))
        return self.down_proj(gate * self.up_proj(hidden_states, image_token_mask), image_token_mask)


class MMARQwen2DecoderLayer(Qwen2DecoderLayer):
    """Qwen2's layer, handing the image token mask to attention and MLP."""

    def __init__(self, config: Qwen2Config, layer_idx: int, rank: int, alpha: float):
        super().__init__(config, layer_idx)
        self.self_attn = MMARQwen2Attention(config, layer_idx, rank, alpha)
        self.mlp = MMARQwen2MLP(config, rank, alpha)

    def forward(self, hidden_states: Tensor, image_token_mask: Tensor | None = None, **kwargs) -> Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), image_token_mask=image_token_mask, **kwargs)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), image_token_mask)


class MMARQwen2Model(Qwen2Model):
    """
    Qwen2 whose layers carry PLoRA. `forward` takes Qwen2's arguments and `image_token_mask`, a bool tensor `(B, L)`
    that is True at image tokens; without it the result is Qwen2's, bit for bit.
    """

    _no_split_modules = ["MMARQwen2DecoderLayer"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": MMARQwen2DecoderLayer, "attentions": MMARQwen2Attention}

    def __init__(self, config: Qwen2Config, rank: int, alpha: float):
        super().__init__(config)
        self.layers = nn.ModuleList(
            MMARQwen2DecoderLayer(config, layer_idx, rank, alpha) for layer_idx in range(config.num_hidden_layers)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Here and not in MMAR's outer model: each pretrained model initializes its own part.
        super()._init_weights(module)
        if isinstance(module, PLoRALinear):
            init.kaiming_uniform_(module.image_A, a=math.sqrt(5))
            init.zeros_(module.image_B)


def _with_plora(linear: nn.Linear, rank: int, alpha: float) -> PLoRALinear:
    return PLoRALinear(linear.in_features, linear.out_features, rank, alpha, bias=linear.bias is not None)
