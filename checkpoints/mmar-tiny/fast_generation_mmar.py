"""
Faster ways to z and to tokens for the loop of `generation_mmar.py`, equal to its own up to rounding.

* In generation every running token is an image token: one product with W + alpha / r B A takes the place of the base
  linear and its branch.
* All tokens of an image share one RoPE position: instead of them, the text's keys are rotated, once and backwards.
* The last layer runs for the wanted positions only.
* AdaLN depends on the timestep and z, not on the noisy tokens (suppl. Fig. 6): the modulations of many diffusion steps
  are one product.
* A step of DDPM or DDIM is linear in noisy tokens, prediction and noise: its coefficients are read from the scheduler.
* On a CPU, oneDNN packs a weight once instead of in each product.
"""

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from .diffusion_mmar import MMARDiffusionBlock, MMARDiffusionLinear, MMARDiffusionMLP
from .generation_mmar import MMARImageGenerationMixin, TextContext, TokenSampler, rows_at
from .plora_mmar import MMARQwen2Attention, MMARQwen2DecoderLayer, MMARQwen2MLP, MMARQwen2Model, PLoRALinear


# Memory that must be free on a CUDA device, compared with what the language model's layers take: an image needs some.
MEMORY_FACTOR = 1.25
# Attention implementations that PyTorch's own attention may stand for; another one is a user's.
ATTENTION = ("sdpa", "eager")
# Modulations are computed for so many diffusion steps at a time that they hold at most this many elements.
MAX_MODULATION_ELEMENTS = 2**26
# torch's CPU generator fills normals in groups of this size: one draw of complete groups equals draws of each group.
CPU_NORMAL_GROUP = 16
# Fewer multiply-adds or rows than these do not pay for calling the packed product; measured on an AMD EPYC.
MIN_PACKED_MULTIPLY_ADDS, MIN_PACKED_ROWS = 2**20, 2
# Largest difference that is rounding, in a product of a few numbers near 1.
PACKED_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1}


# --------------------------------------------------------------------------------------------- linears packed on a CPU


class PackedLinear:
    r"""
    `x W^T + b` without gradients, with W packed for oneDNN where that is faster.

    Args:
        weight (`torch.FloatTensor` of shape `(out, in)`): W.
        bias (`torch.FloatTensor` of shape `(out,)`, *optional*): b.
        rows (`int`): Of x, about.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        is_large = rows >= MIN_PACKED_ROWS and rows * weight.numel() >= MIN_PACKED_MULTIPLY_ADDS
        is_cpu = weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        self.is_packed = is_large and is_cpu and can_pack(weight.dtype)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs `(..., in)` to `(..., out)`."""
        if not self.is_packed:
            return F.linear(inputs, self.weight, self.bias)
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.weight.dtype)
        output = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return output.view(*inputs.shape[:-1], -1)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linears, which are not public, exist here for a dtype and give the right result."""
    if dtype not in PACKED_TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    weight = torch.linspace(-1, 1, 32 * 16, device="cpu").view(32, 16).to(dtype)
    inputs, bias = (torch.linspace(-1, 1, size, device="cpu").to(dtype) for size in (3 * 16, 32))
    inputs = inputs.view(3, 16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(inputs))
        output = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    expected = F.linear(inputs.double(), weight.double(), bias.double())
    return output.dtype == dtype and bool((output - expected).abs().max() < PACKED_TOLERANCE[dtype])


# ------------------------------------------------------------------------------------- the language model on one image


class FusedPLoRALayer(nn.Module):
    """
    The linears of one layer with PLoRA merged in, W + alpha / r B A; those with the same input are stacked.

    Its buffers are `qkv`, `o`, `gate_up` and `down`, each with `_weight` and `_bias`; they are not saved.
    """

    def __init__(self, layer: MMARQwen2DecoderLayer):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        stacks = {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "o": (attention.o_proj,),
            "gate_up": (mlp.gate_proj, mlp.up_proj),
            "down": (mlp.down_proj,),
        }
        for name, linears in stacks.items():
            biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
            weight = torch.cat([merged_weight(linear) for linear in linears])
            self.register_buffer(f"{name}_weight", weight, persistent=False)
            self.register_buffer(f"{name}_bias", torch.cat(biases) if biases else None, persistent=False)

    def linear(self, name: str, rows: int, outputs: slice = slice(None)) -> PackedLinear:
        """One of the linears, or some of its outputs, ready for about so many rows."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return PackedLinear(weight[outputs], None if bias is None else bias[outputs], rows)


@torch.no_grad()
def merged_weight(linear: PLoRALinear) -> Tensor:
    """W + alpha / r B A `(out, in)`, summed in float32 and in W's dtype."""
    # On an accelerator, products of half precision accumulate in float32 by themselves.
    own = linear.weight.dtype
    dtype = own if linear.weight.is_cuda else torch.promote_types(own, torch.float32)
    weight, factor_A, factor_B = (part.to(dtype) for part in (linear.weight, linear.image_A, linear.image_B))
    # Without autocast, which would round the product.
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight, factor_B, factor_A, alpha=linear.image_scaling).to(own)


def can_fuse(language_model: nn.Module) -> bool:
    """
    Whether PLoRA can be merged: plain floating point weights on one device, modules of exactly the classes known here
    (no adapter on top, no quantized or sharded weight), and no hooks, which the fused layers would pass by.
    """
    config = language_model.config
    if config.rope_parameters.get("rope_type", "default") != "default" or config._attn_implementation not in ATTENTION:
        return False
    if type(language_model) is not MMARQwen2Model:
        return False
    parts = [language_model, language_model.rotary_emb, *language_model.layers.modules(), language_model.norm]
    if any(is_intercepted(part) for part in parts):
        return False
    for layer in language_model.layers:
        if type(layer) is not MMARQwen2DecoderLayer:
            return False
        attention, mlp = layer.self_attn, layer.mlp
        if type(attention) is not MMARQwen2Attention or type(mlp) is not MMARQwen2MLP:
            return False
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        if not all(map(_is_plain, (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj))):
            return False
    return len({parameter.device for parameter in language_model.parameters()}) == 1


def _is_plain(linear: nn.Module) -> bool:
    if type(linear) is not PLoRALinear or type(linear.weight) is not nn.Parameter:
        return False
    return type(linear.weight.data) is Tensor and linear.weight.is_floating_point() and not linear.weight.is_meta


def is_intercepted(module: nn.Module) -> bool:
    """Whether something waits for this module's call: a hook, or a `forward` put in its place, as accelerate does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def fits_in_memory(language_model: MMARQwen2Model) -> bool:
    """Whether a CUDA device has room for a second copy of the layers; of other devices it is assumed."""
    device = language_model.embed_tokens.weight.device
    if device.type != "cuda":
        return True
    free = torch.cuda.mem_get_info(device)[0]
    # What torch keeps and does not use is free too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    parameters = language_model.layers.parameters()
    return MEMORY_FACTOR * sum(part.numel() * part.element_size() for part in parameters) <= free


class FusedPLoRAContext(TextContext):
    r"""
    A `TextContext` that computes the layers itself, with fused weights.

    Args:
        fused (`nn.ModuleList` of `FusedPLoRALayer`): Of each layer.
        language_model, input_ids, attention_mask, num_latents: Of `TextContext`; the language model must `can_fuse`.
    """

    def __init__(
        self,
        fused: nn.ModuleList,
        language_model: MMARQwen2Model,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_latents: int,
    ):
        super().__init__(language_model, input_ids, attention_mask, num_latents)
        config = language_model.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = language_model.layers[0].self_attn.head_dim
        self.num_text, self.head_dim, self.kv_heads, self.groups = (
            input_ids.shape[1],
            head_dim,
            kv_heads,
            heads // kv_heads,
        )
        # Without padding nothing is hidden, and attention is faster without a mask.
        self.mask = None if bool(attention_mask.all()) else self.visible
        rows = len(input_ids) * num_latents
        self.linears = []
        for layer in fused:
            linears = {name: layer.linear(name, rows) for name in ("o", "gate_up", "down")}
            if layer is fused[-1]:
                # Of the last layer, queries are wanted at few positions, keys and values at all.
                of_queries = heads * head_dim
                linears["q"] = layer.linear("qkv", len(input_ids), slice(of_queries))
                linears["kv"] = layer.linear("qkv", rows, slice(of_queries, None))
            else:
                linears["qkv"] = layer.linear("qkv", rows)
            self.linears.append(linears)
        # By the layers' own numbers: a user may have taken some out, or changed their places.
        cached = [self.cache.layers[layer.self_attn.layer_idx] for layer in language_model.layers]
        cos, sin = language_model.rotary_emb(cached[0].keys, self.position_ids)
        wide = torch.promote_types(cached[0].keys.dtype, torch.float32)
        cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)  # (rows, 1, 1, head_dim)
        self.states = []
        for states in cached:
            keys = states.keys.to(wide)  # (rows, kv_heads, P, head_dim)
            # Scores depend on differences of positions only: the image's tokens then need no rotation.
            keys = (keys * cos - rotate_half(keys) * sin).to(states.keys.dtype)
            # The image's tokens are written behind the text in every step.
            self.states.append([F.pad(part, (0, 0, 0, num_latents)) for part in (keys, states.values)])
        self.cache = None

    def condition(self, embeds: Tensor, positions: Tensor) -> Tensor:
        hidden_states = embeds.to(self.dtype)
        for layer, linears, states in zip(self.language_model.layers, self.linears, self.states, strict=True):
            hidden_states = self._layer(layer, linears, *states, hidden_states, positions)
        return self.language_model.norm(hidden_states)

    def _layer(
        self,
        layer: MMARQwen2DecoderLayer,
        linears: dict[str, PackedLinear],
        keys: Tensor,
        values: Tensor,
        hidden_states: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """A layer for all tokens, or, if it is the last, for those at `positions`; all tokens are attended to."""
        kv_width = self.kv_heads * self.head_dim
        inputs = layer.input_layernorm(hidden_states)
        if "qkv" in linears:
            query, key, value = linears["qkv"](inputs).split([self.groups * kv_width, kv_width, kv_width], dim=-1)
        else:
            hidden_states = rows_at(hidden_states, positions)
            query = linears["q"](rows_at(inputs, positions))
            key, value = linears["kv"](inputs).chunk(2, dim=-1)
        for states, part in ((keys, key), (values, value)):
            # (rows, N, kv_heads * head_dim) -> (rows, kv_heads, N, head_dim)
            states[:, :, self.num_text :] = part.unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        # Heads that share a key are more queries of it: (rows, K, heads * d) -> (rows, kv_heads, groups * K, d)
        query = query.unflatten(-1, (self.kv_heads, self.groups, self.head_dim)).permute(0, 2, 3, 1, 4)
        attention = F.scaled_dot_product_attention(
            query.flatten(2, 3).to(keys.dtype), keys, values, attn_mask=self.mask, scale=layer.self_attn.scaling
        )
        # (rows, kv_heads, groups * K, d) -> (rows, K, heads * d)
        attention = attention.view(query.shape).permute(0, 3, 1, 2, 4).flatten(2)
        hidden_states = hidden_states + linears["o"](attention)
        gate, up = linears["gate_up"](layer.post_attention_layernorm(hidden_states)).chunk(2, dim=-1)
        return hidden_states + linears["down"](layer.mlp.act_fn(gate) * up)


# ------------------------------------------------------------------------------------------------- tokens by diffusion


MAX_KEPT_STEPS = 256
_KEPT_STEPS: dict[tuple, "LinearSteps | None"] = {}


@dataclass
class LinearSteps:
    r"""
    A sampler whose step is `keep * noisy_latents + take * prediction + noise_std * noise`.

    Args:
        keep, take, noise_std (`list[float]` of length T): Of each step; without fresh noise `noise_std` is 0.
    """

    keep: list[float]
    take: list[float]
    noise_std: list[float]

    @classmethod
    def of(cls, scheduler: Any, num_inference_steps: int) -> "LinearSteps | None":
        r"""
        Reads the coefficients from a copy of a scheduler that steps from unit vectors.

        Args:
            scheduler (diffusers scheduler): The sampler.
            num_inference_steps (`int`): T.

        Returns:
            `LinearSteps`, or None if its steps are not known to be linear and without memory.
        """
        if type(scheduler) not in (DDPMScheduler, DDIMScheduler):
            return None
        # A hundred steps of a scheduler take longer than a small image: those of the last schedules are kept.
        config = json.dumps(scheduler.config, sort_keys=True, default=str)
        key = type(scheduler), config, scheduler.alphas_cumprod.numpy(force=True).tobytes(), num_inference_steps
        if key not in _KEPT_STEPS:
            if len(_KEPT_STEPS) == MAX_KEPT_STEPS:
                _KEPT_STEPS.clear()
            _KEPT_STEPS[key] = cls._read(copy.deepcopy(scheduler), num_inference_steps)
        return _KEPT_STEPS[key]

    @classmethod
    def _read(cls, scheduler: Any, num_inference_steps: int) -> "LinearSteps | None":
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        scheduler.set_timesteps(num_inference_steps)
        # (noisy latents, prediction): in float64 only the scheduler's own float32 schedule is rounded.
        sample = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
        prediction = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
        noise = torch.randn(3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        steps = cls([], [], [])
        for timestep in scheduler.timesteps:
            kwargs = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}
            output = scheduler.step(prediction, timestep, sample, **kwargs).prev_sample
            noise_std = output[2] / noise[2]
            rest = output - noise_std * noise
            steps.keep.append(float(rest[0]))
            steps.take.append(float(rest[1]))
            steps.noise_std.append(float(noise_std))
        finite = torch.isfinite(torch.tensor([steps.keep, steps.take, steps.noise_std]))
        return steps if bool(finite.all()) else None


class CachedDiffusionHead:
    r"""
    The Diffusion MLP for given timesteps and z: `CachedDiffusionHead(head, ..., z)(step, x)` is
    `head(x, timesteps[step], z)`.

    Args:
        head (`MMARDiffusionMLP`): The network; it must `can_cache`.
        linears (`dict`): What runs in place of some of its linears.
        time_embeddings (`torch.FloatTensor` of shape `(T, W)`): The head's embeddings of the timesteps.
        z (`torch.FloatTensor` of shape `(M, D)`): Conditions.
    """

    def __init__(self, head: MMARDiffusionMLP, linears: dict, time_embeddings: Tensor, z: Tensor):
        self.head, self.linears, self.time_embeddings = head, linears, time_embeddings
        self.projected = linears[head.condition_projection](z.to(head.input_projection.weight.dtype))  # (M, W)
        elements_per_step = self.projected.numel() * (3 * len(head.blocks) + 2)
        self.chunk = max(1, MAX_MODULATION_ELEMENTS // elements_per_step)
        self.first: int | None = None

    def __call__(self, step: int, noisy_latents: Tensor) -> Tensor:
        r"""
        Args:
            step (`int`): Index of the timestep; steps are best taken in order.
            noisy_latents (`torch.FloatTensor` of shape `(m, C)`): x^(t) for the first m <= M conditions.

        Returns:
            `torch.FloatTensor` of shape `(m, C)`, float32.
        """
        if self.first is None or not self.first <= step < self.first + self.chunk:
            self._modulate(step)
        at = step - self.first, slice(len(noisy_latents))
        head, linears = self.head, self.linears
        hidden_states = linears[head.input_projection](noisy_latents.to(self.projected.dtype))
        for block, modulation in zip(head.blocks, self.modulations, strict=True):
            shift, scale, gate = (part[at] for part in modulation)
            update = torch.addcmul(shift, block.norm(hidden_states), scale)
            update = linears[block.linear_2](F.silu(linears[block.linear_1](update)))
            hidden_states = torch.addcmul(hidden_states, gate, update)
        shift, scale = (part[at] for part in self.final_modulation)
        return linears[head.output_projection](torch.addcmul(shift, head.final_norm(hidden_states), scale)).float()

    def _modulate(self, first: int) -> None:
        """Shifts, scales with their 1 added, and gates of the steps from `first` on, each `(T', M, W)`."""
        self.first = first
        times = self.time_embeddings[first : first + self.chunk, None]  # (T', 1, W)
        condition = F.silu(times + self.projected)  # (T', M, W)
        self.modulations = [self.linears[block.modulation](condition).chunk(3, dim=-1) for block in self.head.blocks]
        self.final_modulation = self.linears[self.head.final_modulation](condition).chunk(2, dim=-1)
        for _, scale, *_ in (*self.modulations, self.final_modulation):
            scale.add_(1)


def can_cache(head: nn.Module) -> bool:
    """Whether `CachedDiffusionHead` is the head: its parts are of exactly the classes known here, without hooks."""
    is_known = type(head) is MMARDiffusionMLP and all(type(block) is MMARDiffusionBlock for block in head.blocks)
    return is_known and not any(map(is_intercepted, head.modules()))


class FastTokenSampler(TokenSampler):
    r"""
    A `TokenSampler` that computes what depends on neither noisy tokens nor noise before its loop.

    Args:
        linears (`dict`): Of `CachedDiffusionHead`.
        head, scheduler, num_inference_steps, device: Of `TokenSampler`.
    """

    def __init__(
        self, linears: dict, head: MMARDiffusionMLP, scheduler: Any, num_inference_steps: int, device: torch.device
    ):
        super().__init__(head, scheduler, num_inference_steps, device)
        self.linears, self.steps = linears, LinearSteps.of(scheduler, num_inference_steps)
        self.time_embeddings = head.timestep_embedding(self.scheduler.timesteps.to(device))

    def network(self, z: Tensor) -> Callable[[int, Tensor], Tensor]:
        return CachedDiffusionHead(self.head, self.linears, self.time_embeddings, z)

    def __call__(self, z: Tensor, guidance_scales: list[float] | None, generators: list[torch.Generator]) -> Tensor:
        if self.steps is None:
            return super().__call__(z, guidance_scales, generators)
        network, steps = self.network(z), self.steps
        noisy_latents = self.initial_noise(z if guidance_scales is None else z.chunk(2)[0], generators)
        num_draws, count = sum(std != 0 for std in steps.noise_std), len(noisy_latents) // len(generators)
        noise = [step_noise(own, num_draws, count, noisy_latents.shape[1]).to(z.device) for own in generators]
        fresh = iter(torch.cat(noise, dim=1))  # (M, C) for each draw
        for step, (keep, take, std) in enumerate(zip(steps.keep, steps.take, steps.noise_std, strict=True)):
            v = self.guided(network, step, noisy_latents, guidance_scales)
            noisy_latents = (noisy_latents * keep).add_(v, alpha=take)
            if std != 0:
                noisy_latents.add_(next(fresh), alpha=std)
        return noisy_latents


def step_noise(generator: torch.Generator, num_steps: int, num_tokens: int, channels: int) -> Tensor:
    """Normals `(num_steps, num_tokens, channels)`: what as many draws of `(1, channels)` would give, in that order."""
    shape = (num_steps, num_tokens, channels)
    kwargs = {"generator": generator, "device": generator.device, "dtype": torch.float32}
    if generator.device.type == "cpu" and channels % CPU_NORMAL_GROUP == 0:
        return torch.randn(shape, **kwargs)
    draws = [torch.randn(channels, **kwargs) for _ in range(num_steps * num_tokens)]
    return torch.stack(draws).view(shape) if draws else torch.zeros(shape, device=generator.device)


# ----------------------------------------------------------------------------------------------------------- the model


class MMARFastGenerationMixin(MMARImageGenerationMixin):
    """`generate_images` in the faster ways where they can be taken; `fast=False` takes the plain ones."""

    # Weights that `fuse_plora` keeps.
    fused_plora: nn.ModuleList | None

    @torch.no_grad()
    def fuse_plora(self) -> None:
        """
        Merges PLoRA into a second copy of the language model's layers, and keeps it for the next images.

        Without this, the copy is made in each call of `generate_images`. It is dropped by `unfuse_plora`, `train` and
        `load_state_dict`. After weights were changed in another way, fuse again.

        Raises:
            ValueError: If the weights cannot be merged, such as quantized ones or those under an adapter.
        """
        language_model = self.model.language_model
        if not can_fuse(language_model):
            raise ValueError(
                "`fuse_plora` must be called on a language model of plain MMAR layers with floating point weights on "
                "one device; got other modules or weights, an adapter on top, or hooks. Generate without it."
            )
        self.fused_plora = _fused(language_model)

    def unfuse_plora(self) -> None:
        """Drops what `fuse_plora` keeps."""
        self.fused_plora = None

    def can_be_fast(self) -> bool:
        return self.fused_plora is not None or fits_in_memory(self.model.language_model)

    @torch.no_grad()
    def text_context(self, input_ids: Tensor, attention_mask: Tensor, fast: bool) -> TextContext:
        language_model = self.model.language_model
        if not fast or not can_fuse(language_model):
            return super().text_context(input_ids, attention_mask, fast)
        fused = _fused(language_model) if self.fused_plora is None else self.fused_plora
        return FusedPLoRAContext(fused, language_model, input_ids, attention_mask, self.config.num_latents)

    def token_samplers(
        self, scheduler: Any, step_counts: set[int], device: torch.device, rows: int, fast: bool
    ) -> dict[int, TokenSampler]:
        head = self.diffusion_mlp
        if not fast or not can_cache(head):
            return super().token_samplers(scheduler, step_counts, device, rows, fast)
        linears = {part: part for part in head.modules()}
        for part in linears:
            if type(part) is MMARDiffusionLinear and type(part.weight) is nn.Parameter:
                linears[part] = PackedLinear(part.weight, part.bias, rows)
        return {count: FastTokenSampler(linears, head, scheduler, count, device) for count in step_counts}


def _fused(language_model: MMARQwen2Model) -> nn.ModuleList:
    return nn.ModuleList(FusedPLoRALayer(layer) for layer in language_model.layers)
