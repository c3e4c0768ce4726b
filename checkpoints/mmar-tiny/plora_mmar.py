"""
Partial LoRA on Qwen2 (Sec. 3.3.2): every linear of every layer gets a low-rank branch for image tokens only.

Which tokens those are is an argument, not state: Qwen2's attention, MLP, layer and model are subclassed to pass it on.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
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

from .masking_mmar import true_places
from .prefix_mmar import split_arguments


class _BranchOfImageTokens(torch.autograd.Function):
    """
    Adds `B (scaling A x)` to the rows of image tokens: x `(T, in)`, `output` `(T, out)`, all of one dtype.

    With a backward of its own, which gathers those rows again: autograd would keep a copy of them for every linear.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, image_A: Tensor, image_B: Tensor, scaling: float, index: Tensor
    ) -> Tensor:
        branch = F.linear(inputs.index_select(0, index), image_A) * scaling  # (M, r)
        ctx.save_for_backward(inputs, branch, image_A, image_B, index)
        ctx.scaling = scaling
        return output.index_add(0, index, F.linear(branch, image_B))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, branch, image_A, image_B, index = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            of_images = gradient.index_select(0, index)
            of_branch = of_images @ image_B * ctx.scaling  # (M, r)
            of_inputs = torch.zeros_like(inputs).index_add_(0, index, of_branch @ image_A)
            of_A = of_branch.T @ inputs.index_select(0, index)
            of_B = of_images.T @ branch
        return gradient, of_inputs, of_A, of_B, None, None


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

    def forward(self, hidden_states: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        r"""
        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, L, in_features)`): Input.
            image_tokens (`torch.Tensor`, *optional*): A bool mask of shape `(B, L)`, True at image tokens, or their
                numbers among the `B * L` tokens, int64 of shape `(M,)`: then only they pass the branch. Without it
                the branch is skipped and the result is that of the base layer, bit for bit.

        Returns:
            `torch.FloatTensor` of shape `(B, L, out_features)`.
        """
        output = super().forward(hidden_states)
        if image_tokens is None:
            return output
        if image_tokens.dtype == torch.bool:
            # Masked where it is narrow, r channels, and by choice: infinity times zero would be NaN in float16.
            branch = F.linear(hidden_states, self.image_A) * self.image_scaling
            branch = branch.masked_fill(~image_tokens[..., None], 0.0)
            return output + F.linear(branch, self.image_B)
        # In the dtype of the base layer, which knows about autocast. (B, L, in) -> (B * L, in)
        inputs, factor_A, factor_B = (part.to(output.dtype) for part in (hidden_states, self.image_A, self.image_B))
        with torch.autocast(output.device.type, enabled=False):
            flat = _BranchOfImageTokens.apply(
                output.flatten(0, -2), inputs.flatten(0, -2), factor_A, factor_B, self.image_scaling, image_tokens
            )
        return flat.view(output.shape)

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
        image_tokens: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # (B, L, heads * head_dim) -> (B, heads, L, head_dim)
        query, key, value = (
            projection(hidden_states, image_tokens).view(shape).transpose(1, 2)
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
        return self.o_proj(output.flatten(2).contiguous(), image_tokens), weights


class MMARQwen2MLP(Qwen2MLP):
    """Qwen2's gated MLP with PLoRA on gate, up and down."""

    def __init__(self, config: Qwen2Config, rank: int, alpha: float):
        super().__init__(config)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, _with_plora(getattr(self, name), rank, alpha))

    def forward(self, hidden_states: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        gate = self.act_fn(self.gate_proj(hidden_states, image_tokens))
        return self.down_proj(gate * self.up_proj(hidden_states, image_tokens), image_tokens)


class MMARQwen2DecoderLayer(Qwen2DecoderLayer):
    """Qwen2's layer, telling attention and MLP which tokens are of images."""

    def __init__(self, config: Qwen2Config, layer_idx: int, rank: int, alpha: float):
        super().__init__(config, layer_idx)
        self.self_attn = MMARQwen2Attention(config, layer_idx, rank, alpha)
        self.mlp = MMARQwen2MLP(config, rank, alpha)

    def forward(
        self, hidden_states: Tensor, image_tokens: Tensor | None = None, num_prefix_tokens: int = 0, **kwargs
    ) -> Tensor:
        r"""
        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, L, D)`): Input.
            image_tokens (`torch.Tensor`, *optional*): As `PLoRALinear` takes it, for the tokens behind the prefix.
            num_prefix_tokens (`int`, *optional*, defaults to 0): So many tokens of each row are computed without
                gradients (prefix_mmar.py).
            **kwargs: Of Qwen2's layer.

        Returns:
            `torch.FloatTensor` of shape `(B, L, D)`.
        """
        if num_prefix_tokens == 0:
            return self._transform(self._attend(hidden_states, image_tokens, **kwargs), image_tokens)
        prefix, rest = hidden_states[:, :num_prefix_tokens], hidden_states[:, num_prefix_tokens:]
        kwargs_of_prefix, kwargs = split_arguments(num_prefix_tokens, **kwargs)
        with torch.no_grad():
            prefix = self._attend(prefix, **kwargs_of_prefix)
        rest = self._transform(self._attend(rest, image_tokens, **kwargs), image_tokens)
        with torch.no_grad():
            # Last: gradient checkpointing computes a layer again up to what backward needs, and this it does not.
            prefix = self._transform(prefix)
        return torch.cat([prefix, rest], dim=1)

    def _attend(self, hidden_states: Tensor, image_tokens: Tensor | None = None, **kwargs) -> Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), image_tokens=image_tokens, **kwargs)
        return hidden_states + attention

    def _transform(self, hidden_states: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), image_tokens)


class MMARQwen2Model(Qwen2Model):
    """
    Qwen2 whose layers carry PLoRA. `forward` takes Qwen2's arguments and `image_token_mask`, a bool tensor `(B, L)`
    that is True at image tokens; without it the result is Qwen2's, bit for bit. With `num_image_tokens`, their number,
    only they pass PLoRA. With `num_prefix_tokens` the first tokens of each row, none of an image, are computed without
    gradients.
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

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        # Qwen2's plans know nothing of PLoRA's factors.
        self._tp_plan, self._pp_plan = {}, {}

    def forward(
        self,
        *args,
        image_token_mask: Tensor | None = None,
        num_image_tokens: int | None = None,
        num_prefix_tokens: int = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        image_tokens = image_token_mask
        if image_tokens is not None and num_image_tokens is not None:
            # In training, image tokens are selected by index so that text skips the branch.
            image_tokens = true_places(image_tokens[:, num_prefix_tokens:], num_image_tokens)
        return super().forward(*args, image_tokens=image_tokens, num_prefix_tokens=num_prefix_tokens, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Here and not in MMAR's outer model: each pretrained model initializes its own part.
        super()._init_weights(module)
        if isinstance(module, PLoRALinear):
            init.kaiming_uniform_(module.image_A, a=math.sqrt(5))
            init.zeros_(module.image_B)


def _with_plora(linear: nn.Linear, rank: int, alpha: float) -> PLoRALinear:
    return PLoRALinear(linear.in_features, linear.out_features, rank, alpha, bias=linear.bias is not None)
